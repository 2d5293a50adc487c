//! From the unprotected side: ESP to its SA, opened, checked against policy; clear text checked against policy.

use arrayvec::ArrayVec;
use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::{BURST, Frame};
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::replay::Replay;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::OffloadMode;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{InboundVerdict, Verdict};

use super::core::{Shared, dst_of, flow_key};
use super::handover::{Handed, Task};
use super::lane::{Info, Lane};
use super::outbound::{AHEAD, Outbound};
use super::setup::{PipelineConfig, PolicyHits, Side};
use super::stages::Stage;
use crate::esp::decap::{self, Bare, DecapPre, Decapped};
use crate::esp::reassembly::{Fate, Reassembler};
use crate::wire::{self, Frag, Kind, Parsed, proto};

/// Packets whose SAs are found before the first is used.
const LOOK_AHEAD: usize = 4 * BURST;

/// The inbound half of a worker.
pub(super) struct Inbound {
    /// ESP packets.
    pub(super) esp: Lane<Info>,
    /// What is neither ESP nor ordinary traffic from inside.
    pub(super) other: Lane<Info>,
    jobs: Vec<EspJob>,
    done: Vec<EspJob>,
    flows: FlowCache<Verdict>,
    keys: Vec<FlowKey>,
    verdicts: Vec<Verdict>,
    judged: Vec<Judged>,
    /// Of the packets that are [`Judged::Opened`], in order.
    opened: Vec<Info>,
    reassembly: Option<Reassembler>,
    ended: Vec<(Frame, Fate)>,
}

impl Inbound {
    pub(super) fn new(config: &PipelineConfig) -> Self {
        Self {
            esp: Lane::with_capacity(4 * BURST),
            other: Lane::with_capacity(4 * BURST),
            jobs: Vec::with_capacity(4 * BURST),
            done: Vec::with_capacity(4 * BURST),
            flows: FlowCache::new(config.flow_entries),
            keys: Vec::with_capacity(4 * BURST),
            verdicts: Vec::with_capacity(4 * BURST),
            judged: Vec::with_capacity(4 * BURST),
            opened: Vec::with_capacity(4 * BURST),
            reassembly: config.reassembly.map(Reassembler::new),
            ended: Vec::new(),
        }
    }

    /// Fragments that wait for others.
    pub(super) fn held(&self) -> usize {
        self.reassembly.as_ref().map_or(0, Reassembler::held)
    }

