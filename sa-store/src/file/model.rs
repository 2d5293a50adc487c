//! What SA files say, after every check: tunnels, SAs and policies.

use std::net::IpAddr;

use crate::policy::{Policy, Selector};
use crate::sa::{
    Df, Direction, Dscp, IfId, Limits, Mode, OffloadMode, SaKeys, SaSpec, Spi, Tfc, UdpEncap, Vrf,
};
use crate::suite::Suite;

use super::fault::Location;

/// Replay window of SAs that do not say otherwise, packets.
pub const DEFAULT_WINDOW: u32 = 1024;
pub use crate::replay::MAX_WINDOW;

/// Begins the names of tunnels, SAs and policies that an IKE daemon gave; none of a file may begin so.
pub const MIRROR_PREFIX: &str = "ike:";

/// Outer TTL or hop limit of SAs that do not say otherwise.
pub const DEFAULT_TTL: u8 = 64;

/// A whole, checked set of tunnels, SAs and policies.
///
/// Two are equal when they mean the same; where things were written does not matter.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Tunnels, in the order of the files.
    pub tunnels: Vec<Tunnel>,
    /// SAs, likewise. Each belongs to one of the tunnels.
    pub sas: Vec<SaSpec>,
    /// Policies, likewise; the order breaks ties of priority.
    pub policies: Vec<Policy>,
    /// Where each was written.
    pub origins: Origins,
}

impl PartialEq for Config {
    fn eq(&self, other: &Self) -> bool {
        self.tunnels == other.tunnels && self.sas == other.sas && self.policies == other.policies
    }
}

impl Eq for Config {}

impl Config {
    /// The tunnel of that name.
    pub fn tunnel(&self, name: &str) -> Option<&Tunnel> {
        self.tunnels.iter().find(|t| t.name == name)
    }
}

/// Places of the members of a [`Config`], index by index. Empty for one that was not read from text.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    /// Of [`Config::tunnels`].
    pub tunnels: Vec<Location>,
    /// Of [`Config::sas`].
    pub sas: Vec<Location>,
    /// Of [`Config::policies`].
    pub policies: Vec<Location>,
}

/// What the SAs of one pair of gateways have in common. It outlives the SAs: rekeys keep the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Operator's name, unique.
    pub name: String,
    /// Our address.
    pub local: IpAddr,
    /// The peer's address, of the same family.
    pub remote: IpAddr,
    /// Mode of its SAs.
    pub mode: Mode,
    /// VRF of the outer packets.
    pub vrf: Vrf,
    /// Interface id when route-based, else 0.
    pub if_id: IfId,
    /// Suite of SAs that name none.
    pub suite: Option<Suite>,
    /// Settings of SAs that do not say otherwise.
    pub settings: Settings,
}

/// Settings that a tunnel gives to its SAs and that an SA may override.
///
/// Selectors and ports are written from our side: `src` is local and `dst` is remote, as in outbound
/// packets. [`Tunnel::sa`] turns them round for inbound SAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Replay window, packets.
    pub window: u32,
    /// Soft limits.
    pub soft: Limits,
    /// Hard limits.
    pub hard: Limits,
    /// UDP encapsulation.
    pub encap: Option<UdpEncap>,
    /// Outer DSCP.
    pub dscp: Dscp,
    /// Outer DF.
    pub df: Df,
    /// RFC 6040 normal mode.
    pub ecn: bool,
    /// Outer TTL.
    pub ttl: u8,
    /// Configured path MTU.
    pub pmtu: Option<u16>,
    /// TFC padding.
    pub tfc: Tfc,
    /// TCP MSS clamping.
    pub mss_clamp: bool,
    /// Offload mode.
    pub offload: OffloadMode,
    /// Engine by name.
    pub engine: Option<String>,
    /// Inner traffic.
    pub selectors: Vec<Selector>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            esn: false,
            window: DEFAULT_WINDOW,
            soft: Limits::default(),
            hard: Limits::default(),
            encap: None,
            dscp: Dscp::Copy,
            df: Df::Copy,
            ecn: true,
            ttl: DEFAULT_TTL,
            pmtu: None,
            tfc: Tfc::Off,
            mss_clamp: false,
            offload: OffloadMode::Software,
            engine: None,
            selectors: Vec::new(),
        }
    }
}

/// What tells an SA from the others of its tunnel.
#[derive(Clone, Debug)]
pub struct SaIdentity {
    /// Name.
    pub name: String,
    /// Direction.
    pub direction: Direction,
    /// SPI.
    pub spi: Spi,
    /// Suite.
    pub suite: Suite,
    /// Keys.
    pub keys: SaKeys,
    /// First use of the key.
    pub first_use: bool,
}

impl Tunnel {
    /// A tunnel with default settings, in tunnel mode, in VRF 0, policy-based.
    pub fn new(name: impl Into<String>, local: IpAddr, remote: IpAddr) -> Self {
        Self {
            name: name.into(),
            local,
            remote,
            mode: Mode::Tunnel,
            vrf: Vrf(0),
            if_id: IfId(0),
            suite: None,
            settings: Settings::default(),
        }
    }

    /// The SA of this tunnel with these settings.
    pub fn sa(&self, id: SaIdentity, settings: &Settings) -> SaSpec {
        let out = id.direction == Direction::Out;
        let (src, dst) = if out {
            (self.local, self.remote)
        } else {
            (self.remote, self.local)
        };
        let turn = |s: &Selector| if out { s.clone() } else { s.reversed() };
        SaSpec {
            name: id.name,
            tunnel: self.name.clone(),
            direction: id.direction,
            spi: id.spi,
            src,
            dst,
            mode: self.mode,
            suite: id.suite,
            keys: id.keys,
            encap: settings.encap.map(|e| if out { e } else { e.reversed() }),
            esn: settings.esn,
            replay_window: settings.window,
            first_use: id.first_use,
            soft: settings.soft,
            hard: settings.hard,
            dscp: settings.dscp,
            df: settings.df,
            ecn: settings.ecn,
            ttl: settings.ttl,
            pmtu: settings.pmtu,
            tfc: settings.tfc,
            mss_clamp: settings.mss_clamp,
            vrf: self.vrf,
            if_id: self.if_id,
            selectors: settings.selectors.iter().map(turn).collect(),
            offload: settings.offload,
            engine: settings.engine.clone(),
        }
    }
}

impl Settings {
    /// The settings of an SA, seen from our side.
    pub fn of(sa: &SaSpec) -> Self {
        let out = sa.direction == Direction::Out;
        let turn = |s: &Selector| if out { s.clone() } else { s.reversed() };
        Self {
            esn: sa.esn,
            window: sa.replay_window,
            soft: sa.soft,
            hard: sa.hard,
            encap: sa.encap.map(|e| if out { e } else { e.reversed() }),
            dscp: sa.dscp,
            df: sa.df,
            ecn: sa.ecn,
            ttl: sa.ttl,
            pmtu: sa.pmtu,
            tfc: sa.tfc,
            mss_clamp: sa.mss_clamp,
            offload: sa.offload,
            engine: sa.engine.clone(),
            selectors: sa.selectors.iter().map(turn).collect(),
        }
    }
}

/// The name of an SA that was given none.
pub fn default_sa_name(tunnel: &str, direction: Direction, spi: Spi) -> String {
    let d = match direction {
        Direction::In => "in",
        Direction::Out => "out",
    };
    format!("{tunnel}-{d}-{:08x}", spi.value())
}
