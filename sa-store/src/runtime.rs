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
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::cipher::SaCipher;
use crate::counters::Counter;
use crate::drops::DropReason;
use crate::plan::{InPlan, OutPlan};
use crate::replay::ReplayWindow;
use crate::sa::{Direction, OffloadMode, SaId, SaSpec, UdpEncap, Vrf};
use crate::spd::SelectorSet;
use limits::{Thresholds, Watch};

pub use crate::spd::TunnelIdx;
pub use limits::{Gauge, Gauges};

pub mod event;
mod limits;
mod way;

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
    /// Outer source, IPv4 as IPv4-mapped. Inbound: where packets are expected from; ESP in UDP may come from elsewhere.
    pub src: u128,
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
    /// Outbound: path MTU learnt from ICMP; the largest number for none.
    path_mtu: AtomicU16,
    /// Counters.
    pub counters: SaCounters,
    /// Hop of the outer packets and the route table that gave it; see [`SaEntry::hop`].
    hop: AtomicU64,
    lease_end: AtomicU64,
    /// Inbound window.
    pub window: ReplayWindow,
    /// Nanoseconds (gateway clock) of the last packet carried.
    pub last_used: Counter,
    /// Gateway clock, nanoseconds. Outbound: when the path MTU was learnt. Inbound: when it was last told that the peer's
    /// mapping has changed, 0 while it has not.
    noted_at: AtomicU64,
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
        let thresholds = Thresholds::new(&spec, now);
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
            src: mapped(spec.src),
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
            path_mtu: AtomicU16::new(u16::MAX),
            noted_at: AtomicU64::new(0),
            hop: AtomicU64::new(u64::MAX),
            watch: Watch::new(&thresholds),
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
