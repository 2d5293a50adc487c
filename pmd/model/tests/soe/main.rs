//! The driver of the secure offload engine against its model, over a vfio-user socket. What is right is decided by RustCrypto
//! in this file, with which neither of the two shares code.

mod reference;
mod rig;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use pmd::device::{Device, IovaClass};
use pmd::engine::{EspEngine, JobStatus};
use pmd::soe::{Health, MOST_PATIENCE, SoeConfig};
use proptest::prelude::*;
use reference::{Sa, every_suite, inner, sa};
use rig::{Ended, Rig, gcm_on};
use sa_store::sa::{Direction, UdpEncap};

const NAT: Option<UdpEncap> = Some(UdpEncap {
    sport: 4500,
    dport: 4500,
});

/// Patient, so that a machine with other work does not look like an engine that loses results.
fn calm() -> SoeConfig {
    SoeConfig {
        patience: MOST_PATIENCE,
        ..SoeConfig::default()
    }
}

#[test]
fn every_suite_both_ways_is_what_rustcrypto_says() {
    for suite in every_suite() {
        for encap in [None, NAT] {
            let mut rig = Rig::new(gcm_on());
            let out = rig.add(sa(Direction::Out, suite, encap));
            let inb = rig.add(sa(Direction::In, suite, encap));
            for (n, len) in (1u32..).zip([20, 21, 35, 36, 60, 64, 256, 576, 1280, 1400, 1438]) {
                let plain = inner(len, n);
                let sealed = rig.one(&out, &plain);
                assert_eq!(sealed.status, JobStatus::Done, "{suite} {len}");
                assert_eq!(sealed.seq, u64::from(n), "{suite}");
                assert_eq!(out.open(&sealed.bytes, n), plain, "{suite} {len}");

                let outer = inb.seal(&plain, n);
                let opened = rig.one(&inb, &outer);
                assert_eq!(opened.status, JobStatus::Done, "{suite} {len}");
                assert_eq!(opened.bytes, plain, "{suite} {len}");
            }
            rig.end(0);
        }
    }
}

#[test]
fn what_the_engine_seals_it_opens_and_software_too() {
    for suite in every_suite() {
        let mut rig = Rig::new(gcm_on());
        let out = rig.add(sa(Direction::Out, suite, NAT));
        let inb = rig.add(sa(Direction::In, suite, NAT));
        let mut highest = 0;
        for n in 1..=300u32 {
            let plain = inner(u16::try_from(28 + n * 4).unwrap(), n);
            let sealed = rig.one(&out, &plain);
            assert!(sealed.seq > highest, "{suite}");
            highest = sealed.seq;
            assert_eq!(rig.one(&inb, &sealed.bytes).bytes, plain, "{suite} {n}");
        }
        rig.end(0);
    }
}

/// A shift between inbound packets of one length cannot be seen; but what comes out is always a packet that went in, and
/// never twice.
#[test]
fn inbound_packets_come_out_at_most_once_whatever_the_engine_loses() {
    let suite = every_suite()[0];
    for (lose, duplicate, reorder) in [(50_000, 0, 0), (0, 50_000, 0), (0, 0, 50_000)] {
        let mut rig = Rig::new(SoeConfig {
            most_lost: 10_000,
            ..SoeConfig::default()
        });
        rig.knobs.lose.store(lose, Relaxed);
        rig.knobs.duplicate.store(duplicate, Relaxed);
        rig.knobs.reorder.store(reorder, Relaxed);
        let inb = rig.add(sa(Direction::In, suite, None));
        let packets: Vec<_> = (1..=600)
            .map(|n| inb.seal(&inner(u16::try_from(64 + 2 * (n % 300)).unwrap(), n), n))
            .collect();
        let mut seen = std::collections::HashSet::new();
        let ended = rig.each(&inb, &packets, Duration::from_secs(200));
        assert_eq!(ended.len(), 600);
        for e in ended.iter().filter(|e| e.status == JobStatus::Done) {
            let n = u32::from_le_bytes(e.bytes[20..24].try_into().unwrap());
            let len = u16::try_from(e.bytes.len()).unwrap();
            assert_eq!(e.bytes, inner(len, n));
            assert!(duplicate > 0 || seen.insert(n), "packet {n} twice");
        }
        rig.end(0);
    }
}

