//! What a parsed packet is described by.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Whether the packet is a fragment. An IPv6 atomic fragment (RFC 6946) is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Frag {
    /// Whole packet.
    No,
    /// First fragment: ports are visible.
    First,
    /// Later fragment: ports are not visible.
    Later,
}

/// What the packet is to the data path, judged without knowing local addresses: the caller treats `Esp`,
/// `UdpEsp`, `NatKeepalive` and `Ike` as such only when the destination is the gateway's own, else as `Ip`.
/// Fragments are always `Ip`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Any other IP packet.
    Ip,
    /// ESP directly over IP; see [`Parsed::esp`].
    Esp,
    /// ESP in UDP, RFC 3948; see [`Parsed::esp`].
    UdpEsp,
    /// RFC 3948 keep-alive.
    NatKeepalive,
    /// IKE: port 500, or the non-ESP marker on a NAT-T port.
    Ike,
    /// Not IP (ARP and others): nothing but the L2 fields and [`Parsed::ethertype`] is meaningful.
    NotIp,
}

/// UDP ports on which the gateway expects NAT-T.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NattPorts(pub [u16; 2]);

impl Default for NattPorts {
    fn default() -> Self {
        Self([4500, 4500])
    }
}

impl NattPorts {
    #[inline(always)]
    pub(super) const fn contains(self, port: u16) -> bool {
        self.0[0] == port || self.0[1] == port
    }
}

pub(super) const PORTS_VISIBLE: u8 = 1;
pub(super) const ICMP_VISIBLE: u8 = 2;
pub(super) const DF: u8 = 4;
pub(super) const L2_GROUP: u8 = 8;
pub(super) const OWN: u8 = 16;

/// What [`parse`] learnt of a packet. Offsets named `*_off` count from the IP header, not from the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Source address; an IPv4 address sits in the low 32 bits.
    pub src: u128,
    /// Destination address, likewise.
    pub dst: u128,
    pub(super) spi: u32,
    pub(super) seq: u32,
    /// Source port, or ICMP type; 0 when not visible.
    pub sport: u16,
    /// Destination port, or ICMP code; 0 when not visible.
    pub dport: u16,
    /// VLAN id; 0 is untagged.
    pub vlan: u16,
    /// Length of the IP packet, bytes. The frame may be longer (Ethernet padding).
    pub l3_len: u16,
    /// Where the upper layer starts. Behind all IPv6 extension headers that the gateway follows.
    pub upper_off: u16,
    /// Length of the Ethernet header with tag, bytes; 0 when parsed from the IP header on.
    pub l2_len: u8,
    /// Upper-layer protocol.
    pub proto: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Address family.
    pub family: Family,
    /// Whether it is a fragment.
    pub frag: Frag,
    /// What it is.
    pub kind: Kind,
    pub(super) flags: u8,
}

// The value travels with each frame of a burst: one cache line, no more.
const _: () = assert!(size_of::<Parsed>() == 64);

impl Parsed {
    /// The description of no packet, to be overwritten.
    pub const NOTHING: Self = Self {
        src: 0,
        dst: 0,
        spi: 0,
        seq: 0,
        sport: 0,
        dport: 0,
        vlan: 0,
        l3_len: 0,
        upper_off: 0,
        l2_len: 0,
        proto: 0,
        ttl: 0,
        tos: 0,
        family: Family::V4,
        frag: Frag::No,
        kind: Kind::NotIp,
        flags: 0,
    };

    /// Source and destination port of TCP, UDP, SCTP, DCCP, UDP-Lite, where visible.
    #[inline]
    pub const fn ports(&self) -> Option<(u16, u16)> {
        if self.flags & PORTS_VISIBLE != 0 {
            Some((self.sport, self.dport))
        } else {
            None
        }
    }

    /// ICMP or ICMPv6 type and code, where visible.
    #[inline]
    pub const fn icmp(&self) -> Option<(u8, u8)> {
        if self.flags & ICMP_VISIBLE != 0 {
            Some(((self.sport & 0xff) as u8, (self.dport & 0xff) as u8))
        } else {
            None
        }
    }

    /// IPv4 DF; true for IPv6, which routers never fragment.
    #[inline]
    pub const fn df(&self) -> bool {
        self.flags & DF != 0
    }

    /// Whether the frame came to a link-layer group address.
    #[inline]
    pub const fn l2_group(&self) -> bool {
        self.flags & L2_GROUP != 0
    }

    /// Whether this host's kernel made the packet: nobody forwards it yet, so its TTL stays.
    #[inline]
    pub const fn own(&self) -> bool {
        self.flags & OWN != 0
    }

    /// Lets the packet travel as if DF were clear.
    pub const fn clear_df(&mut self) {
        self.flags &= !DF;
    }

    /// Marks a packet of this host's kernel.
    pub const fn set_own(&mut self) {
        self.flags |= OWN;
    }

    /// Source address.
    pub const fn src_ip(&self) -> IpAddr {
        ip(self.family, self.src)
    }

    /// Destination address.
    pub const fn dst_ip(&self) -> IpAddr {
        ip(self.family, self.dst)
    }

    /// SPI (perhaps a reserved value) and low half of the sequence number of ESP, plain or in UDP.
    #[inline]
    pub const fn esp(&self) -> Option<(u32, u32)> {
        match self.kind {
            Kind::Esp | Kind::UdpEsp => Some((self.spi, self.seq)),
            _ => None,
        }
    }

    /// Ethertype behind the VLAN tag, of what is not IP.
    #[inline]
    pub const fn ethertype(&self) -> Option<u16> {
        match self.kind {
            Kind::NotIp => Some(self.sport),
            _ => None,
        }
    }

    /// Where the ESP header starts, bytes from the IP header. Only for the two ESP kinds.
    #[inline]
    pub const fn esp_off(&self) -> usize {
        match self.kind {
            Kind::UdpEsp => self.upper_off as usize + 8,
            _ => self.upper_off as usize,
        }
    }
}

const fn ip(family: Family, a: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits((a & 0xffff_ffff) as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(a)),
    }
}
