//! Every suite, mode and direction against RustCrypto.

use super::*;

const SIZES: [usize; 14] = [1, 2, 13, 14, 15, 16, 30, 40, 64, 127, 128, 576, 1420, 1500];

#[test]
fn every_suite_seals_and_opens_as_rustcrypto_does() {
    let mut rig = rig(patient());
    for suite in suites() {
        let out = rig.sa(suite, Direction::Out, OffloadMode::Crypto);
        let inb = rig.sa(suite, Direction::In, OffloadMode::Crypto);
        for (n, len) in SIZES.into_iter().enumerate() {
            let seq = u32::try_from(n + 1).unwrap();
            let (spi_out, spi_in) = (rig.spi(out), rig.spi(inb));
            let (framed, sealed) = packets(suite, spi_out, seq, &payload(len));
            let job = rig.job(out, JobKind::Seal, n, &framed);
            let (status, got) = rig.one(job);
            assert_eq!((status, &got), (JobStatus::Done, &sealed), "{suite} {len}");
            let (framed, mut sealed) = packets(suite, spi_in, seq, &payload(len));
            let job = rig.job(inb, JobKind::Open, n, &sealed);
            let (status, got) = rig.one(job);
            let end = framed.len() - suite.icv_len();
            assert_eq!(status, JobStatus::Done, "{suite} {len}");
            assert_eq!(got[..end], framed[..end], "{suite} {len}");
            for at in [0, 7, 9, end - 1, end, sealed.len() - 1] {
                sealed[at] ^= 0x10;
                let job = rig.job(inb, JobKind::Open, 0, &sealed);
                assert_eq!(rig.one(job).0, JobStatus::IcvMismatch, "{suite} {len} {at}");
                sealed[at] ^= 0x10;
            }
        }
    }
    let stats = rig.engine.stats().unwrap();
    assert!(stats.moved.value() > 0 && stats.wrong.value() == 0);
    rig.end();
}

#[test]
fn packet_mode_numbers_pads_and_trims() {
    let mut rig = rig(patient());
    for suite in suites().into_iter().filter(|s| !s.is_counter_mode()) {
        let out = rig.sa(suite, Direction::Out, OffloadMode::Packet);
        let inb = rig.sa(suite, Direction::In, OffloadMode::Packet);
        let front = 8 + suite.iv_len();
        let mut ivs = Vec::new();
        for (n, len) in SIZES.into_iter().enumerate() {
            let seq = u32::try_from(n + 1).unwrap();
            let plain = payload(len);
            let room = [vec![0x11; front], plain.clone()].concat();
            let job = rig.job(out, JobKind::Seal, n, &room);
            let (status, got) = rig.one(job);
            assert_eq!(status, JobStatus::Done);
            assert_eq!(open(suite, rig.spi(out), &got), Some((seq, plain.clone())));
            ivs.push(got[8..front].to_vec());
            let (_, sealed) = packets(suite, rig.spi(inb), seq, &plain);
            let job = rig.job(inb, JobKind::Open, n, &sealed);
            let mut back = rig.run(vec![job]);
            assert_eq!(back[0].status, JobStatus::Done);
            assert_eq!((back[0].seq, back[0].next_header), (seq.into(), 4));
            let at = usize::from(OUTER) + front;
            assert_eq!(back[0].frame.data()[at..], plain);
            assert_eq!(usize::from(back[0].esp_end), at + len);
            rig.put(std::mem::take(&mut back));
            let job = rig.job(inb, JobKind::Open, 0, &sealed);
            assert_eq!(rig.one(job).0, JobStatus::Replayed);
            let (_, mut forged) = packets(suite, rig.spi(inb), seq + 1, &plain);
            forged[front + 1] ^= 1;
            let job = rig.job(inb, JobKind::Open, 0, &forged);
            assert_eq!(rig.one(job).0, JobStatus::IcvMismatch);
            let (_, other) = packets(suite, SPI - 1, seq + 1, &plain);
            let job = rig.job(inb, JobKind::Open, 0, &other);
            assert_eq!(rig.one(job).0, JobStatus::Malformed);
        }
        ivs.sort();
        ivs.dedup();
        assert_eq!(ivs.len(), SIZES.len(), "an IV came twice");
        assert_eq!(rig.engine.reached(out), Some(SIZES.len() as u64));
        assert_eq!(rig.view.sa(out).unwrap().next_seq(), SIZES.len() as u64 + 1);
    }
    rig.end();
}

