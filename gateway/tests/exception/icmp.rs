//! ICMP errors: about outer packets, which lower a path MTU, and about inner ones, which take the tunnel of what they quote.

use std::sync::Arc;

use sa_store::drops::{Consumed, DropReason::*};
use sa_store::report::Report;
use sa_store::sa::*;

use super::common::{Bed, Plan, bed, icmp_error, too_big, udp};
use super::reports;

/// Later than any clock shows.
const NOW: u64 = 1 << 62;

/// Gives what workers tell to the SAs, as control does.
fn learn(bed: &mut Bed) -> Vec<bool> {
    let snapshot = bed.left.gw.store.current();
    let learnt = reports(bed).into_iter().filter_map(|r| match r {
        Report::TooBig(e) => Some(e.learn(&snapshot, NOW)),
        _ => None,
    });
    learnt.collect()
}

#[test]
fn the_path_mtu_is_lowered_by_who_saw_a_packet_and_never_raised() {
    let mut bed = bed(&Plan {
        sa: Box::new(|s| s.df = Df::Set),
        ..Plan::default()
    });
    let packet = |len: usize| udp("10.1.0.1", "10.2.0.1", 64, &vec![1; len - 28]);
    bed.send_left(&[packet(1446)]);
    assert_eq!(bed.settle().1.len(), 1);
    let outer = bed.wire.last().unwrap().clone();
    let us = [192, 0, 2, 1];
    let out_sa = |bed: &Bed| {
        let snapshot = bed.left.gw.store.current();
        snapshot
            .outbound(sa_store::spd::TunnelIdx(0))
            .unwrap()
            .clone()
    };
    bed.inject_left(&[too_big(&outer, us, 1400)]);
    bed.settle();
    assert_eq!(learn(&mut bed), [true]);
    assert_eq!(out_sa(&bed).path_mtu(), 1400);
    let noted = bed
        .left
        .count(|c| c.consumed[Consumed::PathMtu as usize].value());
    assert_eq!(noted, 1);
    // A larger one changes nothing, one below the least is taken as that.
    bed.inject_left(&[too_big(&outer, us, 1450)]);
    bed.settle();
    assert_eq!(
        (learn(&mut bed), out_sa(&bed).path_mtu()),
        (vec![true], 1400)
    );
    // 1400 - 20 - 8 - 8 - 16 = 1348, less two bytes of trailer.
    for (len, arrives) in [(1346, true), (1347, false)] {
        bed.send_left(&[packet(len)]);
        let (l, r) = bed.settle();
        assert_eq!(r.len() == 1, arrives, "{len}");
        if let Some(answer) = l.first() {
            assert_eq!(u16::from_be_bytes([answer[40], answer[41]]), 1346);
        }
    }
    let mut wrong_spi = outer.clone();
    wrong_spi[34 + 3] ^= 1;
    let mut wrong_number = outer.clone();
    wrong_number[38..42].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut wrong_peer = outer.clone();
    wrong_peer[33] = 77;
    bed.inject_left(&[wrong_spi, wrong_number, wrong_peer].map(|o| too_big(&o, us, 600)));
    bed.settle();
    assert_eq!(
        (learn(&mut bed), out_sa(&bed).path_mtu()),
        (vec![false; 3], 1400)
    );
    bed.inject_left(&[too_big(&outer, us, 100)]);
    bed.settle();
    assert_eq!(
        (learn(&mut bed), out_sa(&bed).path_mtu()),
        (vec![true], 576)
    );
    let minutes = 60_000_000_000;
    out_sa(&bed).age_path_mtu(NOW + 10 * minutes - 1);
    assert_eq!(out_sa(&bed).path_mtu(), 576);
    out_sa(&bed).age_path_mtu(NOW + 10 * minutes);
    assert_eq!(out_sa(&bed).path_mtu(), u16::MAX);
}

#[test]
fn a_successor_knows_its_predecessors_path() {
    let mut bed = bed(&Plan::default());
    let snapshot = bed.left.gw.store.current();
    let tunnel = sa_store::spd::TunnelIdx(0);
    let entry = snapshot.outbound(tunnel).unwrap().clone();
    entry.lower_path_mtu(1300, 5);
    let mut draft = bed.left.gw.store.draft();
    let spec = SaSpec {
        spi: Spi::new(0x2001).unwrap(),
        keys: SaKeys {
            enc: vec![9; 20].into(),
            auth: vec![].into(),
        },
        ..(*entry.spec).clone()
    };
    let factory = gateway::crypto::Fixed(gateway::crypto::rustcrypto::RustCrypto);
    let start = sa_store::runtime::Start::default();
    let place = sa_store::runtime::Place::CPU;
    let store = &mut bed.left.gw.store;
    let id = store
        .add_sa_on(&mut draft, Arc::new(spec), &factory, start, place, 0)
        .unwrap();
    draft.set_outbound(tunnel, id);
    store.publish(draft);
    assert_eq!(store.current().outbound(tunnel).unwrap().path_mtu(), 1300);
}

#[test]
fn an_ipv6_packet_of_1280_bytes_passes_every_path() {
    let mut bed = bed(&Plan::default());
    let packet = |len: usize| udp("fd01::1", "fd02::1", 64, &vec![1; len - 48]);
    let snapshot = bed.left.gw.store.current();
    let entry = snapshot
        .outbound(sa_store::spd::TunnelIdx(0))
        .unwrap()
        .clone();
    entry.lower_path_mtu(1000, u64::MAX);
    bed.send_left(&[packet(1280), packet(1281)]);
    let (l, r) = bed.settle();
    assert_eq!(r.len(), 1, "{:?}", bed.dropped(true));
    assert_eq!(bed.wire.len(), 2, "in two fragments");
    assert_eq!(l.len(), 1);
    assert_eq!(
        (
            l[0][54],
            u32::from_be_bytes(l[0][58..62].try_into().unwrap())
        ),
        (2, 1280)
    );
}

#[test]
fn errors_of_routers_beyond_the_policies_come_through_the_tunnel() {
    let mut bed = bed(&Plan::default());
    let sent = udp("10.1.0.1", "10.2.0.1", 64, b"x");
    bed.send_left(std::slice::from_ref(&sent));
    let (_, r) = bed.settle();
    // A router behind the right gateway, in no policy, answers what arrived there.
    let error = |to| icmp_error(&r[0][14..], [172, 16, 0, 1], to, 1, 0);
    bed.send_right(&[error([10, 1, 0, 1])]);
    let (l, _) = bed.settle();
    bed.expect(&l, 1);
    assert_eq!((l[0][26..30].to_vec(), l[0][34]), (vec![172, 16, 0, 1], 3));
    // To anybody but the quoted packet's sender, or about what no tunnel carries: policies alone decide.
    bed.send_right(&[error([10, 1, 0, 9])]);
    let stranger = icmp_error(
        &udp("10.9.0.1", "10.2.0.1", 64, b"x")[14..],
        [172, 16, 0, 1],
        [10, 9, 0, 1],
        1,
        0,
    );
    bed.send_right(&[stranger]);
    let (l, _) = bed.settle();
    assert!(l.is_empty());
    assert_eq!(bed.dropped(false), [(PolicyDiscard, 2)]);
}
