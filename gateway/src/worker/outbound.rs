//! Towards the unprotected side: policy, SA, encapsulation; and the forwarding of what is already allowed.

use arrayvec::ArrayVec;
use pmd::BURST;
use pmd::Frame;
use pmd::engine::{EspJob, JobKind, JobStatus};
use sa_store::drops::DropReason;
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::plan::OutPlan;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::{Mode, OffloadMode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, Verdict};

use super::core::{Shared, dst_of, flow_key};
use super::cover::{Cover, DUMMY_LEN};
use super::egress::{Egress, PortHop};
use super::handover::{Handed, Task};
use super::lane::{Info, Lane};
use super::offload;
use super::setup::{PipelineConfig, PolicyHits, Side};
use super::stages::Stage;
use crate::esp::encap::{self, EncapArgs, EncapState, Hop};
use crate::esp::fragment::fragment;
use crate::esp::icmp::{self, IcmpError};
use crate::esp::iv::CbcIvGen;
use crate::esp::mss;
use crate::esp::rate::TokenBucket;
use crate::wire::{self, Frag, proto};
use sa_store::ledger::Generated;

/// Packets whose SAs are found before the first is used.
const LOOK_AHEAD: usize = 4 * BURST;
/// Packets between fetching an SA and using it.
pub(super) const AHEAD: usize = 12;
/// ICMP errors that a worker sends, RFC 1812 section 4.3.2.8.
const ICMP_PER_SECOND: u32 = 1000;
const ICMP_BURST: u32 = 50;

/// The outbound half of a worker.
pub(super) struct Outbound {
    /// From inside: policy decides.
    pub(super) clear: Lane<Info>,
    /// Policy or a route has decided.
    pub(super) protect: Lane<(Info, TunnelIdx)>,
    /// Allowed in the clear or decrypted: goes where the route says.
    pub(super) forward: Lane<Info>,
    keys: Vec<FlowKey>,
    verdicts: Vec<Verdict>,
    jobs: Vec<EspJob>,
    done: Vec<EspJob>,
    flows: FlowCache<Verdict>,
    state: EncapState,
    errors: TokenBucket,
    fragment_id: u32,
    cover: Cover,
    pieces: Vec<Frame>,
}

impl Outbound {
    pub(super) fn new(config: &PipelineConfig, iv: CbcIvGen) -> Self {
        Self {
            clear: Lane::with_capacity(4 * BURST),
            protect: Lane::with_capacity(4 * BURST),
            forward: Lane::with_capacity(4 * BURST),
            keys: Vec::with_capacity(4 * BURST),
            verdicts: Vec::with_capacity(4 * BURST),
            jobs: Vec::with_capacity(4 * BURST),
            done: Vec::with_capacity(4 * BURST),
            flows: FlowCache::new(config.flow_entries),
            state: EncapState::new(iv, 0),
            errors: TokenBucket::new(ICMP_PER_SECOND, ICMP_BURST),
            fragment_id: 0,
            cover: Cover::default(),
            pieces: Vec::with_capacity(64),
        }
    }

    /// Answers that go out with the next round.
    pub(super) fn held(&self) -> usize {
        self.forward.len() + self.clear.len() + self.protect.len()
    }

    /// Counts the policies' packets of some flows. True at the end of a pass over all.
    #[inline]
    pub(super) fn report_hits(&mut self, hits: &PolicyHits, sets: usize) -> bool {
        self.flows.is_settled() || self.flows.settle(sets, PolicyHits::count(&hits.out))
    }

