//! vmxnet3: the network adapter of VMware's hypervisors, also modelled by QEMU.
//!
//! Registers and layouts are in [`regs`], the rings in `tx` and `rx`, start, stop and recovery in `adapter`. Start to end:
//! 1. [`Vmxnet3Port::open`] resets the device, agrees on a revision, reads the permanent Ethernet address.
//! 2. [`Port::queues`] writes the shared area and the queue descriptors, connects one interrupt for each receive queue, fills
//!    the rings and activates.
//! 3. When the last queue is drained or dropped the device is quiesced and loses its bus-master right.
//!
//! # What spreads packets over queues
//! Revision 1 (QEMU; hardware versions up to 13) hashes IPv4 and IPv6 addresses and TCP ports: **ESP is not hashed by SPI**, all
//! packets between two gateways arrive at one queue. QEMU's model hashes nothing and receives on queue 0 only. Revision 4
//! (vSphere 6.7 and later) hashes ESP over IPv4 by SPI; it is asked for when offered, but no bed of this project runs it.
//! Packets of other workers' SAs are handed over, as on every port.
//!
//! # What to mind
//! - Frames are received into one buffer each: the arena's frames must hold the MTU (at most 9000). Frames that a device splits
//!   all the same are joined by copying.
//! - One pause for all queues when one is reset or fails: the device only stops as a whole. Frames that it had not sent are
//!   counted as `tx_errors`.
//! - No offload is used: ESP needs none of them, and clear text is forwarded as it came.

use std::sync::{Arc, OnceLock, Weak};

use crate::arena::Arena;
use crate::device::ring::FrameRing;
use crate::device::{Device, DeviceError, DmaMem, IovaClass, Mmio};
use crate::nic::{Driver, Link, NicControl, NicOptions};
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, check_queues};

mod adapter;
pub mod fuzz;
pub mod model;
mod queue;
pub mod regs;
mod rx;
#[cfg(test)]
mod tests;
mod tx;

use adapter::{Adapter, Parts};
pub use queue::Vmxnet3Queue;
use regs::*;
use rx::RxRing;
use tx::TxRing;

/// Behind a received packet: room for the ESP trailer and ICV that encapsulation in place appends.
const TAIL: usize = 64;
/// Ethernet header and two VLAN tags.
const LINK_HEADER: usize = 22;

/// What a vmxnet3 port looks like.
#[derive(Debug, Clone)]
pub struct Vmxnet3Config {
    /// Name of the port.
    pub name: String,
    /// Largest IP packet in bytes, 60 to 9000.
    pub mtu: u32,
    /// Entries of each receive ring: a power of two from 32 to 4096.
    pub rx_ring: u32,
    /// Entries of each transmit ring: a power of two from 32 to 4096.
    pub tx_ring: u32,
    /// Receive everything, not only what is for the own address.
    pub promiscuous: bool,
    /// Receive all multicast.
    pub all_multicast: bool,
    /// Bytes of each receive buffer; as much as the MTU needs when not given. Smaller ones make the device split frames.
    pub buffer: Option<u16>,
}

impl Default for Vmxnet3Config {
    fn default() -> Self {
        Vmxnet3Config {
            name: "vmxnet3".into(),
            mtu: 1500,
            rx_ring: 1024,
            tx_ring: 1024,
            promiscuous: false,
            // Neighbour discovery and routing protocols need it.
            all_multicast: true,
            buffer: None,
        }
    }
}

/// What the device counted itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceCounters {
    /// Frames sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames that could not be sent: descriptor or frame broken.
    pub tx_errors: u64,
    /// Frames that nobody wanted.
    pub tx_discarded: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames lost for want of a buffer.
    pub rx_no_buffer: u64,
    /// Frames that arrived broken.
    pub rx_errors: u64,
}

impl std::ops::AddAssign for DeviceCounters {
    /// Wraps: the numbers come from a device.
    fn add_assign(&mut self, other: DeviceCounters) {
        let add = |a: &mut u64, b: u64| *a = a.wrapping_add(b);
        add(&mut self.tx_packets, other.tx_packets);
        add(&mut self.tx_bytes, other.tx_bytes);
        add(&mut self.tx_errors, other.tx_errors);
        add(&mut self.tx_discarded, other.tx_discarded);
        add(&mut self.rx_packets, other.rx_packets);
        add(&mut self.rx_bytes, other.rx_bytes);
        add(&mut self.rx_no_buffer, other.rx_no_buffer);
        add(&mut self.rx_errors, other.rx_errors);
    }
}

