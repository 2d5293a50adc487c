//! The state of the control thread and its periodic work. No I/O but files and the lease writer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sa_store::cipher::CipherFactory;
use sa_store::file::Config;
use sa_store::lease::{LeaseError, LeaseWriter};
use sa_store::report::Report;
use sa_store::runtime::event;
use sa_store::store::Store;
use serde::{Deserialize, Serialize};

use crate::engines::Engines;
use crate::events::Events;
use crate::health::Health;
use crate::install::{self, Applied};
use crate::keeper::Keeper;
use crate::plane::DataPlane;

/// How often sticky events of idle SAs, and time limits, are looked at.
const SLOW: Duration = Duration::from_secs(1);

/// How often inbound edges that are needlessly far ahead are looked for.
const LOWER: Duration = Duration::from_secs(10);

/// How long an offline run waits for the disk.
const SETTLE: Duration = Duration::from_secs(10);

/// What control is made of.
pub struct Parts {
    /// SA store; routes are in its current snapshot already.
    pub store: Store,
    /// Lease writer.
    pub leases: LeaseWriter,
    /// Makes ciphers.
    pub ciphers: Arc<dyn CipherFactory>,
    /// Data path.
    pub plane: Arc<dyn DataPlane>,
    /// SA files and directories.
    pub sa_files: Vec<PathBuf>,
    /// SAs that have metrics of their own, at most.
    pub metrics_max_sas: usize,
}

/// Outcome of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Whether the files are what runs now.
    pub ok: bool,
    /// Seconds since 1970.
    pub time: u64,
    /// SAs added or changed.
    pub added: usize,
    /// SAs removed or changed.
    pub removed: usize,
    /// SAs that were left alone.
    pub kept: usize,
    /// Policies now.
    pub policies: usize,
    /// Snapshot that runs.
    pub epoch: u64,
    /// Milliseconds that it took.
    pub millis: u64,
    /// What is wrong, each with file, line and column.
    pub problems: Vec<String>,
}

/// The control thread's state.
pub struct Control {
    pub(crate) store: Store,
    pub(crate) keeper: Keeper,
    leases: LeaseWriter,
    ciphers: Arc<dyn CipherFactory>,
    pub(crate) plane: Arc<dyn DataPlane>,
    pub(crate) sa_files: Vec<PathBuf>,
    pub(crate) events: Events,
    pub(crate) health: Health,
    engines: Engines,
    pub(crate) last_reload: Option<Reload>,
    pub(crate) reloads: [u64; 2],
    pub(crate) metrics_max_sas: usize,
    pub(crate) config: Config,
    loaded: bool,
    pub(crate) start_time: u64,
    started: Instant,
    last_slow: Option<Instant>,
    last_work: u64,
    lease_failed: bool,
    last_lower: Option<Instant>,
    /// Inbound edges were lowered, and some worker may not know yet.
    lowering: bool,
}

impl Control {
    /// Nothing is loaded yet.
    pub fn new(parts: Parts) -> Self {
        Self {
            store: parts.store,
            keeper: Keeper::default(),
            leases: parts.leases,
            ciphers: parts.ciphers,
            plane: parts.plane,
            sa_files: parts.sa_files,
            events: Events::default(),
            health: Health::default(),
            engines: Engines::default(),
            last_reload: None,
            reloads: [0; 2],
            metrics_max_sas: parts.metrics_max_sas,
            config: Config::default(),
            loaded: false,
            start_time: seconds_now(),
            started: Instant::now(),
            last_slow: None,
            last_work: u64::MAX,
            lease_failed: false,
            last_lower: None,
            lowering: false,
        }
    }

    /// Reads the SA files and makes them the running state; on any error what runs stays.
    pub fn reload(&mut self) -> &Reload {
        let began = Instant::now();
        match crate::desired::load(&self.sa_files) {
            Ok(config) => self.apply_since(config, began),
            Err(p) => self.refused(p.iter().map(ToString::to_string).collect(), began),
        }
    }

    /// Makes a configuration the running state, as [`reload`](Self::reload) does with that of the files.
    pub fn apply(&mut self, config: Config) -> &Reload {
        self.apply_since(config, Instant::now())
    }

    fn apply_since(&mut self, config: Config, began: Instant) -> &Reload {
        let plane = Arc::clone(&self.plane);
        let done = install::apply(
            &config,
            &mut self.store,
            &mut self.keeper,
            &self.leases,
            &*self.ciphers,
            &*plane,
        );
        match done {
            Ok(applied) => {
                self.plane.published(&config);
                self.config = config;
                self.accepted(&applied, began)
            }
            Err(e) => self.refused(vec![e.to_string()], began),
        }
    }

    fn accepted(&mut self, a: &Applied, began: Instant) -> &Reload {
        let millis = millis(began.elapsed());
        tracing::info!(
            added = a.added,
            removed = a.removed,
            kept = a.kept,
            policies = a.policies,
            epoch = a.epoch,
            millis,
            "configuration loaded"
        );
        self.events.note(
            "reload",
            format!(
                "{} SAs added, {} removed, {} kept, {} policies",
                a.added, a.removed, a.kept, a.policies
            ),
        );
        self.reloads[1] += 1;
        self.loaded = true;
        self.last_reload.insert(Reload {
            ok: true,
            time: seconds_now(),
            added: a.added,
            removed: a.removed,
            kept: a.kept,
            policies: a.policies,
            epoch: a.epoch,
            millis,
            problems: Vec::new(),
        })
    }

