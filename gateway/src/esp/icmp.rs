//! ICMP errors that the gateway sends to the source of a packet it could not forward: RFC 792, 1191, 1812,
//! 4443. The caller limits their rate ([`super::rate::TokenBucket`]) and routes them.

use std::net::{Ipv4Addr, Ipv6Addr};

use pmd::Frame;

use crate::wire::icmp::{self, v4, v6};
use crate::wire::ipv4::Ipv4Repr;
use crate::wire::ipv6::Ipv6Repr;
use crate::wire::{Family, Frag, Parsed, checksum, len16, proto};

/// Longest ICMPv4 error, RFC 1812 section 4.3.2.3.
const MAX_V4: usize = 576;
/// Longest ICMPv6 error, RFC 4443 section 2.4 (c).
const MAX_V6: usize = 1280;
/// TOS of errors: internetwork control, RFC 1812 section 4.3.2.5.
const TOS: u8 = 0xc0;
const TTL: u8 = 64;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// Larger than this many bytes: fragmentation needed or packet too big.
    TooBig {
        /// Largest packet that fits, as its sender counts.
        mtu: u16,
    },
    /// TTL or hop limit ran out.
    TimeExceeded,
    /// Policy forbids it: communication administratively prohibited.
    Prohibited,
    /// No route to the destination.
    NoRoute,
    /// The destination's link address cannot be found.
    HostUnreachable,
}

impl IcmpError {
    const fn code_v4(self) -> (u8, u8, u32) {
        match self {
            Self::TooBig { mtu } => (v4::UNREACHABLE, v4::FRAG_NEEDED, mtu as u32),
            Self::TimeExceeded => (v4::TIME_EXCEEDED, 0, 0),
            Self::Prohibited => (v4::UNREACHABLE, 13, 0),
            Self::NoRoute => (v4::UNREACHABLE, 0, 0),
            Self::HostUnreachable => (v4::UNREACHABLE, 1, 0),
        }
    }

    const fn code_v6(self) -> (u8, u8, u32) {
        match self {
            // A path of less than 1280 bytes is the gateway's to bridge by fragmenting after encryption;
            // hosts ignore smaller values (RFC 8201 section 4).
            Self::TooBig { mtu } => (v6::TOO_BIG, 0, if mtu < 1280 { 1280 } else { mtu as u32 }),
            Self::TimeExceeded => (v6::TIME_EXCEEDED, 0, 0),
            Self::Prohibited => (1, 1, 0),
            Self::NoRoute => (1, 0, 0),
            Self::HostUnreachable => (1, 3, 0),
        }
    }
}

/// Whether an error may be sent at all: RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 (e).
pub fn may_answer(p: &Parsed, error: IcmpError) -> bool {
    // Packet-too-big may answer multicast, for path MTU discovery; nothing else may.
    let group_ok = p.family == Family::V6 && matches!(error, IcmpError::TooBig { .. });
    if p.l2_group() && !group_ok {
        return false;
    }
    match p.family {
        Family::V4 => {
            let (src, dst) = (v4_of(p.src), v4_of(p.dst));
            let bad_source = src.is_unspecified()
                || src.is_loopback()
                || src.is_multicast()
                || src.octets()[0] >= 240
                || src.octets()[0] == 0;
            let is_error = p.proto == proto::ICMP && p.icmp().is_none_or(|(t, _)| v4::is_error(t));
            !bad_source
                && !dst.is_multicast()
                && !dst.is_broadcast()
                && p.frag != Frag::Later
                && !is_error
        }
        Family::V6 => {
            let (src, dst) = (Ipv6Addr::from(p.src), Ipv6Addr::from(p.dst));
            let bad_source = src.is_unspecified() || src.is_multicast() || src.is_loopback();
            let is_error = p.proto == proto::ICMPV6
                && match p.icmp() {
                    Some((t, _)) => v6::is_error(t),
                    // A later fragment of ICMPv6 may belong to an error.
                    None => true,
                };
            !bad_source && (!dst.is_multicast() || group_ok) && !is_error
        }
    }
}

/// Fills the empty frame `out` with the error that answers `packet` (from its IP header on, described by
/// `p`), sent from `from`. False, with `out` empty, when no answer may be sent, the families differ, or
/// the frame has no room.
pub fn build(
    out: &mut Frame,
    packet: &[u8],
    p: &Parsed,
    error: IcmpError,
    from: std::net::IpAddr,
) -> bool {
    if !may_answer(p, error) {
        return false;
    }
    let headroom = out.headroom();
    let built = match (p.family, from) {
        (Family::V4, std::net::IpAddr::V4(from)) => build_v4(out, packet, p, error, from),
        (Family::V6, std::net::IpAddr::V6(from)) => build_v6(out, packet, p, error, from),
        _ => None,
    };
    if built.is_none() {
        out.reset(headroom);
    }
    built.is_some()
}

