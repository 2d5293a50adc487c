//! The side of the worker that owns the SAs.

use std::collections::VecDeque;
use std::sync::Arc;

use arrayvec::ArrayVec;
use pmd::BURST;
use pmd::engine::{Capabilities, EngineStats, EspEngine, EspJob, Refusal};
use rtrb::{Consumer, Producer, PushError, RingBuffer};
use sa_store::ledger::WorkerCounters;
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

use super::gauge::{Gauge, Pressure};
use super::helper::{Left, Post};
use super::lane::{Lane, Slot};
use super::piece::{LEAST, Parcel, Piece, least_bytes, length_for};
use crate::engine::SoftwareEngine;
use crate::worker::Waker;

/// Jobs of one owner that a helper has at once, and one piece more: enough for it to be busy until the owner comes round again.
const DEPTH: usize = BURST;
/// Pieces that may be: each has a job at least, most have [`LEAST`].
const PIECES: usize = DEPTH / LEAST + 1;
/// Pieces that wait at the owner for a helper. Beyond, the owner ciphers the oldest.
const BACKLOG: usize = 2;
/// SAs at once.
const LANES: usize = 8;
/// Pieces made at start beside those that helpers hold.
const SPARE: usize = 96;
/// Pieces that there may be. More than at start are made when the system takes a helper's CPU away for long and everything
/// behind what it holds has to wait: the packets of some ten milliseconds, so that they need not be dropped.
const MOST_PIECES: usize = 4096;

/// The owner's ends of the rings to and from one helper.
pub(super) struct Desk {
    helper: usize,
    tasks: Producer<Parcel>,
    back: Consumer<Parcel>,
    left: Arc<Left>,
    /// Pieces on both rings and in the helper's hands.
    pieces: usize,
    /// Jobs in them.
    away: usize,
    /// Something was put down since the helper was last woken.
    called: bool,
    ended: bool,
}

impl Desk {
    /// A desk, and its other side.
    pub(super) fn with_post(helper: usize) -> (Self, Post) {
        let (tasks, from_owner) = RingBuffer::new(PIECES);
        let (to_owner, back) = RingBuffer::new(PIECES);
        let left = Arc::<Left>::default();
        let post = Post::new(from_owner, to_owner, Arc::clone(&left));
        let desk = Self {
            helper,
            tasks,
            back,
            left,
            pieces: 0,
            away: 0,
            called: false,
            ended: false,
        };
        (desk, post)
    }
}

/// A worker's engine: its own CPU, and that of others while it needs them. Before it is dropped it is to be
/// [drained](EspEngine::drain), for what it holds are the caller's frames.
pub struct ParallelEngine {
    capabilities: Capabilities,
    own: usize,
    local: SoftwareEngine,
    desks: Vec<Desk>,
    wakers: Arc<[Waker]>,
    pressure: Arc<[Pressure]>,
    gauge: Gauge,
    lanes: Vec<Lane>,
    /// Pieces that wait for a helper: lane and place, oldest first.
    waiting: VecDeque<(usize, u64)>,
    stock: Vec<Parcel>,
    /// Pieces that may still be made.
    pub(super) unmade: usize,
    /// Jobs of a burst that stay on the CPU without a lane.
    rest: Vec<EspJob>,
    /// Jobs of a burst that are not taken.
    refused: Vec<EspJob>,
    in_flight: usize,
    counters: Arc<WorkerCounters>,
    stats: Arc<EngineStats>,
}

impl ParallelEngine {
    pub(super) fn new(
        own: usize,
        desks: Vec<Desk>,
        wakers: Arc<[Waker]>,
        pressure: Arc<[Pressure]>,
        counters: Arc<WorkerCounters>,
    ) -> Self {
        let local = SoftwareEngine::default();
        let pieces = match desks.len() {
            0 => 0,
            helpers => helpers * PIECES + SPARE,
        };
        Self {
            capabilities: Capabilities {
                name: "parallel",
                synchronous: desks.is_empty(),
                in_flight: MOST_PIECES * LEAST,
                ..local.capabilities().clone()
            },
            own,
            local,
            desks,
            wakers,
            pressure,
            gauge: Gauge::default(),
            lanes: (0..LANES).map(|_| Lane::with_capacity(pieces)).collect(),
            waiting: VecDeque::with_capacity(pieces),
            stock: (0..pieces).map(|_| Piece::spare()).collect(),
            unmade: MOST_PIECES.saturating_sub(pieces),
            rest: Vec::with_capacity(4 * BURST),
            refused: Vec::with_capacity(4 * BURST),
            in_flight: 0,
            counters,
            stats: Arc::default(),
        }
    }