    fn refused(&mut self, problems: Vec<String>, began: Instant) -> &Reload {
        for p in &problems {
            tracing::error!("{p}");
        }
        tracing::error!(
            problems = problems.len(),
            "configuration refused; what ran before runs on"
        );
        self.events.note(
            "reload_refused",
            problems.first().cloned().unwrap_or_default(),
        );
        self.reloads[0] += 1;
        self.last_reload.insert(Reload {
            time: seconds_now(),
            epoch: self.store.current().epoch,
            millis: millis(began.elapsed()),
            problems,
            ..Reload::default()
        })
    }

    /// Work of every few milliseconds: leases, retirement, and now and then events and time limits.
    pub fn tick(&mut self) {
        install::reap(
            &mut self.store,
            &mut self.keeper,
            &self.leases,
            &*self.plane,
        );
        let now = Instant::now();
        self.lower_edges(now);
        self.hear();
        let work = self.work_done();
        // Nothing moved and nothing is pending: nothing can have been used up.
        if work != self.last_work {
            self.last_work = work;
            if let Err(e) = self
                .keeper
                .round(now.duration_since(self.started), &self.leases)
            {
                self.lease_trouble(&e);
            }
            for entry in self.keeper.hot() {
                self.events.collect(entry);
            }
        }
        if self.last_slow.is_none_or(|t| now.duration_since(t) >= SLOW) {
            self.last_slow = Some(now);
            self.health.observe(self.plane.workers(), now);
            self.engines
                .observe(&self.plane.engines(), &mut self.events);
            self.expire();
            self.scan_events();
            if let Err(e) = self
                .keeper
                .round(now.duration_since(self.started), &self.leases)
            {
                self.lease_trouble(&e);
            }
            // One more look soon: what was asked for may be durable then.
            self.last_work = u64::MAX;
        }
    }

    /// What workers tell: the audit log of RFC 4301, and SAs whose edge is wanted now.
    fn hear(&mut self) {
        let (plane, keeper) = (Arc::clone(&self.plane), &mut self.keeper);
        plane.reports(&mut |report| match report {
            Report::Audit(event) => tracing::warn!("audit: {event}"),
            Report::Edge(sa) => keeper.attend(sa),
        });
    }

    /// Takes inbound edges that are needlessly far ahead back, in two steps: the workers first, then the disk.
    fn lower_edges(&mut self, now: Instant) {
        if self.lowering {
            if self.store.settled() {
                self.lowering = false;
                if let Err(e) = self.keeper.lowered(&self.leases) {
                    self.lease_trouble(&e);
                }
            } else if self
                .last_lower
                .is_some_and(|t| now.duration_since(t) >= LOWER)
            {
                // A worker is stuck; the SAs of the others must not wait for it.
                self.lowering = false;
                self.keeper.not_lowered();
            }
        } else if self
            .last_lower
            .is_none_or(|t| now.duration_since(t) >= LOWER)
        {
            self.last_lower = Some(now);
            self.lowering = self.keeper.lower(now.duration_since(self.started));
            if self.lowering {
                // A worker that acknowledges this publication has finished every burst that began before.
                let barrier = self.store.draft();
                self.store.publish(barrier);
            }
        }
    }

    /// Waits until every lease that was asked for is on disk, so that an offline run does not depend on how fast
    /// the disk is.
    pub fn settle_leases(&mut self) {
        let deadline = Instant::now() + SETTLE;
        while self.keeper.is_waiting() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        let now = self.started.elapsed();
        if let Err(e) = self.keeper.round(now, &self.leases) {
            self.lease_trouble(&e);
        }
    }

    /// Whether a configuration was ever loaded.
    pub fn is_ready(&self) -> bool {
        self.loaded
    }

    /// Outcome of the latest reload.
    pub fn last_reload(&self) -> Option<&Reload> {
        self.last_reload.as_ref()
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What is wrong with the data path, if anything.
    pub fn problem(&self) -> Option<String> {
        self.health.problem(&*self.plane, Instant::now())
    }

    /// Ends the leases at their exact numbers. The workers must have stopped.
    ///
    /// # Errors
    /// The store did not take it; nothing is reused, but numbers are skipped at the next start.
    pub fn finish(mut self, stopped: bool) -> Result<(), LeaseError> {
        self.keeper.finish(stopped, &self.leases)?;
        self.leases.stop().map(drop)
    }

    fn work_done(&self) -> u64 {
        let of = |w: &crate::plane::WorkerView| {
            w.counters
                .received
                .value()
                .wrapping_add(w.counters.encrypted.value())
        };
        self.plane
            .workers()
            .iter()
            .map(of)
            .fold(0, u64::wrapping_add)
    }

    fn scan_events(&mut self) {
        let snapshot = self.store.current();
        for entry in snapshot.sas.iter().flatten() {
            self.events.collect(entry);
        }
    }

    /// Raises time limits of SAs that carry nothing, which the data path does not look at.
    fn expire(&mut self) {
        let now = self.plane.now();
        for entry in self.store.current().sas.iter().flatten() {
            let age = now.saturating_sub(entry.installed_at) / 1_000_000_000;
            let idle = now.saturating_sub(entry.live.last_used.value()) > 2_000_000_000;
            let passed = |limit: Option<u64>| limit.is_some_and(|s| age >= s);
            if idle && passed(entry.spec.soft.seconds) {
                entry.raise(event::SOFT_TIME);
            }
            if idle && passed(entry.spec.hard.seconds) {
                entry.raise(event::HARD);
            }
        }
    }

    fn lease_trouble(&mut self, e: &LeaseError) {
        if !self.lease_failed {
            self.lease_failed = true;
            tracing::error!(error = %e, "no more sequence numbers can be leased: SAs stop when theirs are used up");
            self.events.note("lease_store_failed", e.to_string());
        }
    }
}

fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
