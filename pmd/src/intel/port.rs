//! What the families share above their registers: opening, link, statistics, reset and recovery, quiescing.
//!
//! # Recovery
//! Queues are owned by different workers, and a reset takes all of them at once. [`Shared::phase`] is even while the device
//! runs. Whoever finds an error makes it odd; each queue that sees this stops touching the device (parks); the last one to
//! park resets and initialises the device, rings empty, and makes the phase even again; then each queue takes the frames of
//! its old descriptors back and begins anew. Workers that sleep are woken by an interrupt.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::queue::IntelQueue;
use super::regs::Regs;
use super::ring::{DESCRIPTOR, Format, RING_MAX, RING_MIN, RxRing, TxRing};
use crate::arena::Arena;
use crate::device::{Device, DeviceError, IovaClass};
use crate::nic::attempts::Attempts;
use crate::nic::{Link, NicControl, NicOptions};
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, check_queues};

/// Ethernet header and one VLAN tag.
const FRAME_OVERHEAD: u32 = 18;
/// Smallest IP packet that every host must take (RFC 8200, section 5).
const MTU_MIN: u32 = 1280;
/// Descriptors in a ring when nobody asks.
const RING_DEFAULT: u32 = 512;
/// The phase after [`Shared::quiesce`], for good.
const CLOSED: u32 = u32::MAX;
/// No phase of a port, for queues that have not begun.
pub(super) const NO_PHASE: u32 = CLOSED - 1;

/// What a family's driver is for the rest.
pub(super) trait Chip: Send + Sync {
    /// Name of the driver.
    fn kind(&self) -> &'static str;
    /// The station address.
    fn mac(&self) -> MacAddr;
    /// Most queue pairs.
    fn queues(&self) -> usize;
    /// Largest frame in bytes, without the check sequence.
    fn largest_frame(&self) -> usize;
    /// Room that frames of up to `frame` bytes need behind the head-room, given the buffer sizes that the device can be told.
    fn room_needed(&self, frame: usize) -> usize;
    /// Descriptor formats.
    fn format(&self) -> Format;
    /// Whether checksums may be left to the device, with so many queues.
    fn completes_checksums(&self, queues: usize) -> bool {
        let _ = queues;
        true
    }
    fn regs(&self) -> &Regs;
    /// Tail registers of the queue's receive and transmit ring.
    fn tails(&self, queue: usize) -> (usize, usize);
    /// Resets and initialises the device; at the end it receives into and sends from rings that are still empty.
    fn start(&self, plan: &Plan) -> Result<(), DeviceError>;
    /// Stops receive and transmit and waits until the device's transfers are over. Takes no lock, allocates nothing.
    fn stop(&self) -> Result<(), DeviceError>;
    /// Applies which frames are received.
    fn set_filter(&self, filter: Filter) -> Result<(), DeviceError>;
    /// State of the link; `None` when the device does not answer.
    fn link(&self) -> Option<Link>;
    /// Something that only a reset mends.
    fn fault(&self) -> Option<Fault> {
        None
    }
    /// Lets the queue's interrupt through, or not.
    fn arm(&self, queue: usize, on: bool);
    /// Raises the interrupts of these queues, whether armed or not.
    fn wake(&self, queues: usize);
    /// Counters that reading clears.
    fn counters(&self) -> &'static [CounterRegister];
    /// Packets lost since the last call because the queue had no buffers.
    fn queue_drops(&self, queue: usize) -> u32;
}

/// What [`Chip::start`] works from.
#[derive(Debug)]
pub(super) struct Plan {
    /// Device addresses of each queue's receive and transmit ring.
    pub(super) rings: Vec<(u64, u64)>,
    pub(super) rx_entries: u16,
    pub(super) tx_entries: u16,
    /// Largest frame, without the check sequence.
    pub(super) frame: usize,
    /// Bytes behind the head-room of every frame.
    pub(super) room: usize,
    /// Whether interrupt vector n is queue n's.
    pub(super) msix: bool,
    /// Key of the receive hash.
    pub(super) rss_key: [u8; 40],
}

impl Plan {
    /// Bytes of a ring, as length registers take them.
    pub(super) fn ring_bytes(entries: u16) -> u32 {
        u32::from(entries) * 16
    }
}

/// Which frames are received beside those for the station and for everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
}

