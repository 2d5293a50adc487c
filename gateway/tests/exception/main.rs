//! The exception path, packets that wait for a neighbour, and ICMP about tunnels.

#[path = "../common/mod.rs"]
mod common;

mod icmp;
mod moved;
mod waiting;

use std::net::IpAddr;
use std::sync::Arc;

use common::{Bed, MAC_HOST, Plan, any, bed, ip, payload_of, policy, udp, with_byte};
use etherparse::PacketBuilder;
use sa_store::drops::DropReason::*;
use sa_store::fib::RouteTo;
use sa_store::ledger::{Generated, Punt};
use sa_store::policy::Action;
use sa_store::report::Report;
use sa_store::sa::*;

const INSIDE: usize = 0;
const OUTSIDE: usize = 1;
/// The left gateway.
const MAC_GW: [u8; 6] = [2, 0, 0, 0, 1, 1];

fn tapped() -> Bed {
    bed(&Plan {
        taps: Some(1024),
        ..Plan::default()
    })
}

fn ethernet(to: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &MAC_HOST, &ethertype.to_be_bytes(), payload].concat()
}

fn udp_ports(src: &str, dst: &str, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(MAC_HOST, MAC_GW);
    let (IpAddr::V4(s), IpAddr::V4(d)) = (ip(src), ip(dst)) else {
        unreachable!()
    };
    let mut out = Vec::new();
    eth.ipv4(s.octets(), d.octets(), 64)
        .udp(ports.0, ports.1)
        .write(&mut out, payload)
        .unwrap();
    out
}

/// ICMPv6 of one type.
fn icmp6(src: &str, dst: &str, hops: u8, kind: u8) -> Vec<u8> {
    let (IpAddr::V6(s), IpAddr::V6(d)) = (ip(src), ip(dst)) else {
        unreachable!()
    };
    let mut out = Vec::new();
    PacketBuilder::ethernet2(MAC_HOST, MAC_GW)
        .ipv6(s.octets(), d.octets(), hops)
        .icmpv6_raw(kind, 0, [0; 4])
        .write(&mut out, &[0; 16])
        .unwrap();
    out
}

fn punted(bed: &Bed, class: Punt) -> u64 {
    bed.left.count(|c| c.punted[class as usize].value())
}

fn reports(bed: &mut Bed) -> Vec<Report> {
    let rings = &mut bed.left.gw.reports;
    rings
        .iter_mut()
        .flat_map(|r| std::iter::from_fn(|| r.pop().ok()))
        .collect()
}

#[test]
fn what_is_not_ip_goes_to_the_kernel_as_it_came_if_it_is_for_us() {
    let mut bed = tapped();
    let arp = ethernet([255; 6], 0x0806, &[1; 46]);
    let lldp = ethernet([1, 0x80, 0xc2, 0, 0, 0xe], 0x88cc, &[2; 46]);
    let stranger = ethernet([2, 9, 9, 9, 9, 9], 0x0806, &[3; 46]);
    bed.send_left(&[arp.clone(), lldp.clone(), stranger]);
    bed.inject_left(std::slice::from_ref(&arp));
    bed.settle();
    assert_eq!(bed.kernel_got(INSIDE), [arp.clone(), lldp]);
    assert_eq!(bed.kernel_got(OUTSIDE), [arp]);
    assert_eq!(bed.dropped(true), [(NotForUs, 1)]);
    assert_eq!(
        (punted(&bed, Punt::Neighbour), punted(&bed, Punt::Other)),
        (2, 1)
    );
}

#[test]
fn without_a_tap_nothing_goes_to_the_kernel() {
    let mut bed = bed(&Plan::default());
    bed.send_left(&[
        ethernet([255; 6], 0x0806, &[1; 46]),
        udp("10.1.0.1", "10.1.0.254", 64, b"x"),
    ]);
    bed.settle();
    assert_eq!(bed.dropped(true), [(NotForUs, 2)]);
}

