//! The requests of one SA slot, and to which of them a result belongs.
//!
//! A result names its slot, not its request. Results of one slot come in order, and some get lost, so:
//!
//! - **Outbound** the engine numbers packets one by one, and the driver counts along: the number in the ESP header names the
//!   request. Requests before it were lost. A number that was seen already is a late or doubled result. A number that fits
//!   no request means that driver and engine count differently (a request was lost *before* it was numbered): everything
//!   under way is given up, and counting goes on behind the highest number seen.
//! - **Inbound** the content names the request: its first bytes were deciphered before it was submitted (`first`). Requests
//!   before it were lost. A result that is like one that was answered lately is a late or doubled one. One that is like none
//!   is wrong: nobody submitted such a packet. Where first bytes are not to be looked at, it is the oldest request whose length
//!   can be right; a result that is lost or doubled then shifts those behind it until the flow of requests pauses, so that a
//!   packet may be delivered twice and another not at all.

use std::collections::VecDeque;

use super::first::First;
use super::record::{SEQUENCE_END, Shape};
use crate::engine::{EspJob, JobKind};
use crate::qdma::hop::Action;
use sa_store::sa::SaId;

/// Inbound packets that are remembered behind their ends: more than may be in the engine twice over.
const REMEMBERED: usize = 16;

/// A job without its frame, which went into the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) sa: SaId,
    pub(super) seq: u64,
    pub(super) tag: u64,
    pub(super) note: u32,
    pub(super) kind: JobKind,
}

/// A packet in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) meta: Meta,
    /// Tells requests of the engine apart.
    pub(super) id: u64,
    /// Outbound: number that the engine is expected to give.
    number: u64,
    /// Bytes of the IP packet submitted.
    len: u16,
    /// Inbound: what lies inside begins so.
    first: Option<First>,
    /// When, nanoseconds.
    since: u64,
}

/// What a result shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// An ESP packet with this number, of this many bytes with its outer header.
    Sealed { number: u32, outer: u16 },
    /// An inner packet of this many bytes.
    Opened { inner: u16, first: First },
    /// An error, or the news of a lost result.
    Nothing,
}

/// To whom a result belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// To this request: give it on.
    To(Request),
    /// This request failed.
    Failed(Request),
    /// To none that is waiting: late, doubled, or never asked for.
    Orphan,
    /// A number that was seen already. Under a cipher in counter mode this is a repeated IV.
    Repeated,
    /// An inbound packet that nobody submitted.
    Strange,
}

/// Requests of one slot.
#[derive(Debug)]
pub(super) struct Flow {
    shape: Shape,
    outbound: bool,
    under_way: VecDeque<Request>,
    /// First bytes of inbound packets that have ended, the latest last.
    ended: VecDeque<First>,
    pub(super) waiting: VecDeque<EspJob>,
    /// Next number that the engine will give.
    next: u64,
    /// Highest number that it gave.
    seen: u64,
    /// Last number that may be used.
    limit: u64,
    /// Counts differ: no new requests until all are accounted for.
    lost_count: bool,
}

impl Flow {
    pub(super) fn new(shape: Shape, action: Action, first: u32, limit: Option<u64>) -> Flow {
        let end = u64::from(SEQUENCE_END - 1);
        Flow {
            shape,
            outbound: action == Action::Encrypt,
            under_way: VecDeque::with_capacity(8),
            ended: VecDeque::with_capacity(REMEMBERED),
            waiting: VecDeque::new(),
            next: u64::from(first),
            seen: u64::from(first) - 1,
            limit: limit.map_or(end, |n| n.min(end)),
            lost_count: false,
        }
    }

    /// Requests in the engine.
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Outbound: highest number that was seen.
    pub(super) fn reached(&self) -> u64 {
        self.seen
    }

    /// Whether a request may enter the engine now: a place in the window of `most`, and counts agree.
    pub(super) fn is_open(&self, most: u8) -> bool {
        !self.lost_count && self.under_way.len() < usize::from(most)
    }

    /// Whether the next outbound packet would pass the hard limit: all numbers are given, or may be.
    pub(super) fn is_at_limit(&self) -> bool {
        self.outbound && self.next > self.limit
    }

    /// Whether the packet may be submitted at all.
    pub(super) fn takes(&self, len: u16, largest: u16) -> bool {
        let outer = if self.outbound {
            self.shape.smallest_outer(len)
        } else {
            u32::from(len)
        };
        outer <= u32::from(largest)
    }

