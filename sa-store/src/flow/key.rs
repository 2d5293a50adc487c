//! The selectors of one packet, RFC 4301 section 4.4.1.1, in 48 bytes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::sa::{IfId, Vrf};

/// What a packet shows of its upper layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP, UDP, SCTP, UDP-Lite, DCCP.
    Ports {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// ICMP, ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
    /// A protocol that has neither ports nor type and code.
    None,
    /// Ports, type and code cannot be seen: a non-initial fragment (RFC 4301 "OPAQUE").
    Fragment,
    /// As `Fragment`, and the protocol cannot be seen either: a non-initial IPv6 fragment whose
    /// fragment header is followed by further extension headers.
    FragmentUnknown,
}

/// Which of its upper-layer fields a packet shows; a policy says which classes it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    None = 0,
    Ports = 1,
    Icmp = 2,
    Opaque = 3,
    OpaqueProto = 4,
}

/// Whether the protocol carries ports where TCP does.
pub(crate) const fn has_ports(proto: u8) -> bool {
    matches!(proto, 6 | 17 | 33 | 132 | 136)
}

/// Whether the protocol is ICMP or ICMPv6.
pub(crate) const fn is_icmp(proto: u8) -> bool {
    matches!(proto, 1 | 58)
}

/// Everything that policies and routes may look at, in the packet's direction of travel.
///
/// Six words, so that comparing, hashing and masking need no branch on a field:
/// `[0]` protocol, class, family, VRF and ports; `[1]` interface id, its upper half empty;
/// `[2]` both IPv4 addresses, or `[2..4]` IPv6 source and `[4..6]` IPv6 destination.
///
/// The default key is that of no packet that was parsed: IPv4, all zeros.
#[derive(Clone, Copy, Default, Eq, Hash)]
#[allow(
    clippy::derived_hash_with_manual_eq,
    reason = "both look at the words and nothing else"
)]
pub struct FlowKey([u64; 6]);

impl PartialEq for FlowKey {
    /// Without the call that comparing arrays makes.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let differ = self.0.iter().zip(&other.0).map(|(a, b)| a ^ b);
        differ.fold(0, |all, word| all | word) == 0
    }
}

const PROTO_SHIFT: u32 = 56;
const CLASS_SHIFT: u32 = 52;
const V6: u64 = 1 << 48;
const VRF_SHIFT: u32 = 32;
const SPORT_SHIFT: u32 = 16;

impl FlowKey {
    /// Key of an IPv4 packet in the default VRF.
    #[inline]
    pub fn v4(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, l4: L4) -> Self {
        let addresses = u64::from(u32::from(src)) << 32 | u64::from(u32::from(dst));
        Self([meta(proto, l4), 0, addresses, 0, 0, 0])
    }

    /// Key of an IPv6 packet in the default VRF. `proto` is the upper layer's, behind all extension headers.
    #[inline]
    pub fn v6(src: Ipv6Addr, dst: Ipv6Addr, proto: u8, l4: L4) -> Self {
        let [s0, s1] = halves(src.into());
        let [d0, d1] = halves(dst.into());
        Self([meta(proto, l4) | V6, 0, s0, s1, d0, d1])
    }

    /// Key from addresses of either family; `None` when the families differ.
    pub fn new(src: IpAddr, dst: IpAddr, proto: u8, l4: L4) -> Option<Self> {
        match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => Some(Self::v4(s, d, proto, l4)),
            (IpAddr::V6(s), IpAddr::V6(d)) => Some(Self::v6(s, d, proto, l4)),
            _ => None,
        }
    }

    /// The same packet in another VRF.
    #[inline]
    #[must_use]
    pub const fn with_vrf(mut self, vrf: Vrf) -> Self {
        self.0[0] = self.0[0] & !(0xffff << VRF_SHIFT) | (vrf.0 as u64) << VRF_SHIFT;
        self
    }

    /// The same packet, routed to (or decrypted from) a route-based tunnel's interface.
    #[inline]
    #[must_use]
    pub const fn with_if_id(mut self, if_id: IfId) -> Self {
        self.0[1] = if_id.0 as u64;
        self
    }

    /// Whether the packet is IPv6.
    #[inline]
    pub const fn is_v6(&self) -> bool {
        self.0[0] & V6 != 0
    }

    /// Source address.
    pub fn src(&self) -> IpAddr {
        if self.is_v6() {
            IpAddr::V6(self.v6_src().into())
        } else {
            IpAddr::V4(self.v4_src().into())
        }
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self) -> IpAddr {
        if self.is_v6() {
            IpAddr::V6(self.v6_dst().into())
        } else {
            IpAddr::V4(self.v4_dst().into())
        }
    }

    /// Upper-layer protocol; meaningless for [`L4::FragmentUnknown`].
    #[inline]
    pub const fn proto(&self) -> u8 {
        (self.0[0] >> PROTO_SHIFT) as u8
    }

    /// VRF.
    #[inline]
    pub const fn vrf(&self) -> Vrf {
        Vrf((self.0[0] >> VRF_SHIFT & 0xffff) as u16)
    }

    /// Interface id.
    #[inline]
    pub const fn if_id(&self) -> IfId {
        IfId((self.0[1] & 0xffff_ffff) as u32)
    }

    /// What the packet shows of its upper layer.
    pub const fn l4(&self) -> L4 {
        match self.class() {
            Class::None => L4::None,
            Class::Ports => L4::Ports {
                src: self.sport(),
                dst: self.dport(),
            },
            Class::Icmp => L4::Icmp {
                kind: (self.sport() & 0xff) as u8,
                code: (self.dport() & 0xff) as u8,
            },
            Class::Opaque => L4::Fragment,
            Class::OpaqueProto => L4::FragmentUnknown,
        }
    }

    /// Whether the packet is a non-initial fragment, so that its ports cannot be seen.
    #[inline]
    pub const fn is_opaque(&self) -> bool {
        self.0[0] >> CLASS_SHIFT & 7 >= Class::Opaque as u64
    }

    /// The raw words, for hashing and comparing.
    #[inline]
    pub(crate) const fn words(&self) -> &[u64; 6] {
        &self.0
    }

    #[inline]
    pub(crate) const fn class(&self) -> Class {
        match self.0[0] >> CLASS_SHIFT & 7 {
            0 => Class::None,
            1 => Class::Ports,
            2 => Class::Icmp,
            3 => Class::Opaque,
            _ => Class::OpaqueProto,
        }
    }

    /// Source port, or ICMP type.
    #[inline]
    pub(crate) const fn sport(&self) -> u16 {
        (self.0[0] >> SPORT_SHIFT & 0xffff) as u16
    }

    /// Destination port, or ICMP code.
    #[inline]
    pub(crate) const fn dport(&self) -> u16 {
        (self.0[0] & 0xffff) as u16
    }

    #[inline]
    pub(crate) const fn v4_src(&self) -> u32 {
        (self.0[2] >> 32) as u32
    }

    #[inline]
    pub(crate) const fn v4_dst(&self) -> u32 {
        (self.0[2] & 0xffff_ffff) as u32
    }

    #[inline]
    pub(crate) const fn v6_src(&self) -> u128 {
        (self.0[2] as u128) << 64 | self.0[3] as u128
    }

    #[inline]
    pub(crate) const fn v6_dst(&self) -> u128 {
        (self.0[4] as u128) << 64 | self.0[5] as u128
    }
}

