//! All engines as one worker sees them: the CPU, engines that it owns, engines that other workers own.
//!
//! ```text
//!   stage ─▶ waiting ─▶ own engine ─▶ sealed / opened ─▶ finish, judge
//!     │         ▲           │
//!     │         │ ring      └─▶ ring to the worker that asked
//!     └─▶ ring to the engine's owner
//! ```
//!
//! An SA's engine is fixed when it is installed, so packets of one SA take one way and stay in order. Whether there is
//! [room](Bank::has_room) is asked before a packet gets its number: what is staged then finds a place, so that a full engine
//! neither blocks the worker nor leaves holes in the numbers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus};
use rtrb::{Consumer, Producer, RingBuffer};
use sa_store::snapshot::Snapshot;

use super::desk::{Desk, Owner};

/// Most jobs that wait for one engine, and of one other worker in an engine: bounds memory and delay.
pub const WAITING: usize = 1024;
/// How long workers that help are waited for at the end.
const DRAIN: Duration = Duration::from_millis(500);
/// Most jobs taken from another worker in one round.
const FROM_PEER: usize = 128;
/// Jobs of another worker carry its number in the upper bits of their note, which the pipeline leaves alone.
const FOREIGN: u32 = 1 << 31;
const FOREIGN_SHIFT: u32 = 20;

/// What a worker has of one engine.
enum Link {
    Own(Box<Own>),
    Far(Far),
}

/// The engine is this worker's.
struct Own {
    desk: Arc<Desk>,
    owner: Option<Owner>,
    /// Not taken by the engine yet.
    waiting: Vec<EspJob>,
    /// Other workers' jobs that came in this round. They are submitted with the next one's snapshot, which is not older than
    /// the one that they were made with.
    arrived: Vec<EspJob>,
    peers: Vec<Peer>,
    /// Other workers' jobs in the engine and before it.
    foreign: usize,
}

/// Rings to a worker that uses this worker's engine.
struct Peer {
    worker: u32,
    from: Consumer<EspJob>,
    to: Producer<EspJob>,
    /// Did not fit. The rings are as long as what a worker may have out, so this stays empty.
    late: VecDeque<EspJob>,
}

/// The engine is another worker's.
struct Far {
    owner: usize,
    to: Producer<EspJob>,
    from: Consumer<EspJob>,
    staged: Vec<EspJob>,
    /// Jobs at the owner's.
    out: usize,
}

/// One worker's engines.
pub struct Bank {
    cpu: Box<dyn EspEngine>,
    /// Whether the CPU completes everything at once and there is nothing else.
    plain: bool,
    links: Vec<Link>,
    sealed: Vec<EspJob>,
    opened: Vec<EspJob>,
    done: Vec<EspJob>,
}

impl Bank {
    /// The CPU alone.
    pub fn cpu(cpu: Box<dyn EspEngine>) -> Self {
        Self {
            plain: cpu.capabilities().synchronous,
            cpu,
            links: Vec::new(),
            sealed: Vec::new(),
            opened: Vec::new(),
            done: Vec::new(),
        }
    }

    /// Banks for all workers, whose CPUs cipher with `cpus`. Engines get their numbers, from 1, by their place in `desks`.
    pub fn mesh(cpus: Vec<Box<dyn EspEngine>>, desks: &[Arc<Desk>]) -> Vec<Self> {
        let workers = cpus.len();
        let mut banks: Vec<Self> = cpus.into_iter().map(Self::cpu).collect();
        for desk in desks {
            let mut peers = Vec::new();
            let mut fars: Vec<Option<Far>> = (0..workers).map(|_| None).collect();
            for (worker, far) in (0u32..).zip(&mut fars) {
                if worker as usize == desk.worker() {
                    continue;
                }
                let (to, from_peer) = RingBuffer::new(WAITING);
                let (to_peer, from) = RingBuffer::new(WAITING);
                peers.push(Peer {
                    worker,
                    from: from_peer,
                    to: to_peer,
                    late: VecDeque::new(),
                });
                *far = Some(Far {
                    owner: desk.worker(),
                    to,
                    from,
                    staged: Vec::with_capacity(WAITING),
                    out: 0,
                });
            }
            let most = WAITING + peers.len() * FROM_PEER;
            let mut own = Some(Box::new(Own {
                desk: Arc::clone(desk),
                owner: None,
                waiting: Vec::with_capacity(2 * most),
                arrived: Vec::with_capacity(most),
                peers,
                foreign: 0,
            }));
            for (bank, far) in banks.iter_mut().zip(fars) {
                bank.plain = false;
                bank.links.extend(match far {
                    Some(far) => Some(Link::Far(far)),
                    None => own.take().map(Link::Own),
                });
            }
        }
        banks
    }

