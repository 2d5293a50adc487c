//! The immutable description of a Security Association, as SA files and IKE give it.

use std::fmt;
use std::net::IpAddr;

use zeroize::Zeroizing;

use crate::policy::Selector;
use crate::suite::Suite;

/// Security Parameters Index. 0 to 255 are reserved (RFC 4303 section 2.1), so they cannot be held.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Spi(u32);

impl Spi {
    /// `None` for the reserved values 0 to 255.
    pub const fn new(v: u32) -> Option<Self> {
        if v > 255 { Some(Self(v)) } else { None }
    }

    /// The value in host order.
    pub const fn value(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:08x}", self.0)
    }
}

impl fmt::Display for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:08x}", self.0)
    }
}

/// Stable slot of an SA's run-time state plus the generation that tells re-use apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaId {
    /// Slot.
    pub index: u32,
    /// Incremented whenever the slot is given to another SA.
    pub generation: u32,
}

/// Virtual routing table, 0 is the default one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vrf(pub u16);

/// Interface id of a route-based tunnel, 0 for policy-based SAs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IfId(pub u32);

/// Direction of an SA; an ESP SA is one-way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// We decrypt.
    In,
    /// We encrypt.
    Out,
}

/// ESP mode. Addresses of the SA are in [`SaSpec::src`] and [`SaSpec::dst`] for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// RFC 4303 section 3.1.2.
    Tunnel,
    /// RFC 4303 section 3.1.1.
    Transport,
}

/// UDP encapsulation ports, RFC 3948.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UdpEncap {
    /// Source port of packets that travel in the SA's direction.
    pub sport: u16,
    /// Destination port of packets that travel in the SA's direction.
    pub dport: u16,
}

impl UdpEncap {
    /// The ports of packets that travel the other way.
    pub const fn reversed(self) -> Self {
        Self {
            sport: self.dport,
            dport: self.sport,
        }
    }
}

/// DSCP of the outer header, RFC 4301 section 5.1.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dscp {
    /// From the inner header.
    #[default]
    Copy,
    /// This value, 0 to 63.
    Fixed(u8),
}

/// DF bit of an outer IPv4 header, RFC 4301 section 8.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Df {
    /// From the inner header (set for inner IPv6).
    #[default]
    Copy,
    /// Always set.
    Set,
    /// Always clear: too-big packets are fragmented after encryption.
    Clear,
}

/// Traffic-flow-confidentiality padding of outbound packets, RFC 4303 section 2.7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tfc {
    /// None.
    #[default]
    Off,
    /// Pad every inner packet to this many bytes, where the MTU allows.
    PadTo(u16),
    /// Also send dummy packets (RFC 4303 section 2.6), so that a pause does not show.
    Cover {
        /// As [`PadTo`](Self::PadTo); 0 does not pad.
        pad_to: u16,
        /// Dummy packets a second.
        dummies: u16,
    },
}

impl Tfc {
    /// From its two parts, each 0 for "no".
    pub const fn of(pad_to: u16, dummies: u16) -> Self {
        match (pad_to, dummies) {
            (0, 0) => Self::Off,
            (_, 0) => Self::PadTo(pad_to),
            _ => Self::Cover { pad_to, dummies },
        }
    }

    /// Bytes to pad inner packets to; 0 for none.
    pub const fn pad_to(self) -> u16 {
        match self {
            Self::Off => 0,
            Self::PadTo(n) | Self::Cover { pad_to: n, .. } => n,
        }
    }

    /// Dummy packets a second.
    pub const fn dummies(self) -> u16 {
        match self {
            Self::Cover { dummies, .. } => dummies,
            _ => 0,
        }
    }
}

/// Soft or hard limits; `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Packets.
    pub packets: Option<u64>,
    /// Bytes, counted as RFC 4301 does: the ESP payload before encryption, after decryption.
    pub bytes: Option<u64>,
    /// Seconds since the SA was installed.
    pub seconds: Option<u64>,
}

