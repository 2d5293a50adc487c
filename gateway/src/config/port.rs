//! Ports as the configuration describes them.

use std::path::PathBuf;

use pmd::airoha::Gdm;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::engine::DeviceAt;
use super::value::{Mac, Prefix};

/// Which side of the gateway a port is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Clear traffic of our own networks: outbound policies decide.
    Inside,
    /// The network that is not trusted: ESP is decrypted, clear traffic is held against the inbound policies.
    Outside,
}

/// Kinds of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortKindName {
    /// Any Linux interface through AF_XDP sockets.
    AfXdp,
    /// A TAP interface that the gateway makes.
    Tap,
    /// Capture files, for offline use.
    Pcap,
    /// Joined to another memory port of this gateway.
    Memory,
    /// A vhost-user socket: QEMU guests, containers and user-space switches.
    #[serde(rename = "vhost-user")]
    VhostUser,
    /// A NIC that the gateway owns, through VFIO.
    Vfio,
    /// A port of the Ethernet block of Airoha's EN7581. Experimental: no board has run its driver.
    Airoha,
}

/// Who opens a vhost-user socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SocketRole {
    /// The gateway listens, peers connect.
    #[default]
    Server,
    /// The peer listens, the gateway connects, again and again.
    Client,
}

/// How an AF_XDP port reaches the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AfXdpMode {
    /// The fastest that the driver allows: zero-copy, else native copy, else generic.
    #[default]
    Auto,
    /// Zero-copy or fail.
    ZeroCopy,
    /// The driver's hook with copies, or fail.
    Copy,
    /// The kernel's generic hook; works everywhere, slow.
    Generic,
}

/// What the XDP program takes from the interface beside ESP; the rest goes on to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steer {
    /// UDP packets to these ports that carry ESP.
    pub udp_ports: Vec<u16>,
    /// Packets to these destinations. `None`: what the outbound policies protect (inside), nothing (outside).
    pub destinations: Option<Vec<Prefix>>,
    /// Every IP packet.
    pub all: bool,
}

/// A NIC that the gateway owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// PCI address: `0000:01:00.0`.
    pub device: String,
    /// Whether frames for other addresses are received.
    pub promiscuous: bool,
    /// Descriptors of each receive ring; `None`: the driver's choice.
    pub rx_ring: Option<u32>,
    /// Descriptors of each send ring; `None`: the driver's choice.
    pub tx_ring: Option<u32>,
    /// Whether the device may be used without an IOMMU.
    pub no_iommu: bool,
    /// Whether drivers that nothing has verified may be used.
    pub experimental: bool,
}

/// A port of an EN7581's Ethernet block. The block's other ports and its secure offload engine may name the same device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Airoha {
    /// Where the block is.
    pub at: DeviceAt,
    /// Which of its MACs.
    pub gdm: Gdm,
    /// QDMA instance.
    pub instance: u8,
    /// Worker that owns the block.
    pub worker: usize,
    /// Own address: the MACs' registers stay with the kernel.
    pub mac: Mac,
}

/// How often a capture is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// This many times; then the port is finished.
    Times(u64),
    /// For ever.
    Forever,
}

/// Faults put into what a port receives, for tests. Each rate is a probability per frame.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fault {
    /// Frames lost.
    pub drop: f64,
    /// Frames doubled.
    pub duplicate: f64,
    /// Frames that change places with the next one.
    pub reorder: f64,
    /// Frames in which one bit is flipped.
    pub flip: f64,
    /// Seed, so that a run can be repeated.
    pub seed: u64,
}

/// What a port is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// AF_XDP sockets.
    AfXdp {
        /// Interface.
        interface: String,
        /// Mode.
        mode: AfXdpMode,
        /// Entries of each ring, a power of two.
        ring: u32,
        /// What is taken.
        steer: Steer,
    },
    /// TAP interface.
    Tap {
        /// Interface to make.
        interface: String,
    },
    /// Capture files.
    Pcap {
        /// Input.
        read: Option<PathBuf>,
        /// Output.
        write: Option<PathBuf>,
        /// How often the input is read.
        repeat: Repeat,
    },
    /// One end of a pair.
    Memory {
        /// Index of the other end.
        peer: usize,
        /// Frames that a ring holds.
        ring: usize,
    },
    /// A vhost-user socket.
    VhostUser {
        /// Path.
        socket: PathBuf,
        /// Who opens it.
        role: SocketRole,
        /// Access rights of a socket that the gateway makes.
        mode: u32,
    },
    /// A NIC through VFIO.
    Vfio(Nic),
    /// A port of an Ethernet block.
    Airoha(Airoha),
}

impl PortKind {
    /// Its name.
    pub fn name(&self) -> PortKindName {
        match self {
            Self::AfXdp { .. } => PortKindName::AfXdp,
            Self::Tap { .. } => PortKindName::Tap,
            Self::Pcap { .. } => PortKindName::Pcap,
            Self::Memory { .. } => PortKindName::Memory,
            Self::VhostUser { .. } => PortKindName::VhostUser,
            Self::Vfio(_) => PortKindName::Vfio,
            Self::Airoha(_) => PortKindName::Airoha,
        }
    }

    /// Whether packets come from or go to other machines.
    pub fn is_live(&self) -> bool {
        !matches!(self, Self::Pcap { .. } | Self::Memory { .. })
    }
}

/// A port.
#[derive(Clone, Debug, PartialEq)]
pub struct PortConfig {
    /// Operator's name, unique.
    pub name: String,
    /// Side.
    pub side: Side,
    /// What it is made of.
    pub kind: PortKind,
    /// Queue pairs; `None`: one for each worker, as far as the port has them.
    pub queues: Option<u16>,
    /// 802.1Q tag of all its packets.
    pub vlan: Option<u16>,
    /// Ethernet address; `None`: the interface's own.
    pub mac: Option<Mac>,
    /// Largest IP packet in bytes; `None`: the interface's.
    pub mtu: Option<u16>,
    /// Own addresses with their networks.
    pub addresses: Vec<Prefix>,
    /// Routing table of its packets.
    pub vrf: u16,
    /// The kernel's side of the port: name of the TAP interface to make.
    pub tap: Option<String>,
    /// Faults for tests.
    pub fault: Option<Fault>,
}
