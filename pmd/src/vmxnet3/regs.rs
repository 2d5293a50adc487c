//! Registers, commands and memory layouts, in the hardware's order.
//!
//! Facts from the interface headers that VMware publishes with the Linux and DPDK drivers, and from QEMU's model. All fields
//! are little-endian.

// --- BAR 0: the data path. One register per queue or vector, 8 bytes apart. ---

/// Distance between the registers of neighbouring queues or vectors.
pub const STEP: usize = 8;
/// Interrupt mask of vector 0: 1 masks, 0 opens.
pub const IMR: usize = 0x000;
/// Doorbell of transmit queue 0: the next descriptor that will be filled.
pub const TXPROD: usize = 0x600;
/// Doorbell of receive queue 0, ring 0; only while the device asks for it.
pub const RXPROD: usize = 0x800;
/// The same for ring 1.
pub const RXPROD2: usize = 0xa00;
/// Bytes of BAR 0 that are used here.
pub const BAR0_LEN: usize = 0x1000;

// --- BAR 1: configuration. ---

/// Device revisions: reading gives a bit for each that is supported, writing chooses one.
pub const VRRS: usize = 0x00;
/// The same for the queue format ("UPT").
pub const UVRS: usize = 0x08;
/// Address of the shared area, low half; zero ends its use.
pub const DSAL: usize = 0x10;
/// High half; writing it makes the address valid.
pub const DSAH: usize = 0x18;
/// Writing gives a command, reading its result.
pub const CMD: usize = 0x20;
/// First four bytes of the Ethernet address.
pub const MACL: usize = 0x28;
/// Last two bytes; writing makes the address valid.
pub const MACH: usize = 0x30;
/// Events: writing ones acknowledges them in the shared area.
pub const ECR: usize = 0x40;
/// Bytes of BAR 1 that are used here.
pub const BAR1_LEN: usize = 0x48;

/// The first revision: `1 << 0` in [`VRRS`].
pub const REVISION_1: u32 = 1 << 0;
/// The fourth, which hashes ESP over IPv4 by SPI.
pub const REVISION_4: u32 = 1 << 3;
/// The only queue format.
pub const UPT_1: u32 = 1 << 0;

// --- Commands. Those from 0xcafe0000 change something, those from 0xf00d0000 ask. ---

/// Reads the shared area and starts; gives 0 for success.
pub const ACTIVATE: u32 = 0xcafe_0000;
/// Stops receiving and sending; nothing is read or written in memory afterwards.
pub const QUIESCE: u32 = 0xcafe_0001;
/// As after power-on.
pub const RESET: u32 = 0xcafe_0002;
/// Takes over the receive mode from the shared area.
pub const UPDATE_RX_MODE: u32 = 0xcafe_0003;
/// Takes over the VLAN filter from the shared area.
pub const UPDATE_VLAN_FILTERS: u32 = 0xcafe_0005;
/// Revision 4: takes over [`SHARED_COMMAND_INFO`] as the headers to hash.
pub const SET_RSS_FIELDS: u32 = 0xcafe_0010;
/// Writes "stopped" and "error" into the queue descriptors.
pub const GET_QUEUE_STATUS: u32 = 0xf00d_0000;
/// Writes the counters into the queue descriptors.
pub const GET_STATS: u32 = 0xf00d_0001;
/// Bit 0: link up; bits 31..16: Mbit/s.
pub const GET_LINK: u32 = 0xf00d_0002;
/// First four bytes of the permanent Ethernet address.
pub const GET_PERM_MAC_LO: u32 = 0xf00d_0003;
/// Last two bytes.
pub const GET_PERM_MAC_HI: u32 = 0xf00d_0004;
/// Bits 1..0: kind of interrupts, bits 3..2: who masks.
pub const GET_CONF_INTR: u32 = 0xf00d_0008;

// --- The area that driver and device share. ---

