//! The thread that syncs: it takes requests, commits many of them with one sync, then publishes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::sa::SaSpec;

use super::store::{LeaseError, LeaseHandle, LeaseStore, Update};

/// The lease of one SA as its worker sees it. Only the writer thread raises the limit, after the sync.
#[derive(Debug)]
pub struct Lease {
    handle: LeaseHandle,
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
    /// Its key is never used again.
    Retire,
}

enum Request {
    Claim(Vec<SaSpec>, Sender<Vec<Result<Arc<Lease>, LeaseError>>>),
    Advance(Arc<Lease>, u64),
    Lower(Arc<Lease>, u64),
    Release(Arc<Lease>, Release, Sender<Result<(), LeaseError>>),
    Stop(Sender<LeaseStore>),
}

/// Told once when the store fails, on the writer thread.
pub type OnFailure = Box<dyn Fn(&LeaseError) + Send>;

/// Handle of the writer thread. Dropping it ends the thread after the requests already sent.
#[derive(Debug)]
pub struct LeaseWriter {
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl LeaseWriter {
    /// Starts the thread with a store.
    ///
    /// # Errors
    /// The system has no thread for us.
    pub fn start(store: LeaseStore, on_failure: OnFailure) -> Result<Self, LeaseError> {
        let (tx, rx) = channel();
        let thread = std::thread::Builder::new()
            .name("leases".into())
            .spawn(move || run(store, &rx, &on_failure))
            .map_err(|source| LeaseError::Io {
                action: "start a thread for",
                path: "the lease store".into(),
                source,
            })?;
        Ok(Self {
            requests: Some(tx),
            thread: Some(thread),
        })
    }

    /// Claims the records of the SAs, each with its own answer, in order. Waits for the thread.
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
            self.send(Request::Release(lease, how, tx.clone()))?;
        }
        drop(tx);
        rx.into_iter().collect()
    }

    /// Stops the thread and gives the store back.
    ///
    /// # Errors
    /// [`LeaseError::Stopped`] when the thread is gone already.
    pub fn stop(mut self) -> Result<LeaseStore, LeaseError> {
        let (tx, rx) = channel();
        self.send(Request::Stop(tx))?;
        let store = rx.recv().map_err(|_| LeaseError::Stopped)?;
        self.join();
        Ok(store)
    }

    fn send(&self, r: Request) -> Result<(), LeaseError> {
        let tx = self.requests.as_ref().ok_or(LeaseError::Stopped)?;
        tx.send(r).map_err(|_| LeaseError::Stopped)
    }

    fn join(&mut self) {
        drop(self.requests.take());
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

/// What a commit has to tell when it is done.
enum After {
    Nothing,
    Publish(Arc<Lease>, u64),
    Answer(Sender<Result<(), LeaseError>>),
}

fn run(mut store: LeaseStore, requests: &Receiver<Request>, on_failure: &OnFailure) {
    let mut told = false;
    // While a sync runs, requests pile up; the next one takes them all.
    while let Ok(first) = requests.recv() {
        let mut updates = Vec::new();
        let mut after = Vec::new();
        let mut stop = None;
        for r in std::iter::once(first).chain(requests.try_iter()) {
            match r {
                Request::Claim(sas, tx) => {
                    let answers = sas.iter().map(|sa| claim(&mut store, sa)).collect();
                    // A caller that no longer waits holds no leases.
                    let _ = tx.send(answers);
                }
                Request::Advance(lease, value) => {
                    let handle = lease.handle;
                    updates.push(Update::Advance { handle, value });
                    after.push(After::Publish(lease, value));
                }
                Request::Lower(lease, value) => {
                    let handle = lease.handle;
                    updates.push(Update::Lower { handle, value });
                    after.push(After::Nothing);
                }
                Request::Release(lease, how, tx) => {
                    updates.push(end_of(&lease, how));
                    after.push(After::Answer(tx));
                }
                Request::Stop(tx) => {
                    stop = Some(tx);
                    break;
                }
            }
        }
        commit(&mut store, updates, after, on_failure, &mut told);
        if let Some(tx) = stop {
            let _ = tx.send(store);
            return;
        }
    }
}

fn claim(store: &mut LeaseStore, sa: &SaSpec) -> Result<Arc<Lease>, LeaseError> {
    let resume = store.claim(sa)?;
    Ok(Arc::new(Lease {
        handle: resume.handle,
        resume: resume.value,
        limit: AtomicU64::new(resume.value),
        asked: AtomicU64::new(resume.value),
        failed: AtomicBool::new(false),
    }))
}

fn end_of(lease: &Lease, how: Release) -> Update {
    let handle = lease.handle;
    match how {
        Release::At(value) => Update::Release { handle, value },
        Release::Unknown => Update::Release {
            handle,
            value: lease.limit(),
        },
        Release::Retire => Update::Retire { handle },
    }
}

fn commit(
    store: &mut LeaseStore,
    updates: Vec<Update>,
    after: Vec<After>,
    on_failure: &OnFailure,
    told: &mut bool,
) {
    if updates.is_empty() {
        return;
    }
    let together = store.commit(&updates);
    if together.is_ok() {
        for a in after {
            publish(a, Ok(()));
        }
        return;
    }
    // One request of the batch is wrong, or the store failed: each gets its own answer.
    for (update, a) in updates.iter().zip(after) {
        let answer = store.commit(std::slice::from_ref(update));
        if store.has_failed() && !*told {
            *told = true;
            on_failure(together.as_ref().err().unwrap_or(&LeaseError::Failed));
        }
        publish(a, answer);
    }
}

fn publish(after: After, answer: Result<(), LeaseError>) {
    match (after, answer) {
        (After::Publish(lease, value), Ok(())) => {
            lease.limit.fetch_max(value, Ordering::Release);
        }
        (After::Nothing, _) => {}
        (After::Publish(lease, _), Err(_)) => lease.failed.store(true, Ordering::Relaxed),
        // A caller that no longer waits does not need the answer.
        (After::Answer(tx), answer) => drop(tx.send(answer)),
    }
}
