//! Waking a thread that sleeps, without a lost wake-up and without a system call while it is awake.
//!
//! The sleeper announces its sleep *before* it looks for work a last time; a sender puts work down *before* it looks
//! whether the other sleeps. With a sequentially consistent fence between the two steps on both sides, either
//! the sleeper sees the work, or the sender sees the sleeper. Of several senders one wakes it.

use crate::sync::{AtomicBool, Ordering, fence};

/// Whether one thread sleeps. How it is woken is the owner's affair.
#[derive(Debug)]
pub struct Sleeper(AtomicBool);

impl Default for Sleeper {
    fn default() -> Self {
        Self(AtomicBool::new(false))
    }
}

impl Sleeper {
    /// Sender, after it has put work down: whether it has to wake the sleeper.
    pub fn needs_waking(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }

    /// Sleeper: about to sleep. It must look for work once more after this.
    pub fn announce_sleep(&self) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Sleeper: awake.
    pub fn announce_awake(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Work that was put down is either seen by the thread before it sleeps, or the thread is woken.
    #[test]
    fn a_thread_never_sleeps_on_work() {
        loom::model(|| {
            let sleeper = Arc::new(Sleeper::default());
            let ring = Arc::new(AtomicBool::new(false));
            let sender = {
                let (sleeper, ring) = (sleeper.clone(), ring.clone());
                thread::spawn(move || {
                    ring.store(true, Ordering::Release);
                    sleeper.needs_waking()
                })
            };
            sleeper.announce_sleep();
            let sleeps = !ring.load(Ordering::Acquire);
            let woken = sender.join().unwrap();
            assert!(!sleeps || woken, "it sleeps on work");
        });
    }

    /// Of two senders one writes the event descriptor.
    #[test]
    fn a_thread_is_woken_once() {
        loom::model(|| {
            let sleeper = Arc::new(Sleeper::default());
            sleeper.announce_sleep();
            let other = {
                let sleeper = sleeper.clone();
                thread::spawn(move || sleeper.needs_waking())
            };
            let own = sleeper.needs_waking();
            assert!(own ^ other.join().unwrap());
        });
    }
}
