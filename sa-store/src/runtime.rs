//! An installed SA: description, expanded keys and run-time state in one allocation that snapshots share.
//!
//! ```text
//!   | fixed: ids, plan, cipher      read by every worker, never written        |
//!   | live:  numbers, limits        written by the owner (events also cleared  |
//!   |        counters, window       by control, lease end by the lease writer) |
//! ```
//!
//! An SA keeps its allocation across snapshots. It is freed, and its keys wiped, when the last snapshot that
//! names it is dropped, which [`crate::store`] does only after every worker has acknowledged a later one.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::cipher::SaCipher;
use crate::counters::Counter;
use crate::drops::DropReason;
use crate::fib::HopIdx;
use crate::plan::{InPlan, OutPlan};
use crate::replay::ReplayWindow;
use crate::sa::{Direction, OffloadMode, SaId, SaSpec, UdpEncap, Vrf};
use crate::spd::SelectorSet;
pub use crate::spd::TunnelIdx;

/// Sticky event bits of an SA. Set by the data path, cleared by control once handled: nothing is lost
/// however late control looks.
pub mod event {
    /// Soft packet limit reached.
    pub const SOFT_PACKETS: u32 = 1;
    /// Soft byte limit reached.
    pub const SOFT_BYTES: u32 = 1 << 1;
    /// Soft time limit reached.
    pub const SOFT_TIME: u32 = 1 << 2;
    /// A hard limit was reached; the SA carries nothing more.
    pub const HARD: u32 = 1 << 3;
    /// Seven eighths of the sequence space are used.
    pub const SEQUENCE_LOW: u32 = 1 << 4;
    /// The sequence space is used up.
    pub const SEQUENCE_END: u32 = 1 << 5;
    /// Half of the current lease block is used: the next one is wanted. Inbound: the same of the window's edge.
    pub const LEASE_LOW: u32 = 1 << 6;
    /// A packet was dropped because no lease was left, or because it passed the window's edge on disk.
    pub const LEASE_OUT: u32 = 1 << 7;
    /// Many packets in a row failed their ICV or were replays.
    pub const REPLAY_BURST: u32 = 1 << 8;
    /// First packet was carried.
    pub const FIRST_USE: u32 = 1 << 9;
    /// The engine that numbered the SA's packets has lost count of them: the SA is stopped and wants a successor.
    pub const ENGINE_LOST: u32 = 1 << 10;

    /// Names of the set bits, for logs and the event stream.
    pub fn names(bits: u32) -> impl Iterator<Item = &'static str> {
        const NAMES: [&str; 11] = [
            "soft_packets",
            "soft_bytes",
            "soft_time",
            "hard",
            "sequence_low",
            "sequence_end",
            "lease_low",
            "lease_out",
            "replay_burst",
            "first_use",
            "engine_lost",
        ];
        NAMES
            .into_iter()
            .enumerate()
            .filter(move |(i, _)| bits >> i & 1 == 1)
            .map(|(_, n)| n)
    }
}

/// What of the SA never changes and is read per packet. Laid out by lines: the first is read in both directions, then
/// one for inbound, then the outer header's plan, of which IPv4 touches the first line only.
#[repr(C, align(64))]
pub struct Fixed {
    /// Slot and generation.
    pub id: SaId,
    /// SPI in host order.
    pub spi: u32,
    /// Tunnel it belongs to.
    pub tunnel: TunnelIdx,
    /// Worker that owns the SA.
    pub owner: u16,
    /// VRF of the outer packets.
    pub vrf: Vrf,
    /// The cipher's lane.
    pub lane: u16,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Belongs to a route-based tunnel.
    pub route_based: bool,
    /// Direction.
    pub direction: Direction,
    /// Where its packets are ciphered.
    pub place: Place,
    /// Outer destination, IPv4 as IPv4-mapped; what an inbound packet must be addressed to.
    pub dst: u128,
    /// Expanded keys.
    pub cipher: Box<dyn SaCipher>,
    /// Inner traffic it may carry; `None`: whatever the policies say.
    pub selectors: Option<Box<SelectorSet>>,
    /// Inbound: how to take the outer packet off.
    pub inb: Option<InPlan>,
    /// UDP encapsulation.
    pub encap: Option<UdpEncap>,
    /// Outbound: how to build the outer packet.
    pub out: Option<OutPlan>,
}

const _: () = {
    assert!(size_of::<Fixed>() == 256);
    // One line for both directions, one for inbound.
    assert!(std::mem::offset_of!(Fixed, cipher) + 16 == 64);
    assert!(std::mem::offset_of!(Fixed, inb) + size_of::<Option<InPlan>>() <= 128);
    assert!(std::mem::offset_of!(Fixed, out) == 128);
    // One line for both directions, one for outbound, one for inbound.
    assert!(size_of::<Live>() <= 256);
    assert!(std::mem::offset_of!(Live, counters) + 16 == 64);
    assert!(std::mem::offset_of!(Live, lease_end) + 8 == 128);
    assert!(std::mem::offset_of!(Live, window) == 128 && size_of::<ReplayWindow>() <= 64);
};

