//! A few jobs of one SA, ciphered in one go by whoever has them.

use std::sync::Arc;

use arrayvec::ArrayVec;
use pmd::engine::{EspJob, JobKind, JobStatus};
use sa_store::cipher::CipherJob;
use sa_store::runtime::SaEntry;
use sa_store::suite::Suite;

/// Most jobs in a piece: what providers cipher side by side.
pub(super) const MOST: usize = 32;
/// Jobs in a piece where providers cipher one by one: enough to spread the cost of a ring over, few enough to share a burst.
pub(super) const LEAST: usize = 8;

/// A piece on its way. Its memory is made at start and goes round.
pub(super) type Parcel = Box<Piece>;

/// The first line is what a helper writes; it reads the jobs and changes their packets only, so that the lines of the jobs
/// need not come back.
#[repr(C, align(64))]
pub(super) struct Piece {
    /// Bit `i`: job `i` was ciphered, and its ICV, if it had one, was right.
    right: u32,
    /// Lane, and place in it.
    pub(super) lane: usize,
    pub(super) order: u64,
    /// The SA; none while the piece is spare.
    pub(super) entry: Option<Arc<SaEntry>>,
    /// In order of submission.
    pub(super) jobs: ArrayVec<EspJob, MOST>,
}

impl Piece {
    /// A spare one.
    pub(super) fn spare() -> Parcel {
        Box::new(Self {
            right: 0,
            lane: 0,
            order: 0,
            entry: None,
            jobs: ArrayVec::new(),
        })
    }

    /// Ciphers the jobs.
    pub(super) fn cipher(&mut self) {
        self.right = 0;
        let (Some(entry), Some(first)) = (&self.entry, self.jobs.first()) else {
            return;
        };
        let kind = first.kind;
        entry.fixed.cipher.prefetch();
        for job in &self.jobs {
            job.frame.prefetch();
        }
        let mut batch: ArrayVec<CipherJob<'_>, MOST> = ArrayVec::new();
        let mut places: ArrayVec<u32, MOST> = ArrayVec::new();
        for (place, job) in (0..).zip(&mut self.jobs) {
            if !is_fit(job) {
                continue;
            }
            let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
            #[allow(clippy::cast_possible_truncation, reason = "upper half of a u64")]
            let seq_hi = (job.seq >> 32) as u32;
            if let Some(esp) = job.frame.data_mut().get_mut(from..to) {
                places.push(place);
                batch.push(CipherJob {
                    ctx: &*entry.fixed.cipher,
                    esp,
                    seq_hi,
                    ok: false,
                });
            }
        }
        match kind {
            JobKind::Seal => entry.fixed.cipher.seal(&mut batch),
            JobKind::Open => entry.fixed.cipher.open(&mut batch),
        }
        for (place, job) in places.iter().zip(&batch) {
            self.right |= u32::from(job.ok) << place;
        }
    }

    /// Empties the piece into `done`, each job with what became of it. Returns how many there were.
    pub(super) fn unload(&mut self, done: &mut Vec<EspJob>) -> usize {
        let count = self.jobs.len();
        for (place, mut job) in (0..).zip(self.jobs.drain(..)) {
            if job.status == JobStatus::Pending {
                job.status = if self.right >> place & 1 == 1 {
                    JobStatus::Done
                } else if job.kind == JobKind::Open && in_frame(&job) {
                    JobStatus::IcvMismatch
                } else {
                    JobStatus::Failed
                };
            }
            done.push(job);
        }
        self.entry = None;
        count
    }
}

/// Jobs of a suite that are worth a piece: providers cipher CBC and HMAC for many packets at once, the others one by one.
pub(super) fn length_for(suite: Suite) -> usize {
    if is_slow(suite) { MOST } else { LEAST }
}

/// Mean ESP packet from which on ciphering costs more than the way to a helper and back, bytes.
pub(super) fn least_bytes(suite: Suite) -> usize {
    if is_slow(suite) { 128 } else { 384 }
}

fn is_slow(suite: Suite) -> bool {
    matches!(suite, Suite::CipherHmac(..))
}

fn is_fit(job: &EspJob) -> bool {
    job.status == JobStatus::Pending && in_frame(job)
}

fn in_frame(job: &EspJob) -> bool {
    job.esp_off <= job.esp_end && usize::from(job.esp_end) <= job.frame.len()
}