#[test]
fn ike_needs_no_policy_and_everything_else_from_outside_does() {
    let mut bed = tapped();
    let marked = |byte| [&[byte; 4][..], b"ike"].concat();
    let ike = [
        udp_ports("198.51.100.7", "192.0.2.1", (500, 500), b"ike"),
        udp_ports("198.51.100.7", "192.0.2.1", (1234, 4500), &marked(0)),
    ];
    let dns = udp_ports("198.51.100.7", "192.0.2.1", (53, 53), b"dns");
    let transit = udp_ports("198.51.100.7", "203.0.113.9", (500, 500), b"not ours");
    bed.inject_left(&ike);
    bed.inject_left(&[dns.clone(), transit]);
    bed.settle();
    assert_eq!(bed.kernel_got(OUTSIDE), ike);
    assert_eq!(bed.dropped(true), [(PolicyDiscard, 2)]);
    assert_eq!(punted(&bed, Punt::Ike), 2);

    let snapshot = bed.left.gw.store.current();
    let mut policies: Vec<_> = snapshot.spd_in.policies().map(|(_, p)| p.clone()).collect();
    let to_us = any("0.0.0.0/0", "192.0.2.1/32");
    policies.push(policy("us", Direction::In, vec![to_us], Action::Bypass));
    let tunnel = bed.left.gw.store.tunnel("t");
    let inbound = snapshot
        .spd_in
        .updated(&policies, |_| Some(tunnel))
        .unwrap()
        .0;
    let mut draft = bed.left.gw.store.draft();
    draft.set_spd(snapshot.spd_out.clone(), Arc::new(inbound));
    bed.left.gw.store.publish(draft);
    bed.inject_left(std::slice::from_ref(&dns));
    bed.settle();
    assert_eq!(bed.kernel_got(OUTSIDE), [dns]);
}

#[test]
fn discovery_from_the_link_is_taken_and_from_beyond_it_is_not() {
    let mut bed = tapped();
    let solicit = icmp6("fe80::9", "ff02::1:ff00:1", 255, 135);
    let forged = icmp6("fe80::9", "ff02::1:ff00:1", 254, 135);
    bed.inject_left(&[solicit.clone(), forged]);
    bed.settle();
    assert_eq!(bed.kernel_got(OUTSIDE), std::slice::from_ref(&solicit));
    assert_eq!(bed.dropped(true), [(PolicyDiscard, 1)]);
    bed.send_left(std::slice::from_ref(&solicit));
    bed.settle();
    assert_eq!(bed.kernel_got(INSIDE), [solicit]);
}

#[test]
fn hosts_inside_reach_the_gateway_without_a_policy() {
    let mut bed = tapped();
    let to_us = [
        udp("10.1.0.1", "10.1.0.254", 1, b"to its address"),
        udp("10.1.0.1", "224.0.0.5", 1, b"to its link"),
        udp("10.1.0.1", "255.255.255.255", 64, b"to all"),
        udp("fd01::1", "fd01::ffff", 64, b"IPv6"),
    ];
    for _ in 0..2 {
        bed.send_left(&to_us);
        let (l, r) = bed.settle();
        assert!(l.is_empty() && r.is_empty());
        assert_eq!(bed.kernel_got(INSIDE), to_us);
    }
    assert!(bed.dropped(true).is_empty());
}

#[test]
fn a_packet_for_the_gateway_comes_through_the_tunnel() {
    let mut bed = tapped();
    let from_right = udp("10.2.0.1", "10.1.0.254", 64, b"inner");
    bed.send_right(&[from_right]);
    bed.settle();
    let got = bed.kernel_got(OUTSIDE);
    assert_eq!(got.len(), 1);
    assert_eq!(
        (&got[0][..6], payload_of(&got[0])),
        (&MAC_GW[..], b"inner".to_vec())
    );
    // The peer forwarded it; here it has arrived.
    assert_eq!(got[0][22], 63);
}

#[test]
fn what_the_kernel_sends_obeys_the_outbound_policies() {
    let mut bed = tapped();
    bed.cut = true;
    let arp = ethernet([255; 6], 0x0806, &[1; 46]);
    let ike = udp_ports("192.0.2.1", "192.0.2.2", (500, 500), b"ike");
    let natt = udp_ports("192.0.2.1", "192.0.2.2", (4500, 1234), &[0; 8]);
    let spoofed = udp_ports("192.0.2.99", "192.0.2.2", (500, 500), b"ike");
    let clear = udp_ports("192.0.2.1", "192.0.2.2", (40_000, 53), b"dns");
    let web = udp("10.1.0.254", "203.0.113.9", 64, b"bypass");
    let peer = |mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 1, 0]);
        frame
    };
    let [ike, natt, spoofed, clear, web] = [ike, natt, spoofed, clear, web].map(peer);
    bed.kernel_sends(
        OUTSIDE,
        &[
            arp.clone(),
            ike.clone(),
            natt.clone(),
            spoofed,
            clear,
            web.clone(),
        ],
    );
    bed.settle();
    assert_eq!(bed.wire, [arp, ike, natt, web]);
    assert_eq!(bed.dropped(true), [(PolicyDiscard, 2)]);

    // A kernel that knows no neighbours here sends to its own address: the gateway's routes decide.
    let mut own = bed.wire[1].clone();
    own[..6].copy_from_slice(&MAC_GW);
    bed.kernel_sends(OUTSIDE, &[own.clone()]);
    bed.settle();
    own[..6].copy_from_slice(&[2, 0, 0, 0, 1, 0]);
    own[6..12].copy_from_slice(&MAC_GW);
    assert_eq!(bed.wire.get(4), Some(&own), "{:?}", bed.dropped(true));

    // Towards the inside nothing crosses the boundary.
    let mut host = udp("10.1.0.254", "10.1.0.1", 64, b"answer");
    host[..6].copy_from_slice(&MAC_HOST);
    bed.kernel_sends(INSIDE, &[host.clone()]);
    let (l, _) = bed.settle();
    assert_eq!(l, [host]);
    let injected = bed
        .left
        .count(|c| c.generated[Generated::Injected as usize].value());
    assert_eq!(injected, 8);
}

