//! Each knob of the model against the driver.

use super::*;

fn config() -> Eip93Config {
    Eip93Config {
        deadline: Duration::from_millis(500),
        ..patient()
    }
}

/// Sends runs of packets in both directions until the engine is not trusted any more, or `rounds` are over. Every result that
/// is said to be done is right.
fn traffic(rig: &mut Rig, rounds: u32) {
    let out = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let inb = rig.sa(CBC_SHA1, Direction::In, OffloadMode::Crypto);
    let mut held = Vec::new();
    for round in 0..rounds {
        let mut jobs = Vec::new();
        for i in 0..32 {
            let seq = round * 32 + i;
            let plain = payload(usize::try_from(i).unwrap() * 40 + 1);
            let (framed, _) = packets(CBC_SHA1, rig.spi(out), seq, &plain);
            let mut job = rig.job(out, JobKind::Seal, 0, &framed);
            job.seq = seq.into();
            jobs.push(job);
            let (_, sealed) = packets(CBC_SHA1, rig.spi(inb), seq, &plain);
            let mut job = rig.job(inb, JobKind::Open, 0, &sealed);
            job.seq = seq.into();
            jobs.push(job);
        }
        let begin = Instant::now();
        let target = held.len() + jobs.len();
        while held.len() < target
            && rig.engine.is_healthy()
            && begin.elapsed() < Duration::from_secs(20)
        {
            rig.engine.submit(&rig.view, &mut jobs, &mut held);
            rig.engine.poll(&mut held);
            std::thread::yield_now();
        }
        held.append(&mut jobs);
        for job in held.drain(..) {
            if job.status == JobStatus::Done {
                let seq = u32::try_from(job.seq).unwrap();
                let plain = payload(usize::try_from(seq % 32).unwrap() * 40 + 1);
                let esp = &job.frame.data()[20..];
                if job.kind == JobKind::Seal {
                    let (_, sealed) = packets(CBC_SHA1, rig.spi(out), seq, &plain);
                    assert_eq!(esp, sealed);
                } else {
                    assert_eq!(esp[24..24 + plain.len()], plain);
                }
            }
            rig.pool.put(job.frame);
        }
        if !rig.engine.is_healthy() {
            return;
        }
    }
}

/// Resets in time, with every job back, and the engine works again.
fn recover(rig: &mut Rig) {
    let stuck = rig.engine.in_flight();
    let mut back = Vec::new();
    // Several times, as others may keep the processors from us.
    let mut took = Duration::MAX;
    for _ in 0..5 {
        let begin = Instant::now();
        rig.engine.reset(&mut back).unwrap();
        took = took.min(begin.elapsed());
        if took < Duration::from_millis(100) {
            break;
        }
    }
    assert!(took < Duration::from_millis(100), "{took:?}");
    rig.engine.config.deadline = patient().deadline;
    assert_eq!((back.len(), rig.engine.in_flight()), (stuck, 0));
    assert!(back.iter().all(|j| j.status != JobStatus::Done));
    rig.put(back);
    assert_eq!(rig.pool.arena().outstanding(), 0);
    traffic(rig, 2);
    assert_eq!(rig.engine.health(), Health::Good);
}

#[test]
fn a_lost_result_is_found_by_its_deadline() {
    let mut rig = rig(config());
    rig.knobs.lose.store(20_000, Relaxed);
    traffic(&mut rig, 50);
    assert_eq!(rig.engine.health(), Health::Lost);
    assert!(rig.engine.stats().unwrap().lost.value() > 0);
    // Nothing is taken meanwhile, and nothing blocks.
    let sa = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let (framed, _) = packets(CBC_SHA1, rig.spi(sa), 1, b"x");
    let job = rig.job(sa, JobKind::Seal, 0, &framed);
    assert_eq!(rig.one(job).0, JobStatus::Failed);
    rig.knobs.lose.store(0, Relaxed);
    recover(&mut rig);
    rig.end();
}

#[test]
fn an_engine_that_stands_still_is_reset() {
    let mut rig = rig(config());
    rig.knobs.hang.store(300, Relaxed);
    traffic(&mut rig, 50);
    assert_eq!(rig.engine.health(), Health::Lost);
    rig.knobs.hang.store(0, Relaxed);
    recover(&mut rig);
    rig.end();
}

#[test]
fn a_result_that_comes_twice_or_in_anothers_place_stops_the_engine() {
    let turn = |k: &Knobs, twice: bool, rate| {
        let knob = if twice { &k.duplicate } else { &k.reorder };
        knob.store(rate, Relaxed);
    };
    for twice in [true, false] {
        let mut rig = rig(config());
        turn(&rig.knobs, twice, 20_000);
        traffic(&mut rig, 50);
        // A copy in a place that is not given yet shows when the result of that place is missing.
        let health = rig.engine.health();
        assert!(
            matches!(health, Health::Wrong(_) | Health::Lost),
            "{health:?}"
        );
        turn(&rig.knobs, twice, 0);
        recover(&mut rig);
        rig.end();
    }
}

