//! One poll round of a worker: the stages in order, and the state they share.
//!
//! ```text
//!   rx ─▶ parse ─┬▶ inbound: SAD ─▶ pre ─▶ engine ─▶ post ─▶ policy ─┬▶ route ─▶ tx
//!                └▶ outbound: SPD ─▶ SA ─▶ pre ─▶ engine ─▶ post ────┘
//! ```
//!
//! Packets whose SA another worker owns leave through the handover rings between look-up and pre. Every frame
//! that a stage ends is counted in the ledger at that place.

use std::sync::Arc;

use pmd::{BURST, Frame, Pool};
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::{FlowKey, L4};
use sa_store::ledger::WorkerCounters;
use sa_store::sa::Vrf;
use sa_store::snapshot::Snapshot;

use super::egress::{Ports, Usual};
use super::handover::{Handed, Handover, Task};
use super::inbound::Inbound;
use super::lane::{Info, cut};
use super::outbound::Outbound;
use super::punt::Taps;
use super::reports::Reports;
use super::setup::{PipelineConfig, PolicyHits, Side};
use super::stages::{Stage, StageClock};
use crate::engine::Bank;
use crate::engine::parallel::CryptoHelper;
use crate::esp::iv::CbcIvGen;
use crate::wire::{self, Family, Frag, Kind, NattPorts, Parsed};

/// Everything that stages share; each stage's own tables live in its module.
pub(super) struct Shared {
    pub(super) id: usize,
    pub(super) config: Arc<PipelineConfig>,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) hits: Arc<PolicyHits>,
    pub(super) pool: Pool,
    pub(super) ports: Ports,
    pub(super) taps: Taps,
    pub(super) handover: Handover,
    pub(super) bank: Bank,
    pub(super) helper: Option<CryptoHelper>,
    pub(super) natt: NattPorts,
    pub(super) stages: StageClock,
    pub(super) reports: Reports,
    /// Gateway clock of this round, nanoseconds.
    pub(super) now: u64,
}

impl Shared {
    /// Ends a frame.
    #[inline]
    pub(super) fn drop(&mut self, frame: Frame, reason: DropReason) {
        self.counters.drop_frames(reason, 1);
        self.pool.put(frame);
    }

    /// One round of the engines: what was staged goes in, what is done comes out.
    #[inline]
    fn turn_engines(&mut self, snapshot: &Snapshot) -> usize {
        let wakers = self.handover.wakers();
        let got = self.bank.turn(snapshot, |worker| {
            if let Some(waker) = wakers.get(worker) {
                waker.wake();
            }
        });
        if !self.bank.is_plain() {
            self.counters.in_flight.set(self.bank.in_flight() as u64);
        }
        got
    }

    /// Whether everything that brings frames can wake a sleeping worker.
    pub(super) fn all_wake(&self) -> bool {
        self.ports.all_wake() && self.taps.all_wake()
    }

    /// Tells the audit log of a packet that is about to be dropped; see [`Reports::audit`].
    #[cold]
    pub(super) fn audit(
        &mut self,
        reason: DropReason,
        frame: &Frame,
        p: &Parsed,
        esp: Option<(u32, u32)>,
    ) {
        self.reports.audit(self.now, reason, frame, p, esp);
    }

    /// Drops a packet and tells the audit log of it.
    #[inline]
    pub(super) fn refuse(
        &mut self,
        frame: Frame,
        reason: DropReason,
        p: &Parsed,
        esp: Option<(u32, u32)>,
    ) {
        self.audit(reason, &frame, p, esp);
        self.drop(frame, reason);
    }

    /// Ends a frame for a good reason.
    #[inline]
    pub(super) fn consume(&mut self, frame: Frame, kind: Consumed) {
        self.counters.consume(kind);
        self.pool.put(frame);
    }

