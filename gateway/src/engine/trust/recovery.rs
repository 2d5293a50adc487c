//! A thread on which engines are reset, as that may take long: the engine goes there in its box, and comes back.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pmd::Pool;
use pmd::engine::{EspEngine, EspJob};

use sa_store::sa::SaId;

use super::known;

/// The engine on its way to the thread or back.
pub(super) struct Courier {
    pub(super) engine: Box<dyn EspEngine>,
    /// Everything that was in flight.
    pub(super) jobs: Vec<EspJob>,
    /// What failed, if anything did.
    pub(super) outcome: Result<(), String>,
    /// SAs to be removed first, so that those of the checks find room.
    pub(super) gone: Vec<SaId>,
    /// It was opened anew and knows no SA.
    pub(super) anew: bool,
}

/// Opens an engine anew whose device is gone: its process was ended, or its driver unbound.
pub type Reopen = Box<dyn FnMut() -> Result<Box<dyn EspEngine>, String> + Send>;

/// How long the thread may take to end when nobody wants its engine any more.
const LEAVE: Duration = Duration::from_secs(5);

/// What the thread needs to check an engine.
pub(super) struct Bench {
    pub(super) pool: Pool,
    /// First SA index that is ours.
    pub(super) first: u32,
    pub(super) patience: Duration,
    /// Generation of the next known-answer SAs.
    pub(super) generation: u32,
}

/// The way to the thread.
pub(super) struct Workshop {
    /// Both ends are there until the drop.
    ends: Option<(Sender<Courier>, Receiver<Courier>)>,
    thread: JoinHandle<()>,
}

impl Workshop {
    /// Starts the thread. To be called before the caller is pinned to a CPU, as threads inherit that.
    pub(super) fn open(
        name: &str,
        mut bench: Bench,
        mut reopen: Option<Reopen>,
    ) -> std::io::Result<Workshop> {
        let (to, jobs) = channel::<Courier>();
        let (done, back) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("heal-{name}"))
            .spawn(move || {
                while let Ok(mut courier) = jobs.recv() {
                    courier.outcome = restore(&mut courier, &mut bench, reopen.as_mut());
                    if let Err(unwanted) = done.send(courier) {
                        give_back(unwanted.0);
                        return;
                    }
                }
            })?;
        Ok(Workshop {
            ends: Some((to, back)),
            thread,
        })
    }

    /// Sends an engine to be reset; back when there is no thread any more.
    pub(super) fn send(
        &self,
        engine: Box<dyn EspEngine>,
        gone: Vec<SaId>,
    ) -> Result<(), Box<dyn EspEngine>> {
        let courier = Courier {
            engine,
            jobs: Vec::new(),
            outcome: Ok(()),
            gone,
            anew: false,
        };
        match &self.ends {
            Some((to, _)) => to.send(courier).map_err(|e| e.0.engine),
            None => Err(courier.engine),
        }
    }

    /// An engine that has come back. An error: none will.
    pub(super) fn returned(&self) -> Result<Option<Courier>, Gone> {
        let (_, back) = self.ends.as_ref().ok_or(Gone)?;
        match back.try_recv() {
            Ok(courier) => Ok(Some(courier)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Gone),
        }
    }

    /// Waits for it.
    pub(super) fn wait(&self, patience: Duration) -> Result<Courier, Gone> {
        let (_, back) = self.ends.as_ref().ok_or(Gone)?;
        back.recv_timeout(patience)
            .map_err(|_: RecvTimeoutError| Gone)
    }
}

/// The thread has frames, and what it opens engines with has more: they are home when it has ended.
impl Drop for Workshop {
    fn drop(&mut self) {
        self.ends = None;
        let begin = Instant::now();
        while !self.thread.is_finished() {
            if begin.elapsed() > LEAVE {
                let thread = self.thread.thread().name();
                tracing::warn!(thread, "still resetting an engine; its frames stay away");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The thread has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// Resets the engine, or opens it anew, and asks it the known answers.
fn restore(
    courier: &mut Courier,
    bench: &mut Bench,
    reopen: Option<&mut Reopen>,
) -> Result<(), String> {
    let Courier {
        engine,
        jobs,
        gone,
        anew,
        ..
    } = courier;
    if let Err(error) = engine.reset(jobs) {
        // A device that is there is not opened a second time: it is reset again, later.
        let reopen = reopen.filter(|_| !engine.is_present());
        let reopen = reopen.ok_or_else(|| error.to_string())?;
        let fresh = reopen().map_err(|why| format!("{error}; opened anew: {why}"))?;
        if fresh.capabilities() != engine.capabilities() {
            return Err(format!("{error}; opened anew, it is another engine"));
        }
        // Frames that the old one may still write to stay away with it.
        *engine = fresh;
        *anew = true;
    }
    gone.drain(..).for_each(|sa| engine.remove(sa));
    prove(&mut **engine, jobs, bench)
}

/// Asks the engine the known answers. It is then as it was after its reset.
pub(super) fn prove(
    engine: &mut dyn EspEngine,
    jobs: &mut Vec<EspJob>,
    bench: &mut Bench,
) -> Result<(), String> {
    bench.generation = bench.generation.wrapping_add(1);
    let Bench {
        pool,
        first,
        patience,
        generation,
    } = bench;
    known::run(engine, pool, *first, *generation, *patience).map_err(|e| e.to_string())?;
    if !engine.is_healthy() {
        return Err("its driver does not trust it".into());
    }
    if !engine.capabilities().renumbers {
        // Slots that had an SA may have to rest: everybody's shall be free.
        engine.reset(jobs).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Nobody waits for the engine any more.
pub(super) fn give_back(courier: Courier) {
    courier.jobs.into_iter().for_each(|j| j.frame.give_back());
}
