//! How large the blocks are and when the next one is asked for: pure arithmetic, time is an argument.

use std::time::Duration;

/// Sizes of blocks.
///
/// A block is as many numbers as the SA would use in `target` at the rate at which the last block was used,
/// between `min` and `max`. It doubles or more at once when the rate grows and halves at most when it falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Smallest block, a power of two.
    pub min: u64,
    /// First block after a start, when no rate is known, a power of two.
    pub first: u64,
    /// Largest block, a power of two.
    pub max: u64,
    /// How long a block lasts at the measured rate, at least.
    pub target: Duration,
}

impl Blocks {
    /// Outbound, 64-bit numbers: a crash skips at most a block of 2^40, one in 16 million.
    pub const OUTBOUND_ESN: Self = Self {
        min: 1 << 16,
        first: 1 << 20,
        max: 1 << 40,
        target: Duration::from_secs(8),
    };
    /// Outbound, 32-bit numbers: a crash skips at most one 16th of the numbers, which is 8 s at 33 million
    /// packets a second, and normally far less.
    pub const OUTBOUND: Self = Self {
        max: 1 << 28,
        ..Self::OUTBOUND_ESN
    };
    /// Inbound. After a crash what the peer sends is lost until it passes the edge, so blocks are short: a
    /// second of traffic, and on slow SAs 256 packets. Larger blocks lose more then, smaller ones drop the
    /// beginning of a burst on an idle SA until the edge is synced (a few milliseconds).
    pub const INBOUND: Self = Self {
        min: 1 << 8,
        first: 1 << 12,
        max: 1 << 32,
        target: Duration::from_secs(1),
    };

    /// Those of an SA.
    pub const fn of(direction: crate::sa::Direction, esn: bool) -> Self {
        match (direction, esn) {
            (crate::sa::Direction::In, _) => Self::INBOUND,
            (crate::sa::Direction::Out, true) => Self::OUTBOUND_ESN,
            (crate::sa::Direction::Out, false) => Self::OUTBOUND,
        }
    }
}

/// Decides for one SA when to ask for how much. `used` is the next number to send, or the highest number
/// accepted; `limit` is the end of the lease, or the edge.
#[derive(Clone, Debug)]
pub struct Renewal {
    blocks: Blocks,
    /// No limit lies beyond this.
    end: u64,
    block: u64,
    /// Use and time at the last renewal.
    since: Option<(u64, Duration)>,
}

impl Renewal {
    /// `end`: see [`end_of_numbers`].
    pub fn new(blocks: Blocks, end: u64) -> Self {
        Self {
            blocks,
            end,
            block: blocks.first,
            since: None,
        }
    }

    /// The present block, numbers.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// From which `used` on [`poll`](Self::poll) asks for more: half of the block is gone. A worker
    /// compares with it and raises a hint; polling oftener does no harm.
    pub fn renew_at(&self, limit: u64) -> u64 {
        if limit >= self.end {
            u64::MAX
        } else {
            limit.saturating_sub(self.block / 2)
        }
    }

    /// The limit to commit now, or `None` while the present one does. `now` counts from any fixed moment.
    pub fn poll(&mut self, used: u64, limit: u64, now: Duration) -> Option<u64> {
        if limit >= self.end || used < self.renew_at(limit) {
            return None;
        }
        if let Some((used_then, then)) = self.since {
            self.block = self.resize(used.saturating_sub(used_then), now.saturating_sub(then));
        }
        self.since = Some((used, now));
        let next = used.saturating_add(self.block).min(self.end);
        (next > limit).then_some(next)
    }

    fn resize(&self, numbers: u64, elapsed: Duration) -> u64 {
        let nanos = elapsed.as_nanos().max(1);
        let lasting = u128::from(numbers).saturating_mul(self.blocks.target.as_nanos()) / nanos;
        // Renewal comes at half of the block, and what is left must last for the target, too.
        let wanted = u64::try_from(lasting.saturating_mul(2)).unwrap_or(u64::MAX);
        let wanted = wanted.checked_next_power_of_two().unwrap_or(u64::MAX);
        wanted
            .max(self.block / 2)
            .clamp(self.blocks.min, self.blocks.max)
    }
}

