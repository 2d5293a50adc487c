//! Packets of hosts and routers.

use std::net::IpAddr;

use etherparse::PacketBuilder;

use super::{MAC_HOST, ip};

pub fn udp(src: &str, dst: &str, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(MAC_HOST, [2, 0, 0, 0, 1, 1]);
    let b = match (ip(src), ip(dst)) {
        (IpAddr::V4(s), IpAddr::V4(d)) => eth.ipv4(s.octets(), d.octets(), ttl),
        (IpAddr::V6(s), IpAddr::V6(d)) => eth.ipv6(s.octets(), d.octets(), ttl),
        _ => unreachable!(),
    };
    let b = b.udp(1000, 2000);
    let mut out = Vec::new();
    b.write(&mut out, payload).unwrap();
    out
}

/// Sets a header byte of an Ethernet + IPv4 frame and makes the header checksum right again.
pub fn with_byte(mut frame: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    frame[at] = value;
    frame[24..26].fill(0);
    let sum = etherparse::Ipv4HeaderSlice::from_slice(&frame[14..])
        .unwrap()
        .to_header()
        .calc_header_checksum();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// What the far host should see: link header of the far gateway, hop limit less by two.
pub fn payload_of(frame: &[u8]) -> Vec<u8> {
    let s = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
    match s.transport {
        Some(etherparse::TransportSlice::Udp(u)) => u.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

/// A router's "fragmentation needed" to `to` about an Ethernet frame with an IPv4 packet.
pub fn too_big(frame: &[u8], to: [u8; 4], mtu: u16) -> Vec<u8> {
    icmp_error(&frame[14..], [198, 51, 100, 1], to, 4, mtu)
}

/// "Destination unreachable" with this code about an IPv4 packet.
pub fn icmp_error(packet: &[u8], from: [u8; 4], to: [u8; 4], code: u8, mtu: u16) -> Vec<u8> {
    let mut message = vec![3, code, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend(&packet[..packet.len().min(100)]);
    let sum = etherparse::checksum::Sum16BitWords::new()
        .add_slice(&message)
        .ones_complement();
    message[2..4].copy_from_slice(&sum.to_ne_bytes());
    let mut out = Vec::new();
    PacketBuilder::ethernet2(MAC_HOST, [2, 0, 0, 0, 1, 1])
        .ipv4(from, to, 64)
        .write(&mut out, etherparse::IpNumber(1), &message)
        .unwrap();
    out
}
