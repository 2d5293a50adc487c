//! Towards the unprotected side: policy, SA, encapsulation; and the forwarding of what is already allowed.

use pmd::BURST;
use pmd::Frame;
use pmd::engine::{EspJob, JobKind, JobStatus};
use sa_store::drops::DropReason;
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::plan::OutPlan;
use sa_store::runtime::SaEntry;
use sa_store::sa::{Mode, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, Verdict};

use super::core::{Pkt, Protect, Shared, dst_of, flow_key};
use super::cover::{Cover, DUMMY_LEN};
use super::egress::{Egress, PortHop};
use super::handover::{Handed, Task};
use super::setup::{PipelineConfig, PolicyHits, Side};
use crate::esp::encap::{self, EncapArgs, EncapState, Hop};
use crate::esp::fragment::fragment;
use crate::esp::icmp::{self, IcmpError};
use crate::esp::iv::CbcIvGen;
use crate::esp::mss;
use crate::esp::rate::TokenBucket;
use crate::wire;
use sa_store::ledger::Generated;

/// ICMP errors that a worker sends, RFC 1812 section 4.3.2.8.
const ICMP_PER_SECOND: u32 = 1000;
const ICMP_BURST: u32 = 50;

/// The outbound half of a worker.
pub(super) struct Outbound {
    /// From inside: policy decides.
    pub(super) clear: Vec<Pkt>,
    /// Policy or a route has decided.
    pub(super) protect: Vec<Protect>,
    /// Allowed in the clear or decrypted: goes where the route says.
    pub(super) forward: Vec<Pkt>,
    keys: Vec<FlowKey>,
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
            clear: Vec::with_capacity(4 * BURST),
            protect: Vec::with_capacity(4 * BURST),
            forward: Vec::with_capacity(4 * BURST),
            keys: Vec::with_capacity(4 * BURST),
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