#[test]
fn a_hard_limit_is_exact_and_numbers_go_on_where_they_were() {
    let mut rig = rig(patient());
    let mut limited = spec(CBC_SHA1, Direction::Out, OffloadMode::Packet);
    limited.hard.packets = Some(1003);
    let start = Start {
        next_seq: 1001,
        lease_end: 1 << 40,
        window_top: 0,
    };
    let out = rig.add(limited, start);
    rig.install(out).unwrap();
    let room = [vec![0; 24], payload(100)].concat();
    let jobs: Vec<_> = (0..6)
        .map(|_| rig.job(out, JobKind::Seal, 0, &room))
        .collect();
    let back = rig.run(jobs);
    let seen: Vec<_> = back.iter().map(|j| (j.status, j.seq)).collect();
    let (done, over) = (JobStatus::Done, (JobStatus::LimitReached, u64::MAX));
    assert_eq!(
        seen,
        [(done, 1001), (done, 1002), (done, 1003), over, over, over]
    );
    for job in &back[..3] {
        let got = open(CBC_SHA1, rig.spi(out), &job.frame.data()[20..]).unwrap();
        assert_eq!(u64::from(got.0), job.seq);
    }
    rig.put(back);
    // Numbers that somebody else took are left out.
    let out = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Packet);
    for want in [1, 3, 5] {
        let job = rig.job(out, JobKind::Seal, 0, &room);
        let (_, got) = rig.one(job);
        assert_eq!(open(CBC_SHA1, rig.spi(out), &got).unwrap().0, want);
        rig.view.sa(out).unwrap().next_out(10, 0).unwrap();
    }
    // Inbound, what an earlier process accepted stays accepted.
    let resumed = Start {
        window_top: 5000,
        lease_end: 1 << 40,
        next_seq: 1,
    };
    let inb = rig.add(spec(CBC_SHA1, Direction::In, OffloadMode::Packet), resumed);
    rig.install(inb).unwrap();
    for (seq, want) in [
        (5000, JobStatus::Replayed),
        (4990, JobStatus::Replayed),
        (5001, JobStatus::Done),
        (5001, JobStatus::Replayed),
    ] {
        let (_, sealed) = packets(CBC_SHA1, rig.spi(inb), seq, b"x");
        let job = rig.job(inb, JobKind::Open, 0, &sealed);
        assert_eq!(rig.one(job).0, want, "{seq}");
    }
    rig.end();
}

#[test]
fn a_run_of_many_sas_comes_back_in_order_with_one_doorbell() {
    let mut rig = rig(patient());
    let sas: Vec<_> = suites()
        .into_iter()
        .map(|s| (s, rig.sa(s, Direction::Out, OffloadMode::Crypto)))
        .collect();
    let before = rig.engine.stats().unwrap().doorbells.value();
    let (mut given, mut sent) = (0u32, 0u32);
    for _ in 0..40 {
        let mut jobs = Vec::new();
        let mut want = Vec::new();
        for i in 0..64 {
            let (suite, sa) = sas[i % sas.len()];
            sent += 1;
            let (framed, sealed) = packets(suite, rig.spi(sa), sent, &payload(i * 9 + 1));
            jobs.push(rig.job(sa, JobKind::Seal, 0, &framed));
            want.push(sealed);
        }
        given += 1;
        let back = rig.run(jobs);
        for (job, want) in back.iter().zip(&want) {
            assert_eq!(job.status, JobStatus::Done);
            assert_eq!(job.frame.data()[20..], want[..]);
        }
        rig.put(back);
    }
    let rung = rig.engine.stats().unwrap().doorbells.value() - before;
    assert_eq!(rung, u64::from(given));
    rig.end();
}

#[test]
fn a_full_engine_leaves_jobs_with_the_caller() {
    let mut rig = rig(Eip93Config {
        ring: 8,
        ..patient()
    });
    rig.knobs.latency.store(20_000, Relaxed);
    let sa = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let (framed, sealed) = packets(CBC_SHA1, rig.spi(sa), 1, &payload(200));
    let mut jobs: Vec<_> = (0..20)
        .map(|_| rig.job(sa, JobKind::Seal, 0, &framed))
        .collect();
    let view = Arc::clone(&rig.view);
    rig.engine.submit(&view, &mut jobs, &mut rig.done);
    assert_eq!((jobs.len(), rig.engine.in_flight()), (13, 7));
    assert_eq!(rig.engine.stats().unwrap().busy.value(), 13);
    let mut done = Vec::new();
    assert!(rig.engine.drain(Duration::from_secs(5), &mut done));
    assert_eq!(done.len(), 7);
    done.extend(rig.run(jobs));
    assert!(done.iter().all(|j| j.frame.data()[20..] == sealed));
    rig.put(done);
    rig.end();
}

