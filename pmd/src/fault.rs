//! A bad wire in front of any port: loses, doubles, reorders and damages frames by chance, reproducibly.
//!
//! The chances come from a seeded generator, so a run with the same frames in the same bursts has the same faults. Every
//! fault is counted ([`FaultStats`]); per direction, at any moment,
//!
//! ```text
//! frames in + duplicated = frames out + dropped + held
//! ```
//!
//! A reordered frame is held back until 1 to 8 later ones have passed (or the wire is flushed). A copy for a duplicate comes
//! from the pool's spare frames; when there is none, nothing is duplicated.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use sa_store::counters::Counter;

use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{PortQueue, PortQueueStats};

/// Chances of one direction, each from 0 (never) to 1 (always) per frame, drawn independently in this order.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Faults {
    /// Frame lost.
    pub drop: f64,
    /// One bit of the frame, behind its Ethernet header, inverted.
    pub flip: f64,
    /// Frame followed by its copy.
    pub duplicate: f64,
    /// Frame held back.
    pub reorder: f64,
}

/// Faults of one direction, counted.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct DirectionStats {
    /// Frames that entered.
    pub input: Counter,
    /// Frames that left.
    pub output: Counter,
    /// Frames lost; their buffers went back to the pool.
    pub dropped: Counter,
    /// Frames with a bit inverted.
    pub flipped: Counter,
    /// Copies made.
    pub duplicated: Counter,
    /// Frames held back, in total.
    pub reordered: Counter,
    /// Frames held back or waiting for room now (a level).
    pub held: Counter,
}

/// Faults of one queue pair, counted; read by anybody.
#[derive(Debug, Default)]
pub struct FaultStats {
    /// Towards us.
    pub rx: DirectionStats,
    /// From us.
    pub tx: DirectionStats,
}

/// A queue pair behind a bad wire.
pub struct FaultQueue {
    inner: Box<dyn PortQueue>,
    rx: Wire,
    tx: Wire,
    scratch: Vec<Frame>,
    /// Frames that have passed the wire and were not asked for yet.
    arrived: Vec<Frame>,
    /// Frames that have passed the wire and wait for room in the port.
    ready: Vec<Frame>,
    stats: Arc<FaultStats>,
}

/// One direction of a wire.
struct Wire {
    thresholds: [u64; 4],
    random: SplitMix,
    held: VecDeque<(u8, Frame)>,
}

/// Most frames that one direction holds back.
const MOST_HELD: usize = 32;
/// Faults of the link layer itself are not of interest.
const ETHERNET_HEADER: usize = 14;

impl FaultQueue {
    /// Puts a wire with these faults in front of `inner`. Queues of one port should have different seeds.
    pub fn new(inner: Box<dyn PortQueue>, rx: Faults, tx: Faults, seed: u64) -> FaultQueue {
        FaultQueue {
            inner,
            rx: Wire::new(rx, seed),
            tx: Wire::new(tx, !seed),
            scratch: Vec::new(),
            arrived: Vec::new(),
            ready: Vec::new(),
            stats: Arc::default(),
        }
    }

    /// The counters of faults, to keep.
    pub fn faults(&self) -> &Arc<FaultStats> {
        &self.stats
    }

    /// Sends what has passed the wire.
    fn push(&mut self, pool: &mut Pool) {
        self.inner.tx_burst(pool, &mut self.ready);
        self.note_tx();
    }

    fn note_tx(&self) {
        let waiting = self.tx.held.len() + self.ready.len();
        let stats = &self.stats.tx;
        stats.held.set(waiting as u64);
        stats.output.set(
            (stats.input.value() + stats.duplicated.value())
                .saturating_sub(stats.dropped.value() + waiting as u64),
        );
    }

    fn note_rx(&self, out: usize) {
        self.stats.rx.output.add(out as u64);
        let waiting = self.rx.held.len() + self.arrived.len();
        self.stats.rx.held.set(waiting as u64);
    }
}

