//! The server against the driver's side of the gateway, and against clients that nobody would want.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use esplanade_model::{Bus, Model, Running, Server, Turn};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::device::{Device, DeviceError, IovaClass};
use pmd::{Arena, ArenaConfig, Pool};
use proptest::prelude::*;

/// Moves bytes: source at 0, destination at 8, their number at 16; then raises its interrupt.
#[derive(Default)]
struct Mover {
    registers: [u64; 3],
    due: bool,
    resets: Arc<AtomicU32>,
}

impl Model for Mover {
    fn name(&self) -> &'static str {
        "mover"
    }

    fn regions(&self) -> Vec<u64> {
        vec![4096, 64]
    }

    fn read(&mut self, bus: &mut Bus, region: usize, offset: usize, _: usize) -> u64 {
        match (region, self.registers.get(offset / 8)) {
            (0, Some(value)) => *value,
            (0, None) => bus.mapped_bytes(),
            _ => 0x5a,
        }
    }

    fn write(&mut self, _: &mut Bus, region: usize, offset: usize, _: usize, value: u64) {
        if let (0, Some(place)) = (region, self.registers.get_mut(offset / 8)) {
            *place = value;
            self.due |= offset == 16;
        }
    }

    fn turn(&mut self, bus: &mut Bus) -> Turn {
        if std::mem::take(&mut self.due) {
            let [from, to, len] = self.registers;
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            if bus.read(from, &mut bytes).is_ok() && bus.write(to, &bytes).is_ok() {
                bus.interrupt(0);
            }
        }
        Turn::Idle
    }

    fn reset(&mut self) {
        self.registers = [0; 3];
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    running: Running,
    path: PathBuf,
    resets: Arc<AtomicU32>,
    _dir: tempfile::TempDir,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mover");
    let mover = Mover::default();
    let resets = Arc::clone(&mover.resets);
    let running = Server::bind(&path).unwrap().spawn(Box::new(mover)).unwrap();
    Rig {
        running,
        path,
        resets,
        _dir: dir,
    }
}

fn until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(5), "timed out");
        std::thread::yield_now();
    }
}

#[test]
fn a_model_reaches_the_drivers_memory_and_nothing_else() {
    let rig = rig();
    let device = VfioUserDevice::connect(&rig.path).unwrap();
    let memory = device.dma_alloc(4096, 64, IovaClass::Below4G).unwrap();
    let arena = Arena::new(ArenaConfig {
        frames: 64,
        ..ArenaConfig::default()
    })
    .unwrap();
    let map = device.map_arena_in(&arena, IovaClass::Below4G).unwrap();
    let mut pool = Pool::new(&arena, 4);
    let mut frame = pool.get().unwrap();
    assert!(frame.set_data(b"Across the socket, from a frame."));
    let at = map.iova(&frame).unwrap();
    assert!(at < 1 << 32 && memory.iova() < 1 << 32);
    let fds = device.enable_msix(1).unwrap();
    let registers = device.region(0).unwrap();
    assert_eq!(device.region(1).unwrap().read8(3), 0x5a);
    assert!(device.region(2).is_err() && device.pci().is_none());
    for (from, to, n) in [
        (at, memory.iova() + 65, 31),
        (memory.iova() + 65, at + 1, 7),
    ] {
        registers.write64(0, from);
        registers.write64(8, to);
        registers.write64(16, n);
        let mut count = [0; 8];
        until(|| nix::unistd::read(fds[0].as_fd(), &mut count).is_ok());
    }
    let mut copy = [0; 31];
    memory.read_bytes(65, &mut copy);
    assert_eq!(&copy, b"Across the socket, from a frame");
    assert_eq!(&frame.data()[..9], b"AAcross h");
    pool.put(frame);
    assert_eq!(rig.running.log().count(), 0);

    // Behind the end of the map, and where nothing is.
    let bytes = registers.read64(24);
    registers.write64(0, memory.iova());
    for to in [0, memory.iova() + bytes, u64::MAX - 3] {
        registers.write64(8, to);
        registers.write64(16, 8);
        until(|| rig.running.log().count() != 0);
        let broken = rig.running.log().take();
        assert_eq!(broken[0].rule, "an address that is mapped for the access");
    }
    drop((memory, registers));
    drop(device);
    until(|| rig.resets.load(Ordering::Relaxed) >= 3);
    // The next driver finds nothing of the last one's.
    let device = VfioUserDevice::connect(&rig.path).unwrap();
    assert_eq!(device.region(0).unwrap().read64(24), 0);
}

