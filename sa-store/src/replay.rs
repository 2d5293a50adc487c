//! Anti-replay window, RFC 4303 section 3.4.3 and appendix A, in a bitmap that does not shift (RFC 6479).
//!
//! ```text
//!   the bitmap is a ring of 64-bit words, at least one word more than the window needs:
//!
//!        left edge                      top (highest authenticated number)
//!            |<------- window ---------->|
//!   ...11111 1101111111111111111111110111 00000000 ...
//!    too old  inside: test the bit        right: new; a word is cleared when it is entered
//! ```
//!
//! Bits that stand for numbers before the first one are set from the start, so that a bit that is zero
//! when its word is recycled is a packet that was lost. One thread, the SA's owner, writes; others may read
//! [`top`](ReplayWindow::top) and [`lost`](ReplayWindow::lost).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::counters::Counter;

/// Verdict on a sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay {
    /// Not seen and not too old: the number with its inferred high half.
    Fresh(u64),
    /// Seen before.
    Duplicate,
    /// Left of the window.
    Old,
    /// 0, or beyond the end of the sequence space.
    Invalid,
}

/// Largest window, packets.
pub const MAX_WINDOW: u32 = 1 << 20;
/// Consecutive ICV failures after which another high half is tried now and then (RFC 4303 appendix A3).
const RESYNC_AFTER: u64 = 128;
/// One packet in this many is spent on a trial while failures go on.
const RESYNC_EVERY: u64 = 16;
/// How many high halves ahead are tried, in turn. Bounds what a forger can make us compute: nothing, as each
/// trial replaces the ordinary attempt on that packet.
const RESYNC_AHEAD: u64 = 4;
/// Low halves this far ahead of the top are what a peer in step sends: no trial is spent on them, so that a flood
/// of replays costs no good packet. A peer that is truly out of step leaves this range by itself.
const RESYNC_NEAR: u32 = 1 << 20;

/// The window of one inbound SA.
#[derive(Debug)]
pub struct ReplayWindow {
    top: AtomicU64,
    lost: Counter,
    failures: AtomicU64,
    size: u64,
    esn: bool,
    words: Box<[AtomicU64]>,
}

impl ReplayWindow {
    /// A window of `size` packets (0: anti-replay off) on a fresh SA. `size` is cut to [`MAX_WINDOW`].
    pub fn new(size: u32, esn: bool) -> Self {
        Self::resume(size, esn, 0)
    }

    /// A window whose numbers up to `top` all count as seen: after a restart.
    pub fn resume(size: u32, esn: bool, top: u64) -> Self {
        let size = u64::from(size.min(MAX_WINDOW));
        let count = if size == 0 {
            0
        } else {
            (size.div_ceil(64) + 1).next_power_of_two()
        };
        let words: Box<[AtomicU64]> = (0..count).map(|_| AtomicU64::new(u64::MAX)).collect();
        let window = Self {
            top: AtomicU64::new(top),
            lost: Counter::default(),
            failures: AtomicU64::new(0),
            size,
            esn,
            words,
        };
        if size != 0 {
            let upto = u64::MAX >> (63 - top % 64);
            window.word(top / 64).store(upto, Relaxed);
        }
        window
    }

    /// Highest number accepted so far, 0 before the first. With ESN the high half is its upper 32 bits.
    pub fn top(&self) -> u64 {
        self.top.load(Relaxed)
    }

    /// Numbers that left the window's memory without having been seen.
    pub fn lost(&self) -> u64 {
        self.lost.value()
    }

    /// Window size in packets.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the packet with low half `seq_lo` stands. Cheap; called before the ICV is checked, moves nothing.
    #[inline]
    pub fn check(&self, seq_lo: u32) -> Replay {
        let seq = match self.infer(seq_lo) {
            Some(seq) if seq != 0 => seq,
            Some(_) => return Replay::Invalid,
            None => return Replay::Old,
        };
        self.position(seq)
    }

