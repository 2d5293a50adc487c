//! Policies and traffic selectors, RFC 4301 section 4.4.1.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::sa::{Direction, IfId, Vrf};

/// Inclusive address range of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddrRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddrRange {
    /// `None` when the families differ or `first > last`.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(Self { first, last })
    }

    /// The range of `addr/len`, host bits ignored; `None` when `len` is too long for the family.
    pub fn prefix(addr: IpAddr, len: u8) -> Option<Self> {
        match addr {
            IpAddr::V4(a) if len <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
                let base = u32::from(a) & mask;
                Some(Self {
                    first: IpAddr::V4(base.into()),
                    last: IpAddr::V4((base | !mask).into()),
                })
            }
            IpAddr::V6(a) if len <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
                let base = u128::from(a) & mask;
                Some(Self {
                    first: IpAddr::V6(base.into()),
                    last: IpAddr::V6((base | !mask).into()),
                })
            }
            _ => None,
        }
    }

    /// Lowest address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// Highest address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Whether `a` lies inside; false for the other family.
    pub fn contains(&self, a: IpAddr) -> bool {
        a.is_ipv4() == self.first.is_ipv4() && self.first <= a && a <= self.last
    }
}

/// What a selector says of the upper-layer ports (or ICMP type and code, RFC 4301 section 4.4.1.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// Any value, also where the packet has none (fragments, other protocols).
    Any,
    /// Only packets whose ports cannot be seen: non-initial fragments (RFC 4301 "OPAQUE").
    Opaque,
    /// TCP, UDP, SCTP, UDP-Lite, DCCP ports.
    Range {
        /// Source ports.
        src: RangeInclusive<u16>,
        /// Destination ports.
        dst: RangeInclusive<u16>,
    },
    /// ICMP or ICMPv6: type range, code range.
    Icmp {
        /// Types.
        kind: RangeInclusive<u8>,
        /// Codes.
        code: RangeInclusive<u8>,
    },
}

/// Traffic selector in the direction of travel of the packets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Selector {
    /// Source addresses.
    pub src: AddrRange,
    /// Destination addresses; same family as `src`.
    pub dst: AddrRange,
    /// Upper-layer protocol; `None` is any.
    pub proto: Option<u8>,
    /// Ports.
    pub ports: Ports,
}

impl Selector {
    /// The same traffic as seen in the other direction: addresses and ports swap, ICMP stays.
    pub fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            proto: self.proto,
            ports: match &self.ports {
                Ports::Range { src, dst } => Ports::Range {
                    src: dst.clone(),
                    dst: src.clone(),
                },
                other => other.clone(),
            },
        }
    }
}

/// What to do with matching traffic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Carry in the named tunnel.
    Protect {
        /// Name of the tunnel, see [`crate::sa::SaSpec::tunnel`].
        tunnel: String,
    },
    /// Forward in the clear.
    Bypass,
    /// Drop.
    Discard,
}

/// One SPD entry. Lower `priority` is looked at first; ties are broken by order in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Operator's name, unique.
    pub name: String,
    /// Outbound (SPD-O / SPD-S) or inbound (SPD-I / check after decryption).
    pub direction: Direction,
    /// Priority.
    pub priority: u32,
    /// Traffic; several selectors mean any of them.
    pub selectors: Vec<Selector>,
    /// Action.
    pub action: Action,
    /// VRF of the inner packets.
    pub vrf: Vrf,
    /// Only traffic routed to this interface id, when not 0.
    pub if_id: IfId,
}