    /// Counts the policies' packets of some flows. True at the end of a pass over all.
    #[inline]
    pub(super) fn report_hits(&mut self, hits: &PolicyHits, sets: usize) -> bool {
        self.flows.is_settled() || self.flows.settle(sets, PolicyHits::count(&hits.inbound))
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
            shared.stages.mark(Stage::LookUp);
        }
        shared.bank.take(JobKind::Open, &mut self.done);
        if !self.jobs.is_empty() {
            let kind = JobKind::Open;
            shared
                .bank
                .submit(snapshot, kind, &mut self.jobs, &mut self.done);
            self.refuse_rest(shared);
            shared.stages.mark(Stage::Crypto);
        }
        work += self.done.len();
        self.finish(shared, snapshot, out);
        work
    }

    /// Finds each packet's SA, checks what can be checked before crypto is spent, builds jobs.
    fn look_up(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        // Fetched a little ahead, so that misses overlap and the first-level cache holds what was fetched.
        let mut packets = self.esp.take();
        let mut found = ArrayVec::<(Option<&SaEntry>, u32), LOOK_AHEAD>::new();
        for info in packets.infos().iter().take(LOOK_AHEAD) {
            let (spi, seq) = info.p.esp().unwrap_or_default();
            found.push((snapshot.sad.hint(spi).map(|e| &**e), seq));
        }
        for entry in found.iter().take(AHEAD).filter_map(|(entry, _)| *entry) {
            entry.prefetch_in();
        }
        for (i, (frame, info)) in packets.drain().enumerate() {
            let (vrf, dst) = (shared.vrf(info.port), dst_of(&info.p));
            if let Some((Some(entry), _)) = found.get(i + AHEAD) {
                entry.prefetch_in();
            }
            if let Some((Some(entry), seq)) = found.get(i + AHEAD / 2) {
                entry.live.window.prefetch(*seq);
            }
            let hint = found.get(i).and_then(|(entry, _)| *entry);
            let entry = hint
                .filter(|e| e.fixed.dst == dst && e.fixed.vrf == vrf)
                .or_else(|| snapshot.sad.find(spi(&info.p), dst, vrf).map(|e| &**e));
            let Some(entry) = entry else {
                if shared.is_local(&info.p, vrf) {
                    shared.audit(DropReason::SaNotFound, &frame, &info.p, None);
                    shared.drop(frame, DropReason::SaNotFound);
                } else {
                    self.clear_text(shared, snapshot, out, frame, info);
                }
                continue;
            };
            let owner = usize::from(entry.fixed.owner);
            if owner != shared.id {
                shared.handover.stage(
                    owner,
                    Handed {
                        frame,
                        port: info.port,
                        task: Task::Open(info.p),
                    },
                );
                continue;
            }
            if entry.fixed.place.engine != 0 {
                open_on_engine(shared, entry, frame, info);
                continue;
            }
            match admit(entry, &info.p, shared.now) {
                Ok((pre, seq)) => {
                    entry.fixed.cipher.prefetch();
                    self.jobs.push(EspJob {
                        frame,
                        sa: entry.fixed.id,
                        seq,
                        tag: Outer::new(info).0,
                        note: 0,
                        esp_off: pre.esp_off,
                        esp_end: info.p.l3_len,
                        next_header: 0,
                        kind: JobKind::Open,
                        mode: OffloadMode::Software,
                        status: JobStatus::Pending,
                    });
                }
                Err(reason) => {
                    shared.audit(reason, &frame, &info.p, None);
                    shared.drop(frame, reason);
                }
            }
        }
        packets.clear();
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
        self.keys.clear();
        self.judged.clear();
        self.opened.clear();
        for job in &mut done {
            let judged = self.judge(shared, snapshot, job);
            self.judged.push(judged);
        }
        shared.stages.mark(Stage::Judge);
        self.ask_policy(shared, snapshot);
        shared.stages.mark(Stage::Policy);
        let mut verdicts = self.verdicts.iter();
        let mut opened = self.opened.iter();
        let mut decrypted = 0;
        for (job, judged) in done.drain(..).zip(&self.judged) {
            let via = match judged {
                Judged::Opened { via } => *via,
                Judged::Consumed(kind) => {
                    shared.consume(job.frame, *kind);
                    continue;
                }
                Judged::Dropped(reason) => {
                    shared.drop(job.frame, *reason);
                    continue;
                }
            };
            let info = opened.next();
            if via.is_some()
                && let Some(verdict) = verdicts.next()
                && let Err(reason) = accept(verdict.inbound(via))
            {
                refuse_selector(shared, snapshot, &job, info.map(|i| &i.p), reason);
                shared.drop(job.frame, reason);
                continue;
            }
            let Some(info) = info else {
                shared.drop(job.frame, DropReason::EngineError);
                continue;
            };
            decrypted += 1;
            out.deliver(shared, snapshot, job.frame, info);
        }
        shared.counters.decrypted.add(decrypted);
        self.done = done;
        shared.stages.mark(Stage::Accept);
    }

    /// ICV, window, structure, limits and the SA's own selectors. Notes the key of a packet that policies must
    /// allow, RFC 4301 section 5.2 step 4.
    #[inline]
    fn judge(&mut self, shared: &mut Shared, snapshot: &Snapshot, job: &mut EspJob) -> Judged {
        let Some(entry) = snapshot.sa(job.sa) else {
            return Judged::Dropped(DropReason::SaDisabled);
        };
        let outer = Outer(job.tag);
        self.opened.push(Info {
            p: Parsed::NOTHING,
            port: outer.port(),
        });
        let Some(info) = self.opened.last_mut() else {
            return Judged::Dropped(DropReason::EngineError);
        };
        let judged = match open(entry, job, outer, shared, &mut info.p) {
            Ok(Decapped::Packet) => {
                let key = flow_key(&info.p, entry.fixed.vrf);
                if let Some(selectors) = &entry.fixed.selectors {
                    if selectors.matches(&key) {
                        return Judged::Opened { via: None };
                    }
                    entry.live.counters.selector.add(1);
                    let reason = DropReason::SelectorMismatch;
                    shared.audit(reason, &job.frame, &info.p, Some(sealed_as(entry, job)));
                    Judged::Dropped(reason)
                } else if entry.fixed.route_based {
                    // A route-based tunnel without selectors carries whatever is routed into it.
                    return Judged::Opened { via: None };
                } else {
                    self.keys.push(key);
                    return Judged::Opened {
                        via: Some(entry.fixed.tunnel),
                    };
                }
            }
            Ok(Decapped::Consumed(kind)) => Judged::Consumed(kind),
            Err(reason) => {
                report_unopened(shared, job, reason);
                Judged::Dropped(reason)
            }
        };
        self.opened.pop();
        judged
    }

    /// What policies say of the noted keys.
    #[inline]
    fn ask_policy(&mut self, shared: &Shared, snapshot: &Snapshot) {
        let spd = &snapshot.spd_in;
        let mut misses = 0;
        self.verdicts.clear();
        self.verdicts.resize(self.keys.len(), Verdict::DEFAULT);
        self.flows.resolve(
            &self.keys,
            |key| spd.generation(key),
            |_, key| {
                misses += 1;
                spd.lookup(key)
            },
            PolicyHits::count(&shared.hits.inbound),
            &mut self.verdicts,
        );
        shared.counters.flow_misses.add(misses);
        let hits = self.keys.len() as u64 - misses;
        shared.counters.flow_hits.add(hits);
    }

    #[inline]
    fn verdict(&mut self, shared: &Shared, snapshot: &Snapshot, key: &FlowKey) -> Verdict {
        let spd = &snapshot.spd_in;
        let mut misses = 0;
        let verdict = self.flows.resolve_one(
            key,
            spd.generation(key),
            |key| {
                misses = 1;
                spd.lookup(key)
            },
            PolicyHits::count(&shared.hits.inbound),
        );
        shared.counters.flow_misses.add(misses);
        shared.counters.flow_hits.add(1 - misses);
        verdict
    }

    /// Clear text from the unprotected side, RFC 4301 section 5.2: allowed only by a bypass policy.
    fn clear_text(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
        frame: Frame,
        info: &Info,
    ) {
        let inside = shared
            .config
            .ports
            .get(usize::from(info.port))
            .is_some_and(|p| p.side == Side::Inside);
        if inside {
            out.clear.push(frame, *info);
            return;
        }
        let vrf = shared.vrf(info.port);
        let key = flow_key(&info.p, vrf);
        match self.verdict(shared, snapshot, &key).inbound(None) {
            InboundVerdict::Accept { .. } => {
                if shared.is_local(&info.p, vrf) {
                    shared.drop(frame, DropReason::NotForUs);
                } else {
                    shared.counters.bypassed.add(1);
                    out.forward.push(frame, *info);
                }
            }
            InboundVerdict::Drop { reason, .. } => {
                shared.audit(reason, &frame, &info.p, None);
                shared.drop(frame, reason);
            }
        }
    }

    /// Fragments, IKE, keep-alives, clear text.
    fn sort_other(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
        let mut packets = self.other.take();
        for (frame, info) in packets.drain() {
            let local = shared.is_local(&info.p, shared.vrf(info.port));
            match info.p.kind {
                Kind::NatKeepalive if local => shared.consume(frame, Consumed::NatKeepalive),
                Kind::Ike if local => shared.drop(frame, DropReason::NotForUs),
                Kind::Ip
                    if local
                        && info.p.frag != Frag::No
                        && matches!(info.p.proto, proto::ESP | proto::UDP) =>
                {
                    self.reassemble(shared, frame, info);
                }
                _ => self.clear_text(shared, snapshot, out, frame, info),
            }
        }
        packets.clear();
        self.other = packets;
    }

    /// Adds a fragment; a packet that it completes goes on as if it had come whole.
    fn reassemble(&mut self, shared: &mut Shared, frame: Frame, info: &Info) {
        let Some(reassembly) = &mut self.reassembly else {
            shared.audit(DropReason::FragmentOff, &frame, &info.p, None);
            shared.drop(frame, DropReason::FragmentOff);
            return;
        };
        let whole = reassembly.push(frame, &info.p, shared.now, &mut self.ended);
        self.settle(shared);
        let Some(frame) = whole else { return };
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) if p.esp().is_some() => self.esp.push(frame, Info { p, port: info.port }),
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

