//! The secure offload engine (SOE) of Airoha's EN7581: ESP in packet mode.
//!
//! The engine has no rings of its own. A request is an Ethernet frame for port 7 of the packet switch, sent through a QDMA
//! ring with a hop descriptor in front; the result comes back on some receive ring, in another buffer. The engine frames,
//! pads, numbers, makes IVs and checks replays itself; SAs live in slots, written through a staging window.
//!
//! ```text
//!   submit ─▶ waiting ─▶ [hop | dummy Ethernet | IP] ─▶ QDMA ─▶ engine ─▶ QDMA ─▶ [dummy Ethernet | IP] ─▶ match ─▶ done
//!             per SA      at most 4 per SA                                            per SA, in order
//! ```
//!
//! Known from public drivers only; what they do not show is in [`Assumptions`]. Requests of one SA come back in order, and
//! some results are lost: see `flow`. An SA whose numbers lived in the engine is never continued elsewhere: after
//! [`EspEngine::reset`] it is gone, and its tunnel needs a rekey.

mod assumptions;
mod demand;
mod first;
mod flow;
mod install;
mod queue;
mod record;
mod slots;
mod window;

pub mod fuzz;
pub(crate) mod rig;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::counters::Counter;
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

pub use assumptions::Assumptions;

use crate::device::{DeviceError, Mmio};
use crate::engine::{Capabilities, EngineDead, EngineStats, EspEngine, EspJob, JobStatus, Refusal};
use crate::qdma::QdmaError;
use crate::qdma::hub::{EngineTicket, ForEngine, SharedHub};
use demand::Demand;
use flow::{Meta, Request};
use slots::Slots;
use window::Window;

/// Time between two looks for lost results.
const SWEEP: u64 = 100_000_000;
/// A loss rate is judged over this time,
const JUDGED_OVER: u64 = 1_000_000_000;
/// and over at least this many requests.
const JUDGED_FROM: u64 = 100;
/// Longest [`SoeConfig::patience`].
pub const MOST_PATIENCE: Duration = Duration::from_nanos(slots::REST);
/// The name in logs and metrics.
pub const NAME: &str = "soe";

/// How the engine is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoeConfig {
    /// QDMA instance that requests go through.
    pub instance: u8,
    /// Jobs per SA that may wait for a place in the engine.
    pub waiting: usize,
    /// A result that has not come by then is lost. At most [`MOST_PATIENCE`], as slots rest only so long.
    pub patience: Duration,
    /// Lost requests in 10 000 above which the engine is not trusted any more.
    pub most_lost: u64,
    /// How what is unknown is read.
    pub assume: Assumptions,
}

