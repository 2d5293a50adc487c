//! The two threads of a store: one has it in memory and answers, the other writes and syncs. A disk may take seconds for a sync,
//! and claims do not wait for it; changes that come meanwhile go with the next one.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::error::LeaseError;
use super::media::DiskMedia;
use super::stage::Stage;
use super::store::{LeaseStore, Update};
use super::writer::{Lease, OnFailure, Release, Request};

/// Starts both threads. `own`: where the writing thread reports.
pub(super) fn start(
    mut store: LeaseStore,
    own: Sender<Request>,
    requests: Receiver<Request>,
    on_failure: OnFailure,
) -> Result<JoinHandle<()>, LeaseError> {
    let media = store.media_again()?;
    let (stages, work) = channel();
    let disk = thread("lease-disk", move || write(media, &work, &own))?;
    let desk = Desk {
        store,
        stages,
        pending: Vec::new(),
        under_way: None,
        sweep: None,
        on_failure,
        told: false,
    };
    thread("leases", move || {
        let stopped = desk.run(&requests);
        // Its channel is closed, so it ends. A panic there was reported by the panic hook.
        let _ = disk.join();
        if let Some((store, Some(tx))) = stopped {
            // A caller that no longer waits does not need the store.
            let _ = tx.send(store);
        }
    })
}

fn thread(name: &str, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, LeaseError> {
    let named = std::thread::Builder::new().name(name.into());
    named.spawn(f).map_err(|source| LeaseError::Io {
        action: "start a thread for",
        path: "the lease store".into(),
        source,
    })
}

fn write(
    (mut records, mut retired): (DiskMedia, DiskMedia),
    work: &Receiver<Stage>,
    done: &Sender<Request>,
) {
    for stage in work {
        let written = stage.write(&mut records, &mut retired);
        if done.send(Request::Written(written)).is_err() {
            return;
        }
    }
}

/// What to tell when changes are durable.
enum After {
    Nothing,
    Raise(Arc<Lease>, u64),
    GivenBack,
    Answer(Sender<Result<(), LeaseError>>),
}

type Stopped = (LeaseStore, Option<Sender<LeaseStore>>);

struct Desk {
    store: LeaseStore,
    stages: Sender<Stage>,
    /// Changes in memory that are not staged.
    pending: Vec<After>,
    /// Those that are being written.
    under_way: Option<Vec<After>>,
    sweep: Option<Duration>,
    on_failure: OnFailure,
    told: bool,
}

impl Desk {
    fn run(mut self, requests: &Receiver<Request>) -> Option<Stopped> {
        let mut stop = None;
        // While a sync runs, changes pile up; the next one takes them all.
        while let Ok(first) = requests.recv() {
            for r in std::iter::once(first).chain(requests.try_iter()) {
                match r {
                    Request::Stop(tx) => stop = Some(tx),
                    r => self.take(r),
                }
            }
            self.proceed();
            if self.under_way.is_none()
                && let Some(tx) = stop.take()
            {
                return Some((self.store, tx));
            }
        }
        None
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Claim(sas, tx) => {
                let store = &mut self.store;
                let claim = |sa| store.claim(sa).map(|c| Arc::new(Lease::new(c)));
                // A caller that no longer waits holds no leases.
                let _ = tx.send(sas.iter().map(claim).collect());
            }
            Request::Advance(lease, value) => {
                let handle = lease.handle;
                let update = Update::Advance { handle, value };
                self.change(&update, After::Raise(lease, value));
            }
            Request::Lower(lease, value) => {
                let handle = lease.handle;
                self.change(&Update::Lower { handle, value }, After::Nothing);
            }
            Request::Release(lease, how, tx) => {
                let value = match how {
                    Release::At(value) => value,
                    Release::Unknown => lease.limit(),
                };
                let handle = lease.handle;
                let after = tx.map_or(After::GivenBack, After::Answer);
                self.change(&Update::Release { handle, value }, after);
            }
            Request::Sweep(now) => self.sweep = Some(now),
            Request::Written(result) => {
                let after = self.under_way.take().unwrap_or_default();
                match self.store.settle(result) {
                    Ok(()) => after.into_iter().for_each(After::done),
                    Err(e) => self.fail(after, &e),
                }
            }
            Request::Stop(_) => {}
        }
    }

    fn change(&mut self, update: &Update, after: After) {
        match self.store.take(update) {
            Ok(()) => self.pending.push(after),
            // It concerns this change alone.
            Err(e) if !self.store.has_failed() => {
                if matches!(after, After::GivenBack) {
                    (self.on_failure)(&e);
                }
                after.failed(e);
            }
            Err(e) => after.failed(e),
        }
    }

    /// Starts the next write, when none is under way.
    fn proceed(&mut self) {
        if self.under_way.is_some() {
            return;
        }
        if let Some(now) = self.sweep.take() {
            match self.store.retire_due(now) {
                Ok(0) => {}
                Ok(_) => self.pending.push(After::Nothing),
                Err(e) => self.fail(Vec::new(), &e),
            }
        }
        if self.pending.is_empty() {
            return;
        }
        let after = std::mem::take(&mut self.pending);
        if self.store.has_failed() {
            return self.fail(after, &LeaseError::Failed);
        }
        let Some(stage) = self.store.stage() else {
            return after.into_iter().for_each(After::done);
        };
        if self.stages.send(stage).is_ok() {
            self.under_way = Some(after);
        } else {
            let ended = io::Error::other("the thread that writes has ended");
            let error = self.store.settle(Err(ended)).err();
            self.fail(after, &error.unwrap_or(LeaseError::Failed));
        }
    }

    /// The store takes no more changes.
    fn fail(&mut self, after: Vec<After>, error: &LeaseError) {
        if !self.told {
            self.told = true;
            (self.on_failure)(error);
        }
        for a in after {
            a.failed(LeaseError::Failed);
        }
    }
}