/// What became of a packet behind the engine.
#[derive(Clone, Copy, Debug)]
enum Judged {
    /// Authentic and well-formed; policies must allow it to have come by the tunnel `via`, where there is one.
    Opened {
        via: Option<TunnelIdx>,
    },
    Consumed(Consumed),
    Dropped(DropReason),
}

/// Whether the policy lets the packet in.
#[inline]
fn accept(verdict: InboundVerdict) -> Result<(), DropReason> {
    match verdict {
        InboundVerdict::Accept { .. } => Ok(()),
        InboundVerdict::Drop { reason, .. } => Err(reason),
    }
}

/// Counts and reports a packet from a tunnel that policies do not let in.
#[cold]
fn refuse_selector(
    shared: &mut Shared,
    snapshot: &Snapshot,
    job: &EspJob,
    inner: Option<&Parsed>,
    reason: DropReason,
) {
    let Some(entry) = snapshot.sa(job.sa) else {
        return;
    };
    entry.live.counters.selector.add(1);
    if let Some(p) = inner {
        shared.audit(reason, &job.frame, p, Some(sealed_as(entry, job)));
    }
}

/// Reports a packet that did not become an inner one. Its outer header still stands as it came.
#[cold]
fn report_unopened(shared: &mut Shared, job: &EspJob, reason: DropReason) {
    if reason == DropReason::WindowEdge {
        shared.reports.edge(shared.now, job.sa);
    }
    if let Ok(p) = wire::parse_ip(job.frame.data(), shared.natt) {
        shared.audit(reason, &job.frame, &p, None);
    }
}

