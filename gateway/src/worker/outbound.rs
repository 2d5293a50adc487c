//! Towards the unprotected side: policy, SA, encapsulation; and the forwarding of what is already allowed.

use pmd::engine::{EspJob, JobKind};
use pmd::{BURST, Frame};
use sa_store::drops::DropReason;
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::runtime::TunnelIdx;
use sa_store::snapshot::Snapshot;
use sa_store::spd::Verdict;

use super::core::{Shared, dst_of};
use super::cover::Cover;
use super::egress::Egress;
use super::lane::{Info, Lane};
use super::setup::{PipelineConfig, PolicyHits, Side};
use super::stages::Stage;
use super::wait::{Then, WaitRoom};
use crate::esp::encap::EncapState;
use crate::esp::iv::CbcIvGen;
use crate::esp::rate::TokenBucket;
use crate::wire;

mod leave;
mod policy;
mod protect;

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
    pub(super) waiting: WaitRoom,
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
            waiting: WaitRoom::default(),
            pieces: Vec::with_capacity(64),
        }
    }

    /// Answers that go out with the next round, and packets whose neighbour is not known.
    pub(super) fn held(&self) -> usize {
        self.forward.len() + self.clear.len() + self.protect.len() + self.waiting.held()
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
        self.waiting.abandon(shared);
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(&mut self, shared: &mut Shared, snapshot: &Snapshot) -> usize {
        if self.waiting.held() != 0 {
            self.end_waits(shared, snapshot);
            // Before those that have not waited.
            self.encapsulate(shared, snapshot);
        }
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
            Egress::Port(hop) => self.send_clear(shared, snapshot, frame, info, hop),
            Egress::Tunnel(tunnel) => self.protect.push(frame, (*info, tunnel)),
            Egress::Local => shared.punt(frame, info),
            Egress::Unresolved => {
                self.await_neighbour(shared, snapshot, frame, info, Then::Forward);
            }
            Egress::None => shared.drop(frame, DropReason::NoRoute),
        }
    }

    /// When a dummy packet is due next or neighbours are to be looked for, gateway clock.
    pub(super) fn wake_at(&self, now: u64) -> Option<u64> {
        let wait = self.waiting.wake_at(now);
        self.cover.wake_at().into_iter().chain(wait).min()
    }
}

/// Spreads flows over equal next hops.
#[inline(always)]
pub(super) fn hash_of(p: &wire::Parsed) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "a hash")]
    let mixed =
        (p.src ^ p.dst.rotate_left(17)) as u32 ^ u32::from(p.sport) << 16 ^ u32::from(p.dport);
    mixed
}