impl Default for SoeConfig {
    fn default() -> Self {
        Self {
            instance: 0,
            waiting: 128,
            patience: Duration::from_secs(1),
            most_lost: 100,
            assume: Assumptions::default(),
        }
    }
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum SoeError {
    /// The registers do not answer as they should.
    #[error("secure offload engine: {0}")]
    Device(#[from] DeviceError),
    /// The rings do not start or stop.
    #[error("secure offload engine: {0}")]
    Qdma(#[from] QdmaError),
    /// Another engine has the hub.
    #[error("the rings serve another engine already")]
    Taken,
}

/// What happened. Written by the engine's owner.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct SoeCounters {
    /// Requests given to the engine.
    pub requests: Counter,
    /// Results given on.
    pub results: Counter,
    /// Results given on, by the receive ring that they came on.
    pub rings: [Counter; 32],
    /// Bytes of IP packets submitted.
    pub bytes: Counter,
    /// Requests whose result never came.
    pub lost: Counter,
    /// Requests that the ring dropped.
    pub dropped: Counter,
    /// Results that belong to no request.
    pub orphans: Counter,
    /// Results that came before: with a number that was seen already, or of an inbound packet that was answered.
    pub repeated: Counter,
    /// Inbound packets that nobody submitted.
    pub strange: Counter,
    /// Results that say "error", by hop flags 5, 6 and 7.
    pub errors: [Counter; 3],
    /// Results of the other direction than their SA's.
    pub wrong_direction: Counter,
    /// Results that are not what the SA makes: addresses, SPI, lengths.
    pub malformed: Counter,
    /// Requests that failed because driver and engine counted differently.
    pub miscounted: Counter,
    /// Packets that the engine cannot take: fragments, IP options, too long.
    pub refused: Counter,
    /// Jobs kept from the engine by an SA's hard limit.
    pub limited: Counter,
    /// Commits of SAs that failed.
    pub commit_failures: Counter,
}

impl SoeCounters {
    /// As all engines count.
    fn show(&self, stats: &EngineStats) {
        let errors: u64 = self.errors.iter().map(Counter::value).sum();
        let (lost, dropped) = (self.lost.value(), self.dropped.value());
        let ended = self.results.value() + errors + self.miscounted.value();
        stats.submitted.set(self.requests.value());
        stats.completed.set(ended);
        stats.bytes.set(self.bytes.value());
        stats.malformed.set(self.refused.value());
        stats.lost.set(lost + dropped);
        let odd = self.orphans.value() + self.wrong_direction.value() + self.malformed.value();
        let again = self.repeated.value() + self.strange.value();
        stats.wrong.set(odd + again);
    }
}

/// Whether the engine can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Good,
    /// It lost more than it may: so many requests in 10 000 over the last second.
    Lossy(u64),
    /// It returned something that cannot be right.
    Wrong(&'static str),
    /// It does not answer any more.
    Dead(&'static str),
}

/// Where the engine's time comes from: tests and fuzzers move it by hand.
#[derive(Debug, Clone)]
enum Clock {
    Real(Instant),
    Manual(Arc<std::sync::atomic::AtomicU64>),
}

impl Clock {
    fn now(&self) -> u64 {
        match self {
            Clock::Real(begin) => u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Clock::Manual(t) => t.load(std::sync::atomic::Ordering::Relaxed),
        }
    }
}

/// The engine, owned by one worker.
pub struct SoeEngine {
    capabilities: Capabilities,
    config: SoeConfig,
    window: Window,
    hub: SharedHub,
    ticket: EngineTicket,
    slots: Slots,
    demand: Demand,
    clock: Clock,
    health: Health,
    inbox: VecDeque<ForEngine>,
    /// Requests without a result, whose jobs go back when a frame can be had for them.
    ended: VecDeque<(Meta, JobStatus)>,
    lost: Vec<Request>,
    refused: Vec<EspJob>,
    /// Empty, kept for its memory.
    kept: Vec<EspJob>,
    /// Number of the next request.
    next_id: u64,
    in_flight: usize,
    swept: u64,
    judged: Judged,
    counters: Arc<SoeCounters>,
    stats: Arc<EngineStats>,
}

/// Counts at the beginning of the second that is judged.
#[derive(Debug, Default)]
struct Judged {
    since: u64,
    ended: u64,
    lost: u64,
}

impl Judged {
    fn from(counters: &SoeCounters, since: u64) -> Judged {
        let lost = counters.lost.value();
        Judged {
            since,
            ended: lost + counters.results.value(),
            lost,
        }
    }
}

impl SoeEngine {
    /// Takes the engine behind `regs` and the hub's rings, which must be started after this. Whatever SAs an earlier owner
    /// left are invalidated.
    ///
    /// # Errors
    /// See [`SoeError`].
    pub fn new(regs: Mmio, hub: SharedHub, config: SoeConfig) -> Result<SoeEngine, SoeError> {
        Self::with_clock(regs, hub, config, Clock::Real(Instant::now()))
    }

    fn with_clock(
        regs: Mmio,
        hub: SharedHub,
        mut config: SoeConfig,
        clock: Clock,
    ) -> Result<SoeEngine, SoeError> {
        config.assume = config.assume.bounded();
        config.patience = config.patience.min(MOST_PATIENCE);
        let window = Window::new(regs, config.assume.scrub_staging)?;
        // First: another engine's SAs are not ours to invalidate.
        let ticket = hub.lock().attach_engine().ok_or(SoeError::Taken)?;
        if let Err(error) = window.start(config.assume.slots) {
            hub.lock().detach_engine(ticket);
            return Err(error.into());
        }
        for (name, value) in config.assume.table() {
            tracing::info!(engine = NAME, name, value, "assumed, not known");
        }
        let slots = config.assume.slots;
        Ok(SoeEngine {
            capabilities: capabilities(&config),
            window,
            hub,
            ticket,
            slots: Slots::new(slots),
            demand: Demand::default(),
            clock,
            health: Health::Good,
            inbox: VecDeque::new(),
            ended: VecDeque::new(),
            lost: Vec::new(),
            refused: Vec::new(),
            kept: Vec::new(),
            next_id: 0,
            in_flight: 0,
            swept: 0,
            judged: Judged::default(),
            counters: Arc::default(),
            stats: Arc::default(),
            config,
        })
    }

    /// Counters, to keep and read from anywhere.
    pub fn counters(&self) -> &Arc<SoeCounters> {
        &self.counters
    }

    /// Whether the engine can be trusted. Once it is not, it takes nothing until [`EspEngine::reset`].
    pub fn health(&self) -> Health {
        self.health
    }

    /// Slots that carry an SA.
    pub fn used_slots(&self) -> usize {
        self.slots.used()
    }

    /// Stops engine and rings, gives every job in flight back as failed, and begins anew without SAs. Frames come home with
    /// the rings; when these do not stop, they stay in limbo.
    fn restart(&mut self, done: &mut Vec<EspJob>) -> Result<(), SoeError> {
        self.health = Health::Dead("reset");
        self.abandon_all(done);
        let shared = self.hub.clone();
        let mut hub = shared.lock();
        self.window.stop()?;
        hub.stop()?;
        self.window.start(self.config.assume.slots)?;
        hub.start()?;
        self.give_back(&mut hub, done);
        self.slots = Slots::new(self.config.assume.slots);
        self.demand.forget_slots();
        // What happened before is no evidence any more.
        self.judged = Judged::from(&self.counters, self.clock.now());
        self.health = Health::Good;
        self.stats.resets.add(1);
        Ok(())
    }

    fn distrust(&mut self, health: Health) {
        if self.health == Health::Good {
            tracing::error!(engine = NAME, ?health, "not trusted any more");
            self.health = health;
        }
    }
}

impl EspEngine for SoeEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        self.install_sa(sa)
    }

    fn remove(&mut self, sa: SaId) {
        self.remove_sa(sa);
    }

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        let now = self.clock.now();
        self.demand.observe(view, now);
        self.accept(jobs, done);
        self.turn(now, done);
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        let now = self.clock.now();
        self.turn(now, done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn is_present(&self) -> bool {
        self.window.is_present()
    }

    fn is_healthy(&self) -> bool {
        self.health == Health::Good
    }

    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.restart(done).map_err(|error| EngineDead {
            engine: NAME,
            reason: error.to_string(),
        })
    }

    fn reached(&self, sa: SaId) -> Option<u64> {
        self.slots.reached(sa)
    }

    fn stats(&self) -> Option<&Arc<EngineStats>> {
        Some(&self.stats)
    }
}

fn capabilities(config: &SoeConfig) -> Capabilities {
    let assume = &config.assume;
    let (slots, window) = (usize::from(assume.slots), usize::from(assume.in_flight));
    Capabilities {
        name: NAME,
        in_flight: slots * (config.waiting + window),
        synchronous: false,
        crypto: Vec::new(),
        packet: record::suites(assume),
        outer_headers: true,
        renumbers: false,
        esn: false,
        nat_t: true,
        window: 256,
        slots,
        longest: usize::from(record::LARGEST),
        alignment: 1,
        address_bits: 32,
        run: if assume.batch { slots * window } else { 1 },
    }
}

impl Drop for SoeEngine {
    fn drop(&mut self) {
        if let Err(error) = self.window.stop() {
            tracing::warn!(engine = NAME, %error, "does not stop");
        }
        let hub = self.hub.clone();
        let mut hub = hub.lock();
        let mut left = Vec::new();
        self.slots.take_waiting(&mut left);
        left.append(&mut self.refused);
        left.into_iter().for_each(|j| hub.put(j.frame));
        for item in self.inbox.drain(..) {
            if let ForEngine::Result(r) = item {
                hub.put(r.frame);
            }
        }
        hub.detach_engine(self.ticket);
    }
}
