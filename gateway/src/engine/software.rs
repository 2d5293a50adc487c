//! Completes every job within `submit`, on the calling worker.

use arrayvec::ArrayVec;
use pmd::engine::{Capabilities, EspEngine, EspJob, JobKind, JobStatus, Refusal};
use sa_store::cipher::CipherJob;
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;
use sa_store::suite::Suite;

/// Jobs given to a provider in one call.
const RUN: usize = 64;

/// The software engine of one worker. It has no state: an SA's expanded keys travel in the snapshot.
#[derive(Debug)]
pub struct SoftwareEngine {
    capabilities: Capabilities,
}

impl Default for SoftwareEngine {
    fn default() -> Self {
        Self {
            capabilities: Capabilities {
                name: "software",
                in_flight: usize::MAX,
                synchronous: true,
                crypto: Suite::all(),
                esn: true,
                nat_t: true,
                slots: usize::MAX,
                longest: usize::from(u16::MAX),
                alignment: 1,
                address_bits: usize::BITS,
                run: usize::MAX,
                ..Capabilities::default()
            },
        }
    }
}

impl EspEngine for SoftwareEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn install(&mut self, _sa: &SaEntry) -> Result<(), Refusal> {
        Ok(())
    }

    fn remove(&mut self, _sa: SaId) {}

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        for run in jobs.chunks_mut(RUN) {
            let mut rest = &mut run[..];
            while let Some(first) = rest.first() {
                let kind = first.kind;
                let n = rest.iter().take_while(|j| j.kind == kind).count();
                let (now, later) = rest.split_at_mut(n);
                cipher_run(view, kind, now);
                rest = later;
            }
        }
        if done.is_empty() {
            std::mem::swap(jobs, done);
        } else {
            done.append(jobs);
        }
    }

    fn poll(&mut self, _done: &mut Vec<EspJob>) {}

    fn in_flight(&self) -> usize {
        0
    }
}

/// Ciphers up to [`RUN`] jobs of one direction, lane by lane: jobs of several SAs that a provider may mix go to
/// it in one call. Jobs of one SA share a lane, so their order is kept.
fn cipher_run(view: &Snapshot, kind: JobKind, jobs: &mut [EspJob]) {
    // Nearly always all jobs are of one lane: the first pass is then the last.
    while cipher_lane(view, kind, jobs) {}
}

/// Ciphers the jobs that are of the first pending one's lane. True when others are left.
#[inline(always)]
fn cipher_lane(view: &Snapshot, kind: JobKind, jobs: &mut [EspJob]) -> bool {
    let mut batch: ArrayVec<CipherJob<'_>, RUN> = ArrayVec::new();
    let mut statuses: ArrayVec<&mut JobStatus, RUN> = ArrayVec::new();
    let mut lane = None;
    let mut others = false;
    for job in jobs.iter_mut() {
        if job.status != JobStatus::Pending {
            continue;
        }
        let Some(entry) = view.sa(job.sa) else {
            job.status = JobStatus::SaGone;
            continue;
        };
        let fixed = &entry.fixed;
        if *lane.get_or_insert(fixed.lane) != fixed.lane {
            others = true;
            continue;
        }
        let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
        let Some(esp) = job.frame.data_mut().get_mut(from..to) else {
            job.status = JobStatus::Failed;
            continue;
        };
        #[allow(clippy::cast_possible_truncation, reason = "upper half of a u64")]
        let seq_hi = (job.seq >> 32) as u32;
        statuses.push(&mut job.status);
        batch.push(CipherJob {
            ctx: &*fixed.cipher,
            esp,
            seq_hi,
            ok: false,
        });
    }
    let Some(ctx) = batch.first().map(|first| first.ctx) else {
        return false;
    };
    let failed = match kind {
        JobKind::Seal => {
            ctx.seal(&mut batch);
            JobStatus::Failed
        }
        JobKind::Open => {
            ctx.open(&mut batch);
            JobStatus::IcvMismatch
        }
    };
    for (status, job) in statuses.iter_mut().zip(&batch) {
        **status = if job.ok { JobStatus::Done } else { failed };
    }
    others
}
