//! Counters with one writer, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter that exactly one thread adds to. Adding is a plain load and store, no locked instruction.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call this; a second writer loses counts but nothing worse.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Current value; any thread.
    #[inline(always)]
    pub fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Replaces the value; owning thread, or before publication.
    pub fn set(&self, v: u64) {
        self.0.store(v, Relaxed);
    }
}
