//! Packets into the engine and out of it.

use super::first::First;
use super::flow::{Answer, Meta, Request, Seen};
use super::record::LARGEST;
use super::slots::{Carried, State};
use super::{Health, JUDGED_FROM, JUDGED_OVER, Judged, NAME, SWEEP, SoeEngine};
use crate::engine::{EspJob, JobKind, JobStatus};
use crate::frame::Frame;
use crate::qdma::hop::{Action, descriptor};
use crate::qdma::hub::{DUMMY_HEADER, ENGINE_COOKIE, ForEngine, Hub, dummy_header};
use sa_store::sa::OffloadMode;

use crate::qdma::{Received, Sent, TxMsg};

/// IP protocol numbers.
const UDP: u8 = 17;
const ESP: u8 = 50;

impl SoeEngine {
    /// Takes jobs whose SA has room, in order per SA; the others stay.
    pub(super) fn accept(&mut self, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        if self.health != Health::Good {
            done.extend(jobs.drain(..).map(|mut job| {
                job.status = JobStatus::Failed;
                job
            }));
            return;
        }
        let most = self.config.waiting;
        let mut full: u64 = 0;
        let mut kept = std::mem::take(&mut self.kept);
        for mut job in jobs.drain(..) {
            let Some((number, slot)) = self.slots.of(job.sa) else {
                job.status = JobStatus::SaGone;
                done.push(job);
                continue;
            };
            // Once one job of an SA had to stay, those behind it stay too.
            if full >> number & 1 == 1 || slot.flow.waiting.len() >= most {
                full |= 1 << number;
                self.stats.busy.add(1);
                kept.push(job);
                continue;
            }
            slot.flow.waiting.push_back(job);
            self.in_flight += 1;
        }
        jobs.append(&mut kept);
        self.kept = kept;
    }

    /// One round: results in, what is overdue out, waiting jobs in.
    pub(super) fn turn(&mut self, now: u64, done: &mut Vec<EspJob>) {
        let shared = self.hub.clone();
        let mut hub = shared.lock();
        hub.pump();
        let mut inbox = std::mem::take(&mut self.inbox);
        hub.take_engine(&mut inbox);
        for item in inbox.drain(..) {
            match item {
                ForEngine::Sent(sent) => self.sent(sent),
                ForEngine::Result(r) => self.result(r, &mut hub, done),
            }
        }
        self.inbox = inbox;
        if now.saturating_sub(self.swept) >= SWEEP {
            self.swept = now;
            self.sweep(now, &mut hub);
        }
        if self.health == Health::Good {
            self.dispatch(now, &mut hub, done);
            hub.kick();
        } else {
            self.abandon_all(done);
        }
        self.give_back(&mut hub, done);
    }

    /// Moves waiting jobs into the engine as far as each SA's window goes.
    fn dispatch(&mut self, now: u64, hub: &mut Hub, done: &mut Vec<EspJob>) {
        let (instance, assume) = (self.config.instance, self.config.assume);
        let mut room = hub.room(instance, assume.ring);
        for (number, slot) in (0u8..).zip(&mut self.slots.list) {
            let Some(sa) = slot.sa.filter(|_| slot.state == State::Active) else {
                continue;
            };
            while room > 0 && slot.flow.is_open(assume.in_flight) {
                let Some(mut job) = slot.flow.waiting.pop_front() else {
                    break;
                };
                let refused = if slot.flow.is_at_limit() {
                    self.counters.limited.add(1);
                    Some(JobStatus::LimitReached)
                } else if !prepare(&mut job, &sa, |len| slot.flow.takes(len, LARGEST)) {
                    self.counters.refused.add(1);
                    Some(JobStatus::Malformed)
                } else {
                    None
                };
                if let Some(status) = refused {
                    self.in_flight -= 1;
                    job.status = status;
                    done.push(job);
                    continue;
                }
                let len = u16::try_from(job.frame.len()).unwrap_or(u16::MAX);
                let meta = Meta {
                    sa: job.sa,
                    seq: job.seq,
                    tag: job.tag,
                    note: job.note,
                    kind: job.kind,
                };
                let first = slot.opener.as_ref().map(|opener| {
                    let esp = job.frame.data().get(usize::from(sa.shape.esp_off())..);
                    opener.first(esp.unwrap_or_default(), sa.shape.icv)
                });
                let framed = encase(&mut job.frame, sa.action, number);
                let id = self.next_id;
                let cookie = ENGINE_COOKIE | (id << 8 & !ENGINE_COOKIE) | u64::from(number);
                let msg = TxMsg::hop(number, sa.action.queue());
                let sent = match framed {
                    true => hub.send(instance, assume.ring, job.frame, msg, cookie),
                    false => Err(job.frame),
                };
                match sent {
                    Ok(()) => {
                        self.next_id += 1;
                        room -= 1;
                        self.counters.requests.add(1);
                        self.counters.bytes.add(u64::from(len));
                        slot.flow.submitted(meta, id, len, first, now);
                        if !assume.batch {
                            hub.kick();
                        }
                    }
                    // No head-room, or a frame that the device cannot reach.
                    Err(frame) => {
                        self.counters.refused.add(1);
                        self.in_flight -= 1;
                        done.push(job_of(meta, frame, JobStatus::Failed));
                    }
                }
            }
        }
    }

