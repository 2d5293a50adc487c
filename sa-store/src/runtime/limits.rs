//! How far an SA may go: lifetimes, sequence space, and what of it is on disk.

use std::sync::atomic::Ordering;

use super::{Refused, SaEntry, event};
use crate::drops::DropReason;
use crate::sa::{Direction, SaSpec};

/// Limits as absolute values, `u64::MAX` for none.
#[derive(Debug)]
pub(super) struct Thresholds {
    soft_packets: u64,
    soft_bytes: u64,
    soft_at: u64,
    hard_packets: u64,
    hard_bytes: u64,
    hard_at: u64,
    last_seq: u64,
}

impl Thresholds {
    /// Of an SA that is installed at `now`, gateway clock in nanoseconds.
    pub(super) fn new(spec: &SaSpec, now: u64) -> Self {
        let at = |s: Option<u64>| {
            s.map_or(u64::MAX, |s| {
                now.saturating_add(s.saturating_mul(1_000_000_000))
            })
        };
        Self {
            soft_packets: spec.soft.packets.unwrap_or(u64::MAX),
            soft_bytes: spec.soft.bytes.unwrap_or(u64::MAX),
            soft_at: at(spec.soft.seconds),
            hard_packets: spec.hard.packets.unwrap_or(u64::MAX),
            hard_bytes: spec.hard.bytes.unwrap_or(u64::MAX),
            hard_at: at(spec.hard.seconds),
            last_seq: if spec.esn {
                u64::MAX - 1
            } else {
                u64::from(u32::MAX)
            },
        }
    }
}

/// Where the first of the limits lies: what is below all three needs no further look.
#[derive(Debug)]
pub(super) struct Watch {
    packets: u64,
    bytes: u64,
    at: u64,
}

impl Watch {
    pub(super) fn new(t: &Thresholds) -> Self {
        Self {
            packets: t.soft_packets.min(t.hard_packets),
            bytes: t.soft_bytes.min(t.hard_bytes),
            at: t.soft_at.min(t.hard_at),
        }
    }

    #[inline(always)]
    fn reached(&self, packets: u64, bytes: u64, now: u64) -> bool {
        packets >= self.packets || bytes >= self.bytes || now >= self.at
    }
}

/// One measure of an SA's life beside its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// How far it has come.
    pub used: u64,
    /// Where a successor is wanted; `u64::MAX` for never.
    pub soft: u64,
    /// Where it ends; `u64::MAX` for never.
    pub hard: u64,
}

/// How far an SA has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauges {
    /// Packets; outbound by sequence numbers, so that an earlier life of the key counts.
    pub packets: Gauge,
    /// Bytes.
    pub bytes: Gauge,
    /// Nanoseconds of the gateway clock, absolute.
    pub time: Gauge,
    /// Sequence numbers.
    pub sequence: Gauge,
}

impl SaEntry {
    /// Brings the soft limits forward by `early` of 65 536 parts of their distance, and gives every hard limit that
    /// has no soft one a warning at seven eighths of its way. Before the entry is published.
    pub fn hasten(&mut self, early: u16) {
        let share = |limit: u64| {
            // 65 536 parts of a limit do not pass the width.
            let part = (u128::from(limit) * u128::from(early)) >> 16;
            limit - u64::try_from(part).unwrap_or(0)
        };
        let soft_of = |soft: u64, hard: u64, from: u64| match (soft, hard) {
            (u64::MAX, u64::MAX) => u64::MAX,
            (u64::MAX, hard) => from + share((hard - from) / 8 * 7),
            (soft, _) => from + share(soft - from),
        };
        let (t, start) = (&mut self.live.thresholds, self.installed_at);
        t.soft_packets = soft_of(t.soft_packets, t.hard_packets, 0);
        t.soft_bytes = soft_of(t.soft_bytes, t.hard_bytes, 0);
        t.soft_at = soft_of(t.soft_at, t.hard_at, start);
        self.live.watch = Watch::new(t);
    }

