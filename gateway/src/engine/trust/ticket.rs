//! What is known of jobs while the driver has them, kept apart from what it gives back.
//!
//! A job goes in with the number of its ticket for a tag. What comes back is held against the ticket: whatever a driver makes
//! of a job, the caller gets it back as it was.

use std::collections::VecDeque;

use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::frame::Frame;
use sa_store::sa::{OffloadMode, SaId};

use super::canary::Flown;

/// No sample is taken of the job.
pub(super) const NO_SAMPLE: u16 = u16::MAX;

/// A job without its frame.
#[derive(Clone, Debug)]
pub(super) struct Ticket {
    pub(super) sa: SaId,
    pub(super) seq: u64,
    tag: u64,
    note: u32,
    pub(super) esp_off: u16,
    pub(super) esp_end: u16,
    next_header: u8,
    pub(super) kind: JobKind,
    pub(super) mode: OffloadMode,
    /// Length of the frame.
    pub(super) len: u16,
    /// SPI and number, where the caller made them.
    pub(super) header: [u8; 8],
    /// The IV, where the caller made it.
    pub(super) iv: [u8; 16],
    /// First bytes that must not be there once sealed.
    pub(super) plain: Option<[u8; 8]>,
    /// Which of its SA's jobs it is.
    pub(super) nth: u64,
    /// Where its sample is kept.
    pub(super) sample: u16,
    /// A canary is nobody's job.
    pub(super) canary: Option<Flown>,
    since: u64,
    overdue: bool,
    generation: u32,
    used: bool,
}

/// Whose time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Overdue {
    /// Jobs that have just passed their deadline.
    pub(super) newly: u64,
    /// The age of the oldest job, nanoseconds; 0 without any.
    pub(super) oldest: u64,
}

/// All jobs in the engine.
#[derive(Debug, Default)]
pub(super) struct Tickets {
    list: Vec<Ticket>,
    free: Vec<u32>,
    /// In order of submission; what has come back is passed over.
    order: VecDeque<(u32, u32)>,
    /// Likewise, those that are overdue.
    late: VecDeque<(u32, u32)>,
    jobs: usize,
}

impl Ticket {
    /// Of a job as it goes in.
    pub(super) fn of(job: &EspJob, now: u64) -> Ticket {
        Ticket {
            sa: job.sa,
            seq: job.seq,
            tag: job.tag,
            note: job.note,
            esp_off: job.esp_off,
            esp_end: job.esp_end,
            next_header: job.next_header,
            kind: job.kind,
            mode: job.mode,
            len: u16::try_from(job.frame.len()).unwrap_or(u16::MAX),
            header: [0; 8],
            iv: [0; 16],
            plain: None,
            nth: 0,
            sample: NO_SAMPLE,
            canary: None,
            since: now,
            overdue: false,
            generation: 0,
            used: true,
        }
    }

    /// Whether it was counted as lost already.
    pub(super) fn is_overdue(&self) -> bool {
        self.overdue
    }

    /// Whether the job says that it is this one.
    pub(super) fn is(&self, job: &EspJob) -> bool {
        self.sa == job.sa && self.kind == job.kind
    }

    /// Gives the job its caller's marks back. Where the packet lies is the engine's word.
    pub(super) fn restore(&self, job: &mut EspJob) {
        job.sa = self.sa;
        job.seq = self.seq;
        job.tag = self.tag;
        job.note = self.note;
        job.kind = self.kind;
        job.mode = self.mode;
    }

    /// Makes a failed job of it, with another frame.
    pub(super) fn failed(&self, frame: Frame) -> EspJob {
        EspJob {
            esp_end: u16::try_from(frame.len()).unwrap_or(u16::MAX),
            frame,
            sa: self.sa,
            seq: self.seq,
            tag: self.tag,
            note: self.note,
            esp_off: 0,
            next_header: self.next_header,
            kind: self.kind,
            mode: self.mode,
            status: JobStatus::Failed,
        }
    }
}

impl Tickets {
    /// Keeps a ticket; its number is the tag that the job goes in with.
    pub(super) fn issue(&mut self, ticket: Ticket) -> u64 {
        self.jobs += usize::from(ticket.canary.is_none());
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.list.push(Ticket {
                    used: false,
                    ..ticket.clone()
                });
                u32::try_from(self.list.len() - 1).unwrap_or(u32::MAX)
            }
        };
        let mut generation = 0;
        if let Some(slot) = self.list.get_mut(place as usize) {
            generation = slot.generation.wrapping_add(1);
            *slot = Ticket {
                generation,
                ..ticket
            };
        }
        self.order.push_back((place, generation));
        u64::from(generation) << 32 | u64::from(place)
    }

    /// Takes the ticket of a tag, once.
    pub(super) fn take(&mut self, tag: u64) -> Option<Ticket> {
        let (place, generation) = split(tag);
        let slot = self.list.get_mut(place as usize)?;
        if !slot.used || slot.generation != generation {
            return None;
        }
        slot.used = false;
        let ticket = slot.clone();
        self.free.push(place);
        self.jobs -= usize::from(ticket.canary.is_none());
        // Jobs mostly come back in order: the list stays short.
        self.pass();
        Some(ticket)
    }

    /// Takes back the ticket of a job that was not accepted, which is the one issued last or close to it.
    pub(super) fn undo(&mut self, tag: u64) -> Option<Ticket> {
        if self.order.back() == Some(&split(tag)) {
            self.order.pop_back();
        }
        self.take(tag)
    }

    /// The caller's jobs in the engine.
    pub(super) fn jobs(&self) -> usize {
        self.jobs
    }

    /// All that is in the engine, canaries too.
    pub(super) fn all(&self) -> usize {
        self.list.len() - self.free.len()
    }

    /// Looks for jobs older than `deadline`.
    pub(super) fn overdue(&mut self, now: u64, deadline: u64) -> Overdue {
        let mut newly = 0;
        self.pass();
        while let Some(&(place, generation)) = self.order.front() {
            let Some(ticket) = self.live(place, generation) else {
                self.order.pop_front();
                continue;
            };
            if now.saturating_sub(ticket.since) <= deadline {
                break;
            }
            ticket.overdue = true;
            newly += 1;
            self.order.pop_front();
            self.late.push_back((place, generation));
        }
        let oldest = self.late.front().or(self.order.front()).copied();
        let since = oldest.and_then(|(p, g)| self.live(p, g).map(|t| t.since));
        Overdue {
            newly,
            oldest: since.map_or(0, |s| now.saturating_sub(s)),
        }
    }

    /// Takes all tickets: nothing of them comes back any more.
    pub(super) fn clear(&mut self, mut each: impl FnMut(Ticket)) {
        self.order.clear();
        self.late.clear();
        self.jobs = 0;
        for (place, ticket) in (0u32..).zip(&mut self.list) {
            if std::mem::replace(&mut ticket.used, false) {
                self.free.push(place);
                each(ticket.clone());
            }
        }
    }

    fn live(&mut self, place: u32, generation: u32) -> Option<&mut Ticket> {
        let ticket = self.list.get_mut(place as usize)?;
        (ticket.used && ticket.generation == generation).then_some(ticket)
    }

    /// Forgets what has come back at the head of both lines.
    fn pass(&mut self) {
        let Tickets {
            list, order, late, ..
        } = self;
        for line in [order, late] {
            while let Some(&(place, generation)) = line.front() {
                let ticket = list.get(place as usize);
                if ticket.is_some_and(|t| t.used && t.generation == generation) {
                    break;
                }
                line.pop_front();
            }
        }
    }
}

fn split(tag: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = tag.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}
