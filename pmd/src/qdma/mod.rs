//! QDMA: the descriptor rings through which the CPU of Airoha's EN7581 gives frames to its packet switch and gets them.
//!
//! One instance has 32 transmit and 32 receive rings of 32-byte descriptors, two queues of transmit reports, and a pool of
//! buffers for forwarding without the CPU, which must exist though it is not used here. All addresses are 32 bits.
//!
//! What reaches the Ethernet ports and the secure offload engine ([`crate::soe`]) are the same rings: see [`hub::Hub`].
//! The facts are those of the public Linux driver; no datasheet is public.

mod descriptor;
pub mod hop;
pub mod hub;
mod interrupts;
pub(crate) mod player;
mod regs;
mod rx;
mod tx;

#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::counters::Counter;

pub use descriptor::{DESCRIPTOR, PsePort, RxMsg, TxMsg};
pub use interrupts::Events;
pub use regs::{RINGS, WINDOW};
pub use rx::{Received, RxFault};
pub use tx::Sent;

use crate::arena::Arena;
use crate::device::cache;
use crate::device::{ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio};
use crate::frame::Frame;
use crate::pool::Pool;
use rx::RxRing;
use tx::{Reports, TxRing};

/// Buffers for forwarding without the CPU: contiguous, so within one 2 MiB page. Nothing is forwarded through them here.
const FORWARD_BYTES: usize = 1 << 20;
const FORWARD_LOW: u32 = 128;
/// As the public driver waits.
const FORWARD_PATIENCE: Duration = Duration::from_millis(30);
const STOP_PATIENCE: Duration = Duration::from_millis(50);
/// A ring that gave nothing this often is looked at only every [`LOOK_EVERY`]th poll.
const IDLE_AFTER: u32 = 64;
const LOOK_EVERY: u32 = 16;

/// Why the driver gave up.
#[derive(Debug, thiserror::Error)]
pub enum QdmaError {
    /// The device layer refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Not a power of two, or out of range: a fault of the configuration.
    #[error("a ring of {0} descriptors")]
    RingSize(u32),
    /// A ring beyond the 32, or named twice: a fault of the configuration.
    #[error("ring {0} does not exist or is named twice")]
    Ring(u8),
    /// Memory lies above 4 GiB, where the device cannot reach.
    #[error("address {0:#x} is beyond the device's 32 bits")]
    Address(u64),
    /// The registers do not hold what was written: no QDMA here.
    #[error("no QDMA answers: {0}")]
    Absent(&'static str),
}

/// One transmit ring to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxPlan {
    /// Number, below 32.
    pub ring: u8,
    /// The device waits instead of dropping when the packet switch is full.
    pub lossless: bool,
    /// Queue of transmit reports, 0 or 1.
    pub reports: u8,
}

/// Rings of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QdmaPlan {
    /// 0 serves the LAN ports, 1 the WAN port.
    pub instance: u8,
    /// Transmit rings.
    pub tx: Vec<TxPlan>,
    /// Receive rings and how many descriptors (a power of two) each has.
    pub rx: Vec<(u8, u16)>,
    /// Whether queues of the packet switch that are congested drop. The public driver wants that; whether it drops requests
    /// to the secure offload engine too is not known.
    pub congestion_drop: bool,
}

impl QdmaPlan {
    /// For the secure offload engine and the ports of an instance: ring `requests` (2 in the public drivers) for requests, that
    /// waits (`lossless`) or drops, with reports of its own, ring 0 for frames. All receive rings on which the public drivers
    /// expect anything; results were seen on ring 1, which must be long.
    pub fn shared(instance: u8, requests: u8, lossless: bool) -> QdmaPlan {
        let mut rx: Vec<(u8, u16)> = (0..=10).map(|ring| (ring, 64)).collect();
        rx[0].1 = 256;
        rx[1].1 = 1024;
        rx.push((15, 64));
        let frames = TxPlan {
            ring: 0,
            lossless: lossless && requests == 0,
            reports: 0,
        };
        let requests = TxPlan {
            ring: requests,
            lossless,
            reports: 1,
        };
        QdmaPlan {
            instance,
            tx: match requests.ring {
                0 => vec![frames],
                _ => vec![frames, requests],
            },
            rx,
            congestion_drop: false,
        }
    }
}

