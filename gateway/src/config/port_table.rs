//! Ports as they are written in the file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::port::{AfXdpMode, Fault, PortKindName, Side, SocketRole};
use super::value::{Mac, Prefix};

/// A port.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortTable {
    /// Name, unique: metrics, logs and routes refer to it.
    pub name: String,
    /// What it is made of.
    pub kind: PortKindName,
    /// "inside": outbound policies decide about what arrives. "outside": ESP is decrypted and clear traffic is held against the inbound policies.
    pub side: Side,
    /// Interface (af_xdp, tap). The name of the port when not given.
    pub interface: Option<String>,
    /// Queue pairs. One for each worker, as far as the port has them, when not given.
    pub queues: Option<u16>,
    /// 802.1Q tag, 1 to 4094. Ports with different tags may share an interface.
    pub vlan: Option<u16>,
    /// Ethernet address. The interface's own when not given.
    pub mac: Option<Mac>,
    /// Largest IP packet in bytes. The interface's when not given.
    pub mtu: Option<u16>,
    /// Own addresses with their networks.
    #[serde(default)]
    pub addresses: Vec<Prefix>,
    /// Routing table of its packets.
    #[serde(default)]
    pub vrf: u16,
    /// The kernel's side of the port: a TAP interface to make, with the port's Ethernet address and MTU. ARP, IKE, routing protocols, whatever is addressed to the gateway goes there, and what the host sends there leaves by the port. An af_xdp port has the interface itself for that; a TAP beside it takes what arrives through tunnels.
    pub tap: Option<String>,
    /// Settings of an af_xdp port.
    pub af_xdp: Option<AfXdpTable>,
    /// Settings of a pcap port.
    pub pcap: Option<PcapTable>,
    /// Settings of a memory port.
    pub memory: Option<MemoryTable>,
    /// Settings of a vhost-user port.
    #[serde(rename = "vhost-user")]
    pub vhost_user: Option<VhostUserTable>,
    /// Settings of a vfio port.
    pub vfio: Option<VfioTable>,
    /// Settings of an airoha port.
    pub airoha: Option<AirohaTable>,
    /// Faults put into what the port receives, for tests.
    pub fault: Option<Fault>,
}

/// Settings of an af_xdp port.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AfXdpTable {
    /// How the interface is reached.
    pub mode: AfXdpMode,
    /// Entries of each ring, a power of two.
    pub ring: u32,
    /// UDP ports whose ESP packets are taken beside plain ESP, 1 to 8 of them.
    pub steer_udp_ports: Vec<u16>,
    /// Destinations whose packets are taken. When not given: what the outbound policies protect (inside), nothing (outside).
    pub steer_destinations: Option<Vec<Prefix>>,
    /// Whether every IP packet is taken.
    pub steer_all: bool,
}

impl Default for AfXdpTable {
    fn default() -> Self {
        Self {
            mode: AfXdpMode::Auto,
            ring: 2048,
            steer_udp_ports: vec![4500],
            steer_destinations: None,
            steer_all: false,
        }
    }
}

/// Settings of a pcap port.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PcapTable {
    /// Capture to receive from. Nothing is received when not given.
    pub read: Option<PathBuf>,
    /// Capture to write what is sent to; overwritten.
    pub write: Option<PathBuf>,
    /// How many times the input is read; 0 is for ever.
    #[serde(rename = "loop")]
    pub repeat: Option<u64>,
}

/// Settings of a memory port.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryTable {
    /// Name of the port at the other end.
    pub peer: String,
    /// Frames that the ring to the peer holds.
    #[serde(default = "memory_ring")]
    pub ring: u32,
}

/// Settings of a vhost-user port.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserTable {
    /// Path of the socket; a relative one is seen from this file.
    pub socket: PathBuf,
    /// "server": the gateway makes the socket and peers connect. "client": the peer makes it.
    #[serde(default)]
    pub role: SocketRole,
    /// Access rights of a socket that the gateway makes, in octal.
    #[serde(default = "socket_mode")]
    pub mode: String,
}

fn socket_mode() -> String {
    "0600".into()
}

const fn memory_ring() -> u32 {
    1024
}

/// Settings of a vfio port.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VfioTable {
    /// PCI address, as `esplanade devices` shows it: "0000:01:00.0". The device is bound to vfio-pci before.
    pub device: String,
    /// Whether frames for other Ethernet addresses are received. Needed, and set, with a "mac" of one's own.
    #[serde(default)]
    pub promiscuous: bool,
    /// Descriptors of each receive ring, a power of two. The driver's choice when not given.
    pub rx_ring: Option<u32>,
    /// Descriptors of each send ring, a power of two. The driver's choice when not given.
    pub tx_ring: Option<u32>,
    /// Whether the device may be used where no IOMMU confines it: it can then write to all of the machine's memory.
    #[serde(default)]
    pub no_iommu: bool,
    /// Whether a driver that was not verified on real hardware may be used.
    #[serde(default)]
    pub experimental: bool,
}

/// Settings of an airoha port. All ports of a block, and the SOE in it, may name the same device: it is opened once, for one worker.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AirohaTable {
    /// Platform device of the Ethernet block, bound to vfio-platform, such as "1fb50000.ethernet".
    pub device: Option<String>,
    /// Instead of a device: vfio-user socket of a model. A relative path is seen from this file.
    pub socket: Option<PathBuf>,
    /// Which of the block's MACs: 1 (the switch of the LAN ports) to 4.
    pub gdm: u8,
    /// QDMA instance that serves it. 0 for the first MAC, 1 for the others when not given.
    pub qdma: Option<u8>,
    /// Worker that owns the block.
    #[serde(default)]
    pub worker: u16,
    /// Whether the device may be used where no IOMMU confines it: it can then write to all of the machine's memory.
    #[serde(default)]
    pub no_iommu: bool,
    /// Whether a driver that no board has run may be used: it must be true.
    #[serde(default)]
    pub experimental: bool,
}
