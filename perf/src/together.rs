//! Whether two CPUs of this machine are two: the same work, which touches no memory, timed on each alone and on both at once.
//!
//! A host may run both CPUs of a guest on one core, or take one of them away for a while. What two workers reach then says
//! nothing about the program.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use quanta::Clock;

use crate::machine;

/// Steps of the work: some 100 microseconds, longer than what it takes to begin together.
const STEPS: u32 = 40_000;

/// How many times the work of one CPU the calling thread's and another do together: 2 at best. `None` where there is no other.
pub fn measure(clock: &Clock) -> Option<f64> {
    let own = machine::pinned();
    let other = *machine::allowed().iter().find(|cpu| Some(**cpu) != own)?;
    let timed = || {
        let start = clock.raw();
        work();
        clock.raw() - start
    };
    let ready = AtomicU64::new(0);
    // The other sleeps until it is told, so that each is alone once.
    let (tell, told) = channel();
    let (ready, timed) = (&ready, &timed);
    std::thread::scope(|scope| {
        let theirs = scope.spawn(move || {
            machine::pin(Some(other));
            let mut spent = [0; 2];
            for (turn, ticks) in spent.iter_mut().enumerate() {
                if turn == 0 && told.recv().is_err() {
                    return spent;
                }
                if turn == 1 {
                    meet(ready);
                }
                *ticks = timed();
                if turn == 0 {
                    ready.fetch_add(1, Ordering::AcqRel);
                }
            }
            spent
        });
        let alone = timed();
        tell.send(()).ok()?;
        // Not spinning: that would be work beside it.
        while ready.load(Ordering::Acquire) == 0 {
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
        meet(ready);
        let both = timed();
        let [theirs_alone, theirs_both] = theirs.join().ok()?;
        let one = (alone + theirs_alone) as f64 / 2.0;
        Some(2.0 * one / both.max(theirs_both) as f64)
    })
}

/// Waits until both are here.
fn meet(ready: &AtomicU64) {
    ready.fetch_add(1, Ordering::AcqRel);
    while ready.load(Ordering::Acquire) < 3 {
        std::hint::spin_loop();
    }
}

/// Multiplications in chains that do not depend on each other: what fills a core that nobody shares.
#[inline(never)]
fn work() {
    let mut chains = [1_u64, 3, 5, 7, 9, 11, 13, 15];
    for _ in 0..STEPS {
        for c in &mut chains {
            *c = c.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ 0x5bd1_e995;
        }
    }
    black_box(chains);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cpus_do_no_more_than_twice_the_work_of_one() {
        let clock = Clock::new();
        // Other tests share the CPUs: only what can never be is wrong.
        if let Some(times) = measure(&clock) {
            assert!(times > 0.0 && times.is_finite(), "{times}");
        } else {
            assert!(machine::allowed().len() < 2);
        }
    }
}
