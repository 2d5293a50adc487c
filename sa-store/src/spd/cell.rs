//! One compiled selector: range compares over a flow key, and the traits of the two address families.

use std::net::IpAddr;

use super::verdict::{Action, PolicyIdx, Verdict};
use crate::flow::{Class, FlowKey, halves, has_ports, is_icmp};
use crate::policy::{AddrRange, Ports, Selector};

/// Place in the order of look-up, unique per policy: priority, then a label that grows with file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u128);

impl Rank {
    pub(super) const LAST: Self = Self(u128::MAX);

    pub(super) const fn new(priority: u32, label: u64) -> Self {
        Self((priority as u128) << 64 | label as u128)
    }

    pub(super) const fn label(self) -> u64 {
        halves(self.0)[1]
    }

    /// Place of one of the policy's selectors. Among those of one policy the ones that are meant for hidden ports come
    /// first, for what they match they decide whatever came before.
    pub(super) const fn of_selector(self, opaque: bool) -> Self {
        Self(self.0 << 1 | !opaque as u128)
    }
}

/// Address of one family as a number.
pub(super) trait Addr: Copy + Ord + Send + Sync + 'static {
    const BITS: u8;
    /// Prefix lengths that tables are keyed by; few, so that few tables need to be looked at.
    const STEP: u8;
    fn of(a: IpAddr) -> Option<Self>;
    fn src(k: &FlowKey) -> Self;
    fn dst(k: &FlowKey) -> Self;
    /// Network mask of a prefix length.
    fn mask(len: u8) -> Self;
    fn and(self, mask: Self) -> Self;
    /// Distance from `first`, wrapping.
    fn minus(self, first: Self) -> Self;
    /// The address `span` behind this one, wrapping.
    fn plus(self, span: Self) -> Self;
    /// Number of the `len`-bit block that the address lies in.
    fn block(self, len: u8) -> u128;
    /// First address of a block.
    fn block_start(block: u128, len: u8) -> Self;
    /// Source and destination in one word.
    fn mix(src: Self, dst: Self) -> u64;
}

impl Addr for u32 {
    const BITS: u8 = 32;
    const STEP: u8 = 4;

    fn of(a: IpAddr) -> Option<Self> {
        match a {
            IpAddr::V4(a) => Some(a.into()),
            IpAddr::V6(_) => None,
        }
    }

    #[inline]
    fn src(k: &FlowKey) -> Self {
        k.v4_src()
    }

    #[inline]
    fn dst(k: &FlowKey) -> Self {
        k.v4_dst()
    }

    fn mask(len: u8) -> Self {
        Self::MAX
            .checked_shl(32 - u32::from(len.min(32)))
            .unwrap_or(0)
    }

    #[inline]
    fn and(self, mask: Self) -> Self {
        self & mask
    }

    #[inline]
    fn minus(self, first: Self) -> Self {
        self.wrapping_sub(first)
    }

    fn plus(self, span: Self) -> Self {
        self.wrapping_add(span)
    }

    fn block(self, len: u8) -> u128 {
        u128::from(self.checked_shr(32 - u32::from(len.min(32))).unwrap_or(0))
    }

    fn block_start(block: u128, len: u8) -> Self {
        u32::try_from(block)
            .unwrap_or(Self::MAX)
            .checked_shl(32 - u32::from(len.min(32)))
            .unwrap_or(0)
    }

    #[inline]
    fn mix(src: Self, dst: Self) -> u64 {
        u64::from(src) << 32 | u64::from(dst)
    }
}

impl Addr for u128 {
    const BITS: u8 = 128;
    const STEP: u8 = 8;

    fn of(a: IpAddr) -> Option<Self> {
        match a {
            IpAddr::V6(a) => Some(a.into()),
            IpAddr::V4(_) => None,
        }
    }

    #[inline]
    fn src(k: &FlowKey) -> Self {
        k.v6_src()
    }

    #[inline]
    fn dst(k: &FlowKey) -> Self {
        k.v6_dst()
    }

