//! The wrapper around the real drivers, whose engines are the models, with each of their knobs.

use esplanade_model::eip93::{self as eip93_model, Eip93};
use esplanade_model::soe::{self as soe_model, Soe};
use esplanade_model::{KnobArgs, Knobs, Running, Server};
use pmd::airoha::Block;
use pmd::device::Device;
use pmd::device::vfio_user::VfioUserDevice;
use pmd::eip93::{Eip93Config, Eip93Engine};
use pmd::qdma::QdmaPlan;
use pmd::soe::SoeConfig;
use std::sync::atomic::AtomicU32;

use super::*;

/// A model, its driver, and the wrapper.
struct Bench {
    rig: Rig,
    knobs: Arc<Knobs>,
    model: Option<Running>,
    _block: Option<Block>,
    _dir: tempfile::TempDir,
}

fn full() -> TrustConfig {
    TrustConfig {
        sample_out: 1,
        sample_in: 1,
        // Machines that run tests are busy.
        patience: Duration::from_secs(20),
        ..config()
    }
}

fn eip93(deadline: Duration, trust: TrustConfig) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let knobs = Knobs::new(&KnobArgs {
        seed: 11,
        ..KnobArgs::default()
    });
    let model = Eip93::new(eip93_model::Switches::default(), Arc::clone(&knobs));
    let server = Server::bind(&dir.path().join("engine")).unwrap();
    let model = server.spawn(Box::new(model)).unwrap();
    let device = Arc::new(VfioUserDevice::connect(model.path()).unwrap());
    let arena = arena();
    let own = Eip93Config {
        deadline,
        bring_up: Duration::from_secs(5),
        ..Eip93Config::default()
    };
    let engine = Eip93Engine::open(device, &arena, own).unwrap();
    Bench {
        rig: Rig::around(Box::new(engine), arena, trust, Arc::default()),
        knobs,
        model: Some(model),
        _block: None,
        _dir: dir,
    }
}

fn soe(patience: Duration, trust: TrustConfig) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let knobs = Arc::<Knobs>::default();
    let model = Soe::new(soe_model::Switches::default(), Arc::clone(&knobs));
    let server = Server::bind(&dir.path().join("engine")).unwrap();
    let model = server.spawn(Box::new(model)).unwrap();
    let device: Arc<dyn Device> = Arc::new(VfioUserDevice::connect(model.path()).unwrap());
    let arena = arena();
    let plans = vec![QdmaPlan::shared(0, 2, true), QdmaPlan::shared(1, 2, true)];
    let block = Block::new(&device, None, plans, &arena).unwrap();
    let own = SoeConfig {
        patience,
        ..SoeConfig::default()
    };
    let engine = block.engine(own).unwrap();
    block.start().unwrap();
    Bench {
        rig: Rig::around(Box::new(engine), arena, trust, Arc::default()),
        knobs,
        model: Some(model),
        _block: Some(block),
        _dir: dir,
    }
}

impl Bench {
    /// Rounds of packets in both directions, until the engine is out of service; what is said to be done is right. Returns
    /// how many were done, and how many not.
    fn traffic(&mut self, out: SaId, inb: SaId, rounds: u64) -> (usize, usize) {
        let rig = &mut self.rig;
        let (mut done, mut failed) = (0, 0);
        for _ in 0..rounds {
            if !rig.trusted().is_healthy() {
                break;
            }
            let mut given = 0;
            for _ in 0..16 {
                if let Ok(seq) = rig.entry(out).next_out(1, 0) {
                    rig.queue(out, seq);
                    given += 1;
                }
                let seq = rig.entry(inb).live.window.top() + 1;
                rig.entry(inb).live.window.commit(seq);
                rig.queue(inb, seq);
                given += 1;
            }
            rig.until(|rig| rig.jobs.is_empty() && rig.trusted().in_flight() == 0);
            let back = rig.take();
            assert_eq!(back.len(), given);
            let right = back.iter().filter(|(_, s)| *s == JobStatus::Done).count();
            done += right;
            failed += given - right;
            rig.clock.fetch_add(SECOND / 10, Relaxed);
        }
        (done, failed)
    }

