//! The other workers' side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pmd::BURST;
use rtrb::{Consumer, Producer, PushError};

use sa_store::ledger::WorkerCounters;

use super::piece::Parcel;

/// Packets of one owner in one round, after which a helper sees to its own.
const SHARE: usize = BURST;

/// What a helper that ends leaves to an owner: pieces not begun, where the owner finds them.
#[derive(Default)]
pub(super) struct Left {
    is_left: AtomicBool,
    tasks: Mutex<Option<Consumer<Parcel>>>,
}

impl Left {
    /// The ring of pieces not begun, once the helper has ended.
    #[inline]
    pub(super) fn take(&self) -> Option<Consumer<Parcel>> {
        if !self.is_left.load(Ordering::Acquire) {
            return None;
        }
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.take()
    }

    fn leave(&self, tasks: Consumer<Parcel>) {
        *self.tasks.lock().unwrap_or_else(PoisonError::into_inner) = Some(tasks);
        self.is_left.store(true, Ordering::Release);
    }
}

/// A helper's ends of the rings from and to one owner.
pub(super) struct Post {
    tasks: Consumer<Parcel>,
    back: Producer<Parcel>,
    left: Arc<Left>,
}

impl Post {
    pub(super) fn new(tasks: Consumer<Parcel>, back: Producer<Parcel>, left: Arc<Left>) -> Self {
        Self { tasks, back, left }
    }

    /// Ciphers one piece; returns its jobs.
    fn work(&mut self) -> Option<usize> {
        // The way back has as many places as the way here, and an owner has no more pieces on both: it cannot be full
        // when something is taken. Should it be, the piece stays where it is.
        if self.back.is_full() {
            return None;
        }
        let mut parcel = self.tasks.pop().ok()?;
        let jobs = parcel.jobs.len();
        parcel.cipher();
        match self.back.push(parcel) {
            Ok(()) => Some(jobs),
            Err(PushError::Full(parcel)) => {
                debug_assert!(false, "there was room before");
                drop(parcel);
                None
            }
        }
    }
}

/// A worker's helping hand for the others, polled once a round. It needs no snapshot: what a piece needs it brings along.
pub struct CryptoHelper {
    posts: Vec<Post>,
    counters: Arc<WorkerCounters>,
}

impl CryptoHelper {
    pub(super) fn new(posts: Vec<Post>, counters: Arc<WorkerCounters>) -> Self {
        Self { posts, counters }
    }

    /// Ciphers what other workers have put down, a bounded part of it. Returns how many packets that were.
    #[inline]
    pub fn assist(&mut self) -> usize {
        let posts = self.posts.iter_mut();
        let jobs: usize = posts
            .map(|post| {
                let mut jobs = 0;
                while jobs < SHARE
                    && let Some(more) = post.work()
                {
                    jobs += more;
                }
                jobs
            })
            .sum();
        if jobs != 0 {
            self.counters.parallel.assisted.add(jobs as u64);
        }
        jobs
    }

    /// Helps no more: owners cipher what it has not begun.
    pub fn retire(&mut self) {
        for post in self.posts.drain(..) {
            post.left.leave(post.tasks);
        }
    }

    /// Whether somebody waits for help: to be asked between announcing a sleep and sleeping.
    pub fn is_wanted(&self) -> bool {
        self.posts.iter().any(|post| !post.tasks.is_empty())
    }
}

impl std::fmt::Debug for CryptoHelper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CryptoHelper")
            .field("owners", &self.posts.len())
            .finish_non_exhaustive()
    }
}

impl Drop for CryptoHelper {
    fn drop(&mut self) {
        self.retire();
    }
}