    /// VRF of a port.
    #[inline]
    pub(super) fn vrf(&self, port: u16) -> Vrf {
        self.config
            .ports
            .get(usize::from(port))
            .map_or(Vrf(0), |p| p.vrf)
    }

    /// Whether the packet is addressed to the gateway.
    #[inline]
    pub(super) fn is_local(&self, snapshot: &Snapshot, p: &Parsed, vrf: Vrf) -> bool {
        snapshot.locals.contains(vrf, dst_of(p))
    }
}

/// Stages and lanes of one worker.
pub(super) struct Core {
    pub(super) shared: Shared,
    pub(super) inbound: Inbound,
    pub(super) outbound: Outbound,
    /// A burst whose packets belong to several lanes, see [`Core::distribute`].
    mixed: Vec<Frame>,
    mixed_infos: Vec<Info>,
    /// What the kernel has sent, with its port.
    pub(super) injected: Vec<(u16, Frame)>,
    receiving: bool,
    settling: Settling,
}

/// When the flow caches report packets to the policies' counters.
#[derive(Default)]
struct Settling {
    /// Gateway clock at which the next pass begins.
    due: u64,
    out_done: bool,
    in_done: bool,
}

impl Settling {
    /// Between two passes under load, nanoseconds.
    const EVERY: u64 = 1_000_000_000;
    /// Sets of a cache per round with and without work. A thousand idle rounds, after which a worker sleeps, are
    /// enough for a million flows.
    const BUSY: usize = 4;
    const IDLE: usize = 128;
}

impl Core {
    pub(super) fn new(shared: Shared, iv: CbcIvGen) -> Self {
        let inbound = Inbound::new(&shared.config);
        let outbound = Outbound::new(&shared.config, iv);
        Self {
            shared,
            inbound,
            outbound,
            mixed: Vec::with_capacity(4 * BURST),
            mixed_infos: Vec::with_capacity(4 * BURST),
            injected: Vec::new(),
            receiving: true,
            settling: Settling::default(),
        }
    }

    /// One round at gateway time `now`. Returns how many frames it moved: 0 means idle.
    pub(super) fn round(&mut self, snapshot: &Snapshot, now: u64) -> usize {
        self.shared.now = now;
        let mut work = 0;
        if self.receiving {
            work += self.receive();
            if self.shared.taps.is_due(now) {
                work += self.receive_injected(snapshot);
            }
        }
        work += self.receive_handed();
        self.shared.stages.mark(Stage::Receive);
        work += self
            .inbound
            .run(&mut self.shared, snapshot, &mut self.outbound);
        work += self.outbound.run(&mut self.shared, snapshot);
        work += self.shared.turn_engines(snapshot);
        if let Some(helper) = &mut self.shared.helper {
            work += helper.assist();
        }
        work += self
            .shared
            .ports
            .transmit(&mut self.shared.pool, &self.shared.counters);
        self.flush_handover();
        work += self
            .shared
            .taps
            .flush(&mut self.shared.pool, &self.shared.counters);
        self.shared.stages.mark(Stage::Transmit);
        self.settle(work);
        let held = self.shared.ports.backlog()
            + self.shared.taps.held()
            + self.inbound.held()
            + self.outbound.held();
        self.shared.counters.waiting.set(held as u64);
        // Engines wake nobody: as long as they have something, the worker polls.
        work + usize::from(self.shared.bank.is_busy())
    }

    /// Brings the policies' counters up to date: a little each round under load, and whenever there is time.
    #[inline]
    fn settle(&mut self, work: usize) {
        let Self {
            shared,
            inbound,
            outbound,
            settling,
            ..
        } = self;
        if work == 0 {
            outbound.report_hits(&shared.hits, Settling::IDLE);
            inbound.report_hits(&shared.hits, Settling::IDLE);
        } else if shared.now >= settling.due {
            settling.out_done =
                settling.out_done || outbound.report_hits(&shared.hits, Settling::BUSY);
            settling.in_done =
                settling.in_done || inbound.report_hits(&shared.hits, Settling::BUSY);
            if settling.out_done && settling.in_done {
                *settling = Settling {
                    due: shared.now + Settling::EVERY,
                    ..Settling::default()
                };
            }
        }
    }