    /// Until the engine serves, moving time past the pauses.
    fn back_in_service(&mut self) {
        self.rig.until(|rig| {
            if rig.trust.state() == EngineState::Quarantined {
                rig.clock.fetch_add(SECOND, Relaxed);
            }
            rig.trust.state() == EngineState::Serving
        });
    }

    fn end(self) {
        let Bench { rig, _block, .. } = self;
        let Rig {
            mut trusted,
            mut pool,
            done,
            jobs,
            arena,
            ..
        } = rig;
        assert_eq!(trusted.as_mut().unwrap().in_flight(), 0);
        for job in done.into_iter().chain(jobs) {
            pool.put(job.frame);
        }
        drop((trusted, pool, _block));
        assert_eq!(arena.outstanding(), 0, "frames are missing");
    }
}

const PATIENT: Duration = Duration::from_secs(20);

#[test]
fn an_eip93_of_good_will_keeps_its_trust() {
    let mut b = eip93(PATIENT, full());
    for mode in [OffloadMode::Crypto, OffloadMode::Packet] {
        let out = b.rig.sa(cbc(), Direction::Out, mode);
        let inb = b.rig.sa(cbc(), Direction::In, mode);
        assert_eq!(b.traffic(out, inb, 40), (40 * 32, 0), "{mode:?}");
    }
    let t = &b.rig.trust;
    assert_eq!(t.samples.value(), 2 * 40 * 32);
    assert!(t.canaries.value() >= 14, "{}", t.canaries.value());
    assert_eq!(
        (t.canaries_failed.value(), t.lost.value(), t.wrong.value()),
        (0, 0, 0)
    );
    assert_eq!(b.rig.state(), (EngineState::Serving, Reason::None));
    assert_eq!(b.model.as_ref().unwrap().log().take(), []);
    b.end();
}

