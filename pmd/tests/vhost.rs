//! A vhost-user port against a peer that speaks the protocol from the other side: whole messages over a socket, rings and
//! frames in a memfd. And against one that means harm.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes of a test's own layout"
)]

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use pmd::arena::ArenaConfig;
use pmd::nic::NicControl;
use pmd::port::Port;
use pmd::virtio::ring::{Areas, Buffer, DriverRing, Format, RingOptions, area_sizes};
use pmd::virtio::vhost::memory::{PeerMemory, RegionSpec};
use pmd::virtio::vhost::{Place, Role, VhostConfig, VhostPort};
use pmd::virtio::{NET_HEADER, feature};
use pmd::{Arena, Frame, Pool, PortQueue};

const SIZE: u16 = 64;
const MEMORY: u64 = 4 << 20;
/// Where the peer says that its memory is: not where anybody's is.
const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x7000_0000_0000;
/// Where packets lie, behind the rings.
const PACKETS: u64 = 1 << 20;
const SLOT: u64 = 2048;

/// What the gateway has: the port's queues, and frames.
struct Gateway {
    queues: Vec<Box<dyn PortQueue>>,
    control: Arc<dyn NicControl>,
    arena: Arc<Arena>,
    pool: Pool,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Gateway {
    fn new(pairs: usize) -> Gateway {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vhost.sock");
        let arena = Arena::new(ArenaConfig {
            frames: 512,
            ..ArenaConfig::default()
        })
        .unwrap();
        let port = VhostPort::open(VhostConfig {
            name: "v".into(),
            place: Place {
                path: socket.clone(),
                role: Role::Server,
            },
            mode: 0o600,
            mtu: 1500,
        })
        .unwrap();
        let control = port.control().unwrap();
        let queues = Box::new(port).queues(pairs, &arena).unwrap();
        let pool = Pool::new(&arena, 64);
        Gateway {
            queues,
            control,
            arena,
            pool,
            socket,
            _dir: dir,
        }
    }

    fn error(&self, name: &str) -> u64 {
        let all = self.control.device_errors();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn receive(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.queues[queue].rx_burst(&mut self.pool, &mut frames, 64);
        let got = frames.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut frames);
        got
    }

    fn frame(&mut self, bytes: &[u8]) -> Frame {
        let mut frame = self.pool.get().unwrap();
        assert!(frame.set_data(bytes));
        frame
    }

    fn send(&mut self, queue: usize, packets: &[Vec<u8>]) -> usize {
        let mut frames: Vec<Frame> = packets.iter().map(|p| self.frame(p)).collect();
        let n = self.queues[queue].tx_burst(&mut self.pool, &mut frames);
        self.pool.put_bulk(&mut frames);
        n
    }

    /// All frames are accounted for once the queues are gone.
    fn close(mut self) {
        for q in &mut self.queues {
            q.drain(&mut self.pool);
        }
        self.queues.clear();
        assert_eq!(self.arena.outstanding(), 0);
        assert!(!self.socket.exists(), "the socket stays behind");
    }
}

/// A peer: the driver's side.
struct Peer {
    stream: UnixStream,
    file: File,
    memory: Arc<PeerMemory>,
    rings: Vec<DriverRing>,
    features: u64,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("peer", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()
}

fn spec() -> RegionSpec {
    RegionSpec {
        guest: GUEST,
        size: MEMORY,
        user: USER,
        offset: 0,
    }
}

fn message(number: u32, payload: &[u8]) -> Vec<u8> {
    let words = [number, 1, payload.len() as u32];
    let mut all: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    all.extend(payload);
    all
}

fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn state(ring: usize, value: u32) -> Vec<u8> {
    words(&[ring as u64 | u64::from(value) << 32])
}

fn transmit(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let n = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    assert!(n.is_ok_and(|n| n == bytes.len()));
}

impl Peer {
    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    fn ask(stream: &UnixStream, number: u32, payload: &[u8]) -> u64 {
        transmit(stream, &message(number, payload), &[]);
        let mut answer = [0; 20];
        (&*stream).read_exact(&mut answer).unwrap();
        assert_eq!(answer[..4], number.to_le_bytes());
        assert_eq!(answer[4..8], 5u32.to_le_bytes());
        u64::from_le_bytes(answer[12..].try_into().unwrap())
    }

