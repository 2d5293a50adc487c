//! Epochs that workers acknowledge, so that control knows when an old snapshot is out of use.
//!
//! A worker acknowledges epoch `e` once it holds nothing from before `e`. A parked worker holds nothing at
//! all. The order that matters: a waking worker leaves the parked state *before* it loads the snapshot;
//! control publishes *before* it looks at the workers. With a sequentially consistent fence on both sides,
//! either control sees the worker awake, or the worker sees the new snapshot.

use crate::sync::{AtomicU64, Ordering, fence};

/// Value of a parked worker.
const PARKED: u64 = u64::MAX;

#[repr(align(128))]
#[derive(Debug)]
struct Slot(AtomicU64);

/// Acknowledged epochs, one per worker.
#[derive(Debug)]
pub struct Quiesce {
    slots: Box<[Slot]>,
}

impl Quiesce {
    /// All workers start parked.
    pub fn new(workers: usize) -> Self {
        Self {
            slots: (0..workers).map(|_| Slot(AtomicU64::new(PARKED))).collect(),
        }
    }

    /// Worker: about to load a snapshot after having been parked. Epochs start at 1, so 0 holds back everything.
    pub fn unpark(&self, worker: usize) {
        self.slots[worker].0.store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Worker: everything older than `epoch` is out of its hands.
    #[inline]
    pub fn acknowledge(&self, worker: usize, epoch: u64) {
        self.slots[worker].0.store(epoch, Ordering::Release);
    }

    /// Worker: holds no snapshot until [`unpark`](Self::unpark).
    pub fn park(&self, worker: usize) {
        self.slots[worker].0.store(PARKED, Ordering::Release);
    }

    /// Control, after publishing: the oldest epoch that some worker may still use; `u64::MAX` when all are parked.
    pub fn oldest_in_use(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.slots
            .iter()
            .map(|s| s.0.load(Ordering::Acquire))
            .min()
            .unwrap_or(PARKED)
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Whatever the interleaving, once control believes that epoch 1 is out of use, no worker uses it.
    #[test]
    fn a_snapshot_declared_free_is_not_in_use() {
        loom::model(|| {
            let quiesce = Arc::new(Quiesce::new(1));
            let current = Arc::new(AtomicU64::new(1));
            let freed = Arc::new(AtomicU64::new(0));
            let worker = {
                let (quiesce, current, freed) = (quiesce.clone(), current.clone(), freed.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        quiesce.unpark(0);
                        let epoch = current.load(Ordering::Acquire);
                        quiesce.acknowledge(0, epoch);
                        // Use of the snapshot: it must not have been freed.
                        assert!(freed.load(Ordering::Acquire) < epoch);
                        quiesce.park(0);
                    }
                })
            };
            current.store(2, Ordering::Release);
            if quiesce.oldest_in_use() > 1 {
                freed.store(1, Ordering::Release);
            }
            worker.join().unwrap();
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_awake_worker_decides() {
        let q = Quiesce::new(3);
        assert_eq!(q.oldest_in_use(), u64::MAX);
        q.acknowledge(0, 5);
        q.acknowledge(2, 7);
        assert_eq!(q.oldest_in_use(), 5);
        q.unpark(1);
        assert_eq!(q.oldest_in_use(), 0);
        q.park(1);
        q.acknowledge(0, 8);
        assert_eq!(q.oldest_in_use(), 7);
    }
}
