//! What the session's thread and the workers share: a place for each ring, and counters.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::Epoll;
use nix::sys::eventfd::EventFd;

use super::memory::PeerMemory;
use crate::virtio::ring::{DeviceRing, RingError};

/// A ring that works.
#[derive(Debug)]
pub struct Live {
    /// The ring.
    pub ring: DeviceRing,
    /// What its descriptors point to.
    pub memory: Arc<PeerMemory>,
    /// A packet may lie in several chains.
    pub mergeable: bool,
    /// Notifications were asked for.
    pub armed: bool,
}

/// The place of one ring. The worker takes its lock once a burst, and gives up at once when the session has it.
#[derive(Debug, Default)]
pub struct RingCell {
    live: Mutex<Option<Live>>,
    running: AtomicBool,
    call: AtomicBool,
    failed: Mutex<Option<RingError>>,
}

impl RingCell {
    /// Puts a ring in, or takes it out; returns what was there. Waits for the burst that is under way.
    pub fn put(&self, live: Option<Live>) -> Option<Live> {
        let mut place = self.lock();
        self.running.store(live.is_some(), Relaxed);
        std::mem::replace(&mut place, live)
    }

    /// Whether a ring is there.
    #[inline(always)]
    pub fn running(&self) -> bool {
        self.running.load(Relaxed)
    }

    /// The ring, waiting for its user.
    pub fn lock(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ring, unless somebody has it.
    #[inline(always)]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, Option<Live>>> {
        self.live.try_lock().ok()
    }

    /// Whether the peer is to be called; asked once.
    pub(super) fn take_call(&self) -> bool {
        self.call.load(Relaxed) && self.call.swap(false, Relaxed)
    }

    /// Why the ring stopped; asked once.
    pub(super) fn take_failure(&self) -> Option<RingError> {
        self.failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Rings of one queue pair. Names are the gateway's: what it sends goes to the peer's receive queue.
#[derive(Debug)]
pub struct Pair {
    /// The peer's transmit queue.
    pub rx: RingCell,
    /// The peer's receive queue.
    pub tx: RingCell,
    /// Becomes readable when the peer kicks, or when a ring was put into its place.
    pub(super) wake: Epoll,
    /// Written when a ring was put into its place; in `wake`.
    pub(super) started: EventFd,
}

/// Counters of a port, beside those of its queues.
#[derive(Debug, Default)]
pub struct Counts {
    /// Connections that were made.
    pub connections: AtomicU64,
    /// Connections that the peer's faults ended.
    pub protocol_errors: AtomicU64,
    /// Rings that stopped because the peer broke a rule.
    pub ring_errors: AtomicU64,
    /// Peers that took memory away which we were using.
    pub memory_lost: AtomicU64,
    /// Packets that asked for an offload which was not agreed on.
    pub offload_refused: AtomicU64,
}

/// Shared state of a port.
#[derive(Debug)]
pub struct Shared {
    /// Name of the port.
    pub name: String,
    /// Queue pairs.
    pub pairs: Vec<Pair>,
    /// Wakes the session's thread.
    pub(super) doorbell: EventFd,
    /// Whether a peer is there.
    pub(super) connected: AtomicBool,
    /// The thread is to end.
    pub(super) stop: AtomicBool,
    /// The thread has ended.
    pub(super) ended: AtomicBool,
    /// Counters.
    pub counts: Counts,
}

impl Shared {
    /// Asks the session's thread to call the peer.
    #[cold]
    pub(super) fn call(&self, cell: &RingCell) {
        cell.call.store(true, Relaxed);
        self.ring_doorbell();
    }

    /// Stops the ring in `place` for a fault of the peer.
    #[cold]
    pub(super) fn fail(&self, cell: &RingCell, place: &mut Option<Live>, error: RingError) {
        *place = None;
        cell.running.store(false, Relaxed);
        self.counts.ring_errors.fetch_add(1, Relaxed);
        *cell.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        self.ring_doorbell();
    }

    /// Lets the session's thread see that memory is gone; the ring stops at once.
    #[cold]
    pub(super) fn memory_lost(&self, cell: &RingCell, place: &mut Option<Live>) {
        *place = None;
        cell.running.store(false, Relaxed);
        self.ring_doorbell();
    }

    /// Wakes the session's thread. A full counter wakes it as well.
    pub(super) fn ring_doorbell(&self) {
        let _ = self.doorbell.write(1);
    }
}
