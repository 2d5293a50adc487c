//! Ethernet blocks of the EN7581, each opened once for all that name it: its ports and its secure offload engine.

use std::sync::Arc;

use pmd::Arena;
use pmd::airoha::{AirohaPort, Block, PortOptions};
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::device::{Device, DeviceError};
use pmd::qdma::{QdmaError, QdmaPlan};
use pmd::soe::{Assumptions, SoeConfig, SoeEngine, SoeError};

use crate::config::{DeviceAt, EngineConfig, EngineType};

/// The blocks that are open.
#[derive(Default)]
pub(super) struct Blocks {
    open: Vec<Arc<Shared>>,
}

/// A block, and how to open it again.
pub(super) struct Shared {
    at: DeviceAt,
    block: Block,
}

impl Blocks {
    /// The block at `at`: opened now, or the one that is open. `engines` are all that are configured, as an engine's settings
    /// decide about the rings that its requests take.
    pub(super) fn get(
        &mut self,
        at: &DeviceAt,
        engines: &[EngineConfig],
        arena: &Arc<Arena>,
    ) -> Result<Arc<Shared>, QdmaError> {
        if let Some(open) = self.open.iter().find(|s| s.at.is_same(at)) {
            return Ok(Arc::clone(open));
        }
        let engine = engines.iter().find_map(|e| match e.kind {
            EngineType::Soe(assume) if e.at.is_same(at) => Some((e.at.clone(), assume)),
            _ => None,
        });
        // The engine's entry may name registers elsewhere.
        let (at, assume) = engine.unwrap_or((at.clone(), Assumptions::default()));
        let shared = Shared::open(&at, &assume, arena)?;
        self.open.push(Arc::clone(&shared));
        Ok(shared)
    }

    /// Starts those that nothing else has started.
    pub(super) fn start(&self) -> Result<(), QdmaError> {
        self.open.iter().try_for_each(|s| s.block.start())
    }
}

impl Shared {
    fn open(
        at: &DeviceAt,
        assume: &Assumptions,
        arena: &Arc<Arena>,
    ) -> Result<Arc<Shared>, QdmaError> {
        let (device, registers) = devices(at)?;
        let plan = |instance| QdmaPlan::shared(instance, assume.ring, assume.lossless);
        let block = Block::new(&device, registers.as_ref(), vec![plan(0), plan(1)], arena)?;
        tracing::info!(
            device = block.name(),
            "Ethernet block open: experimental, no board has run its driver"
        );
        let at = at.clone();
        Ok(Arc::new(Shared { at, block }))
    }

    /// One of its ports.
    pub(super) fn port(&self, options: PortOptions) -> AirohaPort {
        self.block.port(options)
    }

    /// Its engine, running.
    pub(super) fn engine(&self, config: SoeConfig) -> Result<SoeEngine, SoeError> {
        let engine = self.block.engine(config)?;
        self.block.start()?;
        Ok(engine)
    }

    /// Its engine, after the device was gone. The ports go on with the new device, too.
    pub(super) fn engine_again(&self, config: SoeConfig) -> Result<SoeEngine, SoeError> {
        let (device, registers) = devices(&self.at)?;
        self.block.reopen(&device, registers.as_ref())?;
        // Ports go on whatever becomes of the engine.
        let engine = self.block.engine(config);
        self.block.start()?;
        engine
    }
}

type Devices = (Arc<dyn Device>, Option<Arc<dyn Device>>);

/// Opens a device, and the one that holds its engine's registers, where that is another.
pub(super) fn devices(at: &DeviceAt) -> Result<Devices, DeviceError> {
    match at {
        DeviceAt::Socket(path) => Ok((Arc::new(VfioUserDevice::connect(path)?), None)),
        DeviceAt::Platform {
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