#[test]
fn a_rekey_is_a_new_record_and_the_old_one_ends_with_its_last_packet() {
    let mut rig = rig(Eip93Config {
        slots: 2,
        ..patient()
    });
    rig.knobs.latency.store(20_000, Relaxed);
    let old = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let (framed, sealed) = packets(CBC_SHA1, rig.spi(old), 1, &payload(200));
    let mut jobs = vec![rig.job(old, JobKind::Seal, 0, &framed)];
    let view = Arc::clone(&rig.view);
    rig.engine.submit(&view, &mut jobs, &mut rig.done);
    let new = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    rig.engine.remove(old);
    // Its record is in use still.
    let start = Start::default();
    let third = rig.add(spec(CBC_SHA1, Direction::In, OffloadMode::Crypto), start);
    assert!(matches!(rig.install(third), Err(Refusal::NoSlot { .. })));
    assert_eq!(rig.engine.installed(), 2);
    let job = rig.job(old, JobKind::Seal, 0, &framed);
    let back = rig.run(vec![job]);
    assert_eq!(back[0].status, JobStatus::Done);
    assert_eq!(back[0].frame.data()[20..], sealed);
    let mut left = back;
    while left.len() < 2 {
        rig.engine.poll(&mut left);
    }
    assert_eq!(left[1].status, JobStatus::SaGone);
    rig.put(left);
    assert_eq!(rig.engine.installed(), 1);
    rig.install(third).unwrap();
    let (framed, sealed) = packets(CBC_SHA1, rig.spi(new), 1, &payload(200));
    let job = rig.job(new, JobKind::Seal, 0, &framed);
    assert_eq!(rig.one(job), (JobStatus::Done, sealed));
    rig.end();
}

#[test]
fn what_the_engine_cannot_do_is_refused_with_the_reason() {
    let mut rig = rig(patient());
    let refused = |rig: &mut Rig, change: &dyn Fn(&mut SaSpec), why: &str| {
        let mut s = spec(CBC_SHA1, Direction::In, OffloadMode::Packet);
        change(&mut s);
        let id = rig.add(s, Start::default());
        let error = rig.install(id).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(&mut rig, &|s| s.esn = true, "64-bit");
    refused(&mut rig, &|s| s.replay_window = 128, "window");
    refused(&mut rig, &|s| s.keys.auth.push(1), "keys");
    refused(&mut rig, &|s| s.keys.enc.clear(), "keys");
    let ctr = Suite::CipherHmac(Cipher::Ctr(AesBits::B128), Hmac::Sha1_96);
    refused(&mut rig, &|s| s.suite = ctr, "random");
    for suite in Suite::all() {
        if Parts::of(suite).is_none() {
            refused(&mut rig, &|s| s.suite = suite, "it has no");
        }
    }
    // Packets that are no ESP of the SA do not reach the engine.
    let inb = rig.sa(CBC_SHA1, Direction::In, OffloadMode::Crypto);
    let (_, sealed) = packets(CBC_SHA1, rig.spi(inb), 1, b"payload");
    for end in [0, 8, 24, 36, 51, sealed.len() - 1] {
        let job = rig.job(inb, JobKind::Open, 0, &sealed[..end]);
        assert_eq!(rig.one(job).0, JobStatus::Malformed, "{end}");
    }
    let job = rig.job(inb, JobKind::Seal, 0, &sealed);
    assert_eq!(rig.one(job).0, JobStatus::Failed);
    assert_eq!(rig.engine.stats().unwrap().submitted.value(), 0);
    rig.end();
}

#[test]
fn the_engine_answers_without_memory_in_direct_host_mode() {
    let mut rig = rig(patient());
    rig.engine.direct_self_test().unwrap();
    let sa = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let (framed, sealed) = packets(CBC_SHA1, rig.spi(sa), 1, &payload(200));
    let job = rig.job(sa, JobKind::Seal, 0, &framed);
    assert_eq!(rig.one(job), (JobStatus::Done, sealed));
    rig.end();
}
