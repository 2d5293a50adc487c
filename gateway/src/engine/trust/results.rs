//! What comes back: each result meets its ticket, its sample, and the SA's numbers.

use pmd::engine::{EspJob, JobStatus};

use super::canary::Song;
use super::sas::Carried;
use super::state::Reason;
use super::ticket::{NO_SAMPLE, Ticket};
use super::{Trusted, judge};

impl Trusted {
    /// Judges what the driver gave back.
    pub(super) fn collect(&mut self, now: u64, done: &mut Vec<EspJob>) {
        if self.raw.is_empty() {
            return;
        }
        self.losses.progress(now);
        let mut raw = std::mem::take(&mut self.raw);
        for job in raw.drain(..) {
            let Some(ticket) = self.tickets.take(job.tag) else {
                self.trust.wrong.add(1);
                self.suspect.get_or_insert(Reason::Stranger);
                self.pool.put(job.frame);
                continue;
            };
            self.judge(&ticket, job, done);
        }
        self.raw = raw;
    }

    #[inline]
    fn judge(&mut self, ticket: &Ticket, mut job: EspJob, done: &mut Vec<EspJob>) {
        if let Some(flown) = ticket.canary {
            ticket.restore(&mut job);
            let song = self.canaries.land(flown, job, &self.caps, &mut self.pool);
            self.hear(song, ticket);
            return;
        }
        let same = ticket.is(&job);
        ticket.restore(&mut job);
        let bare = self.caps.outer_headers;
        let mut sa = self.sas.returning(ticket.sa);
        let verdict = if same {
            let sampled = (ticket.sample != NO_SAMPLE)
                .then(|| {
                    let sa = sa.as_deref()?;
                    self.trust.samples.add(1);
                    self.samples.check(ticket.sample, &job, sa, bare)
                })
                .flatten();
            match (sampled, job.status, sa.as_deref_mut()) {
                (Some(false), ..) => {
                    self.trust.samples_failed.add(1);
                    Err(Reason::Sample)
                }
                (_, JobStatus::Done, Some(sa)) => judge::result(sa, ticket, &mut job, bare),
                (_, JobStatus::Done, None) | (_, JobStatus::Pending, _) => {
                    job.status = JobStatus::Failed;
                    Ok(())
                }
                _ => Ok(()),
            }
        } else {
            self.samples.drop(ticket.sample);
            Err(Reason::Stranger)
        };
        if sa.is_some_and(Carried::home) {
            self.sas.forget(ticket.sa);
        }
        if let Err(reason) = verdict {
            self.trust.wrong.add(1);
            self.suspect.get_or_insert(reason);
        }
        // What comes with a wrong answer, and after it, is worth nothing.
        if self.suspect.is_some() {
            job.status = JobStatus::Failed;
        }
        self.count(ticket, job.status);
        done.push(job);
    }

    /// What a canary says.
    fn hear(&mut self, song: Song, ticket: &Ticket) {
        match song {
            Song::Right => self.count(ticket, JobStatus::Done),
            Song::Lost => {
                self.trust.canaries_failed.add(1);
                self.count(ticket, JobStatus::Failed);
                if self.canaries.are_lost() {
                    self.suspect.get_or_insert(Reason::Canary);
                }
            }
            Song::Wrong => {
                self.trust.canaries_failed.add(1);
                self.trust.wrong.add(1);
                self.suspect.get_or_insert(Reason::Canary);
            }
        }
    }

    fn count(&mut self, ticket: &Ticket, status: JobStatus) {
        if ticket.is_overdue() {
            return;
        }
        let lost = status == JobStatus::Failed;
        self.losses.ended(lost);
        if lost {
            self.trust.lost.add(1);
        }
    }
}