    /// A request left memory, or did not.
    fn sent(&mut self, sent: Sent) {
        if !sent.dropped {
            return;
        }
        let number = sent.cookie.to_le_bytes()[0];
        let id = (sent.cookie & !ENGINE_COOKIE) >> 8;
        if let Some((slot, _)) = self.slots.with_sa(number)
            && let Some(request) = slot.flow.never_left(id)
        {
            self.counters.dropped.add(1);
            self.ended.push_back((request.meta, JobStatus::Failed));
        }
    }

    /// A result, or the loss of one. All of it is the device's word.
    fn result(&mut self, r: Received, hub: &mut Hub, done: &mut Vec<EspJob>) {
        let number = r.msg.user_field();
        let flags = r.msg.hop_flags();
        let mut frame = r.frame;
        let Some((slot, sa)) = self.slots.with_sa(number) else {
            self.counters.orphans.add(1);
            hub.put(frame);
            return;
        };
        let seen = if r.fault.is_some() {
            Seen::Nothing
        } else if flags != sa.action.success() {
            let error = usize::from(flags).checked_sub(5);
            match error.and_then(|i| self.counters.errors.get(i)) {
                Some(counter) => counter.add(1),
                None => self.counters.wrong_direction.add(1),
            }
            Seen::Nothing
        } else {
            let seen = match frame.trim_front(DUMMY_HEADER) {
                true => look(&mut frame, &sa),
                false => Seen::Nothing,
            };
            if seen == Seen::Nothing {
                self.counters.malformed.add(1);
            }
            seen
        };
        let answer = slot.flow.answer(seen, &mut self.lost);
        match answer {
            Answer::To(request) => {
                self.counters.results.add(1);
                if let Some(ring) = self.counters.rings.get(usize::from(r.ring)) {
                    ring.add(1);
                }
                self.in_flight -= 1;
                let mut job = job_of(request.meta, frame, JobStatus::Done);
                if let Seen::Sealed { number, outer } = seen {
                    job.seq = u64::from(number);
                    job.esp_off = sa.shape.esp_off();
                    job.esp_end = outer;
                } else {
                    // Tunnel mode only, and its family was looked at.
                    let ipv6 = job.frame.data().first().is_some_and(|b| b >> 4 == 6);
                    job.next_header = if ipv6 { 41 } else { 4 };
                }
                // Lost ones come before it.
                self.note_lost();
                self.give_back(hub, done);
                done.push(job);
                return;
            }
            Answer::Failed(request) => {
                if seen != Seen::Nothing {
                    self.counters.miscounted.add(1);
                }
                self.ended.push_back((request.meta, JobStatus::Failed));
            }
            Answer::Orphan => self.counters.orphans.add(1),
            Answer::Repeated => {
                self.counters.repeated.add(1);
                if sa.counter_mode && sa.action == Action::Encrypt {
                    self.distrust(Health::Wrong("a number, and so an IV, came twice"));
                }
            }
            Answer::Strange => {
                self.counters.strange.add(1);
                self.distrust(Health::Wrong("it opened a packet that nobody submitted"));
            }
        }
        hub.put(frame);
        self.note_lost();
    }

