//! Peers that mean harm: they lose their own session, and nobody else anything.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use pmd::virtio::feature;
use pmd::virtio::ring::{Buffer, Format};

use super::gateway::Gateway;
use super::peer::{
    GUEST, MEMORY, PACKETS, Peer, SIZE, SLOT, USER, eventfd, memfd, message, state, transmit, words,
};
use super::{packets, until};

/// Adds one buffer to ring 1 and looks what the gateway says.
fn hostile_buffer(format: Format, buffer: Buffer) -> (u64, u64) {
    let mut gateway = Gateway::new(1);
    let mut peer = Peer::attach(&gateway, format, 0, 1);
    peer.rings[1].add(buffer).unwrap();
    peer.rings[1].publish();
    assert!(gateway.receive(0).is_empty());
    let seen = (
        gateway.error("ring"),
        gateway.queues[0].stats().rx_errors.value(),
    );
    // The other direction still works.
    peer.offer(0, 1, SLOT as u32);
    assert_eq!(gateway.send(0, &packets(1, 0)), 1);
    gateway.close();
    seen
}

#[test]
fn a_buffer_outside_shared_memory_stops_the_ring() {
    for format in [Format::Split, Format::Packed] {
        for addr in [
            0,
            GUEST - 1,
            GUEST + MEMORY - 50,
            GUEST + MEMORY,
            u64::MAX - 50,
            u64::MAX,
        ] {
            let buffer = Buffer {
                addr,
                len: 100,
                writable: false,
            };
            assert_eq!(hostile_buffer(format, buffer), (1, 1), "{addr:#x}");
        }
        let wrong_way = Buffer {
            addr: GUEST + PACKETS,
            len: 100,
            writable: true,
        };
        assert_eq!(hostile_buffer(format, wrong_way), (1, 1));
        for len in [0, 12, 25, 12 + 1519, u32::MAX] {
            let buffer = Buffer {
                addr: GUEST + PACKETS,
                len,
                writable: false,
            };
            assert_eq!(hostile_buffer(format, buffer), (0, 1), "{len}");
        }
    }
}

#[test]
fn an_index_that_jumps_stops_the_ring() {
    let mut gateway = Gateway::new(1);
    let peer = Peer::attach(&gateway, Format::Split, 0, 1);
    let driver = peer.memory.ring_area(USER + 0x1_4000, 200, 2).unwrap();
    driver.store_release16(2, SIZE + 1);
    assert!(gateway.receive(0).is_empty());
    assert_eq!(gateway.error("ring"), 1);
    assert!(gateway.receive(0).is_empty());
    assert_eq!(gateway.error("ring"), 1);
    gateway.close();
}

#[test]
fn memory_that_is_taken_away_ends_the_session_and_nothing_else() {
    for format in [Format::Split, Format::Packed] {
        let mut gateway = Gateway::new(1);
        let mut peer = Peer::attach(&gateway, format, 0, 1);
        peer.send(1, &packets(40, 0));
        peer.offer(0, 40, SLOT as u32);
        // Packets and rings are gone; every access now is a SIGBUS.
        peer.file.set_len(0).unwrap();
        gateway.receive(0);
        gateway.send(0, &packets(20, 1));
        let mut eof = [0; 1];
        assert_eq!((&peer.stream).read(&mut eof).unwrap(), 0);
        until("the loss is counted", || gateway.error("memory_lost") == 1);
        drop(peer);
        let mut peer = Peer::attach(&gateway, format, 0, 1);
        peer.send(1, &packets(10, 2));
        assert_eq!(gateway.receive(0), packets(10, 2));
        drop(peer);
        gateway.close();
    }
}

/// Sends bytes and files; whether the gateway ends the connection.
fn refused(gateway: &Gateway, bytes: &[u8], fds: &[RawFd]) -> bool {
    let before = gateway.error("protocol");
    let stream = Peer::connect(&gateway.socket);
    transmit(&stream, bytes, fds);
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
    until("the fault is counted", || {
        gateway.error("protocol") == before + 1
    });
    true
}