#[test]
fn the_kernels_own_traffic_is_protected_and_keeps_its_ttl() {
    for port in [INSIDE, OUTSIDE] {
        let mut bed = tapped();
        bed.kernel_sends(port, &[udp("10.1.0.254", "10.2.0.1", 2, b"own")]);
        let (_, r) = bed.settle();
        bed.expect(&r, 1);
        assert_eq!((payload_of(&r[0]), r[0][22]), (b"own".to_vec(), 1));
        assert_eq!(bed.wire.len(), 1);
        assert_eq!(bed.wire[0][23], 50);
    }
}

#[test]
fn the_kernel_learns_what_fits_the_tunnel() {
    let mut bed = tapped();
    let big = udp("10.1.0.254", "10.2.0.1", 64, &[1; 1472]);
    let df = big[20] | 0x40;
    bed.kernel_sends(OUTSIDE, &[with_byte(big, 20, df)]);
    bed.settle();
    let got = bed.kernel_got(OUTSIDE);
    assert_eq!(got.len(), 1, "{:?}", bed.dropped(true));
    assert_eq!((got[0][34], got[0][35]), (3, 4));
    assert_eq!(
        got[0][26..30],
        [10, 2, 0, 1],
        "not from an address of its own"
    );
    assert_eq!(u16::from_be_bytes([got[0][40], got[0][41]]), 1446);
}

#[test]
fn a_flood_leaves_room_for_ike_and_for_forwarding() {
    let mut bed = bed(&Plan {
        taps: Some(1024),
        workers: 2,
        ..Plan::default()
    });
    let flood = udp("10.1.0.1", "10.1.0.254", 64, b"flood");
    let mut arrived = 0;
    for _ in 0..500 {
        bed.send_left(&vec![flood.clone(); 200]);
        bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, b"through")]);
        arrived += bed.settle().1.len();
        bed.kernel_got(INSIDE);
    }
    assert_eq!(arrived, 500, "{:?}", bed.dropped(true));
    let ike = udp_ports("198.51.100.7", "192.0.2.1", (500, 500), b"ike");
    bed.inject_left(&vec![ike.clone(); 50]);
    bed.settle();
    assert_eq!(bed.kernel_got(OUTSIDE), vec![ike; 50]);
    let limited = bed.dropped(true);
    assert!(
        matches!(limited[0], (PuntLimit, n) if n > 50_000),
        "{limited:?}"
    );
    let unpunted = bed.left.count(|c| c.unpunted[Punt::Other as usize].value());
    assert_eq!(unpunted, limited.iter().map(|(_, n)| n).sum::<u64>());
}

#[test]
fn the_important_goes_first_and_each_class_keeps_its_order() {
    let mut bed = bed(&Plan {
        taps: Some(1024),
        config: Box::new(|c, _| c.punt.per_round = 4),
        ..Plan::default()
    });
    let mut sent: Vec<_> = (0..20u8)
        .map(|i| udp("10.1.0.1", "10.1.0.254", 64, &[i]))
        .collect();
    let bgp = |i: u8| {
        let mut b = udp_ports("10.1.0.1", "10.1.0.254", (3784, 3784), &[i]);
        b[14] = 0x45;
        b
    };
    sent.extend((0..3).map(bgp));
    bed.send_left(&sent);
    bed.settle();
    let got: Vec<_> = bed
        .kernel_got(INSIDE)
        .iter()
        .map(|f| payload_of(f))
        .collect();
    let want: Vec<_> = (0..3).chain(0..20u8).map(|i| vec![i]).collect();
    assert_eq!(got, want);
}

#[test]
fn what_the_kernel_would_forward_is_protected_all_the_same() {
    let mut bed = tapped();
    let snapshot = bed.left.gw.store.current();
    let mut routes = snapshot.fib.routes().to_vec();
    for route in &mut routes {
        if route.addr == ip("10.2.0.0") {
            route.to = RouteTo::Local;
        }
    }
    bed.set_left_routes(&routes);
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, b"secret")]);
    assert_eq!(bed.settle().1.len(), 1, "{:?}", bed.dropped(true));
    assert!(bed.kernel_got(INSIDE).is_empty());
    assert_eq!(bed.wire[0][23], 50);
}
