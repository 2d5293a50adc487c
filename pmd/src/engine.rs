//! The interface between the data path and whatever does the ciphering: the CPU or an engine.
//!
//! The data path is asynchronous by shape: *pre* builds an [`EspJob`], an engine takes it and gives it back
//! later, *post* judges the result. The software engine completes in [`submit`](EspEngine::submit); nothing
//! above can tell.
//!
//! - Jobs of one SA come back in the order of their submission.
//! - A completion may hold another frame than was submitted (some engines write elsewhere).
//! - Back-pressure is visible: what an engine does not take stays in the caller's vector, in order.
//!
//! An SA is carried in one of two modes, fixed when it is installed ([`OffloadMode`](sa_store::sa::OffloadMode)). In **crypto**
//! mode the caller frames, numbers and makes the IV. In **packet** mode the engine does: the caller gives, and gets back, what
//! lies inside. Where the engine leaves the outer headers to the caller ([`Capabilities::outer_headers`] is false), a job of
//! packet mode is laid out so:
//!
//! ```text
//!   | outer headers | ESP header | IV | payload | room for padding, trailer, ICV
//!                   esp_off                     esp_end when given to seal, and when opened
//! ```
//!
//! Sealed, `esp_end` is the end of the ICV and `seq` the number that the engine took. Opened, `next_header` is what the trailer
//! said, and `esp_end` the end of the payload. An engine that makes the outer headers takes and gives the inner packet alone.
//!
//! Also in packet mode the caller counts: it takes a number of the SA, within limits and leases, for every job that it
//! submits, and gives it in `seq`. The engine's numbers never go beyond those.

use std::sync::Arc;
use std::time::Duration;

use sa_store::counters::Counter;
use sa_store::runtime::SaEntry;
use sa_store::sa::{OffloadMode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::suite::Suite;

use crate::frame::Frame;

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// Not looked at yet.
    Pending,
    /// Sealed, or opened with a right ICV.
    Done,
    /// Inbound: the ICV is wrong.
    IcvMismatch,
    /// The SA is not there any more.
    SaGone,
    /// The engine failed or lost the packet.
    Failed,
    /// Inbound, packet mode: the number was seen before, or is left of the window.
    Replayed,
    /// The packet is not what the SA carries: lengths, padding, SPI.
    Malformed,
    /// Outbound, packet mode: no number is left, or a limit keeps the packet from being numbered.
    LimitReached,
}

/// Which way a job goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Encrypt: header, IV, padding and room for the ICV are in place.
    Seal,
    /// Decrypt.
    Open,
}

/// One packet on its way through an engine, with what *post* needs to know about it.
#[derive(Debug)]
pub struct EspJob {
    /// The packet; starts at the outer IP header.
    pub frame: Frame,
    /// SA.
    pub sa: SaId,
    /// Full sequence number.
    pub seq: u64,
    /// Caller's own mark, untouched by engines.
    pub tag: u64,
    /// Another one.
    pub note: u32,
    /// Where the ESP header starts in the frame, bytes.
    pub esp_off: u16,
    /// End of the ESP packet (behind the ICV) in the frame, bytes.
    pub esp_end: u16,
    /// Packet mode: the next header, given to seal and found when opened.
    pub next_header: u8,
    /// Direction.
    pub kind: JobKind,
    /// How the SA is carried. Whoever opens a packet-mode job otherwise, as the CPU does while an engine is out of service,
    /// sets what it did: *post* goes by this.
    pub mode: OffloadMode,
    /// Out: what became of it.
    pub status: JobStatus,
}

/// What an engine can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Name for logs and metrics.
    pub name: &'static str,
    /// Jobs that may be in flight at once.
    pub in_flight: usize,
    /// Jobs complete within `submit`, so that no deadline applies.
    pub synchronous: bool,
    /// Suites that it ciphers for packets framed by the caller.
    pub crypto: Vec<Suite>,
    /// Suites that it carries in packet mode.
    pub packet: Vec<Suite>,
    /// Packet mode: the engine makes and takes off the outer headers too.
    pub outer_headers: bool,
    /// Packet mode: numbers and windows can be loaded and read back, so that an SA goes on after a restart or a reset. Without
    /// this an outbound SA begins with its key and ends with the engine's first mistake.
    pub renumbers: bool,
    /// 64-bit sequence numbers, in either mode.
    pub esn: bool,
    /// UDP encapsulation.
    pub nat_t: bool,
    /// Widest replay window of packet mode, packets.
    pub window: u32,
    /// SAs at once.
    pub slots: usize,
    /// Longest ESP packet, bytes.
    pub longest: usize,
    /// What the address of an ESP header is best a multiple of, bytes. Others cost a move of the packet.
    pub alignment: usize,
    /// Bits of the addresses that it can reach.
    pub address_bits: u32,
    /// Jobs that one doorbell can announce.
    pub run: usize,
}

