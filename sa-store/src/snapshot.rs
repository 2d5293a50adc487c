//! What workers read: one immutable view of SAs, policies and routes.

use std::sync::Arc;

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::chunked::Chunked;
use crate::fib::Fib;
use crate::local::Locals;
use crate::quiesce::Quiesce;
use crate::runtime::{SaEntry, TunnelIdx};
use crate::sa::SaId;
use crate::sad::Sad;
use crate::spd::Spd;

/// Value of [`TunnelSlot::out`] for a tunnel without an outbound SA.
pub const NO_SA: u32 = u32::MAX;

/// A tunnel as the data path sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelSlot {
    /// Slot of the SA that sends now, or [`NO_SA`]. A rekey changes only this.
    pub out: u32,
}

/// One published state. Parts that did not change are shared with the state before.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Number of this state, from 1.
    pub epoch: u64,
    /// Inbound SAs by SPI.
    pub sad: Sad,
    /// All SAs by slot.
    pub sas: Chunked<Option<Arc<SaEntry>>>,
    /// Tunnels by index.
    pub tunnels: Chunked<TunnelSlot>,
    /// Outbound SAs that send dummy packets.
    pub dummies: Arc<Vec<SaId>>,
    /// Policies for traffic from the clear side.
    pub spd_out: Arc<Spd>,
    /// Policies for traffic that arrives, protected or clear.
    pub spd_in: Arc<Spd>,
    /// Routes.
    pub fib: Arc<Fib>,
    /// The gateway's own addresses.
    pub locals: Arc<Locals>,
}

impl Snapshot {
    /// The SA in a slot, if it is still the same one.
    #[inline]
    pub fn sa(&self, id: SaId) -> Option<&Arc<SaEntry>> {
        self.sas.at(id.index).as_ref().filter(|e| e.fixed.id == id)
    }

    /// The SA in a slot, whatever its generation.
    #[inline]
    pub fn sa_at(&self, index: u32) -> Option<&Arc<SaEntry>> {
        self.sas.at(index).as_ref()
    }

    /// The SA on which a tunnel sends now.
    #[inline]
    pub fn outbound(&self, tunnel: TunnelIdx) -> Option<&Arc<SaEntry>> {
        self.sa_at(self.tunnels.at(tunnel.0).out)
    }
}

/// The place where control publishes and workers look.
#[derive(Debug)]
pub struct Shared {
    pub(crate) current: Arc<ArcSwap<Snapshot>>,
    pub(crate) quiesce: Quiesce,
}

impl Shared {
    /// The current snapshot, for readers that are not workers (metrics, API). Costs an atomic increment.
    pub fn latest(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.quiesce.workers()
    }
}

/// A worker's way to the current snapshot: one load a burst.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    worker: usize,
    cache: Option<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    acknowledged: u64,
}

impl Reader {
    /// The reader of worker number `worker`. Parked until the first [`load`](Self::load).
    pub fn new(shared: Arc<Shared>, worker: usize) -> Self {
        assert!(
            worker < shared.workers(),
            "worker {worker} of {}",
            shared.workers()
        );
        Self {
            shared,
            worker,
            cache: None,
            acknowledged: 0,
        }
    }

    /// The current snapshot. By calling it again the worker says that it holds nothing of an older one.
    #[inline]
    pub fn load(&mut self) -> &Arc<Snapshot> {
        if self.cache.is_none() {
            self.shared.quiesce.unpark(self.worker);
            self.cache = Some(Cache::new(Arc::clone(&self.shared.current)));
            self.acknowledged = 0;
        }
        let Some(cache) = &mut self.cache else {
            unreachable!("set above")
        };
        let snapshot = cache.load();
        if snapshot.epoch != self.acknowledged {
            self.acknowledged = snapshot.epoch;
            self.shared.quiesce.acknowledge(self.worker, snapshot.epoch);
        }
        snapshot
    }

    /// Gives up the snapshot before sleeping, so that control need not wait.
    pub fn park(&mut self) {
        // Control keeps every snapshot that this worker has not acknowledged: this never frees one.
        self.cache = None;
        self.shared.quiesce.park(self.worker);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.park();
    }
}