/// A counter of the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct CounterRegister {
    pub(super) name: &'static str,
    pub(super) offset: usize,
    pub(super) counts: Counts,
}

/// What a counter of the device means to [`crate::port::PortQueueStats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counts {
    Dropped,
    Errors,
    Other,
}

/// Rules that a device broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A register of all ones: the device does not answer.
    Gone,
    /// Descriptors that are not sent although the link is up.
    TransmitHang,
    /// The physical function was reset beneath its virtual functions.
    ParentReset,
    /// Receive or transmit is off although nobody here did that: the device was reset by somebody else.
    ForeignReset,
    /// The device could not be started again.
    Restart,
}

impl Fault {
    const ALL: [(Fault, &'static str); 5] = [
        (Fault::Gone, "no_answer"),
        (Fault::TransmitHang, "transmit_hang"),
        (Fault::ParentReset, "parent_reset"),
        (Fault::ForeignReset, "foreign_reset"),
        (Fault::Restart, "restart_failed"),
    ];
}

/// What the queues and control share.
pub(super) struct Shared {
    pub(super) name: String,
    device: Arc<dyn Device>,
    pub(super) chip: Box<dyn Chip>,
    plan: Mutex<Option<Plan>>,
    filter: Mutex<Filter>,
    /// Even: running. Odd: stopping for a reset. [`CLOSED`]: quiesced.
    phase: AtomicU32,
    queues: AtomicUsize,
    parked: AtomicUsize,
    /// Whether bus-master is off or the device is gone, so that its frames can be taken back.
    safe: AtomicBool,
    faults: [AtomicU64; Fault::ALL.len()],
    totals: Mutex<Vec<u64>>,
    /// Sums of the counters that mean loss and errors, for queue 0.
    dropped: AtomicU64,
    errors: AtomicU64,
    attempts: Attempts,
    /// New interrupt handles after a function-level reset.
    vectors: Mutex<Vec<Option<OwnedFd>>>,
}

/// What a queue finds when it looks at the phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Running(u32),
    Stopping(u32),
    Closed,
}

impl Shared {
    /// The phase, cheap enough for every burst.
    #[inline(always)]
    pub(super) fn phase_number(&self) -> u32 {
        self.phase.load(Ordering::Acquire)
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase_number() {
            CLOSED => Phase::Closed,
            n if n.is_multiple_of(2) => Phase::Running(n),
            n => Phase::Stopping(n),
        }
    }

    /// Notes that a rule was broken, and asks for a reset.
    pub(super) fn fail(&self, fault: Fault) {
        self.note(fault);
        tracing::error!(port = %self.name, ?fault, "device error: the device is reset");
        self.begin_reset();
    }

