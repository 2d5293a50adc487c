//! Behind the engine: ICV, window, structure, limits, policy.

use pmd::engine::{EspJob, JobStatus};
use sa_store::drops::{Consumed, DropReason};
use sa_store::replay::Replay;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::OffloadMode;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{InboundVerdict, Verdict};

use super::{Inbound, Outer, replayed};
use crate::esp::decap::{self, Bare, Decapped};
use crate::wire::{self, Parsed};
use crate::worker::core::{Shared, flow_key};
use crate::worker::lane::Info;
use crate::worker::moved::follow;
use crate::worker::outbound::Outbound;
use crate::worker::related::{error_matches, error_may_enter};
use crate::worker::setup::PolicyHits;
use crate::worker::stages::Stage;

impl Inbound {
    /// Judges what came back: ICV, window, structure, limits, policy, in this order.
    pub(super) fn finish(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
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
                && !error_about_ours(shared, snapshot, &job, info, via)
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
                    let vrf = entry.fixed.vrf;
                    if selectors.matches(&key) || error_matches(selectors, &job.frame, info, vrf) {
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
}

/// What became of a packet behind the engine.
#[derive(Clone, Copy, Debug)]
pub(super) enum Judged {
    /// Authentic and well-formed; policies must allow it to have come by the tunnel `via`, where there is one.
    Opened {
        via: Option<TunnelIdx>,
    },
    Consumed(Consumed),
    Dropped(DropReason),
}

/// After the engine: the packet is authentic, fresh, well-formed and within the limits.
#[inline]
fn open(
    entry: &SaEntry,
    job: &mut EspJob,
    outer: Outer,
    shared: &mut Shared,
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
    if plan.udp && job.mode != OffloadMode::Packet {
        follow(entry, frame.data(), job.esp_off, shared);
    }
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

/// Whether the policy lets the packet in.
#[inline]
fn accept(verdict: InboundVerdict) -> Result<(), DropReason> {
    match verdict {
        InboundVerdict::Accept { .. } => Ok(()),
        InboundVerdict::Drop { reason, .. } => Err(reason),
    }
}

/// Whether a packet from a tunnel is an ICMP error that belongs there although no policy covers it.
#[cold]
#[inline(never)]
fn error_about_ours(
    shared: &Shared,
    snapshot: &Snapshot,
    job: &EspJob,
    info: Option<&Info>,
    via: Option<TunnelIdx>,
) -> bool {
    info.is_some_and(|info| {
        let vrf = snapshot
            .sa(job.sa)
            .map_or(shared.vrf(info.port), |entry| entry.fixed.vrf);
        error_may_enter(snapshot, &job.frame, info, vrf, via)
    })
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
