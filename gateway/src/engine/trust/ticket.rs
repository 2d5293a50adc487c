//! What is known of jobs while the driver has them, kept apart from what it gives back.
//!
//! A job goes in with the number of its ticket for a tag. What comes back is held against the ticket: whatever a driver makes
//! of a job, the caller gets it back as it was.

use std::collections::VecDeque;

use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::frame::Frame;
use sa_store::sa::{OffloadMode, SaId};

use super::canary::Flown;

/// The line is at most so many times as long as what is in the engine.
const HOLES: usize = 4;
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
#[derive(Debug)]
pub(super) struct Tickets {
    /// In order of submission, from number `head` on; what has come back is passed over.
    line: VecDeque<Option<Ticket>>,
    head: u32,
    /// Goes up with each ticket taken back from the end, whose number is given again.
    generation: u32,
    /// Those at its head that keep others waiting, by their tags and in order: overdue ones, then slow ones.
    aside: Vec<(u64, Ticket)>,
    /// How many of them are overdue.
    late: usize,
    all: usize,
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
    /// None.
    pub(super) fn new() -> Tickets {
        Tickets {
            line: VecDeque::new(),
            head: 0,
            // Not 0: tags are no small numbers, which others may make up.
            generation: 1,
            aside: Vec::new(),
            late: 0,
            all: 0,
            jobs: 0,
        }
    }

    /// Keeps a ticket; its number is the tag that the job goes in with.
    #[inline]
    pub(super) fn issue(&mut self, mut ticket: Ticket) -> u64 {
        self.all += 1;
        self.jobs += usize::from(ticket.canary.is_none());
        // A lost job must not make the line grow until its deadline.
        if self.line.len() > HOLES * self.all.max(64) {
            self.put_aside();
        }
        ticket.generation = self.generation;
        // No more are in an engine than have room in it.
        let behind = u32::try_from(self.line.len()).unwrap_or(u32::MAX);
        self.line.push_back(Some(ticket));
        let number = self.head.wrapping_add(behind);
        u64::from(self.generation) << 32 | u64::from(number)
    }

    /// Takes the ticket of a tag, once.
    #[inline]
    pub(super) fn take(&mut self, tag: u64) -> Option<Ticket> {
        let (number, generation) = split(tag);
        let place = number.wrapping_sub(self.head) as usize;
        let ticket = match self.line.get_mut(place) {
            Some(slot) => slot.take_if(|t| t.generation == generation)?,
            None => self.take_aside(tag)?,
        };
        self.all -= 1;
        self.jobs -= usize::from(ticket.canary.is_none());
        self.pass();
        Some(ticket)
    }

    #[cold]
    fn take_aside(&mut self, tag: u64) -> Option<Ticket> {
        let at = self.aside.iter().position(|(t, _)| *t == tag)?;
        self.late -= usize::from(at < self.late);
        Some(self.aside.remove(at).1)
    }

    /// Takes the ticket at the head out of the line, if there is one, and what has come back behind it.
    #[cold]
    fn put_aside(&mut self) {
        if let Some(ticket) = self.line.front_mut().and_then(Option::take) {
            let tag = u64::from(ticket.generation) << 32 | u64::from(self.head);
            self.aside.push((tag, ticket));
        }
        self.pass();
    }

    /// Takes back the ticket of a job that was not accepted, which is the one issued last or close to it.
    pub(super) fn undo(&mut self, tag: u64) -> Option<Ticket> {
        let ticket = self.take(tag)?;
        while let Some(None) = self.line.back() {
            self.line.pop_back();
        }
        self.generation = self.generation.wrapping_add(1);
        Some(ticket)
    }

    /// The caller's jobs in the engine.
    pub(super) fn jobs(&self) -> usize {
        self.jobs
    }

    /// All that is in the engine, canaries too.
    pub(super) fn all(&self) -> usize {
        self.all
    }

    /// Looks for jobs older than `deadline`.
    pub(super) fn overdue(&mut self, now: u64, deadline: u64) -> Overdue {
        let is_due = |t: &Ticket| now.saturating_sub(t.since) > deadline;
        while let Some(front) = self.line.front() {
            if front.as_ref().is_some_and(|t| !is_due(t)) {
                break;
            }
            self.put_aside();
        }
        let mut newly = 0;
        while let Some((_, ticket)) = self.aside.get_mut(self.late).filter(|(_, t)| is_due(t)) {
            ticket.overdue = true;
            self.late += 1;
            newly += 1;
        }
        let aside = self.aside.first().map(|(_, t)| t);
        let oldest = aside.or(self.line.front().and_then(Option::as_ref));
        Overdue {
            newly,
            oldest: oldest.map_or(0, |t| now.saturating_sub(t.since)),
        }
    }

    /// Takes all tickets: nothing of them comes back any more.
    pub(super) fn clear(&mut self, mut each: impl FnMut(Ticket)) {
        let behind = u32::try_from(self.line.len()).unwrap_or(u32::MAX);
        self.head = self.head.wrapping_add(behind);
        (self.all, self.jobs, self.late) = (0, 0, 0);
        self.aside.drain(..).for_each(|(_, t)| each(t));
        self.line.drain(..).flatten().for_each(each);
    }

