//! Token bucket, with the time as argument.

/// Lets through `burst` events at once and `per_second` in the long run.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Nanoseconds that one token takes to grow.
    interval: u64,
    /// Nanoseconds' worth of tokens that can be saved up.
    capacity: u64,
    saved: u64,
    last: u64,
}

impl TokenBucket {
    /// Starts full. A rate of 0 lets nothing through once the burst is spent.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        let interval = match per_second {
            0 => u64::MAX,
            n => match 1_000_000_000 / n as u64 {
                0 => 1,
                i => i,
            },
        };
        let capacity = interval.saturating_mul(burst as u64);
        Self {
            interval,
            capacity,
            saved: capacity,
            last: 0,
        }
    }

    /// Takes a token at `now` (nanoseconds of any monotonic clock; going back counts as standing still).
    #[inline]
    pub fn allow(&mut self, now: u64) -> bool {
        let grown = now.saturating_sub(self.last);
        self.last = self.last.max(now);
        self.saved = self.saved.saturating_add(grown).min(self.capacity);
        match self.saved.checked_sub(self.interval) {
            Some(left) => {
                self.saved = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_burst_passes_at_once_and_the_rate_afterwards() {
        let mut b = TokenBucket::new(10, 5);
        assert_eq!((0..20).filter(|_| b.allow(SECOND)).count(), 5);
        assert!(!b.allow(SECOND + SECOND / 10 - 1));
        assert!(b.allow(SECOND + SECOND / 10));
        assert!(!b.allow(SECOND));
        let passed = (0..1000)
            .filter(|i| b.allow(10 * SECOND + i * SECOND / 100))
            .count();
        assert!(
            (104..=105).contains(&passed),
            "{passed}: 5 saved, 100 grown in 10 s"
        );
    }

    #[test]
    fn a_rate_of_zero_spends_the_burst_only() {
        let mut b = TokenBucket::new(0, 1);
        assert!(b.allow(0));
        assert!(!b.allow(u64::MAX - 1));
        assert!(!TokenBucket::new(100, 0).allow(SECOND));
    }
}
