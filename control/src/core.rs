//! The state of the control thread and its periodic work. No I/O but files and the lease writer.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sa_store::cipher::CipherFactory;
use sa_store::fib::Fib;
use sa_store::file::{Config, MIRROR_PREFIX};
use sa_store::lease::{LeaseError, LeaseWriter};
use sa_store::local::Locals;
use sa_store::report::{Flow, Report};
use sa_store::runtime::event;
use sa_store::store::Store;

use crate::engines::Engines;
use crate::events::Events;
use crate::health::Health;
use crate::install;
use crate::keeper::Keeper;
use crate::kernel;
pub use crate::origins::Reload;
use crate::origins::Rosters;
use crate::parts::Parts as MirrorParts;
use crate::plane::DataPlane;
use crate::rekey;
use crate::rekey::drive::{Hands, Rekeys};
use crate::rekey::hook::{Call, Outcome};
use crate::vici;
use crate::xfrm::MirrorReport;

/// How often sticky events of idle SAs, and time limits, are looked at.
const SLOW: Duration = Duration::from_secs(1);

/// How often inbound edges that are needlessly far ahead are looked for.
const LOWER: Duration = Duration::from_secs(10);

/// How often keys that were long out of use are retired.
const SWEEP: Duration = Duration::from_secs(60);

/// From which pause on control looks at an SA's time limits itself, nanoseconds.
const IDLE: u64 = 2_000_000_000;

/// How long an offline run waits for the disk.
const SETTLE: Duration = Duration::from_secs(10);

/// Acquires that wait to be told to a daemon, at most; packets go on asking.
const MOST_ACQUIRES: usize = 256;

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
    /// What is mirrored of the kernel's tables.
    pub kernel: Option<kernel::Plan>,
    /// Rekeys.
    pub rekey: rekey::Config,
}

/// The control thread's state.
pub struct Control {
    pub(crate) store: Store,
    pub(crate) keeper: Keeper,
    pub(crate) leases: LeaseWriter,
    pub(crate) ciphers: Arc<dyn CipherFactory>,
    pub(crate) plane: Arc<dyn DataPlane>,
    pub(crate) sa_files: Vec<PathBuf>,
    pub(crate) events: Events,
    pub(crate) rekeys: Rekeys,
    pub(crate) health: Health,
    engines: Engines,
    pub(crate) last_reload: Option<Reload>,
    /// Whose turn it is to reload.
    pub(crate) reload_turns: Arc<tokio::sync::Mutex<()>>,
    pub(crate) reloads: [u64; 2],
    pub(crate) metrics_max_sas: usize,
    /// The mirror of the kernel's tables, and what it is started with.
    pub(crate) kernel: Option<kernel::Handle>,
    kernel_plan: Option<kernel::Plan>,
    /// What the files said when they were last taken.
    pub(crate) config: Config,
    /// What the IKE daemon wants.
    pub(crate) parts: MirrorParts,
    /// Running SAs of the files, and of the mirror.
    pub(crate) rosters: Rosters,
    pub(crate) loaded: bool,
    pub(crate) start_time: u64,
    started: Instant,
    last_slow: Option<Instant>,
    last_work: u64,
    lease_failed: bool,
    last_lower: Option<Instant>,
    last_sweep: Option<Instant>,
    /// Inbound edges were lowered, and some worker may not know yet.
    lowering: bool,
    /// Packets that found no SA, for who can get one.
    acquires: Vec<Flow>,
    pub(crate) mirror_state: MirrorReport,
    /// Names of the mirror's tunnels in the daemon's configuration, when it is asked for them.
    pub(crate) names: Option<vici::Shared>,
}

