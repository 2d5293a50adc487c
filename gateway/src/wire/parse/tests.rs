use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::wire::ethernet::EthernetRepr;
use crate::wire::ipv4::Ipv4Repr;
use crate::wire::ipv6::Ipv6Repr;

const NATT: NattPorts = NattPorts([4500, 4500]);

fn v4(proto: u8, frag: u16, upper: &[u8]) -> Vec<u8> {
    let mut h = [0u8; 20];
    Ipv4Repr {
        src: Ipv4Addr::new(192, 0, 2, 1),
        dst: Ipv4Addr::new(198, 51, 100, 2),
        proto,
        ttl: 64,
        tos: 3,
        id: 7,
        frag,
        payload_len: u16::try_from(upper.len()).unwrap(),
    }
    .emit(&mut h);
    [&h[..], upper].concat()
}

fn v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut h = [0u8; 40];
    Ipv6Repr {
        src: "2001:db8::1".parse().unwrap(),
        dst: "2001:db8::2".parse().unwrap(),
        next_header,
        hop_limit: 9,
        tos: 0xb9,
        flow_label: 5,
        payload_len: u16::try_from(payload.len()).unwrap(),
    }
    .emit(&mut h);
    [&h[..], payload].concat()
}

fn eth(vlan: u16, ethertype: u16, l3: &[u8]) -> Vec<u8> {
    let repr = EthernetRepr {
        dst: [2, 0, 0, 0, 0, 1],
        src: [2, 0, 0, 0, 0, 2],
        vlan,
        ethertype,
    };
    let mut f = vec![0; repr.header_len()];
    assert!(repr.emit(&mut f));
    f.extend_from_slice(l3);
    f
}

fn udp(sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let mut h = [0u8; 8];
    crate::wire::udp::UdpRepr {
        src: sport,
        dst: dport,
        payload_len: u16::try_from(payload.len()).unwrap(),
    }
    .emit(&mut h);
    [&h[..], payload].concat()
}

#[test]
fn ethernet_padding_is_not_part_of_the_packet() {
    let mut f = eth(0, TYPE_IPV4, &v4(17, 0, &udp(1, 2, b"x")));
    f.resize(60, 0);
    let p = parse(&f, NATT).unwrap();
    assert_eq!((p.l2_len, p.l3_len, p.upper_off), (14, 29, 20));
    assert_eq!(
        (p.ports(), p.kind, p.frag),
        (Some((1, 2)), Kind::Ip, Frag::No)
    );
    assert_eq!(p.src_ip(), "192.0.2.1".parse::<IpAddr>().unwrap());
    assert_eq!(p.dst_ip(), "198.51.100.2".parse::<IpAddr>().unwrap());
    assert!(!p.df() && !p.l2_group());
}

#[test]
fn vlan_tags_are_read_and_other_ethertypes_left_to_the_caller() {
    let p = parse(&eth(42, TYPE_IPV6, &v6(17, &udp(3, 4, b""))), NATT).unwrap();
    assert_eq!((p.l2_len, p.vlan, p.family), (18, 42, Family::V6));
    assert_eq!((p.tos, p.ttl, p.l3_len), (0xb9, 9, 48));
    let p = parse(&eth(42, 0x0806, &[0; 28]), NATT).unwrap();
    assert_eq!((p.kind, p.ethertype()), (Kind::NotIp, Some(0x0806)));
    assert_eq!((p.l2_len, p.vlan), (18, 42));
    let mut f = eth(0, 0x88cc, &[]);
    f[0] = 1;
    assert!(parse(&f, NATT).unwrap().l2_group());
    assert_eq!(parse(&f[..13], NATT), Err(DropReason::L2Malformed));
}

#[test]
fn esp_is_recognised_plain_and_in_udp() {
    let esp = [0, 0, 0x10, 1, 0, 0, 0, 9, 1, 2, 3, 4];
    let kind = |b: &[u8]| {
        let p = parse_ip(b, NATT).unwrap();
        (p.kind, p.esp())
    };
    let plain = (Kind::Esp, Some((0x1001, 9)));
    let in_udp = (Kind::UdpEsp, Some((0x1001, 9)));
    assert_eq!(kind(&v4(50, 0, &esp)), plain);
    assert_eq!(kind(&v6(50, &esp)), plain);
    let b = v4(17, 0, &udp(9999, 4500, &esp));
    assert_eq!(kind(&b), in_udp);
    assert_eq!(parse_ip(&b, NATT).unwrap().esp_off(), 28);
    assert_eq!(kind(&v6(17, &udp(9999, 4500, &esp))), in_udp);
    assert_eq!(kind(&v4(17, 0, &udp(4500, 9999, &esp))), (Kind::Ip, None));
    assert_eq!(
        parse_ip(&v4(17, 0, &udp(1, 7777, &esp)), NattPorts([4500, 7777]))
            .unwrap()
            .kind,
        Kind::UdpEsp
    );
    assert_eq!(
        parse_ip(&v4(50, 0, &esp[..7]), NATT),
        Err(DropReason::EspTooShort)
    );
}

