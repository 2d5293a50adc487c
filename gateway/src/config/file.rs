//! The file as it is written: one struct per table. The comments are the descriptions in the JSON schema.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::engine::EngineTable;
use super::port::{AfXdpMode, Fault, PortKindName, Side, SocketRole};
use super::value::{Mac, Prefix};
use crate::engine::choice::Objective;

/// Configuration of an Esplanade gateway.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileConfig {
    /// SA files, or directories of them; relative paths are seen from this file.
    pub sa_files: Vec<PathBuf>,
    /// Threads that move packets.
    pub workers: Workers,
    /// Packet memory.
    pub memory: Memory,
    /// Ports.
    pub port: Vec<PortTable>,
    /// Look-aside engines.
    pub engine: Vec<EngineTable>,
    /// Static routes. Networks of the ports' own addresses need none.
    pub route: Vec<RouteTable>,
    /// Static neighbours.
    pub neighbour: Vec<NeighbourTable>,
    /// Bounds of the SA store.
    pub sas: Sas,
    /// Durable sequence numbers.
    pub leases: Leases,
    /// Crypto providers.
    pub crypto: Crypto,
    /// Reassembly of fragmented ESP packets.
    pub reassembly: Reassembly,
    /// Scrape endpoint.
    pub metrics: Metrics,
    /// Control socket.
    pub api: Api,
    /// Logging.
    pub log: Log,
    /// Who the gateway is after it has opened its ports.
    pub privileges: Privileges,
    /// For tests only.
    pub test: Test,
}

/// What an idle worker does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Idle {
    /// Polls on for ever: lowest latency, a whole core.
    Spin,
    /// Polls for `spin_us`, then sleeps until a port has something.
    #[default]
    Sleep,
}

/// Threads that move packets.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// How many; 1 when neither this nor `cpus` is given.
    pub count: Option<u16>,
    /// CPUs to pin them to, one each.
    pub cpus: Option<Vec<u16>>,
    /// What an idle worker does.
    pub idle: Idle,
    /// Microseconds without a packet before it sleeps.
    pub spin_us: u32,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            count: None,
            cpus: None,
            idle: Idle::Sleep,
            spin_us: 50,
        }
    }
}

impl Workers {
    /// How many.
    pub fn number(&self) -> usize {
        match (&self.cpus, self.count) {
            (Some(cpus), _) => cpus.len(),
            (None, count) => usize::from(count.unwrap_or(1)),
        }
    }
}

/// Whether packet memory is in huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Huge {
    /// If there are any.
    #[default]
    Auto,
    /// Or the gateway does not start.
    Require,
    /// No.
    Never,
}

/// Packet memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// Frames. Enough for all rings of all ports, plus 512 for each worker.
    pub frames: u32,
    /// Bytes of a frame: head-room, largest packet and tail-room together. 2048 for an MTU of 1500, 10240 for 9000.
    pub stride: u32,
    /// Huge pages.
    pub huge: Huge,
    /// Whether the memory is locked, so that it is never swapped out.
    pub lock: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            frames: 16_384,
            stride: 2048,
            huge: Huge::Auto,
            lock: true,
        }
    }
}

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

/// A static route: exactly one of `port` or `via`, `tunnel`, `blackhole`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteTable {
    /// Destinations.
    pub to: Prefix,
    /// Router, in a network of one of the ports.
    pub via: Option<IpAddr>,
    /// Port. That of the router's network when not given.
    pub port: Option<String>,
    /// Tunnel of an SA file: the route makes it a route-based VPN.
    pub tunnel: Option<String>,
    /// Drop the packets.
    #[serde(default)]
    pub blackhole: bool,
    /// Routing table.
    #[serde(default)]
    pub vrf: u16,
}

/// A static neighbour.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NeighbourTable {
    /// Address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Port.
    pub port: String,
}

/// Bounds of the SA store.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sas {
    /// Most SAs, those being retired included.
    pub max: u32,
}

impl Default for Sas {
    fn default() -> Self {
        Self { max: 1 << 20 }
    }
}

/// Durable sequence numbers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Leases {
    /// File that remembers how far each key's sequence numbers were given out. On a disk that survives a power cut; never copied, never restored from a backup.
    pub path: PathBuf,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            path: "/var/lib/esplanade/leases".into(),
        }
    }
}

/// Who ciphers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Crypto {
    /// Provider to use for everything that it offers: "ipsec-mb", "aws-lc", "ring" or "rustcrypto". Chosen by CPU and measurement when not given.
    pub provider: Option<String>,
    /// Whether workers help each other: one SA can then use several CPUs.
    pub parallel: bool,
    /// What decides where an SA with `engine = "auto"` is ciphered: "throughput", "cycles" of the workers, or "auto": throughput while workers are saturated, else cycles.
    pub objective: String,
}

impl Default for Crypto {
    fn default() -> Self {
        Self {
            provider: None,
            parallel: false,
            objective: Objective::default().to_string(),
        }
    }
}

/// Reassembly of fragmented ESP packets.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reassembly {
    /// Whether fragments of ESP packets are put together; else they are dropped as `fragment_off`.
    pub enabled: bool,
    /// Most packets under way in each worker.
    pub max_packets: u32,
    /// Milliseconds until an incomplete packet is given up.
    pub timeout_ms: u32,
}

impl Default for Reassembly {
    fn default() -> Self {
        Self {
            enabled: true,
            max_packets: 256,
            timeout_ms: 1000,
        }
    }
}

/// Scrape endpoint: /metrics, /healthz, /readyz.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Whether it is served.
    pub enabled: bool,
    /// Address and port.
    pub listen: SocketAddr,
    /// How many SAs have metrics of their own; tunnels always have.
    pub max_sas: u32,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: SocketAddr::from(([127, 0, 0, 1], 9550)),
            max_sas: 1000,
        }
    }
}

/// Control socket for `esplanade sa`, `policy`, `stats`, `reload`, `capture`, `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// Whether there is one.
    pub enabled: bool,
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// Group that may use it besides the gateway's own user. Nobody when not given.
    pub group: Option<String>,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: "/run/esplanade/api.sock".into(),
            group: None,
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging, to standard error.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Filter: a level, or levels by module such as "info,control=debug". The environment variable `ESPLANADE_LOG` wins.
    pub level: String,
    /// Format.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// Who the gateway is after it has opened its ports. Nothing changes when not given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Privileges {
    /// User.
    pub user: Option<String>,
    /// Group. The user's own when not given.
    pub group: Option<String>,
}

/// For tests only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Test {
    /// Makes a run repeat exactly, IVs included: the lease store is thrown away, so this is refused together with af_xdp, vfio or tap ports.
    pub seed: Option<u64>,
}