    /// Asks the CPU to fetch the word that [`check`](Self::check) of this low half will read.
    #[inline(always)]
    pub fn prefetch(&self, seq_lo: u32) {
        // High halves do not matter: the ring is shorter than 2^32 numbers.
        if self.size != 0 {
            crate::prefetch::read(self.word(u64::from(seq_lo) / 64));
        }
    }

    /// Test-and-set of an authenticated number: the second of two copies in one burst is refused here.
    #[inline]
    pub fn commit(&self, seq: u64) -> Replay {
        self.failures.store(0, Relaxed);
        if self.size == 0 {
            if seq > self.top() {
                self.top.store(seq, Relaxed);
            }
            return Replay::Fresh(seq);
        }
        match self.position(seq) {
            Replay::Fresh(seq) => {
                if seq > self.top() {
                    self.advance(seq);
                }
                let word = self.word(seq / 64);
                word.store(word.load(Relaxed) | 1 << (seq % 64), Relaxed);
                Replay::Fresh(seq)
            }
            refused => refused,
        }
    }

    /// Reports a wrong ICV: after many in a row with ESN, [`check`](Self::check) tries other high halves.
    pub fn icv_failed(&self) {
        self.failures
            .store(self.failures.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// RFC 4303 appendix A2.2; `None` when the number lies before the start of the space.
    #[inline]
    fn infer(&self, seq_lo: u32) -> Option<u64> {
        if !self.esn {
            return Some(u64::from(seq_lo));
        }
        let top = self.top();
        let (top_hi, top_lo) = (top >> 32, top & 0xffff_ffff);
        // Without a window the numbers still need a reference: half the space on either side.
        let window = if self.size == 0 { 1 << 31 } else { self.size };
        let lo = u64::from(seq_lo);
        let hi = if top_lo >= window - 1 {
            // Case A: the window lies within one subspace. Its left edge may be 0, so no subtraction.
            if lo + window > top_lo {
                Some(top_hi)
            } else {
                top_hi.checked_add(1)
            }
        } else if lo > (top_lo + (1 << 32)) - window {
            // Case B: the window spans two subspaces.
            top_hi.checked_sub(1)
        } else {
            Some(top_hi)
        };
        let failures = self.failures.load(Relaxed);
        if failures >= RESYNC_AFTER
            && failures.is_multiple_of(RESYNC_EVERY)
            && !self.is_near(seq_lo)
        {
            // Results of a burst come together, long after its checks: count the trial now, or the whole burst is one.
            self.failures.store(failures.wrapping_add(1), Relaxed);
            let ahead = 1 + failures / RESYNC_EVERY % RESYNC_AHEAD;
            return hi
                .unwrap_or(top_hi)
                .checked_add(ahead)
                .filter(|h| *h <= 0xffff_ffff)
                .map(|h| h << 32 | lo);
        }
        hi.filter(|h| *h <= 0xffff_ffff).map(|h| h << 32 | lo)
    }

    fn is_near(&self, seq_lo: u32) -> bool {
        #[allow(clippy::cast_possible_truncation, reason = "the low half")]
        let top_lo = self.top() as u32;
        seq_lo.wrapping_sub(top_lo) <= RESYNC_NEAR
    }

    #[inline]
    fn position(&self, seq: u64) -> Replay {
        let top = self.top();
        if seq > top || self.size == 0 {
            return Replay::Fresh(seq);
        }
        if top - seq >= self.size {
            return Replay::Old;
        }
        if self.word(seq / 64).load(Relaxed) >> (seq % 64) & 1 == 1 {
            return Replay::Duplicate;
        }
        Replay::Fresh(seq)
    }

    #[inline(always)]
    fn word(&self, number: u64) -> &AtomicU64 {
        // The length is a power of two, so the masked value is a valid index.
        let mask = self.words.len() - 1;
        #[allow(
            clippy::cast_possible_truncation,
            reason = "masked to the length of a slice"
        )]
        &self.words[number as usize & mask]
    }

