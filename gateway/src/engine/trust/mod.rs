//! An engine that is trusted on proof.
//!
//! [`Trusted`] is an [`EspEngine`] around a driver's, used by the worker that owns the engine's queue:
//!
//! ```text
//!                         ┌ tickets, deadlines ┐                  ┌ header, IV, number, lengths, order
//!   submit ─▶ who carries │ samples: software  │─▶ driver ─▶ poll │ samples
//!              the SA? ─┐ └ canaries           ┘                  └ canaries ─▶ done
//!                       └─▶ CPU, while the engine is out of service ──────────▶ done
//! ```
//!
//! - **Known answers** of every suite and mode when it is made, and after each reset ([`KnownAnswerError`]).
//! - **Canaries** while it runs; **samples** of the traffic ciphered again by software.
//! - **Every result** is held against what was given. An outbound IV of a counter mode and an outbound number are above all
//!   before them, whatever the engine says, or the packet does not leave.
//! - A wrong answer takes the engine out of service at once, lost ones by their rate.
//!
//! **Quarantine.** The engine goes in its box to a thread that resets it, so the worker never waits. Everything in flight
//! comes back failed once the reset is proven. Meanwhile SAs of crypto mode, and inbound ones of packet mode, are opened and
//! sealed by the CPU, in order. Outbound SAs of packet mode wait (their packets fail) if the engine
//! [`renumbers`](Capabilities::renumbers); if not they are stopped for good, with the event `engine_lost`. After known answers
//! and a pause that grows with each failure the engine is back in service.
//!
//! **For the caller.** [`Trusted::new`] is called before the worker is pinned; it blocks for the known answers, and so must
//! have the engine's rings running. Then:
//!
//! ```text
//! Trusted::new(engine: Box<dyn EspEngine>, config: TrustConfig, pool: Pool, ciphers: Arc<dyn CipherFactory>,
//!              clock: TrustClock) -> std::io::Result<Trusted>
//! trusted.watch() -> EngineWatch          // for reports; any thread
//! trusted.install(&entry), remove(id)     // by the owner
//! trusted.submit(view, jobs, done)        // every round, also with no jobs: it follows the snapshot
//! trusted.poll(done)
//! ```

mod canary;
mod config;
mod judge;
mod known;
mod outer;
mod packets;
mod quarantine;
mod recovery;
mod results;
mod sample;
mod sas;
mod state;
#[cfg(test)]
mod tests;
mod ticket;

use std::sync::Arc;
use std::time::Duration;

use pmd::Pool;
use pmd::engine::{
    Capabilities, EngineDead, EngineStats, EspEngine, EspJob, JobKind, JobStatus, Refusal,
};
use sa_store::cipher::{CipherFactory, SaCipher};
use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, OffloadMode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;

use super::SoftwareEngine;
use canary::Canaries;
use config::nanos;
pub use config::{TrustClock, TrustConfig};
pub use known::KnownAnswerError;
use quarantine::{Losses, Service};
pub use recovery::Reopen;
use recovery::{Bench, Workshop};
use sample::{Draw, Samples};
use sas::{Carried, Carrier, Sas};
use state::Drivers;
pub use state::{EngineState, EngineWatch, Reason, TrustStats};
use ticket::{NO_SAMPLE, Ticket, Tickets};

/// See the module text.
pub struct Trusted {
    config: TrustConfig,
    caps: Capabilities,
    service: Service,
    workshop: Workshop,
    pool: Pool,
    ciphers: Arc<dyn CipherFactory>,
    clock: TrustClock,
    software: SoftwareEngine,
    sas: Sas,
    /// Removed while the engine was away: to be removed there when it is back.
    gone: Vec<SaId>,
    tickets: Tickets,
    samples: Samples,
    draw_out: Draw,
    draw_in: Draw,
    canaries: Canaries,
    losses: Losses,
    /// A reason to take the engine out of service, as soon as the call at hand has collected its results.
    suspect: Option<Reason>,
    trust: Arc<TrustStats>,
    drivers: Drivers,
    stats: Option<Arc<EngineStats>>,
    /// A snapshot without SAs, for canaries when there is nothing else to send.
    empty: Arc<Snapshot>,
    /// Empty between calls, kept for their memory.
    staged: Vec<EspJob>,
    raw: Vec<EspJob>,
    soft: Vec<EspJob>,
    kept: Vec<EspJob>,
}

