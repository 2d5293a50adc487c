//! A whole gateway: ports, workers, leases, control; started, watched, stopped in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caps::Capability;
use control::api::{ApiConfig, Stats};
use control::core::{Control, Parts};
use control::plane::WorkerView;
use control::run::{Ended, Options, Running, StartError};
use pmd::{Arena, Pool};
use quanta::{Clock, Mock};
use sa_store::cipher::CipherFactory;
use sa_store::lease::{LeaseError, LeaseStore, LeaseWriter};
use sa_store::ledger::{Balance, WorkerCounters};
use sa_store::suite::Suite;

use super::engines::OpenEngines;
use super::open::{OpenError, Opened, open};
use super::plane::{Plane, PlaneParts};
use super::privileges::{self, PrivilegeError};
use crate::config::GatewayConfig;
use crate::crypto::UnknownProvider;
use crate::crypto::select::{Choice, Compare, SelectError, Selection};
use crate::engine::Park;
use crate::engine::choice::{self, Bench, Effort, Table};
use crate::engine::trust::EngineState;
use crate::worker::{Crew, Worker};

/// What a round takes under a seed, nanoseconds: time goes on with the rounds, so that whatever depends on it repeats.
const ROUND_NANOS: u64 = 10_000;
/// Rounds in which nothing moves after which an offline run is over.
const QUIET: u32 = 256;

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Ports, memory, routes, workers.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The lease store.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Crypto.
    #[error(transparent)]
    Crypto(#[from] SelectError),
    /// Crypto.
    #[error("crypto.provider: {0}")]
    Provider(#[from] UnknownProvider),
    /// Users and groups.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// Control, in particular what is wrong with the SA files.
    #[error(transparent)]
    Control(#[from] StartError),
    /// No threads.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// No way to the kernel's tables.
    #[error("the kernel's tables cannot be followed: {0}")]
    Kernel(std::io::Error),
}

/// The crypto providers that the configuration asks for. Under a seed the choice is the same every time.
///
/// # Errors
/// The provider that was asked for is not there.
pub fn crypto(config: &GatewayConfig) -> Result<Selection, ServiceError> {
    let choice = match &config.crypto.provider {
        Some(name) => Choice::Provider(name.parse()?),
        None => Choice::Auto,
    };
    let compare = if config.test_seed.is_some() {
        Compare::Features
    } else {
        Compare::Measure
    };
    Ok(Selection::new(choice, compare)?)
}

/// A gateway at work.
pub struct Service {
    crew: Crew,
    running: Running,
    alive: Arc<AtomicBool>,
    counters: Vec<Arc<WorkerCounters>>,
}

impl Service {
    /// Opens and starts everything.
    ///
    /// # Errors
    /// See [`ServiceError`]. Nothing runs then.
    pub fn start(config: &GatewayConfig) -> Result<Self, ServiceError> {
        let options = options(config)?;
        let alive = Arc::new(AtomicBool::new(true));
        let mut built = build(config, Arc::clone(&alive), Clock::new())?;
        built.parts.kernel =
            super::kernel::plan(config, &built.parts.store).map_err(ServiceError::Kernel)?;
        let kept = if options.ike.is_some() {
            // Each message to the kernel's IPsec tables is checked against the sender's rights.
            &[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW][..]
        } else {
            &[]
        };
        privileges::keep_from_programs()?;
        privileges::drop_to(&config.privileges, kept)?;
        let mut running = control::run::start(built.parts, options)?;
        // The control thread has them now; workers need none.
        privileges::drop_kept(&config.privileges, kept)?;
        if let Some(settings) = config.ike.as_ref().and_then(|ike| ike.vici.clone()) {
            // Reads what another program says: without any of the rights above.
            running
                .follow_names(settings)
                .map_err(ServiceError::Threads)?;
        }
        let crew = Crew::start(built.workers).map_err(ServiceError::Threads)?;
        Ok(Self {
            crew,
            running,
            alive,
            counters: built.counters,
        })
    }

    /// Control.
    pub fn control(&self) -> &Running {
        &self.running
    }

    /// Waits for a signal, a request to stop, or a worker's death.
    pub fn wait(&self) -> Ended {
        loop {
            self.alive.store(self.crew.alive(), Ordering::Relaxed);
            for device in pmd::quiesce::wanted_back() {
                tracing::error!(%device, "the system wants the device back and waits: stop the gateway to release it");
            }
            if pmd::supervisor::is_gone() {
                tracing::error!(
                    "the supervisor has died: stopping, as nobody would stop the devices after this process"
                );
                return Ended::Unhealthy;
            }
            if let Some(why) = self.running.wait(Duration::from_millis(200)) {
                return why;
            }
        }
    }

    /// Drains the workers, then ends control and the leases at their exact numbers. The account of all frames.
    ///
    /// # Errors
    /// The lease store did not take the exact numbers: some are skipped at the next start.
    pub fn stop(self) -> Result<Balance, LeaseError> {
        let whole = self.crew.alive();
        self.crew.stop();
        let balance = Balance::of(self.counters.iter().map(|c| &**c));
        if let Some(control) = self.running.stop() {
            control.finish(whole)?;
        }
        Ok(balance)
    }
}

/// A gateway over captures, run on the calling thread until its input ends. The same input gives the same output.
pub struct Offline {
    workers: Vec<Worker>,
    control: Control,
    counters: Vec<Arc<WorkerCounters>>,
    /// Hand of the clock, under a seed.
    time: Option<Arc<Mock>>,
}

impl Offline {
    /// Opens everything; no thread moves packets, no port is listened on.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn open(config: &GatewayConfig) -> Result<Self, ServiceError> {
        let (clock, time) = match config.test_seed {
            None => (Clock::new(), None),
            Some(_) => {
                let (clock, time) = Clock::mock();
                (clock, Some(time))
            }
        };
        let built = build(config, Arc::new(AtomicBool::new(true)), clock)?;
        let mut control = Control::new(built.parts);
        let first = control.reload();
        if !first.ok {
            return Err(StartError::Refused(first.problems.clone()).into());
        }
        Ok(Self {
            workers: built.workers,
            control,
            counters: built.counters,
            time,
        })
    }

    /// Runs until every port is finished and nothing is inside.
    pub fn run(&mut self) {
        let mut quiet = 0;
        while quiet < QUIET {
            let mut moved = 0;
            if let Some(time) = &self.time {
                time.increment(ROUND_NANOS);
            }
            for w in &mut self.workers {
                moved += w.round();
            }
            // Leases and edges keep up with every round, so that what is refused does not depend on how fast the disk is.
            self.control.tick();
            self.control.settle_leases();
            let idle = moved == 0 && self.workers.iter().all(Worker::finished);
            quiet = if idle { quiet + 1 } else { 0 };
        }
    }

    /// Control's state.
    pub fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    /// Ends it. The account of all frames and the final counters.
    ///
    /// # Errors
    /// The lease store did not take the exact numbers.
    pub fn finish(self) -> Result<(Balance, Stats), LeaseError> {
        for w in self.workers {
            w.shut_down();
        }
        let balance = Balance::of(self.counters.iter().map(|c| &**c));
        let stats = Stats::of(&self.control);
        self.control.finish(true)?;
        Ok((balance, stats))
    }
}

struct Built {
    workers: Vec<Worker>,
    parts: Parts,
    counters: Vec<Arc<WorkerCounters>>,
}

fn build(
    config: &GatewayConfig,
    alive: Arc<AtomicBool>,
    clock: Clock,
) -> Result<Built, ServiceError> {
    let crypto = Arc::new(crypto(config)?);
    crypto.log();
    let ciphers: Arc<dyn CipherFactory> = Arc::clone(&crypto) as _;
    let Opened {
        assembled,
        arena,
        ports,
        capture,
        engines,
    } = open(config, clock, &ciphers)?;
    let leases = if config.test_seed.is_some() {
        LeaseStore::throw_away()?
    } else {
        LeaseStore::open(&config.leases.path)?
    };
    let on_failure =
        Box::new(|e: &LeaseError| tracing::error!(error = %e, "the lease store failed"));
    let leases = LeaseWriter::start(leases, on_failure)?;
    let cpus = config.workers.cpus.clone().unwrap_or_default();
    let views = assembled
        .counters
        .iter()
        .enumerate()
        .map(|(i, c)| WorkerView {
            counters: Arc::clone(c),
            cpu: cpus.get(i).map(|c| usize::from(*c)),
        });
    let choice = choice(config, &engines, &arena, &assembled.clock, &*crypto);
    let plane = Plane::new(PlaneParts {
        workers: views.collect(),
        hits: assembled.hits,
        reports: assembled.reports,
        ports,
        mtus: assembled.mtus,
        stats: assembled.port_stats,
        capture,
        arena,
        clock: assembled.clock,
        crypto: Arc::clone(&crypto),
        engines: Park::new(engines.desks, assembled.wakers, choice),
        watches: engines.watches,
        alive: Box::new(move || alive.load(Ordering::Relaxed)),
    });
    let parts = Parts {
        store: assembled.store,
        leases,
        ciphers: crypto,
        plane: Arc::new(plane),
        sa_files: config.sa_files.clone(),
        metrics_max_sas: usize::try_from(config.metrics_max_sas).unwrap_or(usize::MAX),
        kernel: None,
        rekey: match config.test_seed {
            // Nothing by chance, nothing by the clock of the machine.
            Some(_) => control::rekey::Config {
                jitter_percent: 0,
                hook: None,
                ..config.rekey.config()
            },
            None => config.rekey.config(),
        },
    };
    Ok(Built {
        workers: assembled.workers,
        parts,
        counters: assembled.counters,
    })
}

/// Measures the CPU against the engines, where there are any.
fn choice(
    config: &GatewayConfig,
    engines: &OpenEngines,
    arena: &Arc<Arena>,
    clock: &Clock,
    factory: &dyn CipherFactory,
) -> choice::Choice {
    // Checked with the configuration.
    let objective = config.crypto.objective.parse().unwrap_or_default();
    let mut table = Table::default();
    let mut pool = Pool::new(arena, 512);
    let mut bench = Bench {
        pool: &mut pool,
        clock,
        factory,
        effort: Effort::default(),
    };
    let mut suites: Vec<Suite> = Vec::new();
    for ((number, desk), watch) in (1u8..).zip(&engines.desks).zip(&engines.watches) {
        // The CPU would answer for it.
        if watch.trust.state() != EngineState::Serving {
            tracing::warn!(engine = desk.name(), "not in service: never chosen");
            continue;
        }
        let Some((rows, unmeasured)) = desk.while_here(|engine| bench.engine(engine, number))
        else {
            continue;
        };
        for why in unmeasured {
            tracing::warn!(engine = desk.name(), %why, "never chosen for this");
        }
        suites.extend(rows.iter().map(|row| row.suite()));
        table.extend(rows);
    }
    suites.sort_unstable_by_key(ToString::to_string);
    suites.dedup();
    let (rows, unmeasured) = bench.cpu(&suites);
    for why in unmeasured {
        tracing::warn!(%why, "the CPU was not measured");
    }
    table.extend(rows);
    choice::Choice::new(objective, table)
}

fn options(config: &GatewayConfig) -> Result<Options, ServiceError> {
    let api = match &config.api {
        None => None,
        Some(api) => {
            let group = api.group.as_deref().map(privileges::group_id).transpose()?;
            Some(ApiConfig {
                path: api.socket.clone(),
                group: group.map(nix::unistd::Gid::as_raw),
            })
        }
    };
    Ok(Options {
        metrics: config.metrics,
        api,
        watch: true,
        service: true,
        ike: config.ike.as_ref().map(|ike| ike.mirror.clone()),
    })
}
