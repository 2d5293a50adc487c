//! An ESP packet to its SA, and what can be checked before crypto is spent on it.

use arrayvec::ArrayVec;
use pmd::engine::{EspJob, JobKind, JobStatus};
use pmd::{BURST, Frame};
use sa_store::drops::DropReason;
use sa_store::replay::Replay;
use sa_store::runtime::SaEntry;
use sa_store::sa::OffloadMode;
use sa_store::snapshot::Snapshot;

use super::{Inbound, Outer, replayed};
use crate::esp::decap::{self, DecapPre};
use crate::wire::Parsed;
use crate::worker::core::{Shared, dst_of};
use crate::worker::handover::{Handed, Task};
use crate::worker::lane::Info;
use crate::worker::moved::is_for_daemon;
use crate::worker::outbound::{AHEAD, Outbound};

/// Packets whose SAs are found before the first is used.
const LOOK_AHEAD: usize = 4 * BURST;

impl Inbound {
    /// Finds each packet's SA, checks what can be checked before crypto is spent, builds jobs.
    pub(super) fn look_up(&mut self, shared: &mut Shared, snapshot: &Snapshot, out: &mut Outbound) {
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
                self.without_sa(shared, snapshot, out, frame, info);
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
                Ok(_) if is_for_daemon(entry, &frame, info, shared) => shared.punt(frame, info),
                Ok((pre, seq)) => {
                    entry.fixed.cipher.prefetch();
                    let job = to_open(entry, frame, info, (pre, seq), OffloadMode::Software);
                    self.jobs.push(job);
                }
                Err(reason) => {
                    shared.refuse(frame, reason, &info.p, None);
                }
            }
        }
        packets.clear();
        self.esp = packets;
    }

    /// An ESP packet without an SA: one for us may wait for it, one for others is clear text.
    #[cold]
    fn without_sa(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
        frame: Frame,
        info: &Info,
    ) {
        if !shared.is_local(snapshot, &info.p, shared.vrf(info.port)) {
            self.clear_text(shared, snapshot, out, frame, info);
            return;
        }
        let kept = match &mut self.hold {
            Some(hold) => hold.push(shared.now, frame, info),
            None => Err(frame),
        };
        if let Err(frame) = kept {
            no_sa(shared, frame, info);
        }
    }

    /// Sends on what waited for an SA that has come, ends what waited too long. How many packets wait still.
    #[cold]
    pub(super) fn release_held(&mut self, shared: &mut Shared, snapshot: &Snapshot) -> usize {
        let Some(hold) = &mut self.hold else { return 0 };
        let mut late = Vec::new();
        hold.release(shared, snapshot, &mut self.esp, &mut late);
        let left = hold.len();
        for (frame, info) in late {
            no_sa(shared, frame, &info);
        }
        left
    }
}

fn no_sa(shared: &mut Shared, frame: Frame, info: &Info) {
    shared.refuse(frame, DropReason::SaNotFound, &info.p, None);
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

/// What the one who opens it is told of an admitted packet.
#[inline(always)]
fn to_open(
    entry: &SaEntry,
    frame: Frame,
    info: &Info,
    (pre, seq): (DecapPre, u64),
    mode: OffloadMode,
) -> EspJob {
    EspJob {
        frame,
        sa: entry.fixed.id,
        seq,
        tag: Outer::new(info).0,
        note: 0,
        esp_off: pre.esp_off,
        esp_end: info.p.l3_len,
        next_header: 0,
        kind: JobKind::Open,
        mode,
        status: JobStatus::Pending,
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
        Ok(_) if is_for_daemon(entry, &frame, info, shared) => {
            shared.punt(frame, info);
            return;
        }
        Ok(admitted) => admitted,
        Err(reason) => {
            shared.refuse(frame, reason, &info.p, None);
            return;
        }
    };
    let job = to_open(entry, frame, info, (pre, seq), place.mode);
    if let Err(job) = shared.bank.stage(place.engine, job) {
        entry.live.counters.engine.add(1);
        shared.drop(job.frame, DropReason::EngineError);
    }
}
