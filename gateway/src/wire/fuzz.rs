//! Entry point for fuzzers.

use super::arp::ArpRepr;
use super::esp::{Esp, UdpPayload};
use super::ethernet::Ethernet;
use super::icmp::Icmp;
use super::ipv4::Ipv4;
use super::ipv6::Ipv6;
use super::tcp::Tcp;
use super::udp::Udp;
use super::{Family, NattPorts, Parsed, parse, parse_ip};

/// The bytes with their IPv4 header checksum made right, which a fuzzer would seldom guess.
pub fn with_checksum(packet: &[u8]) -> Vec<u8> {
    let mut b = packet.to_vec();
    if let Some(&v) = b.first()
        && v >> 4 == 4
        && let Some(header) = b.get_mut(..usize::from(v & 15) * 4)
    {
        super::ipv4::fill_checksum_options(header);
    }
    b
}

/// Puts arbitrary bytes through every view and the data path's parser, which must agree with the views.
pub fn fuzz_parse(data: &[u8]) {
    upper(data);
    let _ = ArpRepr::parse(data);
    if let Ok(eth) = Ethernet::new(data) {
        upper(eth.payload());
        if let Ok(p) = parse(data, NattPorts::default()) {
            assert_eq!(p.vlan, eth.vlan());
            check(&p, eth.payload());
        }
    }
    let data = with_checksum(data);
    if let Ok(p) = parse_ip(&data, NattPorts::default()) {
        check(&p, &data);
    }
}

fn check(p: &Parsed, packet: &[u8]) {
    if p.l3_len == 0 {
        return;
    }
    match p.family {
        Family::V4 => {
            let ip = Ipv4::new(packet).expect("parse() accepted it");
            assert!(ip.checksum_ok());
            assert_eq!(usize::from(p.l3_len), ip.total_len());
            assert_eq!(usize::from(p.upper_off), ip.header_len());
            assert_eq!((p.proto, p.ttl, p.tos), (ip.proto(), ip.ttl(), ip.tos()));
            assert_eq!(p.src_ip(), ip.src());
        }
        Family::V6 => {
            let ip = Ipv6::new(packet).expect("parse() accepted it");
            let w = ip.walk().expect("parse() accepted it");
            assert_eq!(usize::from(p.l3_len), ip.total_len());
            assert_eq!((usize::from(p.upper_off), p.proto), (w.upper_at, w.proto));
            assert!(w.esp_at <= w.upper_at && w.unfragmentable <= w.esp_at);
            assert_eq!(p.dst_ip(), ip.dst());
        }
    }
    assert!(p.esp_off() <= usize::from(p.l3_len) || p.esp().is_none());
}

fn upper(data: &[u8]) {
    if let Ok(udp) = Udp::new(data) {
        let _ = (udp.src(), udp.dst(), udp.checksum());
        let _ = UdpPayload::classify(udp.payload());
    }
    if let Ok(tcp) = Tcp::new(data) {
        let _ = (tcp.src(), tcp.dst(), tcp.seq(), tcp.syn(), tcp.payload());
        if let Some((at, _)) = tcp.mss() {
            assert!(at + 2 <= data.len());
        }
    }
    if let Ok(icmp) = Icmp::new(data) {
        let _ = (icmp.kind(), icmp.mtu_v4(), icmp.mtu_v6(), icmp.body());
    }
    if let Ok(esp) = Esp::new(data) {
        let _ = (esp.spi(), esp.seq(), esp.body());
    }
}