    /// What comes up only now and then: lost results, limits, interrupts, slots to be vacated, trust.
    fn sweep(&mut self, now: u64, hub: &mut Hub) {
        let patience = u64::try_from(self.config.patience.as_nanos()).unwrap_or(u64::MAX);
        for slot in &mut self.slots.list {
            slot.flow.expire(now, patience, &mut self.lost);
        }
        self.note_lost();
        match self.window.hard_limits() {
            None => self.distrust(Health::Dead("registers")),
            Some(0) => {}
            // The driver stops before: whoever gets here counts differently.
            Some(slots) => {
                tracing::error!(engine = NAME, slots, "hard limit of sequence numbers");
                self.distrust(Health::Wrong("numbers ran out before the driver's limit"));
            }
        }
        match hub.events() {
            None => self.distrust(Health::Dead("rings")),
            Some(e) if e.is_fatal() => self.distrust(Health::Dead("descriptors")),
            Some(_) => {}
        }
        if self.health == Health::Good {
            self.vacate_drained();
        }
        let bells = hub.counters().iter().map(|c| c.doorbells.value()).sum();
        self.stats.doorbells.set(bells);
        self.counters.show(&self.stats);
        self.judge(now);
    }

    /// Results do get lost on silicon: a rate decides.
    fn judge(&mut self, now: u64) {
        if now.saturating_sub(self.judged.since) < JUDGED_OVER {
            return;
        }
        let seen = Judged::from(&self.counters, now);
        let (lost, ended) = (seen.lost - self.judged.lost, seen.ended - self.judged.ended);
        if ended >= JUDGED_FROM && lost * 10_000 > ended * self.config.most_lost {
            self.distrust(Health::Lossy(lost * 10_000 / ended));
        }
        self.judged = seen;
    }

    fn note_lost(&mut self) {
        for request in self.lost.drain(..) {
            self.counters.lost.add(1);
            self.ended.push_back((request.meta, JobStatus::Failed));
        }
    }

    /// Everything in flight has failed.
    pub(super) fn abandon_all(&mut self, done: &mut Vec<EspJob>) {
        self.slots.abandon(&mut self.lost);
        let ended = self.lost.drain(..);
        self.ended
            .extend(ended.map(|r: Request| (r.meta, JobStatus::Failed)));
        let mut waiting = std::mem::take(&mut self.refused);
        self.slots.take_waiting(&mut waiting);
        for mut job in waiting {
            self.in_flight -= 1;
            if job.status == JobStatus::Pending {
                job.status = JobStatus::Failed;
            }
            done.push(job);
        }
    }

    /// Jobs whose frames went into the engine and never came back get an empty one.
    pub(super) fn give_back(&mut self, hub: &mut Hub, done: &mut Vec<EspJob>) {
        for job in self.refused.drain(..) {
            self.in_flight -= 1;
            done.push(job);
        }
        while let Some((meta, status)) = self.ended.front().copied() {
            let Some(frame) = hub.spare() else {
                break;
            };
            self.ended.pop_front();
            self.in_flight -= 1;
            done.push(job_of(meta, frame, status));
        }
    }
}

fn job_of(meta: Meta, frame: Frame, status: JobStatus) -> EspJob {
    let len = u16::try_from(frame.len()).unwrap_or(u16::MAX);
    EspJob {
        frame,
        sa: meta.sa,
        seq: meta.seq,
        tag: meta.tag,
        note: meta.note,
        esp_off: 0,
        esp_end: len,
        next_header: 0,
        kind: meta.kind,
        mode: OffloadMode::Packet,
        status,
    }
}