    /// Sets up all rings, as a guest's driver does.
    fn attach(gateway: &Gateway, format: Format, more: u64, pairs: usize) -> Peer {
        let stream = Peer::connect(&gateway.socket);
        let offered = Peer::ask(&stream, 1, &[]);
        let packed = if format == Format::Packed {
            feature::RING_PACKED
        } else {
            0
        };
        let features = feature::VERSION_1 | feature::VHOST_PROTOCOL_FEATURES | packed | more;
        assert_eq!(features & !offered, 0);
        let protocol = Peer::ask(&stream, 15, &[]);
        transmit(&stream, &message(16, &words(&[protocol])), &[]);
        assert!(Peer::ask(&stream, 17, &[]) as usize >= pairs);
        transmit(&stream, &message(3, &[]), &[]);
        transmit(&stream, &message(2, &words(&[features])), &[]);
        let file = memfd(MEMORY);
        let table = words(&[1, GUEST, MEMORY, USER, 0]);
        transmit(&stream, &message(5, &table), &[file.as_raw_fd()]);
        let own = file.as_fd().try_clone_to_owned().unwrap();
        let memory = PeerMemory::map(vec![(spec(), own)]).unwrap();
        let mut peer = Peer {
            stream,
            file,
            memory,
            rings: Vec::new(),
            features,
            kicks: Vec::new(),
            calls: Vec::new(),
        };
        for ring in 0..2 * pairs {
            peer.start(ring, format);
        }
        // An answer says that all before it was done.
        Peer::ask(&peer.stream, 1, &[]);
        peer
    }

    fn start(&mut self, ring: usize, format: Format) {
        let at = ring as u64 * 0x1_0000;
        let [d, a, u] = area_sizes(format, SIZE);
        let places = [USER + at, USER + at + 0x4000, USER + at + 0x8000];
        let area = |i: usize, len| self.memory.ring_area(places[i], len, 16).unwrap();
        let areas = Areas {
            descriptors: area(0, d),
            driver: area(1, a),
            device: area(2, u),
        };
        let options = RingOptions {
            format,
            event_idx: self.features & feature::EVENT_IDX != 0,
            indirect: self.features & feature::INDIRECT_DESC != 0,
        };
        self.rings
            .push(DriverRing::new(options, areas, SIZE).unwrap());
        let base = if format == Format::Packed { 0x8000 } else { 0 };
        let (kick, call) = (eventfd(), eventfd());
        let send = |number, payload: &[u8], fds: &[RawFd]| {
            transmit(&self.stream, &message(number, payload), fds);
        };
        send(8, &state(ring, SIZE.into()), &[]);
        send(10, &state(ring, base), &[]);
        send(
            9,
            &words(&[ring as u64, places[0], places[2], places[1], 0]),
            &[],
        );
        send(12, &words(&[ring as u64]), &[kick.as_fd().as_raw_fd()]);
        send(13, &words(&[ring as u64]), &[call.as_fd().as_raw_fd()]);
        send(18, &state(ring, 1), &[]);
        self.kicks.push(kick);
        self.calls.push(call);
    }

    /// Where the packet of buffer `id` of a ring lies.
    fn slot(ring: usize, id: u16) -> u64 {
        GUEST + PACKETS + (ring as u64 * u64::from(SIZE) + u64::from(id)) * SLOT
    }

    fn send(&mut self, ring: usize, packets: &[Vec<u8>]) {
        let r = &mut self.rings[ring];
        while let Some((_, written)) = r.take_used().unwrap() {
            assert_eq!(written, 0);
        }
        for packet in packets {
            let addr = Peer::slot(ring, r.next_id().unwrap());
            assert!(self.memory.write(addr, &[0; NET_HEADER]));
            assert!(self.memory.write(addr + NET_HEADER as u64, packet));
            let len = (packet.len() + NET_HEADER) as u32;
            r.add(Buffer {
                addr,
                len,
                writable: false,
            })
            .unwrap();
        }
        r.publish();
        if r.wants_kick() {
            self.kicks[ring].write(1).unwrap();
        }
    }

    /// Gives the gateway buffers of `len` bytes to send into.
    fn offer(&mut self, ring: usize, n: usize, len: u32) {
        let r = &mut self.rings[ring];
        for _ in 0..n {
            let Some(id) = r.next_id() else { break };
            r.add(Buffer {
                addr: Peer::slot(ring, id),
                len,
                writable: true,
            })
            .unwrap();
        }
        r.publish();
    }

    /// Packets that came, put together from as many buffers as the header says.
    fn receive(&mut self, ring: usize) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        while let Some(mut packet) = self.buffer(ring) {
            let header: Vec<u8> = packet.drain(..NET_HEADER).collect();
            assert_eq!(header[..10], [0; 10]);
            for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
                packet.extend(self.buffer(ring).unwrap());
            }
            packets.push(packet);
        }
        packets
    }

    fn buffer(&mut self, ring: usize) -> Option<Vec<u8>> {
        let (id, written) = self.rings[ring].take_used().unwrap()?;
        let mut bytes = vec![0; written as usize];
        assert!(self.memory.read(Peer::slot(ring, id), &mut bytes));
        Some(bytes)
    }
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
