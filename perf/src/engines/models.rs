//! Models of engines on threads of this process, reached as a driver reaches them anywhere: over a vfio-user socket.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use esplanade_model::eip93::{self, Eip93};
use esplanade_model::soe::{self, Soe};
use esplanade_model::{KnobArgs, Knobs, Model, Running, Server};
use gateway::config::{DeviceAt, EngineConfig, EngineType};
use tempfile::TempDir;

use crate::machine;

/// Engines that there are models of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// EIP-93.
    Eip93,
    /// Airoha's secure offload engine behind its QDMA.
    Soe,
}

/// A model that runs until this is dropped.
pub(super) struct Modelled {
    _running: Running,
    _dir: TempDir,
}

/// Starts models on another CPU than the driver's, where there is one.
pub(super) fn start(
    kinds: &[Kind],
    knobs: &KnobArgs,
) -> Result<(Vec<EngineConfig>, Vec<Modelled>)> {
    let own = machine::pinned();
    // Threads begin where their parent is.
    let other = machine::allowed().iter().find(|cpu| Some(**cpu) != own);
    if own.is_some() {
        machine::pin(other.copied());
    }
    let started = kinds.iter().map(|kind| serve(*kind, knobs)).collect();
    if own.is_some() {
        machine::pin(own);
    }
    let started: Result<Vec<_>> = started;
    Ok(started?.into_iter().unzip())
}

fn serve(kind: Kind, args: &KnobArgs) -> Result<(EngineConfig, Modelled)> {
    let knobs = Knobs::new(args);
    let (name, engine, model): (_, _, Box<dyn Model>) = match kind {
        Kind::Eip93 => (
            "eip93",
            EngineType::Eip93(pmd::eip93::Unknowns::default()),
            Box::new(Eip93::new(eip93::Switches::default(), Arc::clone(&knobs))),
        ),
        Kind::Soe => (
            "soe",
            EngineType::Soe(pmd::soe::Assumptions::default()),
            Box::new(Soe::new(soe::Switches::default(), Arc::clone(&knobs))),
        ),
    };
    let dir = tempfile::tempdir().context("a place for the model's socket")?;
    let path = dir.path().join(name);
    let running = Server::bind(&path)
        .and_then(|server| server.spawn(model))
        .with_context(|| format!("model of {name}"))?;
    let config = EngineConfig {
        name: name.into(),
        kind: engine,
        at: DeviceAt::Socket(path),
        worker: 0,
        verify: 0.0,
        canary: Duration::from_secs(1),
        max_lost: 100,
        deadline: Duration::from_secs(1),
    };
    let model = Modelled {
        _running: running,
        _dir: dir,
    };
    Ok((config, model))
}