#[test]
fn one_socket_has_one_server() {
    let rig = rig();
    assert!(Server::bind(&rig.path).is_err());
    let path = rig.path.clone();
    drop(rig.running);
    assert!(!path.exists());
    std::fs::write(&path, "no socket").unwrap();
    assert!(Server::bind(&path).is_err());
    std::fs::remove_file(&path).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(Server::bind(&path).is_ok());
    assert!(matches!(
        VfioUserDevice::connect(&path),
        Err(DeviceError::System { .. })
    ));
}

fn ask(stream: &mut UnixStream, command: u16, body: &[u8]) -> Option<(u32, Vec<u8>)> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut message = vec![7, 0];
    message.extend(command.to_ne_bytes());
    message.extend(size.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    stream.write_all(&message).ok()?;
    let mut head = [0; 16];
    stream.read_exact(&mut head).ok()?;
    let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
    let mut rest = vec![0; usize::try_from(word(4)).unwrap() - 16];
    stream.read_exact(&mut rest).ok()?;
    Some((word(12), rest))
}

#[test]
fn requests_that_break_the_protocol_are_refused() {
    let rig = rig();
    let mut stream = UnixStream::connect(&rig.path).unwrap();
    assert_eq!(ask(&mut stream, 4, &[0; 16]).unwrap().0, 71, "no handshake");
    assert_eq!(
        ask(&mut stream, 1, b"\x01\0\0\0").unwrap().0,
        95,
        "version 1"
    );
    assert_eq!(ask(&mut stream, 1, b"\0\0\x01\0").unwrap().0, 0);
    let access = |offset: u64, region: u32, size: u32| {
        let mut body = offset.to_ne_bytes().to_vec();
        body.extend(region.to_ne_bytes());
        body.extend(size.to_ne_bytes());
        body
    };
    for (offset, region, size) in [
        (4096, 0, 4),
        (4094, 0, 4),
        (2, 0, 4),
        (0, 2, 4),
        (0, 0, 3),
        (0, 0, 0),
        (u64::MAX, 0, 8),
        (0, u32::MAX, 4),
    ] {
        let answer = ask(&mut stream, 9, &access(offset, region, size)).unwrap();
        assert_eq!(answer.0, 22, "{offset} {region} {size}");
    }
    let mut write = access(0, 0, 8);
    write.extend([1; 7]);
    assert_eq!(ask(&mut stream, 10, &write).unwrap().0, 22);
    for command in [0, 6, 11, 12, 14, u16::MAX] {
        assert_eq!(ask(&mut stream, command, &[0; 64]).unwrap().0, 95);
    }
    // A map without a file, and one that is not there.
    assert_ne!(ask(&mut stream, 2, &[0; 32]).unwrap().0, 0);
    assert_eq!(ask(&mut stream, 3, &[0; 24]).unwrap().0, 22);
    assert_eq!(ask(&mut stream, 8, &[0xff; 20]).unwrap().0, 22);
    // A reply instead of a request ends the connection, not the server.
    stream
        .write_all(&[0, 0, 1, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    VfioUserDevice::connect(&rig.path).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_client_can_stop_the_server(
        messages in prop::collection::vec((0u16..15, prop::collection::vec(any::<u8>(), 0..64)), 1..20),
        noise in prop::collection::vec(any::<u8>(), 16..64),
    ) {
        let rig = rig();
        let mut stream = UnixStream::connect(&rig.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = ask(&mut stream, 1, b"\0\0\x01\0");
        for (command, body) in &messages {
            prop_assert!(ask(&mut stream, *command, body).is_some());
        }
        let _ = stream.write_all(&noise);
        drop(stream);
        let device = VfioUserDevice::connect(&rig.path).unwrap();
        prop_assert_eq!(device.region(1).unwrap().read8(0), 0x5a);
    }
}