/// Whether the engine can take the packet: of the SA's direction, whole, without options, of the right lengths.
fn prepare(job: &mut EspJob, sa: &Carried, takes: impl Fn(u16) -> bool) -> bool {
    let right = match sa.action {
        Action::Encrypt => job.kind == JobKind::Seal && is_inner(job.frame.data()),
        Action::Decrypt => {
            job.kind == JobKind::Open
                && trim(&mut job.frame)
                && outer(job.frame.data(), sa).is_some()
        }
    };
    right && u16::try_from(job.frame.len()).is_ok_and(takes)
}

/// An IP packet, as long as it says, not a fragment of IPv4.
fn is_inner(data: &[u8]) -> bool {
    match data.first().map(|b| b >> 4) {
        Some(4) => {
            let total = be16(data, 2).map(usize::from);
            data.len() >= 20
                && total == Some(data.len())
                && be16(data, 6).is_some_and(|f| f & 0x3fff == 0)
        }
        Some(6) => {
            let payload = be16(data, 4).map(usize::from);
            payload.is_some_and(|n| n + 40 == data.len())
        }
        _ => false,
    }
}

/// Takes padding of the link off an IPv4 packet.
fn trim(frame: &mut Frame) -> bool {
    let len = frame.len();
    let total = be16(frame.data(), 2).map_or(usize::MAX, usize::from);
    total <= len && frame.trim_back(len - total)
}

/// The sequence number of an outer packet of this SA: IPv4 without options, whole, right addresses, ports and SPI.
fn outer(data: &[u8], sa: &Carried) -> Option<u32> {
    let header = data.get(..20)?;
    let total = usize::from(be16(data, 2)?);
    let fragment = be16(data, 6)? & 0x3fff;
    let proto = if sa.ports.is_some() { UDP } else { ESP };
    if header[0] != 0x45
        || total != data.len()
        || fragment != 0
        || header[9] != proto
        || header[16..] != sa.dst
    {
        return None;
    }
    // A peer behind NAT may show another address: the ICV decides who sent it.
    if sa.action == Action::Encrypt && header[12..16] != sa.src {
        return None;
    }
    if let Some((sport, dport)) = sa.ports {
        let length = usize::from(be16(data, 24)?);
        let from = be16(data, 20)?;
        if be16(data, 22)? != dport
            || (sa.action == Action::Encrypt && from != sport)
            || length + 20 != data.len()
        {
            return None;
        }
    }
    let at = usize::from(sa.shape.esp_off());
    if be32(data, at)? != sa.spi {
        return None;
    }
    be32(data, at + 4)
}

/// What a successful result shows, with what is behind the packet taken off.
fn look(frame: &mut Frame, sa: &Carried) -> Seen {
    let len = |f: &Frame| u16::try_from(f.len()).ok();
    match sa.action {
        Action::Encrypt => {
            let number = outer(frame.data(), sa);
            match (number, len(frame)) {
                (Some(number), Some(outer)) => Seen::Sealed { number, outer },
                _ => Seen::Nothing,
            }
        }
        Action::Decrypt => {
            let data = frame.data();
            let inner = match data.first().map(|b| b >> 4) {
                Some(4) => be16(data, 2).filter(|&n| n >= 20),
                Some(6) => be16(data, 4).and_then(|n| n.checked_add(40)),
                _ => None,
            };
            match (inner, len(frame)) {
                (Some(inner), Some(all)) if inner <= all => Seen::Opened {
                    inner: all,
                    first: First::of(data),
                },
                _ => Seen::Nothing,
            }
        }
    }
}

/// Puts the engine's headers in front of a packet.
fn encase(frame: &mut Frame, action: Action, slot: u8) -> bool {
    let ipv6 = frame.data().first().is_some_and(|b| b >> 4 == 6);
    let Some(place) = frame.prepend_array::<{ DUMMY_HEADER }>() else {
        return false;
    };
    *place = dummy_header(ipv6);
    match frame.prepend_array() {
        Some(place) => {
            *place = descriptor(action, slot);
            true
        }
        None => {
            // As it was.
            frame.trim_front(DUMMY_HEADER);
            false
        }
    }
}

fn be16(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

fn be32(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}