/// Limits as absolute values, `u64::MAX` for none.
#[derive(Debug)]
struct Thresholds {
    soft_packets: u64,
    soft_bytes: u64,
    soft_at: u64,
    hard_packets: u64,
    hard_bytes: u64,
    hard_at: u64,
    last_seq: u64,
}

/// Where the first of the limits lies: what is below all three needs no further look.
#[derive(Debug)]
struct Watch {
    packets: u64,
    bytes: u64,
    at: u64,
}

/// Per-SA counters; written by the owner.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SaCounters {
    /// Packets carried: outbound numbered, inbound authenticated and fresh.
    pub packets: Counter,
    /// Bytes of inner packets (tunnel) or payload (transport).
    pub bytes: Counter,
    /// Wrong ICV.
    pub icv_failed: Counter,
    /// Duplicates and numbers left of the window.
    pub replays: Counter,
    /// Structure or padding wrong after authentication, or before it.
    pub malformed: Counter,
    /// Inner headers outside the selectors.
    pub selector: Counter,
    /// Drops by limits: hard, lease, sequence space.
    pub limit: Counter,
    /// Engine errors, losses and refusals.
    pub engine: Counter,
}

/// Run-time state; the owner writes. Laid out by lines: the first, up to the first two counters, serves both
/// directions.
#[repr(C, align(64))]
pub struct Live {
    lease_low: AtomicU64,
    /// Outbound: the next number. Inbound: the highest authentic number that was refused for passing the edge.
    next_seq: AtomicU64,
    watch: Watch,
    events: AtomicU32,
    disabled: AtomicBool,
    /// Counters.
    pub counters: SaCounters,
    /// Hop of the outer packets and the route table that gave it; see [`SaEntry::hop`].
    hop: AtomicU64,
    lease_end: AtomicU64,
    /// Inbound window.
    pub window: ReplayWindow,
    /// Nanoseconds (gateway clock) of the last packet carried.
    pub last_used: Counter,
    thresholds: Thresholds,
}

/// What a worker may not do with an SA now, decided per packet.
pub type Refused = DropReason;

/// An installed SA.
#[repr(C)]
pub struct SaEntry {
    /// Never changes.
    pub fixed: Fixed,
    /// Written by the owner.
    pub live: Live,
    /// Full description, cold.
    pub spec: Arc<SaSpec>,
    /// Provider of the cipher, for display.
    pub provider: &'static str,
    /// Gateway clock at installation, nanoseconds.
    pub installed_at: u64,
}

/// Where numbering and the window start, from the lease store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Outbound: first number that may be used, at least 1.
    pub next_seq: u64,
    /// Outbound: first number that may not be used yet. Inbound: first number that may not be accepted yet.
    pub lease_end: u64,
    /// Inbound: highest number that counts as seen.
    pub window_top: u64,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            next_seq: 1,
            lease_end: 1,
            window_top: 0,
        }
    }
}

/// What [`SaEntry::new`] needs beside the description.
pub struct Install {
    /// Slot.
    pub id: SaId,
    /// Tunnel.
    pub tunnel: TunnelIdx,
    /// Owning worker.
    pub owner: u16,
    /// Expanded keys.
    pub cipher: Box<dyn SaCipher>,
    /// Their provider's name.
    pub provider: &'static str,
    /// Where to go on.
    pub start: Start,
    /// Who ciphers.
    pub place: Place,
    /// Gateway clock, nanoseconds.
    pub now: u64,
}

/// Where an SA's packets are ciphered, fixed when it is installed. Only a successor can be elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// 0: the CPU. Otherwise an engine, by its number from 1.
    pub engine: u8,
    /// What is left to the engine.
    pub mode: OffloadMode,
    /// Packet mode: the engine makes the outer headers too.
    pub outer_headers: bool,
}

impl Place {
    /// The CPU.
    pub const CPU: Place = Place {
        engine: 0,
        mode: OffloadMode::Software,
        outer_headers: false,
    };
}

impl Watch {
    #[inline(always)]
    fn reached(&self, packets: u64, bytes: u64, now: u64) -> bool {
        packets >= self.packets || bytes >= self.bytes || now >= self.at
    }
}