/// Control, to oneself. One who panicked with it left it whole: what it changes in steps, it publishes in one.
pub(crate) fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Nothing is loaded yet.
    pub fn new(parts: Parts) -> Self {
        let mut store = parts.store;
        store.set_jitter(parts.rekey.jitter_percent);
        Self {
            store,
            rekeys: Rekeys::new(parts.rekey),
            keeper: Keeper::default(),
            leases: parts.leases,
            ciphers: parts.ciphers,
            plane: parts.plane,
            sa_files: parts.sa_files,
            events: Events::default(),
            health: Health::default(),
            engines: Engines::default(),
            last_reload: None,
            reload_turns: Arc::default(),
            reloads: [0; 2],
            metrics_max_sas: parts.metrics_max_sas,
            kernel: None,
            kernel_plan: parts.kernel,
            config: Config::default(),
            parts: MirrorParts::default(),
            rosters: Rosters::default(),
            loaded: false,
            start_time: seconds_now(),
            started: Instant::now(),
            last_slow: None,
            last_work: u64::MAX,
            lease_failed: false,
            last_lower: None,
            last_sweep: None,
            lowering: false,
            acquires: Vec::new(),
            mirror_state: MirrorReport::default(),
            names: None,
        }
    }

    /// Takes rekeys on by whatever is due now.
    pub(crate) fn rekey(&mut self) {
        let mut before = u64::MAX;
        while self.rekeys.machine.active() > 0 && before != self.store.current().epoch {
            before = self.store.current().epoch;
            let mut hands = Hands {
                store: &mut self.store,
                keeper: &mut self.keeper,
                roster: &mut self.rosters.files,
                events: &mut self.events,
            };
            self.rekeys.step(self.plane.now(), &mut hands);
        }
    }

    /// Attempts to fetch a successor that are to be started now, each to be followed by
    /// [`hook_ended`](Self::hook_ended).
    pub fn take_hook_calls(&mut self) -> Vec<Call> {
        self.rekeys.take_calls()
    }

    /// An attempt is over.
    pub fn hook_ended(&mut self, call: &Call, outcome: &Outcome) {
        let now = self.plane.now();
        self.rekeys.answered(call, outcome, now, &mut self.events);
    }

    /// The program that fetches successors, and how long it may run.
    pub fn hook(&self) -> Option<(PathBuf, Duration)> {
        let config = &self.rekeys.config;
        Some((config.hook.clone()?, config.hook_timeout))
    }

    /// Events, for parts that raise some of their own.
    pub fn events(&mut self) -> &mut Events {
        &mut self.events
    }

    /// Work of every few milliseconds: leases, retirement, and now and then events and time limits.
    pub fn tick(&mut self) {
        let gone = install::reap(
            &mut self.store,
            &mut self.keeper,
            &self.leases,
            &*self.plane,
        );
        for sa in gone {
            self.events.forget(sa);
        }
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
                self.rekeys.attend(entry);
                self.events.collect(entry);
            }
        }
        self.rekey();
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
            self.retire_keys(now);
            // One more look soon: what was asked for may be durable then.
            self.last_work = u64::MAX;
        }
    }

    /// Lets the lease store forget what an IKE daemon's keys that are long gone have counted.
    fn retire_keys(&mut self, now: Instant) {
        if self
            .last_sweep
            .is_none_or(|t| now.duration_since(t) >= SWEEP)
        {
            self.last_sweep = Some(now);
            if let Err(e) = self.leases.sweep(now.duration_since(self.started)) {
                self.lease_trouble(&e);
            }
        }
    }

    /// What workers tell: the audit log of RFC 4301, and SAs whose edge is wanted now.
    fn hear(&mut self) {
        let (plane, keeper) = (Arc::clone(&self.plane), &mut self.keeper);
        let events = &mut self.events;
        let mut wanted = Vec::new();
        let kernel = self.kernel.as_ref();
        let snapshot = self.store.current();
        plane.reports(&mut |report| match report {
            Report::Audit(event) => tracing::warn!("audit: {event}"),
            Report::Edge(sa) => keeper.attend(sa),
            Report::TooBig(error) => {
                error.learn(&snapshot, plane.now());
            }
            Report::Unresolved { port, addr } => {
                if let Some(kernel) = kernel {
                    kernel.resolve(port, addr);
                }
            }
            Report::Acquire(flow) => wanted.push(flow),
            Report::Moved { sa, src, port } => {
                if let Some(entry) = snapshot.sa(sa) {
                    let from = Ipv6Addr::from(src).to_canonical();
                    events.moved(entry, SocketAddr::new(from, port));
                }
            }
        });
        self.acquire(wanted);
    }

    /// Remembers packets that wait for an SA, for whoever can get one.
    fn acquire(&mut self, flows: Vec<Flow>) {
        for flow in flows {
            let name = self.store.tunnels().get(flow.tunnel.0 as usize);
            let name = name.map_or("?", |t| t.name.as_str());
            let text = format!(
                "tunnel {name} has no SA for {} > {} proto {}",
                flow.source(),
                flow.destination(),
                flow.proto
            );
            let daemons = name.starts_with(MIRROR_PREFIX);
            self.events.note("acquire", text);
            // Only a daemon's tunnels have a trap policy in the kernel; from others the packet would leave in clear.
            if daemons && self.acquires.len() < MOST_ACQUIRES {
                self.acquires.push(flow);
            }
        }
    }

    /// Packets that waited for an SA since this was last asked.
    pub(crate) fn take_acquires(&mut self) -> Vec<Flow> {
        std::mem::take(&mut self.acquires)
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

    /// Makes these the routes and own addresses.
    pub(crate) fn adopt(&mut self, fib: &Arc<Fib>, locals: &Arc<Locals>) {
        let mut draft = self.store.draft();
        draft.set_fib(Arc::clone(fib));
        draft.set_locals(Arc::clone(locals));
        self.store.publish(draft);
    }

    /// What the mirror of the kernel's tables is started with; once.
    pub(crate) fn take_kernel_plan(&mut self) -> std::io::Result<Option<kernel::Plan>> {
        let plan = self.kernel_plan.take();
        if let Some(plan) = &plan {
            self.kernel = Some(kernel::Handle::new(&plan.settings)?);
        }
        Ok(plan)
    }

    /// How the mirror of the kernel's tables stands, if there is one.
    pub fn kernel_status(&self) -> Option<kernel::KernelStatus> {
        self.kernel.as_ref().map(kernel::Handle::status)
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
        // A change may have waited for the disk.
        self.rosters.files.claim_no_more(&self.leases)?;
        self.rosters.mirror.claim_no_more(&self.leases)?;
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
            self.rekeys.attend(entry);
            self.events.collect(entry);
            self.events.watch_lease(entry);
        }
        let low = |id| {
            let entry = snapshot.sa(id);
            entry.is_some_and(|e| e.events() & event::LEASE_LOW != 0)
        };
        self.events.settle(Instant::now(), low);
    }

    /// Raises time limits of SAs that carry nothing, which the data path does not look at.
    fn expire(&mut self) {
        let now = self.plane.now();
        for entry in self.store.current().sas.iter().flatten() {
            if now.saturating_sub(entry.live.last_used.value()) <= IDLE {
                continue;
            }
            let time = entry.gauges(now).time;
            if now >= time.soft {
                entry.raise(event::SOFT_TIME);
            }
            if now >= time.hard {
                entry.raise(event::HARD);
            }
        }
    }

    pub(crate) fn lease_trouble(&mut self, e: &LeaseError) {
        if !self.lease_failed {
            self.lease_failed = true;
            tracing::error!(error = %e, "no more sequence numbers can be leased: SAs stop when theirs are used up");
            self.events.note("lease_store_failed", e.to_string());
        }
    }
}

pub(crate) fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