#[test]
fn inner_ipv6_passes_both_ways() {
    let suite = every_suite()[0];
    let mut rig = Rig::new(calm());
    let out = rig.add(sa(Direction::Out, suite, None));
    let inb = rig.add(sa(Direction::In, suite, None));
    let mut plain = vec![0u8; 100];
    plain[0] = 0x60;
    plain[5] = 60;
    let sealed = rig.one(&out, &plain);
    assert_eq!(out.open(&sealed.bytes, 1), plain);
    let opened = rig.one(&inb, &inb.seal(&plain, 1));
    assert_eq!(opened.bytes, plain);
    rig.end(0);
}

#[test]
fn a_packet_with_any_byte_changed_is_not_delivered() {
    for suite in every_suite().into_iter().step_by(3) {
        let mut rig = Rig::new(gcm_on());
        let inb = rig.add(sa(Direction::In, suite, None));
        let good = inb.seal(&inner(44, 1), 1);
        for at in 20..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            let status = rig.one(&inb, &bad).status;
            assert!(
                matches!(status, JobStatus::Failed | JobStatus::Malformed),
                "{suite} {at}"
            );
        }
        assert_eq!(rig.one(&inb, &good).status, JobStatus::Done);
        assert_eq!(rig.engine.health(), Health::Good);
        rig.end(0);
    }
}

#[test]
fn replays_are_errors_at_every_edge_of_every_window() {
    let suite = every_suite()[0];
    for window in [64, 128, 192, 256] {
        let mut rig = Rig::new(calm());
        let mut spec = sa(Direction::In, suite, None);
        spec.replay_window = window;
        let inb = rig.add(spec);
        let mut send = |n: u32| rig.one(&inb, &inb.seal(&inner(40, n), n)).status;
        let (ok, no) = (JobStatus::Done, JobStatus::Failed);
        assert_eq!((send(0), send(1), send(1)), (no, ok, no));
        assert_eq!((send(1000), send(1000)), (ok, no));
        assert_eq!((send(1001 - window), send(1000 - window)), (ok, no));
        assert_eq!(
            (send(1001 - window), send(999), send(1002), send(1000)),
            (no, ok, ok, no)
        );
        rig.end(0);
    }
}

#[test]
fn the_hard_limit_is_exact_under_load() {
    let suite = every_suite()[0];
    let mut rig = Rig::new(calm());
    let mut spec = sa(Direction::Out, suite, None);
    spec.hard.packets = Some(1000);
    let out = rig.add(spec);
    let ended = rig.load(&[&out], 1100, 60, Duration::from_secs(60));
    let of = |s| ended.iter().filter(|e| e.status == s).count();
    assert_eq!(
        (of(JobStatus::Done), of(JobStatus::LimitReached)),
        (1000, 100)
    );
    let highest = ended
        .iter()
        .filter(|e| e.status == JobStatus::Done)
        .map(|e| e.seq);
    assert_eq!(highest.max(), Some(1000));
    rig.end(0);
}

/// Every packet carries its own mark, so a result that is taken for another request shows.
fn check_marks(out: &Sa, ended: &[Ended]) -> usize {
    let mut seen = std::collections::HashSet::new();
    let mut right = 0;
    for e in ended.iter().filter(|e| e.status == JobStatus::Done) {
        let number = u32::try_from(e.seq).unwrap();
        assert!(seen.insert(number), "number {number} twice");
        let plain = out.open(&e.bytes, number);
        assert_eq!(
            plain[20..28],
            e.tag.to_be_bytes(),
            "a result of another request"
        );
        right += 1;
    }
    right
}

