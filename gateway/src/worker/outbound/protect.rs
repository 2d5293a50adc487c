//! Onto the tunnel's SA: owner, route, size, number, outer packet.

use arrayvec::ArrayVec;
use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::{BURST, Frame};
use sa_store::drops::DropReason;
use sa_store::ledger::Generated;
use sa_store::plan::OutPlan;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::{Mode, OffloadMode, SaId};
use sa_store::snapshot::Snapshot;

use super::{AHEAD, Outbound};
use crate::esp::encap::{self, EncapArgs, Hop};
use crate::esp::icmp::IcmpError;
use crate::esp::mss;
use crate::wire::{self, Frag, proto};
use crate::worker::core::Shared;
use crate::worker::cover::DUMMY_LEN;
use crate::worker::egress::{Egress, PortHop};
use crate::worker::handover::{Handed, Task};
use crate::worker::lane::Info;
use crate::worker::offload;
use crate::worker::wait::Then;

/// Packets whose SAs are found before the first is used.
const LOOK_AHEAD: usize = 4 * BURST;

impl Outbound {
    /// Protects what another worker or a route has sent into a tunnel.
    pub(super) fn encapsulate(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = self.protect.take();
        let tunnels = packets.infos().iter().map(|(_, tunnel)| Some(*tunnel));
        let senders = Senders::find(snapshot, tunnels);
        for (i, (frame, (info, tunnel))) in packets.drain().enumerate() {
            let entry = senders.at(i, snapshot, *tunnel);
            let hop = if info.p.own() {
                Hop::Local
            } else {
                Hop::Forwarded
            };
            self.protect_one(shared, snapshot, entry, frame, info, (*tunnel, hop));
        }
        packets.clear();
        // What was put in meanwhile is for the next round.
        std::mem::swap(&mut self.protect, &mut packets);
        for (frame, info) in packets.drain() {
            self.protect.push(frame, *info);
        }
    }

    /// Builds the outer packet on the tunnel's SA, or hands the packet to the worker that owns it.
    #[inline(always)]
    pub(super) fn protect_one(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        entry: Option<&SaEntry>,
        frame: Frame,
        info: &Info,
        (tunnel, from): (TunnelIdx, Hop),
    ) {
        let p = &info.p;
        let Some(entry) = entry else {
            shared.reports.acquire(shared.now, tunnel, p);
            shared.drop(frame, DropReason::NoOutboundSa);
            return;
        };
        let owner = usize::from(entry.fixed.owner);
        if owner != shared.id {
            shared.handover.stage(
                owner,
                Handed {
                    frame,
                    port: info.port,
                    task: Task::Protect(info.p, tunnel),
                },
            );
            return;
        }
        let Some(plan) = &entry.fixed.out else {
            shared.drop(frame, DropReason::NoOutboundSa);
            return;
        };
        let hop = match shared.ports.route_outer(&snapshot.fib, entry) {
            Egress::Port(hop) => hop,
            Egress::Unresolved => {
                let then = Then::Protect(tunnel);
                self.await_neighbour(shared, snapshot, frame, info, then);
                return;
            }
            // A tunnel whose outer packets are routed into a tunnel is a loop.
            Egress::Tunnel(_) | Egress::Local | Egress::None => {
                shared.drop(frame, DropReason::NoRoute);
                return;
            }
        };
        if p.ttl <= 1 && from == Hop::Forwarded && plan.mode == Mode::Tunnel {
            self.answer(
                shared,
                snapshot,
                frame.data(),
                info,
                IcmpError::TimeExceeded,
            );
            shared.drop(frame, DropReason::TtlExpired);
            return;
        }
        let mtu = plan.outer_mtu(shared.ports.mtu(hop)).min(entry.path_mtu());
        let (front, behind) = plan.worst_growth();
        let mut inner_mtu = mtu;
        let mut frame = frame;
        let tight = usize::from(p.l3_len) + front + behind > usize::from(mtu);
        if plan.tfc_to != 0 || plan.mss_clamp || tight {
            entry.age_path_mtu(shared.now);
            inner_mtu = encap::inner_mtu(plan, frame.data(), p, mtu);
            if plan.mss_clamp {
                mss::clamp(frame.data_mut(), p, mss::mss_for(inner_mtu, p.family));
            }
            let whole = entry.fixed.place.mode == OffloadMode::Packet || !may_fragment(plan, p);
            if p.l3_len > inner_mtu && whole && is_least_v6(p) && may_be_divided(entry, plan) {
                // RFC 2473 section 7.1: no IPv6 packet of this length is refused. It travels in outer fragments.
                let mut info = *info;
                info.p.clear_df();
                self.protect.push(frame, (info, tunnel));
                return;
            }
            if p.l3_len > inner_mtu && whole {
                self.answer(
                    shared,
                    snapshot,
                    frame.data(),
                    info,
                    IcmpError::TooBig { mtu: inner_mtu },
                );
                shared.drop(frame, DropReason::TooBig);
                return;
            }
        }
        if entry.fixed.place.engine != 0 {
            let way = Way {
                from,
                hop,
                mtu,
                inner_mtu,
            };
            self.protect_on_engine(shared, entry, plan, frame, info, way);
            return;
        }
        let seq = match entry.next_out(u64::from(p.l3_len), shared.now) {
            Ok(seq) => seq,
            Err(reason) => {
                shared.refuse(frame, reason, p, Some((entry.fixed.spi, 0)));
                return;
            }
        };
        let args = EncapArgs {
            seq,
            hop: from,
            inner_mtu,
        };
        // The handle is moved before encapsulation changes it: what is written in pieces cannot be read whole soon
        // after without waiting.
        entry.fixed.cipher.prefetch();
        self.jobs.push(EspJob {
            frame,
            sa: entry.fixed.id,
            seq,
            tag: hop.to_tag(),
            note: note(plan, mtu),
            esp_off: 0,
            esp_end: 0,
            next_header: 0,
            kind: JobKind::Seal,
            mode: OffloadMode::Software,
            status: JobStatus::Pending,
        });
        let Some(job) = self.jobs.last_mut() else {
            return;
        };
        match encap::encap(&mut job.frame, p, plan, args, &mut self.state) {
            Ok(ok) => {
                job.esp_off = ok.esp_off;
                job.esp_end = length(&job.frame);
            }
            Err(reason) => {
                entry.live.counters.malformed.add(1);
                if let Some(job) = self.jobs.pop() {
                    shared.drop(job.frame, reason);
                }
            }
        }
    }