/// What a device may not do; each is counted by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A transmit completion for a descriptor that is not on its way.
    TxIndex,
    /// A receive completion of a ring that there is not.
    RxRing,
    /// A receive completion of a buffer that the device does not have.
    RxIndex,
    /// More bytes than the buffer has.
    RxLength,
    /// It stopped a queue and said that this is an error.
    QueueStopped,
    /// It does not do what it is told: somebody else has reset it.
    Inactive,
    /// It did not start.
    Start,
}

impl Fault {
    const ALL: [Fault; 7] = [
        Fault::TxIndex,
        Fault::RxRing,
        Fault::RxIndex,
        Fault::RxLength,
        Fault::QueueStopped,
        Fault::Inactive,
        Fault::Start,
    ];

    fn name(self) -> &'static str {
        match self {
            Fault::TxIndex => "tx_completion_of_idle_descriptor",
            Fault::RxRing => "rx_completion_of_unknown_ring",
            Fault::RxIndex => "rx_completion_of_idle_descriptor",
            Fault::RxLength => "rx_longer_than_buffer",
            Fault::QueueStopped => "queue_stopped",
            Fault::Inactive => "inactive",
            Fault::Start => "start_failed",
        }
    }
}

/// A vmxnet3 adapter before its queues are opened.
pub struct Vmxnet3Port {
    device: Arc<dyn Device>,
    config: Vmxnet3Config,
    data: Mmio,
    registers: Mmio,
    revision: u32,
    control: Arc<Vmxnet3Control>,
}

/// The way to an adapter for threads that own none of its queues. Without effect before the queues are opened and after they
/// are gone.
pub struct Vmxnet3Control {
    mac: MacAddr,
    adapter: OnceLock<Weak<Adapter>>,
}

/// For the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "vmxnet3",
    ids: &[(0x15ad, 0x07b0)],
    experimental: false,
    open,
};

fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let defaults = Vmxnet3Config::default();
    let config = Vmxnet3Config {
        name: options.name.clone(),
        mtu: options.mtu,
        rx_ring: options.rx_ring.unwrap_or(defaults.rx_ring),
        tx_ring: options.tx_ring.unwrap_or(defaults.tx_ring),
        promiscuous: options.promiscuous,
        all_multicast: options.all_multicast,
        buffer: None,
    };
    Ok(Box::new(Vmxnet3Port::open(device, config)?))
}

impl Vmxnet3Port {
    /// Resets the device and agrees on a revision with it.
    ///
    /// # Errors
    /// `Setting` for a configuration that cannot be, `Device` when the device refuses.
    pub fn open(device: Arc<dyn Device>, config: Vmxnet3Config) -> Result<Vmxnet3Port, PortError> {
        let port = config.name.clone();
        check(&config).map_err(|reason| PortError::Setting {
            port: port.clone(),
            reason,
        })?;
        let opened = Self::identify(&device).map_err(device_error(&port))?;
        let (data, registers, revision, mac) = opened;
        tracing::info!(port, device = device.name(), revision, %mac, "vmxnet3");
        Ok(Vmxnet3Port {
            device,
            config,
            data,
            registers,
            revision,
            control: Arc::new(Vmxnet3Control {
                mac,
                adapter: OnceLock::new(),
            }),
        })
    }