fn v4_of(a: u128) -> Ipv4Addr {
    Ipv4Addr::from_bits((a & 0xffff_ffff) as u32)
}

/// The quoted packet without link-layer padding, at most `room` bytes.
fn quote<'a>(packet: &'a [u8], p: &Parsed, room: usize) -> &'a [u8] {
    let n = packet.len().min(usize::from(p.l3_len)).min(room);
    packet.get(..n).unwrap_or(packet)
}

fn header((kind, code, rest): (u8, u8, u32)) -> [u8; icmp::HEADER_LEN] {
    let r = rest.to_be_bytes();
    [kind, code, 0, 0, r[0], r[1], r[2], r[3]]
}

fn build_v4(
    out: &mut Frame,
    packet: &[u8],
    p: &Parsed,
    error: IcmpError,
    from: Ipv4Addr,
) -> Option<()> {
    let quoted = quote(packet, p, MAX_V4 - 28);
    let len = icmp::HEADER_LEN + quoted.len();
    let b = out.append(20 + len)?;
    let (ip, message) = b.split_first_chunk_mut::<20>()?;
    Ipv4Repr {
        src: from,
        dst: v4_of(p.src),
        proto: proto::ICMP,
        ttl: TTL,
        tos: TOS,
        id: 0,
        frag: crate::wire::ipv4::DF,
        payload_len: len16(len),
    }
    .emit(ip);
    fill(message, header(error.code_v4()), quoted, 0)
}

fn build_v6(
    out: &mut Frame,
    packet: &[u8],
    p: &Parsed,
    error: IcmpError,
    from: Ipv6Addr,
) -> Option<()> {
    let quoted = quote(packet, p, MAX_V6 - 48);
    let len = icmp::HEADER_LEN + quoted.len();
    let b = out.append(40 + len)?;
    let (ip, message) = b.split_first_chunk_mut::<40>()?;
    let dst = Ipv6Addr::from(p.src);
    Ipv6Repr {
        src: from,
        dst,
        next_header: proto::ICMPV6,
        hop_limit: TTL,
        tos: TOS,
        flow_label: 0,
        payload_len: len16(len),
    }
    .emit(ip);
    let pseudo = checksum::pseudo_v6(from, dst, proto::ICMPV6, u32::from(len16(len)));
    fill(message, header(error.code_v6()), quoted, pseudo)
}

fn fill(message: &mut [u8], header: [u8; 8], quoted: &[u8], pseudo: u16) -> Option<()> {
    let (head, body) = message.split_first_chunk_mut::<8>()?;
    *head = header;
    body.copy_from_slice(quoted);
    let c = checksum::checksum(pseudo, message);
    message.get_mut(2..4)?.copy_from_slice(&c.to_be_bytes());
    Some(())
}