    /// How far the SA has come at `now`, gateway clock in nanoseconds.
    pub fn gauges(&self, now: u64) -> Gauges {
        let (live, t) = (&self.live, &self.live.thresholds);
        let (packets, sequence) = match self.fixed.direction {
            Direction::Out => (self.next_seq() - 1, self.next_seq() - 1),
            Direction::In => (live.counters.packets.value(), live.window.top()),
        };
        let gauge = |used, soft, hard| Gauge { used, soft, hard };
        Gauges {
            packets: gauge(packets, t.soft_packets, t.hard_packets),
            bytes: gauge(live.counters.bytes.value(), t.soft_bytes, t.hard_bytes),
            time: gauge(now, t.soft_at, t.hard_at),
            sequence: gauge(sequence, t.last_seq / 8 * 7, t.last_seq),
        }
    }

    /// Takes the next outbound number for a packet of `bytes`, or says why not. Owner only. `now` is the
    /// gateway clock in nanoseconds, read once a burst.
    #[inline]
    pub fn next_out(&self, bytes: u64, now: u64) -> Result<u64, Refused> {
        let live = &self.live;
        let seq = live.next_seq.load(Ordering::Relaxed);
        let total = live.counters.bytes.value().wrapping_add(bytes);
        // Below the low mark numbers are on disk: the mark is never behind the lease's end.
        if seq >= live.lease_low.load(Ordering::Acquire)
            || live.watch.reached(seq, total, now)
            || live.disabled.load(Ordering::Relaxed)
        {
            self.next_out_near_limit(seq, total, now)?;
        }
        live.next_seq.store(seq + 1, Ordering::Relaxed);
        live.counters.packets.add(1);
        live.counters.bytes.add(bytes);
        Ok(seq)
    }

    #[inline(never)]
    fn next_out_near_limit(&self, seq: u64, total: u64, now: u64) -> Result<(), Refused> {
        let live = &self.live;
        let t = &live.thresholds;
        if seq >= live.lease_end.load(Ordering::Acquire)
            || seq > t.hard_packets
            || total > t.hard_bytes
            || now >= t.hard_at
            || live.disabled.load(Ordering::Relaxed)
        {
            return Err(self.refuse_out(seq, total, now));
        }
        if seq >= t.soft_packets
            || total >= t.soft_bytes
            || now >= t.soft_at
            || seq >= live.lease_low.load(Ordering::Relaxed)
        {
            // The packet at hand is counted by the caller.
            self.soft(seq, total, now);
        }
        Ok(())
    }

    /// Whether an inbound packet may be taken at all, before any crypto is spent on it. Owner only.
    #[inline]
    pub fn admit_in(&self, now: u64) -> Result<(), Refused> {
        let live = &self.live;
        let (packets, bytes) = (live.counters.packets.value(), live.counters.bytes.value());
        if live.watch.reached(packets, bytes, now) || live.disabled.load(Ordering::Relaxed) {
            return self.admit_near_limit(packets, bytes, now);
        }
        Ok(())
    }

    #[inline(never)]
    fn admit_near_limit(&self, packets: u64, bytes: u64, now: u64) -> Result<(), Refused> {
        let t = &self.live.thresholds;
        if now >= t.hard_at || packets >= t.hard_packets || bytes >= t.hard_bytes || self.disabled()
        {
            return Err(self.refuse_in(0, now));
        }
        Ok(())
    }

    /// Whether the edge on disk covers an authentic inbound number. Only then it may be accepted: what is accepted
    /// above the edge could be accepted again after a crash. Owner only.
    #[inline]
    pub fn cover_in(&self, seq: u64) -> Result<(), Refused> {
        if seq >= self.live.lease_low.load(Ordering::Relaxed) {
            return self.near_edge(seq);
        }
        Ok(())
    }

    #[cold]
    fn near_edge(&self, seq: u64) -> Result<(), Refused> {
        if seq < self.live.lease_end.load(Ordering::Acquire) {
            self.raise(event::LEASE_LOW);
            return Ok(());
        }
        if seq > self.next_seq() {
            self.live.next_seq.store(seq, Ordering::Relaxed);
        }
        self.live.counters.limit.add(1);
        self.raise(event::LEASE_LOW | event::LEASE_OUT);
        Err(DropReason::WindowEdge)
    }

