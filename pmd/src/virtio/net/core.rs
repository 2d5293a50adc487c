//! What all queues of an adapter share: start, stop, recovery, the control queue.
//!
//! The device can only be reset as a whole. Whoever finds it broken stops it and begins a new *epoch*; each queue takes its
//! frames back when its owner next comes by, and the last of them starts the device again. So no worker waits for another,
//! and no buffer is taken back before the device has let go of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{CONFIG_STATUS, STATUS_LINK_UP, choose, format_of};
use crate::device::{Device, DeviceError, DmaMem, IovaClass};
use crate::nic::attempts::Attempts;
use crate::nic::{Link, NicOptions};
use crate::virtio::feature;
use crate::virtio::pci::{Bell, Transport};
use crate::virtio::ring::{Areas, Buffer, DriverRing, Format, RingOptions, area_sizes};

/// Least time between two starts, so that a device that fails at once does not keep the workers busy.
const RESTART: Duration = Duration::from_millis(100);
/// The same after a start that failed: the device may be gone.
const RETRY: Duration = Duration::from_secs(1);
/// Longest wait for the answer to a control command.
const CONTROL_PATIENCE: Duration = Duration::from_millis(200);

// Control commands (section 5.1.6.5): class and command.
const RX_PROMISC: [u8; 2] = [0, 0];
const RX_ALLMULTI: [u8; 2] = [0, 1];
const MQ_PAIRS: [u8; 2] = [4, 0];
const CONTROL_OK: u8 = 0;
/// Where the device's answer lies, behind the command.
const ACK: usize = 16;

/// Memory of one ring, the same for all lives of the device.
pub(super) struct RingMemory {
    queue: u16,
    size: u16,
    vector: u16,
    areas: Areas,
    all: DmaMem,
}

impl RingMemory {
    /// Memory for `size` entries, rounded down to a power of two.
    pub(super) fn new(
        device: &dyn Device,
        format: Format,
        queue: u16,
        size: u32,
        vector: u16,
    ) -> Result<RingMemory, DeviceError> {
        let size = u16::try_from(size.checked_ilog2().map_or(0, |log| 1 << log)).unwrap_or(0);
        if size < 2 {
            return Err(DeviceError::Broken(format!(
                "queue {queue} has no entries to speak of"
            )));
        }
        let [d, a, u] = area_sizes(format, size);
        let second = d.next_multiple_of(64);
        let third = (second + a).next_multiple_of(64);
        let all = device.dma_alloc(third + u, 4096, IovaClass::Any)?;
        Ok(RingMemory {
            queue,
            size,
            vector,
            areas: Areas {
                descriptors: all.slice(0, d)?,
                driver: all.slice(second, a)?,
                device: all.slice(third, u)?,
            },
            all,
        })
    }

    /// An empty ring. The device must have been stopped.
    fn ring(&self, options: RingOptions) -> Result<DriverRing, DeviceError> {
        self.all.zero();
        let mut ring = DriverRing::new(options, self.areas.clone(), self.size)
            .map_err(|e| DeviceError::Broken(e.to_string()))?;
        ring.disarm();
        Ok(ring)
    }
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Rules of the ring broken.
    pub(super) ring_errors: AtomicU64,
    /// Received packets of impossible length.
    pub(super) rx_length: AtomicU64,
    /// The device asked for a reset.
    pub(super) needs_reset: AtomicU64,
    /// Attempts to start it that failed.
    pub(super) start_failed: AtomicU64,
    /// Successful starts after the first.
    pub(super) restarts: AtomicU64,
}

struct Inner {
    /// Queues that have not taken their frames back.
    missing: usize,
    last_start: Option<Instant>,
    failed: bool,
    promiscuous: bool,
    control: Option<ControlQueue>,
}

struct ControlQueue {
    ring: DriverRing,
    bell: Bell,
    memory: DmaMem,
}

pub(super) struct Adapter {
    options: NicOptions,
    device: Arc<dyn Device>,
    transport: Transport,
    features: u64,
    pairs: usize,
    /// Receive and transmit ring of each pair in turn.
    memory: Vec<RingMemory>,
    control_memory: Option<(RingMemory, DmaMem)>,
    /// Epoch, shifted by one, and whether the device runs.
    state: AtomicU64,
    closed: AtomicBool,
    inner: Mutex<Inner>,
    attempts: Attempts,
    pub(super) counts: Counts,
}

