//! The interface between the data path and whatever does the ciphering: the CPU or an engine.
//!
//! The data path is asynchronous by shape: *pre* builds an [`EspJob`], an engine takes it and gives it back
//! later, *post* judges the result. The software engine completes in [`submit`](EspEngine::submit); nothing
//! above can tell.
//!
//! - Jobs of one SA come back in the order of their submission.
//! - A completion may hold another frame than was submitted (some engines write elsewhere).
//! - Back-pressure is visible: what an engine does not take stays in the caller's vector, in order.

use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

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
    /// Direction.
    pub kind: JobKind,
    /// Out: what became of it.
    pub status: JobStatus,
}

/// What an engine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Name for logs and metrics.
    pub name: &'static str,
    /// Jobs that may be in flight at once.
    pub in_flight: usize,
    /// Jobs complete within `submit`, so that no deadline applies.
    pub synchronous: bool,
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
}
