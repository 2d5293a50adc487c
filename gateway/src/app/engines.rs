//! From configured engines to opened ones.

use std::sync::Arc;
use std::time::Duration;

use pmd::airoha::Block;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::device::{Device, DeviceError};
use pmd::eip93::{Eip93Config, Eip93Engine, Eip93Error};
use pmd::engine::{Capabilities, EngineDead, EngineStats, EspEngine, EspJob, Refusal};
use pmd::qdma::{QdmaError, QdmaPlan};
use pmd::soe::{SoeConfig, SoeEngine, SoeError};
use pmd::{Arena, Pool};
use sa_store::cipher::CipherFactory;
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

use crate::config::{EngineAt, EngineConfig, EngineType};
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
        let engine = Split::around(driver(config, arena)?);
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
                let engine = driver(&again, &memory).map_err(|e| e.to_string())?;
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

fn driver(
    config: &EngineConfig,
    arena: &Arc<Arena>,
) -> Result<Box<dyn EspEngine>, EngineOpenError> {
    let (device, registers) = devices(&config.at)?;
    match config.kind {
        EngineType::Eip93(unknowns) => {
            let own = Eip93Config {
                unknowns,
                deadline: config.deadline,
                bring_up: BRING_UP,
                ..Eip93Config::default()
            };
            Ok(Box::new(Eip93Engine::open(device, arena, own)?))
        }
        EngineType::Soe(assume) => {
            let plans = vec![QdmaPlan::shared(0), QdmaPlan::shared(1)];
            let block = Block::new(&device, registers.as_ref(), plans, arena)?;
            let engine = block.engine(SoeConfig {
                assume,
                patience: config.deadline,
                most_lost: config.max_lost.into(),
                ..SoeConfig::default()
            })?;
            block.start()?;
            Ok(Box::new(Housed {
                engine,
                _block: block,
            }))
        }
    }
}

/// An SOE with its Ethernet block, which must live as long as the engine.
struct Housed {
    engine: SoeEngine,
    _block: Block,
}

impl EspEngine for Housed {
    fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        self.engine.install(sa)
    }

    fn remove(&mut self, sa: SaId) {
        self.engine.remove(sa);
    }

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        self.engine.submit(view, jobs, done);
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        self.engine.poll(done);
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn is_healthy(&self) -> bool {
        self.engine.is_healthy()
    }

    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.engine.reset(done)
    }

    fn reached(&self, sa: SaId) -> Option<u64> {
        self.engine.reached(sa)
    }

    fn stats(&self) -> Option<&Arc<EngineStats>> {
        self.engine.stats()
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
