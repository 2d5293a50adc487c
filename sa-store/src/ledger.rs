//! The account of every frame: one set of counters per worker, which the worker alone writes.
//!
//! Each frame that enters a worker ends in exactly one of: forwarded, punted, consumed, dropped, waiting, in
//! flight. Each frame that leaves names its origin. So, once nothing waits:
//!
//! ```text
//!   received + handed_in + generated  =  sent + handed_out + punted + consumed + dropped
//! ```

use crate::counters::Counter;
use crate::drops::{Consumed, DropReason};

/// Where a frame that did not arrive on a port comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Generated {
    /// ICMP error or reply.
    Icmp,
    /// Fragment after the first, which stays in the frame that was split.
    Fragment,
    /// Dummy packet (RFC 4303 section 2.6).
    Dummy,
    /// From the kernel, by a port's exception TAP.
    Injected,
}

impl Generated {
    /// All, in the order of their numbers.
    pub const ALL: &'static [Generated] =
        &[Self::Icmp, Self::Fragment, Self::Dummy, Self::Injected];

    /// Metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Icmp => "icmp",
            Self::Fragment => "fragment",
            Self::Dummy => "dummy",
            Self::Injected => "injected",
        }
    }
}

/// Classes of what goes to the kernel: each has a rate of its own, and the first go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Punt {
    /// IKE, also in UDP port 4500.
    Ike,
    /// Routing and redundancy protocols: BGP, OSPF, IS-IS, RIP, LDP, BFD, PIM, IGMP, VRRP.
    Routing,
    /// ARP and neighbour discovery.
    Neighbour,
    /// ICMP beside neighbour discovery.
    Icmp,
    /// Everything else.
    Other,
}

impl Punt {
    /// All, in the order of their numbers and of their precedence.
    pub const ALL: &'static [Punt] = &[
        Self::Ike,
        Self::Routing,
        Self::Neighbour,
        Self::Icmp,
        Self::Other,
    ];
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ike => "ike",
            Self::Routing => "routing",
            Self::Neighbour => "neighbour",
            Self::Icmp => "icmp",
            Self::Other => "other",
        }
    }
}

/// Histogram with power-of-two buckets of nanoseconds: bucket `i` counts values below `2^(i + FIRST)`.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; Histogram::BUCKETS],
    sum: Counter,
}

impl Histogram {
    /// Buckets, the last one open-ended.
    pub const BUCKETS: usize = 20;
    /// Exponent of the first bucket's bound: 256 ns.
    pub const FIRST: u32 = 8;

    /// Counts one value.
    #[inline]
    pub fn observe(&self, nanos: u64) {
        let bits = u64::BITS - nanos.leading_zeros();
        let i = (bits.saturating_sub(Self::FIRST) as usize).min(Self::BUCKETS - 1);
        self.buckets[i].add(1);
        self.sum.add(nanos);
    }

    /// Counts per bucket with the upper bound in nanoseconds (`None`: open-ended), not cumulative.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        (Self::FIRST..).zip(&self.buckets).map(|(exp, c)| {
            let last = exp as usize == Self::BUCKETS - 1 + Self::FIRST as usize;
            ((!last).then_some(1_u64 << exp), c.value())
        })
    }

    /// Sum of all values, nanoseconds.
    pub fn sum(&self) -> u64 {
        self.sum.value()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| Counter::default()),
            sum: Counter::default(),
        }
    }
}

/// Counters of one worker.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// Frames from ports.
    pub received: Counter,
    /// Frames accepted by ports.
    pub sent: Counter,
    /// Frames that other workers handed to this one.
    pub handed_in: Counter,
    /// Frames handed to the owner of their SA.
    pub handed_out: Counter,
    /// Frames given to the kernel by the exception path, by [`Punt`].
    pub punted: [Counter; Punt::COUNT],
    /// Frames meant for it that were dropped, by [`Punt`]; among `dropped` too.
    pub unpunted: [Counter; Punt::COUNT],
    /// Packets encrypted and sent on.
    pub encrypted: Counter,
    /// Packets decrypted and accepted.
    pub decrypted: Counter,
    /// Clear packets forwarded by a bypass policy.
    pub bypassed: Counter,
    /// Frames generated, by [`Generated`].
    pub generated: [Counter; Generated::ALL.len()],
    /// Frames consumed, by [`Consumed`].
    pub consumed: [Counter; Consumed::ALL.len()],
    /// Frames dropped, by [`DropReason`].
    pub dropped: [Counter; DropReason::COUNT],
    /// Frames held now (tx backlog, reassembly, waiting for a neighbour): a gauge.
    pub waiting: Counter,
    /// Frames inside engines now: a gauge.
    pub in_flight: Counter,
    /// Poll rounds that found work.
    pub busy_polls: Counter,
    /// Poll rounds that found nothing.
    pub idle_polls: Counter,
    /// Times the worker went to sleep.
    pub sleeps: Counter,
    /// Time from receiving a burst to having it sent, nanoseconds.
    pub burst_latency: Histogram,
    /// Flow cache hits.
    pub flow_hits: Counter,
    /// Flow cache misses: full policy look-ups.
    pub flow_misses: Counter,
    /// Ciphering shared with other workers.
    pub parallel: ParallelCounters,
}