/// Feeds arbitrary bytes to everything that reads ICMP, for the fuzzer.
#[doc(hidden)]
pub fn fuzz_icmp(data: &[u8]) {
    let data = &*crate::wire::fuzz::with_checksum(data);
    if let Ok(p) = crate::wire::parse_ip(data, crate::wire::NattPorts::default()) {
        for error in [IcmpError::TooBig { mtu: 1400 }, IcmpError::TimeExceeded] {
            let _ = may_answer(&p, error);
        }
        let _ = crate::wire::quote::QuotingError::checksum_ok(data, &p);
        if let Some(e) = crate::wire::quote::QuotingError::read(data, &p) {
            assert_eq!(e.quoted.answered().answered(), e.quoted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ip, parsed, pool};
    use super::*;
    use crate::wire::ipv4::{Ipv4, MF};

    const US4: std::net::IpAddr = std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254));
    const US6: std::net::IpAddr =
        std::net::IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe));

    fn answer(packet: &[u8], error: IcmpError) -> Option<Vec<u8>> {
        let (_arena, mut pool) = pool(8, 2048);
        let p = parsed(packet);
        let from = if p.family == Family::V4 { US4 } else { US6 };
        let mut f = pool.get().unwrap();
        let sent = build(&mut f, packet, &p, error, from);
        let r = sent.then(|| f.data().to_vec());
        assert!(sent || f.is_empty());
        pool.put(f);
        r
    }

    #[test]
    fn fragmentation_needed_quotes_up_to_576_bytes_and_tells_the_mtu() {
        let packet = Ip::new(Family::V4).udp(1400);
        let b = answer(&packet, IcmpError::TooBig { mtu: 1338 }).unwrap();
        assert_eq!(b.len(), 576);
        let ip = Ipv4::new(&b).unwrap();
        assert!(ip.checksum_ok());
        assert_eq!((ip.proto(), ip.dst()), (1, Ipv4Addr::new(10, 1, 0, 1)));
        let (header, quoted) = etherparse::Icmpv4Header::from_slice(ip.payload()).unwrap();
        assert_eq!(
            header.icmp_type,
            etherparse::Icmpv4Type::DestinationUnreachable(
                etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu: 1338
                }
            )
        );
        assert_eq!(header.checksum, header.icmp_type.calc_checksum(quoted));
        assert_eq!(quoted, &packet[..548]);
    }

    #[test]
    fn packet_too_big_quotes_up_to_1280_bytes_and_never_tells_less_than_1280() {
        let packet = Ip::new(Family::V6).udp(1400);
        for (mtu, told) in [(1400, 1400), (1200, 1280)] {
            let b = answer(&packet, IcmpError::TooBig { mtu }).unwrap();
            assert_eq!(b.len(), 1280);
            let ip = crate::wire::ipv6::Ipv6::new(&b).unwrap();
            let header = etherparse::Icmpv6Header::from_slice(ip.payload())
                .unwrap()
                .0;
            assert_eq!(
                header.icmp_type,
                etherparse::Icmpv6Type::PacketTooBig { mtu: told }
            );
            let sum = header
                .icmp_type
                .calc_checksum(ip.src().octets(), ip.dst().octets(), &ip.payload()[8..])
                .unwrap();
            assert_eq!(header.checksum, sum);
        }
    }

    #[test]
    fn short_packets_are_quoted_whole_without_padding() {
        let packet = Ip::new(Family::V4).udp(4);
        let mut padded = packet.clone();
        padded.extend([0; 14]);
        let b = answer(&padded, IcmpError::TimeExceeded).unwrap();
        assert_eq!(b[28..], packet);
        assert_eq!(b[20..22], [11, 0]);
        let packet = Ip::new(Family::V6).udp(4);
        assert_eq!(
            answer(&packet, IcmpError::TimeExceeded).unwrap()[40..42],
            [3, 0]
        );
        assert_eq!(
            answer(&packet, IcmpError::Prohibited).unwrap()[40..42],
            [1, 1]
        );
        assert_eq!(answer(&packet, IcmpError::NoRoute).unwrap()[40..42], [1, 0]);
    }

    #[test]
    fn errors_never_answer_errors_fragments_or_groups() {
        let no = |packet: &[u8], error| assert_eq!(answer(packet, error), None);
        let big = IcmpError::TooBig { mtu: 1400 };
        let v4 = Ip::new(Family::V4);
        let v6 = Ip::new(Family::V6);
        for kind in [3, 4, 5, 11, 12] {
            no(&v4.packet(proto::ICMP, &[kind, 0, 0, 0, 0, 0, 0, 0]), big);
        }
        assert!(answer(&v4.packet(proto::ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]), big).is_some());
        for kind in [1, 2, 3, 127, 137] {
            no(&v6.packet(proto::ICMPV6, &[kind, 0, 0, 0, 0, 0, 0, 0]), big);
        }
        assert!(answer(&v6.packet(proto::ICMPV6, &[128, 0, 0, 0, 0, 0, 0, 0]), big).is_some());
        let mut later = v4;
        later.frag = 5;
        no(&later.udp(8), big);
        later.frag = MF;
        assert!(answer(&later.udp(8), big).is_some(), "first fragment");
        let with = |mut b: Vec<u8>, at: usize, v: &[u8]| {
            b[at..at + v.len()].copy_from_slice(v);
            if b[0] >> 4 == 4 {
                crate::wire::ipv4::fill_checksum(b.first_chunk_mut().unwrap());
            }
            b
        };
        for src in [
            [0, 0, 0, 0],
            [127, 0, 0, 1],
            [224, 0, 0, 1],
            [255, 255, 255, 255],
        ] {
            no(&with(v4.udp(8), 12, &src), big);
        }
        for dst in [[224, 0, 0, 1], [255, 255, 255, 255]] {
            no(&with(v4.udp(8), 16, &dst), big);
        }
        no(&with(v6.udp(8), 8, &[0xff, 2]), big);
        let to_group = with(v6.udp(8), 24, &[0xff, 2]);
        no(&to_group, IcmpError::TimeExceeded);
        assert!(answer(&to_group, big).is_some());
    }

    #[test]
    fn a_frame_without_room_stays_empty() {
        let (_arena, mut pool) = pool(8, 2048);
        let packet = Ip::new(Family::V4).udp(500);
        let mut f = pool.get().unwrap();
        f.reset(2000);
        assert!(!build(
            &mut f,
            &packet,
            &parsed(&packet),
            IcmpError::TimeExceeded,
            US4
        ));
        assert!(f.is_empty());
        f.reset(192);
        assert!(!build(
            &mut f,
            &packet,
            &parsed(&packet),
            IcmpError::TimeExceeded,
            US6
        ));
        pool.put(f);
    }
}