    /// The rest of [`protect_one`](Self::protect_one) for an SA whose packets an engine ciphers.
    #[inline(never)]
    fn protect_on_engine(
        &mut self,
        shared: &mut Shared,
        entry: &SaEntry,
        plan: &OutPlan,
        mut frame: Frame,
        info: &Info,
        way: Way,
    ) {
        let (p, place) = (&info.p, entry.fixed.place);
        let refused = if !shared.bank.has_room(place.engine) {
            Some(DropReason::EngineBusy)
        } else if place.mode == OffloadMode::Packet && p.frag != Frag::No {
            Some(DropReason::EngineRefused)
        } else {
            None
        };
        if let Some(reason) = refused {
            entry.live.counters.engine.add(1);
            shared.drop(frame, reason);
            return;
        }
        let seq = match entry.next_out(u64::from(p.l3_len), shared.now) {
            Ok(seq) => seq,
            Err(reason) => {
                shared.refuse(frame, reason, p, Some((entry.fixed.spi, 0)));
                return;
            }
        };
        let built = if place.outer_headers {
            match way.from {
                Hop::Forwarded => wire::decrement_ttl(frame.data_mut(), p).map(|()| 0),
                Hop::Local => Ok(0),
            }
        } else {
            let args = EncapArgs {
                seq,
                hop: way.from,
                inner_mtu: way.inner_mtu,
            };
            encap::encap(&mut frame, p, plan, args, &mut self.state).map(|ok| ok.esp_off)
        };
        match built {
            Ok(esp_off) => {
                let job = EspJob {
                    esp_end: length(&frame),
                    frame,
                    sa: entry.fixed.id,
                    seq,
                    tag: way.hop.to_tag(),
                    note: note(plan, way.mtu),
                    esp_off,
                    next_header: match p.family {
                        wire::Family::V4 => proto::IPV4,
                        wire::Family::V6 => proto::IPV6,
                    },
                    kind: JobKind::Seal,
                    mode: place.mode,
                    status: JobStatus::Pending,
                };
                offload::stage(shared, entry, plan, job);
            }
            Err(reason) => {
                entry.live.counters.malformed.add(1);
                shared.drop(frame, reason);
            }
        }
    }

