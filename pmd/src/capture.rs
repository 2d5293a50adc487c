//! Copies what passes a port into a capture file, switched on and off while packets flow.
//!
//! A [`CaptureQueue`] in front of each queue pair looks at one flag a burst; while that is off nothing else happens. While it
//! is on, the worker copies frames into a ring of bytes of its own, and a writer thread empties all rings into one pcapng
//! file: nanosecond times, one interface per port, the direction in each packet's flags. A worker never waits for the
//! writer: what finds no room in the ring is counted as missed.
//!
//! Frames are captured when they are received and when they are first offered for sending.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::{DataLink, PcapError};
use rtrb::{Consumer, Producer, RingBuffer};
use sa_store::counters::Counter;

use crate::checksum;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{PortQueue, PortQueueStats};

/// What to capture.
#[derive(Debug, Clone)]
pub struct CaptureOptions {
    /// Ports, by name; empty: all.
    pub ports: Vec<String>,
    /// Bytes kept of each packet, at least 1.
    pub snap_len: u32,
    /// Packets after which the capture ends by itself.
    pub packets: Option<u64>,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        CaptureOptions {
            ports: Vec::new(),
            snap_len: 65_535,
            packets: None,
        }
    }
}

/// What a capture brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptureSummary {
    /// Packets written.
    pub written: u64,
    /// Packets that found no room on their way to the writer.
    pub missed: u64,
}

/// Why a capture did not start or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// One capture at a time.
    #[error("a capture is running already")]
    Running,
    /// There is nothing to stop.
    #[error("no capture is running")]
    NotRunning,
    /// A port that does not exist.
    #[error("no port is named {0:?}")]
    UnknownPort(String),
    /// The file cannot be written.
    #[error("capture file: {0}")]
    Write(#[from] PcapError),
    /// No thread for the writer.
    #[error("writer thread: {0}")]
    Thread(io::Error),
}

/// The switch of all capture points of a process; clones are the same switch.
#[derive(Clone)]
pub struct Capture {
    shared: Arc<Shared>,
}

struct Shared {
    ring_bytes: usize,
    lanes: Mutex<Vec<Lane>>,
    running: Mutex<Option<Running>>,
}

/// The writer's end of one queue pair.
struct Lane {
    port: String,
    state: Arc<LaneState>,
    records: Consumer<u8>,
}

#[derive(Default)]
struct LaneState {
    on: AtomicBool,
    snap_len: AtomicU32,
    missed: Counter,
}

struct Running {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<CaptureSummary, PcapError>>,
}

/// A queue pair whose frames can be captured.
pub struct CaptureQueue {
    inner: Box<dyn PortQueue>,
    state: Arc<LaneState>,
    records: Producer<u8>,
    /// Frames at the front of the last send burst that were captured and not taken.
    offered: Vec<u32>,
}

/// In front of each packet in a ring: time (8 bytes), original length (4), captured length (2), direction (1), zero (1).
const RECORD_HEADER: usize = 16;
const INBOUND: u8 = 1;
const OUTBOUND: u8 = 2;
/// How long the writer sleeps when all rings are empty.
const PAUSE: Duration = Duration::from_millis(2);

impl Capture {
    /// A switch, off. Each capture point's ring will hold `ring_bytes` (memory that is touched only when used).
    pub fn new(ring_bytes: usize) -> Capture {
        Capture {
            shared: Arc::new(Shared {
                ring_bytes: ring_bytes.max(1 << 17),
                lanes: Mutex::default(),
                running: Mutex::default(),
            }),
        }
    }

    /// Puts a capture point in front of a queue pair of the port `port`.
    pub fn wrap(&self, inner: Box<dyn PortQueue>, port: &str) -> CaptureQueue {
        let (producer, consumer) = RingBuffer::new(self.shared.ring_bytes);
        let state = Arc::<LaneState>::default();
        lock(&self.shared.lanes).push(Lane {
            port: port.into(),
            state: Arc::clone(&state),
            records: consumer,
        });
        CaptureQueue {
            inner,
            state,
            records: producer,
            offered: Vec::new(),
        }
    }

