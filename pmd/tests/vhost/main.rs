//! A vhost-user port against a peer that speaks the protocol from the other side: whole messages over a socket, rings and
//! frames in a memfd. And against one that means harm.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes of a test's own layout"
)]

mod gateway;
mod hostile;
mod peer;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pmd::virtio::feature;
use pmd::virtio::ring::{Buffer, Format};
use pmd::virtio::vhost::{Place, Role, VhostConfig, VhostPort};

use gateway::Gateway;
use peer::{Peer, SLOT, message, state, transmit, words};

const KINDS: [(Format, u64); 6] = [
    (Format::Split, 0),
    (Format::Split, feature::EVENT_IDX),
    (Format::Split, feature::NET_MRG_RXBUF),
    (Format::Packed, 0),
    (Format::Packed, feature::EVENT_IDX),
    (
        Format::Packed,
        feature::NET_MRG_RXBUF | feature::INDIRECT_DESC,
    ),
];

#[test]
fn every_packet_crosses_unchanged_in_both_directions() {
    for (format, more) in KINDS {
        let mut gateway = Gateway::new(1);
        let mut peer = Peer::attach(&gateway, format, more, 1);
        // Rings go around several times.
        for round in 0..20 {
            let out = packets(40, round);
            peer.send(1, &out);
            assert_eq!(gateway.receive(0), out, "{format:?} {more:#x}");
            peer.offer(0, 40, SLOT as u32);
            assert_eq!(gateway.send(0, &out), 40);
            assert_eq!(peer.receive(0), out, "{format:?} {more:#x}");
        }
        let stats = gateway.queues[0].stats();
        assert_eq!(
            (stats.rx_packets.value(), stats.tx_packets.value()),
            (800, 800)
        );
        assert_eq!(stats.rx_errors.value() + stats.tx_errors.value(), 0);
        drop(peer);
        gateway.close();
    }
}

#[test]
fn a_large_packet_takes_several_buffers_and_waits_whole_when_they_are_missing() {
    for format in [Format::Split, Format::Packed] {
        let mut gateway = Gateway::new(1);
        let mut peer = Peer::attach(&gateway, format, feature::NET_MRG_RXBUF, 1);
        let large = vec![vec![7; 1514]];
        peer.offer(0, 2, 600);
        assert_eq!(gateway.send(0, &large), 0);
        assert!(peer.receive(0).is_empty());
        peer.offer(0, 1, 600);
        assert_eq!(gateway.send(0, &large), 1);
        assert_eq!(peer.receive(0), large);
        gateway.close();
    }
}

#[test]
fn a_packet_that_no_buffer_can_hold_is_dropped_and_counted() {
    let mut gateway = Gateway::new(1);
    let mut peer = Peer::attach(&gateway, Format::Split, 0, 1);
    peer.offer(0, 4, 600);
    let out = vec![vec![1; 60], vec![2; 1514], vec![3; 60]];
    assert_eq!(gateway.send(0, &out), 3);
    assert_eq!(peer.receive(0), [vec![1; 60], vec![3; 60]]);
    assert_eq!(gateway.queues[0].stats().tx_errors.value(), 1);
    gateway.close();
}

#[test]
fn nothing_is_sent_to_nobody_and_a_new_peer_goes_on_where_the_last_one_left() {
    let mut gateway = Gateway::new(1);
    assert_eq!(gateway.send(0, &packets(3, 0)), 3);
    assert_eq!(gateway.queues[0].stats().tx_errors.value(), 3);
    for format in [Format::Split, Format::Packed, Format::Split] {
        let mut peer = Peer::attach(&gateway, format, 0, 1);
        assert!(gateway.control.link().up);
        peer.send(1, &packets(10, 1));
        assert_eq!(gateway.receive(0).len(), 10);
        drop(peer);
        let control = Arc::clone(&gateway.control);
        until("the link goes down with the peer", || !control.link().up);
        assert!(gateway.receive(0).is_empty());
    }
    assert_eq!(gateway.error("protocol"), 0);
    gateway.close();
}

#[test]
fn a_stopped_ring_says_where_it_stands_and_goes_on_from_there() {
    for format in [Format::Split, Format::Packed] {
        let mut gateway = Gateway::new(1);
        let mut peer = Peer::attach(&gateway, format, 0, 1);
        peer.send(1, &packets(10, 0));
        assert_eq!(gateway.receive(0).len(), 10);
        let base = (Peer::ask(&peer.stream, 11, &state(1, 0)) >> 32) as u32;
        let expected = if format == Format::Packed {
            0x800a_800a
        } else {
            10
        };
        assert_eq!(base, expected);
        peer.send(1, &packets(5, 1));
        assert!(gateway.receive(0).is_empty());
        transmit(&peer.stream, &message(10, &state(1, base)), &[]);
        let kick = peer.kicks[1].as_fd().as_raw_fd();
        transmit(&peer.stream, &message(12, &words(&[1])), &[kick]);
        Peer::ask(&peer.stream, 1, &[]);
        assert_eq!(gateway.receive(0), packets(5, 1));
        gateway.close();
    }
}