    /// Ends what waits.
    pub(super) fn abandon(&mut self, shared: &mut Shared) {
        let lanes = self.forward.drain(..).chain(self.clear.drain(..));
        for pkt in lanes.chain(self.protect.drain(..).map(|(pkt, _)| pkt)) {
            shared.drop(pkt.frame, DropReason::Shutdown);
        }
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(&mut self, shared: &mut Shared, snapshot: &Snapshot) -> usize {
        let mut work = self.forward.len() + self.clear.len() + self.protect.len();
        if !self.forward.is_empty() {
            self.forward(shared, snapshot);
        }
        if !self.clear.is_empty() {
            self.decide(shared, snapshot);
        }
        if !self.protect.is_empty() {
            self.encapsulate(shared, snapshot);
        }
        self.cover.follow(snapshot, shared.id, shared.now);
        while let Some(id) = self.cover.next_due(shared.now) {
            self.dummy(shared, snapshot, id);
        }
        if !self.jobs.is_empty() {
            shared
                .engine
                .submit(snapshot, &mut self.jobs, &mut self.done);
            for job in self.jobs.drain(..) {
                shared.drop(job.frame, DropReason::EngineBusy);
            }
        }
        work += self.done.len();
        self.finish(shared, snapshot);
        work
    }

    /// Sends on what is already allowed: decrypted packets and bypassed ones from outside. Towards another
    /// unprotected port they are subject to the outbound policy like any other packet.
    fn forward(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = std::mem::take(&mut self.forward);
        for pkt in packets.drain(..) {
            let vrf = shared.vrf(pkt.port);
            match shared
                .ports
                .route(&snapshot.fib, vrf, dst_of(&pkt.p), hash_of(&pkt))
            {
                Egress::Port(hop) if shared.ports.side(hop) == Side::Outside => {
                    self.clear.push(pkt)
                }
                Egress::Port(hop) => self.send_clear(shared, pkt, hop),
                Egress::Tunnel(tunnel) => self.protect.push((pkt, tunnel)),
                Egress::Local => shared.drop(pkt.frame, DropReason::NotForUs),
                Egress::Unresolved => shared.drop(pkt.frame, DropReason::NoNeighbour),
                Egress::None => shared.drop(pkt.frame, DropReason::NoRoute),
            }
        }
        self.forward = packets;
    }

    /// Looks the policies up for packets from inside.
    fn decide(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        self.keys.clear();
        for pkt in &self.clear {
            let key = flow_key(&pkt.p, shared.vrf(pkt.port));
            self.flows.prefetch(&key);
            self.keys.push(key);
        }
        let mut packets = std::mem::take(&mut self.clear);
        let keys = std::mem::take(&mut self.keys);
        for (pkt, key) in packets.drain(..).zip(&keys) {
            let verdict = self.verdict(shared, snapshot, key, &pkt);
            PolicyHits::hit(&shared.hits.out, verdict.policy.index());
            match verdict.action {
                Action::Protect { tunnel } => self.protect.push((pkt, tunnel)),
                Action::Bypass => {
                    let vrf = shared.vrf(pkt.port);
                    shared.counters.bypassed.add(1);
                    match shared
                        .ports
                        .route(&snapshot.fib, vrf, dst_of(&pkt.p), hash_of(&pkt))
                    {
                        Egress::Port(hop) => self.send_clear(shared, pkt, hop),
                        Egress::Tunnel(tunnel) => self.protect.push((pkt, tunnel)),
                        Egress::Local => shared.drop(pkt.frame, DropReason::NotForUs),
                        Egress::Unresolved => shared.drop(pkt.frame, DropReason::NoNeighbour),
                        Egress::None => shared.drop(pkt.frame, DropReason::NoRoute),
                    }
                }
                Action::Discard => shared.drop(pkt.frame, DropReason::PolicyDiscard),
                Action::FragmentPolicy => shared.drop(pkt.frame, DropReason::FragmentPolicy),
            }
        }
        self.clear = packets;
        self.keys = keys;
    }

    /// The policy's answer; a route into a tunnel comes first, for it is the operator's word on this destination.
    #[inline]
    fn verdict(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        key: &FlowKey,
        pkt: &Pkt,
    ) -> Verdict {
        let spd = &snapshot.spd_out;
        // Both only ever grow, so the sum changes whenever one of them does.
        let generation = spd.generation(key).wrapping_add(snapshot.fib.generation());
        if let Some(v) = self.flows.lookup(key, generation) {
            shared.counters.flow_hits.add(1);
            return v;
        }
        shared.counters.flow_misses.add(1);
        let routed = shared
            .ports
            .route(&snapshot.fib, key.vrf(), dst_of(&pkt.p), hash_of(pkt));
        let v = match routed {
            Egress::Tunnel(tunnel) => Verdict {
                action: Action::Protect { tunnel },
                ..Verdict::DEFAULT
            },
            _ => spd.lookup(key),
        };
        self.flows.insert(key, generation, v);
        v
    }

    /// Finds the sender of each tunnel and builds the outer packets.
    fn encapsulate(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        // Passes as in the inbound direction, so that the misses of a burst overlap.
        for entry in self
            .protect
            .iter()
            .filter_map(|(_, t)| snapshot.outbound(*t))
        {
            entry.prefetch_fixed();
        }
        for entry in self
            .protect
            .iter()
            .filter_map(|(_, t)| snapshot.outbound(*t))
        {
            entry.prefetch_live();
            entry.fixed.cipher.prefetch();
        }
        let mut packets = std::mem::take(&mut self.protect);
        for (pkt, tunnel) in packets.drain(..) {
            let Some(entry) = snapshot.outbound(tunnel) else {
                shared.drop(pkt.frame, DropReason::NoOutboundSa);
                continue;
            };
            let owner = usize::from(entry.fixed.owner);
            if owner != shared.id {
                let Pkt { frame, p, port } = pkt;
                shared.handover.stage(
                    owner,
                    Handed {
                        frame,
                        port,
                        task: Task::Protect(p, tunnel),
                    },
                );
                continue;
            }
            self.protect_one(shared, snapshot, entry, pkt);
        }
        self.protect = packets;
    }

    #[inline]
    fn protect_one(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        entry: &SaEntry,
        mut pkt: Pkt,
    ) {
        let Some(plan) = &entry.fixed.out else {
            shared.drop(pkt.frame, DropReason::NoOutboundSa);
            return;
        };
        let hop = match shared.ports.route(
            &snapshot.fib,
            entry.fixed.vrf,
            entry.fixed.dst,
            entry.fixed.spi,
        ) {
            Egress::Port(hop) => hop,
            Egress::Unresolved => {
                shared.drop(pkt.frame, DropReason::NoNeighbour);
                return;
            }
            // A tunnel whose outer packets are routed into a tunnel is a loop.
            Egress::Tunnel(_) | Egress::Local | Egress::None => {
                shared.drop(pkt.frame, DropReason::NoRoute);
                return;
            }
        };
        if pkt.p.ttl <= 1 && plan.mode == Mode::Tunnel {
            self.answer(shared, &pkt, IcmpError::TimeExceeded);
            shared.drop(pkt.frame, DropReason::TtlExpired);
            return;
        }
        let mtu = plan.outer_mtu(shared.ports.mtu(hop));
        let (front, behind) = plan.worst_growth();
        let mut inner_mtu = mtu;
        let tight = usize::from(pkt.p.l3_len) + front + behind > usize::from(mtu);
        if plan.tfc_to != 0 || plan.mss_clamp || tight {
            inner_mtu = encap::inner_mtu(plan, pkt.frame.data(), &pkt.p, mtu);
            if plan.mss_clamp {
                mss::clamp(
                    pkt.frame.data_mut(),
                    &pkt.p,
                    mss::mss_for(inner_mtu, pkt.p.family),
                );
            }
            if pkt.p.l3_len > inner_mtu && !may_fragment(plan, &pkt.p) {
                self.answer(shared, &pkt, IcmpError::TooBig { mtu: inner_mtu });
                shared.drop(pkt.frame, DropReason::TooBig);
                return;
            }
        }
        let seq = match entry.next_out(u64::from(pkt.p.l3_len), shared.now) {
            Ok(seq) => seq,
            Err(reason) => {
                shared.drop(pkt.frame, reason);
                return;
            }
        };
        let args = EncapArgs {
            seq,
            hop: Hop::Forwarded,
            inner_mtu,
        };
        match encap::encap(&mut pkt.frame, &pkt.p, plan, args, &mut self.state) {
            Ok(ok) => self.jobs.push(EspJob {
                esp_end: length(&pkt.frame),
                frame: pkt.frame,
                sa: entry.fixed.id,
                seq,
                tag: hop.to_tag(),
                esp_off: ok.esp_off,
                kind: JobKind::Seal,
                status: JobStatus::Pending,
            }),
            Err(reason) => {
                entry.live.counters.malformed.add(1);
                shared.drop(pkt.frame, reason);
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
            Ok((seq, ok)) => self.jobs.push(EspJob {
                esp_end: length(&frame),
                frame,
                sa: id,
                seq,
                tag: hop.to_tag(),
                esp_off: ok.esp_off,
                kind: JobKind::Seal,
                status: JobStatus::Pending,
            }),
            Err(reason) => shared.drop(frame, reason),
        }
    }

    /// Sends what came back sealed.
    fn finish(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut done = std::mem::take(&mut self.done);
        for job in done.drain(..) {
            match job.status {
                JobStatus::Done => {}
                JobStatus::SaGone => {
                    shared.drop(job.frame, DropReason::SaDisabled);
                    continue;
                }
                _ => {
                    if let Some(entry) = snapshot.sa(job.sa) {
                        entry.live.counters.engine.add(1);
                    }
                    shared.drop(job.frame, DropReason::EngineError);
                    continue;
                }
            }
            shared.counters.encrypted.add(1);
            let mut frame = job.frame;
            let hop = PortHop::from_tag(job.tag);
            let mut mtu = shared.ports.mtu(hop);
            if let Some(plan) = snapshot.sa(job.sa).and_then(|e| e.fixed.out.as_ref()) {
                mtu = plan.outer_mtu(mtu);
                encap::finish(&mut frame, plan, job.esp_off);
            }
            self.send(shared, frame, hop, mtu);
        }
        self.done = done;
    }

    /// Sends a packet in the clear: hop limit, size, then out.
    fn send_clear(&mut self, shared: &mut Shared, mut pkt: Pkt, hop: PortHop) {
        if let Err(reason) = wire::decrement_ttl(pkt.frame.data_mut(), &pkt.p) {
            self.answer(shared, &pkt, IcmpError::TimeExceeded);
            shared.drop(pkt.frame, reason);
            return;
        }
        let mtu = shared.ports.mtu(hop);
        if pkt.p.l3_len > mtu && pkt.p.df() {
            self.answer(shared, &pkt, IcmpError::TooBig { mtu });
            shared.drop(pkt.frame, DropReason::TooBig);
            return;
        }
        self.send(shared, pkt.frame, hop, mtu);
    }

    /// Gives an IP packet to its port, in fragments when it is larger than `mtu`.
    #[inline]
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
    fn answer(&mut self, shared: &mut Shared, pkt: &Pkt, error: IcmpError) {
        let v6 = pkt.p.family == wire::Family::V6;
        let Some(from) = shared.config.locals.any(shared.vrf(pkt.port), v6) else {
            return;
        };
        if !icmp::may_answer(&pkt.p, error) || !self.errors.allow(shared.now) {
            return;
        }
        let Some(mut frame) = shared.pool.get_spare() else {
            return;
        };
        if !icmp::build(&mut frame, pkt.frame.data(), &pkt.p, error, from) {
            shared.pool.put(frame);
            return;
        }
        shared.counters.generate(Generated::Icmp);
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) => self.forward.push(Pkt {
                frame,
                p,
                port: pkt.port,
            }),
            Err(reason) => shared.drop(frame, reason),
        }
    }
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
fn hash_of(pkt: &Pkt) -> u32 {
    let p = &pkt.p;
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
