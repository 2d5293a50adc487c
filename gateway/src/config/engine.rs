//! Look-aside engines as the configuration describes them.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pmd::eip93::Unknowns;
use pmd::soe::Assumptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::decode::Decoded;
use super::problem::Problems;

/// Most engines: an SA names its engine with 8 bits.
const MOST: usize = 64;

/// Kinds of engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// EIP-93, in MediaTek MT7621 and Airoha EN7581: AES-CBC and AES-CTR with HMAC, crypto and packet mode.
    Eip93,
    /// Secure offload engine of Airoha EN7581: packet mode.
    Soe,
}

/// A look-aside engine, which SAs of any port can use.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineTable {
    /// Name, unique: SA files, metrics and logs refer to it.
    pub name: String,
    /// What it is.
    pub kind: EngineKind,
    /// Platform device, bound to vfio-platform, such as "1fb70000.crypto". For an SOE the Ethernet block.
    pub device: Option<String>,
    /// The SOE's own device, where the Ethernet block does not hold its registers.
    pub registers: Option<String>,
    /// Instead of a device: vfio-user socket of a model. A relative path is seen from this file.
    pub socket: Option<PathBuf>,
    /// Whether the device may be used where no IOMMU confines it: it can then write to all of the machine's memory.
    #[serde(default)]
    pub no_iommu: bool,
    /// Worker that owns it; the others reach it through that one.
    #[serde(default)]
    pub worker: u16,
    /// Part of the outbound packets that are verified by software: 0.0 to 1.0.
    #[serde(default = "verify")]
    pub verify: f64,
    /// Milliseconds between two known packets that are sent through it to watch it.
    #[serde(default = "canary_ms")]
    pub canary_ms: u32,
    /// Lost packets, of 10 000 over a second, above which it is taken out of service.
    #[serde(default = "max_lost")]
    pub max_lost: u16,
    /// Milliseconds after which a packet without a result is lost: 10 to 2000. 50 for an EIP-93, 1000 for an SOE and for models when not given.
    pub deadline_ms: Option<u16>,
    /// What is not known of silicon, read otherwise than the safe way. For a first run on a board.
    #[serde(default)]
    pub assume: AssumeTable,
}

impl EngineTable {
    fn deadline(&self) -> Duration {
        let usual = match (self.kind, &self.device) {
            (EngineKind::Eip93, Some(_)) => 50,
            // A model shares the CPU with others.
            _ => 1000,
        };
        Duration::from_millis(self.deadline_ms.unwrap_or(usual).into())
    }
}

const fn verify() -> f64 {
    1.0 / 1024.0
}

const fn canary_ms() -> u32 {
    1000
}

const fn max_lost() -> u16 {
    100
}

/// Readings of what is not known of silicon. Each key belongs to one kind of engine; see deploy/en7581.md and deploy/mt7621.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AssumeTable {
    /// EIP-93: packets may begin at any byte.
    pub unaligned_data: Option<bool>,
    /// EIP-93: spacing of descriptors in words.
    pub ring_offset: Option<u32>,
    /// EIP-93: the length of a sealed result counts the ICV.
    pub length_counts_icv: Option<bool>,
    /// EIP-93: AES-CTR in packet mode.
    pub counter_mode_in_packet_mode: Option<bool>,
    /// EIP-93: one packet of a packet-mode SA at a time.
    pub one_number_at_a_time: Option<bool>,
    /// EIP-93: ring pointers survive a reset of the rings.
    pub pointers_survive: Option<bool>,
    /// SOE: AES-GCM may be used.
    pub gcm: Option<bool>,
    /// SOE: the UDP source port is the upper half of its register.
    pub udp_source_port_high: Option<bool>,
    /// SOE: only SAs with equal UDP ports are taken.
    pub udp_ports_equal: Option<bool>,
    /// SOE: packets of one SA in the engine at once, 1 to 7.
    pub in_flight: Option<u8>,
    /// SOE: SA slots used, 1 to 32.
    pub slots: Option<u8>,
    /// SOE: transmit ring for requests, 0 to 31.
    pub ring: Option<u8>,
    /// SOE: that ring waits instead of dropping.
    pub lossless: Option<bool>,
    /// SOE: one doorbell may announce several requests.
    pub batch: Option<bool>,
    /// SOE: keys in the staging window are overwritten after each commit.
    pub scrub_staging: Option<bool>,
    /// SOE: number of an SA's first packet.
    pub first_number: Option<u32>,
    /// SOE: the engine copies the inner DF flag.
    pub copies_df: Option<bool>,
    /// SOE: the engine pads as little as it can.
    pub pads_least: Option<bool>,
    /// SOE: inbound packets come back as they were sealed.
    pub knows_by_content: Option<bool>,
    /// SOE: outer TTL that the engine writes.
    pub ttl: Option<u8>,
}

/// Where an engine, or an Ethernet block, is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceAt {
    /// Platform devices through VFIO.
    Platform {
        /// The device.
        device: String,
        /// The SOE's registers, where they are another device.
        registers: Option<String>,
        /// Whether it may be used without an IOMMU.
        no_iommu: bool,
    },
    /// A model.
    Socket(PathBuf),
}

impl DeviceAt {
    /// Whether both are the same device, however it is to be used.
    pub fn is_same(&self, other: &DeviceAt) -> bool {
        match (self, other) {
            (Self::Platform { device: a, .. }, Self::Platform { device: b, .. }) => a == b,
            (Self::Socket(a), Self::Socket(b)) => a == b,
            _ => false,
        }
    }

    /// Whether it may be used without an IOMMU.
    pub fn no_iommu(&self) -> bool {
        matches!(self, Self::Platform { no_iommu: true, .. })
    }
}

