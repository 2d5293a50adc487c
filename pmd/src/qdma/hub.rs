//! The rings of one Ethernet block, shared by its ports and the secure offload engine.
//!
//! Which receive ring a result of the engine arrives on is not the driver's choice, so whoever polls finds both frames of
//! the ports and results. The hub tells them apart and keeps each until its owner comes. All users of a hub belong to one
//! worker, so its lock, taken once a burst, is free. The one exception is an engine in quarantine, which another thread
//! resets together with the rings: ports find the lock taken then, and leave it at that until their next turn.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::{Events, Qdma, QdmaCounters, QdmaError, Received, Sent, TxMsg};
use crate::arena::Arena;
use crate::frame::Frame;
use crate::pool::Pool;

/// Most results and reports that wait for the engine, and frames that wait for one port.
const WAITING: usize = 4096;
/// Frames taken from one ring in one call.
const BURST: usize = 64;
/// Cookies at and above this are the engine's, those below are ports'.
pub(crate) const ENGINE_COOKIE: u64 = 1 << 63;

/// Bytes of the Ethernet header in front of packets to and from the engine.
pub const DUMMY_HEADER: usize = 14;
/// The addresses in it, by which results are recognised; the type follows the packet's IP version.
const DUMMY_ADDRESSES: [u8; 12] = [
    0x00, 0x0c, 0xe7, 0x20, 0x21, 0x12, 0x00, 0x0c, 0xe7, 0x20, 0x22, 0x62,
];

/// The header for an IPv4 or IPv6 packet.
pub(crate) fn dummy_header(ipv6: bool) -> [u8; DUMMY_HEADER] {
    let mut h = [0; DUMMY_HEADER];
    h[..12].copy_from_slice(&DUMMY_ADDRESSES);
    h[12..].copy_from_slice(if ipv6 { &[0x86, 0xdd] } else { &[0x08, 0x00] });
    h
}

/// Whether the frame begins with the header of a result. Hop flags alone are not safe: other frames carry them too.
fn has_dummy_header(data: &[u8]) -> bool {
    data.get(..12) == Some(&DUMMY_ADDRESSES[..])
        && matches!(data.get(12..14), Some([0x08, 0x00] | [0x86, 0xdd]))
}

/// Something for the engine.
#[derive(Debug)]
pub(crate) enum ForEngine {
    /// A request left memory, or was dropped on the way.
    Sent(Sent),
    /// A result, or the loss of one.
    Result(Received),
}

/// Which engine has the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EngineTicket(u64);

/// A port's frames.
#[derive(Debug)]
struct Inbox {
    instance: u8,
    /// First and last number of its ports.
    sources: (u8, u8),
    frames: VecDeque<Frame>,
    lost: u64,
}

/// See the module text.
pub struct Hub {
    qdmas: Vec<Qdma>,
    pool: Pool,
    engine: VecDeque<ForEngine>,
    /// Whose the results in `engine` are, if anybody asks for them.
    owner: Option<EngineTicket>,
    /// Engines so far.
    tickets: u64,
    ports: Vec<Inbox>,
    /// Frames that nobody wanted.
    strays: u64,
    tx_errors: Vec<(u64, u64)>,
    cookies: u64,
}

impl Inbox {
    fn has(&self, source: u8) -> bool {
        (self.sources.0..=self.sources.1).contains(&source)
    }
}

/// A hub, as its users hold it.
#[derive(Clone)]
pub struct SharedHub(Arc<Mutex<Hub>>);

impl SharedHub {
    /// Counters of each instance.
    pub fn counters(&self) -> Vec<Arc<QdmaCounters>> {
        self.lock().counters()
    }

