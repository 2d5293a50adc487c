//! The Ethernet block of Airoha's EN7581 as one device: two QDMA instances, the ports behind them, the secure offload engine.
//!
//! **Experimental: no board has run this.** The registers of the packet switch, the MACs and the PHYs are not public beyond
//! what `deploy/en7581.md` lists, so the block is taken over as the kernel's driver left it: the kernel brings links up and
//! configures the packet switch, then the device is handed over. What is done here: the rings, and the one setting of the
//! packet switch that the engine needs.
//!
//! All of a block belongs to one worker ([`crate::qdma::hub`]). A device that is gone can be opened anew under its ports:
//! [`Block::reopen`].

mod port;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use port::{AirohaPort, Gdm, PortOptions};

use crate::arena::Arena;
use crate::device::{Device, DeviceError, Mmio};
use crate::nic::{Link, NicControl};
use crate::qdma::hub::{Hub, SharedHub};
use crate::qdma::{Qdma, QdmaCounters, QdmaError, QdmaPlan};
use crate::quiesce;
use crate::soe::{SoeConfig, SoeEngine, SoeError};

/// Regions of the Ethernet device: packet switch, the QDMA instances, and, where it is not a device of its own, the engine.
const REGION_FE: u32 = 0;
const REGION_QDMA: [u32; 2] = [1, 2];
const REGION_SOE: u32 = 3;
/// Packet switch: flow control. Bit 23 keeps port 7 from the shared buffer.
const PSE_FC_CFG: usize = 0x0098;
const PORT7_SHARED_OFF: u32 = 1 << 23;
/// QDMA's global configuration, for the panic hook.
const GLOBAL_CFG: usize = 0x0004;
const DMA_ENABLES: u32 = 1 | 1 << 2;

/// A block that this process owns.
pub struct Block {
    name: String,
    plans: Vec<QdmaPlan>,
    arena: Arc<Arena>,
    windows: Mutex<Windows>,
    hub: SharedHub,
    control: Arc<BlockControl>,
}

/// Registers beside the rings', of the device that is open.
struct Windows {
    /// Kept: it ends with its last handle.
    _device: Arc<dyn Device>,
    fe: Mmio,
    soe: Option<Mmio>,
}

impl Block {
    /// Takes the block's rings. `soe` is the engine's own device, where it has one. Nothing runs until [`Block::start`].
    ///
    /// # Errors
    /// Regions that are missing, memory that the device cannot reach.
    pub fn new(
        device: &Arc<dyn Device>,
        soe: Option<&Arc<dyn Device>>,
        plans: Vec<QdmaPlan>,
        arena: &Arc<Arena>,
    ) -> Result<Block, QdmaError> {
        let windows = Windows::of(device, soe)?;
        let (qdmas, regs) = rings(device, &plans, arena)?;
        let hub = Hub::new(qdmas, arena);
        let control = Arc::new(BlockControl {
            regs: Mutex::new(regs),
            counters: hub.counters(),
            restart: AtomicBool::new(false),
        });
        let as_control: Arc<dyn NicControl> = Arc::clone(&control) as _;
        quiesce::register(device, Some(&as_control));
        Ok(Block {
            name: device.name().to_owned(),
            plans,
            arena: Arc::clone(arena),
            windows: Mutex::new(windows),
            hub: hub.share(),
            control,
        })
    }

    /// Goes on with the same block, opened anew after it was gone: new rings under the ports, which notice nothing but a gap.
    /// The engine of before has lost its place; [`Block::engine`] gives another. Nothing runs until [`Block::start`].
    ///
    /// # Errors
    /// As [`Block::new`]. The block is as it was then.
    pub fn reopen(
        &self,
        device: &Arc<dyn Device>,
        soe: Option<&Arc<dyn Device>>,
    ) -> Result<(), QdmaError> {
        let windows = Windows::of(device, soe)?;
        let (qdmas, regs) = rings(device, &self.plans, &self.arena)?;
        self.hub.lock().exchange(qdmas)?;
        *self.control.regs() = regs;
        *self.windows() = windows;
        let as_control: Arc<dyn NicControl> = Arc::clone(&self.control) as _;
        quiesce::register(device, Some(&as_control));
        Ok(())
    }