impl Trusted {
    /// Asks the engine the known answers; one that fails them begins in quarantine. `pool` is of the arena that the engine
    /// works on; canaries take spare frames from it. `ciphers` makes contexts that open what the engine sealed.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(
        engine: Box<dyn EspEngine>,
        config: TrustConfig,
        pool: Pool,
        ciphers: Arc<dyn CipherFactory>,
        clock: TrustClock,
    ) -> std::io::Result<Trusted> {
        Self::with_reopen(engine, config, pool, ciphers, clock, None)
    }

    /// As [`new`](Self::new), for an engine that `reopen` can open anew when it does not come back from a reset.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn with_reopen(
        mut engine: Box<dyn EspEngine>,
        config: TrustConfig,
        pool: Pool,
        ciphers: Arc<dyn CipherFactory>,
        clock: TrustClock,
        reopen: Option<Reopen>,
    ) -> std::io::Result<Trusted> {
        let mut caps = engine.capabilities().clone();
        let pairs = match config.canaries {
            Duration::ZERO => 0,
            _ => canary::pairs(&caps),
        };
        // Known answers need one at a time.
        caps.slots = caps.slots.saturating_sub((2 * pairs).max(1));
        let stats = engine.stats().cloned();
        let drivers = Drivers::default();
        drivers.add(stats.as_ref());
        let now = clock.now();
        let bench = |first| Bench {
            pool: Pool::new(pool.arena(), 8),
            first,
            patience: config.patience,
            generation: 0,
        };
        let first = config.first_private;
        let workshop = Workshop::open(&config.name, bench(first), reopen)?;
        let mut left = Vec::new();
        let proven = recovery::prove(&mut *engine, &mut left, &mut bench(first));
        left.into_iter().for_each(|j| j.frame.give_back());
        let seed = now ^ u64::from(std::process::id()) << 32;
        let places = config.sample_places.max(1);
        let mut trusted = Trusted {
            service: Service::new(engine),
            workshop,
            ciphers,
            software: SoftwareEngine::default(),
            sas: Sas::default(),
            gone: Vec::new(),
            tickets: Tickets::new(),
            samples: Samples::new(places),
            draw_out: Draw::new(config.sample_out, seed),
            draw_in: Draw::new(config.sample_in, !seed),
            canaries: Canaries::new(first + 2, pairs, nanos(config.canaries), now),
            losses: Losses::new(now),
            suspect: None,
            trust: Arc::default(),
            drivers,
            stats,
            empty: Store::new(1, 1).current(),
            staged: Vec::new(),
            raw: Vec::new(),
            soft: Vec::new(),
            kept: Vec::new(),
            pool,
            clock,
            caps,
            config,
        };
        match proven {
            Ok(()) => {
                tracing::info!(engine = %trusted.config.name, kind = trusted.caps.name, "known answers are right: in service");
            }
            Err(why) => {
                tracing::error!(engine = %trusted.config.name, kind = trusted.caps.name, %why, "known answers");
                trusted.quarantine(Reason::KnownAnswer, now);
            }
        }
        Ok(trusted)
    }

    /// For reports.
    pub fn watch(&self) -> EngineWatch {
        EngineWatch {
            name: self.config.name.clone(),
            kind: self.caps.name,
            trust: Arc::clone(&self.trust),
            drivers: self.drivers.clone(),
        }
    }

    /// The state now.
    pub fn state(&self) -> EngineState {
        self.trust.state()
    }

    /// Sorts jobs by who carries them: those for the engine get a ticket, and their answer is worked out if they are drawn. What the engine has no room for stays in `kept`, and what is behind it.
    fn sort(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, now: u64, done: &mut Vec<EspJob>) {
        let serving = self.service.is_serving();
        let bare = self.caps.outer_headers;
        if self.tickets.all() == 0 {
            self.losses.progress(now);
        }
        let mut room = self.caps.in_flight.saturating_sub(self.tickets.all());
        let mut full = false;
        for mut job in jobs.drain(..) {
            let Some(sa) = self.sas.find(job.sa) else {
                job.status = JobStatus::SaGone;
                done.push(job);
                continue;
            };
            if job.mode != sa.mode
                || (job.kind == JobKind::Seal) != (sa.direction == Direction::Out)
            {
                job.status = JobStatus::Failed;
                done.push(job);
                continue;
            }
            match sa.carrier {
                Carrier::Nobody => {
                    self.trust.refused.add(1);
                    job.status = JobStatus::LimitReached;
                    done.push(job);
                }
                // Its numbers are the engine's: they wait for it.
                Carrier::Engine | Carrier::Waiting
                    if (!serving || sa.carrier == Carrier::Waiting)
                        && sa.is_numbered_elsewhere() =>
                {
                    self.trust.refused.add(1);
                    job.status = JobStatus::Failed;
                    done.push(job);
                }
                Carrier::Engine if serving => {
                    let draw = match job.kind {
                        JobKind::Seal => &mut self.draw_out,
                        JobKind::Open => &mut self.draw_in,
                    };
                    let blocked = draw.is_all() && self.samples.is_full();
                    // Once one job of an SA stays, those behind it stay too.
                    full |= room == 0 || blocked;
                    if full || !sa.has_room() {
                        self.kept.push(job);
                        continue;
                    }
                    room -= 1;
                    let mut ticket = Ticket::of(&job, now);
                    judge::note(&mut ticket, &job, sa, bare);
                    ticket.nth = sa.departed();
                    if !draw.is_due() {
                        draw.pass();
                    } else if !self.samples.is_full() {
                        draw.taken();
                        let sample = view.sa(job.sa).map(|sa| self.samples.take(&job, sa, bare));
                        ticket.sample = sample.flatten().unwrap_or(NO_SAMPLE);
                    }
                    job.tag = self.tickets.issue(ticket);
                    self.staged.push(job);
                }
                Carrier::Engine | Carrier::Waiting | Carrier::Cpu => {
                    if job.mode == OffloadMode::Packet {
                        job.mode = OffloadMode::Software;
                    }
                    self.soft.push(job);
                }
            }
        }
    }

    /// Gives the driver what is staged. What it does not take goes back as it came, before what was kept.
    fn give(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>) {
        let Some(engine) = self.service.engine() else {
            return;
        };
        if self.staged.is_empty() {
            engine.poll(&mut self.raw);
            return;
        }
        engine.submit(view, &mut self.staged, &mut self.raw);
        for mut job in self.staged.drain(..).rev() {
            let Some(ticket) = self.tickets.undo(job.tag) else {
                // A driver that makes up jobs.
                self.suspect.get_or_insert(Reason::Stranger);
                self.pool.put(job.frame);
                continue;
            };
            self.samples.drop(ticket.sample);
            self.sas.left(ticket.sa);
            ticket.restore(&mut job);
            jobs.push(job);
        }
        jobs.reverse();
    }

    /// What the CPU carries.
    fn soften(&mut self, view: &Snapshot, done: &mut Vec<EspJob>) {
        if self.soft.is_empty() {
            return;
        }
        self.trust.fallback.add(self.soft.len() as u64);
        let from = done.len();
        self.software.submit(view, &mut self.soft, done);
        for job in done.iter().skip(from) {
            if job.kind == JobKind::Seal
                && job.status == JobStatus::Done
                && let Some(sa) = self.sas.find(job.sa)
            {
                judge::used(sa, job);
            }
        }
    }

    /// Sends canaries when they are due.
    fn sing(&mut self, view: Option<&Snapshot>, now: u64) {
        if !self.canaries.is_due(now) {
            return;
        }
        // With a snapshot at hand rather than without.
        if view.is_none() && self.canaries.late(now) < nanos(self.config.canaries) {
            return;
        }
        if self.caps.in_flight.saturating_sub(self.tickets.all()) < 2 {
            return;
        }
        let Some(engine) = self.service.engine() else {
            return;
        };
        let kinds = self.sas.kinds();
        let flock = self
            .canaries
            .fly(now, kinds, &mut *engine, &self.caps, &mut self.pool);
        if flock.is_empty() {
            return;
        }
        let mut jobs = Vec::with_capacity(flock.len());
        if self.tickets.all() == 0 {
            self.losses.progress(now);
        }
        for (mut job, flown) in flock {
            let mut ticket = Ticket::of(&job, now);
            ticket.canary = Some(flown);
            job.tag = self.tickets.issue(ticket);
            jobs.push(job);
        }
        let sent = jobs.len();
        engine.submit(view.unwrap_or(&self.empty), &mut jobs, &mut self.raw);
        self.trust
            .canaries
            .add((sent - jobs.len().min(sent)) as u64);
        for job in jobs {
            if let Some(flown) = self.tickets.undo(job.tag).and_then(|t| t.canary) {
                self.canaries.stay(flown, now);
            }
            self.pool.put(job.frame);
        }
    }

    /// The end of every call: canaries, results, deadlines, health, and what follows from them.
    fn conclude(&mut self, view: Option<&Snapshot>, now: u64, done: &mut Vec<EspJob>) {
        if self.service.is_serving() {
            self.sing(view, now);
            self.collect(now, done);
            self.watch_time(now);
        }
        if let Some(reason) = self.suspect.take()
            && self.service.is_serving()
        {
            self.quarantine(reason, now);
        }
    }

    /// A context that opens what the engine seals, when only it knows the IVs.
    fn opener(&self, sa: &SaEntry) -> Option<Box<dyn SaCipher>> {
        let spec = &sa.spec;
        let numbered = spec.offload == OffloadMode::Packet && spec.direction == Direction::Out;
        if !numbered || self.config.sample_out == 0 {
            return None;
        }
        let made = self
            .ciphers
            .make(spec.suite, &spec.keys, spec.esn, Direction::In);
        made.inspect_err(
            |error| tracing::warn!(sa = %spec.name, %error, "its packets cannot be sampled"),
        )
        .ok()
    }
}

