//! The engine over a device that the test plays by hand.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use sa_store::runtime::Start;
use sa_store::sa::Direction;
use sa_store::suite::{AeadIcv, AesBits, Suite};

pub(crate) use super::rig::*;
use super::*;
use crate::engine::JobKind;
use crate::qdma::hub::dummy_header;

fn done(tags: std::ops::Range<u64>) -> Vec<(u64, JobStatus)> {
    tags.map(|t| (t, JobStatus::Done)).collect()
}

#[test]
fn a_packet_goes_in_as_the_reference_has_it_and_its_result_comes_from_any_ring() {
    let mut rig = rig(SoeConfig::default());
    for _ in 0..5 {
        // Slots are taken in turn.
        let used = u32::try_from(rig.engine.used_slots()).unwrap();
        rig.install(Direction::Out, used);
    }
    rig.install(Direction::Out, 5);
    assert!(rig.seal(5, 0..2, 100).is_empty());
    let given = rig.requests();
    assert_eq!(given.len(), 2);
    assert_eq!(given[0].msg, [0x0500_0000, 0x7f74_27ff, 0xff00_ffff]);
    assert_eq!(given[0].bytes[..4], [0x81, 0xff, 0xff, 0xff]);
    assert_eq!(given[0].bytes[28..32], [5, 5, 0xa0, 0]);
    assert_eq!(given[0].bytes[32..46], dummy_header(false));
    assert_eq!(given[0].bytes[46..], inner(100));
    for (ring, number) in [(1, 1), (10, 2)] {
        rig.result(ring, 5, 3, &sealed(100, number));
        rig.engine.poll(&mut rig.done);
    }
    let job = &rig.done[1];
    assert_eq!((job.seq, job.esp_off, job.esp_end), (2, 20, 168));
    assert_eq!(job.frame.data(), sealed(100, 2));
    assert_eq!(rig.poll(), done(0..2));
    assert_eq!(rig.engine.in_flight(), 0);
    rig.end();
}

#[test]
fn a_run_of_many_sas_costs_one_doorbell_and_no_sa_has_more_than_four_in_the_engine() {
    let mut rig = rig(SoeConfig {
        waiting: 8,
        ..SoeConfig::default()
    });
    rig.install(Direction::Out, 0);
    rig.install(Direction::Out, 1);
    let mut jobs = Vec::new();
    for tag in 0..20 {
        jobs.push(rig.job(u32::from(tag % 2 == 1), JobKind::Seal, tag, &inner(60)));
    }
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    // Eight of each wait, four of these are in the engine; the last ones stay with the caller, in order.
    assert_eq!(
        jobs.iter().map(|j| j.tag).collect::<Vec<_>>(),
        [16, 17, 18, 19]
    );
    let bells = rig.engine.hub.lock().counters()[0].doorbells.value();
    assert_eq!(
        (bells, rig.requests().len(), rig.engine.in_flight()),
        (1, 8, 16)
    );
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    assert!(jobs.is_empty());
    assert_eq!(rig.engine.in_flight(), 20);
    let mut all = Vec::new();
    for number in 1..=10 {
        rig.result(1, 0, 3, &sealed(60, number));
        rig.result(1, 1, 3, &sealed(60, number));
        all.extend(rig.poll());
        rig.requests();
    }
    assert_eq!(all, done(0..20));
    rig.end();
}

#[test]
fn a_job_of_an_unknown_sa_comes_back_at_once() {
    let mut rig = rig(SoeConfig::default());
    assert!(rig.seal(3, 0..1, 60).is_empty());
    assert_eq!(rig.poll(), [(0, JobStatus::SaGone)]);
    rig.end();
}

#[test]
fn lost_doubled_and_swapped_results_are_never_taken_for_another_packet() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 0);
    rig.seal(0, 0..4, 60);
    rig.requests();
    for number in [2, 2, 1, 4] {
        rig.result(1, 0, 3, &sealed(60, number));
    }
    let failed = |tag| (tag, JobStatus::Failed);
    let ok = |tag| (tag, JobStatus::Done);
    assert_eq!(rig.poll(), [failed(0), ok(1), failed(2), ok(3)]);
    let c = Arc::clone(rig.engine.counters());
    assert_eq!((c.lost.value(), c.repeated.value()), (2, 2));
    // A lost tail is given up after its time, and no sooner.
    rig.seal(0, 4..6, 60);
    rig.requests();
    rig.later(1_000_000_000);
    assert!(rig.poll().is_empty());
    rig.later(SWEEP);
    assert_eq!(rig.poll(), [failed(4), failed(5)]);
    assert_eq!(rig.engine.health(), Health::Good);
    rig.end();
}