/// Which knob, how far, and whether each time it leads to a quarantine.
type Turn = (&'static str, fn(&Knobs) -> &AtomicU32, u32, bool);

fn misbehaves(make: fn() -> Bench, mode: OffloadMode, (name, knob, rate, stops): Turn) {
    let mut b = make();
    let out = b.rig.sa(cbc(), Direction::Out, mode);
    let inb = b.rig.sa(cbc(), Direction::In, mode);
    assert_eq!(b.traffic(out, inb, 2), (64, 0), "{name}");
    knob(&b.knobs).store(rate, Relaxed);
    let (_, failed) = b.traffic(out, inb, 60);
    knob(&b.knobs).store(0, Relaxed);
    if stops {
        assert!(b.rig.trust.quarantines.value() > 0, "{name} {mode:?}");
        assert!(failed > 0, "{name}");
    }
    b.back_in_service();
    // What the engine numbered and lost count of is stopped; everything else goes on.
    let rekeyed = b.rig.entry(out).disabled();
    assert_eq!(
        rekeyed,
        b.rig.bare && b.rig.trust.quarantines.value() > 0,
        "{name}"
    );
    let out = match rekeyed {
        true => b.rig.sa(cbc(), Direction::Out, mode),
        false => out,
    };
    assert_eq!(b.traffic(out, inb, 3), (96, 0), "{name} {mode:?}");
    b.end();
}

#[test]
fn an_eip93_that_misbehaves_delivers_nothing_wrong_and_comes_back() {
    let turns: [Turn; 6] = [
        ("corrupt", |k| &k.corrupt, 20_000, true),
        ("spurious", |k| &k.spurious, 20_000, true),
        ("garble", |k| &k.garble, 20_000, true),
        ("duplicate", |k| &k.duplicate, 20_000, true),
        ("reorder", |k| &k.reorder, 20_000, true),
        ("lose", |k| &k.lose, 20_000, true),
    ];
    for turn in turns {
        for mode in [OffloadMode::Crypto, OffloadMode::Packet] {
            misbehaves(|| eip93(Duration::from_millis(1500), full()), mode, turn);
        }
    }
}

#[test]
fn an_soe_of_good_will_keeps_its_trust() {
    let mut b = soe(PATIENT.min(pmd::soe::MOST_PATIENCE), full());
    let out = b.rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
    let inb = b.rig.sa(cbc(), Direction::In, OffloadMode::Packet);
    assert_eq!(b.traffic(out, inb, 40), (40 * 32, 0));
    let t = &b.rig.trust;
    assert_eq!(t.samples.value(), 40 * 32);
    assert!(t.canaries.value() >= 6, "{}", t.canaries.value());
    assert_eq!(
        (t.canaries_failed.value(), t.lost.value(), t.wrong.value()),
        (0, 0, 0)
    );
    assert_eq!(b.rig.state(), (EngineState::Serving, Reason::None));
    b.end();
}

#[test]
fn an_soe_that_misbehaves_delivers_nothing_wrong_and_comes_back() {
    let turns: [Turn; 5] = [
        ("corrupt", |k| &k.corrupt, 20_000, true),
        ("spurious", |k| &k.spurious, 100_000, true),
        ("lose", |k| &k.lose, 50_000, true),
        // Those that come twice are told apart by their numbers.
        ("duplicate", |k| &k.duplicate, 20_000, false),
        ("reorder", |k| &k.reorder, 20_000, false),
    ];
    for turn in turns {
        misbehaves(
            || soe(Duration::from_millis(800), full()),
            OffloadMode::Packet,
            turn,
        );
    }
}

#[test]
fn engines_that_stand_still_are_reset_and_serve_again() {
    let makes: [fn() -> Bench; 2] = [
        || eip93(Duration::from_millis(1500), full()),
        || soe(Duration::from_millis(800), full()),
    ];
    for make in makes {
        let mut b = make();
        let inb = b.rig.sa(cbc(), Direction::In, OffloadMode::Packet);
        let out = b.rig.sa(cbc(), Direction::Out, OffloadMode::Packet);
        b.knobs.hang.store(1, Relaxed);
        b.traffic(out, inb, 60);
        b.knobs.hang.store(0, Relaxed);
        assert!(b.rig.trust.quarantines.value() > 0);
        b.back_in_service();
        assert!(b.rig.entry(out).disabled() == b.rig.bare);
        let out = match b.rig.bare {
            true => b.rig.sa(cbc(), Direction::Out, OffloadMode::Packet),
            false => out,
        };
        assert_eq!(b.traffic(out, inb, 3), (96, 0));
        b.end();
    }
}

#[test]
fn the_cpu_goes_on_when_an_engine_is_gone() {
    let mut b = eip93(
        Duration::from_millis(200),
        TrustConfig {
            most_failures: 2,
            canaries: Duration::ZERO,
            ..full()
        },
    );
    let out = b.rig.sa(cbc(), Direction::Out, OffloadMode::Crypto);
    assert_eq!(b.rig.state().0, EngineState::Serving);
    b.knobs.latency.store(5_000_000, Relaxed);
    b.rig.send(out, 5);
    b.model = None;
    let clock = Arc::clone(&b.rig.clock);
    b.rig.until(|rig| {
        clock.fetch_add(SECOND / 100, Relaxed);
        rig.trust.state() == EngineState::Dead
    });
    assert_eq!(b.rig.trusted().in_flight(), 5, "in limbo");
    b.rig.send(out, 20);
    assert_eq!(b.rig.take(), all(6..=25, JobStatus::Done));
    let Bench { rig, .. } = b;
    let Rig {
        trusted,
        pool,
        arena,
        ..
    } = rig;
    drop((trusted, pool));
    assert_eq!(
        arena.outstanding(),
        5,
        "nobody may have what the engine may write to"
    );
}
