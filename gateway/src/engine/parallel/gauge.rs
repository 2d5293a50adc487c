//! When an owner asks for help.

use std::sync::atomic::{AtomicBool, Ordering};

use pmd::BURST;
use pmd::engine::JobKind;

/// A burst of so many jobs is a full one: more are probably waiting.
const FULL: usize = BURST * 3 / 4;
/// One below this shows that the worker keeps up.
const SLACK: usize = BURST / 4;
/// Full bursts in a row after which help is asked for.
const HOT: u8 = 4;
/// Bursts that help goes on after the last full one.
const HOTTEST: u8 = 16;
/// Empty rounds that cool as much as one small burst: traffic pauses briefly also when it is heavy.
const EMPTY: u8 = 64;

/// How full the bursts of each direction have been of late.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    heat: [u8; 2],
    /// Directions that had a burst since the last round.
    met: [bool; 2],
    /// Rounds without one.
    empty: [u8; 2],
}

impl Gauge {
    /// A burst of `jobs` jobs.
    #[inline]
    pub(super) fn burst(&mut self, kind: JobKind, jobs: usize) {
        let at = index(kind);
        self.met[at] = true;
        let heat = &mut self.heat[at];
        if jobs >= FULL {
            *heat = (*heat + 1).min(HOTTEST);
        } else if jobs < SLACK {
            *heat = heat.saturating_sub(1);
        }
    }

    /// A round has ended. True when it had no burst at all: the worker has nothing to do. With jobs still out that says
    /// nothing of the traffic, and does not cool.
    #[inline]
    pub(super) fn round(&mut self, jobs_out: bool) -> bool {
        let idle = self.met == [false, false];
        if idle && jobs_out {
            return true;
        }
        for (at, met) in self.met.iter_mut().enumerate() {
            let empty = &mut self.empty[at];
            *empty = if std::mem::take(met) { 0 } else { *empty + 1 };
            if *empty == EMPTY {
                *empty = 0;
                self.heat[at] = self.heat[at].saturating_sub(1);
            }
        }
        idle
    }

    /// Whether the direction wants help.
    #[inline]
    pub(super) fn is_hot(&self, kind: JobKind) -> bool {
        self.heat[index(kind)] >= HOT
    }

    /// Whether the worker has enough to do.
    #[inline]
    pub(super) fn is_pressed(&self) -> bool {
        self.heat.iter().any(|heat| *heat >= HOT)
    }
}

#[inline(always)]
fn index(kind: JobKind) -> usize {
    match kind {
        JobKind::Seal => 0,
        JobKind::Open => 1,
    }
}

/// What a worker tells the others of its gauge, on a line of its own; written on change.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Pressure(AtomicBool);

impl Pressure {
    /// By the worker.
    #[inline]
    pub(super) fn declare(&self, pressed: bool) {
        if self.0.load(Ordering::Relaxed) != pressed {
            self.0.store(pressed, Ordering::Relaxed);
        }
    }

    /// By the others. A hint: nothing depends on its being up to date.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_full_bursts_in_a_row_heat_and_small_ones_and_idle_rounds_cool() {
        let mut gauge = Gauge::default();
        for n in 1..=HOT {
            assert!(!gauge.is_hot(JobKind::Seal));
            gauge.burst(JobKind::Seal, FULL);
            assert_eq!(gauge.is_hot(JobKind::Seal), n == HOT);
        }
        assert!(!gauge.is_hot(JobKind::Open), "directions are told apart");
        // Answers of the other direction, and bursts of middle size, change nothing.
        for _ in 0..100 {
            gauge.burst(JobKind::Open, 1);
            gauge.burst(JobKind::Seal, SLACK);
            assert!(!gauge.round(false));
        }
        assert!(gauge.is_hot(JobKind::Seal) && gauge.is_pressed());
        gauge.burst(JobKind::Seal, SLACK - 1);
        assert!(!gauge.is_hot(JobKind::Seal));
        gauge.burst(JobKind::Seal, FULL);
        assert!(!gauge.round(false));
        for _ in 0..1000 {
            assert!(gauge.round(true), "nothing came, and something is out");
        }
        for _ in 0..EMPTY {
            assert!(gauge.is_pressed());
            assert!(gauge.round(false), "nothing came");
        }
        assert!(!gauge.is_pressed());
    }
}