/// SPI and low half of the sequence number that an inner packet came under.
#[allow(clippy::cast_possible_truncation, reason = "the low half")]
fn sealed_as(entry: &SaEntry, job: &EspJob) -> (u32, u32) {
    (entry.fixed.spi, job.seq as u32)
}

/// What *post* needs to know of the outer packet, as a job's tag.
#[derive(Clone, Copy, Debug)]
struct Outer(u64);

impl Outer {
    #[inline(always)]
    fn new(info: &Info) -> Self {
        Self(u64::from(info.port) | u64::from(info.p.tos) << 16)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the low 16 bits")]
    const fn port(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    const fn tos(self) -> u8 {
        (self.0 >> 16 & 0xff) as u8
    }
}

#[inline(always)]
fn spi(p: &Parsed) -> u32 {
    p.esp().map_or(0, |(spi, _)| spi)
}

/// Checks that cost nothing, before crypto is spent: encapsulation, limits, lengths, window. Returns the
/// full sequence number.
#[inline]
fn admit(entry: &SaEntry, p: &Parsed, now: u64) -> Result<(DecapPre, u64), DropReason> {
    let fixed = &entry.fixed;
    let Some(plan) = &fixed.inb else {
        return Err(DropReason::SaNotFound);
    };
    entry.admit_in(now)?;
    let pre = match decap::pre(p, plan) {
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

/// The rest of a look-up for an SA whose packets an engine opens.
#[inline(never)]
fn open_on_engine(shared: &mut Shared, entry: &SaEntry, frame: Frame, info: &Info) {
    let place = entry.fixed.place;
    if !shared.bank.has_room(place.engine) {
        entry.live.counters.engine.add(1);
        shared.drop(frame, DropReason::EngineBusy);
        return;
    }
    let (pre, seq) = match admit(entry, &info.p, shared.now) {
        Ok(admitted) => admitted,
        Err(reason) => {
            shared.audit(reason, &frame, &info.p, None);
            shared.drop(frame, reason);
            return;
        }
    };
    let job = EspJob {
        frame,
        sa: entry.fixed.id,
        seq,
        tag: Outer::new(info).0,
        note: 0,
        esp_off: pre.esp_off,
        esp_end: info.p.l3_len,
        next_header: 0,
        kind: JobKind::Open,
        mode: place.mode,
        status: JobStatus::Pending,
    };
    if let Err(job) = shared.bank.stage(place.engine, job) {
        entry.live.counters.engine.add(1);
        shared.drop(job.frame, DropReason::EngineError);
    }
}

/// After the engine: the packet is authentic, fresh, well-formed and within the limits.
#[inline]
fn open(
    entry: &SaEntry,
    job: &mut EspJob,
    outer: Outer,
    shared: &Shared,
    inner: &mut Parsed,
) -> Result<Decapped, DropReason> {
    let live = &entry.live;
    if job.status != JobStatus::Done {
        return Err(not_opened(entry, job.status));
    }
    // A successor may have read the window while the packet was with an engine, or another worker's CPU.
    if entry.disabled() {
        return Err(DropReason::SaDisabled);
    }
    entry.cover_in(job.seq)?;
    match live.window.commit(job.seq) {
        Replay::Fresh(_) => {}
        refused => return Err(replayed(entry, refused)),
    }
    let Some(plan) = &entry.fixed.inb else {
        return Err(DropReason::SaNotFound);
    };
    let frame = &mut job.frame;
    let opened = if job.mode == OffloadMode::Packet {
        let front = !entry.fixed.place.outer_headers;
        let bare = Bare {
            esp_off: front.then_some(job.esp_off),
            next_header: job.next_header,
        };
        decap::bare(frame, outer.tos(), bare, plan, shared.natt, inner)
    } else {
        decap::post(frame, outer.tos(), job.esp_off, plan, shared.natt, inner)
    };
    let opened = opened.inspect_err(|_| {
        live.counters.malformed.add(1);
    })?;
    entry.account_in(job.frame.len() as u64, shared.now)?;
    Ok(opened)
}

/// Counts a packet that did not come back opened.
#[cold]
fn not_opened(entry: &SaEntry, status: JobStatus) -> DropReason {
    let live = &entry.live;
    match status {
        JobStatus::IcvMismatch => {
            live.counters.icv_failed.add(1);
            live.window.icv_failed();
            DropReason::IcvMismatch
        }
        JobStatus::SaGone => DropReason::SaDisabled,
        JobStatus::Replayed => replayed(entry, Replay::Duplicate),
        JobStatus::Malformed => {
            live.counters.malformed.add(1);
            DropReason::EngineRefused
        }
        _ => {
            live.counters.engine.add(1);
            DropReason::EngineError
        }
    }
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