impl Adapter {
    pub(super) fn new(
        options: NicOptions,
        device: Arc<dyn Device>,
        transport: Transport,
        features: u64,
        pairs: usize,
        memory: Vec<RingMemory>,
        control: Option<RingMemory>,
    ) -> Result<Adapter, DeviceError> {
        let control_memory = match control {
            Some(ring) => Some((ring, device.dma_alloc(64, 64, IovaClass::Any)?)),
            None => None,
        };
        Ok(Adapter {
            inner: Mutex::new(Inner {
                missing: pairs,
                last_start: None,
                failed: false,
                promiscuous: options.promiscuous,
                control: None,
            }),
            options,
            device,
            transport,
            features,
            pairs,
            memory,
            control_memory,
            state: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            attempts: Attempts::default(),
            counts: Counts::default(),
        })
    }

    /// Changes with each stop and each start.
    #[inline(always)]
    pub(super) fn state(&self) -> u64 {
        self.state.load(Acquire)
    }

    pub(super) fn epoch(state: u64) -> u64 {
        state >> 1
    }

    pub(super) fn runs(&self) -> bool {
        self.state() & 1 != 0
    }

    /// Whether the device completes checksums of what it sends.
    pub(super) fn completes_checksums(&self) -> bool {
        self.features & feature::NET_CSUM != 0
    }

    /// Sizes of the pair's receive and transmit ring.
    pub(super) fn sizes(&self, pair: usize) -> [u32; 2] {
        [0, 1].map(|i| self.memory.get(2 * pair + i).map_or(0, |m| m.size.into()))
    }

    /// New rings for a pair whose frames have been taken back, with the bells to ring for them.
    pub(super) fn rings(&self, pair: usize) -> Result<[(DriverRing, Bell); 2], DeviceError> {
        let one = |i: usize| {
            let memory = self
                .memory
                .get(2 * pair + i)
                .ok_or(DeviceError::Unsupported("so many queues"))?;
            let ring = memory.ring(self.ring_options())?;
            Ok((ring, self.transport.bell(memory.queue, self.features)?))
        };
        Ok([one(0)?, one(1)?])
    }

    /// A queue has set up its rings for `epoch`; the last one starts the device. True when it runs.
    pub(super) fn queue_ready(&self, epoch: u64) -> bool {
        let mut inner = self.lock();
        if Self::epoch(self.state()) == epoch {
            inner.missing = inner.missing.saturating_sub(1);
        }
        self.start(&mut inner)
    }

    /// Starts the device if nothing is missing. True when it runs.
    pub(super) fn start_if_ready(&self) -> bool {
        let mut inner = self.lock();
        self.start(&mut inner)
    }

    /// Stops the device and asks all queues to begin anew.
    #[cold]
    pub(super) fn trip(&self) {
        let mut inner = self.lock();
        if self.runs() {
            self.stop(&mut inner);
        }
    }

