//! One SA's ciphering on many workers (the idea of Linux's pcrypt): the SA's owner frames, numbers and keeps the window, the
//! others help with what costs most.
//!
//! ```text
//!   owner: submit ─┬▶ piece ─▶ ring ─▶ helper: cipher ─▶ ring ─┐
//!                  ├▶ piece ─▶ ring ─▶ helper: cipher ─▶ ring ─┼▶ lane of the SA ─▶ done, in order of submission
//!                  └▶ piece ─────────▶ owner: cipher ──────────┘
//! ```
//!
//! - Small loads stay on the owner: pieces are given away only while bursts have been full several times in a row, and only
//!   of SAs whose packets are worth the way. A worker that is under pressure itself is not asked for help.
//! - A helper has about a burst of an owner's jobs at most. What goes beyond, the owner ciphers itself: it never waits.
//! - In flight is what fits into a bounded number of pieces; then jobs stay in the caller's vector. It takes a helper whose CPU
//!   is taken away for many milliseconds in the middle of a piece; workers are best alone on their CPUs.
//! - A piece holds its SA's entry, so that it does not matter which snapshot a helper has, nor whether the SA has been
//!   removed meanwhile: its keys are wiped when the last piece is back.
//!
//! Between two threads there are `rtrb`'s rings and nothing else: the boxed piece is owned by whoever took it out, and its
//! memory is reached by nobody else. So there is no protocol of our own to model-check; the one flag beside them
//! ([`helper::Left`]) only says that a mutex, locked once in a helper's life, has something to take. Waking a sleeping helper
//! is [`sa_store::sleeper`]'s, which is model-checked.

mod gauge;
mod helper;
mod lane;
mod owner;
mod piece;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use helper::CryptoHelper;
pub use owner::ParallelEngine;

use sa_store::ledger::WorkerCounters;

use crate::worker::Waker;
use gauge::Pressure;
use helper::Post;
use owner::Desk;

/// The engine and the helping hand of each worker, with its counters; the number of wakers is the number of workers.
pub fn crew(
    wakers: &Arc<[Waker]>,
    counters: &[Arc<WorkerCounters>],
) -> Vec<(ParallelEngine, CryptoHelper)> {
    let workers = wakers.len();
    let pressure: Arc<[Pressure]> = (0..workers).map(|_| Pressure::default()).collect();
    let mut desks: Vec<Vec<Desk>> = (0..workers).map(|_| Vec::new()).collect();
    let mut posts: Vec<Vec<Post>> = (0..workers).map(|_| Vec::new()).collect();
    for (owner, desks) in desks.iter_mut().enumerate() {
        // Each begins with another helper.
        for helper in (1..workers).map(|step| (owner + step) % workers) {
            let (desk, post) = Desk::with_post(helper);
            desks.push(desk);
            if let Some(of_helper) = posts.get_mut(helper) {
                of_helper.push(post);
            }
        }
    }
    let ends = desks.into_iter().zip(posts).enumerate();
    ends.map(|(own, (desks, posts))| {
        let counters = counters.get(own).cloned().unwrap_or_default();
        let told = Arc::clone(&counters);
        let engine =
            ParallelEngine::new(own, desks, Arc::clone(wakers), Arc::clone(&pressure), told);
        (engine, CryptoHelper::new(posts, counters))
    })
    .collect()
}