    fn note(&self, fault: Fault) {
        for ((known, _), counter) in Fault::ALL.iter().zip(&self.faults) {
            if *known == fault {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn begin_reset(&self) {
        let now = self.phase_number();
        // One reset at a time; whoever comes second finds an odd number.
        if now != CLOSED
            && now.is_multiple_of(2)
            && self
                .phase
                .compare_exchange(now, now + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            self.chip.wake(self.queues.load(Ordering::Relaxed));
        }
    }

    /// A queue has stopped touching the device. True for the last one, whose task the reset is.
    pub(super) fn park(&self) -> bool {
        self.parked.fetch_add(1, Ordering::AcqRel) + 1 == self.queues.load(Ordering::Acquire)
    }

    /// Resets the device, when all queues are parked; true when it runs again.
    pub(super) fn restart(&self, phase: u32) -> bool {
        let started = self.try_restart();
        if let Err(error) = &started {
            self.note(Fault::Restart);
            if let Some(attempts) = self.attempts.failed() {
                tracing::error!(port = %self.name, %error, attempts, "the device does not start again");
            }
            return false;
        }
        self.attempts.worked();
        self.parked.store(0, Ordering::Release);
        // Fails only when the port was closed meanwhile.
        let next = phase.wrapping_add(1) % NO_PHASE;
        if self
            .phase
            .compare_exchange(phase, next, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            self.quiesce();
            return false;
        }
        tracing::warn!(port = %self.name, "device reset and running again");
        true
    }

    fn try_restart(&self) -> Result<(), DeviceError> {
        let guard = lock(&self.plan);
        let Some(plan) = guard.as_ref() else {
            return Err(DeviceError::Unsupported("reset before the queues are open"));
        };
        if self.chip.link().is_none() {
            // Registers do not answer: only a reset of the function can help, which also takes the interrupts.
            self.device.reset()?;
            if plan.msix {
                *lock(&self.vectors) = fds(&self.device, plan.rings.len())?;
            }
        }
        self.device.set_bus_master(true)?;
        self.chip.start(plan)?;
        self.chip.set_filter(*lock(&self.filter))
    }

    /// The queue's new interrupt handle, if a reset made one.
    pub(super) fn new_vector(&self, queue: usize) -> Option<OwnedFd> {
        lock(&self.vectors).get_mut(queue).and_then(Option::take)
    }

    /// Whether the device can reach no memory any more, for good.
    pub(super) fn is_safe(&self) -> bool {
        self.safe.load(Ordering::Acquire)
    }

    /// Reads the device's counters and gives the sums of lost and broken packets.
    pub(super) fn collect(&self) -> (u64, u64) {
        let mut totals = lock(&self.totals);
        for (register, total) in self.chip.counters().iter().zip(totals.iter_mut()) {
            let value = self.chip.regs().read(register.offset);
            if value == u32::MAX {
                continue;
            }
            *total += u64::from(value);
            match register.counts {
                Counts::Dropped => &self.dropped,
                Counts::Errors => &self.errors,
                Counts::Other => continue,
            }
            .fetch_add(u64::from(value), Ordering::Relaxed);
        }
        (
            self.dropped.load(Ordering::Relaxed),
            self.errors.load(Ordering::Relaxed),
        )
    }
}

impl NicControl for Shared {
    fn link(&self) -> Link {
        self.chip.link().unwrap_or_default()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.collect();
        let totals = lock(&self.totals);
        let names = self.chip.counters().iter().map(|c| c.name);
        names.zip(totals.iter().copied()).collect()
    }

    fn device_errors(&self) -> Vec<(&'static str, u64)> {
        let names = Fault::ALL.iter().map(|(_, name)| *name);
        let counts = self.faults.iter().map(|f| f.load(Ordering::Relaxed));
        names.zip(counts).collect()
    }

    fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError> {
        let mut filter = lock(&self.filter);
        filter.promiscuous = on;
        // While a reset is under way the new filter is applied at its end.
        match self.phase() {
            Phase::Running(_) => self.chip.set_filter(*filter),
            Phase::Stopping(_) | Phase::Closed => Ok(()),
        }
    }

    fn request_reset(&self) {
        self.begin_reset();
    }

    fn quiesce(&self) {
        self.phase.store(CLOSED, Ordering::Release);
        let stopped = self.chip.stop();
        let off = self.device.set_bus_master(false);
        // Either is enough: without bus-master nothing passes, and a device whose transfers are over starts no new ones.
        if stopped.is_ok() || off.is_ok() || matches!(stopped, Err(DeviceError::Gone)) {
            self.safe.store(true, Ordering::Release);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.is_safe() {
            self.quiesce();
        }
    }
}

/// An Intel NIC before its queues are opened.
pub(super) struct IntelPort {
    shared: Arc<Shared>,
    mtu: u32,
    rx_entries: u16,
    tx_entries: u16,
}

impl IntelPort {
    /// Checks what the operator wants against what the device can.
    pub(super) fn new(
        device: Arc<dyn Device>,
        chip: Box<dyn Chip>,
        options: &NicOptions,
    ) -> Result<IntelPort, PortError> {
        let setting = |reason: String| PortError::Setting {
            port: options.name.clone(),
            reason,
        };
        let ring = |asked: Option<u32>| {
            u16::try_from(asked.unwrap_or(RING_DEFAULT))
                .ok()
                .filter(|n| n.is_power_of_two() && (RING_MIN..=RING_MAX).contains(n))
                .ok_or_else(|| {
                    setting(format!(
                        "rings have a power of two from {RING_MIN} to {RING_MAX} descriptors"
                    ))
                })
        };
        let most = chip.largest_frame().saturating_sub(FRAME_OVERHEAD as usize);
        if options.mtu < MTU_MIN || options.mtu as usize > most {
            return Err(setting(format!(
                "the MTU of this device is {MTU_MIN} to {most}"
            )));
        }
        let counters = chip.counters().len();
        Ok(IntelPort {
            rx_entries: ring(options.rx_ring)?,
            tx_entries: ring(options.tx_ring)?,
            mtu: options.mtu,
            shared: Arc::new(Shared {
                name: options.name.clone(),
                device,
                chip,
                plan: Mutex::new(None),
                filter: Mutex::new(Filter {
                    promiscuous: options.promiscuous,
                    all_multicast: options.all_multicast,
                }),
                phase: AtomicU32::new(0),
                queues: AtomicUsize::new(0),
                parked: AtomicUsize::new(0),
                safe: AtomicBool::new(false),
                faults: Default::default(),
                totals: Mutex::new(vec![0; counters]),
                dropped: AtomicU64::new(0),
                errors: AtomicU64::new(0),
                attempts: Attempts::default(),
                vectors: Mutex::new(Vec::new()),
            }),
        })
    }

    fn open(&self, n: usize, arena: &Arc<Arena>) -> Result<Vec<IntelQueue>, DeviceError> {
        let shared = &self.shared;
        let (device, chip) = (&shared.device, &shared.chip);
        let map = device.map_arena(arena)?;
        let frame = (self.mtu + FRAME_OVERHEAD) as usize;
        let msix = device.interrupts() >= n;
        let mut irqs = if msix { fds(device, n)? } else { Vec::new() };
        irqs.resize_with(n, || None);
        let mut rss_key = [0; 40];
        getrandom::fill(&mut rss_key).map_err(|e| DeviceError::System {
            step: "random key of the receive hash",
            source: std::io::Error::other(e.to_string()),
        })?;
        let mut plan = Plan {
            rings: Vec::with_capacity(n),
            rx_entries: self.rx_entries,
            tx_entries: self.tx_entries,
            frame,
            room: arena.largest_packet(0),
            msix,
            rss_key,
        };
        let mut queues = Vec::with_capacity(n);
        for (index, irq) in irqs.into_iter().enumerate() {
            let memory = |entries: u16| {
                device.dma_alloc(usize::from(entries) * DESCRIPTOR, 4096, IovaClass::Any)
            };
            let (rx, tx) = (memory(self.rx_entries)?, memory(self.tx_entries)?);
            plan.rings.push((rx.iova(), tx.iova()));
            let (rx_tail, tx_tail) = chip.tails(index);
            let bell = |offset| chip.regs().doorbell(offset);
            let format = chip.format();
            queues.push(IntelQueue::new(
                Arc::clone(shared),
                index,
                map.clone(),
                RxRing::new(rx, self.rx_entries, frame, format, bell(rx_tail), arena)?,
                TxRing::new(
                    tx,
                    self.tx_entries,
                    frame,
                    format,
                    chip.completes_checksums(n),
                    bell(tx_tail),
                    arena,
                )?,
                irq,
            ));
        }
        shared.queues.store(n, Ordering::Release);
        device.set_bus_master(true)?;
        chip.start(&plan)?;
        chip.set_filter(*lock(&shared.filter))?;
        *lock(&shared.plan) = Some(plan);
        Ok(queues)
    }
}

impl Port for IntelPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.shared.name.clone(),
            kind: self.shared.chip.kind(),
            mac: self.shared.chip.mac(),
            mtu: self.mtu,
            max_queues: self.shared.chip.queues(),
            mode: "zero-copy".into(),
        }
    }

    fn control(&self) -> Option<Arc<dyn NicControl>> {
        Some(Arc::clone(&self.shared) as Arc<dyn NicControl>)
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let chip = &self.shared.chip;
        check_queues(&self.shared.name, n, chip.queues())?;
        let needed = chip.room_needed((self.mtu + FRAME_OVERHEAD) as usize);
        let room = arena.largest_packet(0);
        if room < needed {
            return Err(PortError::FrameTooSmall {
                port: self.shared.name.clone(),
                needed,
                room,
            });
        }
        let queues = self.open(n, arena).map_err(|source| PortError::Device {
            port: self.shared.name.clone(),
            source,
        })?;
        Ok(queues
            .into_iter()
            .map(|q| Box::new(q) as Box<dyn PortQueue>)
            .collect())
    }
}

fn fds(device: &Arc<dyn Device>, n: usize) -> Result<Vec<Option<OwnedFd>>, DeviceError> {
    Ok(device.enable_msix(n)?.into_iter().map(Some).collect())
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
