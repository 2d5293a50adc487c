//! From the unprotected side: ESP to its SA, opened, checked against policy; clear text checked against policy.

use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::{BURST, Frame};
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::replay::Replay;
use sa_store::runtime::SaEntry;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{InboundVerdict, Verdict};

use super::core::{Pkt, Shared, dst_of, flow_key};
use super::handover::{Handed, Task};
use super::outbound::Outbound;
use super::setup::{PipelineConfig, PolicyHits, Side};
use crate::esp::decap::{self, DecapPre, Decapped};
use crate::esp::reassembly::{Fate, Reassembler};
use crate::wire::{self, Frag, Kind, Parsed, proto};

/// The inbound half of a worker.
pub(super) struct Inbound {
    /// ESP packets.
    pub(super) esp: Vec<Pkt>,
    /// What is neither ESP nor ordinary traffic from inside.
    pub(super) other: Vec<Pkt>,
    jobs: Vec<EspJob>,
    done: Vec<EspJob>,
    flows: FlowCache<Verdict>,
    waiting: JobTable,
    reassembly: Option<Reassembler>,
    ended: Vec<(Frame, Fate)>,
}

impl Inbound {
    pub(super) fn new(config: &PipelineConfig) -> Self {
        Self {
            esp: Vec::with_capacity(4 * BURST),
            other: Vec::with_capacity(4 * BURST),
            jobs: Vec::with_capacity(4 * BURST),
            done: Vec::with_capacity(4 * BURST),
            flows: FlowCache::new(config.flow_entries),
            waiting: JobTable::default(),
            reassembly: config.reassembly.map(Reassembler::new),
            ended: Vec::new(),
        }
    }

    /// Fragments that wait for others.
    pub(super) fn held(&self) -> usize {
        self.reassembly.as_ref().map_or(0, Reassembler::held)
    }

    /// Ends what waits.
    pub(super) fn abandon(&mut self, shared: &mut Shared) {
        if let Some(r) = &mut self.reassembly {
            r.drain(&mut self.ended);
        }
        self.settle(shared);
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
    ) -> usize {
        let mut work = self.other.len() + self.esp.len();
        if !self.other.is_empty() {
            self.sort_other(shared, snapshot, out);
        }
        if let Some(r) = &mut self.reassembly {
            r.expire(shared.now, &mut self.ended);
            self.settle(shared);
        }
        if !self.esp.is_empty() {
            self.look_up(shared, snapshot, out);
        }
        if !self.jobs.is_empty() {
            shared
                .engine
                .submit(snapshot, &mut self.jobs, &mut self.done);
            self.refuse_rest(shared);
        }
        work += self.done.len();
        self.finish(shared, snapshot, out);
        work
    }