#[test]
fn lost_doubled_late_and_swapped_results_never_reach_another_request() {
    let suite = every_suite()[0];
    type Knob = fn(&esplanade_model::Knobs, u32);
    let knobs: [(&str, Knob); 4] = [
        ("lose", |k, v| k.lose.store(v, Relaxed)),
        ("duplicate", |k, v| k.duplicate.store(v, Relaxed)),
        ("delay", |k, v| k.delay.store(v, Relaxed)),
        ("reorder", |k, v| k.reorder.store(v, Relaxed)),
    ];
    for (name, knob) in knobs {
        for rate in [1_000, 10_000, 100_000] {
            let mut rig = Rig::new(SoeConfig {
                most_lost: 10_000,
                ..SoeConfig::default()
            });
            knob(&rig.knobs, rate);
            let out = rig.add(sa(Direction::Out, suite, None));
            let ended = rig.load(&[&out], 2000, 60, Duration::from_secs(60));
            assert_eq!(ended.len(), 2000, "{name} {rate}");
            let right = check_marks(&out, &ended);
            assert!(
                right >= 2000 - 2000 * 3 * rate as usize / 1_000_000 - 60,
                "{name} {rate}: {right}"
            );
            assert_eq!(rig.engine.health(), Health::Good);
            rig.end(0);
        }
    }
}

#[test]
fn a_lossy_engine_is_not_trusted_and_a_reset_brings_it_back() {
    let suite = every_suite()[0];
    let mut rig = Rig::new(SoeConfig::default());
    rig.knobs.lose.store(100_000, Relaxed);
    let out = rig.add(sa(Direction::Out, suite, None));
    let begin = std::time::Instant::now();
    while rig.engine.health() == Health::Good {
        assert!(begin.elapsed() < Duration::from_secs(20), "still trusted");
        rig.load(&[&out], 50, 60, Duration::from_secs(5));
    }
    assert!(matches!(rig.engine.health(), Health::Lossy(_)));
    let refused = rig.one(&out, &inner(60, 1));
    assert_eq!(refused.status, JobStatus::Failed);
    // A reset brings it back, without SAs.
    rig.knobs.lose.store(0, Relaxed);
    let mut done = Vec::new();
    let begin = std::time::Instant::now();
    rig.engine.reset(&mut done).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(done.is_empty());
    let gone = rig.one(&out, &inner(60, 1));
    assert_eq!(gone.status, JobStatus::SaGone);
    let again = rig.add(sa(Direction::Out, suite, None));
    assert_eq!(rig.one(&again, &inner(60, 1)).seq, 1);
    rig.end(0);
}

#[test]
fn an_engine_that_stands_still_fails_its_jobs_and_recovers_by_a_reset() {
    let suite = every_suite()[0];
    let mut rig = Rig::new(calm());
    rig.knobs.hang.store(20, Relaxed);
    let out = rig.add(sa(Direction::Out, suite, None));
    let ended = rig.load(&[&out], 40, 60, Duration::from_secs(30));
    assert_eq!(ended.len(), 40);
    assert_eq!(check_marks(&out, &ended), 19);
    rig.knobs.hang.store(0, Relaxed);
    let mut done = Vec::new();
    rig.engine.reset(&mut done).unwrap();
    let again = rig.add(sa(Direction::Out, suite, None));
    assert_eq!(rig.one(&again, &inner(60, 1)).status, JobStatus::Done);
    rig.end(0);
}

#[test]
fn results_may_come_on_any_ring_and_either_instance() {
    for (ring, instance) in [(0, 0), (10, 0), (15, 0), (1, 1)] {
        let suite = every_suite()[0];
        let mut rig = Rig::with(SoeConfig::default(), |s| {
            s.result_ring = ring;
            s.result_instance = Some(instance);
        });
        let out = rig.add(sa(Direction::Out, suite, None));
        let sealed = rig.one(&out, &inner(500, 1));
        assert_eq!(
            out.open(&sealed.bytes, 1),
            inner(500, 1),
            "{ring} {instance}"
        );
        rig.end(0);
    }
}

