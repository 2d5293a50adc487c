use super::*;
use crate::crypto::select::{Choice, Compare, Selection};
use pmd::engine::{Capabilities, Refusal};
use pmd::{Arena, ArenaConfig, HugePolicy};

fn arena() -> Arc<Arena> {
    Arena::new(ArenaConfig {
        frames: 256,
        stride: 2048,
        huge: HugePolicy::Never,
        name: "choice".into(),
        ..ArenaConfig::default()
    })
    .unwrap()
}

fn with_bench<R>(act: impl FnOnce(&mut Bench<'_>) -> R) -> R {
    let arena = arena();
    let mut pool = Pool::new(&arena, 8);
    let selection = Selection::new(Choice::Auto, Compare::Features).unwrap();
    let mut bench = Bench {
        pool: &mut pool,
        clock: &Clock::new(),
        factory: &selection,
        effort: Effort {
            packets: 24,
            runs: 2,
            patience: Duration::from_millis(20),
        },
    };
    let result = act(&mut bench);
    drop(pool);
    assert_eq!(arena.outstanding(), 0, "frames are missing");
    result
}

/// A CPU that plays an engine and errs as told.
struct Player {
    cpu: SoftwareEngine,
    caps: Capabilities,
    fault: Fault,
    healthy: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Every job of this direction comes back with a bit flipped.
    Flip(JobKind),
    /// One job is kept.
    Keep,
    /// Takes no SA.
    Refuse,
    /// Stops after its first run.
    Die,
}

impl Player {
    fn new(fault: Fault) -> Self {
        let cpu = SoftwareEngine::default();
        let suite = "aes-128-gcm-16".parse().unwrap();
        let caps = Capabilities {
            name: "player",
            crypto: vec![suite],
            ..Capabilities::default()
        };
        Self {
            cpu,
            caps,
            fault,
            healthy: true,
        }
    }
}

impl EspEngine for Player {
    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        match self.fault {
            Fault::Refuse => Err(Refusal::NoSlot {
                engine: "player",
                sa: sa.spec.name.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn remove(&mut self, _: SaId) {}

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        let kept = match self.fault {
            Fault::Keep => jobs.len() - 1,
            _ => jobs.len(),
        };
        let mut now: Vec<EspJob> = jobs.drain(..kept).collect();
        self.cpu.submit(view, &mut now, done);
        for job in &mut *done {
            if self.fault == Fault::Flip(job.kind) {
                job.frame.data_mut()[60] ^= 4;
            }
        }
        if self.fault == Fault::Die {
            self.healthy = false;
        }
    }

    fn poll(&mut self, _: &mut Vec<EspJob>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn is_healthy(&self) -> bool {
        self.healthy
    }
}

#[test]
fn the_cpu_has_figures_for_every_suite_direction_and_size() {
    let (rows, not) = with_bench(|bench| bench.cpu(&Suite::all()));
    assert_eq!(not, []);
    assert_eq!(rows.len(), 2 * Suite::all().len());
    for row in &rows {
        for size in Size::ALL {
            let figure = row.cell(size).unwrap();
            assert!(figure.cpu_ns > 0.0 && figure.ns >= figure.cpu_ns);
        }
        assert_eq!(row.place(), Place::CPU);
    }
}

#[test]
fn an_engine_is_measured_in_what_it_offers() {
    let (rows, not) = with_bench(|bench| bench.engine(&mut Player::new(Fault::None), 3));
    assert_eq!(not, []);
    let suite: Suite = "aes-128-gcm-16".parse().unwrap();
    let got: Vec<_> = rows
        .iter()
        .map(|r| (r.suite(), r.direction(), r.place().engine, r.place().mode))
        .collect();
    assert_eq!(
        got,
        [
            (suite, Direction::Out, 3, OffloadMode::Crypto),
            (suite, Direction::In, 3, OffloadMode::Crypto)
        ]
    );
}

#[test]
fn an_engine_that_errs_stalls_refuses_or_dies_has_no_figures() {
    let ask = |fault| with_bench(|bench| bench.engine(&mut Player::new(fault), 1));
    let suite: Suite = "aes-128-gcm-16".parse().unwrap();
    let mode = OffloadMode::Crypto;
    for kind in [JobKind::Seal, JobKind::Open] {
        let wrong = Unmeasured::Wrong { suite, mode, kind };
        assert_eq!(ask(Fault::Flip(kind)), (vec![], vec![wrong]));
    }
    let silent = Unmeasured::Silent { suite, mode };
    assert_eq!(ask(Fault::Keep), (vec![], vec![silent]));
    let (rows, not) = ask(Fault::Refuse);
    assert_eq!(rows, []);
    assert!(matches!(&not[..], [Unmeasured::Refused { .. }]), "{not:?}");
    assert_eq!(ask(Fault::Die).0, []);
}

#[test]
fn without_frames_nothing_is_measured_and_none_is_lost() {
    let arena = arena();
    let mut pool = Pool::new(&arena, 8);
    let selection = Selection::new(Choice::Auto, Compare::Features).unwrap();
    let suites = ["aes-128-gcm-16".parse().unwrap()];
    let mut bench = Bench {
        pool: &mut pool,
        clock: &Clock::new(),
        factory: &selection,
        effort: Effort {
            packets: 300,
            ..Effort::default()
        },
    };
    assert_eq!(bench.cpu(&suites), (vec![], vec![Unmeasured::NoFrames]));
    drop(pool);
    assert_eq!(arena.outstanding(), 0);
}