    /// Starts writing to `out`.
    ///
    /// # Errors
    /// `Running`, `UnknownPort`, `Write` (the file's first bytes), `Thread`.
    pub fn start(
        &self,
        out: impl Write + Send + 'static,
        options: &CaptureOptions,
    ) -> Result<(), CaptureError> {
        let mut running = lock(&self.shared.running);
        if running.is_some() {
            return Err(CaptureError::Running);
        }
        let lanes = lock(&self.shared.lanes);
        for port in &options.ports {
            if !lanes.iter().any(|l| l.port == *port) {
                return Err(CaptureError::UnknownPort(port.clone()));
            }
        }
        let mut writer = FileWriter {
            file: PcapNgWriter::new(io::BufWriter::with_capacity(1 << 16, Out(Box::new(out))))?,
            interfaces: HashMap::new(),
            snap_len: options.snap_len.max(1),
            left: options.packets.unwrap_or(u64::MAX),
            since: now(),
            written: 0,
            bytes: Vec::new(),
        };
        let missed_before: u64 = lanes.iter().map(|l| l.state.missed.value()).sum();
        for lane in lanes.iter() {
            lane.state
                .snap_len
                .store(writer.snap_len, Ordering::Relaxed);
            let wanted = options.ports.is_empty() || options.ports.contains(&lane.port);
            lane.state.on.store(wanted, Ordering::Release);
        }
        drop(lanes);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("capture".into()).spawn({
            let (shared, stop) = (Arc::clone(&self.shared), Arc::clone(&stop));
            move || {
                let result = write_until(&shared, &mut writer, &stop);
                shared.switch_off();
                result.map(|()| CaptureSummary {
                    written: writer.written,
                    missed: shared.missed() - missed_before,
                })
            }
        });
        match thread {
            Ok(thread) => {
                *running = Some(Running { stop, thread });
                Ok(())
            }
            Err(e) => {
                self.shared.switch_off();
                Err(CaptureError::Thread(e))
            }
        }
    }

    /// Whether a capture runs. One that has ended by itself still has to be stopped.
    pub fn is_running(&self) -> bool {
        lock(&self.shared.running)
            .as_ref()
            .is_some_and(|r| !r.thread.is_finished())
    }