/// What happened, by rule. Written by the owner.
#[derive(Debug, Default)]
pub struct QdmaCounters {
    /// Doorbells written.
    pub doorbells: Counter,
    /// Frames that the device threw away instead of sending.
    pub tx_dropped: Counter,
    /// Transmit reports that name what does not exist.
    pub bad_reports: Counter,
    /// Frames lost by overflow, as the device says.
    pub rx_overflow: Counter,
    /// Frames longer than a buffer.
    pub rx_too_long: Counter,
    /// Lengths that cannot be.
    pub rx_bad_length: Counter,
    /// Times that a receive ring had no buffer.
    pub rx_starved: Counter,
}

/// One instance, owned by one thread.
pub struct Qdma {
    device: Arc<dyn Device>,
    regs: Mmio,
    map: ArenaMap,
    plan: QdmaPlan,
    tx: Vec<TxRing>,
    rx: Vec<RxRing>,
    reports: Vec<Reports>,
    forward: Forward,
    polls: u32,
    running: bool,
    coherent: bool,
    counters: Arc<QdmaCounters>,
}

struct Forward {
    buffers: DmaMem,
    descriptors: DmaMem,
    payload: u32,
}

impl Qdma {
    /// Allocates the rings; the device is left alone until [`Qdma::start`].
    ///
    /// # Errors
    /// See [`QdmaError`].
    pub fn new(
        device: &Arc<dyn Device>,
        regs: Mmio,
        plan: QdmaPlan,
        arena: &Arc<Arena>,
    ) -> Result<Qdma, QdmaError> {
        check_rings(plan.tx.iter().map(|t| t.ring))?;
        check_rings(plan.rx.iter().map(|r| r.0))?;
        if regs.len() < WINDOW {
            return Err(QdmaError::Absent("register window"));
        }
        let map = device.map_arena_in(arena, IovaClass::Below4G)?;
        let tx = plan
            .tx
            .iter()
            .map(|t| TxRing::new(&**device, t.ring, arena))
            .collect::<Result<_, _>>()?;
        let rx = plan
            .rx
            .iter()
            .map(|&(ring, entries)| RxRing::new(&**device, ring, entries, arena))
            .collect::<Result<_, _>>()?;
        let reports = (0..2)
            .map(|i| Reports::new(&**device, i))
            .collect::<Result<_, _>>()?;
        Ok(Qdma {
            forward: Forward::new(&**device, plan.instance)?,
            device: Arc::clone(device),
            regs,
            map,
            plan,
            tx,
            rx,
            reports,
            polls: 0,
            running: false,
            coherent: device.is_coherent(),
            counters: Arc::default(),
        })
    }

    /// Initialises the instance in the order of the public driver and lets it run. Frames for the receive rings come from
    /// `pool`.
    ///
    /// # Errors
    /// [`QdmaError::Absent`] when registers do not answer as they should, [`DeviceError::Timeout`].
    pub fn start(&mut self, pool: &mut Pool) -> Result<(), QdmaError> {
        self.halt()?;
        interrupts::silence(&self.regs);
        for ring in &mut self.rx {
            ring.start(&self.regs, &self.map, pool)?;
        }
        for reports in &mut self.reports {
            reports.start(&self.regs)?;
        }
        for (ring, plan) in self.tx.iter_mut().zip(&self.plan.tx) {
            ring.start(&self.regs, plan.lossless, usize::from(plan.reports & 1))?;
        }
        self.forward.start(&self.regs)?;
        let drop = self.regs.read32(regs::CONGESTION_DROP) & !regs::CONGESTION_DROP_EN;
        let enable = if self.plan.congestion_drop {
            regs::CONGESTION_DROP_EN
        } else {
            0
        };
        self.regs.write32(regs::CONGESTION_DROP, drop | enable);
        self.regs.write32(regs::GLOBAL_CFG, regs::GLOBAL_CFG_BASE);
        if self.regs.read32(regs::GLOBAL_CFG) & !(regs::TX_DMA_BUSY | regs::RX_DMA_BUSY)
            != regs::GLOBAL_CFG_BASE
        {
            return Err(QdmaError::Absent("global configuration"));
        }
        self.device.set_bus_master(true)?;
        self.running = true;
        self.regs.write32(
            regs::GLOBAL_CFG,
            regs::GLOBAL_CFG_BASE | regs::TX_DMA_EN | regs::RX_DMA_EN,
        );
        Ok(())
    }