    /// The packet is in the engine. `first` of inbound ones, if they are to be known by it.
    pub(super) fn submitted(
        &mut self,
        meta: Meta,
        id: u64,
        len: u16,
        first: Option<First>,
        now: u64,
    ) {
        self.under_way.push_back(Request {
            meta,
            id,
            number: self.next,
            len,
            first,
            since: now,
        });
        if self.outbound {
            self.next += 1;
        }
    }

    /// The packet never reached the engine: those behind it get one number less.
    pub(super) fn never_left(&mut self, id: u64) -> Option<Request> {
        let at = self.under_way.iter().position(|r| r.id == id)?;
        let request = self.under_way.remove(at)?;
        if self.outbound {
            for later in self.under_way.range_mut(at..) {
                later.number -= 1;
            }
            self.next -= 1;
        }
        self.settle();
        Some(request)
    }

    /// Finds the request that a result belongs to; those that were lost before it go to `lost`.
    pub(super) fn answer(&mut self, seen: Seen, lost: &mut Vec<Request>) -> Answer {
        let answer = match seen {
            Seen::Nothing => self.fail_oldest(),
            Seen::Sealed { number, outer } if self.outbound => self.sealed(number, outer, lost),
            Seen::Opened { inner, first } if !self.outbound => self.opened(inner, &first, lost),
            Seen::Sealed { .. } | Seen::Opened { .. } => self.fail_oldest(),
        };
        self.settle();
        answer
    }

    /// Requests older than `patience` are lost.
    pub(super) fn expire(&mut self, now: u64, patience: u64, lost: &mut Vec<Request>) {
        while let Some(first) = self.under_way.front() {
            if now.saturating_sub(first.since) <= patience {
                break;
            }
            lost.extend(self.pop());
        }
        self.settle();
    }

    /// Gives up everything that is in the engine.
    pub(super) fn abandon(&mut self, lost: &mut Vec<Request>) {
        lost.extend(self.under_way.drain(..));
    }

    fn sealed(&mut self, number: u32, outer: u16, lost: &mut Vec<Request>) -> Answer {
        let number = u64::from(number);
        if number <= self.seen {
            return Answer::Repeated;
        }
        self.seen = number;
        let place = self
            .under_way
            .iter()
            .position(|r| r.number == number && self.shape.seals(r.len, outer));
        match place {
            Some(at) if !self.lost_count => self.take(at, lost),
            _ => {
                self.lost_count = true;
                self.fail_oldest()
            }
        }
    }

    fn opened(&mut self, inner: u16, first: &First, lost: &mut Vec<Request>) -> Answer {
        let is = |r: &Request| {
            self.shape.fits(inner, r.len) && r.first.as_ref().is_none_or(|f| f.is(first))
        };
        match self.under_way.iter().position(is) {
            Some(at) => self.take(at, lost),
            None if self.ended.iter().any(|f| f.is(first)) => Answer::Repeated,
            None if self.under_way.iter().any(|r| r.first.is_some()) => Answer::Strange,
            None => Answer::Orphan,
        }
    }

    fn take(&mut self, at: usize, lost: &mut Vec<Request>) -> Answer {
        for _ in 0..at {
            lost.extend(self.pop());
        }
        match self.pop() {
            Some(r) => Answer::To(r),
            None => Answer::Orphan,
        }
    }

    /// The oldest request has ended.
    fn pop(&mut self) -> Option<Request> {
        let request = self.under_way.pop_front()?;
        if let Some(first) = request.first {
            if self.ended.len() >= REMEMBERED {
                self.ended.pop_front();
            }
            self.ended.push_back(first);
        }
        Some(request)
    }

    fn fail_oldest(&mut self) -> Answer {
        match self.pop() {
            Some(r) => Answer::Failed(r),
            None => Answer::Orphan,
        }
    }

