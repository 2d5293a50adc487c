//! Out of service and back: every reason, and what becomes of SAs and frames.

use sa_store::runtime::event;

use super::*;

fn serving(rig: &mut Rig) {
    rig.healed();
    assert_eq!(rig.state().0, EngineState::Serving);
}

#[test]
fn one_wrong_answer_decides_at_once_and_does_not_leave() {
    let crypto = [
        (Fault::SameIv, Reason::Iv),
        (Fault::NewIv, Reason::Iv),
        (Fault::Spi, Reason::Header),
        (Fault::SameNumber, Reason::Header),
        (Fault::FarNumber, Reason::Header),
        (Fault::Short, Reason::Length),
        (Fault::Untouched, Reason::Plaintext),
        (Fault::Swap, Reason::Order),
        (Fault::Sa, Reason::Stranger),
    ];
    let packet = [
        (Fault::SameIv, Reason::Iv),
        (Fault::Spi, Reason::Header),
        (Fault::SameNumber, Reason::Number),
        (Fault::FarNumber, Reason::Number),
        (Fault::Short, Reason::Length),
        (Fault::Untouched, Reason::Length),
        (Fault::Swap, Reason::Order),
        (Fault::Sa, Reason::Stranger),
    ];
    let cases = [
        (false, OffloadMode::Crypto, &crypto[..]),
        (false, OffloadMode::Packet, &packet),
        (true, OffloadMode::Packet, &packet),
    ];
    for (bare, mode, list) in cases {
        for &(fault, reason) in list {
            let mut rig = Rig::new(bare, config(), Script::default());
            let out = rig.sa(gcm(), Direction::Out, mode);
            rig.send(out, 2);
            assert_eq!(rig.take(), all(1..=2, JobStatus::Done));
            rig.faults([Fault::Right, fault]);
            rig.send(out, 5);
            rig.poll();
            assert_eq!(rig.state().1, reason, "{fault:?} {mode:?} {bare}");
            assert_eq!(rig.trust.quarantines.value(), 1);
            rig.healed();
            let got = rig.take();
            assert_eq!(got.len(), 5, "{fault:?}");
            let mut done: Vec<u64> = got
                .iter()
                .filter(|(_, s)| *s == JobStatus::Done)
                .map(|(seq, _)| *seq)
                .collect();
            if fault == Fault::Swap {
                // The later one left; the earlier one may not any more.
                assert_eq!(done, [4], "{mode:?}");
                done = vec![3];
            }
            assert_eq!(done, [3], "{fault:?} {mode:?}");
            assert_eq!(rig.state().0, EngineState::Serving);
            rig.end();
        }
    }
}

#[test]
fn a_result_that_nobody_waits_for_stops_the_engine_and_the_job_comes_back() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.faults([Fault::Tag]);
    rig.send(out, 2);
    rig.poll();
    assert_eq!(rig.state().1, Reason::Stranger);
    serving(&mut rig);
    let mut got = rig.take();
    got.sort_unstable_by_key(|(seq, _)| *seq);
    assert_eq!(got, all(1..=2, JobStatus::Failed));
    rig.end();
}

#[test]
fn with_full_verification_nothing_wrong_is_delivered_in_either_direction() {
    let full = TrustConfig {
        sample_out: 1,
        sample_in: 1,
        ..config()
    };
    for (bare, mode) in KINDS {
        for direction in [Direction::Out, Direction::In] {
            for fault in [Fault::Body, Fault::Mismatch] {
                let mut rig = Rig::new(bare, full.clone(), Script::default());
                let sa = rig.sa(cbc(), direction, mode);
                rig.faults([Fault::Right, Fault::Right, fault]);
                for seq in 1..=5 {
                    rig.queue(sa, seq);
                }
                rig.submit();
                rig.poll();
                // An outbound packet has no ICV that could be wrong.
                let reason = Reason::Sample;
                assert_eq!(
                    rig.state().1,
                    reason,
                    "{bare} {mode:?} {direction:?} {fault:?}"
                );
                rig.healed();
                // `take` checks all that is said to be done.
                let got = rig.take();
                assert_eq!(got[..2], all(1..=2, JobStatus::Done));
                assert_eq!(got[2..], all(3..=5, JobStatus::Failed));
                assert_eq!(rig.trust.samples_failed.value(), 1);
                rig.end();
            }
        }
    }
}

