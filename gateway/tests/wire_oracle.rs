//! The data path's parser against an independent one.

use etherparse::{
    IpFragOffset, Ipv6FragmentHeader, Ipv6RawExtHeader, PacketBuilder, SlicedPacket, TransportSlice,
};
use gateway::esp::fuzz::fuzz_decap;
use gateway::esp::icmp::fuzz_icmp;
use gateway::esp::mss::fuzz_mss;
use gateway::wire::fuzz::fuzz_parse;
use gateway::wire::{Family, Frag, Kind, NattPorts, parse, parse_ip};
use pmd::{Arena, ArenaConfig, HugePolicy, Pool};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Shape {
    v6: bool,
    vlan: Option<u16>,
    upper: u8,
    src: u16,
    dst: u16,
    ttl: u8,
    tos: u8,
    payload: Vec<u8>,
    ext: u8,
    padding: usize,
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        any::<bool>(),
        proptest::option::of(1u16..4095),
        0u8..3,
        (any::<u16>(), any::<u16>(), any::<u8>(), any::<u8>()),
        proptest::collection::vec(any::<u8>(), 0..200),
        0u8..8,
        0usize..40,
    )
        .prop_map(
            |(v6, vlan, upper, (src, dst, ttl, tos), payload, ext, padding)| Shape {
                v6,
                vlan,
                upper,
                src,
                dst,
                ttl,
                tos,
                payload,
                ext,
                padding,
            },
        )
}

/// The frame as the other library writes it.
fn build(s: &Shape) -> Vec<u8> {
    use etherparse::{IpHeaders, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header};
    let eth = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = if s.v6 {
        let mut ext = Ipv6Extensions::default();
        let raw = Ipv6RawExtHeader::new_raw(0.into(), &[1, 4, 0, 0, 0, 0]).unwrap();
        if s.ext & 1 != 0 {
            ext.hop_by_hop_options = Some(raw.clone());
        }
        if s.ext & 2 != 0 {
            ext.destination_options = Some(raw);
        }
        if s.ext & 4 != 0 {
            ext.fragment = Some(Ipv6FragmentHeader::new(
                0.into(),
                IpFragOffset::try_new(0).unwrap(),
                false,
                7,
            ));
        }
        let header = Ipv6Header {
            traffic_class: s.tos,
            hop_limit: s.ttl,
            source: [0x20; 16],
            destination: [0x21; 16],
            ..Default::default()
        };
        IpHeaders::Ipv6(header, ext)
    } else {
        let mut header = Ipv4Header::new(0, s.ttl, 0.into(), [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        header.dscp = (s.tos >> 2).try_into().unwrap();
        header.ecn = (s.tos & 3).try_into().unwrap();
        if s.ext & 1 != 0 {
            header.options = [1, 1, 1, 0].into();
        }
        IpHeaders::Ipv4(header, Ipv4Extensions::default())
    };
    let mut out = Vec::new();
    let step = match s.vlan {
        Some(v) => eth.single_vlan(v.try_into().unwrap()).ip(ip),
        None => eth.ip(ip),
    };
    match s.upper {
        0 => step.udp(s.src, s.dst).write(&mut out, &s.payload).unwrap(),
        1 => step
            .tcp(s.src, s.dst, 1, 2)
            .write(&mut out, &s.payload)
            .unwrap(),
        _ => {
            let [kind, code] = s.src.to_be_bytes();
            if s.v6 {
                step.icmpv6_raw(kind, code, [0; 4])
                    .write(&mut out, &s.payload)
                    .unwrap();
            } else {
                step.icmpv4_raw(kind, code, [0; 4])
                    .write(&mut out, &s.payload)
                    .unwrap();
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn frames_of_another_library_are_understood(s in shape()) {
        let mut frame = build(&s);
        let whole = frame.len();
        frame.resize(whole + s.padding, 0);
        let p = parse(&frame, NattPorts::default()).unwrap();
        let l2 = if s.vlan.is_some() { 18 } else { 14 };
        prop_assert_eq!(usize::from(p.l2_len), l2);
        prop_assert_eq!(usize::from(p.l3_len), whole - l2);
        prop_assert_eq!(p.vlan, s.vlan.unwrap_or(0));
        prop_assert_eq!(p.family, if s.v6 { Family::V6 } else { Family::V4 });
        prop_assert_eq!((p.ttl, p.tos, p.frag), (s.ttl, s.tos, Frag::No));
        if s.upper < 2 {
            prop_assert_eq!(p.ports(), Some((s.src, s.dst)));
        } else {
            let [kind, code] = s.src.to_be_bytes();
            prop_assert_eq!(p.icmp(), Some((kind, code)));
        }
        fuzz_parse(&frame);
    }

    #[test]
    fn damaged_frames_are_refused_or_understood_alike(s in shape(), at in any::<prop::sample::Index>(), v in any::<u8>()) {
        let mut frame = build(&s);
        let i = at.index(frame.len());
        frame[i] = v;
        fuzz_parse(&frame);
        let (Ok(p), Ok(other)) = (parse(&frame, NattPorts::default()), SlicedPacket::from_ethernet(&frame)) else {
            return Ok(());
        };
        if p.frag != Frag::No || matches!(p.kind, Kind::NotIp) {
            return Ok(());
        }
        match other.transport {
            Some(TransportSlice::Udp(u)) => prop_assert_eq!(p.ports(), Some((u.source_port(), u.destination_port()))),
            Some(TransportSlice::Tcp(t)) => prop_assert_eq!(p.ports(), Some((t.source_port(), t.destination_port()))),
            Some(TransportSlice::Icmpv4(m)) => prop_assert_eq!(p.icmp(), Some((m.type_u8(), m.code_u8()))),
            Some(TransportSlice::Icmpv6(m)) => prop_assert_eq!(p.icmp(), Some((m.type_u8(), m.code_u8()))),
            _ => {}
        }
    }

    #[test]
    fn arbitrary_bytes_are_survived_everywhere(data in proptest::collection::vec(any::<u8>(), 0..300), first in 0u8..8) {
        let mut data = data;
        if let Some(b) = data.first_mut() {
            // Arbitrary bytes rarely begin like IP; help them.
            *b = [0x45, 0x46, 0x60, 0x4f, 0x61, 0, 0x65, 0xff][usize::from(first)];
        }
        fuzz_parse(&data);
        fuzz_icmp(&data);
        fuzz_mss(&data);
    }
}

#[test]
fn encapsulated_packets_of_another_library_come_back() {
    let arena = Arena::new(ArenaConfig {
        frames: 64,
        huge: HugePolicy::Never,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap();
    let pool = std::cell::RefCell::new(Pool::new(&arena, 8));
    proptest!(|(s in shape(), choice in any::<u8>(), suite in any::<u8>())| {
        let mut s = s;
        s.vlan = None;
        let frame = build(&s);
        prop_assert!(parse_ip(&frame[14..], NattPorts::default()).is_ok());
        let data = [&[choice, suite][..], &frame[14..]].concat();
        fuzz_decap(&data, &mut pool.borrow_mut());
    });
}