/// Says that the area is one.
pub const SHARED_MAGIC: usize = 0;
/// Bytes of the area.
pub const SHARED_SIZE: usize = 4;
/// Driver version.
pub const MISC_VERSION: usize = 8;
/// Guest: bits 1..0 word size, 5..2 kind.
pub const MISC_GUEST: usize = 12;
/// Revision chosen.
pub const MISC_REVISION: usize = 16;
/// Queue format chosen.
pub const MISC_UPT: usize = 20;
/// Features wanted (64 bits).
pub const MISC_FEATURES: usize = 24;
/// Address of the queue descriptors, transmit first.
pub const MISC_QUEUES: usize = 40;
/// Bytes of the queue descriptors.
pub const MISC_QUEUES_LEN: usize = 52;
/// Largest IP packet.
pub const MISC_MTU: usize = 56;
/// Most buffers of a received frame (16 bits).
pub const MISC_RX_PARTS: usize = 60;
/// Transmit queues (8 bits).
pub const MISC_TX_QUEUES: usize = 62;
/// Receive queues (8 bits).
pub const MISC_RX_QUEUES: usize = 63;
/// 1: the device masks a vector when it fires (8 bits).
pub const INTR_AUTO_MASK: usize = 80;
/// Vectors (8 bits).
pub const INTR_COUNT: usize = 81;
/// Vector of events (8 bits).
pub const INTR_EVENT: usize = 82;
/// Moderation of each vector (25 × 8 bits).
pub const INTR_LEVELS: usize = 83;
/// Bit 0 holds all vectors back.
pub const INTR_CONTROL: usize = 108;
/// What to receive.
pub const RX_MODE: usize = 120;
/// A bit for each of 4096 VLANs.
pub const RX_VLANS: usize = 136;
/// Version, length and address of the RSS description.
pub const RSS_VERSION: usize = 648;
/// See [`RSS_VERSION`].
pub const RSS_LEN: usize = 652;
/// See [`RSS_VERSION`].
pub const RSS_ADDRESS: usize = 656;
/// Events, written by the device.
pub const SHARED_EVENTS: usize = 696;
/// Argument of some commands.
pub const SHARED_COMMAND_INFO: usize = 704;
/// Bytes of the area.
pub const SHARED_LEN: usize = 720;

/// [`SHARED_MAGIC`].
pub const MAGIC: u32 = 0xbabe_fee1;
/// 64-bit Linux: the guest kind that makes every device use head and body buffers.
pub const GUEST_LINUX_64: u32 = 2 | 1 << 2;
/// Most vectors.
pub const MAX_VECTORS: usize = 25;
/// [`INTR_CONTROL`].
pub const INTR_DISABLE_ALL: u32 = 1 << 0;
/// Adaptive moderation.
pub const MODERATION_ADAPTIVE: u8 = 8;

/// Spread received frames over the queues.
pub const FEATURE_RSS: u64 = 1 << 1;

/// [`RX_MODE`]: frames to the own address.
pub const RX_UNICAST: u32 = 1 << 0;
/// Frames to all.
pub const RX_BROADCAST: u32 = 1 << 2;
/// All multicast frames.
pub const RX_ALL_MULTICAST: u32 = 1 << 3;
/// Everything.
pub const RX_PROMISCUOUS: u32 = 1 << 4;

/// [`SHARED_EVENTS`]: a receive queue stopped.
pub const EVENT_RX_ERROR: u32 = 1 << 0;
/// A transmit queue stopped.
pub const EVENT_TX_ERROR: u32 = 1 << 1;
/// The link changed.
pub const EVENT_LINK: u32 = 1 << 2;
/// The device's implementation changed.
pub const EVENT_IMPLEMENTATION: u32 = 1 << 3;

// --- RSS description. ---

/// Headers to hash (16 bits).
pub const RSS_TYPES: usize = 0;
/// Function (16 bits).
pub const RSS_FUNCTION: usize = 2;
/// Bytes of the key (16 bits).
pub const RSS_KEY_LEN: usize = 4;
/// Entries of the table (16 bits).
pub const RSS_TABLE_LEN: usize = 6;
/// The key.
pub const RSS_KEY: usize = 8;
/// The table: a receive queue for each hash.
pub const RSS_TABLE: usize = 48;
/// Bytes of the description.
pub const RSS_DESCRIPTION_LEN: usize = 176;

/// Addresses of IPv4, ports of TCP over it, and the same of IPv6.
pub const RSS_TYPES_ALL: u16 = 1 | 2 | 4 | 8;
/// Toeplitz.
pub const RSS_TOEPLITZ: u16 = 1;
/// Bytes of the longest key.
pub const RSS_KEY_MAX: usize = 40;
/// Entries of the largest table.
pub const RSS_TABLE_MAX: usize = 128;
/// [`SET_RSS_FIELDS`]: ports of TCP, which the device insists on, and the SPI of ESP over IPv4. Not ports of UDP: fragments would
/// go another way than their packet.
pub const RSS_FIELDS: u32 = 1 | 2 | 0x10;

