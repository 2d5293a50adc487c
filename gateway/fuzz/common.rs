//! One pool for all runs of a target.

use std::cell::RefCell;

use pmd::{Arena, ArenaConfig, HugePolicy, Pool};

thread_local! {
    static POOL: RefCell<Pool> = RefCell::new({
        let config = ArenaConfig {
            frames: 64,
            huge: HugePolicy::Never,
            lock: false,
            ..ArenaConfig::default()
        };
        Pool::new(&Arena::new(config).expect("memory for 64 frames"), 8)
    });
}

/// Runs `f` with the pool and checks that every frame came back.
pub fn with_pool(f: impl FnOnce(&mut Pool)) {
    POOL.with_borrow_mut(|pool| {
        let before = pool.arena().outstanding();
        f(pool);
        assert_eq!(pool.arena().outstanding(), before, "a frame was kept");
    });
}
