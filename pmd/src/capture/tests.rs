use super::*;
use crate::arena::{Arena, ArenaConfig};
use crate::capture_file::CaptureFile;
use crate::memory::{MemoryQueue, PairConfig, pair};
use pcap_file::pcapng::{Block, PcapNgReader};

/// A file in memory that the test can read while the writer has it.
#[derive(Clone, Default)]
struct Shelf(Arc<Mutex<Vec<u8>>>);

impl Write for Shelf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bed {
    arena: Arc<Arena>,
    pool: Pool,
    capture: Capture,
    near: CaptureQueue,
    far: MemoryQueue,
}

fn bed(ring: usize, ring_bytes: usize) -> Bed {
    let arena = Arena::new(ArenaConfig {
        frames: 1024,
        ..ArenaConfig::default()
    })
    .unwrap();
    let config = PairConfig {
        ring,
        ..PairConfig::default()
    };
    let (a, b) = pair("wan", "peer", &config);
    let capture = Capture::new(ring_bytes);
    let near = a.open(1, &arena).unwrap().remove(0);
    Bed {
        near: capture.wrap(Box::new(near), "wan"),
        far: b.open(1, &arena).unwrap().remove(0),
        pool: Pool::new(&arena, 32),
        arena,
        capture,
    }
}

impl Bed {
    fn frames(&mut self, marks: std::ops::Range<u8>, len: usize) -> Vec<Frame> {
        marks
            .map(|i| {
                let mut f = self.pool.get().unwrap();
                assert!(f.set_data(&vec![i; len]));
                f
            })
            .collect()
    }

    /// Sends marked frames from the far end and receives them through the capture point.
    fn receive(&mut self, marks: std::ops::Range<u8>) {
        let mut frames = self.frames(marks, 100);
        self.far.tx_burst(&mut self.pool, &mut frames);
        assert!(frames.is_empty());
        self.near.rx_burst(&mut self.pool, &mut frames, 64);
        self.pool.put_bulk(&mut frames);
    }
}

#[test]
fn what_passes_while_it_is_on_is_in_the_file_with_port_and_direction() {
    let mut bed = bed(64, 1 << 20);
    let shelf = Shelf::default();
    bed.receive(0..5);
    let options = CaptureOptions {
        snap_len: 60,
        ..CaptureOptions::default()
    };
    bed.capture.start(shelf.clone(), &options).unwrap();
    assert!(bed.capture.is_running());
    bed.receive(5..8);
    let mut frames = bed.frames(20..22, 40);
    bed.near.tx_burst(&mut bed.pool, &mut frames);
    let summary = bed.capture.stop().unwrap();
    bed.receive(30..40);
    assert_eq!(
        summary,
        CaptureSummary {
            written: 5,
            missed: 0
        }
    );

    let bytes = lock(&shelf.0).clone();
    let packets = CaptureFile::parse(bytes.clone()).unwrap();
    let seen: Vec<_> = packets.iter().map(|p| (p[0], p.len())).collect();
    assert_eq!(seen, [(5, 60), (6, 60), (7, 60), (20, 40), (21, 40)]);
    let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
    let (mut flags, mut lens) = (Vec::new(), Vec::new());
    while let Some(block) = reader.next_block() {
        match block.unwrap() {
            Block::EnhancedPacket(p) => {
                lens.push(p.original_len);
                assert!(p.timestamp > Duration::from_secs(1_500_000_000));
                flags.extend(p.options.into_iter().map(|o| match o {
                    EnhancedPacketOption::Flags(f) => f,
                    other => panic!("{other:?}"),
                }));
            }
            Block::InterfaceDescription(i) => assert!(i.options.iter().any(|o| matches!(o,
                InterfaceDescriptionOption::IfName(n) if n == "wan"))),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        (flags, lens),
        (vec![1, 1, 1, 2, 2], vec![100, 100, 100, 40, 40])
    );
    let mut rest = Vec::new();
    bed.far.rx_burst(&mut bed.pool, &mut rest, 64);
    bed.pool.put_bulk(&mut rest);
    assert_eq!(bed.arena.outstanding(), 0);
}

#[test]
fn a_frame_that_waits_for_room_is_captured_once() {
    let mut bed = bed(4, 1 << 20);
    let shelf = Shelf::default();
    bed.capture
        .start(shelf.clone(), &CaptureOptions::default())
        .unwrap();
    let mut frames = bed.frames(0..10, 60);
    let mut got = Vec::new();
    while !frames.is_empty() {
        bed.near.tx_burst(&mut bed.pool, &mut frames);
        bed.far.rx_burst(&mut bed.pool, &mut got, 2);
    }
    while bed.far.rx_burst(&mut bed.pool, &mut got, 64) > 0 {}
    bed.pool.put_bulk(&mut got);
    assert_eq!(bed.capture.stop().unwrap().written, 10);
    let bytes = lock(&shelf.0).clone();
    let packets = CaptureFile::parse(bytes).unwrap();
    let marks: Vec<u8> = packets.iter().map(|p| p[0]).collect();
    assert_eq!(marks, (0..10).collect::<Vec<u8>>());
}

#[test]
fn a_capture_ends_by_itself_at_the_wanted_number_and_another_may_follow() {
    let mut bed = bed(64, 1 << 20);
    let shelf = Shelf::default();
    let options = CaptureOptions {
        packets: Some(3),
        ..CaptureOptions::default()
    };
    bed.capture.start(shelf, &options).unwrap();
    assert!(matches!(
        bed.capture.start(Shelf::default(), &options),
        Err(CaptureError::Running)
    ));
    bed.receive(0..10);
    while bed.capture.is_running() {
        std::thread::sleep(PAUSE);
    }
    assert_eq!(bed.capture.stop().unwrap().written, 3);
    assert!(matches!(bed.capture.stop(), Err(CaptureError::NotRunning)));
    // What the first capture left in the ring is not in the second.
    let shelf = Shelf::default();
    let all = CaptureOptions::default();
    bed.capture.start(shelf.clone(), &all).unwrap();
    bed.receive(50..52);
    assert_eq!(bed.capture.stop().unwrap().written, 2);
    let bytes = lock(&shelf.0).clone();
    assert_eq!(
        CaptureFile::parse(bytes).unwrap().packet(0),
        Some(&[50; 100][..])
    );
}

#[test]
fn what_finds_no_room_is_counted_and_a_broken_file_is_told() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut bed = bed(256, 1 << 17);
    bed.capture.start(Full, &CaptureOptions::default()).unwrap();
    bed.receive(0..1);
    while bed.capture.is_running() {
        std::thread::sleep(PAUSE);
    }
    assert!(matches!(bed.capture.stop(), Err(CaptureError::Write(_))));

    let unknown = CaptureOptions {
        ports: vec!["lan".into()],
        ..CaptureOptions::default()
    };
    assert!(matches!(
        bed.capture.start(Full, &unknown),
        Err(CaptureError::UnknownPort(p)) if p == "lan"
    ));

    // Hold the writer back by keeping its rings from it.
    let shelf = Shelf::default();
    bed.capture
        .start(shelf, &CaptureOptions::default())
        .unwrap();
    let lanes = Arc::clone(&bed.capture.shared);
    let held = lock(&lanes.lanes);
    for _ in 0..20 {
        bed.receive(0..64);
    }
    drop(held);
    let summary = bed.capture.stop().unwrap();
    assert!(summary.missed > 0, "{summary:?}");
    assert_eq!(summary.written + summary.missed, 20 * 64, "{summary:?}");
    bed.near.drain(&mut bed.pool);
    assert_eq!(bed.arena.outstanding(), 0);
}
