//! From configured engines to opened ones.

use std::sync::Arc;
use std::time::Duration;

use pmd::device::DeviceError;
use pmd::eip93::{Eip93Config, Eip93Engine, Eip93Error};
use pmd::engine::EspEngine;
use pmd::qdma::QdmaError;
use pmd::soe::{SoeConfig, SoeError};
use pmd::{Arena, Pool};
use sa_store::cipher::CipherFactory;

use super::blocks::{Blocks, Shared, devices};
use crate::config::{EngineConfig, EngineType};
use crate::engine::trust::{EngineWatch, TrustClock, TrustConfig, Trusted};
use crate::engine::{Desk, Split};

/// Frames in stock for canaries.
const FRAMES: usize = 16;
/// What an operation of an EIP-93's bring-up may take. Nobody waits for it once packets flow, and a model is a process that the
/// system may keep waiting.
const BRING_UP: Duration = Duration::from_secs(1);

/// Why an engine could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EngineOpenError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// EIP-93.
    #[error(transparent)]
    Eip93(#[from] Eip93Error),
    /// SOE.
    #[error(transparent)]
    Soe(#[from] SoeError),
    /// The rings in front of an SOE.
    #[error(transparent)]
    Qdma(#[from] QdmaError),
    /// No thread to bring it back from quarantine.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Opened engines, by their places in the configuration.
#[derive(Default)]
pub struct OpenEngines {
    /// Where control and workers meet for each.
    pub desks: Vec<Arc<Desk>>,
    /// What is told of each.
    pub watches: Vec<EngineWatch>,
    /// Blocks that ports and engines share.
    pub(super) blocks: Blocks,
}

impl OpenEngines {
    /// Opens one more, and asks it known answers. SA indexes from `first_private` on are not the store's.
    ///
    /// # Errors
    /// See [`EngineOpenError`].
    pub fn open(
        &mut self,
        config: &EngineConfig,
        arena: &Arc<Arena>,
        ciphers: &Arc<dyn CipherFactory>,
        first_private: u32,
    ) -> Result<(), EngineOpenError> {
        let block = match config.kind {
            EngineType::Soe(_) => {
                let engines = std::slice::from_ref(config);
                Some(self.blocks.get(&config.at, engines, arena)?)
            }
            EngineType::Eip93(_) => None,
        };
        let engine = Split::around(driver(config, arena, block.as_ref(), Again::No)?);
        tracing::info!(engine = %config.name, kind = engine.capabilities().name, worker = config.worker, "engine open");
        let trust = TrustConfig {
            canaries: config.canary,
            sample_out: one_in(config.verify),
            sample_in: one_in(config.verify),
            most_lost: config.max_lost.into(),
            // The driver is to notice first.
            deadline: config.deadline + Duration::from_secs(1),
            ..TrustConfig::new(&config.name, first_private)
        };
        let (again, memory) = (config.clone(), Arc::clone(arena));
        let trusted = Trusted::with_reopen(
            engine,
            trust,
            Pool::new(arena, FRAMES),
            Arc::clone(ciphers),
            TrustClock::real(),
            Some(Box::new(move || {
                let engine = driver(&again, &memory, block.as_ref(), Again::Yes)
                    .map_err(|e| e.to_string())?;
                Ok(Split::around(engine))
            })),
        )?;
        self.watches.push(trusted.watch());
        self.desks
            .push(Desk::new(&config.name, config.worker, Box::new(trusted)));
        Ok(())
    }
}

/// One packet in so many, for a part of all.
fn one_in(part: f64) -> u32 {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the cast saturates"
    )]
    match part {
        p if p > 0.0 => (1.0 / p).round() as u32,
        _ => 0,
    }
}

/// Opens the driver; `block` is an SOE's.
fn driver(
    config: &EngineConfig,
    arena: &Arc<Arena>,
    block: Option<&Arc<Shared>>,
    again: Again,
) -> Result<Box<dyn EspEngine>, EngineOpenError> {
    match (config.kind, block) {
        (EngineType::Soe(assume), Some(shared)) => {
            let own = SoeConfig {
                assume,
                patience: config.deadline,
                most_lost: config.max_lost.into(),
                ..SoeConfig::default()
            };
            Ok(Box::new(match again {
                Again::No => shared.engine(own)?,
                Again::Yes => shared.engine_again(own)?,
            }))
        }
        (EngineType::Eip93(unknowns), _) => {
            let own = Eip93Config {
                unknowns,
                deadline: config.deadline,
                bring_up: BRING_UP,
                ..Eip93Config::default()
            };
            let (device, _) = devices(&config.at)?;
            Ok(Box::new(Eip93Engine::open(device, arena, own)?))
        }
        (EngineType::Soe(_), None) => Err(SoeError::Taken.into()),
    }
}

/// Whether the device was open before.
#[derive(Clone, Copy)]
enum Again {
    No,
    Yes,
}