    fn identify(device: &Arc<dyn Device>) -> Result<(Mmio, Mmio, u32, MacAddr), DeviceError> {
        device.reset()?;
        let data = device.region(0)?.window(0, BAR0_LEN)?;
        let registers = device.region(1)?.window(0, BAR1_LEN)?;
        registers.write32(CMD, RESET);
        let offered = registers.read32(VRRS);
        if offered == u32::MAX {
            return Err(DeviceError::Gone);
        }
        let (bit, revision) = match offered {
            o if o & REVISION_4 != 0 => (REVISION_4, 4),
            o if o & REVISION_1 != 0 => (REVISION_1, 1),
            o => return Err(DeviceError::Broken(format!("no known revision in {o:#x}"))),
        };
        registers.write32(VRRS, bit);
        if registers.read32(UVRS) & UPT_1 == 0 {
            return Err(DeviceError::Broken("no known queue format".into()));
        }
        registers.write32(UVRS, UPT_1);
        let word = |command| {
            registers.write32(CMD, command);
            registers.read32(CMD).to_le_bytes()
        };
        let ([a, b, c, d], [e, f, ..]) = (word(GET_PERM_MAC_LO), word(GET_PERM_MAC_HI));
        if a & 1 != 0 {
            return Err(DeviceError::Broken("a multicast address as its own".into()));
        }
        Ok((data, registers, revision, MacAddr([a, b, c, d, e, f])))
    }

    /// The handle for other threads.
    pub fn handle(&self) -> Arc<Vmxnet3Control> {
        Arc::clone(&self.control)
    }

