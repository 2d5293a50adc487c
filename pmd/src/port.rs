//! The interface of everything that frames come from and go to.
//!
//! A [`Port`] is opened into queue pairs, each owned by one worker. A [`PortQueue`] moves whole Ethernet frames (no frame
//! check sequence) in bursts; it never blocks and, except where the module of a port says otherwise, makes no system call per
//! packet.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use sa_store::counters::Counter;

use crate::arena::Arena;
use crate::frame::Frame;
use crate::pool::Pool;

/// Frames in a full burst.
pub const BURST: usize = 64;

/// Counters of one queue pair, written by the worker that owns it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PortQueueStats {
    /// Frames received.
    pub rx_packets: Counter,
    /// Bytes received, Ethernet header included.
    pub rx_bytes: Counter,
    /// Frames lost before we saw them: no buffer, ring full.
    pub rx_dropped: Counter,
    /// Frames that arrived broken or too long.
    pub rx_errors: Counter,
    /// Frames sent.
    pub tx_packets: Counter,
    /// Bytes sent, Ethernet header included.
    pub tx_bytes: Counter,
    /// Frames taken for sending that the port could not send.
    pub tx_errors: Counter,
}

impl PortQueueStats {
    /// Counts received frames.
    #[inline(always)]
    pub fn note_rx(&self, packets: usize, bytes: usize) {
        self.rx_packets.add(packets as u64);
        self.rx_bytes.add(bytes as u64);
    }

    /// Counts sent frames.
    #[inline(always)]
    pub fn note_tx(&self, packets: usize, bytes: usize) {
        self.tx_packets.add(packets as u64);
        self.tx_bytes.add(bytes as u64);
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a port is, for people, metrics and the pipeline's set-up.
#[derive(Debug, Clone)]
pub struct PortInfo {
    /// Name of the interface, file or pair.
    pub name: String,
    /// `memory`, `pcap`, `tap`, `af_xdp`.
    pub kind: &'static str,
    /// Own Ethernet address; zero when the port has none.
    pub mac: MacAddr,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Largest number of queue pairs.
    pub max_queues: usize,
    /// How frames cross the port: `shared frames`, `file`, `copy`, `zero-copy`, …
    pub mode: String,
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// A number of queues that the port cannot have.
    #[error("port {port} cannot have {asked} queues (1 to {most})")]
    Queues {
        /// Port.
        port: String,
        /// Queues asked for.
        asked: usize,
        /// Most that it can have.
        most: usize,
    },
    /// The two ends of a memory pair were opened with different arenas.
    #[error("port {port} shares frames with its peer and must use the same arena")]
    ForeignArena {
        /// Port.
        port: String,
    },
    /// The arena's frames cannot hold this port's packets.
    #[error(
        "port {port} receives up to {needed} bytes, frames of the arena hold {room} behind the head-room"
    )]
    FrameTooSmall {
        /// Port.
        port: String,
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        room: usize,
    },
    /// The name is not one that the system takes.
    #[error("{name:?} is not an interface name: {reason}")]
    Name {
        /// Name given.
        name: String,
        /// Rule broken.
        reason: &'static str,
    },
    /// A capture file cannot be used.
    #[error("capture file {path}: {reason}")]
    Capture {
        /// File.
        path: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A setting that the port cannot have.
    #[error("port {port}: {reason}")]
    Setting {
        /// Port.
        port: String,
        /// What is wrong.
        reason: String,
    },
    /// The device behind the port failed.
    #[error("port {port}: {source}")]
    Device {
        /// Port.
        port: String,
        /// What is wrong.
        source: crate::device::DeviceError,
    },
    /// No driver knows the device.
    #[error("port {port}: no driver for device {vendor:04x}:{device:04x}")]
    UnknownDevice {
        /// Port.
        port: String,
        /// PCI vendor ID.
        vendor: u16,
        /// PCI device ID.
        device: u16,
    },
    /// The system refused a step of the set-up.
    #[error("port {port}: {step}: {source}")]
    System {
        /// Port.
        port: String,
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// One queue pair of a port, owned by one worker.
pub trait PortQueue: Send {
    /// Appends up to `max` received Ethernet frames to `out`; returns how many.
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize;

    /// Takes frames from the front of `frames`, as many as fit, and returns how many; the rest stay, in order. Buffers whose
    /// sending is complete go back to `pool`.
    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize;

    /// Completes what is under way: doorbells, kicks, completions. For idle moments.
    fn flush(&mut self, pool: &mut Pool) {
        let _ = pool;
    }

    /// Becomes readable when something was received after [`PortQueue::arm`]; `None` when the port must be polled.
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Asks for a wake-up at the next received frame. Receive once more before sleeping: a frame may have come before.
    fn arm(&mut self) {}

    /// True when nothing will ever be received again (a capture file at its end).
    fn finished(&self) -> bool {
        false
    }

    /// How frames cross, where that is known only once the queue is open.
    fn mode(&self) -> Option<&'static str> {
        None
    }

    /// Whether frames may be given to [`PortQueue::tx_burst`] with their UDP checksum [left](Frame::leave_checksum) to the
    /// port; see [`crate::checksum`]. Never changes.
    fn completes_checksums(&self) -> bool {
        false
    }

    /// Counters, to keep and read from anywhere.
    fn stats(&self) -> &Arc<PortQueueStats>;

    /// Shutdown: gives every frame that the queue holds to `pool`.
    fn drain(&mut self, pool: &mut Pool);
}

/// A port before its queues are opened.
pub trait Port: Send {
    /// What it is.
    fn info(&self) -> PortInfo;

    /// What control may ask and tell the port while its queues run; `None` for ports without a device of their own.
    fn control(&self) -> Option<Arc<dyn crate::nic::NicControl>> {
        None
    }

    /// Opens `n` queue pairs whose frames are `arena`'s.
    ///
    /// # Errors
    /// See [`PortError`].
    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError>;
}

/// Refuses a number of queues outside `1..=most`.
pub(crate) fn check_queues(port: &str, asked: usize, most: usize) -> Result<(), PortError> {
    if (1..=most).contains(&asked) {
        return Ok(());
    }
    Err(PortError::Queues {
        port: port.into(),
        asked,
        most,
    })
}