/// Places protocol, VRF and ports as the key's first word does, without class and family: what a
/// policy table hashes.
#[inline]
pub(crate) const fn scope_word(proto: u8, vrf: u16, sport: u16, dport: u16) -> u64 {
    (proto as u64) << PROTO_SHIFT
        | (vrf as u64) << VRF_SHIFT
        | (sport as u64) << SPORT_SHIFT
        | dport as u64
}

/// First word of a key in VRF 0. A port-bearing protocol whose ports the caller could not find counts
/// as opaque: it must not slip past a policy with ports.
#[inline(always)]
const fn meta(proto: u8, l4: L4) -> u64 {
    let (class, a, b) = match l4 {
        L4::Ports { src, dst } if has_ports(proto) => (Class::Ports, src, dst),
        L4::Icmp { kind, code } if is_icmp(proto) => (Class::Icmp, kind as u16, code as u16),
        L4::Fragment => (Class::Opaque, 0, 0),
        L4::FragmentUnknown => (Class::OpaqueProto, 0, 0),
        _ if has_ports(proto) || is_icmp(proto) => (Class::Opaque, 0, 0),
        _ => (Class::None, 0, 0),
    };
    scope_word(proto, 0, a, b) | (class as u64) << CLASS_SHIFT
}

/// Upper and lower half.
#[inline]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the lower half is what is wanted"
)]
pub(crate) const fn halves(v: u128) -> [u64; 2] {
    [(v >> 64) as u64, v as u64]
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} -> {} proto {} {:?} vrf {} if_id {}",
            self.src(),
            self.dst(),
            self.proto(),
            self.l4(),
            self.vrf().0,
            self.if_id().0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back_as_given() {
        let src: Ipv6Addr = "2001:db8:1:2:3:4:5:6".parse().expect("address");
        let dst: Ipv6Addr = "2001:db8:ffff::1".parse().expect("address");
        let l4 = L4::Ports {
            src: 0xfffe,
            dst: 443,
        };
        let k = FlowKey::v6(src, dst, 6, l4)
            .with_vrf(Vrf(0xabcd))
            .with_if_id(IfId(0xdead_beef));
        assert_eq!((k.src(), k.dst()), (src.into(), dst.into()));
        assert_eq!((k.proto(), k.l4()), (6, l4));
        assert_eq!((k.vrf(), k.if_id()), (Vrf(0xabcd), IfId(0xdead_beef)));
        assert!(k.is_v6() && !k.is_opaque());

        let k = FlowKey::v4(
            [10, 1, 2, 3].into(),
            [192, 168, 255, 1].into(),
            1,
            L4::Icmp { kind: 8, code: 3 },
        );
        assert_eq!(k.src(), IpAddr::from([10, 1, 2, 3]));
        assert_eq!(k.dst(), IpAddr::from([192, 168, 255, 1]));
        assert_eq!(k.l4(), L4::Icmp { kind: 8, code: 3 });
        assert!(!k.is_v6());
    }

    #[test]
    fn a_port_protocol_without_visible_ports_counts_as_a_fragment() {
        let a = Ipv4Addr::LOCALHOST;
        assert!(FlowKey::v4(a, a, 17, L4::None).is_opaque());
        assert!(FlowKey::v4(a, a, 58, L4::Ports { src: 1, dst: 2 }).is_opaque());
        assert!(!FlowKey::v4(a, a, 47, L4::None).is_opaque());
        assert!(FlowKey::v4(a, a, 0, L4::FragmentUnknown).is_opaque());
    }

    #[test]
    fn the_vrf_replaces_the_one_before() {
        let a = Ipv4Addr::LOCALHOST;
        let k = FlowKey::v4(a, a, 47, L4::None).with_vrf(Vrf(7));
        assert_eq!(k.with_vrf(Vrf(8)).vrf(), Vrf(8));
        assert_eq!(k.with_vrf(Vrf(0)), FlowKey::v4(a, a, 47, L4::None));
    }
}