#[test]
fn all_workers_send_to_a_peer_with_one_queue() {
    let mut gateway = Gateway::new(3);
    let mut peer = Peer::attach(&gateway, Format::Split, 0, 1);
    peer.offer(0, 60, SLOT as u32);
    for queue in 0..3 {
        assert_eq!(gateway.send(queue, &packets(5, queue)), 5);
    }
    assert_eq!(peer.receive(0).len(), 15);
    gateway.close();
}

#[test]
fn several_queues_stay_apart() {
    let mut gateway = Gateway::new(3);
    let mut peer = Peer::attach(&gateway, Format::Packed, feature::NET_MQ, 3);
    for pair in 0..3 {
        peer.send(2 * pair + 1, &packets(5, pair));
        peer.offer(2 * pair, 5, SLOT as u32);
    }
    for pair in 0..3 {
        assert_eq!(gateway.receive(pair), packets(5, pair));
        assert_eq!(gateway.send(pair, &packets(5, 7 + pair)), 5);
        assert_eq!(peer.receive(2 * pair), packets(5, 7 + pair));
    }
    gateway.close();
}

#[test]
fn a_sleeping_worker_is_woken_and_a_sleeping_peer_called() {
    for (format, more) in KINDS {
        let mut gateway = Gateway::new(1);
        let mut peer = Peer::attach(&gateway, format, more, 1);
        let wakes = |gateway: &Gateway, ms: u16| {
            let fd = gateway.queues[0].wait_fd().unwrap();
            let mut fds = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut fds, ms).unwrap() > 0
        };
        peer.send(1, &packets(1, 0));
        assert_eq!(gateway.receive(0).len(), 1);
        for round in 0..3 {
            gateway.queues[0].arm();
            assert!(!wakes(&gateway, 0), "{format:?} {more:#x} {round}");
            while peer.rings[1].take_used().unwrap().is_some() {}
            peer.rings[1].arm();
            peer.send(1, &packets(1, 0));
            assert!(wakes(&gateway, 1000), "{format:?} {more:#x} {round}");
            assert_eq!(gateway.receive(0).len(), 1);
            let call = &peer.calls[1];
            until("the peer is called", || call.read().is_ok());
        }
        peer.rings[1].disarm();
        peer.send(1, &packets(1, 0));
        assert_eq!(gateway.receive(0).len(), 1);
        std::thread::sleep(Duration::from_millis(20));
        assert!(peer.calls[1].read().is_err(), "a busy peer is not called");
        gateway.close();
    }
}

#[test]
fn an_offload_that_was_not_agreed_on_is_dropped_and_counted() {
    let mut gateway = Gateway::new(1);
    let mut peer = Peer::attach(&gateway, Format::Split, 0, 1);
    for flags in [[1u8, 0], [0, 1]] {
        let id = peer.rings[1].next_id().unwrap();
        let addr = Peer::slot(1, id);
        peer.memory.write(addr, &[0; 100]);
        peer.memory.write(addr, &flags);
        peer.rings[1]
            .add(Buffer {
                addr,
                len: 100,
                writable: false,
            })
            .unwrap();
        peer.rings[1].publish();
    }
    assert!(gateway.receive(0).is_empty());
    assert_eq!(gateway.error("offload_refused"), 2);
    gateway.close();
}

#[test]
fn bytes_that_come_one_by_one_make_messages_too() {
    let gateway = Gateway::new(1);
    let stream = Peer::connect(&gateway.socket);
    for byte in message(1, &[]) {
        (&stream).write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut answer = [0; 20];
    (&stream).read_exact(&mut answer).unwrap();
    drop(stream);
    gateway.close();
}

#[test]
fn a_second_server_is_refused_and_a_dead_socket_replaced() {
    let gateway = Gateway::new(1);
    let again = |path: &Path| {
        VhostPort::open(VhostConfig {
            name: "w".into(),
            place: Place {
                path: path.into(),
                role: Role::Server,
            },
            mode: 0o600,
            mtu: 1500,
        })
    };
    assert!(again(&gateway.socket).is_err());
    let dead = gateway.socket.with_extension("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    assert!(again(&dead).is_ok());
    let plain = gateway.socket.with_extension("txt");
    std::fs::write(&plain, "mine").unwrap();
    assert!(again(&plain).is_err());
    assert_eq!(std::fs::read_to_string(&plain).unwrap(), "mine");
    gateway.close();
}

fn packets(n: usize, seed: usize) -> Vec<Vec<u8>> {
    (0..n)
        .map(|i| {
            let len = 14 + (i * 131 + seed * 17) % 1501;
            (0..len).map(|b| (b + i + seed) as u8).collect()
        })
        .collect()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