impl PortQueue for FaultQueue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        if self.arrived.is_empty() {
            self.inner.rx_burst(pool, &mut self.scratch, max);
            if self.scratch.is_empty() {
                // Nothing follows that could overtake: what is held goes on.
                self.arrived.extend(self.rx.held.drain(..).map(|(_, f)| f));
            }
            for frame in self.scratch.drain(..) {
                self.rx.pass(frame, pool, &mut self.arrived, &self.stats.rx);
            }
        }
        // Copies and frames held before may make more than was asked for.
        let n = max.min(self.arrived.len());
        out.extend(self.arrived.drain(..n));
        self.note_rx(n);
        n
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if !self.ready.is_empty() {
            self.push(pool);
        }
        if !self.ready.is_empty() {
            // The port is full: what it could not take of the last burst goes first.
            return 0;
        }
        let n = frames.len();
        for frame in frames.drain(..) {
            self.tx.pass(frame, pool, &mut self.ready, &self.stats.tx);
        }
        self.push(pool);
        n
    }

    fn flush(&mut self, pool: &mut Pool) {
        self.ready.extend(self.tx.held.drain(..).map(|(_, f)| f));
        self.push(pool);
        self.inner.flush(pool);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wait_fd()
    }

    fn arm(&mut self) {
        self.inner.arm();
    }

    fn finished(&self) -> bool {
        self.inner.finished() && self.rx.held.is_empty() && self.arrived.is_empty()
    }

    /// The port's own counters: what it received and sent, beyond the wire.
    fn stats(&self) -> &Arc<PortQueueStats> {
        self.inner.stats()
    }

    fn drain(&mut self, pool: &mut Pool) {
        self.flush(pool);
        // What still finds no room, and what was received and held, is lost to the wire.
        let lost = self.ready.len() as u64;
        pool.put_bulk(&mut self.ready);
        self.stats.tx.dropped.add(lost);
        self.note_tx();
        self.arrived.extend(self.rx.held.drain(..).map(|(_, f)| f));
        self.stats.rx.dropped.add(self.arrived.len() as u64);
        pool.put_bulk(&mut self.arrived);
        self.note_rx(0);
        self.inner.drain(pool);
    }
}

impl Drop for FaultQueue {
    fn drop(&mut self) {
        let held = self.rx.held.drain(..).chain(self.tx.held.drain(..));
        let passed = self.ready.drain(..).chain(self.arrived.drain(..));
        for frame in held.map(|(_, f)| f).chain(passed) {
            frame.give_back();
        }
    }
}

impl Wire {
    fn new(faults: Faults, seed: u64) -> Wire {
        Wire {
            thresholds: [faults.drop, faults.flip, faults.duplicate, faults.reorder].map(threshold),
            random: SplitMix(seed),
            held: VecDeque::new(),
        }
    }

    /// Lets one frame pass, with its faults, behind what is in `out`.
    fn pass(
        &mut self,
        mut frame: Frame,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        stats: &DirectionStats,
    ) {
        stats.input.add(1);
        // Always four draws, so that one fault's chance does not change when another strikes.
        let [drop, flip, duplicate, reorder] = self.thresholds.map(|t| self.random.next() < t);
        if drop {
            stats.dropped.add(1);
            pool.put(frame);
            return;
        }
        if flip && self.flip_bit(&mut frame) {
            stats.flipped.add(1);
        }
        let copy = if duplicate { copy(&frame, pool) } else { None };
        stats.duplicated.add(u64::from(copy.is_some()));
        if reorder && self.held.len() < MOST_HELD {
            stats.reordered.add(1);
            let distance = 1 + self.random.next().to_le_bytes()[0] % 8;
            self.held.push_back((distance, frame));
        } else {
            out.push(frame);
            self.age(out);
        }
        out.extend(copy);
    }

    /// One frame has passed: those held back come nearer.
    fn age(&mut self, out: &mut Vec<Frame>) {
        for (left, _) in &mut self.held {
            *left = left.saturating_sub(1);
        }
        while let Some((0, _)) = self.held.front() {
            out.extend(self.held.pop_front().map(|(_, f)| f));
        }
    }