    fn mask(len: u8) -> Self {
        Self::MAX
            .checked_shl(128 - u32::from(len.min(128)))
            .unwrap_or(0)
    }

    #[inline]
    fn and(self, mask: Self) -> Self {
        self & mask
    }

    #[inline]
    fn minus(self, first: Self) -> Self {
        self.wrapping_sub(first)
    }

    fn plus(self, span: Self) -> Self {
        self.wrapping_add(span)
    }

    fn block(self, len: u8) -> u128 {
        self.checked_shr(128 - u32::from(len.min(128))).unwrap_or(0)
    }

    fn block_start(block: u128, len: u8) -> Self {
        block
            .checked_shl(128 - u32::from(len.min(128)))
            .unwrap_or(0)
    }

    #[inline]
    fn mix(src: Self, dst: Self) -> u64 {
        let ([s0, s1], [d0, d1]) = (halves(src), halves(dst));
        fold(s0 ^ 0x243f_6a88_85a3_08d3, s1 ^ 0x1319_8a2e_0370_7344)
            ^ fold(d0 ^ 0xa409_3822_299f_31d0, d1 ^ 0x082e_fa98_ec4e_6c89).rotate_left(23)
    }
}

/// Product of two words with its halves folded together.
#[inline]
pub(crate) fn fold(a: u64, b: u64) -> u64 {
    let [high, low] = halves(u128::from(a) * u128::from(b));
    high ^ low
}

/// Bit set of [`Class`]es.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Classes(u8);

impl Classes {
    const ANY: Self = Self(0b1_1111);
    const PORTS: Self = Self(1 << Class::Ports as u8);
    const ICMP: Self = Self(1 << Class::Icmp as u8);
    const OPAQUE: Self = Self(1 << Class::Opaque as u8 | 1 << Class::OpaqueProto as u8);
}

/// A selector of one family, ready to compare: every range as first value and span.
#[derive(Clone, Copy)]
pub(super) struct Match<A> {
    src: A,
    src_span: A,
    dst: A,
    dst_span: A,
    sport: u16,
    sport_span: u16,
    dport: u16,
    dport_span: u16,
    if_id: u32,
    vrf: u16,
    proto: u8,
    proto_mask: u8,
    classes: Classes,
}

impl<A: Addr> Match<A> {
    /// `None` when a range is empty, the families are mixed, or not this one.
    pub(super) fn new(s: &Selector, vrf: u16, if_id: u32) -> Option<Self> {
        let span = |r: &AddrRange| {
            let first = A::of(r.first())?;
            Some((first, A::of(r.last())?.minus(first)))
        };
        let (src, src_span) = span(&s.src)?;
        let (dst, dst_span) = span(&s.dst)?;
        let (classes, sport, dport) = ports(s);
        if sport.0 > sport.1 || dport.0 > dport.1 {
            return None;
        }
        Some(Self {
            src,
            src_span,
            dst,
            dst_span,
            sport: sport.0,
            sport_span: sport.1.wrapping_sub(sport.0),
            dport: dport.0,
            dport_span: dport.1.wrapping_sub(dport.0),
            if_id,
            vrf,
            proto: s.proto.unwrap_or(0),
            proto_mask: if s.proto.is_some() { 0xff } else { 0 },
            classes,
        })
    }

    /// Whether the selector accepts the packet, RFC 4301 section 4.4.1.1.
    #[inline]
    pub(super) fn matches(&self, k: &FlowKey) -> bool {
        self.covers(k)
            & ((k.proto() ^ self.proto) & self.proto_mask == 0)
            & (k.sport().wrapping_sub(self.sport) <= self.sport_span)
            & (k.dport().wrapping_sub(self.dport) <= self.dport_span)
            & (self.classes.0 >> k.class() as u8 & 1 != 0)
            & !(self.proto_mask != 0 && k.class() == Class::OpaqueProto)
    }