    /// Stops taking frames from ports; what is inside still goes through.
    pub(super) fn stop_receiving(&mut self) {
        self.receiving = false;
    }

    /// Whether nothing is inside: no backlog, nothing in an engine or in a ring to this worker.
    pub(super) fn is_empty(&self) -> bool {
        self.shared.ports.backlog() == 0
            && self.shared.taps.held() == 0
            && !self.shared.bank.is_busy()
            && !self.shared.handover.pending()
            && !self
                .shared
                .helper
                .as_ref()
                .is_some_and(CryptoHelper::is_wanted)
    }

    /// Gives every held frame back, counted as dropped at shutdown, and empties the ports.
    pub(super) fn shut_down(&mut self) {
        let shared = &mut self.shared;
        let Shared {
            bank,
            helper,
            counters,
            pool,
            ..
        } = shared;
        // The others do without before this worker waits for them.
        if let Some(helper) = helper {
            helper.retire();
        }
        bank.abandon(|job| {
            counters.drop_frames(DropReason::Shutdown, 1);
            pool.put(job.frame);
        });
        counters.in_flight.set(bank.in_flight() as u64);
        self.inbound.abandon(shared);
        self.outbound.abandon(shared);
        // From wherever the last pass stopped, then round.
        for _ in 0..2 {
            self.inbound.report_hits(&shared.hits, usize::MAX);
            self.outbound.report_hits(&shared.hits, usize::MAX);
        }
        shared.ports.abandon(&mut shared.pool, &shared.counters);
        shared.taps.abandon(&mut shared.pool, &shared.counters);
        let mut late = Vec::new();
        shared.handover.receive(usize::MAX, |h| late.push(h.frame));
        shared.counters.handed_in.add(late.len() as u64);
        for frame in late {
            shared.drop(frame, DropReason::Shutdown);
        }
        shared.ports.close(&mut shared.pool);
        shared.taps.close(&mut shared.pool);
        shared.counters.waiting.set(0);
    }

    /// Receives from every port into the lane that its packets usually belong to.
    fn receive(&mut self) -> usize {
        let mut got = 0;
        for port in 0..self.shared.ports.len() {
            #[allow(clippy::cast_possible_truncation, reason = "ports are numbered by u16")]
            let number = port as u16;
            let usual = self.shared.ports.usual(number);
            let lane = match usual.side {
                Side::Inside => &mut self.outbound.clear,
                Side::Outside => &mut self.inbound.esp,
            };
            let before = lane.len();
            let shared = &mut self.shared;
            let n = shared.ports.receive(port, &mut shared.pool, lane.receive());
            if n == 0 {
                continue;
            }
            got += n;
            self.shared.stages.mark(Stage::Receive);
            if !lane.describe(number, self.shared.natt, |p| usual.fits(p)) {
                self.distribute(number, usual, before);
            }
            self.shared.stages.mark(Stage::Parse);
        }
        if got != 0 {
            self.shared.counters.received.add(got as u64);
        }
        got
    }

