//! A worker's private stock of free frames.
//!
//! A pool exchanges frames with its arena's depot in bulk, under one lock taken once per [`Pool::new`]'s `cache` frames; a
//! single get or put touches only the pool's own memory. The frame put last is got first: it is the warmest in the caches.
//!
//! **When frames run out.** Receive starves last: [`Pool::get`] and [`Pool::get_bulk`] (which receive queues use) may take
//! the last frame. Copies (fragments, ICMP errors, captured or injected packets) use [`Pool::get_spare`], which refuses once
//! fewer than `cache` frames are free, so a storm of copies cannot stop a port. Both kinds of refusal are counted
//! ([`PoolStats`]); a receive queue that gets too few frames leaves packets with the port and counts `rx_dropped` when
//! that loses some.
//!
//! **How many frames.** Enough that every place where a frame may rest can be full at once:
//!
//! ```text
//! frames >= Σ over ports and queues (rx ring + tx ring) + Σ over engines (in flight)
//!         + workers × (2 × cache + 4 × BURST + hand-over rings) + reassembly and hold buffers
//! ```

use std::sync::Arc;

use sa_store::counters::Counter;

use crate::arena::Arena;
use crate::frame::Frame;

/// A pool's counters; written by the pool's owner, read by anybody.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PoolStats {
    /// Frames in the pool now (a level, not a total).
    pub cached: Counter,
    /// Frames that receive asked for and did not get.
    pub starved_rx: Counter,
    /// Frames that a copy asked for and did not get.
    pub starved_copies: Counter,
}

/// A worker's stock of free frames; see the module text.
#[derive(Debug)]
pub struct Pool {
    arena: Arc<Arena>,
    /// Indexes of frames that this pool owns.
    free: Vec<u32>,
    cache: usize,
    stats: Arc<PoolStats>,
}

impl Pool {
    /// An empty pool that exchanges `cache` frames at a time with the arena (at least 1) and keeps at most twice that.
    pub fn new(arena: &Arc<Arena>, cache: usize) -> Pool {
        let cache = cache.max(1);
        let stats = Arc::new(PoolStats::default());
        arena.register_pool(&stats);
        Pool {
            arena: Arc::clone(arena),
            free: Vec::with_capacity(2 * cache),
            cache,
            stats,
        }
    }

    /// The arena that the frames come from.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// One empty frame with the default head-room; `None` when neither the pool nor the arena has one.
    #[inline]
    pub fn get(&mut self) -> Option<Frame> {
        if self.free.is_empty() && self.refill() == 0 {
            self.stats.starved_rx.add(1);
            return None;
        }
        let index = self.free.pop()?;
        self.note_level();
        // SAFETY: the index was this pool's and is so no longer: the new handle is the frame's only owner.
        Some(unsafe { self.arena.frame_at_index(index) })
    }

    /// One empty frame for a copy: `None` while fewer than `cache` frames are free, which are kept for receive.
    #[inline]
    pub fn get_spare(&mut self) -> Option<Frame> {
        if self.available() <= self.cache {
            self.stats.starved_copies.add(1);
            return None;
        }
        self.get()
    }

    /// Appends up to `n` empty frames to `out`; returns how many.
    #[inline]
    pub fn get_bulk(&mut self, out: &mut Vec<Frame>, n: usize) -> usize {
        out.reserve(n.min(self.arena.frames() as usize));
        let mut left = n;
        loop {
            let k = left.min(self.free.len());
            let arena = &self.arena;
            let taken = self.free.drain(self.free.len() - k..).rev();
            // SAFETY: the index was this pool's and is so no longer: the new handle is the frame's only owner.
            out.extend(taken.map(|index| unsafe { arena.frame_at_index(index) }));
            left -= k;
            if left == 0 || self.refill() == 0 {
                break;
            }
        }
        self.note_level();
        if left > 0 {
            self.stats.starved_rx.add(left as u64);
        }
        n - left
    }

    /// Takes a frame back. A frame of another arena goes to its own depot (slow, but nothing is lost).
    #[inline]
    pub fn put(&mut self, frame: Frame) {
        if !self.arena.owns(&frame) {
            frame.give_back();
            return;
        }
        self.free.push(frame.into_index());
        if self.free.len() >= 2 * self.cache {
            self.spill();
        }
        self.note_level();
    }

