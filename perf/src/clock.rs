//! Time, and what a nanosecond is worth in cycles.

use std::hint::black_box;
use std::time::{Duration, Instant};

use quanta::Clock;
use serde::Serialize;

/// Cycles per nanosecond.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// Time-stamp counter, measured against the system clock.
    pub tsc_ghz: f64,
    /// Core clock, estimated: a chain of dependent operations of four cycles each, best of several tries.
    pub core_ghz: f64,
}

impl Rates {
    /// Measures both; takes about 150 ms.
    pub fn measure(clock: &Clock) -> Self {
        let (start, raw) = (Instant::now(), clock.raw());
        let mut core_ghz = 0.0_f64;
        while start.elapsed() < Duration::from_millis(150) {
            core_ghz = core_ghz.max(core());
        }
        let tsc_ghz = (clock.raw() - raw) as f64 / start.elapsed().as_secs_f64() / 1e9;
        Self { tsc_ghz, core_ghz }
    }
}

/// A square has no closed form for the compiler to find: multiply (3 cycles on every x86-64 and Arm core of the
/// last decade) and or (1).
fn core() -> f64 {
    const STEPS: u32 = 1_000_000;
    let mut x = black_box(3_u64);
    let start = Instant::now();
    for _ in 0..STEPS {
        x = x.wrapping_mul(x) | 1;
    }
    black_box(x);
    f64::from(STEPS) * 4.0 / start.elapsed().as_secs_f64() / 1e9
}

/// The middle of a set of numbers; 0 of none.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between_the_middle_two() {
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&mut [9.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(&mut []), 0.0);
    }

    #[test]
    fn both_clocks_run_at_a_plausible_rate() {
        let rates = Rates::measure(&Clock::new());
        assert!((0.01..20.0).contains(&rates.tsc_ghz), "{rates:?}");
        assert!((0.1..20.0).contains(&rates.core_ghz), "{rates:?}");
    }
}