    /// The block's engine: one at a time. Before [`Block::start`].
    ///
    /// # Errors
    /// [`SoeError::Device`] when there is none or it does not answer, [`SoeError::Taken`].
    pub fn engine(&self, config: SoeConfig) -> Result<SoeEngine, SoeError> {
        let windows = self.windows();
        let missing = DeviceError::NoRegion { index: REGION_SOE };
        let regs = windows.soe.clone().ok_or(missing)?;
        let engine = SoeEngine::new(regs, self.hub.clone(), config)?;
        // Port 7 is the network processor's and Wi-Fi's too, so this is changed only where there is an engine.
        let flow = windows.fe.read32(PSE_FC_CFG);
        windows.fe.write32(PSE_FC_CFG, flow & !PORT7_SHARED_OFF);
        Ok(engine)
    }

    /// A port of the block.
    pub fn port(&self, options: PortOptions) -> AirohaPort {
        AirohaPort::new(self.hub.clone(), Arc::clone(&self.control), options)
    }

    /// Starts the rings, where they do not run yet.
    ///
    /// # Errors
    /// See [`QdmaError`].
    pub fn start(&self) -> Result<(), QdmaError> {
        let mut hub = self.hub.lock();
        if hub.is_running() {
            return Ok(());
        }
        hub.start()
    }

    /// The rings, for an engine or port that is set up by hand.
    pub fn hub(&self) -> &SharedHub {
        &self.hub
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Windows {
    fn of(device: &Arc<dyn Device>, soe: Option<&Arc<dyn Device>>) -> Result<Windows, DeviceError> {
        let soe = match soe {
            Some(own) => Some(own.region(0)?),
            None => match device.region(REGION_SOE) {
                Ok(region) => Some(region),
                Err(DeviceError::NoRegion { .. }) => None,
                Err(e) => return Err(e),
            },
        };
        Ok(Windows {
            _device: Arc::clone(device),
            fe: device.region(REGION_FE)?,
            soe,
        })
    }
}

/// The instances of a device, and their registers.
fn rings(
    device: &Arc<dyn Device>,
    plans: &[QdmaPlan],
    arena: &Arc<Arena>,
) -> Result<(Vec<Qdma>, Vec<Mmio>), QdmaError> {
    let mut qdmas = Vec::new();
    let mut regs = Vec::new();
    for plan in plans {
        let region = REGION_QDMA
            .get(usize::from(plan.instance))
            .ok_or(QdmaError::Absent("third instance"))?;
        let window = device.region(*region)?;
        regs.push(window.clone());
        qdmas.push(Qdma::new(device, window, plan.clone(), arena)?);
    }
    Ok((qdmas, regs))
}

/// Control's view of the block.
struct BlockControl {
    /// Held for a moment by who opens the device anew.
    regs: Mutex<Vec<Mmio>>,
    counters: Vec<Arc<QdmaCounters>>,
    restart: AtomicBool,
}

impl BlockControl {
    /// Whether somebody asked for new rings since the last call.
    fn take_restart(&self) -> bool {
        self.restart.load(Relaxed) && self.restart.swap(false, Relaxed)
    }

    fn regs(&self) -> MutexGuard<'_, Vec<Mmio>> {
        self.regs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sum(&self, each: impl Fn(&QdmaCounters) -> u64) -> u64 {
        self.counters.iter().map(|c| each(c)).sum()
    }
}

impl NicControl for BlockControl {
    /// The MACs stay with the kernel: the link cannot be seen from here and counts as up.
    fn link(&self) -> Link {
        Link {
            up: true,
            mbps: 0,
            full_duplex: true,
        }
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("doorbells", self.sum(|c| c.doorbells.value())),
            ("tx_dropped", self.sum(|c| c.tx_dropped.value())),
            ("rx_overflow", self.sum(|c| c.rx_overflow.value())),
            ("rx_too_long", self.sum(|c| c.rx_too_long.value())),
            ("rx_starved", self.sum(|c| c.rx_starved.value())),
        ]
    }

    fn device_errors(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("transmit_report", self.sum(|c| c.bad_reports.value())),
            ("receive_length", self.sum(|c| c.rx_bad_length.value())),
        ]
    }

    fn set_promiscuous(&self, _on: bool) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("choice of what is received"))
    }

    fn request_reset(&self) {
        self.restart.store(true, Relaxed);
    }

    fn quiesce(&self) {
        // Whoever holds it is opening a device whose rings do not run yet.
        let Ok(all) = self.regs.try_lock() else {
            return;
        };
        for regs in all.iter() {
            let cfg = regs.read32(GLOBAL_CFG);
            regs.write32(GLOBAL_CFG, cfg & !DMA_ENABLES);
        }
    }
}