    /// Whether a packet like this fragment, were its hidden fields to be seen, could be accepted, though
    /// the fragment itself is not.
    pub(super) fn could_match(&self, k: &FlowKey) -> bool {
        if !self.covers(k) || self.matches(k) {
            return false;
        }
        if k.class() == Class::OpaqueProto {
            return true;
        }
        (k.proto() ^ self.proto) & self.proto_mask == 0
            && (self.classes == Classes::PORTS && has_ports(k.proto())
                || self.classes == Classes::ICMP && is_icmp(k.proto()))
    }

    /// Whether the selector exists for packets whose ports cannot be seen.
    pub(super) fn is_opaque(&self) -> bool {
        self.classes == Classes::OPAQUE
    }

    /// Whether some non-initial fragment could be refused for what it hides.
    pub(super) fn is_narrow(&self) -> bool {
        self.proto_mask != 0 || self.classes != Classes::ANY
    }

    /// First and last source, first and last destination.
    pub(super) fn addresses(&self) -> ((A, A), (A, A)) {
        (
            (self.src, self.src.plus(self.src_span)),
            (self.dst, self.dst.plus(self.dst_span)),
        )
    }

    /// Source ports or ICMP types, when only some are accepted.
    pub(super) fn sports(&self) -> (u16, u16) {
        (self.sport, self.sport.wrapping_add(self.sport_span))
    }

    /// Destination ports or ICMP codes.
    pub(super) fn dports(&self) -> (u16, u16) {
        (self.dport, self.dport.wrapping_add(self.dport_span))
    }

    pub(super) fn proto(&self) -> Option<u8> {
        (self.proto_mask != 0).then_some(self.proto)
    }

    pub(super) fn vrf(&self) -> u16 {
        self.vrf
    }

    pub(super) fn if_id(&self) -> u32 {
        self.if_id
    }

    /// Addresses, VRF, interface.
    #[inline]
    fn covers(&self, k: &FlowKey) -> bool {
        (A::src(k).minus(self.src) <= self.src_span)
            & (A::dst(k).minus(self.dst) <= self.dst_span)
            & (k.vrf().0 == self.vrf)
            & ((self.if_id == 0) | (k.if_id().0 == self.if_id))
    }
}

/// Accepted classes and the two ranges of 16-bit values.
///
/// A full range together with a protocol means "any", as IKEv2 encodes it (RFC 7296 section 3.13.1),
/// so it takes fragments too. Without a protocol it still means "something that has ports".
fn ports(s: &Selector) -> (Classes, (u16, u16), (u16, u16)) {
    const FULL: (u16, u16) = (0, u16::MAX);
    match &s.ports {
        Ports::Any => (Classes::ANY, FULL, FULL),
        Ports::Opaque => (Classes::OPAQUE, FULL, FULL),
        Ports::Range { src, dst } => {
            let (src, dst) = ((*src.start(), *src.end()), (*dst.start(), *dst.end()));
            if src == FULL && dst == FULL && s.proto.is_some_and(has_ports) {
                (Classes::ANY, FULL, FULL)
            } else {
                (Classes::PORTS, src, dst)
            }
        }
        Ports::Icmp { kind, code } => {
            let wide =
                |r: &std::ops::RangeInclusive<u8>| (u16::from(*r.start()), u16::from(*r.end()));
            let (kind, code) = (wide(kind), wide(code));
            if kind == (0, 255) && code == (0, 255) && s.proto.is_some_and(is_icmp) {
                (Classes::ANY, FULL, FULL)
            } else {
                (Classes::ICMP, kind, code)
            }
        }
    }
}

/// A selector of one policy in a table.
#[derive(Clone, Copy)]
pub(super) struct Cell<A> {
    pub(super) rank: Rank,
    pub(super) when: Match<A>,
    pub(super) action: Action,
    pub(super) policy: PolicyIdx,
}

impl<A> Cell<A> {
    #[inline]
    pub(super) fn verdict(&self) -> Verdict {
        Verdict {
            action: self.action,
            policy: self.policy,
        }
    }
}
