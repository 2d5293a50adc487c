//! From configured engines to opened ones.

use std::sync::Arc;

use pmd::Arena;
use pmd::airoha::Block;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::device::{Device, DeviceError};
use pmd::eip93::{Eip93Config, Eip93Engine, Eip93Error};
use pmd::engine::EspEngine;
use pmd::qdma::{QdmaError, QdmaPlan};
use pmd::soe::{SoeConfig, SoeError};

use crate::config::{EngineAt, EngineConfig, EngineType};
use crate::engine::Desk;

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
}

/// Opened engines, by their places in the configuration.
#[derive(Default)]
pub struct OpenEngines {
    /// Where control and workers meet for each.
    pub desks: Vec<Arc<Desk>>,
    /// What lies between engine and memory must live as long.
    pub blocks: Vec<Block>,
}

impl OpenEngines {
    /// Opens one more.
    ///
    /// # Errors
    /// See [`EngineOpenError`].
    pub fn open(
        &mut self,
        config: &EngineConfig,
        arena: &Arc<Arena>,
    ) -> Result<(), EngineOpenError> {
        let (device, registers) = devices(&config.at)?;
        let engine: Box<dyn EspEngine> = match config.kind {
            EngineType::Eip93(unknowns) => {
                let own = Eip93Config {
                    unknowns,
                    ..Eip93Config::default()
                };
                Box::new(Eip93Engine::open(device, arena, own)?)
            }
            EngineType::Soe(assume) => {
                let plans = vec![QdmaPlan::shared(0), QdmaPlan::shared(1)];
                let block = Block::new(&device, registers.as_ref(), plans, arena)?;
                let engine = block.engine(SoeConfig {
                    assume,
                    most_lost: config.max_lost.into(),
                    ..SoeConfig::default()
                })?;
                block.start()?;
                self.blocks.push(block);
                Box::new(engine)
            }
        };
        tracing::info!(engine = %config.name, kind = engine.capabilities().name, worker = config.worker, "engine open");
        self.desks
            .push(Desk::new(&config.name, config.worker, engine));
        Ok(())
    }
}

type Devices = (Arc<dyn Device>, Option<Arc<dyn Device>>);

fn devices(at: &EngineAt) -> Result<Devices, DeviceError> {
    match at {
        EngineAt::Socket(path) => Ok((Arc::new(VfioUserDevice::connect(path)?), None)),
        EngineAt::Platform {
            device,
            registers,
            no_iommu,
        } => {
            let protection = if *no_iommu {
                Protection::NoIommu
            } else {
                Protection::Iommu
            };
            let open = |name: &str| -> Result<Arc<dyn Device>, DeviceError> {
                Ok(Arc::new(VfioDevice::platform(name, protection)?))
            };
            let registers = registers.as_deref().map(open).transpose()?;
            Ok((open(device)?, registers))
        }
    }
}
