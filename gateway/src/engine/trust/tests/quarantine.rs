//! Out of service and back: what becomes of SAs and frames.

use sa_store::runtime::event;

use super::*;

pub(super) fn serving(rig: &mut Rig) {
    rig.healed();
    assert_eq!(rig.state().0, EngineState::Serving);
}

/// Keeps the engine out of service: its resets fail, at first without a pause, then with one that virtual time does not end.
fn out_of_service(rig: &mut Rig) {
    rig.script().bad_resets = 1;
    rig.script().ill = true;
    rig.later(0);
    rig.healed();
    assert_eq!(rig.state().0, EngineState::Quarantined);
}

#[test]
fn the_cpu_carries_what_it_may_while_the_engine_is_out_of_service() {
    let mut rig = Rig::new(false, config(), Script::default());
    let seal = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    let open = rig.sa(cbc(), Direction::In, OffloadMode::Crypto);
    let trimmed = rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    let numbered = rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
    out_of_service(&mut rig);
    rig.send(seal, 3);
    rig.receive(open, 1..=3);
    assert_eq!(
        rig.take(),
        [all(1..=3, JobStatus::Done), all(1..=3, JobStatus::Done)].concat()
    );
    rig.receive(trimmed, 1..=3);
    assert!(rig.done.iter().all(|j| j.mode == OffloadMode::Software));
    assert_eq!(rig.take(), all(1..=3, JobStatus::Done));
    // Its numbers go on where they were: it waits.
    rig.send(numbered, 2);
    assert_eq!(rig.take(), all(1..=2, JobStatus::Failed));
    assert!(!rig.entry(numbered).disabled());
    assert_eq!(
        (rig.trust.fallback.value(), rig.trust.refused.value()),
        (9, 2)
    );
    rig.later(SECOND);
    serving(&mut rig);
    for sa in [seal, numbered] {
        let from = rig.entry(sa).next_seq();
        rig.send(sa, 2);
        assert_eq!(rig.take(), all(from..from + 2, JobStatus::Done));
    }
    rig.receive(trimmed, 4..=6);
    assert!(rig.done.iter().all(|j| j.mode == OffloadMode::Packet));
    assert_eq!(rig.take(), all(4..=6, JobStatus::Done));
    assert_eq!(rig.trust.fallback.value(), 9);
    rig.end();
}

#[test]
fn an_engine_that_cannot_number_anew_loses_its_senders_for_good() {
    let mut rig = Rig::new(true, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Packet);
    let used = rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    let fresh = rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    rig.send(out, 3);
    rig.receive(used, 1..=3);
    rig.take();
    rig.entry(used).live.window.commit(3);
    out_of_service(&mut rig);
    rig.submit();
    assert!(rig.entry(out).disabled());
    assert_eq!(
        rig.entry(out).events() & event::ENGINE_LOST,
        event::ENGINE_LOST
    );
    for seq in 4..=6 {
        rig.queue(out, seq);
    }
    rig.submit();
    assert_eq!(rig.take(), all(4..=6, JobStatus::LimitReached));
    rig.receive(used, 4..=6);
    assert_eq!(rig.take(), all(4..=6, JobStatus::Done));
    rig.later(SECOND);
    serving(&mut rig);
    rig.submit();
    // Back in service: still not under that key.
    rig.queue(out, 7);
    rig.submit();
    assert_eq!(rig.take(), all([7], JobStatus::LimitReached));
    // What has carried packets stays with the CPU, what has not goes back.
    rig.receive(used, 7..=8);
    rig.receive(fresh, 1..=2);
    rig.poll();
    let modes: Vec<_> = rig.done.iter().map(|j| j.mode).collect();
    assert_eq!(modes[..2], [OffloadMode::Software; 2]);
    assert_eq!(modes[2..], [OffloadMode::Packet; 2]);
    rig.take();
    assert!(!rig.script().installed.contains(&out));
    rig.end();
}

#[test]
fn sas_come_and_go_while_the_engine_is_away() {
    for bare in [false, true] {
        let mode = match bare {
            true => OffloadMode::Packet,
            false => OffloadMode::Crypto,
        };
        let mut rig = Rig::new(bare, config(), Script::default());
        let stays = rig.sa(cbc(), Direction::In, mode);
        let goes = rig.sa(cbc(), Direction::In, mode);
        out_of_service(&mut rig);
        rig.remove(goes);
        rig.script().ever.clear();
        let comes = rig.add(cbc(), Direction::In, mode);
        // What the engine would number or window cannot wait for it.
        assert_eq!(rig.install(comes).is_ok(), !bare);
        if !bare {
            rig.receive(comes, 1..=2);
            assert_eq!(rig.take(), all(1..=2, JobStatus::Done));
            assert_eq!(rig.trust.fallback.value(), 2);
        }
        rig.later(SECOND);
        serving(&mut rig);
        rig.submit();
        rig.receive(stays, 1..=2);
        assert_eq!(rig.take(), all(1..=2, JobStatus::Done));
        let script = rig.script();
        assert!(!script.ever.contains(&goes) && !script.installed.contains(&goes));
        assert_eq!(script.installed.contains(&comes), !bare);
        assert!(script.installed.contains(&stays));
        drop(script);
        rig.end();
    }
}

