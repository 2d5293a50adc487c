//! From the unprotected side: ESP to its SA, opened, checked against policy; clear text checked against policy.

use pmd::BURST;
use pmd::engine::{EspJob, JobKind, JobStatus};
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::ledger::Generated;
use sa_store::replay::Replay;
use sa_store::runtime::SaEntry;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{InboundVerdict, Verdict};

use super::core::{Pkt, Shared, dst_of, flow_key};
use super::handover::{Handed, Task};
use super::outbound::Outbound;
use super::setup::{PipelineConfig, PolicyHits, Side};
use crate::esp::decap::{self, Opened};
use crate::esp::reassembly::{Outcome, Reassembly};
use crate::wire::{self, Frag, Kind, proto};

/// The inbound half of a worker.
pub(super) struct Inbound {
    /// ESP packets.
    pub(super) esp: Vec<Pkt>,
    /// What is neither ESP nor ordinary traffic from inside.
    pub(super) other: Vec<Pkt>,
    jobs: Vec<EspJob>,
    done: Vec<EspJob>,
    flows: FlowCache<Verdict>,
    reassembly: Option<Reassembly>,
}

impl Inbound {
    pub(super) fn new(config: &PipelineConfig) -> Self {
        let limits = config.reassembly;
        Self {
            esp: Vec::with_capacity(4 * BURST),
            other: Vec::with_capacity(4 * BURST),
            jobs: Vec::with_capacity(4 * BURST),
            done: Vec::with_capacity(4 * BURST),
            flows: FlowCache::new(config.flow_entries),
            reassembly: (limits.fragments != 0).then(|| Reassembly::new(limits.fragments, limits.timeout)),
        }
    }

    /// Frames that wait here between rounds.
    pub(super) fn held(&self) -> usize {
        self.reassembly.as_ref().map_or(0, Reassembly::held)
    }

    /// Ends what waits.
    pub(super) fn abandon(&mut self, shared: &mut Shared) {
        if let Some(r) = &mut self.reassembly {
            r.clear(|frame| shared.drop(frame, DropReason::Shutdown));
        }
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) -> usize {
        let mut work = self.other.len() + self.esp.len();
        if !self.other.is_empty() {
            self.sort_other(shared, snapshot, out);
        }
        if let Some(r) = &mut self.reassembly {
            r.expire(shared.now, |frame| shared.drop(frame, DropReason::FragmentTimeout));
        }
        if !self.esp.is_empty() {
            self.look_up(shared, snapshot, out);
        }
        if !self.jobs.is_empty() {
            shared.engine.submit(snapshot, &mut self.jobs, &mut self.done);
            self.refuse_rest(shared);
        }
        work += self.done.len();
        self.finish(shared, snapshot, out);
        work
    }

    /// Finds each packet's SA, checks what can be checked before crypto is spent, builds jobs.
    fn look_up(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        // Three passes, so that the misses of a burst overlap: SA record, run-time state and keys, use.
        for entry in self.esp.iter().filter_map(|pkt| snapshot.sad.hint(spi(pkt))) {
            entry.prefetch_fixed();
        }
        for entry in self.esp.iter().filter_map(|pkt| snapshot.sad.hint(spi(pkt))) {
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
                shared.handover.stage(owner, Handed { frame, port, task: Task::Open(p) });
                continue;
            }
            match admit(entry, &pkt, shared.now) {
                Ok(seq) => self.jobs.push(job(entry, pkt, seq)),
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
            let Some(entry) = snapshot.sa(job.sa) else {
                shared.drop(job.frame, DropReason::SaDisabled);
                continue;
            };
            let opened = match judge(entry, &mut job, shared) {
                Ok(opened) => opened,
                Err(reason) => {
                    shared.drop(job.frame, reason);
                    continue;
                }
            };
            let Opened::Packet(p) = opened else {
                shared.consume(job.frame, Consumed::Dummy);
                continue;
            };
            if let Err(reason) = self.check_policy(shared, snapshot, entry, &flow_key(&p, entry.fixed.vrf)) {
                entry.live.counters.selector.add(1);
                shared.drop(job.frame, reason);
                continue;
            }
            shared.counters.decrypted.add(1);
            #[allow(clippy::cast_possible_truncation, reason = "the tag is the port number that look_up put there")]
            let port = job.tag as u16;
            out.forward.push(Pkt { frame: job.frame, p, port });
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
            return if selectors.matches(key) { Ok(()) } else { Err(DropReason::SelectorMismatch) };
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
    fn clear_text(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound, pkt: Pkt) {
        let inside = shared.config.ports.get(usize::from(pkt.port)).is_some_and(|p| p.side == Side::Inside);
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
                Kind::Ip if local && pkt.p.frag != Frag::No && matches!(pkt.p.proto, proto::ESP | proto::UDP) => {
                    self.reassemble(shared, pkt);
                }
                _ => self.clear_text(shared, snapshot, out, pkt),
            }
        }
        self.other = packets;
    }