/// What an engine counts; written by its owner.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Jobs given to the engine.
    pub submitted: Counter,
    /// Jobs that came back, whatever the result.
    pub completed: Counter,
    /// Bytes of ESP given to the engine.
    pub bytes: Counter,
    /// Doorbells rung.
    pub doorbells: Counter,
    /// Jobs not taken because the engine was full.
    pub busy: Counter,
    /// Packets that had to be moved to be aligned.
    pub moved: Counter,
    /// Wrong ICVs.
    pub icv_failed: Counter,
    /// Replays that the engine found.
    pub replays: Counter,
    /// Packets that the engine refused for their form.
    pub malformed: Counter,
    /// Jobs without a completion in time.
    pub lost: Counter,
    /// Results that cannot be right: the engine, or the way to it, is broken.
    pub wrong: Counter,
    /// Resets.
    pub resets: Counter,
}

/// Why an engine could not be brought back.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("engine {engine} is dead: {reason}")]
pub struct EngineDead {
    /// Engine.
    pub engine: &'static str,
    /// What failed.
    pub reason: String,
}

/// Why an engine does not take an SA.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// The suite, mode, window or another property is beyond the engine.
    #[error("engine {engine} cannot carry SA \"{sa}\": {reason}")]
    Unsupported {
        /// Engine.
        engine: &'static str,
        /// SA.
        sa: String,
        /// What it cannot do.
        reason: String,
    },
    /// All slots are in use.
    #[error("engine {engine} has no slot left for SA \"{sa}\"")]
    NoSlot {
        /// Engine.
        engine: &'static str,
        /// SA.
        sa: String,
    },
}

/// An engine queue, owned by one worker.
pub trait EspEngine: Send {
    /// What it can do.
    fn capabilities(&self) -> &Capabilities;

    /// Prepares for the SA's jobs. The worker that owns the queue calls this, not per packet.
    ///
    /// # Errors
    /// The reason why the engine cannot carry the SA.
    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal>;

    /// Forgets the SA; its key material is wiped once nothing of it is in flight.
    fn remove(&mut self, sa: SaId);

    /// Takes jobs from the front of `jobs`. Completions, also of earlier jobs, are appended to `done`.
    /// `view` is the snapshot that the caller's burst uses.
    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>);

    /// Appends completions to `done`.
    fn poll(&mut self, done: &mut Vec<EspJob>);

    /// Jobs taken and not yet given back.
    fn in_flight(&self) -> usize;

    /// Whether the engine takes jobs. One that does not gives them back as failed until it has been [`reset`](Self::reset).
    fn is_healthy(&self) -> bool {
        true
    }

    /// Whether a device answers behind it. One that does cannot be opened anew while this has it, nor need it be.
    fn is_present(&self) -> bool {
        false
    }

    /// Waits up to `patience` for everything in flight; true when nothing is left. Blocks: not for the poll loop.
    fn drain(&mut self, patience: Duration, done: &mut Vec<EspJob>) -> bool {
        let begin = std::time::Instant::now();
        loop {
            self.poll(done);
            if self.in_flight() == 0 {
                return true;
            }
            if begin.elapsed() > patience {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Stops the engine, gives everything in flight back as failed, proves that the engine is idle and starts it anew. SAs of
    /// crypto mode stay installed; those of packet mode only if the engine [`renumbers`](Capabilities::renumbers): the others are
    /// gone and need a rekey.
    ///
    /// # Errors
    /// When the engine does not come back. Frames that it may still write to are kept from everybody.
    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.drain(Duration::ZERO, done);
        Ok(())
    }

    /// Packet mode: the last number that the engine used or accepted for the SA, as far as completions tell.
    fn reached(&self, sa: SaId) -> Option<u64> {
        let _ = sa;
        None
    }

    /// Its counters, where it keeps some.
    fn stats(&self) -> Option<&Arc<EngineStats>> {
        None
    }
}
