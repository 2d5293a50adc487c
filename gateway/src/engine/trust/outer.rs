//! The outer headers that an engine makes: what it may decide (TTL, identification, traffic class) is its own, everything else
//! is the SA's.

use std::net::IpAddr;

use sa_store::sa::{SaSpec, UdpEncap};

use crate::wire::checksum::{add, pseudo_v4, pseudo_v6, sum};
use crate::wire::{ipv4::Ipv4, ipv6::Ipv6, proto};

const UDP_HEADER: usize = 8;

/// What they must say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outer {
    src: IpAddr,
    dst: IpAddr,
    udp: Option<UdpEncap>,
}

impl Outer {
    pub(super) fn of(spec: &SaSpec) -> Outer {
        Outer {
            src: spec.src,
            dst: spec.dst,
            udp: spec.encap,
        }
    }

    /// Bytes in front of ESP.
    pub(super) fn len(&self) -> u16 {
        let ip = if self.dst.is_ipv6() { 40 } else { 20 };
        let udp = if self.udp.is_some() { 8 } else { 0 };
        ip + udp
    }

    /// Whether the packet has them, with right lengths and checksums, and is no fragment.
    pub(super) fn is_on(&self, packet: &[u8]) -> bool {
        let above = if self.udp.is_some() {
            proto::UDP
        } else {
            proto::ESP
        };
        let len = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Ipv4::new(packet).is_ok_and(|ip| {
                ip.checksum_ok()
                    && ip.options().is_empty()
                    && ip.total_len() == packet.len()
                    && (ip.src(), ip.dst(), ip.proto()) == (src, dst, above)
                    && !ip.mf()
                    && ip.frag_offset() == 0
                    && self.has_udp(ip.payload(), || {
                        pseudo_v4(src, dst, proto::UDP, len.saturating_sub(20))
                    })
            }),
            (IpAddr::V6(src), IpAddr::V6(dst)) => Ipv6::new(packet).is_ok_and(|ip| {
                ip.total_len() == packet.len()
                    && (ip.src(), ip.dst(), ip.next_header()) == (src, dst, above)
                    && self.has_udp(ip.payload(), || {
                        pseudo_v6(src, dst, proto::UDP, u32::from(len.saturating_sub(40)))
                    })
            }),
            _ => false,
        }
    }

    /// RFC 3948 section 2.1: a checksum of zero is none.
    fn has_udp(&self, payload: &[u8], pseudo: impl FnOnce() -> u16) -> bool {
        let Some(udp) = self.udp else {
            return true;
        };
        let Some(header) = payload.first_chunk::<UDP_HEADER>() else {
            return false;
        };
        let [a, b, c, d, e, f, g, h] = *header;
        u16::from_be_bytes([a, b]) == udp.sport
            && u16::from_be_bytes([c, d]) == udp.dport
            && usize::from(u16::from_be_bytes([e, f])) == payload.len()
            && ([g, h] == [0, 0] || add(pseudo(), sum(payload)) == 0xffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn outer(src: &str, dst: &str, udp: bool) -> Outer {
        Outer {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            udp: udp.then_some(UdpEncap {
                sport: 4500,
                dport: 4500,
            }),
        }
    }

    #[test]
    fn every_bit_of_an_ipv4_header_counts() {
        let built = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(4500, 4500);
        let mut packet = Vec::new();
        built.write(&mut packet, &[7; 60]).unwrap();
        let right = outer("10.0.0.1", "10.0.0.2", true);
        assert!(right.is_on(&packet), "with a checksum of UDP");
        for bit in 0..packet.len() * 8 {
            let mut bad = packet.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!right.is_on(&bad), "{bit}");
        }
        packet[26..28].fill(0);
        assert!(right.is_on(&packet), "without one");
        assert!(!right.is_on(&packet[..80]));
        assert!(!outer("10.0.0.1", "10.0.0.3", true).is_on(&packet));
        assert!(!outer("10.0.0.1", "10.0.0.2", false).is_on(&packet));
        assert_eq!((right.len(), outer("::1", "::2", false).len()), (28, 40));
    }

    #[test]
    fn ipv6_is_looked_at_as_far_as_it_is_the_sas() {
        let built = PacketBuilder::ipv6([1; 16], [2; 16], 64).udp(4500, 4500);
        let mut packet = Vec::new();
        built.write(&mut packet, &[7; 60]).unwrap();
        let right = outer(
            "101:101:101:101:101:101:101:101",
            "202:202:202:202:202:202:202:202",
            true,
        );
        assert!(right.is_on(&packet));
        for at in [5, 6, 8, 24, 40, 44, 60] {
            let mut bad = packet.clone();
            bad[at] ^= 1;
            assert!(!right.is_on(&bad), "{at}");
        }
    }
}
