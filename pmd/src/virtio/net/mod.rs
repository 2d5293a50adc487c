//! virtio-net over PCI: the adapter of KVM clouds, OpenStack and QEMU.
//!
//! Start to end:
//! 1. [`VirtioNetPort::open`] walks the capabilities, agrees on features, reads address, MTU and the number of queues.
//! 2. [`Port::queues`] allocates rings, connects one interrupt for each receive queue and starts the device (`core`).
//! 3. When the last queue is drained or dropped the device is reset and loses its bus-master right.
//!
//! # What spreads packets over queues
//! The device decides (a flow hash of its own, or the queue on which the flow was sent): ESP between two gateways arrives at
//! one queue. Packets of other workers' SAs are handed over, as on every port.
//!
//! # What to mind
//! - Frames are received into one buffer each: mergeable buffers are not agreed on, and the arena's frames must hold the MTU.
//! - The 12-byte header of each packet lies in the frame's head-room, so a packet is one descriptor and nothing is copied.
//! - A device that does not offer `ACCESS_PLATFORM` reaches memory past the IOMMU, with addresses that are not ours: behind an
//!   IOMMU it is refused (QEMU: `iommu_platform=on`).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock, Weak};

use super::feature;
use super::pci::Transport;
use super::ring::Format;
use crate::arena::Arena;
use crate::device::ring::FrameRing;
use crate::device::{Device, DeviceError};
use crate::nic::{Driver, Link, NicControl, NicOptions};
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, check_queues};

mod core;
pub mod fuzz;
pub mod model;
mod queue;
#[cfg(test)]
mod tests;

use self::core::{Adapter, RingMemory};
pub use queue::VirtioNetQueue;

/// For the table of drivers.
pub const DRIVER: Driver = Driver {
    name: "virtio-net",
    ids: &[(0x1af4, 0x1041)],
    experimental: false,
    open,
};

// Device configuration (section 5.1.4).
const CONFIG_MAC: usize = 0;
const CONFIG_STATUS: usize = 6;
const CONFIG_MAX_PAIRS: usize = 8;
const CONFIG_MTU: usize = 10;
const STATUS_LINK_UP: u16 = 1;

/// What we take of what a device offers.
const WANTED: u64 = feature::VERSION_1
    | feature::ACCESS_PLATFORM
    | feature::ORDER_PLATFORM
    | feature::RING_PACKED
    | feature::EVENT_IDX
    | feature::NOTIFICATION_DATA
    | feature::NET_CSUM
    | feature::NET_MAC
    | feature::NET_MTU
    | feature::NET_STATUS
    | feature::NET_CTRL_VQ
    | feature::NET_CTRL_RX
    | feature::NET_MQ;
/// Ethernet header and two VLAN tags.
const LINK_HEADER: usize = 22;
/// Behind a received packet: room for the ESP trailer and ICV that encapsulation in place appends.
const TAIL: usize = 64;
/// Entries of a ring unless told otherwise.
const RING: u32 = 1024;
/// Most queue pairs that are used.
const MAX_PAIRS: u16 = 256;

/// A virtio-net device before its queues are opened.
pub struct VirtioNetPort {
    device: Arc<dyn Device>,
    options: NicOptions,
    transport: Transport,
    features: u64,
    mac: MacAddr,
    max_pairs: u16,
    control: Arc<Control>,
}

/// The way to the adapter for threads that own none of its queues.
#[derive(Default)]
struct Control {
    adapter: OnceLock<Weak<Adapter>>,
}

fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    Ok(Box::new(VirtioNetPort::open(device, options)?))
}

