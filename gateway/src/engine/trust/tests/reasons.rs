//! Every reason for which an engine goes out of service, and what is none.

use super::quarantine::serving;
use super::*;

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
    let outer = [&packet[..], &[(Fault::Outer, Reason::Header)]].concat();
    let cases = [
        (false, OffloadMode::Crypto, &crypto[..]),
        (false, OffloadMode::Packet, &packet),
        (true, OffloadMode::Packet, &outer),
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