#[test]
fn an_inbound_result_that_comes_twice_is_given_on_once() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::In, 0);
    let packet = |n: u8| {
        let mut p = inner(60);
        p[40..].fill(n);
        p
    };
    let mut jobs = Vec::new();
    for tag in 0..4 {
        let outer = seal_inner(&packet(tag), u32::from(tag) + 1);
        jobs.push(rig.job(0, JobKind::Open, tag.into(), &outer));
    }
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    rig.requests();
    // The third is lost.
    for n in [0, 0, 1, 0, 1, 3, 3] {
        rig.result(1, 0, 4, &packet(n));
    }
    let ok = |tag| (tag, JobStatus::Done);
    assert_eq!(rig.poll(), [ok(0), ok(1), (2, JobStatus::Failed), ok(3)]);
    let c = Arc::clone(rig.engine.counters());
    assert_eq!((c.repeated.value(), c.lost.value()), (4, 1));
    assert_eq!(rig.engine.health(), Health::Good);
    rig.end();
}

#[test]
fn an_inbound_packet_that_nobody_submitted_ends_the_trust() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::In, 0);
    let mut jobs = vec![rig.job(0, JobKind::Open, 1, &sealed(60, 1))];
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    rig.requests();
    let mut other = inner(60);
    other[30] ^= 1;
    rig.result(1, 0, 4, &other);
    assert_eq!(rig.poll(), [(1, JobStatus::Failed)]);
    assert_eq!(rig.engine.counters().strange.value(), 1);
    assert!(matches!(rig.engine.health(), Health::Wrong(_)));
    rig.end();
}

#[test]
fn errors_fail_one_packet_and_kill_nothing() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::In, 0);
    let outer = sealed(60, 7);
    let mut jobs: Vec<_> = (0..4)
        .map(|tag| rig.job(0, JobKind::Open, tag, &outer))
        .collect();
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    let given = rig.requests();
    assert_eq!(given[0].bytes[28..32], [0, 0, 0xb0, 0]);
    assert_eq!(given[0].msg[1], 0x7f74_a7ff);
    rig.result(1, 0, 5, &outer);
    rig.result(1, 0, 3, &outer);
    // Another slot's, which carries nothing.
    rig.result(1, 9, 4, &inner(60));
    rig.result(1, 0, 4, &inner(60));
    // No IP packet at all.
    rig.result(1, 0, 4, &[0x70; 60]);
    let failed = |tag| (tag, JobStatus::Failed);
    assert_eq!(
        rig.poll(),
        [failed(0), failed(1), (2, JobStatus::Done), failed(3)]
    );
    let c = Arc::clone(rig.engine.counters());
    assert_eq!(c.errors[0].value(), 1);
    assert_eq!(
        (
            c.wrong_direction.value(),
            c.orphans.value(),
            c.malformed.value()
        ),
        (1, 1, 1)
    );
    assert_eq!(rig.engine.health(), Health::Good);
    rig.end();
}

#[test]
fn packets_that_the_engine_cannot_take_never_reach_it() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::In, 0);
    rig.install(Direction::Out, 1);
    let good = sealed(60, 1);
    let mut bad = vec![
        (0, JobKind::Seal, inner(60)),
        (1, JobKind::Open, good.clone()),
    ];
    let mut broken = |at: usize, v: u8| {
        let mut p = good.clone();
        p[at] = v;
        bad.push((0, JobKind::Open, p));
    };
    // Options, fragments, another protocol, another destination, another SPI, longer than it is.
    for (at, v) in [
        (0, 0x46),
        (6, 0x20),
        (7, 1),
        (9, 17),
        (19, 3),
        (23, 1),
        (2, 0xff),
    ] {
        broken(at, v);
    }
    bad.push((0, JobKind::Open, good[..19].to_vec()));
    let mut fragment = inner(60);
    fragment[6] = 0x20;
    for p in [fragment, inner(60)[..50].to_vec(), vec![0x60; 39], vec![]] {
        bad.push((1, JobKind::Seal, p));
    }
    let n = bad.len();
    let mut jobs = Vec::new();
    for (tag, (index, kind, bytes)) in (0..).zip(bad) {
        jobs.push(rig.job(index, kind, tag, &bytes));
    }
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    assert_eq!(rig.requests().len(), 0);
    let ended = rig.poll();
    assert!(ended.len() == n && ended.iter().all(|(_, s)| *s == JobStatus::Malformed));
    // Bytes of the link behind the packet are taken off.
    let mut padded = good.clone();
    padded.extend([0; 6]);
    let mut jobs = vec![rig.job(0, JobKind::Open, 0, &padded)];
    rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
    assert_eq!(rig.requests()[0].bytes[46..], good);
    rig.end();
}

