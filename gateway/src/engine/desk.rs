//! Where control and the worker that owns an engine meet. Control installs and removes SAs; before the worker runs it does so
//! itself, afterwards it asks the worker and waits for the answer. Nothing of this is on a packet's way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pmd::engine::{Capabilities, EngineStats, EspEngine, Refusal};
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;

/// How long control waits for a worker's answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Commands that may be under way.
const COMMANDS: usize = 64;

/// What control asks of the engine's owner.
pub(super) enum Command {
    /// Prepare for the SA's jobs, and say whether the engine carries it.
    Install(Arc<SaEntry>, SyncSender<Result<(), Refusal>>),
    /// Forget it.
    Remove(SaId),
}

enum State {
    /// No worker has it yet.
    Here(Box<dyn EspEngine>),
    /// A worker has it.
    Taken(SyncSender<Command>),
    /// Being handed over.
    Between,
}

/// Why an engine did not do as control asked.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// The engine says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The worker that owns it does not answer.
    #[error("the worker that owns engine {0} does not answer")]
    Silent(String),
}

/// One engine, from control's side.
pub struct Desk {
    name: String,
    worker: usize,
    capabilities: Capabilities,
    stats: Option<Arc<EngineStats>>,
    waiting: Arc<AtomicBool>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk")
            .field("name", &self.name)
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

/// The worker's end.
pub(super) struct Owner {
    pub(super) engine: Box<dyn EspEngine>,
    commands: Receiver<Command>,
    waiting: Arc<AtomicBool>,
}

impl Desk {
    /// A desk for the engine that the operator calls `name` and worker `worker` is to own.
    pub fn new(name: &str, worker: usize, engine: Box<dyn EspEngine>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            worker,
            capabilities: engine.capabilities().clone(),
            stats: engine.stats().cloned(),
            waiting: Arc::default(),
            state: Mutex::new(State::Here(engine)),
        })
    }

    /// Operator's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Worker that owns it.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// What it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// What it counts.
    pub fn stats(&self) -> Option<&Arc<EngineStats>> {
        self.stats.as_ref()
    }

    /// Does something with the engine while no worker has it; `None` once one has.
    pub fn while_here<R>(&self, work: impl FnOnce(&mut dyn EspEngine) -> R) -> Option<R> {
        match &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Here(engine) => Some(work(&mut **engine)),
            _ => None,
        }
    }

    /// Prepares the engine for an SA. `wake` is called when its worker has to do it.
    ///
    /// # Errors
    /// The engine refuses, or its worker does not answer.
    pub fn install(&self, sa: &Arc<SaEntry>, wake: impl FnOnce()) -> Result<(), DeskError> {
        let answer = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *state {
                State::Here(engine) => return Ok(engine.install(sa)?),
                State::Between => return Err(DeskError::Silent(self.name.clone())),
                State::Taken(to) => {
                    let (answer, heard) = sync_channel(1);
                    to.try_send(Command::Install(Arc::clone(sa), answer))
                        .map_err(|_| DeskError::Silent(self.name.clone()))?;
                    heard
                }
            }
        };
        self.waiting.store(true, Ordering::Release);
        wake();
        match answer.recv_timeout(PATIENCE) {
            Ok(said) => Ok(said?),
            Err(_) => {
                // Should the worker get to it later, nobody will use it.
                self.remove(sa.fixed.id, || {});
                Err(DeskError::Silent(self.name.clone()))
            }
        }
    }

    /// Lets the engine forget an SA that no worker uses any more.
    pub fn remove(&self, sa: SaId, wake: impl FnOnce()) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Here(engine) => engine.remove(sa),
            State::Between => {}
            State::Taken(to) => {
                if to.try_send(Command::Remove(sa)).is_err() {
                    tracing::error!(engine = %self.name, "a removed SA stays in the engine: its worker does not answer");
                    return;
                }
                self.waiting.store(true, Ordering::Release);
                wake();
            }
        }
    }

    /// Gives the engine to its worker.
    pub(super) fn take(&self) -> Option<Owner> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Between) {
            State::Here(engine) => {
                let (to, commands) = sync_channel(COMMANDS);
                *state = State::Taken(to);
                Some(Owner {
                    engine,
                    commands,
                    waiting: Arc::clone(&self.waiting),
                })
            }
            other => {
                *state = other;
                None
            }
        }
    }
}

impl Owner {
    /// Whether control asks for something.
    #[inline(always)]
    pub(super) fn is_asked(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Does what control asks.
    #[cold]
    pub(super) fn serve(&mut self) {
        // Whoever set the mark before this sent its command before; whoever sends later sets the mark anew.
        self.waiting.swap(false, Ordering::AcqRel);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Install(sa, answer)) => {
                    // Control may have stopped waiting.
                    let _ = answer.try_send(self.engine.install(&sa));
                }
                Ok(Command::Remove(sa)) => self.engine.remove(sa),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SoftwareEngine;

    #[test]
    fn an_engine_is_taken_once_and_works_for_control_until_then() {
        let desk = Desk::new("e", 0, Box::new(SoftwareEngine::default()));
        assert_eq!(desk.while_here(|e| e.capabilities().name), Some("software"));
        let owner = desk.take().unwrap();
        assert!(desk.take().is_none());
        assert!(desk.while_here(|_| ()).is_none());
        assert!(!owner.is_asked());
    }

    #[test]
    fn a_worker_that_has_gone_is_said_to_be_silent() {
        let desk = Desk::new("e", 0, Box::new(SoftwareEngine::default()));
        drop(desk.take().unwrap());
        let id = SaId {
            index: 0,
            generation: 1,
        };
        let mut woken = false;
        desk.remove(id, || woken = true);
        assert!(!woken);
    }
}