    /// Which instance it is.
    pub fn instance(&self) -> u8 {
        self.plan.instance
    }

    /// Counters, to keep and read from anywhere.
    pub fn counters(&self) -> &Arc<QdmaCounters> {
        &self.counters
    }

    /// Goes on with the counters of an instance whose place this one takes.
    pub(crate) fn count_on(&mut self, counters: &Arc<QdmaCounters>) {
        self.counters = Arc::clone(counters);
    }

    /// Free descriptors of a transmit ring; 0 for one that is not planned.
    pub fn room(&self, ring: u8) -> u32 {
        let ring = self.tx.iter().find(|t| t.number == ring);
        ring.filter(|_| self.running).map_or(0, TxRing::room)
    }

    /// Puts a frame into a transmit ring; [`Qdma::kick`] tells the device. The frame comes back when the ring is full, not
    /// planned, or the device cannot reach the frame.
    ///
    /// # Errors
    /// The frame.
    pub fn send(&mut self, ring: u8, frame: Frame, msg: TxMsg, cookie: u64) -> Result<(), Frame> {
        if !self.running {
            return Err(frame);
        }
        match self.tx.iter_mut().find(|t| t.number == ring) {
            Some(ring) => {
                if !self.coherent {
                    cache::clean(frame.data_ptr(), frame.len());
                }
                ring.push(&self.map, frame, msg, cookie)
            }
            None => Err(frame),
        }
    }

    /// One doorbell for each ring with new frames.
    pub fn kick(&mut self) {
        for ring in &mut self.tx {
            if ring.kick(&self.regs) {
                self.counters.doorbells.add(1);
            }
        }
    }

    /// Takes back what was sent; `each` learns of every frame.
    pub fn reap(&mut self, pool: &mut Pool, each: &mut impl FnMut(Sent)) {
        let counters = Arc::clone(&self.counters);
        let each = &mut |sent: Sent| {
            if sent.dropped {
                counters.tx_dropped.add(1);
            }
            each(sent);
        };
        let mut due = [false; 2];
        for (ring, plan) in self.tx.iter_mut().zip(&self.plan.tx) {
            let freed = ring.reap(pool, each);
            let index = usize::from(plan.reports & 1);
            if freed > 0 {
                due[index] |= self.reports[index].due(freed);
            }
        }
        for (reports, due) in self.reports.iter_mut().zip(due) {
            if due {
                reports.drain(&self.regs, &mut self.tx, pool, &self.counters, each);
            }
        }
    }

    /// Takes every report off its queue, also when few are there. For idle moments.
    pub fn settle(&mut self, pool: &mut Pool, each: &mut impl FnMut(Sent)) {
        self.reap(pool, each);
        for reports in &mut self.reports {
            reports.drain(&self.regs, &mut self.tx, pool, &self.counters, each);
        }
    }

    /// Gives up to `max` received frames of each ring to `each` and fills the rings again.
    pub fn poll(
        &mut self,
        pool: &mut Pool,
        max: usize,
        each: &mut impl FnMut(&mut Pool, Received),
    ) -> usize {
        if !self.running {
            return 0;
        }
        self.polls = self.polls.wrapping_add(1);
        let all = self.polls.is_multiple_of(LOOK_EVERY);
        let counters = &self.counters;
        let each = &mut |pool: &mut Pool, r: Received| {
            match r.fault {
                None => {}
                Some(RxFault::Overflow) => counters.rx_overflow.add(1),
                Some(RxFault::TooLong) => counters.rx_too_long.add(1),
                Some(RxFault::Length) => counters.rx_bad_length.add(1),
            }
            each(pool, r);
        };
        let mut found = 0;
        for ring in &mut self.rx {
            if all || ring.idle < IDLE_AFTER {
                found += ring.poll(pool, max, each);
                ring.refill(&self.regs, &self.map, pool);
            }
        }
        found
    }

    /// What the interrupt status says since the last call; `None` when the device is gone. Reads registers: for every few
    /// milliseconds.
    pub fn events(&mut self) -> Option<Events> {
        let events = interrupts::take(&self.regs)?;
        self.counters
            .rx_starved
            .add(u64::from(events.rx_starved.count_ones()));
        Some(events)
    }