#[test]
fn the_last_packet_of_a_hard_limit_goes_and_the_next_does_not() {
    let mut rig = rig(SoeConfig::default());
    let mut s = spec(Direction::Out, CBC);
    s.hard.packets = Some(6);
    rig.engine.install(&entry(s, 0)).unwrap();
    rig.seal(0, 0..9, 60);
    let mut ended = Vec::new();
    let mut number = 0;
    loop {
        let n = rig.requests().len();
        if n == 0 {
            break;
        }
        for _ in 0..n {
            number += 1;
            rig.result(1, 0, 3, &sealed(60, number));
        }
        ended.extend(rig.poll());
    }
    assert_eq!(number, 6);
    let mut expected = done(0..6);
    expected.extend((6..9).map(|t| (t, JobStatus::LimitReached)));
    ended.sort_by_key(|e| e.0);
    assert_eq!(ended, expected);
    assert_eq!(rig.engine.counters().limited.value(), 3);
    rig.end();
}

#[test]
fn an_sa_that_has_carried_packets_cannot_begin_in_the_engine() {
    let mut rig = rig(SoeConfig::default());
    let used = [
        (
            Direction::Out,
            Start {
                next_seq: 2,
                lease_end: 100,
                window_top: 0,
            },
        ),
        (
            Direction::In,
            Start {
                next_seq: 1,
                lease_end: 100,
                window_top: 5,
            },
        ),
    ];
    for (direction, start) in used {
        let sa = entry_from(spec(direction, CBC), 0, start);
        let refused = rig.engine.install(&sa).unwrap_err();
        assert!(refused.to_string().contains("rekey"), "{refused}");
    }
    let gcm = Suite::Gcm(AesBits::B128, AeadIcv::L16);
    let sa = entry(spec(Direction::Out, gcm), 0);
    let refused = rig.engine.install(&sa).unwrap_err();
    assert!(matches!(refused, Refusal::Unsupported { .. }));
    assert_eq!(rig.engine.used_slots(), 0);
    rig.end();
}

#[test]
fn a_removed_sa_drains_is_invalidated_and_its_slot_rests() {
    let mut config = SoeConfig::default();
    config.assume.slots = 1;
    let mut rig = rig(config);
    let before = rig.soe.commits.lock().unwrap().len();
    rig.install(Direction::Out, 0);
    let full = rig.engine.install(&entry(spec(Direction::Out, CBC), 1));
    assert!(full.is_err());
    rig.seal(0, 0..6, 60);
    rig.requests();
    rig.engine.remove(id(0));
    // What waited goes at once; what is in the engine is waited for, and the SA stays valid meanwhile.
    let gone = |tag| (tag, JobStatus::SaGone);
    assert_eq!(rig.poll(), [gone(4), gone(5)]);
    assert!(rig.seal(0, 6..7, 60).is_empty());
    assert_eq!(rig.poll(), [gone(6)]);
    let commits = |rig: &Rig| rig.soe.commits.lock().unwrap()[before..].to_vec();
    assert_eq!(commits(&rig).len(), 1);
    for number in 1..=4 {
        rig.result(1, 0, 3, &sealed(60, number));
    }
    assert_eq!(rig.poll(), done(0..4));
    rig.later(SWEEP);
    rig.poll();
    assert_eq!(commits(&rig), [(0, 0x9000_0013), (0, 0)]);
    assert_eq!(rig.engine.used_slots(), 0);
    // A late result finds nobody, and nobody may have the slot yet.
    rig.result(1, 0, 3, &sealed(60, 5));
    assert!(rig.poll().is_empty());
    assert_eq!(rig.engine.counters().orphans.value(), 1);
    let refused = rig.engine.install(&entry(spec(Direction::Out, CBC), 1));
    assert!(matches!(refused, Err(Refusal::NoSlot { .. })));
    rig.later(slots::REST);
    rig.install(Direction::Out, 1);
    rig.end();
}