/// The value at which an SA's numbers end. Outbound it is the first number that is never used: the last
/// number of either space is given up, so that no arithmetic wraps. Inbound it is the highest number.
pub const fn end_of_numbers(direction: crate::sa::Direction, esn: bool) -> u64 {
    match (direction, esn) {
        (_, true) => u64::MAX,
        (crate::sa::Direction::Out, false) => 1 << 32,
        (crate::sa::Direction::In, false) => (1 << 32) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sa::Direction;
    use proptest::prelude::*;

    #[test]
    fn a_block_lasts_the_target_time_at_the_measured_rate() {
        for rate in [10_000u64, 1_000_000, 20_000_000] {
            let mut r = Renewal::new(Blocks::OUTBOUND_ESN, u64::MAX);
            let (mut used, mut limit, mut now) = (1u64, 1u64, Duration::ZERO);
            for _ in 0..100_000 {
                if let Some(next) = r.poll(used, limit, now) {
                    limit = next;
                }
                used += rate / 1000;
                now += Duration::from_millis(1);
                assert!(
                    used <= limit || now < Duration::from_millis(200),
                    "ran out at {now:?}"
                );
            }
            assert!(r.block() >= 8 * rate, "{} {rate}", r.block());
            assert!(r.block() <= 64 * rate.max(Blocks::OUTBOUND_ESN.min));
        }
    }

    #[test]
    fn an_idle_sa_asks_once_and_then_never() {
        let mut r = Renewal::new(Blocks::INBOUND, u64::MAX);
        let limit = r.poll(0, 0, Duration::ZERO).unwrap();
        for s in 1..1000 {
            assert_eq!(r.poll(0, limit, Duration::from_secs(s)), None);
        }
    }

    #[test]
    fn blocks_shrink_again_when_traffic_falls() {
        let mut r = Renewal::new(Blocks::INBOUND, u64::MAX);
        let (mut used, mut limit, mut now) = (0u64, 0u64, Duration::ZERO);
        let mut run = |r: &mut Renewal, step: u64, ms: u64| {
            for _ in 0..ms {
                if let Some(next) = r.poll(used, limit, now) {
                    limit = next;
                }
                used = (used + step).min(limit);
                now += Duration::from_millis(1);
            }
        };
        run(&mut r, 1000, 10_000);
        assert!(r.block() >= 1_000_000);
        run(&mut r, 1, 10_000_000);
        assert!(r.block() <= 4096, "{}", r.block());
    }

    #[test]
    fn the_last_block_ends_with_the_numbers() {
        let end = end_of_numbers(Direction::Out, false);
        let mut r = Renewal::new(Blocks::OUTBOUND, end);
        assert_eq!(r.poll(end - 5, end - 5, Duration::ZERO), Some(end));
        assert_eq!(r.poll(end - 1, end, Duration::from_secs(1)), None);
        assert_eq!(r.renew_at(end), u64::MAX);
    }

    proptest! {
        #[test]
        fn a_limit_never_falls_and_never_passes_the_end(
            steps in prop::collection::vec((0u64..1 << 34, 0u64..1 << 36), 1..200),
            esn: bool,
        ) {
            let end = end_of_numbers(Direction::Out, esn);
            let mut r = Renewal::new(Blocks::of(Direction::Out, esn), end);
            let (mut used, mut limit, mut now) = (1u64, 1u64, Duration::ZERO);
            for (step, nanos) in steps {
                if let Some(next) = r.poll(used, limit, now) {
                    prop_assert!(next > limit && next <= end && next > used);
                    limit = next;
                }
                used = used.saturating_add(step).min(limit);
                now += Duration::from_nanos(nanos);
            }
        }
    }
}
