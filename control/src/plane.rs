//! What control needs of the data path. The gateway implements it.

use std::path::PathBuf;
use std::sync::Arc;

use sa_store::ledger::WorkerCounters;
use sa_store::policy::Policy;
use sa_store::report::Report;
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};
use sa_store::spd::PolicyIdx;
use serde::{Deserialize, Serialize};

/// Counters of one queue pair of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueCounters {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames lost before the gateway saw them.
    pub rx_dropped: u64,
    /// Frames that arrived broken.
    pub rx_errors: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames that could not be sent.
    pub tx_errors: u64,
}

/// A worker, for reports.
#[derive(Clone, Debug)]
pub struct WorkerView {
    /// Its account.
    pub counters: Arc<WorkerCounters>,
    /// CPU that it is pinned to.
    pub cpu: Option<usize>,
}

/// A port, for reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortReport {
    /// Operator's name.
    pub name: String,
    /// `af_xdp`, `tap`, `pcap`, `memory`.
    pub kind: String,
    /// `inside` or `outside`.
    pub side: String,
    /// How frames cross it: `zero-copy`, `copy`, …
    pub mode: String,
    /// Ethernet address.
    pub mac: String,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Counters by queue.
    pub queues: Vec<QueueCounters>,
    /// What its device or vhost-user peer says; absent for ports without one, and for the further VLANs of a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceReport>,
}

/// A port's device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Whether frames can pass.
    pub link_up: bool,
    /// Speed of the link; 0 when the device does not say.
    pub mbps: u32,
    /// The device's own counters, by name.
    pub statistics: Vec<(String, u64)>,
    /// How often it broke a rule, by rule.
    pub errors: Vec<(String, u64)>,
}

/// Which crypto provider serves a suite, and what it costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProviderReport {
    /// Suite.
    pub suite: String,
    /// Provider.
    pub provider: String,
    /// Whether it is the one in use.
    pub selected: bool,
    /// Measured at start: mean of the nanoseconds to seal and to open one packet of 1420 bytes; absent when it was not measured.
    pub ns_per_packet: Option<f64>,
}

/// A look-aside engine, and how far it is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineReport {
    /// Operator's name.
    pub name: String,
    /// `eip93`, `soe`.
    pub kind: String,
    /// Worker that owns it.
    pub worker: usize,
    /// `serving`, `quarantined`, `recovering`, `dead`.
    pub state: String,
    /// Why it was taken out of service the last time; `none`: it never was.
    pub reason: String,
    /// Packets given to it.
    pub submitted: u64,
    /// Packets that came back.
    pub completed: u64,
    /// Bytes of ESP given to it.
    pub bytes: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Packets that it had no room for at first.
    pub busy: u64,
    /// Canaries sent.
    pub canaries: u64,
    /// Canaries that came back wrong or not at all.
    pub canaries_failed: u64,
    /// Packets that software ciphered again.
    pub samples: u64,
    /// Those of which it made something else.
    pub samples_failed: u64,
    /// Packets that failed, or did not come back in time.
    pub lost: u64,
    /// Results that cannot be right.
    pub wrong: u64,
    /// Times that it was taken out of service.
    pub quarantines: u64,
    /// Attempts to bring it back.
    pub resets: u64,
    /// Attempts that failed.
    pub resets_failed: u64,
    /// Packets that the CPU ciphered while it was out of service.
    pub fallback: u64,
    /// Packets that could not be carried while it was out of service.
    pub refused: u64,
}

/// A capture to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Port.
    pub port: String,
    /// File to write, on the gateway's machine.
    pub file: PathBuf,
    /// Stop after this many frames.
    #[serde(default)]
    pub packets: Option<u64>,
    /// Bytes kept of each frame.
    #[serde(default)]
    pub snap: Option<u32>,
}

/// What a capture holds so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// Port.
    pub port: String,
    /// File.
    pub file: PathBuf,
    /// Frames written.
    pub packets: u64,
    /// Frames that could not be written.
    pub lost: u64,
}

/// What became of an SA that was to be installed in an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Installed {
    /// The engine carries it.
    Engine,
    /// An earlier life has used it, and the engine cannot go on from there: outbound, it is stopped and needs a successor.
    Stopped(String),
    /// Inbound, the CPU opens its packets until then.
    Cpu(String),
}

/// The running data path.
pub trait DataPlane: Send + Sync {
    /// Workers by number.
    fn workers(&self) -> &[WorkerView];

    /// Ports by number.
    fn ports(&self) -> Vec<PortReport>;

    /// Crypto providers.
    fn providers(&self) -> Vec<ProviderReport>;

    /// Look-aside engines by number.
    fn engines(&self) -> Vec<EngineReport> {
        Vec::new()
    }

    /// Packets that a policy decided about, all workers together. `None` beyond the counters that workers have: these
    /// policies share one.
    fn policy_hits(&self, direction: Direction, policy: PolicyIdx) -> Option<u64>;

    /// What workers have told since the last call.
    fn reports(&self, take: &mut dyn FnMut(Report));

    /// Gateway clock, nanoseconds: the one that workers use.
    fn now(&self) -> u64;

    /// Whether every worker's thread still runs.
    fn alive(&self) -> bool;

    /// Frames that are free in packet memory, and how many there are.
    fn frames(&self) -> (u64, u64);

    /// These policies are running, which those before were not: whatever follows them, such as the destinations that
    /// are taken from interfaces, is to be brought in line.
    fn published(&self, policies: &[&Policy]);

    /// Where the SA is to be ciphered; `before` is the one that it succeeds.
    ///
    /// # Errors
    /// No engine can carry it as it asks, for the operator. There is no silent fall-back to the CPU.
    fn place(&self, spec: &SaSpec, before: Option<&SaEntry>) -> Result<Place, String> {
        let _ = before;
        match spec.offload {
            OffloadMode::Software => Ok(Place::CPU),
            _ => Err("there is no engine".into()),
        }
    }

    /// Prepares an engine for an SA that [`place`](Self::place) has put on it, before workers see the SA.
    ///
    /// # Errors
    /// The engine refuses it, for the operator.
    fn install(&self, sa: &Arc<SaEntry>) -> Result<Installed, String> {
        Err(format!("there is no engine for SA \"{}\"", sa.spec.name))
    }

    /// Lets an engine forget an SA that no worker uses any more.
    fn remove(&self, sa: SaId) {
        let _ = sa;
    }

    /// The kernel has another MTU for the interface of a port, bytes of an IP packet.
    fn set_mtu(&self, port: u16, mtu: u32) {
        let _ = (port, mtu);
    }

    /// Starts a capture on a port.
    ///
    /// # Errors
    /// Why not, for the operator.
    fn capture_start(&self, request: &CaptureRequest) -> Result<(), String>;

    /// Ends the capture on a port.
    ///
    /// # Errors
    /// There is none.
    fn capture_stop(&self, port: &str) -> Result<CaptureReport, String>;
}