    /// Finds each packet's SA, checks what can be checked before crypto is spent, builds jobs.
    fn look_up(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        // Three passes, so that the misses of a burst overlap: SA record, run-time state and keys, use.
        for entry in self
            .esp
            .iter()
            .filter_map(|pkt| snapshot.sad.hint(spi(pkt)))
        {
            entry.prefetch_fixed();
        }
        for entry in self
            .esp
            .iter()
            .filter_map(|pkt| snapshot.sad.hint(spi(pkt)))
        {
            entry.prefetch_live();
            entry.fixed.cipher.prefetch();
        }
        let mut packets = std::mem::take(&mut self.esp);
        for pkt in packets.drain(..) {
            let vrf = shared.vrf(pkt.port);
            let Some(entry) = snapshot.sad.find(spi(&pkt), dst_of(&pkt.p), vrf) else {
                if shared.is_local(&pkt.p, vrf) {
                    shared.drop(pkt.frame, DropReason::SaNotFound);
                } else {
                    self.clear_text(shared, snapshot, out, pkt);
                }
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
                        task: Task::Open(p),
                    },
                );
                continue;
            }
            match admit(entry, &pkt, shared.now) {
                Ok((pre, seq)) => {
                    let tag = self.waiting.put(Outer {
                        p: pkt.p,
                        pre,
                        port: pkt.port,
                    });
                    self.jobs.push(job(entry, pkt, pre, seq, tag));
                }
                Err(reason) => shared.drop(pkt.frame, reason),
            }
        }
        self.esp = packets;
    }

    /// What the engine did not take: with a synchronous engine nothing.
    fn refuse_rest(&mut self, shared: &mut Shared) {
        for job in self.jobs.drain(..) {
            shared.drop(job.frame, DropReason::EngineBusy);
        }
    }

    /// Judges what came back: ICV, window, structure, limits, policy, in this order.
    fn finish(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        let mut done = std::mem::take(&mut self.done);
        for mut job in done.drain(..) {
            let Some(outer) = self.waiting.take(job.tag) else {
                shared.drop(job.frame, DropReason::EngineError);
                continue;
            };
            let Some(entry) = snapshot.sa(job.sa) else {
                shared.drop(job.frame, DropReason::SaDisabled);
                continue;
            };
            let opened = match judge(entry, &mut job, &outer, shared) {
                Ok(opened) => opened,
                Err(reason) => {
                    shared.drop(job.frame, reason);
                    continue;
                }
            };
            let p = match opened {
                Decapped::Packet(p) => p,
                Decapped::Consumed(kind) => {
                    shared.consume(job.frame, kind);
                    continue;
                }
            };
            if let Err(reason) =
                self.check_policy(shared, snapshot, entry, &flow_key(&p, entry.fixed.vrf))
            {
                entry.live.counters.selector.add(1);
                shared.drop(job.frame, reason);
                continue;
            }
            shared.counters.decrypted.add(1);
            out.forward.push(Pkt {
                frame: job.frame,
                p,
                port: outer.port,
            });
        }
        self.done = done;
    }

    /// Whether what an SA decrypted may have come through it, RFC 4301 section 5.2 step 4.
    #[inline]
    fn check_policy(
        &mut self,
        shared: &Shared,
        snapshot: &Snapshot,
        entry: &SaEntry,
        key: &FlowKey,
    ) -> Result<(), DropReason> {
        if let Some(selectors) = &entry.fixed.selectors {
            return if selectors.matches(key) {
                Ok(())
            } else {
                Err(DropReason::SelectorMismatch)
            };
        }
        if entry.spec.if_id.0 != 0 {
            // A route-based tunnel without selectors carries whatever is routed into it.
            return Ok(());
        }
        let verdict = self.verdict(shared, snapshot, key);
        match verdict.inbound(Some(entry.fixed.tunnel)) {
            InboundVerdict::Accept { policy } => {
                PolicyHits::hit(&shared.hits.inbound, policy.index());
                Ok(())
            }
            InboundVerdict::Drop { reason, policy } => {
                PolicyHits::hit(&shared.hits.inbound, policy.index());
                Err(reason)
            }
        }
    }

    #[inline]
    fn verdict(&mut self, shared: &Shared, snapshot: &Snapshot, key: &FlowKey) -> Verdict {
        let spd = &snapshot.spd_in;
        let generation = spd.generation(key);
        if let Some(v) = self.flows.lookup(key, generation) {
            shared.counters.flow_hits.add(1);
            return v;
        }
        shared.counters.flow_misses.add(1);
        let v = spd.lookup(key);
        self.flows.insert(key, generation, v);
        v
    }

    /// Clear text from the unprotected side, RFC 4301 section 5.2: allowed only by a bypass policy.
    fn clear_text(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
        pkt: Pkt,
    ) {
        let inside = shared
            .config
            .ports
            .get(usize::from(pkt.port))
            .is_some_and(|p| p.side == Side::Inside);
        if inside {
            out.clear.push(pkt);
            return;
        }
        let vrf = shared.vrf(pkt.port);
        let key = flow_key(&pkt.p, vrf);
        match self.verdict(shared, snapshot, &key).inbound(None) {
            InboundVerdict::Accept { policy } => {
                PolicyHits::hit(&shared.hits.inbound, policy.index());
                if shared.is_local(&pkt.p, vrf) {
                    shared.drop(pkt.frame, DropReason::NotForUs);
                } else {
                    shared.counters.bypassed.add(1);
                    out.forward.push(pkt);
                }
            }
            InboundVerdict::Drop { reason, policy } => {
                PolicyHits::hit(&shared.hits.inbound, policy.index());
                shared.drop(pkt.frame, reason);
            }
        }
    }

    /// Fragments, IKE, keep-alives, clear text.
    fn sort_other(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        let mut packets = std::mem::take(&mut self.other);
        for pkt in packets.drain(..) {
            let local = shared.is_local(&pkt.p, shared.vrf(pkt.port));
            match pkt.p.kind {
                Kind::NatKeepalive if local => shared.consume(pkt.frame, Consumed::NatKeepalive),
                Kind::Ike if local => shared.drop(pkt.frame, DropReason::NotForUs),
                Kind::Ip
                    if local
                        && pkt.p.frag != Frag::No
                        && matches!(pkt.p.proto, proto::ESP | proto::UDP) =>
                {
                    self.reassemble(shared, pkt);
                }
                _ => self.clear_text(shared, snapshot, out, pkt),
            }
        }
        self.other = packets;
    }

    /// Adds a fragment; a packet that it completes goes on as if it had come whole.
    fn reassemble(&mut self, shared: &mut Shared, pkt: Pkt) {
        let Some(reassembly) = &mut self.reassembly else {
            shared.drop(pkt.frame, DropReason::FragmentOff);
            return;
        };
        let whole = reassembly.push(pkt.frame, &pkt.p, shared.now, &mut self.ended);
        self.settle(shared);
        let Some(frame) = whole else { return };
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) if p.esp().is_some() => self.esp.push(Pkt {
                frame,
                p,
                port: pkt.port,
            }),
            Ok(_) => shared.drop(frame, DropReason::NotForUs),
            Err(reason) => shared.drop(frame, reason),
        }
    }

    /// Counts and gives back what reassembly is done with.
    fn settle(&mut self, shared: &mut Shared) {
        for (frame, fate) in self.ended.drain(..) {
            match fate {
                Fate::Consumed(kind) => shared.consume(frame, kind),
                Fate::Dropped(reason) => shared.drop(frame, reason),
            }
        }
    }
}