// --- Queue descriptors, 256 bytes each. ---

/// Bytes of a descriptor.
pub const QUEUE_LEN: usize = 256;
/// Transmit: frames given and not announced yet.
pub const TXQ_DEFERRED: usize = 0;
/// Transmit: frames to gather before a doorbell; written by the device.
pub const TXQ_THRESHOLD: usize = 4;
/// Receive: 1 while the device wants doorbells (8 bits).
pub const RXQ_WANTS_DOORBELL: usize = 0;
/// Address of the transmit ring, or of receive ring 0.
pub const Q_RING: usize = 16;
/// Address of receive ring 1.
pub const RXQ_RING1: usize = 24;
/// Address of the completion ring.
pub const Q_COMPLETION: usize = 32;
/// Entries of the transmit ring, or of receive ring 0.
pub const Q_RING_SIZE: usize = 56;
/// Entries of receive ring 1.
pub const RXQ_RING1_SIZE: usize = 60;
/// Entries of the completion ring.
pub const Q_COMPLETION_SIZE: usize = 64;
/// Vector (8 bits).
pub const Q_VECTOR: usize = 72;
/// 1: the device stopped the queue (8 bits).
pub const Q_STOPPED: usize = 80;
/// Why.
pub const Q_ERROR: usize = 84;
/// Ten counters of 64 bits.
pub const Q_STATS: usize = 88;
/// Counters of a queue.
pub const Q_STATS_COUNT: usize = 10;

/// Entries of the smallest ring, and step of ring sizes.
pub const RING_MIN: u32 = 32;
/// Entries of the largest ring.
pub const RING_MAX: u32 = 4096;
/// Alignment of rings.
pub const RING_ALIGN: usize = 512;
/// Alignment of queue descriptors.
pub const QUEUE_ALIGN: usize = 128;
/// Most transmit and receive queues before revision 6, with one vector each.
pub const MAX_QUEUES: usize = 8;
/// Largest buffer, and frame, in bytes.
pub const BUFFER_MAX: usize = (1 << 14) - 1;
/// Smallest and largest MTU before revision 6.
pub const MTU: std::ops::RangeInclusive<u32> = 60..=9000;

// --- Descriptors, 16 bytes each. Words 0 and 1 of all but completions are the buffer's address. ---

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;
/// Word 2, bits 13..0: bytes (0 stands for 16384).
pub const LEN_MASK: u32 = (1 << 14) - 1;

/// Transmit, word 2: generation.
pub const TXD_GENERATION_SHIFT: u32 = 14;
/// Transmit, word 2: where the checksum is stored, bytes from the start of the frame (14 bits).
pub const TXD_CHECKSUM_SHIFT: u32 = 18;
/// Transmit, word 3, with the bytes in front of what is summed in bits 9..0: complete the checksum (offload mode 2).
pub const TXD_CHECKSUM: u32 = 2 << 10;
/// Transmit, word 3: last part of the frame.
pub const TXD_END: u32 = 1 << 12;
/// Transmit, word 3: report when done.
pub const TXD_REPORT: u32 = 1 << 13;

/// Transmit completion, word 0, bits 11..0: descriptor of the end of a frame.
pub const TCD_INDEX_MASK: u32 = (1 << 12) - 1;

/// Receive, word 2: buffer for the body of frames, not for their head.
pub const RXD_BODY: u32 = 1 << 14;
/// Receive, word 2: generation.
pub const RXD_GENERATION_SHIFT: u32 = 31;

/// Receive completion, word 0, bits 11..0: descriptor.
pub const RCD_INDEX_MASK: u32 = (1 << 12) - 1;
/// Word 0: last part of the frame.
pub const RCD_END: u32 = 1 << 14;
/// Word 0: first part of the frame.
pub const RCD_START: u32 = 1 << 15;
/// Word 0, bits 25..16: ring: the queue's number for ring 0, plus the number of queues for ring 1.
pub const RCD_RING_SHIFT: u32 = 16;
/// See [`RCD_RING_SHIFT`].
pub const RCD_RING_MASK: u32 = (1 << 10) - 1;
/// Word 2: the frame is not whole.
pub const RCD_ERROR: u32 = 1 << 14;
/// Completions, word 3: generation.
pub const CD_GENERATION: u32 = 1 << 31;