#[test]
fn descriptors_seen_in_pieces_and_results_that_are_late_do_no_harm() {
    let mut rig = rig(Eip93Config { ..patient() });
    rig.knobs.tear.store(200_000, Relaxed);
    rig.knobs.delay.store(10_000, Relaxed);
    rig.knobs.late.store(500, Relaxed);
    traffic(&mut rig, 20);
    assert_eq!(rig.engine.health(), Health::Good);
    rig.end();
}

#[test]
fn results_with_wrong_bits_are_never_taken_for_right() {
    for seed in 0..6u32 {
        let mut rig = rig(config());
        for _ in 0..seed {
            rig.knobs.random();
        }
        rig.knobs.garble.store(30_000, Relaxed);
        traffic(&mut rig, 50);
        rig.knobs.garble.store(0, Relaxed);
        recover(&mut rig);
        rig.end();
    }
}

#[test]
fn errors_that_did_not_happen_lose_packets_and_nothing_else() {
    for _ in 0..4 {
        let mut rig = rig(config());
        rig.knobs.spurious.store(30_000, Relaxed);
        traffic(&mut rig, 50);
        rig.knobs.spurious.store(0, Relaxed);
        recover(&mut rig);
        rig.end();
    }
}

#[test]
fn packet_mode_goes_on_behind_the_numbers_that_were_lost() {
    let mut rig = rig(config());
    let out = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Packet);
    let room = [vec![0; 24], payload(100)].concat();
    let job = rig.job(out, JobKind::Seal, 0, &room);
    assert_eq!(rig.one(job).0, JobStatus::Done);
    rig.knobs.hang.store(1, Relaxed);
    let mut jobs: Vec<_> = (0..5)
        .map(|_| rig.job(out, JobKind::Seal, 0, &room))
        .collect();
    let view = Arc::clone(&rig.view);
    rig.engine.submit(&view, &mut jobs, &mut rig.done);
    while rig.engine.is_healthy() {
        rig.engine.poll(&mut rig.done);
    }
    rig.knobs.hang.store(0, Relaxed);
    recover(&mut rig);
    let job = rig.job(out, JobKind::Seal, 0, &room);
    let (status, got) = rig.one(job);
    assert_eq!(status, JobStatus::Done);
    assert_eq!(open(CBC_SHA1, rig.spi(out), &got).unwrap().0, 7);
    rig.end();
}

#[test]
fn a_model_that_goes_away_keeps_its_frames_from_everybody() {
    let mut rig = rig(config());
    rig.knobs.latency.store(1_000_000, Relaxed);
    let sa = rig.sa(CBC_SHA1, Direction::Out, OffloadMode::Crypto);
    let (framed, _) = packets(CBC_SHA1, rig.spi(sa), 1, &payload(100));
    let mut jobs: Vec<_> = (0..5)
        .map(|_| rig.job(sa, JobKind::Seal, 0, &framed))
        .collect();
    let view = Arc::clone(&rig.view);
    rig.engine.submit(&view, &mut jobs, &mut rig.done);
    rig.model = None;
    while rig.engine.is_healthy() {
        rig.engine.poll(&mut rig.done);
    }
    assert_eq!(rig.engine.health(), Health::Lost);
    let dead = rig.engine.reset(&mut rig.done).unwrap_err();
    assert_eq!(dead.engine, NAME);
    assert_eq!((rig.engine.in_flight(), rig.done.len()), (5, 0));
    // The model comes back as another, and another engine works on the same frames; those five are lost.
    let model = Eip93::new(Switches::default(), Knobs::new(&KnobArgs::default()));
    let path = rig._dir.path().join("eip93");
    let model = Server::bind(&path).unwrap().spawn(Box::new(model)).unwrap();
    let device = Arc::new(VfioUserDevice::connect(model.path()).unwrap());
    let arena = Arc::clone(rig.pool.arena());
    rig.engine = Eip93Engine::open(device, &arena, patient()).unwrap();
    let (framed, sealed) = packets(CBC_SHA1, rig.spi(sa), 2, &payload(100));
    rig.install(sa).unwrap();
    let job = rig.job(sa, JobKind::Seal, 0, &framed);
    assert_eq!(rig.one(job), (JobStatus::Done, sealed));
    drop(rig);
    assert_eq!(arena.outstanding(), 5);
}