    fn flip_bit(&mut self, frame: &mut Frame) -> bool {
        let random = self.random.next();
        let Some(bytes) = frame.data_mut().get_mut(ETHERNET_HEADER..) else {
            return false;
        };
        if bytes.is_empty() {
            return false;
        }
        let at = usize::try_from((random >> 3) % bytes.len() as u64).unwrap_or(0);
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= 1 << (random & 7);
        }
        true
    }
}

fn copy(frame: &Frame, pool: &mut Pool) -> Option<Frame> {
    let mut copy = pool.get_spare()?;
    if copy.set_data(frame.data()) {
        return Some(copy);
    }
    pool.put(copy);
    None
}

/// The random numbers below which a fault of this chance strikes.
fn threshold(chance: f64) -> u64 {
    // Two halves: 2^64 itself is no u64.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=2^32; a NaN becomes 0"
    )]
    let scaled = (chance.clamp(0.0, 1.0) * 4_294_967_296.0) as u64;
    scaled.saturating_mul(1 << 32)
}

/// The splitmix64 generator: not for secrets, but even, quick, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, ArenaConfig};
    use crate::memory::{MemoryQueue, PairConfig, pair};
    use crate::port::BURST;
    use proptest::prelude::*;

    struct Bed {
        arena: Arc<Arena>,
        pool: Pool,
        bad: FaultQueue,
        far: MemoryQueue,
    }

    fn bed(rx: Faults, tx: Faults, seed: u64, ring: usize) -> Bed {
        let arena = Arena::new(ArenaConfig {
            frames: 1024,
            stride: 512,
            ..ArenaConfig::default()
        })
        .unwrap();
        let config = PairConfig {
            ring,
            ..PairConfig::default()
        };
        let (a, b) = pair("a", "b", &config);
        let near = a.open(1, &arena).unwrap().remove(0);
        let far = b.open(1, &arena).unwrap().remove(0);
        Bed {
            pool: Pool::new(&arena, 32),
            bad: FaultQueue::new(Box::new(near), rx, tx, seed),
            far,
            arena,
        }
    }

    fn packet(i: u32) -> [u8; 60] {
        let mut p = [0; 60];
        p[56..].copy_from_slice(&i.to_be_bytes());
        p
    }

    impl Bed {
        fn frames(&mut self, from: u32, n: u32) -> Vec<Frame> {
            (from..from + n)
                .map(|i| {
                    let mut f = self.pool.get().unwrap();
                    assert!(f.set_data(&packet(i)));
                    f
                })
                .collect()
        }

        /// Sends `n` frames through the wire and returns what comes out, flushed.
        fn send(&mut self, n: u32) -> Vec<Vec<u8>> {
            let mut all = Vec::new();
            let mut next = 0;
            let mut frames = Vec::new();
            loop {
                if frames.is_empty() && next < n {
                    let k = 32.min(n - next);
                    frames = self.frames(next, k);
                    next += k;
                }
                self.bad.tx_burst(&mut self.pool, &mut frames);
                if frames.is_empty() && next == n {
                    self.bad.flush(&mut self.pool);
                }
                let mut got = Vec::new();
                while self.far.rx_burst(&mut self.pool, &mut got, BURST) > 0 {}
                all.extend(got.iter().map(|f| f.data().to_vec()));
                self.pool.put_bulk(&mut got);
                if frames.is_empty() && next == n && self.bad.stats.tx.held.value() == 0 {
                    return all;
                }
            }
        }
    }

    fn balanced(s: &DirectionStats) -> bool {
        s.input.value() + s.duplicated.value()
            == s.output.value() + s.dropped.value() + s.held.value()
    }

    #[test]
    fn a_wire_without_faults_changes_nothing() {
        let mut bed = bed(Faults::default(), Faults::default(), 1, 8);
        let got = bed.send(200);
        assert_eq!(
            got,
            (0..200).map(|i| packet(i).to_vec()).collect::<Vec<_>>()
        );
    }

    #[test]
    fn each_fault_strikes_about_as_often_as_asked_and_alone() {
        let n = 4000;
        let near = |count: u64| (800..1200).contains(&count);
        let run = |faults| {
            let mut bed = bed(Faults::default(), faults, 7, 256);
            let got = bed.send(n);
            let stats = Arc::clone(bed.bad.faults());
            bed.bad.drain(&mut bed.pool);
            assert!(balanced(&stats.tx));
            assert_eq!(bed.arena.outstanding(), 0);
            (got, stats)
        };
        let sent: Vec<Vec<u8>> = (0..n).map(|i| packet(i).to_vec()).collect();
        let none = Faults::default();

        let (got, s) = run(Faults { drop: 0.25, ..none });
        assert!(near(s.tx.dropped.value()) && got.is_sorted());
        assert_eq!(got.len() as u64, u64::from(n) - s.tx.dropped.value());

        let (mut got, s) = run(Faults {
            duplicate: 0.25,
            ..none
        });
        assert!(near(s.tx.duplicated.value()));
        assert_eq!(got.len() as u64, u64::from(n) + s.tx.duplicated.value());
        got.dedup();
        assert_eq!(got, sent);

        let (mut got, s) = run(Faults {
            reorder: 0.25,
            ..none
        });
        assert!(near(s.tx.reordered.value()) && !got.is_sorted());
        got.sort();
        assert_eq!(got, sent);

        let (got, s) = run(Faults { flip: 0.25, ..none });
        assert!(near(s.tx.flipped.value()));
        let bits = |a: &[u8], b: &[u8]| -> u32 {
            a.iter().zip(b).map(|(x, y)| (x ^ y).count_ones()).sum()
        };
        let changed: Vec<u32> = got.iter().zip(&sent).map(|(a, b)| bits(a, b)).collect();
        assert!(changed.iter().all(|&n| n <= 1));
        assert_eq!(
            changed.iter().map(|&n| u64::from(n)).sum::<u64>(),
            s.tx.flipped.value()
        );
        assert!(got.iter().all(|p| p[..14] == [0; 14]));
    }

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let faults = Faults {
            drop: 0.1,
            flip: 0.1,
            duplicate: 0.1,
            reorder: 0.1,
        };
        let run = |seed| bed(Faults::default(), faults, seed, 64).send(500);
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_frame_is_accounted_for_in_both_directions(
            chances in prop::array::uniform4(0.0f64..0.6),
            seed in any::<u64>(),
            ring in 1usize..40,
            steps in prop::collection::vec((0u8..4, 0u32..40), 1..40),
        ) {
            let [drop, flip, duplicate, reorder] = chances;
            let faults = Faults { drop, flip, duplicate, reorder };
            let mut bed = bed(faults, faults, seed, ring);
            let (mut near, mut far, mut got) = (Vec::new(), Vec::new(), Vec::new());
            for (step, n) in steps {
                match step {
                    0 => { near.extend(bed.frames(0, n)); bed.bad.tx_burst(&mut bed.pool, &mut near); }
                    1 => { far.extend(bed.frames(0, n)); bed.far.tx_burst(&mut bed.pool, &mut far); }
                    2 => {
                        let asked = n as usize;
                        let k = bed.bad.rx_burst(&mut bed.pool, &mut got, asked);
                        prop_assert!(k <= asked, "{} of {}", k, asked);
                        prop_assert_eq!(k, got.len());
                    }
                    _ => { bed.far.rx_burst(&mut bed.pool, &mut got, 64); bed.bad.flush(&mut bed.pool); }
                }
                bed.pool.put_bulk(&mut got);
                bed.pool.put_bulk(&mut near);
                bed.pool.put_bulk(&mut far);
                let stats = bed.bad.faults();
                prop_assert!(balanced(&stats.rx) && balanced(&stats.tx), "{:?}", stats);
                prop_assert_eq!(stats.tx.output.value(), bed.bad.stats().tx_packets.value());
                prop_assert_eq!(stats.rx.input.value(), bed.bad.stats().rx_packets.value());
            }
            bed.bad.drain(&mut bed.pool);
            bed.far.drain(&mut bed.pool);
            let stats = bed.bad.faults();
            prop_assert!(balanced(&stats.rx) && balanced(&stats.tx), "{:?}", stats);
            prop_assert_eq!(bed.arena.outstanding(), 0);
        }
    }
}