#[test]
fn slots_run_out_rest_and_never_carry_another_sa_by_mistake() {
    let suite = every_suite()[0];
    let mut config = calm();
    config.assume.slots = 8;
    let mut rig = Rig::new(config);
    let mut sas: Vec<Sa> = (0..8)
        .map(|_| rig.add(sa(Direction::Out, suite, None)))
        .collect();
    assert!(rig.try_add(sa(Direction::Out, suite, None)).is_err());
    for round in 0..3 {
        // A rekey of one under load of all.
        let all: Vec<&Sa> = sas.iter().collect();
        let ended = rig.load(&all, 200, 60, Duration::from_secs(30));
        assert!(ended.iter().all(|e| e.status == JobStatus::Done));
        for e in &ended {
            let s = sas.iter().find(|s| s.id == e.sa).unwrap();
            let plain = s.open(&e.bytes, u32::try_from(e.seq).unwrap());
            assert_eq!(plain[20..28], e.tag.to_be_bytes());
        }
        let old = sas.remove(round);
        rig.remove(&old);
        assert!(
            rig.try_add(sa(Direction::Out, suite, None)).is_err(),
            "no rest"
        );
        std::thread::sleep(Duration::from_millis(2200));
        rig.idle();
        sas.insert(round, rig.add(sa(Direction::Out, suite, None)));
    }
    rig.end(0);
}

#[test]
fn with_one_request_a_doorbell_the_results_are_those_of_the_batch_byte_for_byte() {
    let suite = every_suite()[0];
    let run = |batch| {
        let mut config = calm();
        config.assume.batch = batch;
        let mut rig = Rig::new(config);
        assert_eq!(rig.engine.capabilities().run == 1, !batch);
        let inb = rig.add(sa(Direction::In, suite, None));
        let packets: Vec<Vec<u8>> = (1..=500u32)
            .map(|n| inb.seal(&inner(u16::try_from(40 + n * 2).unwrap(), n), n))
            .collect();
        let before = rig.doorbells();
        let ended = rig.each(&inb, &packets, Duration::from_secs(60));
        let bells = rig.doorbells() - before;
        let results = ended.into_iter().map(|e| (e.tag, e.seq, e.status, e.bytes));
        let results: Vec<_> = results.collect();
        rig.end(0);
        (results, bells)
    };
    let (batched, few) = run(true);
    let (split, many) = run(false);
    assert!(batched.iter().all(|r| r.2 == JobStatus::Done));
    assert!(batched == split, "other results, or another order");
    assert!(many >= 500 && few < many, "{few} and {many} doorbells");
}

#[test]
fn a_hundred_thousand_packets_come_back_and_every_frame_is_home() {
    let suite = every_suite()[0];
    let mut rig = Rig::new(calm());
    let sas: Vec<Sa> = (0..8)
        .map(|_| rig.add(sa(Direction::Out, suite, None)))
        .collect();
    let all: Vec<&Sa> = sas.iter().collect();
    let ended = rig.count(&all, 100_000, 200, Duration::from_secs(300));
    assert_eq!(ended, 100_000);
    let bells = rig.doorbells();
    assert!(bells < 100_000, "{bells} doorbells");
    rig.end(0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// A hostile driver: any words in any registers, rings that point anywhere in its memory.
    #[test]
    fn no_driver_can_stop_the_model(
        words in prop::collection::vec(any::<u32>(), 64..512),
        writes in prop::collection::vec((0u32..4, 0usize..0x3000, any::<u32>(), 0u8..4), 1..200),
    ) {
        let rig = Rig::bare();
        let device = rig.device();
        let memory = device.dma_alloc(1 << 16, 4096, IovaClass::Below4G).unwrap();
        for (i, w) in words.iter().cycle().take(1 << 14).enumerate() {
            memory.write32(4 * i, *w);
        }
        let base = u32::try_from(memory.iova()).unwrap();
        for (region, offset, value, kind) in writes {
            let value = match kind {
                0 => base + (value & 0xffe0),
                1 => value & 0xff,
                2 => 0x7638_0065,
                _ => value,
            };
            let registers = device.region(region).unwrap();
            registers.write32(offset & !3, value);
            if kind == 1 {
                registers.read32(offset & !3);
            }
        }
        let soe = device.region(3).unwrap();
        soe.write32(0, 3);
        prop_assert_eq!(soe.read32(0), 3);
    }
}