/// What *post* needs to know of a packet that is in an engine.
#[derive(Clone, Copy, Debug)]
struct Outer {
    p: Parsed,
    pre: DecapPre,
    port: u16,
}

/// Packets in engines, found again by the job's tag.
#[derive(Debug, Default)]
struct JobTable {
    places: Vec<Option<Outer>>,
    free: Vec<u64>,
}

impl JobTable {
    #[inline]
    fn put(&mut self, outer: Outer) -> u64 {
        let tag = self.free.pop().unwrap_or(self.places.len() as u64);
        match usize::try_from(tag)
            .ok()
            .and_then(|i| self.places.get_mut(i))
        {
            Some(place) => *place = Some(outer),
            None => self.places.push(Some(outer)),
        }
        tag
    }

    /// `None` for a tag that is not out: an engine that answers twice, or with nonsense.
    #[inline]
    fn take(&mut self, tag: u64) -> Option<Outer> {
        let outer = self.places.get_mut(usize::try_from(tag).ok()?)?.take();
        if outer.is_some() {
            self.free.push(tag);
        }
        outer
    }
}

#[inline(always)]
fn spi(pkt: &Pkt) -> u32 {
    pkt.p.esp().map_or(0, |(spi, _)| spi)
}

/// Checks that cost nothing, before crypto is spent: encapsulation, limits, lengths, window. Returns the
/// full sequence number.
#[inline]
fn admit(entry: &SaEntry, pkt: &Pkt, now: u64) -> Result<(DecapPre, u64), DropReason> {
    let fixed = &entry.fixed;
    let Some(plan) = &fixed.inb else {
        return Err(DropReason::SaNotFound);
    };
    entry.admit_in(now)?;
    let pre = match decap::pre(&pkt.p, plan) {
        Ok(pre) => pre,
        Err(reason) => {
            entry.live.counters.malformed.add(1);
            return Err(reason);
        }
    };
    match entry.live.window.check(pre.seq) {
        Replay::Fresh(seq) => Ok((pre, seq)),
        refused => Err(replayed(entry, refused)),
    }
}

#[inline]
fn job(entry: &SaEntry, pkt: Pkt, pre: DecapPre, seq: u64, tag: u64) -> EspJob {
    EspJob {
        frame: pkt.frame,
        sa: entry.fixed.id,
        seq,
        tag,
        esp_off: pre.esp_off,
        esp_end: pkt.p.l3_len,
        kind: JobKind::Open,
        status: JobStatus::Pending,
    }
}

/// After the engine: the packet is authentic, fresh, well-formed and within the limits.
#[inline]
fn judge(
    entry: &SaEntry,
    job: &mut EspJob,
    outer: &Outer,
    shared: &Shared,
) -> Result<Decapped, DropReason> {
    let live = &entry.live;
    match job.status {
        JobStatus::Done => {}
        JobStatus::IcvMismatch => {
            live.counters.icv_failed.add(1);
            live.window.icv_failed();
            return Err(DropReason::IcvMismatch);
        }
        JobStatus::SaGone => return Err(DropReason::SaDisabled),
        JobStatus::Pending | JobStatus::Failed => {
            live.counters.engine.add(1);
            return Err(DropReason::EngineError);
        }
    }
    match live.window.commit(job.seq) {
        Replay::Fresh(_) => {}
        refused => return Err(replayed(entry, refused)),
    }
    let Some(plan) = &entry.fixed.inb else {
        return Err(DropReason::SaNotFound);
    };
    let opened =
        decap::post(&mut job.frame, &outer.p, outer.pre, plan, shared.natt).inspect_err(|_| {
            live.counters.malformed.add(1);
        })?;
    entry.account_in(job.frame.len() as u64, shared.now)?;
    Ok(opened)
}

#[cold]
fn replayed(entry: &SaEntry, verdict: Replay) -> DropReason {
    entry.live.counters.replays.add(1);
    match verdict {
        Replay::Duplicate => DropReason::ReplayDuplicate,
        Replay::Old => DropReason::ReplayOld,
        Replay::Invalid | Replay::Fresh(_) => DropReason::SequenceInvalid,
    }
}