impl EspEngine for Trusted {
    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// While the engine is out of service, SAs of crypto mode are taken nevertheless: the CPU carries them until it is back.
    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        let spec = &sa.spec;
        let refuse = |reason: &str| Refusal::Unsupported {
            engine: self.caps.name,
            sa: spec.name.clone(),
            reason: reason.into(),
        };
        if sa.fixed.id.index >= self.config.first_private {
            return Err(refuse("its index is one of the engine's own"));
        }
        if self.service.is_serving() {
            if let Some(engine) = self.service.engine() {
                engine.install(sa)?;
            }
            self.admit(sa, Carrier::Engine);
            return Ok(());
        }
        if spec.offload == OffloadMode::Crypto
            && self.caps.crypto.contains(&spec.suite)
            && (self.caps.esn || !spec.esn)
            && self.state() != EngineState::Dead
        {
            self.admit(sa, Carrier::Waiting);
            return Ok(());
        }
        Err(refuse("it is out of service"))
    }

    fn remove(&mut self, sa: SaId) {
        if !self.sas.remove(sa) {
            return;
        }
        let dead = self.state() == EngineState::Dead;
        match self.service.engine() {
            Some(engine) => engine.remove(sa),
            // Nobody will ever ask a dead one for its places.
            None if dead => {}
            None => self.gone.push(sa),
        }
    }

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        let now = self.clock.now();
        self.attend(now, done);
        self.follow(view);
        if !jobs.is_empty() {
            self.sort(view, jobs, now, done);
        }
        self.give(view, jobs);
        jobs.append(&mut self.kept);
        self.collect(now, done);
        self.soften(view, done);
        self.conclude(Some(view), now, done);
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        let now = self.clock.now();
        self.attend(now, done);
        if let Some(engine) = self.service.engine() {
            engine.poll(&mut self.raw);
        }
        self.conclude(None, now, done);
    }

    /// Canaries are not counted.
    fn in_flight(&self) -> usize {
        self.tickets.jobs()
    }

    /// Whether the engine itself serves. Jobs are taken in any case.
    fn is_healthy(&self) -> bool {
        self.service.is_serving()
    }

    /// Takes the engine out of service, and waits for the end of the first attempt to bring it back. Blocks.
    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.reset_now(done)
    }

    fn reached(&self, sa: SaId) -> Option<u64> {
        self.service.peek()?.reached(sa)
    }

    fn stats(&self) -> Option<&Arc<EngineStats>> {
        self.stats.as_ref()
    }
}

impl Trusted {
    fn admit(&mut self, sa: &SaEntry, carrier: Carrier) {
        if self.sas.find(sa.fixed.id).is_some() {
            // What is known of its numbers stays.
            return;
        }
        let opener = self.opener(sa);
        let carried = Carried::new(sa, carrier, opener);
        if let Some(before) = self.sas.insert(carried)
            && before != sa.fixed.id
        {
            match self.service.engine() {
                Some(engine) => engine.remove(before),
                None => self.gone.push(before),
            }
        }
    }
}