impl fmt::Display for DeviceAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Platform { device, .. } => f.write_str(device),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// What an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineType {
    /// EIP-93.
    Eip93(Unknowns),
    /// SOE.
    Soe(Assumptions),
}

/// A checked engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Name.
    pub name: String,
    /// What it is.
    pub kind: EngineType,
    /// Where it is.
    pub at: DeviceAt,
    /// Worker that owns it.
    pub worker: usize,
    /// Part of the outbound packets that are verified.
    pub verify: f64,
    /// Time between two canaries.
    pub canary: Duration,
    /// Lost packets of 10 000 that are too many.
    pub max_lost: u16,
    /// How long a packet may be in it.
    pub deadline: Duration,
}

/// Checks all engines; those that are wrong are left out, with a problem each.
pub(super) fn check(
    d: &Decoded<'_>,
    dir: &Path,
    workers: usize,
    problems: &mut Problems,
) -> Vec<EngineConfig> {
    let tables = &d.file.engine;
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut all = Vec::new();
    for (i, t) in tables.iter().enumerate() {
        let at = i.to_string();
        let mut wrong = |key: &str, what: String| {
            problems.push(d.span(&["engine", &at, key]), what);
        };
        let clean = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        if !(1..=32).contains(&t.name.len()) || !t.name.bytes().all(clean) {
            wrong(
                "name",
                format!(
                    "\"{}\" is no name: 1 to 32 of the characters A-Z a-z 0-9 . _ : - are",
                    t.name
                ),
            );
        }
        if matches!(t.name.as_str(), "auto" | "software") {
            wrong("name", format!("\"{}\" has a meaning in SA files", t.name));
        }
        if seen.insert(&t.name, i).is_some() {
            wrong("name", format!("there are two engines \"{}\"", t.name));
        }
        if i >= MOST {
            wrong("name", format!("there are more than {MOST} engines"));
        }
        if usize::from(t.worker) >= workers {
            wrong(
                "worker",
                format!(
                    "there is no worker {}; they are 0 to {}",
                    t.worker,
                    workers - 1
                ),
            );
        }
        if !(0.0..=1.0).contains(&t.verify) {
            wrong("verify", "\"verify\" is a part: 0.0 to 1.0".into());
        }
        if !(10..=3_600_000).contains(&t.canary_ms) {
            wrong(
                "canary_ms",
                "\"canary_ms\" must lie in 10 to 3600000".into(),
            );
        }
        if t.deadline_ms.is_some_and(|ms| !(10..=2000).contains(&ms)) {
            wrong(
                "deadline_ms",
                "\"deadline_ms\" must lie in 10 to 2000".into(),
            );
        }
        if t.max_lost > 10_000 {
            wrong("max_lost", "\"max_lost\" must lie in 0 to 10000".into());
        }
        if t.registers.is_some() && (t.kind != EngineKind::Soe || t.device.is_none()) {
            wrong(
                "registers",
                "\"registers\" is for an SOE with \"device\"".into(),
            );
        }
        if t.no_iommu && t.device.is_none() {
            wrong("no_iommu", "\"no_iommu\" needs \"device\"".into());
        }
        let place = match (&t.device, &t.socket) {
            (Some(device), None) => Some(DeviceAt::Platform {
                device: device.clone(),
                registers: t.registers.clone(),
                no_iommu: t.no_iommu,
            }),
            (None, Some(socket)) => Some(DeviceAt::Socket(dir.join(socket))),
            _ => {
                wrong(
                    "device",
                    "an engine has exactly one of \"device\", \"socket\"".into(),
                );
                None
            }
        };
        let kind = match t.kind {
            EngineKind::Eip93 => t.assume.eip93(),
            EngineKind::Soe => t.assume.soe(),
        };
        if let Err(key) = &kind {
            wrong(
                "assume",
                format!("\"{key}\" is not a question about this engine"),
            );
        }
        if let (Some(at), Ok(kind)) = (place, kind) {
            all.push(EngineConfig {
                name: t.name.clone(),
                kind,
                at,
                worker: usize::from(t.worker),
                verify: t.verify,
                canary: Duration::from_millis(t.canary_ms.into()),
                max_lost: t.max_lost,
                deadline: t.deadline(),
            });
        }
    }
    all
}

/// Sets what is given; the name of the first key that is given although it does not belong here.
macro_rules! readings {
    ($self:ident, $made:expr, mine: $($mine:ident)*, others: $($other:ident)*) => {{
        let mut made = $made;
        $(if $self.$other.is_some() {
            return Err(stringify!($other));
        })*
        $(if let Some(v) = $self.$mine {
            made.$mine = v.into();
        })*
        made
    }};
}

impl AssumeTable {
    fn eip93(&self) -> Result<EngineType, &'static str> {
        Ok(EngineType::Eip93(readings!(self, Unknowns::default(),
            mine: unaligned_data ring_offset length_counts_icv counter_mode_in_packet_mode
                  one_number_at_a_time pointers_survive,
            others: gcm udp_source_port_high udp_ports_equal in_flight slots ring lossless batch
                  scrub_staging first_number copies_df pads_least knows_by_content
                  ttl)))
    }

    fn soe(&self) -> Result<EngineType, &'static str> {
        Ok(EngineType::Soe(readings!(self, Assumptions::default(),
            mine: gcm udp_source_port_high udp_ports_equal in_flight slots ring lossless batch
                  scrub_staging first_number copies_df pads_least knows_by_content
                  ttl,
            others: unaligned_data ring_offset length_counts_icv counter_mode_in_packet_mode
                  one_number_at_a_time pointers_survive)))
    }
}