    /// Ends the device's access to memory for good.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        self.closed.store(true, Release);
        if self.runs() {
            self.stop(&mut inner);
        }
    }

    /// Stops the device without a lock, from the panic hook.
    pub(super) fn halt_now(&self) {
        self.closed.store(true, Release);
        self.transport.halt();
        let _ = self.device.set_bus_master(false);
    }

    /// Whether the device still works; trips when not. Costs accesses to the device: not for each burst.
    pub(super) fn check(&self) {
        if self.runs() && !self.transport.healthy() {
            self.counts.needs_reset.fetch_add(1, Relaxed);
            tracing::warn!(port = %self.options.name, "the virtio device needs a reset");
            self.trip();
        }
    }

    pub(super) fn link(&self) -> Link {
        let up = self.runs()
            && (self.features & feature::NET_STATUS == 0
                || self.transport.config.read16(CONFIG_STATUS) & STATUS_LINK_UP != 0);
        Link {
            up,
            mbps: 0,
            full_duplex: true,
        }
    }

    pub(super) fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        inner.promiscuous = on;
        if self.features & feature::NET_CTRL_RX == 0 || !self.runs() {
            return Ok(());
        }
        command(&mut inner, RX_PROMISC, &[on.into()])
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring_options(&self) -> RingOptions {
        RingOptions {
            format: format_of(self.features),
            event_idx: self.features & feature::EVENT_IDX != 0,
            indirect: false,
        }
    }

    fn stop(&self, inner: &mut Inner) {
        // A device that does not answer to its own reset must not reach memory any more either.
        let _ = self.device.set_bus_master(false);
        if self.transport.reset().is_err() {
            let _ = self.device.reset();
        }
        inner.missing = self.pairs;
        inner.control = None;
        let next = Self::epoch(self.state()) + 1;
        self.state.store(next << 1, Release);
    }

    fn start(&self, inner: &mut Inner) -> bool {
        if self.runs() {
            return true;
        }
        let pause = if inner.failed { RETRY } else { RESTART };
        let recently = inner.last_start.is_some_and(|t| t.elapsed() < pause);
        if inner.missing > 0 || recently || self.closed.load(Acquire) {
            return false;
        }
        let first = inner.last_start.replace(Instant::now()).is_none();
        let result = self.bring_up(inner);
        inner.failed = result.is_err();
        match result {
            Ok(()) => {
                self.attempts.worked();
                if !first {
                    self.counts.restarts.fetch_add(1, Relaxed);
                    tracing::warn!(port = %self.options.name, "device reset and running again");
                }
                self.state.fetch_or(1, AcqRel);
                true
            }
            Err(error) => {
                self.counts.start_failed.fetch_add(1, Relaxed);
                if let Some(attempts) = self.attempts.failed() {
                    tracing::error!(port = %self.options.name, %error, attempts, "virtio-net does not start");
                }
                let _ = self.device.set_bus_master(false);
                self.transport.halt();
                false
            }
        }
    }

    /// Section 3.1.1, with rings that are set up and empty of used entries.
    fn bring_up(&self, inner: &mut Inner) -> Result<(), DeviceError> {
        let got = self
            .transport
            .negotiate(|offered| choose(offered, self.device.behind_iommu()))?;
        if got != self.features {
            return Err(DeviceError::Broken(
                "the device offers other features than before".into(),
            ));
        }
        self.transport.without_config_interrupt();
        for m in &self.memory {
            self.transport
                .enable_queue(m.queue, m.size, &m.areas, m.vector)?;
        }
        if let Some((ring, memory)) = &self.control_memory {
            self.transport
                .enable_queue(ring.queue, ring.size, &ring.areas, ring.vector)?;
            inner.control = Some(ControlQueue {
                ring: ring.ring(self.ring_options())?,
                bell: self.transport.bell(ring.queue, self.features)?,
                memory: memory.clone(),
            });
        }
        self.device.set_bus_master(true)?;
        self.transport.start();
        let has = |bit| self.features & bit != 0;
        if has(feature::NET_MQ) {
            let pairs = u16::try_from(self.pairs).unwrap_or(1);
            command(inner, MQ_PAIRS, &pairs.to_le_bytes())?;
        }
        if has(feature::NET_CTRL_RX) {
            let promiscuous = inner.promiscuous;
            command(inner, RX_PROMISC, &[promiscuous.into()])?;
            command(inner, RX_ALLMULTI, &[self.options.all_multicast.into()])?;
        }
        Ok(())
    }
}

/// Gives the device a command and waits for its answer.
fn command(inner: &mut Inner, what: [u8; 2], data: &[u8]) -> Result<(), DeviceError> {
    let Some(c) = &mut inner.control else {
        return Err(DeviceError::Unsupported("commands without a control queue"));
    };
    let broken = |why: &str| DeviceError::Broken(format!("control command {what:?}: {why}"));
    c.memory.write_bytes(0, &what);
    c.memory.write_bytes(what.len(), data);
    c.memory.write8(ACK, 0xff);
    let (command, ack) = (what.len() + data.len(), 1u32);
    let buffers = [
        Buffer {
            addr: c.memory.iova(),
            len: u32::try_from(command).unwrap_or(0),
            writable: false,
        },
        Buffer {
            addr: c.memory.iova() + ACK as u64,
            len: ack,
            writable: true,
        },
    ];
    let id = c
        .ring
        .add_chain(&buffers)
        .ok_or_else(|| broken("the queue is full"))?;
    c.ring.publish();
    if c.ring.wants_kick() {
        c.bell.ring(&c.ring);
    }
    let end = Instant::now() + CONTROL_PATIENCE;
    loop {
        match c.ring.take_used() {
            Ok(Some((used, _))) if used == id => break,
            Ok(Some(_)) => return Err(broken("another one was answered")),
            Err(e) => return Err(broken(&e.to_string())),
            Ok(None) if Instant::now() > end => return Err(broken("no answer")),
            Ok(None) => std::thread::sleep(Duration::from_micros(20)),
        }
    }
    if c.memory.read8(ACK) != CONTROL_OK {
        return Err(broken("refused"));
    }
    Ok(())
}