    /// Waits for a user on another thread. Not for ports at work: see [`SharedHub::try_lock`].
    pub(crate) fn lock(&self) -> MutexGuard<'_, Hub> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while the engine is being reset by another thread.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Hub>> {
        match self.0.try_lock() {
            Ok(hub) => Some(hub),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Hub {
    /// A hub over initialised instances. Receive buffers are of `arena`.
    pub fn new(qdmas: Vec<Qdma>, arena: &Arc<Arena>) -> Hub {
        Hub {
            qdmas,
            pool: Pool::new(arena, 256),
            engine: VecDeque::new(),
            owner: None,
            tickets: 0,
            ports: Vec::new(),
            strays: 0,
            tx_errors: Vec::new(),
            cookies: 0,
        }
    }

    /// Makes it shareable.
    pub fn share(self) -> SharedHub {
        SharedHub(Arc::new(Mutex::new(self)))
    }

    /// Starts all instances.
    ///
    /// # Errors
    /// The first that does not start.
    pub fn start(&mut self) -> Result<(), QdmaError> {
        self.qdmas
            .iter_mut()
            .try_for_each(|q| q.start(&mut self.pool))
    }

    /// Stops all instances and takes the frames of their rings back.
    ///
    /// # Errors
    /// The first that does not stop; the others are stopped nevertheless.
    pub fn stop(&mut self) -> Result<(), QdmaError> {
        let mut first = Ok(());
        for q in &mut self.qdmas {
            let done = q.stop(&mut self.pool);
            if first.is_ok() {
                first = done;
            }
        }
        self.clear();
        first
    }

    pub(crate) fn counters(&self) -> Vec<Arc<QdmaCounters>> {
        let counters = self.qdmas.iter().map(|q| Arc::clone(q.counters()));
        counters.collect()
    }

    /// Frames that were neither results of the engine nor for a port that is open.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Interrupt status of all instances together; `None` when one is gone.
    pub fn events(&mut self) -> Option<Events> {
        let mut all = Events::default();
        for q in &mut self.qdmas {
            let e = q.events()?;
            all.tx_broken |= e.tx_broken;
            all.rx_broken |= e.rx_broken;
            all.rx_starved |= e.rx_starved;
            all.reports_full |= e.reports_full;
            all.forward_low |= e.forward_low;
        }
        Some(all)
    }

    /// Moves what has arrived to where it is waited for. Transmit reports come before results: a request that never left
    /// must be known when the next result is matched.
    pub(crate) fn pump(&mut self) -> usize {
        let Hub {
            qdmas,
            pool,
            engine,
            owner,
            ports,
            strays,
            tx_errors,
            ..
        } = self;
        let mut found = 0;
        for q in qdmas {
            let instance = q.instance();
            q.reap(pool, &mut |sent| {
                if sent.cookie & ENGINE_COOKIE != 0 {
                    if owner.is_some() && engine.len() < WAITING {
                        engine.push_back(ForEngine::Sent(sent));
                    }
                } else if sent.dropped {
                    match tx_errors.iter_mut().find(|(c, _)| *c == sent.cookie) {
                        Some((_, n)) => *n += 1,
                        None => tx_errors.push((sent.cookie, 1)),
                    }
                }
            });
            found += q.poll(pool, BURST, &mut |pool, r| {
                let flagged = (3..=7).contains(&r.msg.hop_flags());
                // The content of a lost frame cannot be asked; the engine matches it by its user field.
                let result = flagged && (r.fault.is_some() || has_dummy_header(r.frame.data()));
                if result && owner.is_some() && engine.len() < WAITING {
                    engine.push_back(ForEngine::Result(r));
                    return;
                }
                let inbox = ports
                    .iter_mut()
                    .find(|p| p.instance == instance && p.has(r.msg.source_port()));
                match inbox {
                    Some(p) if !result && r.fault.is_none() && p.frames.len() < WAITING => {
                        p.frames.push_back(r.frame);
                    }
                    Some(p) if !result => {
                        p.lost += 1;
                        pool.put(r.frame);
                    }
                    _ => {
                        *strays += 1;
                        pool.put(r.frame);
                    }
                }
            });
        }
        found
    }

    /// From now on results are kept for [`Hub::take_engine`]. `None` when there is an engine already.
    pub(crate) fn attach_engine(&mut self) -> Option<EngineTicket> {
        if self.owner.is_some() {
            return None;
        }
        self.tickets += 1;
        self.owner = Some(EngineTicket(self.tickets));
        self.owner
    }

    /// Results are strays from now on. Of an engine whose successor has the hub already: nothing.
    pub(crate) fn detach_engine(&mut self, ticket: EngineTicket) {
        if self.owner == Some(ticket) {
            self.owner = None;
            self.drop_results();
        }
    }

    /// Goes on with the rings of a device that was opened anew, for the same ports. The engine of the old device has lost the
    /// hub. Frames in rings that do not stop stay away.
    ///
    /// # Errors
    /// The new instances are not those of the old device.
    pub(crate) fn exchange(&mut self, qdmas: Vec<Qdma>) -> Result<(), QdmaError> {
        let same = qdmas
            .iter()
            .map(Qdma::instance)
            .eq(self.qdmas.iter().map(Qdma::instance));
        if !same {
            return Err(QdmaError::Absent("instances of the device before"));
        }
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "rings of a device that is gone");
        }
        for (old, mut new) in self.qdmas.iter_mut().zip(qdmas) {
            new.count_on(old.counters());
            *old = new;
        }
        self.owner = None;
        Ok(())
    }

