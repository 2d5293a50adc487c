//! Packets that wait for a neighbour.

use std::net::Ipv6Addr;

use sa_store::drops::DropReason::*;
use sa_store::report::Report;

use super::common::{Plan, bed, ip, payload_of, udp};
use super::reports;

#[test]
fn packets_wait_for_their_neighbour_and_go_out_in_order() {
    let mut bed = bed(&Plan::default());
    bed.forget_left_peer();
    let sent: Vec<_> = (0..10u8)
        .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &[i]))
        .collect();
    bed.send_left(&sent);
    bed.settle_left();
    assert!(bed.wire.is_empty() && bed.dropped(true).is_empty());
    let waiting = bed.left.count(|c| c.waiting.value());
    assert_eq!(waiting, 10);
    let addr = ip("192.0.2.2");
    assert_eq!(
        reports(&mut bed),
        [Report::Unresolved { port: 1, addr }],
        "asked once"
    );
    let snapshot = bed.left.gw.store.current();
    let n = snapshot.fib.neighbours();
    n.learn(n.find(1, addr).unwrap(), [2, 0, 0, 0, 1, 0]);
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &[10])]);
    let (_, r) = bed.settle();
    let got: Vec<_> = r.iter().map(|f| payload_of(f)[0]).collect();
    assert_eq!(got, (0..11).collect::<Vec<u8>>());
}

#[test]
fn only_so_many_packets_wait_for_one_neighbour() {
    let mut bed = bed(&Plan::default());
    bed.forget_left_peer();
    bed.send_left(&vec![udp("10.1.0.1", "10.2.0.1", 64, b"x"); 100]);
    bed.settle_left();
    assert_eq!(bed.dropped(true), [(NoNeighbour, 68)]);
    bed.give_up_neighbours();
    bed.settle();
    assert_eq!(bed.dropped(true), [(NoNeighbour, 100)]);
}

#[test]
fn a_host_that_cannot_be_found_is_reported_unreachable_through_the_tunnel() {
    let mut bed = bed(&Plan::default());
    let snapshot = bed.right.gw.store.current();
    let n = snapshot.fib.neighbours();
    n.forget(n.find(0, ip("10.2.0.1")).unwrap());
    bed.send_left(&[udp("10.1.0.1", "10.2.0.9", 64, b"x")]);
    bed.settle_holding();
    std::thread::sleep(std::time::Duration::from_millis(1050));
    let (l, _) = bed.settle();
    bed.expect(&l, 1);
    assert_eq!((l[0][34], l[0][35]), (3, 1), "host unreachable");
    let from = Ipv6Addr::from(u128::from(u32::from_be_bytes(
        l[0][26..30].try_into().unwrap(),
    )));
    assert_ne!(from, Ipv6Addr::UNSPECIFIED);
    assert_eq!(bed.dropped(false), [(NoNeighbour, 1)]);
}
