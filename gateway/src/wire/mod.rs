//! Packet headers over byte slices: views that judge nothing beyond lengths, representations that hold
//! only valid values, and [`parse`], the one pass over a received frame that the data path makes.
//!
//! The contract of every view: its constructor checks lengths, and afterwards no accessor can panic. The
//! fixed part of each header is held as an array reference, so the compiler proves most of that.

pub mod arp;
pub mod checksum;
pub mod esp;
pub mod ethernet;
#[doc(hidden)]
pub mod fuzz;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
mod parse;
pub mod quote;
pub mod tcp;
pub mod udp;

pub use parse::{
    Family, Frag, Kind, NattPorts, Parsed, decrement_ttl, parse, parse_into, parse_ip, parse_ip_at,
    parse_ip_into,
};

use sa_store::drops::DropReason;

/// IP protocol and next-header numbers that the gateway treats specially.
pub mod proto {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// IPv4 in IP.
    pub const IPV4: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// IPv6 in IP.
    pub const IPV6: u8 = 41;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ESP.
    pub const ESP: u8 = 50;
    /// AH.
    pub const AH: u8 = 51;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// No next header; in ESP a dummy packet.
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options.
    pub const DEST_OPTS: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;

    /// Whether the first four bytes of the protocol's header are source and destination port.
    pub const fn has_ports(p: u8) -> bool {
        matches!(p, TCP | UDP | DCCP | SCTP | UDP_LITE)
    }
}

/// Why bytes are not the header they should be. The sender or the network is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the header, or than a length field inside says.
    #[error("packet cut short")]
    Truncated,
    /// The version nibble is not that of the protocol.
    #[error("wrong IP version")]
    Version,
    /// A header-length field below its minimum.
    #[error("header length field too small")]
    HeaderLength,
    /// A total-length field smaller than the header it covers.
    #[error("total length smaller than the header")]
    TotalLength,
    /// The header checksum is wrong.
    #[error("header checksum wrong")]
    Checksum,
    /// More IPv6 extension headers than the gateway follows.
    #[error("too many extension headers")]
    TooManyHeaders,
    /// A hop-by-hop header that is not the first, or another order RFC 8200 forbids.
    #[error("extension header out of order")]
    HeaderOrder,
}

impl From<WireError> for DropReason {
    fn from(e: WireError) -> Self {
        match e {
            WireError::Checksum => Self::IpChecksum,
            _ => Self::IpMalformed,
        }
    }
}

/// Two bytes of an array, network order.
#[inline(always)]
pub(crate) const fn be16<const N: usize>(b: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

/// Four bytes of an array, network order.
#[inline(always)]
pub(crate) const fn be32<const N: usize>(b: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// A length that the caller has checked to be at most 65535.
#[inline(always)]
pub(crate) const fn len16(n: usize) -> u16 {
    debug_assert!(n <= 0xffff);
    let b = n.to_le_bytes();
    u16::from_le_bytes([b[0], b[1]])
}
