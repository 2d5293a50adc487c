//! A store at work: what workers and control see of it. [`super::serve`] has its threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sa::SaSpec;

use super::error::LeaseError;
use super::serve;
use super::store::{LeaseHandle, LeaseStore, Resume};

/// The lease of one SA as its worker sees it. Only the writer thread raises the limit, after the sync.
#[derive(Debug)]
pub struct Lease {
    pub(super) handle: LeaseHandle,
    resume: u64,
    limit: AtomicU64,
    /// Highest limit asked for, so that a request is not sent twice.
    asked: AtomicU64,
    failed: AtomicBool,
}

impl Lease {
    /// Outbound: the number to go on with. Inbound: the highest number that counts as seen.
    pub fn resume(&self) -> u64 {
        self.resume
    }

    /// Outbound: the first number that must not be used. Inbound: the highest number that may be accepted.
    /// A relaxed load suffices for the worker: a late view of it is a lower limit.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn new(claimed: Resume) -> Self {
        Self {
            handle: claimed.handle,
            resume: claimed.value,
            limit: AtomicU64::new(claimed.value),
            asked: AtomicU64::new(claimed.value),
            failed: AtomicBool::new(false),
        }
    }

    /// A higher limit is durable.
    pub(super) fn raise(&self, limit: u64) {
        self.limit.fetch_max(limit, Ordering::Release);
    }

    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// The store failed: the limit will not rise any more.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// How an SA ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// It may come back, and goes on from here: next unused number, or highest accepted one.
    At(u64),
    /// Its state is not known (a worker was lost): the committed limit stands.
    Unknown,
}

pub(super) enum Request {
    Claim(Vec<SaSpec>, Sender<Vec<Result<Arc<Lease>, LeaseError>>>),
    Advance(Arc<Lease>, u64),
    Lower(Arc<Lease>, u64),
    /// Somebody may wait for its being durable.
    Release(Arc<Lease>, Release, Option<Sender<Result<(), LeaseError>>>),
    Sweep(Duration),
    /// What was staged is written, or could not be.
    Written(io::Result<()>),
    Stop(Option<Sender<LeaseStore>>),
}

/// Told once when the store fails, and of leases that could not be given back, on the store's thread.
pub type OnFailure = Box<dyn Fn(&LeaseError) + Send>;

/// Handle of the store's threads. Dropping it ends them after the requests already sent.
#[derive(Debug)]
pub struct LeaseWriter {
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl LeaseWriter {
    /// Starts the threads with a store.
    ///
    /// # Errors
    /// The system has no threads for us.
    pub fn start(store: LeaseStore, on_failure: OnFailure) -> Result<Self, LeaseError> {
        let (tx, rx) = channel();
        let thread = serve::start(store, tx.clone(), rx, on_failure)?;
        Ok(Self {
            requests: Some(tx),
            thread: Some(thread),
        })
    }

    /// Claims the records of the SAs, each with its own answer, in order. Waits for the store's memory, not for the disk.
    pub fn claim(&self, sas: Vec<SaSpec>) -> Vec<Result<Arc<Lease>, LeaseError>> {
        let n = sas.len();
        let (tx, rx) = channel();
        if self.send(Request::Claim(sas, tx)).is_ok()
            && let Ok(answers) = rx.recv()
        {
            return answers;
        }
        (0..n).map(|_| Err(LeaseError::Stopped)).collect()
    }

    /// Asks for a higher limit; it appears in [`Lease::limit`] when it is durable. Does not wait.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`].
    pub fn advance(&self, lease: &Arc<Lease>, limit: u64) -> Result<(), LeaseError> {
        if lease.asked.fetch_max(limit, Ordering::Relaxed) >= limit {
            return Ok(());
        }
        self.send(Request::Advance(lease.clone(), limit))
    }

    /// Takes the room above an inbound edge back; does not wait. Nothing above `limit` may have been accepted, nor
    /// may it be from now on, and no advance may be under way.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`].
    pub fn lower(&self, lease: &Arc<Lease>, limit: u64) -> Result<(), LeaseError> {
        lease.asked.store(limit, Ordering::Relaxed);
        // At once: should the write fail, the edge on disk is the higher one, which is safe.
        lease.limit.store(limit, Ordering::Relaxed);
        self.send(Request::Lower(lease.clone(), limit))
    }

    /// Gives leases back without waiting for the disk: until then what is on it says more than was used. The workers must have
    /// let go of the SAs before.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`].
    pub fn give_back(&self, ends: Vec<(Arc<Lease>, Release)>) -> Result<(), LeaseError> {
        ends.into_iter()
            .try_for_each(|(lease, how)| self.send(Request::Release(lease, how, None)))
    }

    /// Ends a lease and waits until that is durable. The worker must have let go of the SA before.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn release(&self, lease: &Arc<Lease>, how: Release) -> Result<(), LeaseError> {
        self.release_many(vec![(lease.clone(), how)])
    }

    /// Ends many leases with one sync.
    ///
    /// # Errors
    /// The first that occurs; the others are ended all the same.
    pub fn release_many(&self, ends: Vec<(Arc<Lease>, Release)>) -> Result<(), LeaseError> {
        let (tx, rx) = channel();
        for (lease, how) in ends {
            self.send(Request::Release(lease, how, Some(tx.clone())))?;
        }
        drop(tx);
        rx.into_iter().collect()
    }

    /// Retires keys that were long out of use, see [`LeaseStore::sweep`]; does not wait.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`].
    pub fn sweep(&self, now: Duration) -> Result<(), LeaseError> {
        self.send(Request::Sweep(now))
    }

    /// Stops the thread and gives the store back.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`] when the thread is gone already.
    pub fn stop(mut self) -> Result<LeaseStore, LeaseError> {
        let (tx, rx) = channel();
        self.send(Request::Stop(Some(tx)))?;
        let store = rx.recv().map_err(|_| LeaseError::Stopped)?;
        self.join();
        Ok(store)
    }

    fn send(&self, r: Request) -> Result<(), LeaseError> {
        let tx = self.requests.as_ref().ok_or(LeaseError::Stopped)?;
        tx.send(r).map_err(|_| LeaseError::Stopped)
    }

    fn join(&mut self) {
        if let Some(requests) = self.requests.take() {
            // It may have stopped before.
            let _ = requests.send(Request::Stop(None));
        }
        if let Some(t) = self.thread.take() {
            // A panic of the thread was reported by the panic hook; leases stop rising, nothing is reused.
            let _ = t.join();
        }
    }
}

impl Drop for LeaseWriter {
    fn drop(&mut self) {
        self.join();
    }
}