/// Who does the work of the SA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OffloadMode {
    /// CPU.
    #[default]
    Software,
    /// An engine ciphers; CPU frames.
    Crypto,
    /// An engine frames, pads, numbers and checks.
    Packet,
}

/// Key material; wiped on drop, never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct SaKeys {
    /// Encryption key with salt or nonce; [`Suite::enc_key_len`] bytes.
    pub enc: Zeroizing<Vec<u8>>,
    /// Integrity key; [`Suite::auth_key_len`] bytes.
    pub auth: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for SaKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SaKeys(..)")
    }
}

/// Everything that defines an SA. It never changes once installed: a change is another SA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaSpec {
    /// Operator's name, unique.
    pub name: String,
    /// Tunnel that the SA belongs to: metrics and policies refer to it, rekeys keep it.
    pub tunnel: String,
    /// Direction.
    pub direction: Direction,
    /// SPI.
    pub spi: Spi,
    /// Outer source (tunnel mode) or the packet's source (transport mode).
    pub src: IpAddr,
    /// Outer destination, likewise.
    pub dst: IpAddr,
    /// Mode.
    pub mode: Mode,
    /// Algorithms.
    pub suite: Suite,
    /// Keys.
    pub keys: SaKeys,
    /// UDP encapsulation.
    pub encap: Option<UdpEncap>,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Replay window in packets, a power of two from 32; 0 turns anti-replay off (inbound only).
    pub replay_window: u32,
    /// First use of this key: a missing lease record is then no error (design: "refuse unless first use").
    pub first_use: bool,
    /// Soft limits: an event.
    pub soft: Limits,
    /// Hard limits: the first packet over one is dropped.
    pub hard: Limits,
    /// Outer DSCP.
    pub dscp: Dscp,
    /// Outer DF.
    pub df: Df,
    /// Whether ECN is propagated (RFC 6040 normal mode) or the outer field is zero (compatibility mode).
    pub ecn: bool,
    /// Outer TTL / hop limit of tunnel mode.
    pub ttl: u8,
    /// Path MTU of the outer packet, bytes, when configured; else the egress port's.
    pub pmtu: Option<u16>,
    /// TFC padding.
    pub tfc: Tfc,
    /// Clamp the TCP MSS of SYN segments to the tunnel's MTU.
    pub mss_clamp: bool,
    /// VRF of the outer packets.
    pub vrf: Vrf,
    /// Route-based tunnel's interface id.
    pub if_id: IfId,
    /// Inner traffic that the SA may carry. Empty: what the tunnel's policies say (any for route-based tunnels).
    pub selectors: Vec<Selector>,
    /// Offload mode.
    pub offload: OffloadMode,
    /// Engine wanted by name; `None` is "auto" for offload modes.
    pub engine: Option<String>,
}

impl SaSpec {
    /// An SA that every gateway and engine can carry, to be changed where it shall differ: an IPv4 tunnel between
    /// documentation addresses (RFC 5737), 32-bit numbers, a window of 64 packets, first use of its keys, no limits, on the CPU.
    /// Its tunnel has its name.
    pub fn plain(name: &str, direction: Direction, spi: Spi, suite: Suite, keys: SaKeys) -> SaSpec {
        SaSpec {
            name: name.into(),
            tunnel: name.into(),
            direction,
            spi,
            src: [192, 0, 2, 1].into(),
            dst: [192, 0, 2, 2].into(),
            mode: Mode::Tunnel,
            suite,
            keys,
            encap: None,
            esn: false,
            replay_window: 64,
            first_use: true,
            soft: Limits::default(),
            hard: Limits::default(),
            dscp: Dscp::Copy,
            df: Df::Copy,
            ecn: true,
            ttl: 64,
            pmtu: None,
            tfc: Tfc::Off,
            mss_clamp: false,
            vrf: Vrf::default(),
            if_id: IfId::default(),
            selectors: Vec::new(),
            offload: OffloadMode::Software,
            engine: None,
        }
    }
}