impl VirtioNetPort {
    /// Agrees on features with the device and reads what it is.
    ///
    /// # Errors
    /// `Setting` for an MTU or ring that the device cannot have, `Device` when it refuses or breaks the rules.
    pub fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<VirtioNetPort, PortError> {
        let fail = device_error(&options.name);
        let transport = Transport::find(&*device).map_err(&fail)?;
        let features = transport
            .negotiate(|offered| choose(offered, device.behind_iommu()))
            .map_err(&fail)?;
        let setting = |reason: String| PortError::Setting {
            port: options.name.clone(),
            reason,
        };
        let has = |bit| features & bit != 0;
        if has(feature::NET_MTU) {
            let most = transport.config.read16(CONFIG_MTU);
            if options.mtu > most.into() {
                return Err(setting(format!(
                    "the device takes packets of up to {most} bytes, the MTU is {}",
                    options.mtu
                )));
            }
        }
        for size in [options.rx_ring, options.tx_ring].into_iter().flatten() {
            if !size.is_power_of_two() || !(16..=32_768).contains(&size) {
                return Err(setting(
                    "ring sizes are powers of two from 16 to 32768".into(),
                ));
            }
        }
        let mac = if has(feature::NET_MAC) {
            read_mac(&transport)
        } else {
            own_mac(device.name())
        };
        let max_pairs = if has(feature::NET_MQ | feature::NET_CTRL_VQ) && has(feature::NET_MQ) {
            let queues = transport.queues();
            let said = transport.config.read16(CONFIG_MAX_PAIRS);
            said.min(queues.saturating_sub(1) / 2).clamp(1, MAX_PAIRS)
        } else {
            1
        };
        tracing::info!(port = %options.name, device = device.name(), %mac, max_pairs, features = format_args!("{features:#x}"), "virtio-net");
        Ok(VirtioNetPort {
            device,
            options: options.clone(),
            transport,
            features,
            mac,
            max_pairs,
            control: Arc::default(),
        })
    }

    /// Which form the rings have.
    pub fn format(&self) -> Format {
        format_of(self.features)
    }

    /// As [`Port::queues`], with the queues' own type.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open_queues(
        self,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<VirtioNetQueue>, PortError> {
        let port = self.options.name.clone();
        check_queues(&port, n, self.max_pairs.into())?;
        let needed = self.options.mtu as usize + LINK_HEADER;
        let room = arena.largest_packet(TAIL);
        if room < needed {
            return Err(PortError::FrameTooSmall { port, needed, room });
        }
        self.assemble(n, needed, arena).map_err(device_error(&port))
    }

    fn assemble(
        self,
        n: usize,
        largest: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<VirtioNetQueue>, DeviceError> {
        let device = &self.device;
        let map = device.map_arena(arena)?;
        let interrupts = if device.interrupts() >= n {
            device.enable_msix(n)?
        } else {
            tracing::info!(port = %self.options.name, "virtio-net without enough interrupts: polled");
            Vec::new()
        };
        let format = format_of(self.features);
        let asked = [
            self.options.rx_ring.unwrap_or(RING),
            self.options.tx_ring.unwrap_or(RING),
        ];
        let mut memory = Vec::with_capacity(2 * n);
        for queue in 0..u16::try_from(2 * n).unwrap_or(u16::MAX) {
            let most = self.transport.queue_size(queue);
            let size = u32::from(most).min(asked[usize::from(queue % 2)]);
            let vector = if queue % 2 == 0 && !interrupts.is_empty() {
                queue / 2
            } else {
                super::pci::NO_VECTOR
            };
            memory.push(RingMemory::new(&**device, format, queue, size, vector)?);
        }
        let control = if self.features & feature::NET_CTRL_VQ != 0 {
            // Behind all the pairs that the device has, used or not.
            let queue = if self.features & feature::NET_MQ != 0 {
                self.transport
                    .config
                    .read16(CONFIG_MAX_PAIRS)
                    .checked_mul(2)
                    .ok_or(DeviceError::Broken("more queues than can be".into()))?
            } else {
                2
            };
            let size = u32::from(self.transport.queue_size(queue)).min(16);
            Some(RingMemory::new(
                &**device,
                format,
                queue,
                size,
                super::pci::NO_VECTOR,
            )?)
        } else {
            None
        };
        let adapter = Arc::new(Adapter::new(
            self.options.clone(),
            Arc::clone(device),
            self.transport,
            self.features,
            n,
            memory,
            control,
        )?);
        let _ = self.control.adapter.set(Arc::downgrade(&adapter));
        let mut interrupts = interrupts.into_iter();
        let mut queues = Vec::with_capacity(n);
        for pair in 0..n {
            let frames = |size| {
                FrameRing::new(size, arena).ok_or(DeviceError::Unsupported("a ring of this size"))
            };
            let [rx, tx] = adapter.sizes(pair);
            queues.push(VirtioNetQueue::new(
                Arc::clone(&adapter),
                pair,
                map.clone(),
                [frames(rx)?, frames(tx)?],
                interrupts.next(),
                largest,
            ));
        }
        let mut pool = Pool::new(arena, 256);
        for queue in &mut queues {
            queue.catch_up(&mut pool);
        }
        if !adapter.runs() {
            return Err(DeviceError::Broken("it does not start".into()));
        }
        Ok(queues)
    }
}

impl Port for VirtioNetPort {
    fn info(&self) -> PortInfo {
        let form = match self.format() {
            Format::Split => "split",
            Format::Packed => "packed",
        };
        PortInfo {
            name: self.options.name.clone(),
            kind: "virtio-net",
            mac: self.mac,
            mtu: self.options.mtu,
            max_queues: self.max_pairs.into(),
            mode: format!("zero-copy, {form} rings"),
        }
    }