    /// Whether all instances run.
    pub(crate) fn is_running(&self) -> bool {
        self.qdmas.iter().all(Qdma::is_running)
    }

    /// What arrived for the engine, oldest first, in exchange for an empty list.
    pub(crate) fn take_engine(&mut self, into: &mut VecDeque<ForEngine>) {
        std::mem::swap(&mut self.engine, into);
    }

    /// Keeps frames of these source ports, first to last, for [`Hub::take_port`]. False when somebody has one of them.
    pub(crate) fn attach_port(&mut self, instance: u8, sources: (u8, u8)) -> bool {
        let meets = |p: &Inbox| {
            p.instance == instance && p.sources.0 <= sources.1 && sources.0 <= p.sources.1
        };
        if self.ports.iter().any(meets) {
            return false;
        }
        self.ports.push(Inbox {
            instance,
            sources,
            frames: VecDeque::new(),
            lost: 0,
        });
        true
    }

    /// Moves up to `max` frames of a port to `out`; returns how many, and how many were lost since the last call.
    pub(crate) fn take_port(
        &mut self,
        instance: u8,
        sources: (u8, u8),
        out: &mut Vec<Frame>,
        max: usize,
    ) -> (usize, u64) {
        let is = |p: &&mut Inbox| p.instance == instance && p.sources == sources;
        let Some(inbox) = self.ports.iter_mut().find(is) else {
            return (0, 0);
        };
        let n = inbox.frames.len().min(max);
        out.extend(inbox.frames.drain(..n));
        (n, std::mem::take(&mut inbox.lost))
    }

    /// The port is closed; its frames go home.
    pub(crate) fn detach_port(&mut self, instance: u8, sources: (u8, u8)) {
        let pool = &mut self.pool;
        self.ports.retain_mut(|p| {
            let keep = p.instance != instance || p.sources != sources;
            if !keep {
                p.frames.drain(..).for_each(|f| pool.put(f));
            }
            keep
        });
    }

    /// A cookie for a port's frames.
    pub(crate) fn new_cookie(&mut self) -> u64 {
        self.cookies += 1;
        self.cookies
    }

    /// The arena of the receive buffers.
    pub(crate) fn arena_id(&self) -> u32 {
        self.pool.arena().id()
    }

    /// Frames with this cookie that the device dropped since the last call.
    pub(crate) fn take_tx_errors(&mut self, cookie: u64) -> u64 {
        let entry = self.tx_errors.iter_mut().find(|(c, _)| *c == cookie);
        entry.map_or(0, |(_, n)| std::mem::take(n))
    }

    /// Free descriptors of a transmit ring of an instance.
    pub(crate) fn room(&self, instance: u8, ring: u8) -> u32 {
        let q = self.qdmas.iter().find(|q| q.instance() == instance);
        q.map_or(0, |q| q.room(ring))
    }

    /// As [`Qdma::send`], on the instance.
    pub(crate) fn send(
        &mut self,
        instance: u8,
        ring: u8,
        frame: Frame,
        msg: TxMsg,
        cookie: u64,
    ) -> Result<(), Frame> {
        match self.qdmas.iter_mut().find(|q| q.instance() == instance) {
            Some(q) => q.send(ring, frame, msg, cookie),
            None => Err(frame),
        }
    }

    /// One doorbell for each ring with new frames.
    pub(crate) fn kick(&mut self) {
        self.qdmas.iter_mut().for_each(Qdma::kick);
    }

    /// An empty frame, for the news of a loss.
    pub(crate) fn spare(&mut self) -> Option<Frame> {
        self.pool.get()
    }

    /// Takes a frame home.
    pub(crate) fn put(&mut self, frame: Frame) {
        self.pool.put(frame);
    }

    fn drop_results(&mut self) {
        for item in self.engine.drain(..) {
            if let ForEngine::Result(r) = item {
                self.pool.put(r.frame);
            }
        }
    }

    fn clear(&mut self) {
        self.drop_results();
        for p in &mut self.ports {
            p.lost += p.frames.len() as u64;
            p.frames.drain(..).for_each(|f| self.pool.put(f));
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "QDMA keeps its frames");
        }
    }
}