    /// Ciphers jobs of one direction on the CPU. What is done of it goes to `done`; what is not comes later, by
    /// [`take`](Self::take).
    #[inline]
    pub fn submit(
        &mut self,
        view: &Snapshot,
        kind: JobKind,
        jobs: &mut Vec<EspJob>,
        done: &mut Vec<EspJob>,
    ) {
        if self.plain {
            self.cpu.submit(view, jobs, done);
            return;
        }
        if self.cpu.in_flight() == 0 {
            // All that comes back is of this direction, behind what came before.
            self.take(kind, done);
            self.cpu.submit(view, jobs, done);
            return;
        }
        self.cpu.submit(view, jobs, &mut self.done);
        self.sort();
        self.take(kind, done);
    }

    /// Moves what has come back of one direction to `done`.
    #[inline(always)]
    pub fn take(&mut self, kind: JobKind, done: &mut Vec<EspJob>) {
        if self.plain {
            return;
        }
        match kind {
            JobKind::Seal => done.append(&mut self.sealed),
            JobKind::Open => done.append(&mut self.opened),
        }
    }

    /// Whether engine `number` (from 1) takes another job.
    #[inline]
    pub fn has_room(&self, number: u8) -> bool {
        match self.link(number) {
            Some(Link::Own(own)) => own.waiting.len() < WAITING,
            Some(Link::Far(far)) => far.out + far.staged.len() < WAITING,
            None => false,
        }
    }

    /// Gives a job to engine `number`; the job back when there is no such engine.
    #[inline]
    pub fn stage(&mut self, number: u8, job: EspJob) -> Result<(), EspJob> {
        match usize::from(number)
            .checked_sub(1)
            .and_then(|n| self.links.get_mut(n))
        {
            Some(Link::Own(own)) => own.waiting.push(job),
            Some(Link::Far(far)) => far.staged.push(job),
            None => return Err(job),
        }
        Ok(())
    }

    /// One round of all engines: what was staged goes in, what is done comes out. `wake` is called with the number of a worker
    /// that has got something. Returns how many jobs came back.
    #[inline]
    pub fn turn(&mut self, view: &Snapshot, wake: impl FnMut(usize)) -> usize {
        if self.plain {
            return 0;
        }
        self.turn_all(view, wake)
    }

    #[inline(never)]
    fn turn_all(&mut self, view: &Snapshot, mut wake: impl FnMut(usize)) -> usize {
        let before = self.sealed.len() + self.opened.len();
        self.cpu.poll(&mut self.done);
        for link in &mut self.links {
            match link {
                Link::Own(own) => own.turn(view, &mut self.done, &mut wake),
                Link::Far(far) => far.turn(&mut self.done, &mut wake),
            }
        }
        self.sort();
        self.sealed.len() + self.opened.len() - before
    }

    /// Whether there is nothing but a CPU that completes everything at once.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// Jobs of this worker in engines, before them and behind them: the frames that the ledger counts as inside.
    pub fn in_flight(&self) -> usize {
        let in_links: usize = self.links.iter().map(Link::own_jobs).sum();
        self.cpu.in_flight() + in_links + self.sealed.len() + self.opened.len()
    }

    /// Whether the worker must go on polling: engines do not wake it.
    #[inline(always)]
    pub fn is_busy(&self) -> bool {
        !self.plain && (self.in_flight() != 0 || self.links.iter().any(Link::serves_others))
    }

    /// Ends every job: engines are stopped, and what they held is given to `end`. What an engine does not give back stays in
    /// limbo and is counted by [`in_flight`](Self::in_flight).
    pub fn abandon(&mut self, mut end: impl FnMut(EspJob)) {
        self.cpu.drain(DRAIN, &mut self.done);
        for link in &mut self.links {
            match link {
                Link::Own(own) => own.abandon(&mut self.done),
                Link::Far(far) => far.abandon(&mut self.done),
            }
        }
        for job in self.done.drain(..) {
            end(job);
        }
        for job in self.sealed.drain(..).chain(self.opened.drain(..)) {
            end(job);
        }
    }

    fn link(&self, number: u8) -> Option<&Link> {
        self.links.get(usize::from(number).checked_sub(1)?)
    }