    /// Moves the top to `seq`, clearing each word that is entered and counting the holes it held.
    fn advance(&self, seq: u64) {
        let (from, to) = (self.top() / 64, seq / 64);
        let ring = self.words.len() as u64;
        let steps = to - from;
        let mut lost = 0;
        for number in from + 1..=from + steps.min(ring) {
            let word = self.word(number);
            lost += u64::from(word.load(Relaxed).count_zeros());
            word.store(0, Relaxed);
        }
        if steps > ring {
            // Words that were skipped altogether.
            lost += (steps - ring) * 64;
        }
        if lost != 0 {
            self.lost.add(lost);
        }
        self.top.store(seq, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn accept(w: &ReplayWindow, lo: u32) -> Replay {
        match w.check(lo) {
            Replay::Fresh(seq) => w.commit(seq),
            refused => refused,
        }
    }

    #[test]
    fn zero_is_invalid_and_one_is_first() {
        for esn in [false, true] {
            let w = ReplayWindow::new(64, esn);
            assert_eq!(w.check(0), Replay::Invalid);
            assert_eq!(accept(&w, 1), Replay::Fresh(1));
            assert_eq!(accept(&w, 1), Replay::Duplicate);
        }
    }

    #[test]
    fn window_edges_are_exact() {
        for size in [32_u32, 64, 128, 1024, 65536, 131_072] {
            let w = ReplayWindow::new(size, false);
            let top = size * 3 + 7;
            assert_eq!(accept(&w, top), Replay::Fresh(u64::from(top)));
            assert_eq!(w.check(top - size), Replay::Old, "{size}");
            assert_eq!(
                accept(&w, top - size + 1),
                Replay::Fresh(u64::from(top - size + 1))
            );
            assert_eq!(w.check(top - size + 1), Replay::Duplicate);
        }
    }

    #[test]
    fn esn_wraps_the_low_half_and_takes_late_packets_of_the_old_subspace() {
        let w = ReplayWindow::resume(64, true, 0xffff_ffff - 3);
        assert_eq!(accept(&w, 0xffff_ffff), Replay::Fresh(0xffff_ffff));
        assert_eq!(accept(&w, 2), Replay::Fresh(0x1_0000_0002));
        assert_eq!(accept(&w, 0xffff_fffe), Replay::Fresh(0xffff_fffe));
        assert_eq!(accept(&w, 0xffff_fffe), Replay::Duplicate);
        assert_eq!(accept(&w, 0), Replay::Fresh(0x1_0000_0000));
    }

    #[test]
    fn esn_numbers_one_by_one_pass_the_point_where_the_window_fills() {
        for size in [32_u32, 64, 1024, 4096] {
            for start in [0_u64, 7 << 32] {
                let w = ReplayWindow::resume(size, true, start);
                for n in start + 1..=start + u64::from(size) * 3 {
                    let lo = u32::try_from(n & 0xffff_ffff).unwrap();
                    assert_eq!(accept(&w, lo), Replay::Fresh(n), "window {size}");
                    assert_eq!(accept(&w, lo), Replay::Duplicate);
                }
            }
        }
    }

    #[test]
    fn esn_before_the_start_of_the_space_is_old() {
        let w = ReplayWindow::new(64, true);
        assert_eq!(accept(&w, 5), Replay::Fresh(5));
        assert_eq!(w.check(0xffff_fff0), Replay::Old);
    }

    #[test]
    fn a_checked_but_unauthenticated_number_moves_nothing() {
        let w = ReplayWindow::new(64, false);
        accept(&w, 10);
        assert_eq!(w.check(1_000_000), Replay::Fresh(1_000_000));
        assert_eq!(w.top(), 10);
        assert_eq!(accept(&w, 11), Replay::Fresh(11));
    }

    #[test]
    fn holes_are_counted_once_they_cannot_be_filled() {
        let w = ReplayWindow::new(64, false);
        for n in 1..=1000_u32 {
            if n % 10 != 0 {
                accept(&w, n);
            }
        }
        accept(&w, 1_000_000);
        accept(&w, 2_000_000);
        // Everything between 1001 and 999_999 plus the 100 tenths; the last two words are still open.
        let settled = (2_000_000 / 64 - 1) * 64;
        let seen_before = 900 + 1;
        assert_eq!(
            w.lost(),
            settled - 1 - seen_before - 64 * (w.words.len() as u64 - 2)
        );
    }

    #[test]
    fn resume_refuses_everything_up_to_the_edge() {
        let w = ReplayWindow::resume(1024, true, 0x5_0000_1234);
        for lo in 0x1234 - 1023..=0x1234_u32 {
            assert_eq!(w.check(lo), Replay::Duplicate);
        }
        assert_eq!(accept(&w, 0x1235), Replay::Fresh(0x5_0000_1235));
        assert_eq!(w.lost(), 0);
    }

    #[test]
    fn resync_tries_later_subspaces_only_after_many_failures() {
        let far = 0x4000_0000;
        let w = ReplayWindow::resume(64, true, 100);
        for _ in 0..RESYNC_AFTER - 1 {
            w.icv_failed();
            assert_eq!(w.check(far), Replay::Fresh(u64::from(far)));
        }
        let mut tried = HashSet::new();
        for _ in 0..RESYNC_EVERY * RESYNC_AHEAD {
            w.icv_failed();
            if let Replay::Fresh(seq) = w.check(far) {
                tried.insert(seq >> 32);
            }
        }
        assert_eq!(tried, (0..=RESYNC_AHEAD).collect());
        let resumed = 2 << 32 | u64::from(far);
        assert_eq!(w.commit(resumed), Replay::Fresh(resumed));
        assert_eq!(w.check(far + 1), Replay::Fresh(resumed + 1));
    }

    #[test]
    fn a_flood_of_old_packets_costs_no_packet_that_is_in_step() {
        let w = ReplayWindow::resume(64, true, 5000);
        for seq in (5001..).take(512) {
            w.icv_failed();
            assert_eq!(w.check(seq), Replay::Fresh(u64::from(seq)));
        }
    }

    #[test]
    fn a_trial_is_spent_on_one_packet_of_a_burst_whose_results_are_still_out() {
        let w = ReplayWindow::resume(64, true, 5000);
        for _ in 0..RESYNC_AFTER {
            w.icv_failed();
        }
        let halves: Vec<u64> = (0..128)
            .filter_map(|n| match w.check(0x4000_0000 + n) {
                Replay::Fresh(seq) => Some(seq >> 32),
                _ => None,
            })
            .collect();
        assert_eq!(halves.iter().filter(|hi| **hi != 0).count(), 1);
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_seen_numbers(
            size in prop::sample::select(vec![32_u32, 64, 128, 256, 4096]),
            esn: bool,
            start in 0_u64..3 << 32,
            steps in prop::collection::vec((-5000_i64..6000, 0_u8..4), 1..400),
        ) {
            let start = if esn { start } else { start & 0x7fff_ffff };
            let w = ReplayWindow::resume(size, esn, start);
            let mut seen: HashSet<u64> = HashSet::new();
            let mut top = start;
            for (delta, scale) in steps {
                // Mostly near the top, at times far ahead.
                let delta = if scale == 0 { delta.abs() * 37 } else { delta % 600 };
                let Some(seq) = top.checked_add_signed(delta) else { continue };
                if seq == 0 || (!esn && seq > 0xffff_ffff) || (esn && top.abs_diff(seq) > 1 << 30) { continue }
                let want = if seq > top { Replay::Fresh(seq) }
                    else if top - seq >= u64::from(size) { Replay::Old }
                    else if seq <= start || seen.contains(&seq) { Replay::Duplicate }
                    else { Replay::Fresh(seq) };
                #[allow(clippy::cast_possible_truncation)]
                let lo = seq as u32;
                let got = accept(&w, lo);
                // A number left of the window of an ESN SA is taken for one of the next subspace and fails its ICV.
                if esn && want == Replay::Old {
                    prop_assert!(w.check(lo) != Replay::Fresh(seq));
                    if let Replay::Fresh(s) = got { top = s; seen.insert(s); }
                    continue;
                }
                prop_assert_eq!(got, want);
                if let Replay::Fresh(s) = got { seen.insert(s); top = top.max(s); }
            }
        }
    }
}