impl SaEntry {
    /// Builds the entry; the caller publishes it.
    pub fn new(spec: Arc<SaSpec>, install: Install) -> Self {
        let Install {
            id,
            tunnel,
            owner,
            cipher,
            provider,
            start,
            place,
            now,
        } = install;
        let at = |s: Option<u64>| {
            s.map_or(u64::MAX, |s| {
                now.saturating_add(s.saturating_mul(1_000_000_000))
            })
        };
        let last_seq = if spec.esn {
            u64::MAX - 1
        } else {
            u64::from(u32::MAX)
        };
        let thresholds = Thresholds {
            soft_packets: spec.soft.packets.unwrap_or(u64::MAX),
            soft_bytes: spec.soft.bytes.unwrap_or(u64::MAX),
            soft_at: at(spec.soft.seconds),
            hard_packets: spec.hard.packets.unwrap_or(u64::MAX),
            hard_bytes: spec.hard.bytes.unwrap_or(u64::MAX),
            hard_at: at(spec.hard.seconds),
            last_seq,
        };
        let out = (spec.direction == Direction::Out).then(|| OutPlan::new(&spec));
        let inb = (spec.direction == Direction::In).then(|| InPlan::new(&spec));
        let fixed = Fixed {
            id,
            spi: spec.spi.value(),
            tunnel,
            owner,
            vrf: spec.vrf,
            esn: spec.esn,
            direction: spec.direction,
            place,
            encap: spec.encap,
            dst: mapped(spec.dst),
            out,
            inb,
            lane: cipher.lane(),
            route_based: spec.if_id.0 != 0,
            cipher,
            selectors: (!spec.selectors.is_empty())
                .then(|| Box::new(SelectorSet::new(&spec.selectors))),
        };
        // Without anti-replay there is no edge to keep.
        let guarded = spec.direction == Direction::Out || spec.replay_window != 0;
        let lease_end = if guarded { start.lease_end } else { u64::MAX };
        let from = match spec.direction {
            Direction::Out => start.next_seq,
            Direction::In => start.window_top,
        };
        let live = Live {
            next_seq: AtomicU64::new(match spec.direction {
                Direction::Out => start.next_seq.max(1),
                Direction::In => 0,
            }),
            lease_end: AtomicU64::new(lease_end),
            lease_low: AtomicU64::new(from.midpoint(lease_end)),
            events: AtomicU32::new(0),
            disabled: AtomicBool::new(false),
            hop: AtomicU64::new(u64::MAX),
            watch: Watch {
                packets: thresholds.soft_packets.min(thresholds.hard_packets),
                bytes: thresholds.soft_bytes.min(thresholds.hard_bytes),
                at: thresholds.soft_at.min(thresholds.hard_at),
            },
            thresholds,
            last_used: Counter::default(),
            counters: SaCounters::default(),
            window: ReplayWindow::resume(spec.replay_window, spec.esn, start.window_top),
        };
        Self {
            fixed,
            live,
            spec,
            provider,
            installed_at: now,
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

    /// Raises sticky events. Any thread.
    #[inline]
    pub fn raise(&self, bits: u32) {
        if self.live.events.load(Ordering::Relaxed) & bits != bits {
            self.live.events.fetch_or(bits, Ordering::Release);
        }
    }

    /// Sticky events that are set now.
    pub fn events(&self) -> u32 {
        self.live.events.load(Ordering::Acquire)
    }

    /// Clears events that control has handled.
    pub fn clear_events(&self, bits: u32) {
        self.live.events.fetch_and(!bits, Ordering::AcqRel);
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

    /// Stops or resumes the SA: operator, expiry, quarantine.
    pub fn set_disabled(&self, disabled: bool) {
        self.live.disabled.store(disabled, Ordering::Relaxed);
    }

    /// Whether it was stopped.
    pub fn disabled(&self) -> bool {
        self.live.disabled.load(Ordering::Relaxed)
    }

    /// Asks the CPU to fetch what numbering and encapsulation touch.
    #[inline(always)]
    pub fn prefetch_out(&self) {
        crate::prefetch::read(&self.fixed.id);
        crate::prefetch::read_lines(&self.fixed.out, 1);
        crate::prefetch::read_lines(&self.live, 2);
    }

    /// Asks the CPU to fetch what the look-up, the window check and decapsulation touch.
    #[inline(always)]
    pub fn prefetch_in(&self) {
        crate::prefetch::read_lines(&self.fixed, 2);
        crate::prefetch::read(&self.live.lease_low);
        crate::prefetch::read(&self.live.window);
    }

    /// Where the outer packets go, as remembered from the route table of this generation.
    #[inline(always)]
    pub fn hop(&self, generation: u32) -> Option<HopIdx> {
        let hop = self.live.hop.load(Ordering::Relaxed);
        let [a, b, c, d, e, f, g, h] = hop.to_le_bytes();
        (u32::from_le_bytes([e, f, g, h]) == generation && hop != u64::MAX)
            .then(|| HopIdx(u32::from_le_bytes([a, b, c, d])))
    }

    /// Remembers where the outer packets go. Owner only.
    #[inline]
    pub fn remember_hop(&self, generation: u32, hop: HopIdx) {
        let value = u64::from(generation) << 32 | u64::from(hop.0);
        self.live.hop.store(value, Ordering::Relaxed);
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
}

impl std::fmt::Debug for SaEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaEntry")
            .field("id", &self.fixed.id)
            .field("name", &self.spec.name)
            .finish_non_exhaustive()
    }
}

/// An address as a 128-bit number, IPv4 as IPv4-mapped IPv6.
pub fn mapped(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(a) => u128::from(a.to_ipv6_mapped()),
        IpAddr::V6(a) => u128::from(a),
    }
}
