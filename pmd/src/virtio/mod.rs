//! Virtio 1.2: rings, the network device over PCI, and the vhost-user socket.
//!
//! One set of rings serves all: [`ring`] has both sides (driver and device) of split and packed rings over
//! [`DmaMem`](crate::device::DmaMem), whether that is memory given to a PCI device or memory that a vhost-user peer shares
//! with us. The rules, stated once:
//!
//! - **What the other side wrote is input.** Each index, id, length and flag is read once and checked; what breaks a rule is a
//!   [`ring::RingError`], after which the queue stops until it is set up anew. Nothing panics, no access leaves the ring.
//! - **Frames of the arena are given to PCI devices only**, which an IOMMU confines. A vhost-user peer never sees the arena:
//!   its frames are copied into and out of its own memory.
//! - **Offloads are negotiated only when they are used.** Of a PCI device that is `CSUM`: it completes the UDP checksums of
//!   encapsulated ESP over IPv6 ([`crate::checksum`]). Not `GUEST_CSUM`: it would let packets arrive whose checksums somebody has
//!   yet to complete, before they are encrypted, and what it saves (looking at checksums above IP) a router does not do.
//!   A vhost-user peer is given and gives complete packets; one that claims otherwise breaks the agreement and is dropped.

pub mod net;
pub mod packed;
mod pci;
pub mod ring;
pub mod split;
pub mod vhost;

/// Feature bits (virtio 1.2, sections 5.1.3 and 6).
pub mod feature {
    /// The device completes checksums of packets that it sends.
    pub const NET_CSUM: u64 = 1 << 0;
    /// The device gives an MTU.
    pub const NET_MTU: u64 = 1 << 3;
    /// The device gives its Ethernet address.
    pub const NET_MAC: u64 = 1 << 5;
    /// A received packet may lie in several buffers.
    pub const NET_MRG_RXBUF: u64 = 1 << 15;
    /// The device gives the state of the link.
    pub const NET_STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const NET_CTRL_VQ: u64 = 1 << 17;
    /// The control queue sets which addresses are received.
    pub const NET_CTRL_RX: u64 = 1 << 18;
    /// There are several queue pairs.
    pub const NET_MQ: u64 = 1 << 22;
    /// A descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are asked for by position.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not virtio's: the vhost-user peer takes part in the negotiation of protocol features.
    pub const VHOST_PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 and later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Device addresses are those of the bus: they go through the IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Packed rings.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Memory accesses are ordered as on the bus of a real device.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// A notification says how far the queue was filled.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
}

/// Bytes of the header in front of each packet (section 5.1.6), with its `num_buffers`.
pub const NET_HEADER: usize = 12;