    /// As [`Port::queues`], with the queues' own type.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open_queues(self, n: usize, arena: &Arc<Arena>) -> Result<Vec<Vmxnet3Queue>, PortError> {
        let port = self.config.name.clone();
        check_queues(&port, n, MAX_QUEUES)?;
        if !n.is_power_of_two() {
            return Err(PortError::Setting {
                port,
                reason: format!("vmxnet3 has 1, 2, 4 or 8 queues, not {n}"),
            });
        }
        let needed = self.config.mtu as usize + LINK_HEADER;
        let room = arena.largest_packet(TAIL).min(BUFFER_MAX);
        if room < needed {
            return Err(PortError::FrameTooSmall { port, needed, room });
        }
        let whole = u16::try_from(needed).unwrap_or(u16::MAX);
        let buffer = self.config.buffer.map_or(whole, |b| b.min(whole));
        self.assemble(n, arena, buffer).map_err(device_error(&port))
    }

    fn assemble(
        self,
        n: usize,
        arena: &Arc<Arena>,
        buffer: u16,
    ) -> Result<Vec<Vmxnet3Queue>, DeviceError> {
        let device = &*self.device;
        let map = device.map_arena(arena)?;
        // One vector for each receive queue, one that stays masked for transmit completions and events: these are polled.
        let (vectors, interrupts) = if device.interrupts() > n {
            (n + 1, device.enable_msix(n + 1)?)
        } else {
            tracing::info!(port = %self.config.name, "vmxnet3 without MSI-X: polled");
            (1, Vec::new())
        };
        let quiet = if interrupts.is_empty() { 0 } else { n };
        let shared = device.dma_alloc(SHARED_LEN, RING_ALIGN, IovaClass::Any)?;
        let queues = device.dma_alloc(2 * n * QUEUE_LEN, RING_ALIGN, IovaClass::Any)?;
        let rss = match n {
            1 => None,
            _ => Some(rss_description(device, n)?),
        };
        self.describe(&shared, &queues, rss.as_ref(), n, vectors, quiet, buffer);
        let mut wakers = Vec::new();
        for fd in interrupts.iter().take(n) {
            let dup = fd.try_clone().map_err(|source| DeviceError::System {
                step: "duplicate an interrupt's eventfd",
                source,
            })?;
            wakers.push(dup);
        }
        let adapter = Arc::new(Adapter::new(Parts {
            name: self.config.name.clone(),
            device: Arc::clone(&self.device),
            data: self.data.clone(),
            config: self.registers.clone(),
            shared,
            queues: queues.clone(),
            rss,
            revision: self.revision,
            mac: self.control.mac,
            count: n,
            wakers,
            vectors,
            promiscuous: self.config.promiscuous,
            all_multicast: self.config.all_multicast,
        }));
        let register = |first: usize, index: usize| self.data.window(first + index * STEP, STEP);
        let mut interrupts = interrupts.into_iter();
        let mut opened = Vec::with_capacity(n);
        for q in 0..n {
            let vector = if quiet == 0 { 0 } else { q };
            let tx = TxRing::new(
                device,
                frames(self.config.tx_ring, arena)?,
                arena,
                queues.slice(q * QUEUE_LEN, QUEUE_LEN)?,
                register(TXPROD, q)?,
            )?;
            tx.describe(u8::try_from(quiet).unwrap_or(0));
            let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let rx = RxRing::new(
                device,
                [
                    frames(self.config.rx_ring, arena)?,
                    frames(rx::BODIES, arena)?,
                ],
                queues.slice((n + q) * QUEUE_LEN, QUEUE_LEN)?,
                [register(RXPROD, q)?, register(RXPROD2, q)?],
                [number(q), number(n + q)],
                buffer,
            )?;
            rx.describe(u8::try_from(vector).unwrap_or(0));
            opened.push(Vmxnet3Queue::new(
                Arc::clone(&adapter),
                map.clone(),
                tx,
                rx,
                register(IMR, vector)?,
                interrupts.next(),
            ));
        }
        // Set once: the port is used up.
        let _ = self.control.adapter.set(Arc::downgrade(&adapter));
        // All rings are filled and the device runs before the first worker comes by.
        let mut pool = Pool::new(arena, self.config.rx_ring as usize);
        for queue in &mut opened {
            queue.catch_up(&mut pool);
        }
        if !Adapter::runs(adapter.state()) {
            return Err(DeviceError::Broken("it does not start".into()));
        }
        Ok(opened)
    }

    /// Writes the parts of the shared area that stay.
    #[allow(clippy::too_many_arguments, reason = "one field of the area each")]
    fn describe(
        &self,
        shared: &DmaMem,
        queues: &DmaMem,
        rss: Option<&DmaMem>,
        n: usize,
        vectors: usize,
        quiet: usize,
        buffer: u16,
    ) {
        let byte = |n: usize| u8::try_from(n).unwrap_or(0);
        let word = |n: usize| u32::try_from(n).unwrap_or(0);
        shared.write32(SHARED_MAGIC, MAGIC);
        shared.write32(SHARED_SIZE, word(SHARED_LEN));
        shared.write32(MISC_VERSION, 1);
        shared.write32(MISC_GUEST, GUEST_LINUX_64);
        shared.write32(MISC_REVISION, 1);
        shared.write32(MISC_UPT, UPT_1);
        let features = if rss.is_some() { FEATURE_RSS } else { 0 };
        shared.write64(MISC_FEATURES, features);
        shared.write64(MISC_QUEUES, queues.iova());
        shared.write32(MISC_QUEUES_LEN, word(2 * n * QUEUE_LEN));
        shared.write32(MISC_MTU, self.config.mtu);
        // The head and as many bodies as the rest can need.
        let most = (self.config.mtu as usize + LINK_HEADER).div_ceil(usize::from(buffer).max(1));
        shared.write16(MISC_RX_PARTS, u16::try_from(most + 1).unwrap_or(u16::MAX));
        shared.write8(MISC_TX_QUEUES, byte(n));
        shared.write8(MISC_RX_QUEUES, byte(n));
        shared.write8(INTR_AUTO_MASK, 1);
        shared.write8(INTR_COUNT, byte(vectors));
        shared.write8(INTR_EVENT, byte(quiet));
        for vector in 0..vectors.min(MAX_VECTORS) {
            shared.write8(INTR_LEVELS + vector, MODERATION_ADAPTIVE);
        }
        // Frames of every VLAN: the pipeline decides.
        for word in 0..4096 / 32 {
            shared.write32(RX_VLANS + 4 * word, u32::MAX);
        }
        if let Some(rss) = rss {
            shared.write32(RSS_VERSION, 1);
            shared.write32(RSS_LEN, word(RSS_DESCRIPTION_LEN));
            shared.write64(RSS_ADDRESS, rss.iova());
        }
    }
}

impl Port for Vmxnet3Port {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.config.name.clone(),
            kind: "vmxnet3",
            mac: self.control.mac,
            mtu: self.config.mtu,
            max_queues: MAX_QUEUES,
            mode: "DMA".into(),
        }
    }

    fn control(&self) -> Option<Arc<dyn NicControl>> {
        Some(self.handle())
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let queues = self.open_queues(n, arena)?;
        Ok(queues
            .into_iter()
            .map(|q| Box::new(q) as Box<dyn PortQueue>)
            .collect())
    }
}