    fn sort(&mut self) {
        for job in self.done.drain(..) {
            match job.kind {
                JobKind::Seal => self.sealed.push(job),
                JobKind::Open => self.opened.push(job),
            }
        }
    }
}

impl Link {
    fn own_jobs(&self) -> usize {
        match self {
            Link::Own(own) => own.inside() - own.foreign.min(own.inside()),
            Link::Far(far) => far.out + far.staged.len(),
        }
    }

    fn serves_others(&self) -> bool {
        match self {
            Link::Own(own) => own.foreign != 0 || own.peers.iter().any(|p| !p.from.is_empty()),
            Link::Far(_) => false,
        }
    }
}

impl Own {
    fn inside(&self) -> usize {
        let engine = self.owner.as_ref().map_or(0, |o| o.engine.in_flight());
        engine + self.waiting.len() + self.arrived.len()
    }

    fn turn(&mut self, view: &Snapshot, done: &mut Vec<EspJob>, wake: &mut impl FnMut(usize)) {
        if self.owner.is_none() {
            self.owner = self.desk.take();
        }
        let Some(owner) = &mut self.owner else {
            return;
        };
        if owner.is_asked() {
            owner.serve();
        }
        self.waiting.append(&mut self.arrived);
        let from = done.len();
        // Also without jobs: engines follow the snapshot by it.
        owner.engine.submit(view, &mut self.waiting, done);
        if self.peers.is_empty() {
            return;
        }
        if self.foreign != 0 {
            self.give_back(from, done, wake);
        }
        if self.waiting.len() >= WAITING {
            return;
        }
        for peer in &mut self.peers {
            let n = peer.from.slots().min(FROM_PEER);
            if n == 0 {
                continue;
            }
            if let Ok(chunk) = peer.from.read_chunk(n) {
                self.foreign += n;
                let mark = FOREIGN | peer.worker << FOREIGN_SHIFT;
                self.arrived.extend(chunk.into_iter().map(|mut job| {
                    job.note |= mark;
                    job
                }));
            }
        }
    }

    /// Takes other workers' jobs out of `done`, from place `from`, and sends them home.
    fn give_back(&mut self, from: usize, done: &mut Vec<EspJob>, wake: &mut impl FnMut(usize)) {
        for mut job in done.extract_if(from.., |job| job.note & FOREIGN != 0) {
            let worker = (job.note & !FOREIGN) >> FOREIGN_SHIFT;
            job.note &= (1 << FOREIGN_SHIFT) - 1;
            self.foreign -= 1;
            if let Some(peer) = self.peers.iter_mut().find(|p| p.worker == worker) {
                peer.late.push_back(job);
            }
        }
        for peer in &mut self.peers {
            let had = peer.late.len();
            while let Some(job) = peer.late.pop_front() {
                if let Err(rtrb::PushError::Full(job)) = peer.to.push(job) {
                    peer.late.push_front(job);
                    break;
                }
            }
            if had != peer.late.len() {
                wake(peer.worker as usize);
            }
        }
    }

    fn abandon(&mut self, done: &mut Vec<EspJob>) {
        if self.owner.is_none() {
            self.owner = self.desk.take();
        }
        done.append(&mut self.waiting);
        done.append(&mut self.arrived);
        for peer in &mut self.peers {
            done.extend(peer.late.drain(..));
            while let Ok(job) = peer.from.pop() {
                done.push(job);
            }
        }
        self.foreign = 0;
        if let Some(owner) = &mut self.owner
            && owner.engine.in_flight() != 0
            && let Err(error) = owner.engine.reset(done)
        {
            tracing::error!(engine = self.desk.name(), %error, "its frames stay away");
        }
        for job in done {
            job.status = JobStatus::Failed;
        }
    }
}

impl Far {
    fn turn(&mut self, done: &mut Vec<EspJob>, wake: &mut impl FnMut(usize)) {
        let n = self.from.slots();
        if n != 0
            && let Ok(chunk) = self.from.read_chunk(n)
        {
            done.extend(chunk);
            self.out -= n;
        }
        if self.staged.is_empty() {
            return;
        }
        // The ring is as long as what may be out.
        let n = self.staged.len().min(self.to.slots());
        if let Ok(chunk) = self.to.write_chunk_uninit(n) {
            self.out += chunk.fill_from_iter(self.staged.drain(..n));
            wake(self.owner);
        }
    }

    fn abandon(&mut self, done: &mut Vec<EspJob>) {
        done.append(&mut self.staged);
        while let Ok(job) = self.from.pop() {
            self.out = self.out.saturating_sub(1);
            done.push(job);
        }
    }
}