/// What a worker shares of its ciphering, and does of others'. Packets of an SA that is shared are given on in order only, so
/// one that is late holds up those behind it.
#[derive(Debug, Default)]
pub struct ParallelCounters {
    /// Packets given to helpers.
    pub given: Counter,
    /// Packets that came back from helpers.
    pub returned: Counter,
    /// Packets of shared SAs that the worker ciphered itself, because helpers had enough.
    pub kept: Counter,
    /// Packets of other workers' SAs that the worker ciphered.
    pub assisted: Counter,
    /// Packets that wait to be ciphered, or for their turn, now: a gauge.
    pub waiting: Counter,
    /// Looks at what has come back that found a packet ready and the one before it still with a helper.
    pub held_up: Counter,
    /// Packets that found no room, and were offered again.
    pub refused: Counter,
}

impl Default for WorkerCounters {
    fn default() -> Self {
        Self {
            received: Counter::default(),
            sent: Counter::default(),
            handed_in: Counter::default(),
            handed_out: Counter::default(),
            punted: std::array::from_fn(|_| Counter::default()),
            unpunted: std::array::from_fn(|_| Counter::default()),
            encrypted: Counter::default(),
            decrypted: Counter::default(),
            bypassed: Counter::default(),
            generated: std::array::from_fn(|_| Counter::default()),
            consumed: std::array::from_fn(|_| Counter::default()),
            dropped: std::array::from_fn(|_| Counter::default()),
            waiting: Counter::default(),
            in_flight: Counter::default(),
            busy_polls: Counter::default(),
            idle_polls: Counter::default(),
            sleeps: Counter::default(),
            burst_latency: Histogram::default(),
            flow_hits: Counter::default(),
            flow_misses: Counter::default(),
            parallel: ParallelCounters::default(),
        }
    }
}

impl WorkerCounters {
    /// Counts drops.
    #[inline]
    pub fn drop_frames(&self, reason: DropReason, n: u64) {
        self.dropped[reason.index()].add(n);
    }

    /// Counts a consumed frame.
    #[inline]
    pub fn consume(&self, kind: Consumed) {
        self.consumed[kind as usize].add(1);
    }

    /// Counts a generated frame.
    #[inline]
    pub fn generate(&self, kind: Generated) {
        self.generated[kind as usize].add(1);
    }

    /// Frames dropped for any reason.
    pub fn total_dropped(&self) -> u64 {
        self.dropped.iter().map(Counter::value).sum()
    }
}

/// Sums over workers, for reports and for the balance check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    /// Frames that came in: from ports, from workers, generated.
    pub entered: u64,
    /// Frames that left or ended.
    pub ended: u64,
    /// Frames held or in flight.
    pub inside: u64,
}

impl Balance {
    /// The account of one or more workers. Exact only while they are stopped or idle.
    pub fn of<'a>(workers: impl IntoIterator<Item = &'a WorkerCounters>) -> Self {
        let mut b = Self::default();
        for w in workers {
            b.entered += w.received.value()
                + w.handed_in.value()
                + w.generated.iter().map(Counter::value).sum::<u64>();
            b.ended += w.sent.value()
                + w.handed_out.value()
                + w.punted.iter().map(Counter::value).sum::<u64>()
                + w.consumed.iter().map(Counter::value).sum::<u64>()
                + w.total_dropped();
            b.inside += w.waiting.value() + w.in_flight.value();
        }
        b
    }

    /// Whether every frame is accounted for.
    pub fn holds(&self) -> bool {
        self.entered == self.ended + self.inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_bounds_are_exclusive_powers_of_two() {
        let h = Histogram::default();
        for v in [0, 255, 256, 511, 512, u64::MAX / 2] {
            h.observe(v);
        }
        let b: Vec<_> = h.buckets().collect();
        assert_eq!(b[0], (Some(256), 2));
        assert_eq!(b[1], (Some(512), 2));
        assert_eq!(b[2], (Some(1024), 1));
        assert_eq!(b[Histogram::BUCKETS - 1], (None, 1));
    }

    #[test]
    fn a_missing_frame_breaks_the_balance() {
        let w = WorkerCounters::default();
        w.received.add(3);
        w.sent.add(1);
        w.drop_frames(DropReason::NoRoute, 1);
        assert!(!Balance::of([&w]).holds());
        w.waiting.set(1);
        assert!(Balance::of([&w]).holds());
    }
}