impl After {
    fn done(self) {
        match self {
            Self::Raise(lease, value) => lease.raise(value),
            // A caller that no longer waits does not need the answer.
            Self::Answer(tx) => drop(tx.send(Ok(()))),
            Self::Nothing | Self::GivenBack => {}
        }
    }

    fn failed(self, error: LeaseError) {
        match self {
            Self::Raise(lease, _) => lease.fail(),
            Self::Answer(tx) => drop(tx.send(Err(error))),
            Self::Nothing | Self::GivenBack => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::lease::tests::out;
    use crate::sa::SaSpec;

    /// A desk whose disk is the test's.
    fn desk() -> (Desk, Receiver<Stage>, Arc<AtomicUsize>) {
        let (stages, work) = channel();
        let failures = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&failures);
        let desk = Desk {
            store: LeaseStore::throw_away().unwrap(),
            stages,
            pending: Vec::new(),
            under_way: None,
            sweep: None,
            on_failure: Box::new(move |_| {
                counter.fetch_add(1, Ordering::Relaxed);
            }),
            told: false,
        };
        (desk, work, failures)
    }

    fn claim(desk: &mut Desk, spec: SaSpec) -> Result<Arc<Lease>, LeaseError> {
        let (tx, rx) = channel();
        desk.take(Request::Claim(vec![spec], tx));
        desk.proceed();
        rx.try_recv().expect("an answer at once").remove(0)
    }

    fn ask(desk: &mut Desk, request: Request) {
        desk.take(request);
        desk.proceed();
    }

    #[test]
    fn claims_are_answered_while_the_disk_is_busy_and_limits_rise_after_their_own_write() {
        let (mut desk, work, failures) = desk();
        let a = claim(&mut desk, out(1, true)).unwrap();
        ask(&mut desk, Request::Advance(Arc::clone(&a), 100));
        let first = work.try_recv().expect("a write");
        // The disk takes its time.
        let b = claim(&mut desk, out(2, true)).unwrap();
        ask(&mut desk, Request::Advance(Arc::clone(&b), 50));
        ask(&mut desk, Request::Advance(Arc::clone(&a), 200));
        ask(&mut desk, Request::Sweep(Duration::from_secs(1)));
        assert!(work.try_recv().is_err(), "one write at a time");
        assert_eq!((a.limit(), b.limit()), (1, 1));
        // A key that is given back meanwhile goes on where it was.
        ask(&mut desk, Request::Release(b, Release::At(1), None));
        let b = claim(&mut desk, out(2, false)).unwrap();
        assert_eq!(b.resume(), 1);
        let (mut records, mut retired) = desk.store.media_again().unwrap();
        ask(
            &mut desk,
            Request::Written(first.write(&mut records, &mut retired)),
        );
        assert_eq!((a.limit(), b.limit()), (100, 1));
        let second = work.try_recv().expect("what piled up");
        ask(
            &mut desk,
            Request::Written(second.write(&mut records, &mut retired)),
        );
        assert_eq!((a.limit(), b.limit()), (200, 1));
        assert!(work.try_recv().is_err() && desk.under_way.is_none());
        assert_eq!(
            (desk.store.commits(), failures.load(Ordering::Relaxed)),
            (2, 0)
        );
    }

    #[test]
    fn a_write_that_fails_ends_leases_and_is_told_once() {
        let (mut desk, work, failures) = desk();
        let a = claim(&mut desk, out(1, true)).unwrap();
        let b = claim(&mut desk, out(2, true)).unwrap();
        ask(&mut desk, Request::Advance(Arc::clone(&a), 100));
        drop(work.try_recv().expect("a write"));
        ask(&mut desk, Request::Advance(Arc::clone(&b), 100));
        ask(&mut desk, Request::Written(Err(io::Error::other("full"))));
        ask(&mut desk, Request::Advance(Arc::clone(&a), 200));
        assert!(a.has_failed() && b.has_failed());
        assert_eq!((a.limit(), b.limit()), (1, 1));
        assert!(matches!(
            claim(&mut desk, out(3, true)),
            Err(LeaseError::Failed)
        ));
        ask(&mut desk, Request::Release(a, Release::At(1), None));
        assert!(work.try_recv().is_err(), "nothing is written any more");
        assert_eq!(failures.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_lease_that_cannot_be_given_back_is_told() {
        let (mut desk, _work, failures) = desk();
        let a = claim(&mut desk, out(1, true)).unwrap();
        ask(
            &mut desk,
            Request::Release(Arc::clone(&a), Release::At(2), None),
        );
        assert_eq!(failures.load(Ordering::Relaxed), 1, "more than was leased");
        ask(
            &mut desk,
            Request::Release(Arc::clone(&a), Release::At(1), None),
        );
        ask(&mut desk, Request::Release(a, Release::At(1), None));
        assert_eq!(failures.load(Ordering::Relaxed), 2, "twice");
    }
}