#[test]
fn keys_do_not_stay_in_the_staging_window() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 0);
    let words = rig.soe.words.lock().unwrap();
    assert!(words[0x124 / 4..=0x160 / 4].iter().all(|w| *w == 0));
    drop(words);
    rig.end();
}

#[test]
fn an_engine_that_does_not_commit_is_dead() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 1);
    rig.seal(1, 0..6, 60);
    rig.requests();
    rig.soe.refuse.store(true, Relaxed);
    let refused = rig.engine.install(&entry(spec(Direction::Out, CBC), 0));
    assert!(refused.is_err());
    assert!(matches!(rig.engine.health(), Health::Dead(_)));
    // Nothing hangs: what is in flight fails, new jobs too.
    let mut ended = rig.poll();
    ended.sort_by_key(|e| e.0);
    let failed: Vec<_> = (0..6).map(|t| (t, JobStatus::Failed)).collect();
    assert_eq!(ended, failed);
    rig.seal(1, 6..7, 60);
    assert_eq!(rig.poll(), [(6, JobStatus::Failed)]);
    assert_eq!(rig.engine.in_flight(), 0);
    // A reset needs commits too.
    let mut ended = Vec::new();
    assert!(rig.engine.reset(&mut ended).is_err());
    rig.soe.refuse.store(false, Relaxed);
    rig.player.restart();
    rig.engine.reset(&mut ended).unwrap();
    assert_eq!(
        (rig.engine.health(), rig.engine.used_slots()),
        (Health::Good, 0)
    );
    rig.install(Direction::Out, 2);
    rig.seal(2, 0..1, 60);
    rig.requests();
    rig.result(1, 0, 3, &sealed(60, 1));
    assert_eq!(rig.poll(), done(0..1));
    rig.end();
}

#[test]
fn a_reset_gives_back_what_is_in_flight() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 0);
    rig.seal(0, 0..7, 60);
    let mut ended = Vec::new();
    rig.engine.reset(&mut ended).unwrap();
    assert_eq!((ended.len(), rig.engine.in_flight()), (7, 0));
    assert!(ended.iter().all(|j| j.status == JobStatus::Failed));
    for job in ended {
        rig.pool.put(job.frame);
    }
    rig.end();
}

#[test]
fn too_many_lost_results_end_the_trust() {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 0);
    let mut number = 0;
    for round in 0..200u64 {
        rig.seal(0, round..round + 1, 60);
        rig.requests();
        number += 1;
        // Two in a hundred.
        if round % 50 != 10 {
            rig.result(1, 0, 3, &sealed(60, number));
        }
        rig.poll();
        rig.later(1_000_000);
    }
    assert_eq!(rig.engine.health(), Health::Good);
    rig.later(JUDGED_OVER);
    rig.poll();
    assert!(matches!(rig.engine.health(), Health::Lossy(n) if n > 100));
    // What was lost before a reset does not count after it.
    rig.player.restart();
    rig.engine.reset(&mut Vec::new()).unwrap();
    rig.later(2 * JUDGED_OVER);
    rig.poll();
    assert_eq!(rig.engine.health(), Health::Good);
    rig.end();
}

#[test]
fn a_repeated_iv_under_gcm_ends_the_trust_at_once() {
    let mut config = SoeConfig::default();
    config.assume.gcm = true;
    let mut rig = rig(config);
    let gcm = Suite::Gcm(AesBits::B128, AeadIcv::L16);
    rig.engine
        .install(&entry(spec(Direction::Out, gcm), 0))
        .unwrap();
    rig.seal(0, 0..2, 54);
    rig.requests();
    // 20 + 8 + 8 + 56 + 16.
    let mut packet = sealed(60, 1);
    packet.truncate(108);
    packet[2..4].copy_from_slice(&108u16.to_be_bytes());
    rig.result(1, 0, 3, &packet);
    assert_eq!(rig.poll(), done(0..1));
    rig.result(1, 0, 3, &packet);
    assert_eq!(rig.poll(), [(1, JobStatus::Failed)]);
    assert!(matches!(rig.engine.health(), Health::Wrong(_)));
    rig.end();
}