    /// Sends a dummy packet on an SA. When something stands in the way, the next one will do.
    #[cold]
    pub(super) fn dummy(&mut self, shared: &mut Shared, snapshot: &Snapshot, id: SaId) {
        let Some(entry) = snapshot.sa(id) else { return };
        let Some(plan) = &entry.fixed.out else { return };
        let place = entry.fixed.place;
        if place.engine != 0 && !shared.bank.has_room(place.engine) {
            return;
        }
        let Egress::Port(hop) = shared.ports.route(
            &snapshot.fib,
            entry.fixed.vrf,
            entry.fixed.dst,
            entry.fixed.spi,
        ) else {
            return;
        };
        let mtu = plan.outer_mtu(shared.ports.mtu(hop)).min(entry.path_mtu());
        let room = plan.inner_mtu(mtu, 0);
        let len = if plan.tfc_to == 0 {
            DUMMY_LEN
        } else {
            plan.tfc_to
        }
        .min(room);
        let Some(mut frame) = shared.pool.get_spare() else {
            return;
        };
        shared.counters.generate(Generated::Dummy);
        let built = entry.next_out(0, shared.now).and_then(|seq| {
            Ok((
                seq,
                encap::dummy(&mut frame, usize::from(len), plan, seq, &mut self.state)?,
            ))
        });
        match built {
            Ok((seq, ok)) => {
                let job = EspJob {
                    esp_end: length(&frame),
                    frame,
                    sa: id,
                    seq,
                    tag: hop.to_tag(),
                    note: note(plan, mtu),
                    esp_off: ok.esp_off,
                    next_header: 0,
                    kind: JobKind::Seal,
                    mode: place.mode,
                    status: JobStatus::Pending,
                };
                match place.engine {
                    0 => self.jobs.push(job),
                    _ => offload::stage(shared, entry, plan, job),
                }
            }
            Err(reason) => shared.drop(frame, reason),
        }
    }
}

/// Where a packet that is to be protected will go.
struct Way {
    from: Hop,
    hop: PortHop,
    mtu: u16,
    inner_mtu: u16,
}

/// The SAs on which a burst of packets will go, found before the first is used and fetched a little ahead, so that misses
/// overlap and the first-level cache holds what was fetched.
pub(super) struct Senders<'a>(ArrayVec<Option<&'a SaEntry>, LOOK_AHEAD>);

impl<'a> Senders<'a> {
    #[inline(always)]
    pub(super) fn find(
        snapshot: &'a Snapshot,
        tunnels: impl Iterator<Item = Option<TunnelIdx>>,
    ) -> Self {
        let mut found = ArrayVec::new();
        for tunnel in tunnels.take(LOOK_AHEAD) {
            found.push(tunnel.and_then(|t| snapshot.outbound(t)).map(|e| &**e));
        }
        for entry in found.iter().take(AHEAD).flatten() {
            entry.prefetch_out();
        }
        Self(found)
    }

    /// The sender of packet `i`, whose tunnel is `tunnel`.
    #[inline(always)]
    pub(super) fn at(
        &self,
        i: usize,
        snapshot: &'a Snapshot,
        tunnel: TunnelIdx,
    ) -> Option<&'a SaEntry> {
        if let Some(Some(ahead)) = self.0.get(i + AHEAD) {
            ahead.prefetch_out();
        }
        match self.0.get(i) {
            Some(entry) => *entry,
            None => snapshot.outbound(tunnel).map(|e| &**e),
        }
    }
}

/// Set in a job's note when the UDP checksum is to be made after sealing. The low 16 bits are the path's MTU.
pub(super) const UDP_CHECKSUM: u32 = 1 << 16;

#[inline(always)]
fn note(plan: &OutPlan, mtu: u16) -> u32 {
    u32::from(mtu) | u32::from(plan.needs_udp_checksum()) << 16
}

/// Whether a packet that is too big may travel in fragments of its outer packet: the outer DF bit is clear (or
/// would be, over IPv6), RFC 4301 section 8.1.
fn may_fragment(plan: &OutPlan, p: &wire::Parsed) -> bool {
    let df = if plan.df_mask != 0 {
        p.df()
    } else {
        plan.df_set != 0
    };
    plan.mode == Mode::Tunnel && !df
}

/// Whether an IPv6 packet is of a length that every path must take.
#[cold]
fn is_least_v6(p: &wire::Parsed) -> bool {
    p.family == wire::Family::V6 && p.l3_len <= 1280 && p.df()
}

/// Whether an SA's outer packets can be sent in fragments when their inner packets do not forbid it.
#[cold]
fn may_be_divided(entry: &SaEntry, plan: &OutPlan) -> bool {
    entry.fixed.place.mode != OffloadMode::Packet && plan.mode == Mode::Tunnel && plan.df_set == 0
}

/// Length of a frame's packet: frames are shorter than 64 KiB.
#[inline(always)]
fn length(frame: &Frame) -> u16 {
    u16::try_from(frame.len()).unwrap_or(u16::MAX)
}