    /// Forgets what has come back at the head of the line.
    #[inline]
    fn pass(&mut self) {
        while let Some(None) = self.line.front() {
            self.line.pop_front();
            self.head = self.head.wrapping_add(1);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn ticket(nth: u64, since: u64) -> Ticket {
        Ticket {
            sa: SaId {
                index: 0,
                generation: 0,
            },
            seq: 0,
            tag: 0,
            note: 0,
            esp_off: 0,
            esp_end: 0,
            next_header: 0,
            kind: JobKind::Seal,
            mode: OffloadMode::Crypto,
            len: 0,
            header: [0; 8],
            iv: [0; 16],
            plain: None,
            nth,
            sample: NO_SAMPLE,
            canary: None,
            since,
            overdue: false,
            generation: 0,
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Issue,
        /// Of those out, and again.
        Take(prop::sample::Index),
        Undo,
        Wait(u64),
        Clear,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Issue),
            3 => any::<prop::sample::Index>().prop_map(Step::Take),
            1 => Just(Step::Undo),
            1 => (0..20u64).prop_map(Step::Wait),
            1 => Just(Step::Clear),
        ]
    }

    proptest! {
        #[test]
        fn each_tag_has_its_own_ticket_once_whatever_is_taken_back_late_or_cleared(
            steps in prop::collection::vec(step(), 0..300),
            head in prop_oneof![Just(0), (u32::MAX - 20)..=u32::MAX],
        ) {
            let mut tickets = Tickets::new();
            tickets.head = head;
            let mut out: BTreeMap<u64, u64> = BTreeMap::new();
            let mut over: Vec<u64> = Vec::new();
            let (mut nth, mut now, mut last) = (0, 0, None);
            for step in steps {
                match step {
                    Step::Issue => {
                        nth += 1;
                        let tag = tickets.issue(ticket(nth, now));
                        prop_assert!(!over.contains(&tag), "never given before");
                        prop_assert_eq!(out.insert(tag, nth), None);
                        last = Some(tag);
                    }
                    Step::Take(of) if !out.is_empty() => {
                        let tag = *of.get(&out.keys().copied().collect::<Vec<_>>());
                        let taken = tickets.take(tag).map(|t| t.nth);
                        prop_assert_eq!(taken, out.remove(&tag));
                        over.push(tag);
                        if last == Some(tag) {
                            last = None;
                        }
                    }
                    Step::Undo => if let Some(tag) = last.take() {
                        let taken = tickets.undo(tag).map(|t| t.nth);
                        prop_assert_eq!(taken, out.remove(&tag));
                        over.push(tag);
                    },
                    Step::Wait(time) => {
                        now += time;
                        let overdue = tickets.overdue(now, 15);
                        prop_assert!(overdue.newly <= out.len() as u64);
                    }
                    Step::Clear => {
                        let mut cleared = Vec::new();
                        tickets.clear(|t| cleared.push(t.nth));
                        cleared.sort_unstable();
                        let mut all: Vec<u64> = out.values().copied().collect();
                        all.sort_unstable();
                        prop_assert_eq!(cleared, all);
                        over.extend(std::mem::take(&mut out).into_keys());
                        last = None;
                    }
                    Step::Take(_) => {}
                }
                prop_assert_eq!(tickets.all(), out.len());
                prop_assert_eq!(tickets.jobs(), out.len());
                if let Some(gone) = over.last() {
                    prop_assert!(tickets.take(*gone).is_none(), "not twice");
                }
                prop_assert!(tickets.take(7).is_none(), "a number that somebody made up");
            }
        }
    }

    #[test]
    fn a_job_that_does_not_come_back_keeps_the_line_no_longer_than_the_engine_is_deep() {
        let mut tickets = Tickets::new();
        let lost = [tickets.issue(ticket(1, 0)), tickets.issue(ticket(2, 0))];
        for nth in 3..100_000 {
            let tag = tickets.issue(ticket(nth, 1));
            assert!(tickets.take(tag).is_some_and(|t| t.nth == nth));
            assert!(tickets.line.len() <= HOLES * 64 + 1);
        }
        assert_eq!(tickets.overdue(60, 100).oldest, 60);
        assert_eq!(tickets.overdue(101, 100).newly, 2);
        assert_eq!(tickets.overdue(102, 100).newly, 0);
        for (tag, nth) in lost.into_iter().zip(1..) {
            assert!(tickets.take(tag).is_some_and(|t| t.nth == nth && t.overdue));
            assert!(tickets.take(tag).is_none());
        }
        assert_eq!(tickets.all(), 0);
    }

    #[test]
    fn jobs_become_overdue_once_and_the_line_goes_on_without_them() {
        let mut tickets = Tickets::new();
        let lost = tickets.issue(ticket(1, 0));
        let tags: Vec<u64> = (0..10).map(|n| tickets.issue(ticket(2 + n, 50))).collect();
        assert_eq!(
            tickets.overdue(101, 100),
            Overdue {
                newly: 1,
                oldest: 101
            }
        );
        assert_eq!(tickets.overdue(102, 100).newly, 0);
        for tag in tags {
            assert!(tickets.take(tag).is_some_and(|t| !t.is_overdue()));
        }
        assert!(
            tickets.line.is_empty(),
            "nothing piles up behind a lost job"
        );
        assert_eq!(tickets.all(), 1);
        assert!(tickets.take(lost).is_some_and(|t| t.is_overdue()));
        assert_eq!(tickets.overdue(1000, 100), Overdue::default());
    }
}
