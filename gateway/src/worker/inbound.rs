//! From the unprotected side: ESP to its SA, opened, checked against policy; clear text checked against policy.

use pmd::engine::{EspJob, JobKind};
use pmd::{BURST, Frame};
use sa_store::drops::DropReason;
use sa_store::flow::{FlowCache, FlowKey};
use sa_store::replay::Replay;
use sa_store::runtime::SaEntry;
use sa_store::snapshot::Snapshot;
use sa_store::spd::Verdict;

use self::judge::Judged;
use super::core::Shared;
use super::hold::Hold;
use super::lane::{Info, Lane};
use super::outbound::Outbound;
use super::setup::{PipelineConfig, PolicyHits};
use super::stages::Stage;
use crate::esp::reassembly::{Fate, Reassembler};

mod admit;
mod clear;
mod judge;

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
    hold: Option<Hold>,
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
            hold: config.hold_unknown.map(Hold::new),
        }
    }

    /// Fragments that wait for others, packets that wait for their SA.
    pub(super) fn held(&self) -> usize {
        self.reassembly.as_ref().map_or(0, Reassembler::held)
            + self.hold.as_ref().map_or(0, Hold::len)
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
        for frame in self.hold.iter_mut().flat_map(Hold::drain) {
            shared.drop(frame, DropReason::Shutdown);
        }
    }

    /// One round: returns how many packets it handled.
    pub(super) fn run(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
    ) -> usize {
        let mut work = self.other.len() + self.esp.len();
        // What waits wakes nobody: the worker stays awake for it.
        if self.hold.as_ref().is_some_and(|h| h.len() != 0) {
            work += self.release_held(shared, snapshot);
        }
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

    /// What the engine did not take: with a synchronous engine nothing.
    fn refuse_rest(&mut self, shared: &mut Shared) {
        for job in self.jobs.drain(..) {
            shared.drop(job.frame, DropReason::EngineBusy);
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

#[cold]
fn replayed(entry: &SaEntry, verdict: Replay) -> DropReason {
    entry.live.counters.replays.add(1);
    match verdict {
        Replay::Duplicate => DropReason::ReplayDuplicate,
        Replay::Old => DropReason::ReplayOld,
        Replay::Invalid | Replay::Fresh(_) => DropReason::SequenceInvalid,
    }
}
