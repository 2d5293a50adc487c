//! `gateway.toml`: what the gateway is made of. SAs and policies are in SA files, see [`sa_store`].
//!
//! `deploy/examples/gateway.toml` shows every key with its meaning and default, `deploy/schema/gateway.schema.json`
//! is the schema for editors. All problems are reported at once, each with file, line and column.

mod check;
mod decode;
mod engine;
mod file;
mod ike;
mod port;
mod port_table;
mod problem;
mod value;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

pub use engine::{DeviceAt, EngineConfig, EngineKind, EngineTable, EngineType};
pub use file::{
    Api, Crypto, Exception, Foreign, Huge, Idle, Kernel, Leases, Log, LogFormat, Memory, Metrics,
    NeighbourTable, Privileges, Reassembly, Rekey, RouteTable, Sas, Test, Workers,
};
pub use ike::{IkeConfig, IkeTable, TakeTable};
pub use port::{
    AfXdpMode, Airoha, Fault, Nic, PortConfig, PortKind, PortKindName, Repeat, Side, SocketRole,
    Steer,
};
pub use port_table::PortTable;
pub use problem::{Place, Problem, Problems};
pub use value::{Mac, Prefix};

/// A checked configuration: every name refers to something, every number is in its range.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayConfig {
    /// Where it was read from; relative paths were resolved against its directory.
    pub file: PathBuf,
    /// Threads that move packets.
    pub workers: Workers,
    /// Packet memory.
    pub memory: Memory,
    /// Ports, in the order of the file.
    pub ports: Vec<PortConfig>,
    /// Engines; SAs name them by their places here.
    pub engines: Vec<EngineConfig>,
    /// Static routes; those of the ports' own networks are not among them.
    pub routes: Vec<RouteConfig>,
    /// Static neighbours.
    pub neighbours: Vec<NeighbourConfig>,
    /// What is mirrored of the kernel's tables.
    pub kernel: Kernel,
    /// SA files and directories of them.
    pub sa_files: Vec<PathBuf>,
    /// Bounds of the SA store.
    pub sas: Sas,
    /// Durable sequence numbers.
    pub leases: Leases,
    /// Rekeys.
    pub rekey: Rekey,
    /// Crypto providers.
    pub crypto: Crypto,
    /// Reassembly of fragmented ESP packets.
    pub reassembly: Reassembly,
    /// Bounds of what is given to the kernel.
    pub exception: Exception,
    /// Scrape endpoint; `None`: no HTTP.
    pub metrics: Option<SocketAddr>,
    /// How many SAs are exposed one by one.
    pub metrics_max_sas: u32,
    /// API socket.
    pub api: Option<Api>,
    /// Logging.
    pub log: Log,
    /// User and group after the start.
    pub privileges: Privileges,
    /// SAs and policies of an IKE daemon.
    pub ike: Option<IkeConfig>,
    /// Seed of deterministic runs.
    pub test_seed: Option<u64>,
}

/// A static route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteConfig {
    /// Destinations.
    pub to: Prefix,
    /// Routing table.
    pub vrf: u16,
    /// Where packets go.
    pub next: NextHop,
}

/// Target of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// Out of a port, to a router or, without one, to the destination itself.
    Port {
        /// Index into [`GatewayConfig::ports`].
        port: usize,
        /// Router.
        via: Option<IpAddr>,
    },
    /// Into a tunnel (route-based VPN).
    Tunnel(String),
    /// Nowhere: packets are dropped as `no_route`.
    Blackhole,
}

/// A static neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeighbourConfig {
    /// Address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Index into [`GatewayConfig::ports`].
    pub port: usize,
}

/// Loads and checks a file.
///
/// # Errors
/// Every problem found.
pub fn load(path: &Path) -> Result<GatewayConfig, Problems> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Problems::whole(path, format!("cannot read: {e}")))?;
    parse(&text, path)
}

/// Checks a text as if it were the file `path`.
///
/// # Errors
/// Every problem found.
pub fn parse(text: &str, path: &Path) -> Result<GatewayConfig, Problems> {
    let mut problems = Problems::new(path, text);
    let decoded = decode::decode(text, &mut problems);
    let config = decoded.and_then(|d| check::check(d, path, &mut problems));
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(problems.sorted()),
    }
}

/// JSON schema of the file.
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(file::FileConfig).to_value()
}

/// Entry for fuzzers: any text is either refused with a place or accepted.
#[doc(hidden)]
pub fn fuzz_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(problems) = parse(text, Path::new("fuzz.toml")) {
        assert!(!problems.is_empty());
        let lines = u32::try_from(text.lines().count().max(1)).unwrap_or(u32::MAX);
        assert!(problems.iter().all(|p| p.place.line <= lines + 1));
    }
}

#[cfg(test)]
mod tests;
