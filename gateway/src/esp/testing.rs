//! Packets, frames and SAs for the tests of this directory.

use std::sync::Arc;

use pmd::{Arena, ArenaConfig, Frame, HugePolicy, Pool};

pub(crate) use super::fuzz::spec;
use crate::wire::ipv4::Ipv4Repr;
use crate::wire::ipv6::Ipv6Repr;
use crate::wire::udp::UdpRepr;
use crate::wire::{Family, NattPorts, Parsed, checksum, parse_ip, proto};

pub(crate) const NATT: NattPorts = NattPorts([4500, 4500]);

pub(crate) fn pool(frames: u32, stride: u32) -> (Arc<Arena>, Pool) {
    let arena = Arena::new(ArenaConfig {
        frames,
        stride,
        huge: HugePolicy::Never,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap();
    let pool = Pool::new(&arena, 8);
    (arena, pool)
}

pub(crate) fn frame(pool: &mut Pool, bytes: &[u8]) -> Frame {
    let mut f = pool.get().unwrap();
    assert!(f.set_data(bytes));
    f
}

pub(crate) fn parsed(bytes: &[u8]) -> Parsed {
    parse_ip(bytes, NATT).unwrap()
}

#[derive(Clone, Copy)]
pub(crate) struct Ip {
    pub(crate) family: Family,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) frag: u16,
    pub(crate) id: u16,
}

impl Ip {
    pub(crate) fn new(family: Family) -> Self {
        Self {
            family,
            tos: 0,
            ttl: 64,
            frag: 0,
            id: 1,
        }
    }

    pub(crate) fn packet(self, next: u8, payload: &[u8]) -> Vec<u8> {
        match self.family {
            Family::V4 => {
                let mut h = [0u8; 20];
                Ipv4Repr {
                    src: [10, 1, 0, 1].into(),
                    dst: [10, 2, 0, 2].into(),
                    proto: next,
                    ttl: self.ttl,
                    tos: self.tos,
                    id: self.id,
                    frag: self.frag,
                    payload_len: u16::try_from(payload.len()).unwrap(),
                }
                .emit(&mut h);
                [&h[..], payload].concat()
            }
            Family::V6 => {
                let mut h = [0u8; 40];
                Ipv6Repr {
                    src: "2001:db8:1::1".parse().unwrap(),
                    dst: "2001:db8:2::2".parse().unwrap(),
                    next_header: next,
                    hop_limit: self.ttl,
                    tos: self.tos,
                    flow_label: 0x12345,
                    payload_len: u16::try_from(payload.len()).unwrap(),
                }
                .emit(&mut h);
                [&h[..], payload].concat()
            }
        }
    }

    /// UDP with a right checksum and `n` counted bytes.
    pub(crate) fn udp(self, n: usize) -> Vec<u8> {
        let body: Vec<u8> = (0..n).map(|i| i.to_le_bytes()[0]).collect();
        let mut h = [0u8; 8];
        UdpRepr {
            src: 1111,
            dst: 2222,
            payload_len: u16::try_from(n).unwrap(),
        }
        .emit(&mut h);
        let mut packet = self.packet(proto::UDP, &[&h[..], &body].concat());
        let at = packet.len() - n - 8;
        let c = transport_checksum(&packet, at, proto::UDP);
        packet[at + 6..at + 8].copy_from_slice(&c.to_be_bytes());
        packet
    }
}

/// The checksum that the upper layer at `at` should hold where its field is now zero.
pub(crate) fn transport_checksum(packet: &[u8], at: usize, next: u8) -> u16 {
    let len = u32::try_from(packet.len() - at).unwrap();
    let p = parsed(packet);
    let pseudo = match (p.src_ip(), p.dst_ip()) {
        (std::net::IpAddr::V4(s), std::net::IpAddr::V4(d)) => {
            checksum::pseudo_v4(s, d, next, u16::try_from(len).unwrap())
        }
        (std::net::IpAddr::V6(s), std::net::IpAddr::V6(d)) => checksum::pseudo_v6(s, d, next, len),
        _ => unreachable!("one family"),
    };
    checksum::checksum(pseudo, &packet[at..])
}
