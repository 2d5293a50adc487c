//! A port whose received packets come from a capture file and whose sent packets go to another.
//!
//! Made for offline use: the input is read as fast as the gateway takes it, and the time stamps of the output come from a
//! [`Clock`] that may be a counter, so that the same input gives the same output, byte by byte.
//!
//! With several queues the input is spread by IP addresses, so that one flow stays with one queue, and in order; the queues
//! then share the output file under a lock taken once a burst. This port copies, and calls the system when its buffer is full.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use pcap_file::pcap::PcapHeader;
use pcap_file::{DataLink, Endianness, TsResolution};

use crate::arena::Arena;
use crate::capture_file::CaptureFile;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, PortQueueStats, check_queues};

/// How often the input is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repeat {
    /// Once; then the port is finished.
    #[default]
    Once,
    /// This many times; then the port is finished.
    Times(u64),
    /// For ever.
    Forever,
}

/// Where the time stamps of the output come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// A counter: the first packet has `start`, each further one `step` more. Independent of when the program runs.
    Counter {
        /// Time of the first packet, since 1970.
        start: Duration,
        /// Time between packets.
        step: Duration,
    },
    /// The system's clock, read once a burst.
    System,
}

impl Default for Clock {
    fn default() -> Self {
        Clock::Counter {
            start: Duration::ZERO,
            step: Duration::from_micros(1),
        }
    }
}

/// What a capture-file port looks like.
#[derive(Debug, Clone)]
pub struct PcapConfig {
    /// Name of the port.
    pub name: String,
    /// File to receive from; none: nothing is ever received.
    pub read: Option<PathBuf>,
    /// File to write what is sent to (overwritten); none: what is sent is only counted.
    pub write: Option<PathBuf>,
    /// How often the input is read.
    pub repeat: Repeat,
    /// Time stamps of the output.
    pub clock: Clock,
    /// Ethernet address that the port announces.
    pub mac: MacAddr,
    /// Largest IP packet that the port announces, in bytes.
    pub mtu: u32,
}

impl Default for PcapConfig {
    fn default() -> Self {
        PcapConfig {
            name: "pcap".into(),
            read: None,
            write: None,
            repeat: Repeat::Once,
            clock: Clock::default(),
            mac: MacAddr([0x02, 0, 0, 0, 0, 0x0c]),
            mtu: 1500,
        }
    }
}

/// A capture-file port.
#[derive(Debug)]
pub struct PcapPort {
    config: PcapConfig,
    input: Option<Arc<CaptureFile>>,
    output: Option<Arc<Mutex<Output>>>,
}

/// One queue pair of a [`PcapPort`].
#[derive(Debug)]
pub struct PcapQueue {
    input: Option<Arc<CaptureFile>>,
    /// Numbers of this queue's packets in the input.
    mine: Vec<usize>,
    next: usize,
    /// Rounds through the input still to do, this one included; `None` is for ever.
    rounds: Option<u64>,
    output: Option<Arc<Mutex<Output>>>,
    stats: Arc<PortQueueStats>,
}

#[derive(Debug)]
struct Output {
    file: BufWriter<File>,
    clock: Clock,
    path: String,
    /// Time stamp of the next packet.
    now: Duration,
    failed: bool,
}

const FILE_HEADER: PcapHeader = PcapHeader {
    version_major: 2,
    version_minor: 4,
    ts_correction: 0,
    ts_accuracy: 0,
    // The longest that other tools write.
    snaplen: 262_144,
    datalink: DataLink::ETHERNET,
    ts_resolution: TsResolution::NanoSecond,
    endianness: Endianness::Little,
};
const MAX_QUEUES: usize = 64;

