//! The other end: a driver that speaks the protocol over the socket, with rings and packets in a memfd.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use pmd::virtio::ring::{Areas, Buffer, DriverRing, Format, RingOptions, area_sizes};
use pmd::virtio::vhost::memory::{PeerMemory, RegionSpec};
use pmd::virtio::{NET_HEADER, feature};

use super::gateway::Gateway;

pub(super) const SIZE: u16 = 64;
pub(super) const MEMORY: u64 = 4 << 20;
/// Where the peer says that its memory is: not where anybody's is.
pub(super) const GUEST: u64 = 0x4000_0000;
pub(super) const USER: u64 = 0x7000_0000_0000;
/// Where packets lie, behind the rings.
pub(super) const PACKETS: u64 = 1 << 20;
pub(super) const SLOT: u64 = 2048;

/// A peer: the driver's side.
pub(super) struct Peer {
    pub(super) stream: UnixStream,
    pub(super) file: File,
    pub(super) memory: Arc<PeerMemory>,
    pub(super) rings: Vec<DriverRing>,
    pub(super) features: u64,
    pub(super) kicks: Vec<EventFd>,
    pub(super) calls: Vec<EventFd>,
}

impl Peer {
    pub(super) fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    pub(super) fn ask(stream: &UnixStream, number: u32, payload: &[u8]) -> u64 {
        transmit(stream, &message(number, payload), &[]);
        let mut answer = [0; 20];
        (&*stream).read_exact(&mut answer).unwrap();
        assert_eq!(answer[..4], number.to_le_bytes());
        assert_eq!(answer[4..8], 5u32.to_le_bytes());
        u64::from_le_bytes(answer[12..].try_into().unwrap())
    }

    /// Sets up all rings, as a guest's driver does.
    pub(super) fn attach(gateway: &Gateway, format: Format, more: u64, pairs: usize) -> Peer {
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

    pub(super) fn start(&mut self, ring: usize, format: Format) {
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
    pub(super) fn slot(ring: usize, id: u16) -> u64 {
        GUEST + PACKETS + (ring as u64 * u64::from(SIZE) + u64::from(id)) * SLOT
    }

    pub(super) fn send(&mut self, ring: usize, packets: &[Vec<u8>]) {
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
    pub(super) fn offer(&mut self, ring: usize, n: usize, len: u32) {
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
    pub(super) fn receive(&mut self, ring: usize) -> Vec<Vec<u8>> {
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

    pub(super) fn buffer(&mut self, ring: usize) -> Option<Vec<u8>> {
        let (id, written) = self.rings[ring].take_used().unwrap()?;
        let mut bytes = vec![0; written as usize];
        assert!(self.memory.read(Peer::slot(ring, id), &mut bytes));
        Some(bytes)
    }
}

pub(super) fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("peer", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

pub(super) fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()
}

pub(super) fn spec() -> RegionSpec {
    RegionSpec {
        guest: GUEST,
        size: MEMORY,
        user: USER,
        offset: 0,
    }
}

pub(super) fn message(number: u32, payload: &[u8]) -> Vec<u8> {
    let words = [number, 1, payload.len() as u32];
    let mut all: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    all.extend(payload);
    all
}

pub(super) fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub(super) fn state(ring: usize, value: u32) -> Vec<u8> {
    words(&[ring as u64 | u64::from(value) << 32])
}

pub(super) fn transmit(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
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