    /// Lets "frame received" interrupts of `rings` (by bit) of a bank (0 to 3) through, for workers that sleep.
    pub fn enable_rx_interrupts(&mut self, bank: usize, rings: u32) {
        if bank < regs::BANKS {
            interrupts::enable_rx(&self.regs, bank, rings);
        }
    }

    /// Frames in transmit rings.
    pub fn sending(&self) -> u32 {
        self.tx.iter().map(TxRing::held).sum()
    }

    /// Stops the device and takes all frames back. When it does not stop they stay lost, as it may still use them.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`] when it does not stop.
    pub fn stop(&mut self, pool: &mut Pool) -> Result<(), QdmaError> {
        self.halt()?;
        interrupts::silence(&self.regs);
        for ring in &mut self.tx {
            ring.forget(&self.regs);
            // SAFETY: both DMA engines are off and idle.
            unsafe { ring.reclaim(pool) };
        }
        for ring in &mut self.rx {
            ring.forget(&self.regs);
            // SAFETY: as above.
            unsafe { ring.reclaim(pool) };
        }
        Ok(())
    }

    /// Whether the device may use its rings.
    pub fn is_running(&self) -> bool {
        self.running
    }

    fn halt(&mut self) -> Result<(), QdmaError> {
        self.regs.write32(regs::GLOBAL_CFG, regs::GLOBAL_CFG_BASE);
        let begin = Instant::now();
        while self.regs.read32(regs::GLOBAL_CFG) & (regs::TX_DMA_BUSY | regs::RX_DMA_BUSY) != 0 {
            if begin.elapsed() > STOP_PATIENCE {
                return Err(DeviceError::Timeout("QDMA to stop").into());
            }
            std::hint::spin_loop();
        }
        self.running = false;
        Ok(())
    }
}

impl Drop for Qdma {
    /// The device must not be left with addresses of rings whose memory is free.
    fn drop(&mut self) {
        if self.halt().is_err() && self.device.set_bus_master(false).is_err() {
            tracing::error!(device = self.device.name(), "QDMA does not stop");
        }
    }
}

impl Forward {
    fn new(device: &dyn Device, instance: u8) -> Result<Forward, QdmaError> {
        let (size, payload) = match instance {
            0 => (2048, regs::FWD_PAYLOAD_2K),
            _ => (1024, regs::FWD_PAYLOAD_1K),
        };
        let count = FORWARD_BYTES / size;
        Ok(Forward {
            buffers: device.dma_alloc(FORWARD_BYTES, 4096, IovaClass::Below4G)?,
            descriptors: device.dma_alloc(count * DESCRIPTOR, 4096, IovaClass::Below4G)?,
            payload,
        })
    }

    fn start(&self, regs: &Mmio) -> Result<(), QdmaError> {
        let count = u32::try_from(self.descriptors.len() / DESCRIPTOR).unwrap_or(0);
        regs.write32(regs::FWD_BUF_BASE, low(self.buffers.iova())?);
        regs.write32(regs::FWD_DSCP_BASE, low(self.descriptors.iova())?);
        let cfg = regs.read32(regs::HW_FWD_DSCP_CFG) & !(3 << 28);
        regs.write32(regs::HW_FWD_DSCP_CFG, cfg | self.payload);
        regs.write32(regs::FWD_DSCP_LOW_THR, FORWARD_LOW.min(count / 4));
        regs.write32(
            regs::LMGR_INIT_CFG,
            regs::LMGR_START | regs::LMGR_SRAM | count,
        );
        let begin = Instant::now();
        while regs.read32(regs::LMGR_INIT_CFG) & regs::LMGR_START != 0 {
            if begin.elapsed() > FORWARD_PATIENCE {
                return Err(DeviceError::Timeout("QDMA forward buffers").into());
            }
            std::hint::spin_loop();
        }
        Ok(())
    }
}

fn check_rings(rings: impl Iterator<Item = u8>) -> Result<(), QdmaError> {
    let mut seen = 0u32;
    for ring in rings {
        if ring >= RINGS || seen >> ring & 1 == 1 {
            return Err(QdmaError::Ring(ring));
        }
        seen |= 1 << ring;
    }
    Ok(())
}

/// An address for a 32-bit register.
fn low(iova: u64) -> Result<u32, QdmaError> {
    u32::try_from(iova).map_err(|_| QdmaError::Address(iova))
}