impl PcapPort {
    /// Reads and checks the input file and creates the output file.
    ///
    /// # Errors
    /// `PortError::Capture` with the place and the rule broken, or the system's answer.
    pub fn open(config: PcapConfig) -> Result<PcapPort, PortError> {
        let input = config
            .read
            .as_deref()
            .map(CaptureFile::open)
            .transpose()?
            .map(Arc::new);
        let output = match &config.write {
            Some(path) => {
                let failed = |reason: String| PortError::Capture {
                    path: path.display().to_string(),
                    reason,
                };
                let mut file = File::create(path)
                    .map(|f| BufWriter::with_capacity(1 << 18, f))
                    .map_err(|e| failed(e.to_string()))?;
                FILE_HEADER
                    .write_to(&mut file)
                    .map_err(|e| failed(e.to_string()))?;
                Some(Arc::new(Mutex::new(Output {
                    file,
                    clock: config.clock,
                    path: path.display().to_string(),
                    now: match config.clock {
                        Clock::Counter { start, .. } => start,
                        Clock::System => Duration::ZERO,
                    },
                    failed: false,
                })))
            }
            None => None,
        };
        Ok(PcapPort {
            config,
            input,
            output,
        })
    }

    /// Packets in the input file.
    pub fn packets(&self) -> usize {
        self.input.as_ref().map_or(0, |i| i.len())
    }
}

impl Port for PcapPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.config.name.clone(),
            kind: "pcap",
            mac: self.config.mac,
            mtu: self.config.mtu,
            max_queues: MAX_QUEUES,
            mode: "file".into(),
        }
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        _arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        check_queues(&self.config.name, n, MAX_QUEUES)?;
        let mut mine = vec![Vec::new(); n];
        if let Some(input) = &self.input {
            for (number, packet) in input.iter().enumerate() {
                let queue = flow_hash(packet) as usize % n;
                if let Some(list) = mine.get_mut(queue) {
                    list.push(number);
                }
            }
        }
        let rounds = match self.config.repeat {
            Repeat::Once => Some(1),
            Repeat::Times(n) => Some(n),
            Repeat::Forever => None,
        };
        Ok(mine
            .into_iter()
            .map(|mine| {
                Box::new(PcapQueue {
                    input: self.input.clone(),
                    mine,
                    next: 0,
                    rounds,
                    output: self.output.clone(),
                    stats: Arc::default(),
                }) as Box<dyn PortQueue>
            })
            .collect())
    }
}

impl PortQueue for PcapQueue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let Some(input) = self.input.clone() else {
            return 0;
        };
        let (mut count, mut bytes) = (0, 0);
        while count < max && !self.finished() {
            let packet = self.mine.get(self.next).and_then(|&n| input.packet(n));
            if let Some(packet) = packet {
                let Some(mut frame) = pool.get() else {
                    break;
                };
                if frame.set_data(packet) {
                    count += 1;
                    bytes += packet.len();
                    out.push(frame);
                } else {
                    self.stats.rx_errors.add(1);
                    pool.put(frame);
                }
            }
            self.next += 1;
            if self.next >= self.mine.len() {
                self.next = 0;
                self.rounds = self.rounds.map(|r| r.saturating_sub(1));
            }
        }
        self.stats.note_rx(count, bytes);
        count
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        let n = frames.len();
        let mut output = self
            .output
            .as_ref()
            .map(|o| o.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(output) = &mut output {
            output.begin_burst();
        }
        let (mut sent, mut bytes) = (0, 0);
        for frame in frames.drain(..) {
            if output.as_mut().is_none_or(|o| o.write(frame.data())) {
                sent += 1;
                bytes += frame.len();
            }
            pool.put(frame);
        }
        self.stats.note_tx(sent, bytes);
        self.stats.tx_errors.add((n - sent) as u64);
        n
    }

    fn flush(&mut self, _pool: &mut Pool) {
        if let Some(output) = &self.output {
            output
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .flush();
        }
    }

    fn finished(&self) -> bool {
        self.mine.is_empty() || self.rounds == Some(0)
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    fn drain(&mut self, pool: &mut Pool) {
        self.rounds = Some(0);
        self.flush(pool);
    }
}

impl Output {
    fn begin_burst(&mut self) {
        if self.clock == Clock::System {
            self.now = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
        }
    }

    /// Writes one packet; false when the file cannot be written.
    fn write(&mut self, data: &[u8]) -> bool {
        if self.failed {
            return false;
        }
        let result = self.try_write(data);
        self.note(result);
        if let Clock::Counter { step, .. } = self.clock {
            self.now += step;
        }
        !self.failed
    }

