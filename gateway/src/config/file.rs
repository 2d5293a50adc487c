//! The file as it is written: one struct per table. The comments are the descriptions in the JSON schema.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::engine::EngineTable;
use super::ike::IkeTable;
use super::port_table::PortTable;
use super::value::{Mac, Prefix};
use crate::engine::choice::Objective;
use crate::worker::PuntLimits;

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
    /// What is mirrored of the kernel's tables.
    pub kernel: Kernel,
    /// Bounds of the SA store.
    pub sas: Sas,
    /// SAs and policies that an IKE daemon puts into the kernel.
    pub ike: IkeTable,
    /// Durable sequence numbers.
    pub leases: Leases,
    /// What happens between a soft limit and the end of the old SA.
    pub rekey: Rekey,
    /// Crypto providers.
    pub crypto: Crypto,
    /// Reassembly of fragmented ESP packets.
    pub reassembly: Reassembly,
    /// Bounds of what is given to the kernel through the ports' TAPs.
    pub exception: Exception,
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

/// What becomes of destinations that the kernel reaches over interfaces that are no ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Foreign {
    /// The kernel gets the packets by the exception path.
    #[default]
    Punt,
    /// The packets are dropped.
    Drop,
}

/// What is mirrored of the kernel's tables, so that routing daemons, `ip` and the kernel's neighbour discovery work for the gateway. Static routes and neighbours of this file win at equal prefix length.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kernel {
    /// Whether routes are mirrored.
    pub routes: bool,
    /// Whether neighbours are mirrored, and the kernel is asked to find those that are not known.
    pub neighbours: bool,
    /// Whether addresses of the host are the gateway's own.
    pub addresses: bool,
    /// The kernel's routing tables for VRF 0, beside the local one: numbers as in `ip route show table`. Longest prefix first over all; at equal length an earlier table wins.
    pub tables: Vec<u32>,
    /// Names of the kernel's VRF devices, and the VRFs that their tables are here.
    pub vrfs: BTreeMap<String, u16>,
    /// "punt": packets to destinations beyond interfaces that are no ports go to the kernel, which forwards them if it is set up to. "drop": they are dropped.
    pub foreign: Foreign,
    /// Bytes that the kernel may queue for the gateway. When they do not suffice everything is read again.
    pub receive_buffer: u32,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            routes: false,
            neighbours: false,
            addresses: false,
            tables: vec![254],
            vrfs: BTreeMap::new(),
            foreign: Foreign::Punt,
            receive_buffer: 32 << 20,
        }
    }
}

impl Kernel {
    /// Whether anything is mirrored.
    pub fn enabled(&self) -> bool {
        self.routes || self.neighbours || self.addresses
    }
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

/// What happens between a soft limit and the end of the old SA, for SAs of files. An IKE daemon decides for its own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rekey {
    /// Per cent by which soft limits come earlier at most, each by chance: SAs that began together do not expire together.
    pub jitter_percent: u8,
    /// Milliseconds from the time every worker has a successor until the tunnel sends on it: what the peer needs to install its side.
    pub switch_delay_ms: u32,
    /// Milliseconds that a superseded inbound SA stays at least, whether or not the files still name it.
    pub overlap_ms: u32,
    /// Milliseconds without a packet on it before it goes.
    pub quiet_ms: u32,
    /// Milliseconds after which it goes in any case.
    pub overlap_max_ms: u32,
    /// Per cent of the way from the soft to the hard limit after which a missing successor is an alarm (`rekey_overdue`).
    pub overdue_percent: u8,
    /// Program that is run when a successor is wanted: arguments tunnel, SA, direction and reason. It brings the successor by writing SA files.
    pub hook: Option<PathBuf>,
    /// Milliseconds that it may run; then it is killed with its process group.
    pub hook_timeout_ms: u32,
    /// How many may run at once.
    pub hook_parallel: u16,
    /// Milliseconds from the end of one attempt to the next while no successor has come; doubles with each.
    pub retry_ms: u32,
    /// Most milliseconds between two attempts.
    pub retry_max_ms: u32,
}

impl Default for Rekey {
    fn default() -> Self {
        Self {
            jitter_percent: 10,
            switch_delay_ms: 2000,
            overlap_ms: 30_000,
            quiet_ms: 5000,
            overlap_max_ms: 600_000,
            overdue_percent: 50,
            hook: None,
            hook_timeout_ms: 30_000,
            hook_parallel: 4,
            retry_ms: 10_000,
            retry_max_ms: 300_000,
        }
    }
}

impl Rekey {
    /// As control takes it.
    pub fn config(&self) -> control::rekey::Config {
        let ms = |n: u32| std::time::Duration::from_millis(u64::from(n));
        control::rekey::Config {
            jitter_percent: self.jitter_percent,
            switch_delay: ms(self.switch_delay_ms),
            overlap: ms(self.overlap_ms),
            quiet: ms(self.quiet_ms),
            overlap_max: ms(self.overlap_max_ms),
            overdue_percent: self.overdue_percent,
            hook: self.hook.clone(),
            hook_timeout: ms(self.hook_timeout_ms),
            hook_parallel: usize::from(self.hook_parallel),
            retry: ms(self.retry_ms),
            retry_max: ms(self.retry_max_ms),
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

/// Bounds of what is given to the kernel through the ports' TAPs. Rates are frames per second, for each port and worker; what is beyond is dropped as `punt_limit`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Exception {
    /// IKE.
    pub ike: u32,
    /// Routing and redundancy protocols: BGP, OSPF, IS-IS, RIP, LDP, BFD, PIM, IGMP, VRRP.
    pub routing: u32,
    /// ARP and neighbour discovery.
    pub neighbour: u32,
    /// Other ICMP.
    pub icmp: u32,
    /// Everything else: ssh, DNS, what is not IP.
    pub other: u32,
    /// Frames that a worker writes in one poll round, the most important class first.
    pub per_round: u16,
}

impl Default for Exception {
    fn default() -> Self {
        let PuntLimits {
            rates: [ike, routing, neighbour, icmp, other],
            per_round,
        } = PuntLimits::default();
        Self {
            ike,
            routing,
            neighbour,
            icmp,
            other,
            per_round,
        }
    }
}

impl Exception {
    /// As workers want it.
    pub fn limits(&self) -> PuntLimits {
        PuntLimits {
            rates: [
                self.ike,
                self.routing,
                self.neighbour,
                self.icmp,
                self.other,
            ],
            per_round: self.per_round,
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
    /// Milliseconds that news of the kernel's SAs are looked at later than they come.
    pub netlink_delay_ms: u16,
}