    /// Takes back what helpers have finished, and everything from those that have ended.
    fn collect(&mut self) {
        let Self {
            desks,
            lanes,
            counters,
            stats,
            ..
        } = self;
        for desk in desks {
            let mut home = |desk: &mut Desk, parcel: Parcel| {
                desk.pieces = desk.pieces.saturating_sub(1);
                desk.away = desk.away.saturating_sub(parcel.jobs.len());
                stats.completed.add(parcel.jobs.len() as u64);
                counters.parallel.returned.add(parcel.jobs.len() as u64);
                let (lane, order) = (parcel.lane, parcel.order);
                if let Some(lane) = lanes.get_mut(lane) {
                    lane.replace(order, Slot::Ready(parcel));
                }
            };
            if desk.pieces == 0 {
                continue;
            }
            while let Ok(parcel) = desk.back.pop() {
                home(desk, parcel);
            }
            if let Some(mut tasks) = desk.left.take() {
                desk.ended = true;
                // What it finished last came back before it left the others.
                while let Ok(parcel) = desk.back.pop() {
                    home(desk, parcel);
                }
                while let Ok(mut parcel) = tasks.pop() {
                    parcel.cipher();
                    home(desk, parcel);
                }
            }
        }
    }

    /// Gives what is next in order to `done`.
    fn release(&mut self, done: &mut Vec<EspJob>) {
        if self.in_flight == 0 {
            return;
        }
        for lane in &mut self.lanes {
            if lane.sa().is_none() {
                continue;
            }
            while let Some(mut parcel) = lane.pop_ready() {
                let jobs = parcel.unload(done);
                self.in_flight = self.in_flight.saturating_sub(jobs);
                self.stock.push(parcel);
            }
            if lane.is_held_up() {
                self.counters.parallel.held_up.add(1);
            }
            lane.end();
        }
        self.counters.parallel.waiting.set(self.in_flight as u64);
    }

    /// Gives waiting pieces to helpers that have room.
    fn feed(&mut self) {
        let Self {
            desks,
            waiting,
            lanes,
            pressure,
            counters,
            stats,
            ..
        } = self;
        while let Some(&(lane, order)) = waiting.front() {
            let free = |desk: &&mut Desk| {
                desk.away < DEPTH
                    && desk.pieces < PIECES
                    && !desk.ended
                    && !pressure.get(desk.helper).is_some_and(Pressure::is_on)
            };
            let Some(desk) = desks.iter_mut().filter(free).min_by_key(|desk| desk.away) else {
                return;
            };
            waiting.pop_front();
            let Some(lane) = lanes.get_mut(lane) else {
                continue;
            };
            let Some(Slot::Waiting(parcel)) = lane.replace(order, Slot::Away) else {
                continue;
            };
            let jobs = parcel.jobs.len();
            let bytes = parcel.jobs.iter().map(bytes_of).sum::<usize>() as u64;
            match desk.tasks.push(parcel) {
                Ok(()) => {
                    desk.pieces += 1;
                    desk.away += jobs;
                    desk.called = true;
                    stats.submitted.add(jobs as u64);
                    counters.parallel.given.add(jobs as u64);
                    stats.bytes.add(bytes);
                    stats.doorbells.add(1);
                }
                Err(PushError::Full(mut parcel)) => {
                    parcel.cipher();
                    lane.replace(order, Slot::Ready(parcel));
                }
            }
        }
    }

    /// Ciphers the oldest piece that waits.
    fn help_out(&mut self) {
        let Some((lane, order)) = self.waiting.pop_front() else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(lane) else {
            return;
        };
        if let Some(Slot::Waiting(mut parcel)) = lane.replace(order, Slot::Away) {
            parcel.cipher();
            self.counters.parallel.kept.add(parcel.jobs.len() as u64);
            lane.replace(order, Slot::Ready(parcel));
        }
    }

    /// Wakes helpers that sleep on something new.
    fn call(&mut self) {
        for desk in &mut self.desks {
            if std::mem::take(&mut desk.called)
                && let Some(waker) = self.wakers.get(desk.helper)
            {
                waker.wake();
            }
        }
    }

    /// Opens lanes for SAs of the burst that are worth it.
    fn open_lanes(&mut self, view: &Snapshot, jobs: &[EspJob]) {
        let mut tallies = ArrayVec::<(SaId, usize, usize), LANES>::new();
        let mut last = 0;
        for job in jobs {
            if tallies.get(last).is_none_or(|t| t.0 != job.sa) {
                last = match tallies.iter().position(|t| t.0 == job.sa) {
                    Some(at) => at,
                    None if tallies.is_full() => continue,
                    None => {
                        tallies.push((job.sa, 0, 0));
                        tallies.len() - 1
                    }
                };
            }
            if let Some(tally) = tallies.get_mut(last) {
                tally.1 += 1;
                tally.2 += bytes_of(job);
            }
        }
        for (sa, count, bytes) in tallies {
            if self.lanes.iter().any(|lane| lane.sa() == Some(sa)) {
                continue;
            }
            let Some(entry) = view.sa(sa) else { continue };
            let length = length_for(entry.spec.suite);
            if count >= length
                && bytes >= count * least_bytes(entry.spec.suite)
                && let Some(lane) = self.lanes.iter_mut().find(|lane| lane.sa().is_none())
            {
                lane.begin(entry, length);
            }
        }
    }