#[test]
fn messages_that_break_the_protocol_end_the_connection() {
    let gateway = Gateway::new(1);
    let file = memfd(1 << 16);
    let mem = file.as_raw_fd();
    let on_disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    on_disk.set_len(1 << 16).unwrap();
    let region = |guest: u64, size: u64, user: u64, offset: u64| {
        message(5, &words(&[1, guest, size, user, offset]))
    };
    let two = message(5, &words(&[2, 0, 8192, 0, 0, 4096, 8192, 8192, 0]));
    let features = |bits| message(2, &words(&[bits]));
    let cases: Vec<(&str, Vec<u8>, Vec<RawFd>)> = vec![
        ("an unknown request", message(99, &[]), vec![]),
        (
            "a wrong version",
            vec![1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            vec![],
        ),
        (
            "an answer",
            vec![1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0],
            vec![],
        ),
        (
            "an endless payload",
            vec![2, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255],
            vec![],
        ),
        ("a short payload", message(2, &[0; 7]), vec![]),
        ("a file that nobody asked for", message(1, &[]), vec![mem]),
        ("more files than fit", message(1, &[]), vec![mem; 9]),
        (
            "a feature that was not offered",
            features(1 | feature::VERSION_1),
            vec![],
        ),
        ("a device of the past", features(0), vec![]),
        ("no memory region", message(5, &words(&[0])), vec![]),
        ("a table without files", region(0, 4096, 0, 0), vec![]),
        (
            "more files than regions",
            region(0, 4096, 0, 0),
            vec![mem, mem],
        ),
        ("an empty region", region(0, 0, 0, 0), vec![mem]),
        (
            "a region beyond its file",
            region(0, 1 << 17, 0, 0),
            vec![mem],
        ),
        (
            "an offset beyond its file",
            region(0, 4096, 0, 1 << 16),
            vec![mem],
        ),
        (
            "an offset around the end",
            region(0, 4096, 0, u64::MAX - 1),
            vec![mem],
        ),
        (
            "a region around the end",
            region(u64::MAX - 100, 4096, 0, 0),
            vec![mem],
        ),
        ("regions over each other", two, vec![mem, mem]),
        (
            "memory that is a file on disk",
            region(0, 4096, 0, 0),
            vec![on_disk.as_raw_fd()],
        ),
        (
            "a ring that is not there",
            message(8, &state(2, 64)),
            vec![],
        ),
        ("a ring of no size", message(8, &state(0, 0)), vec![]),
        ("a ring too large", message(8, &state(0, 65536)), vec![]),
        (
            "logging",
            message(9, &words(&[1 << 32, 0, 0, 0, 0])),
            vec![],
        ),
        ("a kick without its file", message(12, &words(&[0])), vec![]),
        (
            "a kick that is no eventfd",
            message(12, &words(&[0])),
            vec![mem],
        ),
        (
            "a call that is no eventfd",
            message(13, &words(&[0])),
            vec![mem],
        ),
    ];
    for (what, bytes, fds) in cases {
        assert!(refused(&gateway, &bytes, &fds), "{what}");
    }
    gateway.close();
}

/// Describes ring 1 wrongly and starts it.
fn misplaced(format: u64, size: u32, base: u32, places: [u64; 3]) {
    let gateway = Gateway::new(1);
    let file = memfd(MEMORY);
    let (kick, stream) = (eventfd(), Peer::connect(&gateway.socket));
    let features = words(&[feature::VERSION_1 | format]);
    transmit(&stream, &message(2, &features), &[]);
    let table = words(&[1, GUEST, MEMORY, USER, 0]);
    transmit(&stream, &message(5, &table), &[file.as_raw_fd()]);
    transmit(&stream, &message(8, &state(1, size)), &[]);
    transmit(&stream, &message(10, &state(1, base)), &[]);
    let addr = words(&[1, places[0], places[1], places[2], 0]);
    transmit(&stream, &message(9, &addr), &[]);
    let fd = kick.as_fd().as_raw_fd();
    transmit(&stream, &message(12, &words(&[1])), &[fd]);
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
    until("the fault is counted", || gateway.error("protocol") == 1);
    gateway.close();
}

#[test]
fn a_ring_that_is_not_in_shared_memory_is_refused() {
    let good = [USER, USER + 0x4000, USER + 0x8000];
    misplaced(0, 63, 0, good);
    misplaced(feature::RING_PACKED, 64, 64, good);
    for bad in [0, USER - 16, USER + 8, USER + MEMORY - 64, u64::MAX - 15] {
        for which in 0..3 {
            let mut places = good;
            places[which] = if bad == USER + 8 { USER + 1 } else { bad };
            if which != 0 && bad == USER + MEMORY - 64 {
                places[which] = USER + MEMORY - 2;
            }
            misplaced(0, 64, 0, places);
        }
    }
}

#[test]
fn a_peer_that_fills_its_call_holds_up_no_worker() {
    let mut gateway = Gateway::new(1);
    let mut peer = Peer::attach(&gateway, Format::Split, 0, 1);
    // Blocking, and full: the next write to it waits for ever.
    let call = EventFd::from_flags(EfdFlags::empty()).unwrap();
    call.write(u64::MAX - 1).unwrap();
    let fd = call.as_fd().as_raw_fd();
    transmit(&peer.stream, &message(13, &words(&[1])), &[fd]);
    Peer::ask(&peer.stream, 1, &[]);
    peer.rings[1].arm();
    let started = Instant::now();
    for _ in 0..10 {
        peer.send(1, &packets(10, 0));
        assert_eq!(gateway.receive(0).len(), 10);
    }
    assert!(started.elapsed() < Duration::from_millis(500));
    for q in &mut gateway.queues {
        q.drain(&mut gateway.pool);
    }
    gateway.queues.clear();
    assert_eq!(gateway.arena.outstanding(), 0);
}