#[test]
fn with_full_verification_packets_wait_for_a_place() {
    let full = TrustConfig {
        sample_out: 1,
        sample_places: 3,
        ..config()
    };
    let mut rig = Rig::new(false, full, Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.send(out, 10);
    assert_eq!((rig.jobs.len(), rig.trusted().in_flight()), (7, 3));
    let mut got = rig.take();
    while !rig.jobs.is_empty() {
        rig.submit();
        got.append(&mut rig.take());
    }
    assert_eq!(got, all(1..=10, JobStatus::Done));
    assert_eq!(rig.trust.samples.value(), 10);
    rig.end();
}

#[test]
fn a_forgery_that_the_engine_accepts_is_found_by_a_sample() {
    let full = TrustConfig {
        sample_in: 1,
        ..config()
    };
    let mut rig = Rig::new(false, full, Script::default());
    let inb = rig.sa(cbc(), Direction::In, OffloadMode::Crypto);
    rig.faults([Fault::Gullible]);
    rig.queue(inb, 1);
    let data = rig.jobs[0].frame.data_mut();
    let last = data.len() - 1;
    data[last] ^= 1;
    rig.submit();
    rig.poll();
    assert_eq!(rig.state().1, Reason::Sample);
    rig.healed();
    assert_eq!(rig.take(), all([1], JobStatus::Failed));
    rig.end();
}

#[test]
fn corruption_is_found_within_twice_the_sampling_interval() {
    let sampled = TrustConfig {
        sample_out: 64,
        canaries: Duration::ZERO,
        ..config()
    };
    let mut rig = Rig::new(false, sampled, Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    for _ in 0..32 {
        rig.send(out, 64);
        assert!(rig.take().iter().all(|(_, s)| *s == JobStatus::Done));
    }
    assert_eq!(rig.trust.samples.value(), 32);
    let mut wrong = 0;
    while rig.trust.samples_failed.value() == 0 {
        rig.faults([Fault::Icv]);
        rig.send(out, 1);
        rig.poll();
        wrong += 1;
        assert!(wrong < 128);
        let jobs = std::mem::take(&mut rig.done);
        jobs.into_iter().for_each(|j| rig.pool.put(j.frame));
    }
    assert_eq!(rig.state().1, Reason::Sample);
    rig.healed();
    rig.end();
}

#[test]
fn a_canary_that_sings_wrong_stops_the_engine() {
    for (bare, mode) in KINDS {
        for fault in [Fault::Body, Fault::Gullible, Fault::Mismatch] {
            let mut rig = Rig::new(bare, config(), Script::default());
            rig.sa(cbc(), Direction::In, mode);
            rig.later(0);
            assert_eq!(rig.trust.canaries.value(), 2);
            rig.script().private = Some(fault);
            for _ in 0..4 {
                rig.later(SECOND);
            }
            assert_eq!(rig.state().1, Reason::Canary, "{fault:?} {bare} {mode:?}");
            assert!(rig.trust.canaries_failed.value() > 0);
            rig.script().private = None;
            rig.end();
        }
    }
}

#[test]
fn three_lost_canaries_stop_an_engine_without_traffic() {
    let mut rig = Rig::new(false, config(), Script::default());
    rig.sa(cbc(), Direction::In, OffloadMode::Crypto);
    rig.later(0);
    rig.script().private = Some(Fault::Failed);
    rig.later(SECOND);
    rig.later(SECOND);
    assert_eq!(rig.state().1, Reason::Canary);
    rig.script().private = None;
    rig.end();
}

#[test]
fn every_suite_and_mode_in_use_has_its_canaries_in_turn() {
    let mut rig = Rig::new(false, config(), Script::default());
    rig.sa(cbc(), Direction::Out, OffloadMode::Crypto);
    rig.sa(gcm(), Direction::In, OffloadMode::Crypto);
    let third = rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    let private = |rig: &Rig| {
        let installed = rig.script().installed.clone();
        installed.iter().filter(|i| i.index >= SAS).count()
    };
    for n in 1..=5 {
        rig.later(SECOND);
        assert_eq!(private(&rig), 2 * n.min(3));
    }
    rig.remove(third);
    assert_eq!(rig.trust.canaries.value(), 10);
    rig.end();
}

#[test]
fn an_engine_that_is_full_has_room_for_its_checks() {
    for bare in [false, true] {
        let mode = match bare {
            true => OffloadMode::Packet,
            false => OffloadMode::Crypto,
        };
        let few = Script {
            slots: Some(32),
            ..Script::default()
        };
        let mut rig = Rig::new(bare, config(), few);
        let slots = rig.trusted().capabilities().slots;
        assert_eq!(slots, 32 - 4);
        for n in 0..slots {
            let suite = [gcm(), cbc()][n % 2];
            rig.sa(suite, Direction::In, mode);
        }
        for _ in 0..4 {
            rig.later(SECOND);
        }
        assert_eq!(rig.trust.canaries.value(), 8);
        rig.script().ill = true;
        rig.later(0);
        serving(&mut rig);
        for _ in 0..8 {
            rig.later(SECOND);
        }
        assert!(rig.trust.canaries.value() > 16);
        assert_eq!(rig.script().installed.len(), 32);
        rig.end();
    }
}

#[test]
fn losses_are_judged_by_their_rate() {
    for (lost, expected) in [(1, EngineState::Serving), (3, EngineState::Recovering)] {
        let mut rig = Rig::new(false, config(), Script::default());
        let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
        rig.faults(std::iter::repeat_n(Fault::Failed, lost));
        rig.send(out, 200);
        let got = rig.take();
        assert_eq!(
            got.iter().filter(|(_, s)| *s == JobStatus::Failed).count(),
            lost
        );
        assert_eq!(rig.state().0, EngineState::Serving);
        rig.clock.fetch_add(SECOND, Relaxed);
        rig.poll();
        assert_eq!(rig.state().0, expected);
        if lost > 1 {
            assert_eq!(rig.state().1, Reason::Loss);
        }
        rig.healed();
        rig.end();
    }
}

#[test]
fn few_losses_among_few_jobs_are_no_rate() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.faults(std::iter::repeat_n(Fault::Failed, 50));
    rig.send(out, 90);
    rig.take();
    rig.later(SECOND);
    assert_eq!(rig.state().0, EngineState::Serving);
    rig.end();
}

#[test]
fn an_engine_that_stands_still_is_reset_and_gives_its_frames_back() {
    for (bare, mode) in KINDS {
        let silent = TrustConfig {
            canaries: Duration::ZERO,
            ..config()
        };
        let mut rig = Rig::new(bare, silent, Script::default());
        let out = rig.sa(gcm(), Direction::Out, mode);
        rig.script().hangs = true;
        rig.send(out, 5);
        rig.later(2 * SECOND);
        assert_eq!(rig.state().0, EngineState::Serving);
        rig.tick(1);
        assert_eq!(rig.state(), (EngineState::Recovering, Reason::Deadline));
        assert_eq!(rig.trusted().in_flight(), 5);
        serving(&mut rig);
        assert_eq!(rig.take(), all(1..=5, JobStatus::Failed));
        assert_eq!(rig.trust.lost.value(), 5);
        rig.end();
    }
}

#[test]
fn one_job_that_stays_away_is_fetched_by_a_reset() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.faults([Fault::Away]);
    rig.send(out, 1);
    for n in 0..16 {
        rig.send(out, 10);
        rig.later(SECOND);
        rig.take();
        assert_eq!(rig.state().0, EngineState::Serving, "{n}");
    }
    assert_eq!(rig.trust.lost.value(), 1);
    rig.later(1);
    assert_eq!(rig.state().1, Reason::Deadline);
    serving(&mut rig);
    assert_eq!(rig.take(), all([1], JobStatus::Failed));
    rig.end();
}

#[test]
fn a_driver_that_distrusts_its_engine_is_believed() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.script().ill = true;
    rig.script().bad_resets = 1;
    rig.send(out, 3);
    assert_eq!(rig.state(), (EngineState::Recovering, Reason::Driver));
    assert_eq!(rig.take(), all(1..=3, JobStatus::Failed));
    rig.send(out, 3);
    assert_eq!(rig.take(), all(4..=6, JobStatus::Done));
    rig.healed();
    rig.later(SECOND);
    serving(&mut rig);
    assert_eq!(rig.trust.fallback.value(), 3);
    rig.end();
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