    /// Adds a job to its SA's piece; back when there is no piece left.
    fn add(&mut self, at: usize, job: EspJob) -> Result<(), EspJob> {
        let Some(lane) = self.lanes.get_mut(at) else {
            return Err(job);
        };
        let parcel = match &mut lane.open {
            Some(parcel) => parcel,
            none => match self.stock.pop() {
                Some(parcel) => none.insert(parcel),
                None if self.unmade != 0 => {
                    self.unmade -= 1;
                    none.insert(Piece::spare())
                }
                None => return Err(job),
            },
        };
        parcel.jobs.push(job);
        if parcel.jobs.len() >= lane.length {
            self.close(at);
        }
        Ok(())
    }

    /// The piece that is being filled goes on its way.
    fn close(&mut self, at: usize) {
        let Some(lane) = self.lanes.get_mut(at) else {
            return;
        };
        let (Some(mut parcel), Some(entry)) = (lane.open.take(), lane.entry()) else {
            return;
        };
        let jobs = parcel.jobs.len();
        self.in_flight += jobs;
        parcel.entry = Some(Arc::clone(entry));
        parcel.lane = at;
        parcel.order = lane.next();
        let order = lane.push(parcel);
        self.waiting.push_back((at, order));
        self.feed();
        while self.waiting.len() > BACKLOG {
            // Whoever sleeps should be up while this worker is busy.
            self.call();
            self.help_out();
            self.collect();
            self.feed();
        }
    }

    /// Cuts a burst into pieces and the rest.
    fn cut(&mut self, jobs: &mut Vec<EspJob>) {
        let mut cached: Option<(SaId, Option<usize>)> = None;
        let mut burst = std::mem::take(jobs);
        for job in burst.drain(..) {
            let lane = match cached {
                Some((sa, lane)) if sa == job.sa => lane,
                _ => self.lanes.iter().position(|l| l.sa() == Some(job.sa)),
            };
            cached = Some((job.sa, lane));
            match lane {
                None => self.rest.push(job),
                Some(at) => {
                    if let Err(job) = self.add(at, job) {
                        self.refused.push(job);
                    }
                }
            }
        }
        // The caller's vector keeps its memory.
        *jobs = burst;
        for at in 0..self.lanes.len() {
            self.close(at);
        }
    }
}

impl EspEngine for ParallelEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        self.local.install(sa)
    }

    fn remove(&mut self, sa: SaId) {
        self.local.remove(sa);
    }

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        let Some(kind) = jobs.first().map(|job| job.kind) else {
            return;
        };
        self.gauge.burst(kind, jobs.len());
        if let Some(own) = self.pressure.get(self.own) {
            own.declare(self.gauge.is_pressed());
        }
        let wants_help = self.gauge.is_hot(kind) && !self.desks.is_empty();
        if !wants_help && self.in_flight == 0 {
            self.local.submit(view, jobs, done);
            return;
        }
        self.collect();
        self.release(done);
        if wants_help {
            self.open_lanes(view, jobs);
        }
        self.cut(jobs);
        self.call();
        if !self.rest.is_empty() {
            let mut rest = std::mem::take(&mut self.rest);
            self.local.submit(view, &mut rest, done);
            self.rest = rest;
        }
        self.collect();
        self.feed();
        self.call();
        self.release(done);
        if !self.refused.is_empty() {
            self.stats.busy.add(self.refused.len() as u64);
            self.counters
                .parallel
                .refused
                .add(self.refused.len() as u64);
            jobs.append(&mut self.refused);
        }
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        let idle = self.gauge.round(self.in_flight != 0);
        if let Some(own) = self.pressure.get(self.own) {
            own.declare(self.gauge.is_pressed());
        }
        if self.in_flight == 0 {
            return;
        }
        self.collect();
        if idle {
            // Nothing better to do.
            self.help_out();
        }
        self.feed();
        self.call();
        self.release(done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Counts the jobs that other workers ciphered: `submitted`, `completed`, `bytes`; a doorbell is a piece.
    fn stats(&self) -> Option<&Arc<EngineStats>> {
        Some(&self.stats)
    }
}

impl std::fmt::Debug for ParallelEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParallelEngine")
            .field("worker", &self.own)
            .field("helpers", &self.desks.len())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

#[inline(always)]
fn bytes_of(job: &EspJob) -> usize {
    usize::from(job.esp_end.saturating_sub(job.esp_off))
}