    /// Puts each packet of a burst that is not all of the usual kind into its lane. The burst stands behind the first
    /// `before` packets of the usual lane.
    #[inline(never)]
    fn distribute(&mut self, port: u16, usual: Usual, before: usize) {
        let Self {
            shared,
            inbound,
            outbound,
            mixed,
            mixed_infos,
            ..
        } = self;
        match usual.side {
            Side::Inside => outbound.clear.recall(before, mixed, mixed_infos),
            Side::Outside => inbound.esp.recall(before, mixed, mixed_infos),
        }
        for (mut frame, info) in mixed.drain(..).zip(mixed_infos.drain(..)) {
            if usual.fits(&info.p) {
                match usual.side {
                    Side::Inside => outbound.clear.push(frame, info),
                    Side::Outside => inbound.esp.push(frame, info),
                }
                continue;
            }
            if info.p.kind == Kind::NotIp {
                match wire::parse(frame.data(), shared.natt) {
                    Ok(p) => match shared.ports.of_tag(port, p.vlan) {
                        Some(port) => shared.punt_foreign(frame, &p, port),
                        None => shared.drop(frame, DropReason::NotForUs),
                    },
                    Err(reason) => shared.drop(frame, reason),
                }
                continue;
            }
            let p = info.p;
            let Some(port) = shared.ports.of_tag(port, p.vlan) else {
                shared.drop(frame, DropReason::NotForUs);
                continue;
            };
            cut(&mut frame, &p);
            let lane = match (p.kind, shared.ports.side_of(port)) {
                (Kind::Esp | Kind::UdpEsp, _) => &mut inbound.esp,
                (Kind::Ip, Side::Inside) if p.frag == Frag::No => &mut outbound.clear,
                _ => &mut inbound.other,
            };
            lane.push(frame, Info { p, port });
        }
    }

    fn receive_handed(&mut self) -> usize {
        let Self {
            shared,
            inbound,
            outbound,
            ..
        } = self;
        let Shared {
            handover,
            ports,
            counters,
            pool,
            ..
        } = shared;
        let got = handover.receive(BURST, |h: Handed| {
            let Handed { frame, port, task } = h;
            match task {
                Task::Protect(p, tunnel) => {
                    outbound.protect.push(frame, (Info { p, port }, tunnel))
                }
                Task::Open(p) => inbound.esp.push(frame, Info { p, port }),
                Task::Send(egress) => {
                    if let Err((frame, reason)) = ports.queue(egress, frame) {
                        counters.drop_frames(reason, 1);
                        pool.put(frame);
                    }
                }
            }
        });
        if got != 0 {
            shared.counters.handed_in.add(got as u64);
        }
        got
    }

    fn flush_handover(&mut self) {
        let Shared {
            handover,
            pool,
            counters,
            ..
        } = &mut self.shared;
        let sent = handover.flush(|frame| {
            counters.drop_frames(DropReason::HandoverFull, 1);
            pool.put(frame);
        });
        if sent != 0 {
            counters.handed_out.add(sent as u64);
        }
    }
}

/// Destination of a packet, IPv4 as IPv4-mapped.
#[inline(always)]
pub(super) fn dst_of(p: &Parsed) -> u128 {
    mapped(p.family, p.dst)
}

/// Source of a packet, IPv4 as IPv4-mapped.
#[inline(always)]
pub(super) fn src_of(p: &Parsed) -> u128 {
    mapped(p.family, p.src)
}

#[inline(always)]
pub(super) fn mapped(family: Family, a: u128) -> u128 {
    match family {
        Family::V4 => a | 0xffff << 32,
        Family::V6 => a,
    }
}

/// The packet's selectors in its VRF.
#[inline(always)]
pub(super) fn flow_key(p: &Parsed, vrf: Vrf) -> FlowKey {
    let l4 = if p.frag == Frag::Later {
        L4::Fragment
    } else if let Some((src, dst)) = p.ports() {
        L4::Ports { src, dst }
    } else if let Some((kind, code)) = p.icmp() {
        L4::Icmp { kind, code }
    } else {
        L4::None
    };
    #[allow(
        clippy::cast_possible_truncation,
        reason = "IPv4 addresses sit in the low 32 bits"
    )]
    let key = match p.family {
        Family::V4 => FlowKey::v4((p.src as u32).into(), (p.dst as u32).into(), p.proto, l4),
        Family::V6 => FlowKey::v6(p.src.into(), p.dst.into(), p.proto, l4),
    };
    key.with_vrf(vrf)
}