    /// Stops, when everything captured so far is in the file.
    ///
    /// # Errors
    /// `NotRunning`, and `Write` if the file could not be written at any time.
    pub fn stop(&self) -> Result<CaptureSummary, CaptureError> {
        let running = lock(&self.shared.running)
            .take()
            .ok_or(CaptureError::NotRunning)?;
        self.shared.switch_off();
        running.stop.store(true, Ordering::Release);
        match running.thread.join() {
            Ok(result) => Ok(result?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Shared {
    fn switch_off(&self) {
        for lane in lock(&self.lanes).iter() {
            lane.state.on.store(false, Ordering::Release);
        }
    }

    fn missed(&self) -> u64 {
        lock(&self.lanes)
            .iter()
            .map(|l| l.state.missed.value())
            .sum()
    }
}

impl CaptureQueue {
    /// Copies one frame into the ring, or counts it as missed.
    fn record(&mut self, time: u64, direction: u8, data: &[u8]) {
        let snap = self.state.snap_len.load(Ordering::Relaxed) as usize;
        // A frame is shorter than 64 KiB.
        let captured = u16::try_from(data.len().min(snap)).unwrap_or(u16::MAX);
        let captured_data = data.get(..usize::from(captured)).unwrap_or(data);
        let Ok(mut chunk) = self
            .records
            .write_chunk(RECORD_HEADER + captured_data.len())
        else {
            self.state.missed.add(1);
            return;
        };
        let mut header = [0; RECORD_HEADER];
        header[..8].copy_from_slice(&time.to_ne_bytes());
        header[8..12].copy_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_ne_bytes());
        header[12..14].copy_from_slice(&captured.to_ne_bytes());
        header[14] = direction;
        let (first, second) = chunk.as_mut_slices();
        let places = first.iter_mut().chain(second);
        for (to, from) in places.zip(header.iter().chain(captured_data)) {
            *to = *from;
        }
        chunk.commit_all();
    }

    #[cold]
    fn record_sent(&mut self, frames: &[Frame]) {
        let time = now();
        let known = self
            .offered
            .iter()
            .zip(frames)
            .take_while(|(index, frame)| **index == frame.index())
            .count();
        for frame in frames.iter().skip(known) {
            self.record(time, OUTBOUND, frame.data());
        }
    }

    #[cold]
    fn record_received(&mut self, frames: &[Frame]) {
        let time = now();
        for frame in frames {
            self.record(time, INBOUND, frame.data());
        }
    }
}

impl PortQueue for CaptureQueue {
    #[inline]
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let n = self.inner.rx_burst(pool, out, max);
        if n > 0
            && self.state.on.load(Ordering::Acquire)
            && let Some(received) = out.get(out.len() - n..)
        {
            self.record_received(received);
        }
        n
    }

    #[inline]
    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if !self.state.on.load(Ordering::Acquire) {
            self.offered.clear();
            return self.inner.tx_burst(pool, frames);
        }
        // The file is to have what the wire will have.
        frames.iter_mut().for_each(checksum::complete);
        self.record_sent(frames);
        let n = self.inner.tx_burst(pool, frames);
        self.offered.clear();
        self.offered.extend(frames.iter().map(Frame::index));
        n
    }

    fn flush(&mut self, pool: &mut Pool) {
        self.inner.flush(pool);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wait_fd()
    }

    fn arm(&mut self) {
        self.inner.arm();
    }

    fn finished(&self) -> bool {
        self.inner.finished()
    }

    fn completes_checksums(&self) -> bool {
        self.inner.completes_checksums()
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        self.inner.stats()
    }

    fn drain(&mut self, pool: &mut Pool) {
        self.inner.drain(pool);
    }
}

/// The file's side of the writer thread.
struct FileWriter {
    file: PcapNgWriter<io::BufWriter<Out>>,
    interfaces: HashMap<String, u32>,
    snap_len: u32,
    left: u64,
    /// Records from before are left over from an earlier capture.
    since: u64,
    written: u64,
    bytes: Vec<u8>,
}

/// A boxed writer with a name, so that the pcapng writer's type stays one.
struct Out(Box<dyn Write + Send>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Empties the rings until told to stop and all are empty, or the wanted number is reached.
fn write_until(
    shared: &Shared,
    writer: &mut FileWriter,
    stop: &AtomicBool,
) -> Result<(), PcapError> {
    loop {
        // Read first: what was captured before the stop is then seen below.
        let stopping = stop.load(Ordering::Acquire);
        let mut idle = true;
        for lane in lock(&shared.lanes).iter_mut() {
            while writer.left > 0 && writer.take(lane)? {
                idle = false;
            }
        }
        if writer.left == 0 || (idle && stopping) {
            return writer.file.get_mut().flush().map_err(PcapError::IoError);
        }
        if idle {
            writer.file.get_mut().flush().map_err(PcapError::IoError)?;
            std::thread::sleep(PAUSE);
        }
    }
}

impl FileWriter {
    /// Writes the lane's next packet; false when there is none.
    fn take(&mut self, lane: &mut Lane) -> Result<bool, PcapError> {
        let mut header = [0; RECORD_HEADER];
        // A record is committed as a whole, so either all of it is there or nothing.
        let Ok(chunk) = lane.records.read_chunk(RECORD_HEADER) else {
            return Ok(false);
        };
        for (to, from) in header.iter_mut().zip(chunk) {
            *to = from;
        }
        let [
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            l0,
            l1,
            l2,
            l3,
            c0,
            c1,
            direction,
            _,
        ] = header;
        let time = u64::from_ne_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        let original_len = u32::from_ne_bytes([l0, l1, l2, l3]);
        let captured = usize::from(u16::from_ne_bytes([c0, c1]));
        self.bytes.clear();
        if let Ok(chunk) = lane.records.read_chunk(captured) {
            self.bytes.extend(chunk);
        }
        if time < self.since {
            return Ok(true);
        }
        let interface_id = self.interface(&lane.port)?;
        self.file.write_pcapng_block(EnhancedPacketBlock {
            interface_id,
            timestamp: Duration::from_nanos(time),
            original_len,
            data: Cow::Borrowed(&self.bytes),
            options: vec![EnhancedPacketOption::Flags(u32::from(direction))],
        })?;
        self.written += 1;
        self.left -= 1;
        Ok(true)
    }

    /// Number of the port's interface in the file, which is described when first needed.
    fn interface(&mut self, port: &str) -> Result<u32, PcapError> {
        if let Some(id) = self.interfaces.get(port) {
            return Ok(*id);
        }
        let id = u32::try_from(self.interfaces.len()).unwrap_or(u32::MAX);
        self.file.write_pcapng_block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: self.snap_len,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(port)),
                // 10^-9 s.
                InterfaceDescriptionOption::IfTsResol(9),
            ],
        })?;
        self.interfaces.insert(port.into(), id);
        Ok(id)
    }
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
