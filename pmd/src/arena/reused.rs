//! One arena for many short runs, of fuzzers and property tests: to map memory takes longer than most of them.

use std::cell::RefCell;
use std::sync::Arc;

use super::{Arena, ArenaConfig, HugePolicy};

thread_local! {
    static KEPT: RefCell<Vec<Arc<Arena>>> = const { RefCell::new(Vec::new()) };
}

/// An arena of so many frames of 2048 bytes, whole: one that a failed run has left frames out of is not used again.
///
/// # Panics
/// When there is no memory.
pub(crate) fn reused(frames: u32) -> Arc<Arena> {
    KEPT.with_borrow_mut(|kept| {
        // One that is still in use has frames out, or another holder.
        kept.retain(|arena| arena.depot_level() == arena.frames());
        let free = |arena: &&Arc<Arena>| arena.frames() == frames && Arc::strong_count(arena) == 1;
        if let Some(arena) = kept.iter().find(free) {
            return Arc::clone(arena);
        }
        let arena = Arena::new(ArenaConfig {
            frames,
            huge: HugePolicy::Never,
            lock: false,
            ..ArenaConfig::default()
        })
        .expect("memory");
        kept.push(Arc::clone(&arena));
        arena
    })
}