    /// With nothing under way counts can be made to agree.
    fn settle(&mut self) {
        if self.lost_count && self.under_way.is_empty() {
            self.next = self.seen + 1;
            self.lost_count = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        udp: false,
        iv: 16,
        icv: 12,
        align: 16,
        least: true,
    };

    fn meta(tag: u64) -> Meta {
        Meta {
            sa: SaId {
                index: 0,
                generation: 0,
            },
            seq: tag,
            tag,
            note: 0,
            kind: JobKind::Seal,
        }
    }

    fn outbound(n: u64) -> Flow {
        let mut f = Flow::new(SHAPE, Action::Encrypt, 1, None);
        for tag in 1..=n {
            f.submitted(meta(tag), tag, 84, None, 0);
        }
        f
    }

    fn sealed(f: &mut Flow, number: u32, outer: u16) -> (Answer, Vec<u64>) {
        let mut lost = Vec::new();
        let answer = f.answer(Seen::Sealed { number, outer }, &mut lost);
        (answer, lost.iter().map(|r| r.id).collect())
    }

    fn id(answer: Answer) -> u64 {
        match answer {
            Answer::To(r) => r.id,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lost_result_does_not_shift_those_behind_it() {
        let mut f = outbound(4);
        assert_eq!(id(sealed(&mut f, 1, 152).0), 1);
        let (answer, lost) = sealed(&mut f, 3, 152);
        assert_eq!((id(answer), lost), (3, vec![2]));
        assert_eq!(sealed(&mut f, 2, 152).0, Answer::Repeated);
        assert_eq!(sealed(&mut f, 3, 152).0, Answer::Repeated);
        assert_eq!(id(sealed(&mut f, 4, 152).0), 4);
        assert_eq!(sealed(&mut f, 5, 152).0, Answer::Orphan);
    }

    #[test]
    fn a_request_that_was_never_numbered_costs_what_is_under_way_and_no_more() {
        let mut f = outbound(4);
        // Number 1 was the packet of request 2: of another length, so it is noticed at once.
        let (answer, _) = sealed(&mut f, 1, 312);
        assert!(matches!(answer, Answer::Failed(r) if r.id == 1));
        assert!(!f.is_open(4));
        for number in [2, 3] {
            assert!(matches!(sealed(&mut f, number, 152).0, Answer::Failed(_)));
        }
        let mut lost = Vec::new();
        f.expire(2_000, 1_000, &mut lost);
        assert_eq!(lost.len(), 1);
        assert!(f.is_open(4));
        f.submitted(meta(9), 9, 84, None, 0);
        assert_eq!(id(sealed(&mut f, 4, 152).0), 9);
    }

    #[test]
    fn a_late_result_is_not_taken_for_another_request() {
        let mut f = outbound(1);
        let mut lost = Vec::new();
        f.expire(2_000, 1_000, &mut lost);
        assert_eq!(lost.len(), 1);
        f.submitted(meta(2), 2, 84, None, 2_000);
        // The expired one's result comes: request 2 fails, nothing is given on.
        assert!(matches!(sealed(&mut f, 1, 152).0, Answer::Failed(r) if r.id == 2));
        assert_eq!(sealed(&mut f, 2, 152).0, Answer::Orphan);
        f.submitted(meta(3), 3, 84, None, 2_000);
        assert_eq!(id(sealed(&mut f, 3, 152).0), 3);
    }

    #[test]
    fn a_request_that_the_ring_dropped_takes_no_number() {
        let mut f = outbound(3);
        assert_eq!(f.never_left(2).unwrap().id, 2);
        assert!(f.never_left(2).is_none());
        assert_eq!(id(sealed(&mut f, 1, 152).0), 1);
        assert_eq!(id(sealed(&mut f, 2, 152).0), 3);
        f.submitted(meta(4), 4, 84, None, 0);
        assert_eq!(id(sealed(&mut f, 3, 152).0), 4);
    }

    #[test]
    fn the_hard_limit_is_exact() {
        let mut f = Flow::new(SHAPE, Action::Encrypt, 1, Some(3));
        for tag in 1..=3 {
            assert!(!f.is_at_limit());
            f.submitted(meta(tag), tag, 84, None, 0);
        }
        assert!(f.is_at_limit());
        // One of them never got its number: it may be used still.
        f.never_left(3);
        assert!(!f.is_at_limit());
        let mut end = Flow::new(SHAPE, Action::Encrypt, SEQUENCE_END - 1, None);
        assert!(!end.is_at_limit());
        end.submitted(meta(1), 1, 84, None, 0);
        assert!(end.is_at_limit());
        let inbound = Flow::new(SHAPE, Action::Decrypt, SEQUENCE_END, None);
        assert!(!inbound.is_at_limit());
    }

    /// An inbound packet whose content is `n`.
    fn open(n: u8) -> First {
        First::of(&[&[0x45; 20][..], &[n; 44]].concat())
    }

    fn inbound(packets: &[(u64, u16, u8)]) -> Flow {
        let mut f = Flow::new(SHAPE, Action::Decrypt, 1, None);
        for (tag, outer, n) in packets {
            f.submitted(meta(*tag), *tag, *outer, Some(open(*n)), 0);
        }
        f
    }

    fn opened(f: &mut Flow, inner: u16, n: u8) -> (Answer, Vec<u64>) {
        let mut lost = Vec::new();
        let first = open(n);
        let answer = f.answer(Seen::Opened { inner, first }, &mut lost);
        (answer, lost.iter().map(|r| r.id).collect())
    }

    #[test]
    fn an_inbound_result_goes_to_the_packet_that_it_was() {
        let mut f = inbound(&[(1, 152, 1), (2, 152, 2), (3, 152, 3)]);
        let (answer, lost) = opened(&mut f, 84, 2);
        assert_eq!((id(answer), lost), (2, vec![1]));
        // Late, and twice: neither is given on in another's place.
        assert_eq!(opened(&mut f, 84, 1).0, Answer::Repeated);
        assert_eq!(opened(&mut f, 84, 2).0, Answer::Repeated);
        assert_eq!(id(opened(&mut f, 84, 3).0), 3);
        assert_eq!(opened(&mut f, 84, 3).0, Answer::Repeated);
        assert_eq!(
            opened(&mut f, 84, 9).0,
            Answer::Orphan,
            "with nothing under way"
        );
    }

    #[test]
    fn an_inbound_packet_that_nobody_submitted_is_strange() {
        let mut f = inbound(&[(1, 152, 1)]);
        assert_eq!(opened(&mut f, 84, 7).0, Answer::Strange);
        assert_eq!(opened(&mut f, 1400, 1).0, Answer::Strange, "another length");
        assert_eq!(id(opened(&mut f, 84, 1).0), 1);
    }

    #[test]
    fn a_packet_that_was_failed_in_anothers_place_is_known_when_it_comes() {
        let mut f = inbound(&[(1, 152, 1), (2, 152, 2)]);
        let mut lost = Vec::new();
        // The error was of a packet that had been answered.
        assert!(matches!(f.answer(Seen::Nothing, &mut lost), Answer::Failed(r) if r.id == 1));
        assert_eq!(opened(&mut f, 84, 1).0, Answer::Repeated);
        f.expire(2_000, 1_000, &mut lost);
        assert_eq!(opened(&mut f, 84, 2).0, Answer::Repeated);
        assert_eq!(f.answer(Seen::Nothing, &mut lost), Answer::Orphan);
    }

    #[test]
    fn without_first_bytes_inbound_results_go_to_the_oldest_request_that_can_have_them() {
        let mut f = Flow::new(SHAPE, Action::Decrypt, 1, None);
        for (tag, outer) in [(1, 152), (2, 1480), (3, 152)] {
            f.submitted(meta(tag), tag, outer, None, 0);
        }
        let (answer, lost) = opened(&mut f, 1400, 0);
        assert_eq!((id(answer), lost), (2, vec![1]));
        assert_eq!(opened(&mut f, 1400, 0).0, Answer::Orphan);
    }

    proptest::proptest! {
        /// Whatever numbers and lengths a device invents, no request is answered twice, none is forgotten, and what is given
        /// on has the number that the engine must have given it.
        #[test]
        fn every_request_ends_exactly_once(
            steps in proptest::collection::vec((0u8..6, 0u32..40, 0u16..400), 1..200),
        ) {
            let mut f = Flow::new(SHAPE, Action::Encrypt, 1, None);
            let (mut next, mut ended, mut now) = (1, Vec::new(), 0);
            for (kind, number, outer) in steps {
                let mut lost = Vec::new();
                now += 1;
                match kind {
                    0 | 1 if f.is_open(4) => {
                        f.submitted(meta(next), next, 84, None, now);
                        next += 1;
                    }
                    2 => f.expire(now, 20, &mut lost),
                    3 => ended.extend(f.never_left(u64::from(number)).map(|r| r.id)),
                    4 => match f.answer(Seen::Nothing, &mut lost) {
                        Answer::Failed(r) => ended.push(r.id),
                        other => proptest::prop_assert_eq!(other, Answer::Orphan),
                    },
                    _ => match f.answer(Seen::Sealed { number, outer }, &mut lost) {
                        Answer::To(r) => {
                            proptest::prop_assert_eq!(r.number, u64::from(number));
                            ended.push(r.id);
                        }
                        Answer::Failed(r) => ended.push(r.id),
                        Answer::Orphan | Answer::Repeated | Answer::Strange => {}
                    },
                }
                ended.extend(lost.iter().map(|r| r.id));
            }
            let mut rest = Vec::new();
            f.abandon(&mut rest);
            ended.extend(rest.iter().map(|r| r.id));
            ended.sort_unstable();
            proptest::prop_assert_eq!(ended, (1..next).collect::<Vec<_>>());
        }
    }
}
