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
    /// First block of a key that was never used, a power of two. No rate is known: the largest burst that is
    /// to pass without waiting for the disk.
    pub first: u64,
    /// First block of a key that goes on after a restart, a power of two.
    pub resumed: u64,
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
        resumed: 1 << 20,
        max: 1 << 40,
        target: Duration::from_secs(8),
    };
    /// Outbound, 32-bit numbers: a crash skips at most one 16th of the numbers, which is 8 s at 33 million
    /// packets a second, and normally far less.
    pub const OUTBOUND: Self = Self {
        max: 1 << 28,
        ..Self::OUTBOUND_ESN
    };
    /// Inbound. What passes the edge is refused until a higher one is on disk, and after a crash what the peer
    /// sends is lost until it passes the edge. So a new SA begins with room for a second at a million packets a
    /// second, and an SA that turns out slow gives it back by halves ([`Renewal::lower`]) down to 256 packets.
    /// After a restart the room is smaller: were it as large, each crash of a row would lose that much more.
    pub const INBOUND: Self = Self {
        min: 1 << 8,
        first: 1 << 20,
        resumed: 1 << 16,
        max: 1 << 32,
        target: Duration::from_secs(8),
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
    /// Use and time at the last poll.
    last: Option<(u64, Duration)>,
    /// Use and time since when it is watched for being slow.
    watched: Option<(u64, Duration)>,
}

/// Fewer numbers than this between two polls say nothing about the rate.
const BURST: u64 = 8;
/// How long an SA is watched before some of its room is given back.
const WATCH: Duration = Duration::from_secs(30);

impl Renewal {
    /// `end`: see [`end_of_numbers`]. `fresh`: the key was never used.
    pub fn new(blocks: Blocks, end: u64, fresh: bool) -> Self {
        Self {
            blocks,
            end,
            block: if fresh { blocks.first } else { blocks.resumed },
            since: None,
            last: None,
            watched: None,
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
        if limit >= self.end {
            return None;
        }
        let last = self.last.replace((used, now));
        let burst = last
            .filter(|(then, _)| used.saturating_sub(*then) >= BURST)
            .map_or(0, |since| self.lasting(since, used, now));
        if used < self.renew_at(limit) && limit - used >= burst {
            return None;
        }
        if let Some(since) = self.since {
            let lasting = self.lasting(since, used, now).max(burst);
            self.block = self.resize(lasting);
        }
        self.since = Some((used, now));
        let next = used.saturating_add(self.block).min(self.end);
        (next > limit).then_some(next)
    }

    /// A lower limit for an SA that turned out slow: half of its room, when less than a quarter of it was used
    /// in half a minute. Only for inbound limits: outbound numbers are never taken back.
    pub fn lower(&mut self, used: u64, limit: u64, now: Duration) -> Option<u64> {
        let Some((then, since)) = self.watched else {
            self.watched = Some((used, now));
            return None;
        };
        if now.saturating_sub(since) < WATCH {
            return None;
        }
        self.watched = Some((used, now));
        let room = limit.saturating_sub(used);
        let half = (room / 2).max(self.blocks.min);
        if half >= room || used.saturating_sub(then) >= room / 4 {
            return None;
        }
        self.block = half.checked_next_power_of_two().unwrap_or(self.block);
        self.since = Some((used, now));
        Some(used + half)
    }

    /// How many numbers last for the target time at the rate since then.
    fn lasting(&self, (then, since): (u64, Duration), used: u64, now: Duration) -> u64 {
        let nanos = now.saturating_sub(since).as_nanos().max(1);
        let numbers = u128::from(used.saturating_sub(then));
        let lasting = numbers.saturating_mul(self.blocks.target.as_nanos()) / nanos;
        u64::try_from(lasting).unwrap_or(u64::MAX)
    }

    fn resize(&self, lasting: u64) -> u64 {
        // Renewal comes at half of the block, and what is left must last for the target, too.
        let wanted = lasting.saturating_mul(2);
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
            let mut r = Renewal::new(Blocks::OUTBOUND_ESN, u64::MAX, true);
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
        let mut r = Renewal::new(Blocks::INBOUND, u64::MAX, true);
        let limit = r.poll(0, 0, Duration::ZERO).unwrap();
        for s in 1..1000 {
            assert_eq!(r.poll(0, limit, Duration::from_secs(s)), None);
        }
    }

    #[test]
    fn blocks_shrink_again_when_traffic_falls() {
        let mut r = Renewal::new(Blocks::INBOUND, u64::MAX, true);
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
        run(&mut r, 1, 40_000_000);
        assert!(r.block() <= 32_768, "{}", r.block());
    }

    #[test]
    fn a_slow_sa_gives_its_room_back_by_halves_and_a_busy_one_does_not() {
        for (per_second, slow) in [(1, true), (100_000, false)] {
            let mut r = Renewal::new(Blocks::INBOUND, u64::MAX, true);
            let (mut used, mut limit) = (0u64, 0u64);
            for s in 0..1200 {
                let now = Duration::from_secs(s);
                limit = r.poll(used, limit, now).unwrap_or(limit);
                if let Some(lower) = r.lower(used, limit, now) {
                    assert!(lower < limit && lower >= used + Blocks::INBOUND.min);
                    assert!(lower - used >= (limit - used) / 2, "more than half at once");
                    limit = lower;
                }
                used += per_second;
                assert!(used <= limit);
            }
            let room = limit - used;
            assert_eq!(room <= 512, slow, "{room}");
            assert!(slow || room >= 8 * per_second, "{room}");
        }
    }

    #[test]
    fn the_beginning_of_a_burst_on_a_slow_sa_is_noticed_at_once() {
        let mut r = Renewal::new(Blocks::INBOUND, u64::MAX, false);
        r.block = Blocks::INBOUND.min;
        let limit = 10_256;
        assert_eq!(r.poll(10_000, limit, Duration::from_secs(60)), None);
        r.since = Some((9_900, Duration::from_secs(1)));
        // Ten packets in ten milliseconds are a thousand a second: 256 would not last for eight seconds.
        let next = r
            .poll(10_010, limit, Duration::from_millis(60_010))
            .unwrap();
        assert!(next >= 10_010 + 2 * 8 * 1000, "{next}");
    }

    #[test]
    fn the_last_block_ends_with_the_numbers() {
        let end = end_of_numbers(Direction::Out, false);
        let mut r = Renewal::new(Blocks::OUTBOUND, end, true);
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
            let mut r = Renewal::new(Blocks::of(Direction::Out, esn), end, true);
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