    fn reassemble(&mut self, shared: &mut Shared, pkt: Pkt) {
        let Some(reassembly) = &mut self.reassembly else {
            shared.drop(pkt.frame, DropReason::FragmentOff);
            return;
        };
        let port = pkt.port;
        let (counters, pool) = (&shared.counters, &mut shared.pool);
        let outcome = reassembly.add(pkt.frame, &pkt.p, shared.now, pool, |frame, end| {
            (match end {
                Ok(kind) => counters.consume(kind),
                Err(reason) => counters.drop(reason, 1),
            });
            frame
        });
        let Outcome::Complete(frame) = outcome else { return };
        counters.generate(Generated::Reassembled);
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) if p.esp().is_some() => self.esp.push(Pkt { frame, p, port }),
            Ok(_) => shared.drop(frame, DropReason::NotForUs),
            Err(reason) => shared.drop(frame, reason),
        }
    }
}

#[inline(always)]
fn spi(pkt: &Pkt) -> u32 {
    pkt.p.esp().map_or(0, |(spi, _)| spi)
}

/// Checks that cost nothing, before crypto is spent: encapsulation, limits, lengths, window. Returns the
/// full sequence number.
#[inline]
fn admit(entry: &SaEntry, pkt: &Pkt, now: u64) -> Result<u64, DropReason> {
    let fixed = &entry.fixed;
    let in_udp = matches!(pkt.p.kind, Kind::UdpEsp { .. });
    if fixed.encap.is_some() != in_udp {
        return Err(DropReason::EncapMismatch);
    }
    let Some(plan) = &fixed.inb else { return Err(DropReason::SaNotFound) };
    entry.admit_in(now)?;
    if let Err(reason) = decap::pre(&pkt.p, plan) {
        entry.live.counters.malformed.add(1);
        return Err(reason);
    }
    let seq_lo = pkt.p.esp().map_or(0, |(_, seq)| seq);
    match entry.live.window.check(seq_lo) {
        Replay::Fresh(seq) => Ok(seq),
        refused => Err(replayed(entry, refused)),
    }
}

#[inline]
fn job(entry: &SaEntry, pkt: Pkt, seq: u64) -> EspJob {
    #[allow(clippy::cast_possible_truncation, reason = "the ESP header lies within a packet of u16 length")]
    let esp_off = pkt.p.esp_off() as u16;
    EspJob {
        frame: pkt.frame,
        sa: entry.fixed.id,
        seq,
        tag: u64::from(pkt.port),
        esp_off,
        esp_end: pkt.p.l3_len,
        kind: JobKind::Open,
        status: JobStatus::Pending,
    }
}

/// After the engine: the packet is authentic, fresh, well-formed and within the limits.
#[inline]
fn judge(entry: &SaEntry, job: &mut EspJob, shared: &Shared) -> Result<Opened, DropReason> {
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
    let Some(plan) = &entry.fixed.inb else { return Err(DropReason::SaNotFound) };
    let opened = decap::post(&mut job.frame, usize::from(job.esp_off), plan, shared.natt).inspect_err(|_| {
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