    /// Takes all frames of `frames` back, as [`Pool::put`].
    #[inline]
    pub fn put_bulk(&mut self, frames: &mut Vec<Frame>) {
        if !frames.iter().all(|f| self.arena.owns(f)) {
            frames.drain(..).for_each(|f| self.put(f));
            return;
        }
        while !frames.is_empty() {
            // Below twice the cache there is room for one at least.
            let k = frames.len().min(2 * self.cache - self.free.len());
            let put = frames.drain(frames.len() - k..);
            self.free.extend(put.map(Frame::into_index));
            if self.free.len() >= 2 * self.cache {
                self.spill();
            }
        }
        self.note_level();
    }

    /// Frames that could be got now: the pool's own and the depot's.
    #[inline]
    pub fn available(&self) -> usize {
        self.free.len() + self.arena.depot_level() as usize
    }

    /// The pool's counters, to keep.
    pub fn stats(&self) -> &Arc<PoolStats> {
        &self.stats
    }

    #[inline(always)]
    fn note_level(&self) {
        self.stats.cached.set(self.free.len() as u64);
    }

    #[cold]
    fn refill(&mut self) -> usize {
        self.arena.take(&mut self.free, self.cache)
    }

    /// Gives the coldest `cache` frames to the depot.
    #[cold]
    fn spill(&mut self) {
        self.arena.give(self.free.drain(..self.cache));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.arena.give(self.free.drain(..));
        self.stats.cached.set(0);
        self.arena.unregister_pool(&self.stats);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;
    use proptest::prelude::*;

    fn arena(frames: u32) -> Arc<Arena> {
        Arena::new(ArenaConfig {
            frames,
            stride: 256,
            headroom: 128,
            ..ArenaConfig::default()
        })
        .unwrap()
    }

    #[test]
    fn receive_may_take_the_last_frame_and_copies_may_not() {
        let arena = arena(10);
        let mut pool = Pool::new(&arena, 4);
        let mut held = Vec::new();
        while let Some(f) = pool.get_spare() {
            held.push(f);
        }
        assert_eq!(held.len(), 6);
        assert_eq!(pool.stats().starved_copies.value(), 1);
        assert_eq!(pool.get_bulk(&mut held, 5), 4);
        assert_eq!(pool.stats().starved_rx.value(), 1);
        assert!(pool.get().is_none());
        assert_eq!(pool.stats().starved_rx.value(), 2);
        assert_eq!(arena.outstanding(), 10);
        pool.put_bulk(&mut held);
        assert_eq!((arena.outstanding(), pool.available()), (0, 10));
    }

    #[test]
    fn a_dropped_pool_brings_its_frames_home() {
        let arena = arena(32);
        let mut a = Pool::new(&arena, 8);
        let mut b = Pool::new(&arena, 8);
        let f = a.get().unwrap();
        b.put(f);
        drop((a, b));
        assert_eq!(arena.depot_level(), 32);
        assert!(arena.pool_stats().is_empty());
    }

    #[test]
    fn a_frame_of_another_arena_finds_its_own_way_home() {
        let (ours, theirs) = (arena(4), arena(4));
        let mut pool = Pool::new(&ours, 4);
        let mut other = Pool::new(&theirs, 4);
        pool.put(other.get().unwrap());
        assert_eq!((ours.outstanding(), theirs.outstanding()), (0, 0));
        assert_eq!(pool.available(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_frame_is_lost_or_doubled_by_any_order_of_calls(
            cache in 1usize..9,
            calls in prop::collection::vec((0u8..5, 0usize..20), 1..60),
        ) {
            let arena = arena(40);
            let mut pools = [Pool::new(&arena, cache), Pool::new(&arena, cache)];
            let mut held: Vec<Frame> = Vec::new();
            for (call, n) in calls {
                let pool = &mut pools[n % 2];
                match call {
                    0 => held.extend(pool.get()),
                    1 => { pool.get_bulk(&mut held, n); }
                    2 => if let Some(f) = held.pop() { pool.put(f) },
                    3 => { let at = held.len().saturating_sub(n); let mut back = held.split_off(at); pool.put_bulk(&mut back); }
                    _ => held.extend(pool.get_spare()),
                }
                prop_assert_eq!(arena.outstanding() as usize, held.len());
                let mut seen: Vec<u32> = held.iter().map(Frame::index).collect();
                seen.sort_unstable();
                seen.dedup();
                prop_assert_eq!(seen.len(), held.len());
            }
            pools[0].put_bulk(&mut held);
            drop(pools);
            prop_assert_eq!(arena.depot_level(), 40);
        }
    }
}