    fn control(&self) -> Option<Arc<dyn NicControl>> {
        Some(Arc::clone(&self.control) as Arc<dyn NicControl>)
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

impl NicControl for Control {
    fn link(&self) -> Link {
        self.get().map(|a| a.link()).unwrap_or_default()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let restarts = self.get().map_or(0, |a| a.counts.restarts.load(Relaxed));
        vec![("restarts", restarts)]
    }

    fn device_errors(&self) -> Vec<(&'static str, u64)> {
        let Some(a) = self.get() else {
            return Vec::new();
        };
        let c = &a.counts;
        vec![
            ("ring", c.ring_errors.load(Relaxed)),
            ("rx_length", c.rx_length.load(Relaxed)),
            ("needs_reset", c.needs_reset.load(Relaxed)),
            ("start_failed", c.start_failed.load(Relaxed)),
        ]
    }

    fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError> {
        self.get().map_or(Ok(()), |a| a.set_promiscuous(on))
    }

    fn request_reset(&self) {
        if let Some(a) = self.get() {
            a.trip();
        }
    }

    fn quiesce(&self) {
        if let Some(a) = self.get() {
            a.halt_now();
        }
    }
}

impl Control {
    fn get(&self) -> Option<Arc<Adapter>> {
        self.adapter.get()?.upgrade()
    }
}

/// The features to take of those offered.
fn choose(offered: u64, behind_iommu: bool) -> Result<u64, DeviceError> {
    if behind_iommu && offered & feature::ACCESS_PLATFORM == 0 {
        return Err(DeviceError::Unsupported(
            "a virtio device that goes past the IOMMU (no ACCESS_PLATFORM; QEMU: iommu_platform=on)",
        ));
    }
    let mut chosen = offered & WANTED;
    // The number of queues and what is received are set over the control queue.
    if chosen & feature::NET_CTRL_VQ == 0 {
        chosen &= !(feature::NET_MQ | feature::NET_CTRL_RX);
    }
    Ok(chosen)
}

fn format_of(features: u64) -> Format {
    if features & feature::RING_PACKED != 0 {
        Format::Packed
    } else {
        Format::Split
    }
}

/// Reads the address until it did not change meanwhile (section 4.1.4.3.2).
fn read_mac(transport: &Transport) -> MacAddr {
    let mut mac = [0; 6];
    for _ in 0..8 {
        let before = transport.generation();
        for (i, byte) in mac.iter_mut().enumerate() {
            *byte = transport.config.read8(CONFIG_MAC + i);
        }
        if transport.generation() == before {
            break;
        }
    }
    MacAddr(mac)
}

/// A device without an address gets one that stays the same: locally administered, from its name (FNV-1a).
fn own_mac(name: &str) -> MacAddr {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    MacAddr([0x02, a, b, c, d, e])
}

fn device_error(port: &str) -> impl Fn(DeviceError) -> PortError {
    let port = port.to_owned();
    move |source| PortError::Device {
        port: port.clone(),
        source,
    }
}