    /// Counts an authenticated, fresh inbound packet against the limits: the packet that would pass a hard
    /// limit is refused. Owner only.
    #[inline]
    pub fn account_in(&self, bytes: u64, now: u64) -> Result<(), Refused> {
        let live = &self.live;
        let packets = live.counters.packets.value() + 1;
        let total = live.counters.bytes.value().wrapping_add(bytes);
        let near = live.watch.reached(packets, total, now);
        if near {
            let t = &live.thresholds;
            if packets > t.hard_packets || total > t.hard_bytes {
                return Err(self.refuse_in(bytes, now));
            }
        }
        live.counters.packets.add(1);
        live.counters.bytes.add(bytes);
        if near {
            self.soft(0, total, now);
        }
        Ok(())
    }

    #[cold]
    fn refuse_out(&self, seq: u64, total: u64, now: u64) -> Refused {
        let t = &self.live.thresholds;
        self.live.counters.limit.add(1);
        if self.disabled() {
            return DropReason::SaDisabled;
        }
        let reason = if seq > t.hard_packets {
            DropReason::HardPackets
        } else if total > t.hard_bytes {
            DropReason::HardBytes
        } else if now >= t.hard_at {
            DropReason::HardTime
        } else if seq > t.last_seq {
            self.raise(event::SEQUENCE_END);
            return DropReason::SequenceExhausted;
        } else {
            self.raise(event::LEASE_OUT);
            return DropReason::LeaseExhausted;
        };
        self.raise(event::HARD);
        reason
    }

    #[cold]
    fn refuse_in(&self, bytes: u64, now: u64) -> Refused {
        let t = &self.live.thresholds;
        self.live.counters.limit.add(1);
        if self.disabled() {
            return DropReason::SaDisabled;
        }
        self.raise(event::HARD);
        if now >= t.hard_at {
            DropReason::HardTime
        } else if self.live.counters.packets.value() >= t.hard_packets {
            DropReason::HardPackets
        } else {
            debug_assert!(self.live.counters.bytes.value().wrapping_add(bytes) >= t.hard_bytes);
            DropReason::HardBytes
        }
    }

    #[cold]
    fn soft(&self, seq: u64, total: u64, now: u64) {
        let t = &self.live.thresholds;
        let mut bits = 0;
        if self.live.counters.packets.value().max(seq) >= t.soft_packets {
            bits |= event::SOFT_PACKETS;
        }
        if total >= t.soft_bytes {
            bits |= event::SOFT_BYTES;
        }
        if now >= t.soft_at {
            bits |= event::SOFT_TIME;
        }
        if seq != 0 && seq >= self.live.lease_low.load(Ordering::Relaxed) {
            bits |= event::LEASE_LOW;
        }
        if seq > t.last_seq / 8 * 7 {
            bits |= event::SEQUENCE_LOW;
        }
        self.raise(bits);
    }

    /// Next outbound number.
    pub fn next_seq(&self) -> u64 {
        self.live.next_seq.load(Ordering::Relaxed)
    }

    /// How far the keeper of leases has to look ahead: the next outbound number, or the highest authentic inbound
    /// number that arrived, whether it was accepted or not.
    pub fn reached(&self) -> u64 {
        match self.fixed.direction {
            Direction::Out => self.next_seq(),
            Direction::In => self.next_seq().max(self.live.window.top()),
        }
    }

    /// First number that is not on disk yet: to send, or to accept.
    pub fn lease_end(&self) -> u64 {
        self.live.lease_end.load(Ordering::Relaxed)
    }

    /// Moves the lease's end. Only the keeper of leases calls this, with an `end` that is durable; `low` is the number
    /// from which [`event::LEASE_LOW`] is raised. A lower end binds workers with their next burst.
    pub fn extend_lease(&self, end: u64, low: u64) {
        self.live.lease_low.store(low.min(end), Ordering::Release);
        self.live.lease_end.store(end, Ordering::Release);
        self.clear_events(event::LEASE_LOW);
    }

    /// Whether a packet with this number, of which only the low half may be known, left lately.
    pub fn sent_lately(&self, low: u32, within: u64) -> bool {
        let next = self.live.next_seq.load(Ordering::Relaxed);
        #[allow(clippy::cast_possible_truncation, reason = "the low half")]
        let back = u64::from((next as u32).wrapping_sub(low));
        back != 0 && back <= within && back < next
    }
}