impl Vmxnet3Control {
    /// The own Ethernet address.
    pub fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Receives all multicast, or none.
    pub fn set_all_multicast(&self, on: bool) {
        if let Some(adapter) = self.adapter() {
            adapter.set_filter(|filter| filter.all_multicast = on);
        }
    }

    /// What the device counted since the port was opened.
    pub fn counters(&self) -> DeviceCounters {
        self.adapter().map(|a| a.counters()).unwrap_or_default()
    }

    /// Restarts so far, asked for or after errors.
    pub fn restarts(&self) -> u64 {
        self.adapter().map_or(0, |a| a.restarts())
    }

    /// How often the link went up or down.
    pub fn link_changes(&self) -> u64 {
        self.adapter().map_or(0, |a| a.link_changes())
    }

    fn adapter(&self) -> Option<Arc<Adapter>> {
        self.adapter.get()?.upgrade()
    }
}

impl NicControl for Vmxnet3Control {
    fn link(&self) -> Link {
        self.adapter().map(|a| a.link()).unwrap_or_default()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let c = self.counters();
        vec![
            ("tx_packets", c.tx_packets),
            ("tx_bytes", c.tx_bytes),
            ("tx_errors", c.tx_errors),
            ("tx_discarded", c.tx_discarded),
            ("rx_packets", c.rx_packets),
            ("rx_bytes", c.rx_bytes),
            ("rx_out_of_buffers", c.rx_no_buffer),
            ("rx_errors", c.rx_errors),
            ("restarts", self.restarts()),
            ("link_changes", self.link_changes()),
        ]
    }

    fn device_errors(&self) -> Vec<(&'static str, u64)> {
        let adapter = self.adapter();
        let count = |fault| adapter.as_ref().map_or(0, |a| a.faults(fault));
        Fault::ALL.map(|f| (f.name(), count(f))).into()
    }

    fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError> {
        if let Some(adapter) = self.adapter() {
            adapter.set_filter(|filter| filter.promiscuous = on);
        }
        Ok(())
    }

    fn request_reset(&self) {
        if let Some(adapter) = self.adapter() {
            adapter.trip(None);
        }
    }

    fn quiesce(&self) {
        if let Some(adapter) = self.adapter() {
            adapter.halt_now();
        }
    }
}

fn check(config: &Vmxnet3Config) -> Result<(), String> {
    for size in [config.rx_ring, config.tx_ring] {
        if !size.is_power_of_two() || !(RING_MIN..=RING_MAX).contains(&size) {
            return Err("ring sizes are powers of two from 32 to 4096".into());
        }
    }
    if !MTU.contains(&config.mtu) {
        return Err("the MTU of vmxnet3 is 60 to 9000".into());
    }
    if config.buffer.is_some_and(|b| b < 128) {
        return Err("receive buffers have at least 128 bytes".into());
    }
    Ok(())
}

fn frames(size: u32, arena: &Arc<Arena>) -> Result<FrameRing, DeviceError> {
    FrameRing::new(size, arena).ok_or(DeviceError::Unsupported("a ring of this size"))
}

fn rss_description(device: &dyn Device, n: usize) -> Result<DmaMem, DeviceError> {
    let rss = device.dma_alloc(RSS_DESCRIPTION_LEN, RING_ALIGN, IovaClass::Any)?;
    let mut key = [0; RSS_KEY_MAX];
    getrandom::fill(&mut key).map_err(|e| DeviceError::System {
        step: "random bytes for the RSS key",
        source: std::io::Error::other(e),
    })?;
    rss.write16(RSS_TYPES, RSS_TYPES_ALL);
    rss.write16(RSS_FUNCTION, RSS_TOEPLITZ);
    rss.write16(RSS_KEY_LEN, u16::try_from(RSS_KEY_MAX).unwrap_or(0));
    rss.write16(RSS_TABLE_LEN, u16::try_from(RSS_TABLE_MAX).unwrap_or(0));
    rss.write_bytes(RSS_KEY, &key);
    for entry in 0..RSS_TABLE_MAX {
        rss.write8(RSS_TABLE + entry, u8::try_from(entry % n).unwrap_or(0));
    }
    Ok(rss)
}

fn device_error(port: &str) -> impl FnOnce(DeviceError) -> PortError {
    let port = port.to_owned();
    move |source| PortError::Device { port, source }
}