#[test]
fn keepalive_ike_and_odd_datagrams_on_the_natt_port_are_told_apart() {
    let kind = |dport, payload: &[u8]| {
        parse_ip(&v4(17, 0, &udp(4500, dport, payload)), NATT)
            .unwrap()
            .kind
    };
    assert_eq!(kind(4500, &[0xff]), Kind::NatKeepalive);
    assert_eq!(kind(4500, &[0, 0, 0, 0, 1, 2]), Kind::Ike);
    assert_eq!(kind(4500, &[1, 2]), Kind::Ip);
    assert_eq!(kind(500, b"anything"), Kind::Ike);
    let mut longer = udp(4500, 4500, &[0xff]);
    longer.push(0);
    assert_eq!(
        parse_ip(&v4(17, 0, &longer), NATT).unwrap().kind,
        Kind::Ip,
        "UDP length disagrees with IP"
    );
}

#[test]
fn a_wrong_checksum_is_told_from_wrong_lengths() {
    let good = v4(6, 0, &[0; 20]);
    let with = |at: usize, v: u8| {
        let mut b = good.clone();
        b[at] = v;
        parse_ip(&b, NATT)
    };
    assert!(parse_ip(&good, NATT).is_ok());
    assert_eq!(with(8, 63), Err(DropReason::IpChecksum));
    assert_eq!(with(0, 0x44), Err(DropReason::IpMalformed));
    assert_eq!(with(0, 0x55), Err(DropReason::IpMalformed));
    assert_eq!(
        parse_ip(&good[..39], NATT),
        Err(DropReason::IpMalformed),
        "total length beyond the bytes"
    );
    assert_eq!(parse_ip(&[], NATT), Err(DropReason::IpMalformed));
    assert_eq!(
        parse_ip_at(&good, Family::V6, NATT),
        Err(DropReason::IpMalformed)
    );
}

#[test]
fn options_are_skipped_and_covered_by_the_checksum() {
    let mut b = v4(17, 0, &[&[1u8, 1, 1, 0][..], &udp(5, 6, b"")].concat());
    b[0] = 0x46;
    ipv4::fill_checksum_options(&mut b[..24]);
    let p = parse_ip(&b, NATT).unwrap();
    assert_eq!((p.upper_off, p.ports()), (24, Some((5, 6))));
    b[20] ^= 8;
    assert_eq!(parse_ip(&b, NATT), Err(DropReason::IpChecksum));
}

#[test]
fn ports_are_visible_in_first_fragments_only() {
    let first = parse_ip(&v4(17, ipv4::MF, &udp(5, 6, &[0; 8])), NATT).unwrap();
    assert_eq!((first.frag, first.ports()), (Frag::First, Some((5, 6))));
    let later = parse_ip(&v4(17, 2, &udp(5, 6, &[0; 8])), NATT).unwrap();
    assert_eq!((later.frag, later.ports()), (Frag::Later, None));
    let esp = parse_ip(&v4(50, ipv4::MF, &[1; 16]), NATT).unwrap();
    assert_eq!((esp.kind, esp.proto), (Kind::Ip, 50));
    let mut v6frag = vec![17, 0, 0, 1, 0, 0, 0, 1];
    v6frag.extend(udp(5, 6, &[]));
    let p = parse_ip(&v6(44, &v6frag), NATT).unwrap();
    assert_eq!(
        (p.frag, p.upper_off, p.ports()),
        (Frag::First, 48, Some((5, 6)))
    );
    v6frag[3] = 0;
    let atomic = parse_ip(&v6(44, &v6frag), NATT).unwrap();
    assert_eq!(atomic.frag, Frag::No);
    v6frag[3] = 8;
    assert_eq!(parse_ip(&v6(44, &v6frag), NATT).unwrap().frag, Frag::Later);
}

#[test]
fn impossible_fragments_are_refused() {
    let invalid = Err(DropReason::FragmentInvalid);
    assert_eq!(parse_ip(&v4(17, ipv4::MF, &[0; 9]), NATT), invalid);
    assert_eq!(parse_ip(&v4(17, 1, &[]), NATT), invalid);
    assert_eq!(parse_ip(&v4(17, 0x1fff, &[0; 24]), NATT), invalid);
    let tiny = v4(6, ipv4::MF, &[]);
    assert_eq!(parse_ip(&tiny, NATT), invalid);
    assert_eq!(
        parse_ip(&v6(44, &[17, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]), NATT),
        invalid
    );
    // First fragment without the transport header, RFC 7112.
    assert_eq!(
        parse_ip(
            &v6(44, &[60, 0, 0, 1, 0, 0, 0, 1, 17, 0, 0, 0, 0, 0, 0, 0]),
            NATT
        ),
        Err(DropReason::IpMalformed)
    );
}

#[test]
fn icmp_type_and_code_stand_in_for_ports() {
    let p = parse_ip(&v4(1, 0, &[8, 3, 0, 0, 0, 0, 0, 0]), NATT).unwrap();
    assert_eq!((p.icmp(), p.ports()), (Some((8, 3)), None));
    let p = parse_ip(&v6(58, &[128, 1, 0, 0, 0, 0, 0, 0]), NATT).unwrap();
    assert_eq!(p.icmp(), Some((128, 1)));
}

#[test]
fn ttl_is_decremented_until_it_expires() {
    let mut b = v4(17, 0, &udp(1, 2, b""));
    let p = parse_ip(&b, NATT).unwrap();
    decrement_ttl(&mut b, &p).unwrap();
    assert_eq!(parse_ip(&b, NATT).unwrap().ttl, 63);
    let mut b = v6(17, &udp(1, 2, b""));
    b[7] = 1;
    let p = parse_ip(&b, NATT).unwrap();
    assert_eq!(decrement_ttl(&mut b, &p), Err(DropReason::TtlExpired));
    assert_eq!(b[7], 1);
}