    /// Ends what waits.
    pub(super) fn abandon(&mut self, shared: &mut Shared) {
        let clear = self.forward.drain().chain(self.clear.drain());
        let protect = self.protect.drain().map(|(frame, _)| frame);
        for frame in clear.map(|(frame, _)| frame).chain(protect) {
            shared.drop(frame, DropReason::Shutdown);
        }
        self.forward.clear();
        self.clear.clear();
        self.protect.clear();
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(&mut self, shared: &mut Shared, snapshot: &Snapshot) -> usize {
        let mut work = self.forward.len() + self.clear.len() + self.protect.len();
        if !self.forward.is_empty() {
            self.forward(shared, snapshot);
            shared.stages.mark(Stage::Forward);
        }
        if !self.clear.is_empty() {
            self.decide(shared, snapshot);
            shared.stages.mark(Stage::Encap);
        }
        if !self.protect.is_empty() {
            self.encapsulate(shared, snapshot);
            shared.stages.mark(Stage::Encap);
        }
        self.cover.follow(snapshot, shared.id, shared.now);
        while let Some(id) = self.cover.next_due(shared.now) {
            self.dummy(shared, snapshot, id);
        }
        shared.bank.take(JobKind::Seal, &mut self.done);
        if !self.jobs.is_empty() {
            let kind = JobKind::Seal;
            shared
                .bank
                .submit(snapshot, kind, &mut self.jobs, &mut self.done);
            for job in self.jobs.drain(..) {
                shared.drop(job.frame, DropReason::EngineBusy);
            }
            shared.stages.mark(Stage::Crypto);
        }
        work += self.done.len();
        self.finish(shared, snapshot);
        shared.stages.mark(Stage::Finish);
        work
    }

    /// Sends on what is already allowed: decrypted packets and bypassed ones from outside.
    fn forward(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = self.forward.take();
        for (frame, info) in packets.drain() {
            self.deliver(shared, snapshot, frame, info);
        }
        packets.clear();
        // Answers made meanwhile wait for the next round.
        std::mem::swap(&mut self.forward, &mut packets);
        for (frame, info) in packets.drain() {
            self.forward.push(frame, *info);
        }
    }

    /// Sends one packet where its route says. Towards another unprotected port it is subject to the outbound policy
    /// like any other packet.
    #[inline]
    pub(super) fn deliver(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        frame: Frame,
        info: &Info,
    ) {
        let vrf = shared.vrf(info.port);
        match shared
            .ports
            .route(&snapshot.fib, vrf, dst_of(&info.p), hash_of(&info.p))
        {
            Egress::Port(hop) if shared.ports.side(hop) == Side::Outside => {
                self.clear.push(frame, *info);
            }
            Egress::Port(hop) => self.send_clear(shared, frame, info, hop),
            Egress::Tunnel(tunnel) => self.protect.push(frame, (*info, tunnel)),
            Egress::Local => shared.drop(frame, DropReason::NotForUs),
            Egress::Unresolved => shared.drop(frame, DropReason::NoNeighbour),
            Egress::None => shared.drop(frame, DropReason::NoRoute),
        }
    }

    /// Looks the policies up for packets from inside, and does as they say.
    fn decide(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = self.clear.take();
        self.verdicts(shared, snapshot, packets.infos());
        let verdicts = std::mem::take(&mut self.verdicts);
        let senders = Senders::find(
            snapshot,
            verdicts.iter().map(|v| match v.action {
                Action::Protect { tunnel } => Some(tunnel),
                _ => None,
            }),
        );
        for (i, ((frame, info), verdict)) in packets.drain().zip(&verdicts).enumerate() {
            match verdict.action {
                Action::Protect { tunnel } => {
                    let entry = senders.at(i, snapshot, tunnel);
                    self.protect_one(shared, snapshot, entry, frame, info, tunnel);
                }
                Action::Bypass => {
                    let vrf = shared.vrf(info.port);
                    shared.counters.bypassed.add(1);
                    match shared
                        .ports
                        .route(&snapshot.fib, vrf, dst_of(&info.p), hash_of(&info.p))
                    {
                        Egress::Port(hop) => self.send_clear(shared, frame, info, hop),
                        Egress::Tunnel(tunnel) => self.protect.push(frame, (*info, tunnel)),
                        Egress::Local => shared.drop(frame, DropReason::NotForUs),
                        Egress::Unresolved => shared.drop(frame, DropReason::NoNeighbour),
                        Egress::None => shared.drop(frame, DropReason::NoRoute),
                    }
                }
                Action::Discard => shared.drop(frame, DropReason::PolicyDiscard),
                Action::FragmentPolicy => {
                    shared.audit(DropReason::FragmentPolicy, &frame, &info.p, None);
                    shared.drop(frame, DropReason::FragmentPolicy);
                }
            }
        }
        packets.clear();
        self.clear = packets;
        self.verdicts = verdicts;
    }

    /// The policies' answers; a route into a tunnel comes first, for it is the operator's word on this destination.
    #[inline]
    fn verdicts(&mut self, shared: &mut Shared, snapshot: &Snapshot, packets: &[Info]) {
        let keys = packets
            .iter()
            .map(|pkt| flow_key(&pkt.p, shared.vrf(pkt.port)));
        self.keys.clear();
        self.keys.extend(keys);
        self.verdicts.clear();
        self.verdicts.resize(packets.len(), Verdict::DEFAULT);
        let (spd, fib) = (&snapshot.spd_out, &snapshot.fib);
        let mut misses = 0;
        self.flows.resolve(
            &self.keys,
            // Both only ever grow, so the sum changes whenever one of them does.
            |key| spd.generation(key).wrapping_add(fib.generation()),
            |i, key| {
                misses += 1;
                let pkt = &packets[i];
                match shared
                    .ports
                    .route(fib, key.vrf(), dst_of(&pkt.p), hash_of(&pkt.p))
                {
                    Egress::Tunnel(tunnel) => Verdict {
                        action: Action::Protect { tunnel },
                        ..Verdict::DEFAULT
                    },
                    _ => spd.lookup(key),
                }
            },
            PolicyHits::count(&shared.hits.out),
            &mut self.verdicts,
        );
        shared.counters.flow_misses.add(misses);
        let hits = packets.len() as u64 - misses;
        shared.counters.flow_hits.add(hits);
    }

    /// Protects what another worker or a route has sent into a tunnel.
    fn encapsulate(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = self.protect.take();
        let tunnels = packets.infos().iter().map(|(_, tunnel)| Some(*tunnel));
        let senders = Senders::find(snapshot, tunnels);
        for (i, (frame, (info, tunnel))) in packets.drain().enumerate() {
            let entry = senders.at(i, snapshot, *tunnel);
            self.protect_one(shared, snapshot, entry, frame, info, *tunnel);
        }
        packets.clear();
        self.protect = packets;
    }

    /// Builds the outer packet on the tunnel's SA, or hands the packet to the worker that owns it.
    #[inline(always)]
    fn protect_one(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        entry: Option<&SaEntry>,
        frame: Frame,
        info: &Info,
        tunnel: TunnelIdx,
    ) {
        let p = &info.p;
        let Some(entry) = entry else {
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
                shared.drop(frame, DropReason::NoNeighbour);
                return;
            }
            // A tunnel whose outer packets are routed into a tunnel is a loop.
            Egress::Tunnel(_) | Egress::Local | Egress::None => {
                shared.drop(frame, DropReason::NoRoute);
                return;
            }
        };
        if p.ttl <= 1 && plan.mode == Mode::Tunnel {
            self.answer(shared, frame.data(), info, IcmpError::TimeExceeded);
            shared.drop(frame, DropReason::TtlExpired);
            return;
        }
        let mtu = plan.outer_mtu(shared.ports.mtu(hop));
        let (front, behind) = plan.worst_growth();
        let mut inner_mtu = mtu;
        let mut frame = frame;
        let tight = usize::from(p.l3_len) + front + behind > usize::from(mtu);
        if plan.tfc_to != 0 || plan.mss_clamp || tight {
            inner_mtu = encap::inner_mtu(plan, frame.data(), p, mtu);
            if plan.mss_clamp {
                mss::clamp(frame.data_mut(), p, mss::mss_for(inner_mtu, p.family));
            }
            let whole = entry.fixed.place.mode == OffloadMode::Packet || !may_fragment(plan, p);
            if p.l3_len > inner_mtu && whole {
                self.answer(
                    shared,
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
                shared.audit(reason, &frame, p, Some((entry.fixed.spi, 0)));
                shared.drop(frame, reason);
                return;
            }
        };
        let args = EncapArgs {
            seq,
            hop: Hop::Forwarded,
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
                shared.audit(reason, &frame, p, Some((entry.fixed.spi, 0)));
                shared.drop(frame, reason);
                return;
            }
        };
        let built = if place.outer_headers {
            wire::decrement_ttl(frame.data_mut(), p).map(|()| 0)
        } else {
            let args = EncapArgs {
                seq,
                hop: Hop::Forwarded,
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

    /// When a dummy packet is due next, gateway clock.
    pub(super) fn wake_at(&self) -> Option<u64> {
        self.cover.wake_at()
    }

    /// Sends a dummy packet on an SA. When something stands in the way, the next one will do.
    #[cold]
    fn dummy(&mut self, shared: &mut Shared, snapshot: &Snapshot, id: SaId) {
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
        let room = plan.inner_mtu(plan.outer_mtu(shared.ports.mtu(hop)), 0);
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
                    note: note(plan, plan.outer_mtu(shared.ports.mtu(hop))),
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

    /// Sends what came back sealed.
    fn finish(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut done = std::mem::take(&mut self.done);
        let mut encrypted = 0;
        for job in done.drain(..) {
            match job.status {
                JobStatus::Done if job.mode != OffloadMode::Packet || offload::is_whole(&job) => {}
                status => {
                    if let Some(entry) = snapshot.sa(job.sa) {
                        entry.live.counters.engine.add(1);
                    }
                    shared.drop(job.frame, offload::reason(status));
                    continue;
                }
            }
            encrypted += 1;
            let mut frame = job.frame;
            let hop = PortHop::from_tag(job.tag);
            #[allow(clippy::cast_possible_truncation, reason = "the low 16 bits")]
            let mtu = job.note as u16;
            if job.note & UDP_CHECKSUM != 0 {
                // The checksum of what goes in fragments is over all of them.
                let whole = frame.len() <= usize::from(mtu);
                if whole && shared.ports.completes_checksums(hop) {
                    encap::leave(&mut frame, job.esp_off);
                } else {
                    encap::finish(&mut frame, job.esp_off);
                }
            }
            self.send(shared, frame, hop, mtu);
        }
        shared.counters.encrypted.add(encrypted);
        self.done = done;
    }

    /// Sends a packet in the clear: hop limit, size, then out.
    fn send_clear(&mut self, shared: &mut Shared, mut frame: Frame, info: &Info, hop: PortHop) {
        if let Err(reason) = wire::decrement_ttl(frame.data_mut(), &info.p) {
            self.answer(shared, frame.data(), info, IcmpError::TimeExceeded);
            shared.drop(frame, reason);
            return;
        }
        let mtu = shared.ports.mtu(hop);
        if info.p.l3_len > mtu && info.p.df() {
            self.answer(shared, frame.data(), info, IcmpError::TooBig { mtu });
            shared.drop(frame, DropReason::TooBig);
            return;
        }
        self.send(shared, frame, hop, mtu);
    }

    /// Gives an IP packet to its port, in fragments when it is larger than `mtu`.
    #[inline(always)]
    fn send(&mut self, shared: &mut Shared, frame: Frame, hop: PortHop, mtu: u16) {
        if frame.len() > usize::from(mtu) {
            self.send_fragments(shared, frame, hop, mtu);
            return;
        }
        if let Err((frame, reason)) = shared.ports.send(frame, hop, &mut shared.handover) {
            shared.drop(frame, reason);
        }
    }

    #[cold]
    fn send_fragments(&mut self, shared: &mut Shared, frame: Frame, hop: PortHop, mtu: u16) {
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let mut pieces = std::mem::take(&mut self.pieces);
        match fragment(
            frame,
            usize::from(mtu),
            self.fragment_id,
            &mut shared.pool,
            &mut pieces,
        ) {
            Ok(count) => {
                // The first fragment is the frame that came in; the others are new.
                for _ in 1..count {
                    shared.counters.generate(Generated::Fragment);
                }
            }
            Err((frame, reason)) => shared.drop(frame, reason),
        }
        for piece in pieces.drain(..) {
            if let Err((frame, reason)) = shared.ports.send(piece, hop, &mut shared.handover) {
                shared.drop(frame, reason);
            }
        }
        self.pieces = pieces;
    }

    /// Answers with an ICMP error where RFC 1812 and RFC 4443 allow one, within the rate limit. The answer goes
    /// out with the next round.
    #[cold]
    fn answer(&mut self, shared: &mut Shared, packet: &[u8], info: &Info, error: IcmpError) {
        let v6 = info.p.family == wire::Family::V6;
        let Some(from) = shared.config.locals.any(shared.vrf(info.port), v6) else {
            return;
        };
        if !icmp::may_answer(&info.p, error) || !self.errors.allow(shared.now) {
            return;
        }
        let Some(mut frame) = shared.pool.get_spare() else {
            return;
        };
        if !icmp::build(&mut frame, packet, &info.p, error, from) {
            shared.pool.put(frame);
            return;
        }
        shared.counters.generate(Generated::Icmp);
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) => self.forward.push(frame, Info { p, port: info.port }),
            Err(reason) => shared.drop(frame, reason),
        }
    }
}

/// Where a packet that is to be protected will go.
struct Way {
    hop: PortHop,
    mtu: u16,
    inner_mtu: u16,
}

/// The SAs on which a burst of packets will go, found before the first is used and fetched a little ahead, so that misses
/// overlap and the first-level cache holds what was fetched.
struct Senders<'a>(ArrayVec<Option<&'a SaEntry>, LOOK_AHEAD>);

impl<'a> Senders<'a> {
    #[inline(always)]
    fn find(snapshot: &'a Snapshot, tunnels: impl Iterator<Item = Option<TunnelIdx>>) -> Self {
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
    fn at(&self, i: usize, snapshot: &'a Snapshot, tunnel: TunnelIdx) -> Option<&'a SaEntry> {
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
const UDP_CHECKSUM: u32 = 1 << 16;

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

/// Spreads flows over equal next hops.
#[inline(always)]
fn hash_of(p: &wire::Parsed) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "a hash")]
    let mixed =
        (p.src ^ p.dst.rotate_left(17)) as u32 ^ u32::from(p.sport) << 16 ^ u32::from(p.dport);
    mixed
}

/// Length of a frame's packet: frames are shorter than 64 KiB.
#[inline(always)]
fn length(frame: &Frame) -> u16 {
    u16::try_from(frame.len()).unwrap_or(u16::MAX)
}