    /// Record header (seconds, nanoseconds, captured and original length, as the file header says) and data.
    fn try_write(&mut self, data: &[u8]) -> io::Result<()> {
        let too_long = |_| io::ErrorKind::InvalidInput;
        let seconds = u32::try_from(self.now.as_secs()).map_err(too_long)?;
        let len = u32::try_from(data.len()).map_err(too_long)?;
        for word in [seconds, self.now.subsec_nanos(), len, len] {
            self.file.write_all(&word.to_le_bytes())?;
        }
        self.file.write_all(data)
    }

    fn flush(&mut self) {
        if !self.failed {
            let result = self.file.flush();
            self.note(result);
        }
    }

    /// Says once that the file cannot be written.
    fn note(&mut self, result: io::Result<()>) {
        if let Err(e) = result {
            self.failed = true;
            tracing::error!(file = %self.path, error = %e, "capture file cannot be written: sent packets are lost");
        }
    }
}

/// A hash of the IP addresses of a frame, the same in both directions; 0 for anything but IP.
fn flow_hash(frame: &[u8]) -> u32 {
    let (mut kind, mut at) = (frame.get(12..14), 14);
    while let Some([0x81, 0] | [0x88, 0xa8]) = kind {
        kind = frame.get(at + 2..at + 4);
        at += 4;
    }
    let addresses = match kind {
        Some([8, 0]) => frame.get(at + 12..at + 20),
        Some([0x86, 0xdd]) => frame.get(at + 8..at + 40),
        _ => None,
    };
    let Some((source, destination)) = addresses.map(|a| a.split_at(a.len() / 2)) else {
        return 0;
    };
    let hash = |bytes: &[u8]| {
        bytes.iter().fold(0x811c_9dc5_u32, |h, b| {
            (h ^ u32::from(*b)).wrapping_mul(0x0100_0193)
        })
    };
    let mixed = (hash(source) ^ hash(destination)).wrapping_mul(0x9e37_79b1);
    mixed >> 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;
    use crate::port::BURST;

    fn arena(frames: u32) -> Arc<Arena> {
        Arena::new(ArenaConfig {
            frames,
            ..ArenaConfig::default()
        })
        .unwrap()
    }

    fn ipv4(source: u8, destination: u8, mark: u8) -> Vec<u8> {
        let mut p = vec![0; 64];
        p[12..14].copy_from_slice(&[8, 0]);
        p[14] = 0x45;
        p[29] = source;
        p[33] = destination;
        p[63] = mark;
        p
    }

    fn write(path: &std::path::Path, packets: &[Vec<u8>], clock: Clock) {
        let port = PcapPort::open(PcapConfig {
            write: Some(path.into()),
            clock,
            ..PcapConfig::default()
        })
        .unwrap();
        let arena = arena(256);
        let mut pool = Pool::new(&arena, 16);
        let mut queue = Box::new(port).queues(1, &arena).unwrap().remove(0);
        assert!(queue.finished());
        let mut frames: Vec<Frame> = packets
            .iter()
            .map(|p| {
                let mut f = pool.get().unwrap();
                assert!(f.set_data(p));
                f
            })
            .collect();
        assert_eq!(queue.tx_burst(&mut pool, &mut frames), packets.len());
        queue.drain(&mut pool);
        assert_eq!(arena.outstanding(), 0);
    }

    fn read_all(queue: &mut dyn PortQueue, pool: &mut Pool) -> Vec<Vec<u8>> {
        let (mut frames, mut packets) = (Vec::new(), Vec::new());
        while !queue.finished() {
            queue.rx_burst(pool, &mut frames, BURST);
            packets.extend(frames.iter().map(|f| f.data().to_vec()));
            pool.put_bulk(&mut frames);
        }
        packets
    }

    #[test]
    fn what_is_sent_can_be_received_again_and_the_file_is_the_same_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("1.pcap"), dir.path().join("2.pcap"));
        let packets: Vec<_> = (0..100).map(|i| ipv4(1, 2, i)).collect();
        write(&one, &packets, Clock::default());
        write(&two, &packets, Clock::default());
        assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());

        let arena = arena(64);
        let mut pool = Pool::new(&arena, 16);
        let config = PcapConfig {
            read: Some(one),
            repeat: Repeat::Times(3),
            ..PcapConfig::default()
        };
        let port = PcapPort::open(config).unwrap();
        let mut queue = Box::new(port).queues(1, &arena).unwrap().remove(0);
        let got = read_all(queue.as_mut(), &mut pool);
        assert_eq!(got, [packets.clone(), packets.clone(), packets].concat());
        assert_eq!(queue.stats().rx_packets.value(), 300);
        assert_eq!(arena.outstanding(), 0);
    }

    #[test]
    fn time_stamps_follow_the_given_counter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.pcap");
        let clock = Clock::Counter {
            start: Duration::from_secs(5),
            step: Duration::from_nanos(600_000_001),
        };
        write(&path, &[vec![1; 60], vec![2; 60], vec![3; 60]], clock);
        let bytes = std::fs::read(&path).unwrap();
        let mut reader = pcap_file::pcap::PcapReader::new(&bytes[..]).unwrap();
        let mut times = Vec::new();
        while let Some(p) = reader.next_packet() {
            times.push(p.unwrap().timestamp.as_nanos());
        }
        assert_eq!(times, [5_000_000_000, 5_600_000_001, 6_200_000_002]);
    }

    #[test]
    fn queues_share_the_packets_and_keep_a_flow_together() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.pcap");
        let packets: Vec<_> = (0..200).map(|i| ipv4(i % 20, 100, i)).collect();
        write(&path, &packets, Clock::System);
        let arena = arena(64);
        let mut pool = Pool::new(&arena, 16);
        let config = PcapConfig {
            read: Some(path),
            ..PcapConfig::default()
        };
        let mut queues = Box::new(PcapPort::open(config).unwrap())
            .queues(4, &arena)
            .unwrap();
        let parts: Vec<_> = queues
            .iter_mut()
            .map(|q| read_all(q.as_mut(), &mut pool))
            .collect();
        assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 200);
        assert!(parts.iter().filter(|p| !p.is_empty()).count() > 1);
        for source in 0..20 {
            let with: Vec<_> = parts
                .iter()
                .filter(|p| p.iter().any(|x| x[29] == source))
                .collect();
            assert_eq!(with.len(), 1);
            let marks: Vec<u8> = with[0]
                .iter()
                .filter(|x| x[29] == source)
                .map(|x| x[63])
                .collect();
            assert!(marks.is_sorted() && marks.len() == 10);
        }
        let back = ipv4(100, 7, 0);
        assert_eq!(flow_hash(&back), flow_hash(&ipv4(7, 100, 0)));
    }

    #[test]
    fn a_packet_that_no_frame_can_hold_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long.pcap");
        let mut record = Vec::new();
        FILE_HEADER.write_to(&mut record).unwrap();
        for word in [0u32, 0, 4000, 4000] {
            record.extend(word.to_le_bytes());
        }
        record.extend([0; 4000]);
        std::fs::write(&path, record).unwrap();
        let arena = arena(4);
        let mut pool = Pool::new(&arena, 4);
        let config = PcapConfig {
            read: Some(path),
            ..PcapConfig::default()
        };
        let mut queue = Box::new(PcapPort::open(config).unwrap())
            .queues(1, &arena)
            .unwrap()
            .remove(0);
        assert!(read_all(queue.as_mut(), &mut pool).is_empty());
        assert_eq!(queue.stats().rx_errors.value(), 1);
        assert_eq!(arena.outstanding(), 0);
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nothing.pcap");
        let open = || {
            PcapPort::open(PcapConfig {
                read: Some(path.clone()),
                ..PcapConfig::default()
            })
        };
        assert!(open().unwrap_err().to_string().contains("nothing.pcap"));
        std::fs::write(&path, b"not a capture").unwrap();
        let error = open().unwrap_err().to_string();
        assert!(
            error.contains("neither a pcap nor a pcapng file"),
            "{error}"
        );
    }
}