#[test]
fn pauses_double_and_end_in_giving_up() {
    let patience = TrustConfig {
        most_failures: 5,
        longest_pause: Duration::from_secs(6),
        ..config()
    };
    let mut rig = Rig::new(false, patience, Script::default());
    let seal = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    let numbered = rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
    rig.script().bad_resets = u32::MAX;
    rig.script().hangs = true;
    rig.send(seal, 2);
    rig.later(2 * SECOND + 1);
    rig.healed();
    for (n, pause) in [(1, 1), (2, 2), (3, 4), (4, 6)] {
        assert_eq!(rig.state().0, EngineState::Quarantined, "{n}");
        assert_eq!(rig.script().resets, n);
        rig.later(pause * SECOND - 1);
        assert_eq!(rig.state().0, EngineState::Quarantined, "{n}");
        rig.later(1);
        rig.healed();
    }
    assert_eq!(rig.state(), (EngineState::Dead, Reason::Deadline));
    assert_eq!(rig.trust.resets_failed.value(), 5);
    // Its frames stay with it; everything else goes on.
    assert_eq!(rig.trusted().in_flight(), 2);
    rig.submit();
    assert_eq!(
        rig.entry(numbered).events() & event::ENGINE_LOST,
        event::ENGINE_LOST
    );
    rig.send(seal, 2);
    assert_eq!(rig.take(), all(3..=4, JobStatus::Done));
    let late = rig.add(gcm(), Direction::Out, OffloadMode::Crypto);
    assert!(rig.install(late).is_err());
    rig.later(1000 * SECOND);
    assert_eq!(rig.state().0, EngineState::Dead);
    rig.trusted = None;
    assert_eq!(rig.arena.outstanding(), 0);
}

#[test]
fn an_engine_that_fails_soon_after_it_is_back_pauses_first() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    let fail = |rig: &mut Rig| {
        rig.faults([Fault::Spi]);
        rig.send(out, 3);
        rig.poll();
        rig.healed();
        // Frames are home at once, whatever the pause.
        assert_eq!(rig.trusted().in_flight(), 0);
        rig.take();
    };
    fail(&mut rig);
    assert_eq!(rig.state().0, EngineState::Serving);
    for pause in [1, 2, 4] {
        fail(&mut rig);
        assert_eq!(rig.state().0, EngineState::Quarantined);
        rig.later(pause * SECOND - 1);
        assert_eq!(rig.state().0, EngineState::Quarantined);
        rig.later(1);
        assert_eq!(rig.state().0, EngineState::Serving);
    }
    // A minute of good service, and it begins anew.
    rig.later(61 * SECOND);
    fail(&mut rig);
    assert_eq!(rig.state().0, EngineState::Serving);
    rig.end();
}

#[test]
fn a_reset_that_is_asked_for_gives_everything_back() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.script().hangs = true;
    rig.send(out, 4);
    let Rig { trusted, done, .. } = &mut rig;
    trusted.as_mut().unwrap().reset(done).unwrap();
    assert_eq!(rig.take(), all(1..=4, JobStatus::Failed));
    assert_eq!(rig.state(), (EngineState::Serving, Reason::Asked));
    rig.end();
}

#[test]
fn an_engine_that_is_away_at_the_end_comes_home_first() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.script().hangs = true;
    rig.send(out, 4);
    rig.tick(3 * SECOND);
    assert_eq!(rig.state().0, EngineState::Recovering);
    rig.trusted = None;
    let done = std::mem::take(&mut rig.done);
    done.into_iter().for_each(|j| rig.pool.put(j.frame));
    assert_eq!(rig.arena.outstanding(), 0);
}

#[test]
fn an_engine_that_is_opened_anew_gets_its_sas_again() {
    let mut rig = Rig::reopening(false, config());
    let seal = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    let open = rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    let numbered = rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
    let gone = rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
    rig.script().bad_resets = 1;
    rig.script().hangs = true;
    rig.send(seal, 2);
    rig.send(numbered, 3);
    rig.tick(3 * SECOND);
    rig.remove(gone);
    rig.healed();
    assert_eq!(rig.state().0, EngineState::Serving);
    assert_eq!(
        rig.take()
            .iter()
            .filter(|(_, s)| *s == JobStatus::Failed)
            .count(),
        5
    );
    rig.submit();
    let mut installed = rig.script().installed.clone();
    installed.retain(|id| id.index < SAS);
    installed.sort_unstable();
    assert_eq!(installed, [seal, open, numbered]);
    rig.send(seal, 2);
    assert_eq!(rig.take(), all(3..=4, JobStatus::Done));
    rig.send(numbered, 2);
    assert_eq!(rig.take(), all(4..=5, JobStatus::Done));
    rig.receive(open, 1..=2);
    assert_eq!(rig.take(), all(1..=2, JobStatus::Done));
    assert_eq!(rig.trust.fallback.value(), 0);
    rig.end();
}
