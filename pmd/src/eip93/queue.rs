//! Jobs in, jobs out.

use std::sync::Arc;
use std::time::Instant;

use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, SaId};
use sa_store::snapshot::Snapshot;

use super::flight::Route;
use super::record::{STATE_STRIDE, first_block};
use super::ring::{Command, Done, Fault, HASH_FINAL};
use super::slots::{Slot, Slots};
use super::{Eip93Engine, Health, NAME};
use crate::engine::{
    Capabilities, EngineDead, EngineStats, EspEngine, EspJob, JobKind, JobStatus, Refusal,
};

/// Polls without a result between two looks at the clock.
const LOOK_EVERY: u32 = 16;
const HEADER: usize = 8;
/// Padding to what the cipher needs.
const PAD_TO_4: u32 = 2 << 24;
/// Bytes behind a frame's data that the engine may touch when it rounds its last write up to a word.
const SLACK: usize = 4;

/// What a run gave to the engine.
#[derive(Default)]
struct Given {
    jobs: u64,
    bytes: u64,
}

/// A job that does not go to the engine, and why.
type Refused = JobStatus;

impl EspEngine for Eip93Engine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        self.slots
            .install(sa, self.chip.options, &self.config.unknowns)
    }

    fn remove(&mut self, sa: SaId) {
        self.slots.remove(sa);
    }

    fn submit(&mut self, _view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        if jobs.is_empty() {
            self.poll(done);
            return;
        }
        self.collect(done);
        if self.health != Health::Good {
            // Not behind what is stuck in the engine: that may take until somebody resets it.
            done.extend(jobs.drain(..).map(|mut job| {
                job.status = JobStatus::Failed;
                job
            }));
            return;
        }
        let deadline = Instant::now() + self.config.deadline;
        let room = self.rings.room() as usize;
        let mut n = jobs.len().min(room);
        if self.config.unknowns.one_number_at_a_time && n != 0 {
            n = usize::from(self.is_idle(jobs[0].sa));
        }
        self.stats.busy.add((jobs.len() - n) as u64);
        let mut given = Given::default();
        for job in jobs.drain(..n) {
            self.give(job, deadline, &mut given);
        }
        self.stats.submitted.add(given.jobs);
        self.stats.bytes.add(given.bytes);
        let rung = self.rings.announce(&self.chip.regs);
        self.stats.doorbells.add(rung);
        self.flights.settle(done);
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        self.collect(done);
        if self.health != Health::Good {
            return;
        }
        // The clock costs more than a look at the ring.
        self.quiet = self.quiet.wrapping_add(1);
        if !self.quiet.is_multiple_of(LOOK_EVERY) {
            return;
        }
        if let Some(first) = self.flights.first() {
            if Instant::now() > first.deadline {
                self.stats.lost.add(self.flights.len() as u64);
                self.distrust(Health::Lost);
            }
        } else if let Some(since) = self.unreleased
            && since.elapsed() > self.config.deadline
        {
            self.distrust(Health::Wrong("results that it does not count"));
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn is_present(&self) -> bool {
        self.chip.is_present()
    }

    fn is_healthy(&self) -> bool {
        self.health == Health::Good
    }

    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.health = Health::Dead;
        let dead = |error: super::Eip93Error| EngineDead {
            engine: NAME,
            reason: error.to_string(),
        };
        self.chip.stop().map_err(dead)?;
        loop {
            self.flights.settle(done);
            let Some((route, mut job)) = self.flights.land() else {
                break;
            };
            job.status = JobStatus::Failed;
            self.slots.landed(route.slot);
            done.push(job);
        }
        // Numbers that were given to packets now lost are used up, whatever the engine wrote.
        for slot in self.slots.each() {
            if slot.packet && slot.direction == Direction::Out {
                slot.renumber(slot.last);
                slot.last_iv = [0; 16];
            }
        }
        self.stats.resets.add(1);
        self.begin().map_err(dead)
    }

    fn reached(&self, sa: SaId) -> Option<u64> {
        let slot = self.slots.by_id(sa)?;
        slot.packet.then_some(slot.reached)
    }

    fn stats(&self) -> Option<&Arc<EngineStats>> {
        Some(&self.stats)
    }
}

impl Eip93Engine {
    fn is_idle(&mut self, sa: SaId) -> bool {
        let slot = self.slots.find(sa);
        let slot = slot.and_then(|n| self.slots.get(n));
        slot.is_none_or(|s| s.in_flight == 0 || !s.packet)
    }

    pub(super) fn distrust(&mut self, health: Health) {
        if self.health == Health::Good {
            tracing::warn!(engine = NAME, ?health, "the engine is not trusted any more");
            self.health = health;
        }
    }

    /// Makes a command of the job, or puts it in the line of those that are done.
    fn give(&mut self, mut job: EspJob, deadline: Instant, all: &mut Given) {
        let status = match self.prepare(&mut job, deadline) {
            Ok((command, route)) => {
                let (slot, length) = (route.slot, u64::from(command.length));
                match self.flights.depart(job, route) {
                    Ok(()) => {
                        // There is room: so many jobs were taken.
                        let given = self.rings.give(&command);
                        debug_assert!(given);
                        if let Some(slot) = self.slots.get(slot) {
                            slot.in_flight += 1;
                        }
                        all.jobs += 1;
                        all.bytes += length;
                        return;
                    }
                    Err(back) => {
                        job = back;
                        JobStatus::Failed
                    }
                }
            }
            Err(status) => status,
        };
        job.status = status;
        self.flights.wait(job);
    }

    fn prepare(
        &mut self,
        job: &mut EspJob,
        deadline: Instant,
    ) -> Result<(Command, Route), Refused> {
        let number = self.slots.find(job.sa).ok_or(JobStatus::SaGone)?;
        if self.config.unknowns.unaligned_data {
            self.flights.address(&job.frame).ok_or(JobStatus::Failed)?;
        } else {
            self.align(job)?;
        }
        let base = self.flights.address(&job.frame).ok_or(JobStatus::Failed)?;
        let at = base
            .checked_add(job.esp_off.into())
            .ok_or(JobStatus::Failed)?;
        let id = self.flights.next_id();
        let index = self.rings.next() as usize;
        let slot = self.slots.get(number).ok_or(JobStatus::SaGone)?;
        let kind = match slot.direction {
            Direction::Out => JobKind::Seal,
            Direction::In => JobKind::Open,
        };
        if job.kind != kind || slot.broken {
            return Err(JobStatus::Failed);
        }
        let mut route = Route {
            id,
            slot: number,
            deadline,
            header: [0; 8],
            plain: [0; 8],
            plain_at: 0,
            length: 0,
            packet: slot.packet,
        };
        let mut command = Command {
            control: HASH_FINAL,
            source: at,
            destination: at,
            sa: slot.address(),
            id,
            ..Command::default()
        };
        match (slot.packet, kind) {
            (false, _) => {
                let block = crypto(slot, job, &mut command, &mut route)?;
                let state = index * STATE_STRIDE;
                let [low, high] = halves(block);
                let place = self.states.block::<16>(state).ok_or(JobStatus::Failed)?;
                place.write64::<0>(low);
                place.write64::<8>(high);
                let base = u32::try_from(self.states.iova()).map_err(|_| JobStatus::Failed)?;
                let offset = u32::try_from(state).map_err(|_| JobStatus::Failed)?;
                command.state = base + offset;
            }
            (true, JobKind::Open) => packet_open(slot, job, &mut command, &mut route)?,
            (true, JobKind::Seal) => packet_seal(slot, job, &mut command, &mut route)?,
        }
        Ok((command, route))
    }

    /// Moves the packet in its frame so that the ESP header's address is a multiple of 4.
    fn align(&mut self, job: &mut EspJob) -> Result<(), Refused> {
        let base = self.flights.address(&job.frame).ok_or(JobStatus::Failed)?;
        let over = (base.wrapping_add(job.esp_off.into()) & 3) as usize;
        if over == 0 {
            return Ok(());
        }
        job.frame.prepend(over).ok_or(JobStatus::Failed)?;
        job.frame.data_mut().copy_within(over.., 0);
        job.frame.trim_back(over);
        self.stats.moved.add(1);
        Ok(())
    }

    /// Takes all results that are there.
    fn collect(&mut self, done: &mut Vec<EspJob>) {
        self.flights.settle(done);
        let mut completed = 0;
        while self.health == Health::Good {
            let Some(result) = self.rings.take() else {
                break;
            };
            let Some(id) = self.flights.first().map(|r| r.id) else {
                self.stats.wrong.add(1);
                self.distrust(Health::Wrong("a result without a command"));
                break;
            };
            // The frame of another's result is the engine's still.
            if id != result.id {
                self.stats.wrong.add(1);
                self.distrust(Health::Wrong("a result of another command"));
                break;
            }
            let Some((route, mut job)) = self.flights.land() else {
                break;
            };
            let judge = Judge {
                slots: &mut self.slots,
                stats: &self.stats,
                length_counts_icv: self.config.unknowns.length_counts_icv,
            };
            let verdict = judge.status(route, &mut job, result);
            self.slots.landed(route.slot);
            job.status = verdict.unwrap_or(JobStatus::Failed);
            completed += 1;
            done.push(job);
            self.flights.settle(done);
            if let Err(health) = verdict {
                self.stats.wrong.add(1);
                self.distrust(health);
            }
        }
        if completed != 0 {
            self.stats.completed.add(completed);
            self.quiet = 0;
        }
        if self.health == Health::Good {
            self.rings.release(&self.chip.regs);
            let waits = self.rings.given() == 0 && self.rings.room() + 1 < self.config.ring;
            match (waits, self.unreleased) {
                (true, None) => self.unreleased = Some(Instant::now()),
                (false, Some(_)) => self.unreleased = None,
                _ => {}
            }
        }
    }
}

/// What a result is judged with.
struct Judge<'e> {
    slots: &'e mut Slots,
    stats: &'e EngineStats,
    length_counts_icv: Option<bool>,
}

impl Judge<'_> {
    /// What the result says of the packet, or of the engine.
    fn status(self, route: &Route, job: &mut EspJob, result: Done) -> Result<JobStatus, Health> {
        let Some(slot) = self.slots.get(route.slot) else {
            return Ok(JobStatus::SaGone);
        };
        if let Some(fault) = result.fault() {
            return fault_of(slot, job.kind, route.packet, fault, self.stats);
        }
        let right = match (route.packet, job.kind) {
            (false, _) => finish_crypto(slot, route, job, result, self.length_counts_icv),
            (true, JobKind::Seal) => finish_seal(slot, route, job, result),
            (true, JobKind::Open) => finish_open(slot, route, job, result),
        };
        right.map_err(Health::Wrong)?;
        Ok(JobStatus::Done)
    }
}

fn fault_of(
    slot: &mut Slot,
    kind: JobKind,
    packet: bool,
    fault: Fault,
    stats: &EngineStats,
) -> Result<JobStatus, Health> {
    match (fault, kind) {
        (Fault::Authentication, JobKind::Open) => {
            stats.icv_failed.add(1);
            Ok(JobStatus::IcvMismatch)
        }
        (Fault::Sequence, JobKind::Open) if packet => {
            stats.replays.add(1);
            Ok(JobStatus::Replayed)
        }
        (Fault::Malformed, JobKind::Open) if packet => {
            stats.malformed.add(1);
            Ok(JobStatus::Malformed)
        }
        (Fault::Record(_), _) => {
            stats.wrong.add(1);
            slot.broken = true;
            Ok(JobStatus::Failed)
        }
        (Fault::Fatal(code), _) => Err(Health::Fault(code)),
        // Our own packets have nothing that could be wrong.
        _ => Err(Health::Wrong("an error that cannot be")),
    }
}

fn halves(block: [u8; 16]) -> [u64; 2] {
    let (low, high) = (block.first_chunk(), block.last_chunk());
    [low, high].map(|h| h.map_or(0, |h| u64::from_le_bytes(*h)))
}

/// The packet's parts are where they should be: header, IV, at least one block, ICV.
fn check(slot: &Slot, job: &EspJob) -> Result<usize, Refused> {
    let parts = slot.parts;
    let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
    if to > job.frame.len() || from > to {
        return Err(JobStatus::Malformed);
    }
    let front = HEADER + parts.iv_len();
    let ciphered = (to - from)
        .checked_sub(front + parts.icv_len())
        .filter(|&n| n > 0 && n.is_multiple_of(parts.block()))
        .ok_or(JobStatus::Malformed)?;
    Ok(front + ciphered)
}

/// Crypto mode: the command, and the block that the cipher starts with.
fn crypto(
    slot: &Slot,
    job: &EspJob,
    command: &mut Command,
    route: &mut Route,
) -> Result<[u8; 16], Refused> {
    let length = check(slot, job)?;
    let esp = job.frame.data().get(usize::from(job.esp_off)..);
    let esp = esp.ok_or(JobStatus::Malformed)?;
    let iv = esp.get(HEADER..HEADER + slot.parts.iv_len());
    let header = esp.first_chunk().ok_or(JobStatus::Malformed)?;
    route.header = *header;
    if job.kind == JobKind::Seal && length >= HEADER + slot.parts.iv_len() + 8 {
        let last = esp.get(length - 8..length).and_then(|b| b.first_chunk());
        route.plain = *last.ok_or(JobStatus::Malformed)?;
        let at = usize::from(job.esp_off) + length - 8;
        route.plain_at = u16::try_from(at).map_err(|_| JobStatus::Malformed)?;
    }
    route.length = u16::try_from(length).map_err(|_| JobStatus::Malformed)?;
    command.length = route.length.into();
    Ok(first_block(slot.nonce, iv.ok_or(JobStatus::Malformed)?))
}

fn packet_open(
    slot: &Slot,
    job: &mut EspJob,
    command: &mut Command,
    route: &mut Route,
) -> Result<(), Refused> {
    let most = check(slot, job)?;
    let esp = job.frame.data().get(usize::from(job.esp_off)..);
    let header: [u8; 8] = *esp
        .and_then(|e| e.first_chunk())
        .ok_or(JobStatus::Malformed)?;
    route.header = header;
    let [_, _, _, _, a, b, c, d] = header;
    job.seq = u32::from_be_bytes([a, b, c, d]).into();
    // Padding length and next header are the least that is taken off.
    route.length = u16::try_from(most - 2).map_err(|_| JobStatus::Malformed)?;
    command.length = u32::from(job.esp_end - job.esp_off);
    Ok(())
}

fn packet_seal(
    slot: &mut Slot,
    job: &mut EspJob,
    command: &mut Command,
    route: &mut Route,
) -> Result<(), Refused> {
    let parts = slot.parts;
    let from = usize::from(job.esp_off);
    let front = HEADER + parts.iv_len();
    let end = usize::from(job.esp_end);
    let payload = end
        .checked_sub(from + front)
        .filter(|&n| n > 0 && end <= job.frame.len())
        .ok_or(JobStatus::Malformed)?;
    let total = front + (payload + 2).next_multiple_of(parts.block()) + parts.icv_len();
    job.frame.trim_back(job.frame.len() - end);
    let grown = from + total - end;
    if job.frame.tailroom() < grown + SLACK {
        return Err(JobStatus::Malformed);
    }
    route.length = u16::try_from(total).map_err(|_| JobStatus::Malformed)?;
    if payload >= 8 {
        let data = job.frame.data().get(from + front..);
        route.plain = *data
            .and_then(|d| d.first_chunk())
            .ok_or(JobStatus::Malformed)?;
        route.plain_at = u16::try_from(from + front).map_err(|_| JobStatus::Malformed)?;
    }
    // The SA's own count is the one that leases and limits bind, and the caller took the number from it.
    let Ok(number) = u32::try_from(job.seq) else {
        return Err(JobStatus::LimitReached);
    };
    if number.checked_sub(1) != Some(slot.last) {
        if slot.in_flight != 0 || number <= slot.last {
            return Err(JobStatus::Failed);
        }
        slot.renumber(number - 1);
    }
    job.frame.append(grown).ok_or(JobStatus::Malformed)?;
    slot.last = number;
    job.esp_end = u16::try_from(from + total).map_err(|_| JobStatus::Malformed)?;
    route.header[..4].copy_from_slice(&slot.spi);
    route.header[4..].copy_from_slice(&number.to_be_bytes());
    let front = u32::try_from(front).map_err(|_| JobStatus::Malformed)?;
    command.source = command.destination + front;
    command.control |= PAD_TO_4 | u32::from(job.next_header) << 8;
    command.length = u32::try_from(payload).map_err(|_| JobStatus::Malformed)?;
    Ok(())
}

/// The ESP packet, its header and place checked.
fn sealed<'a>(route: &Route, job: &'a mut EspJob) -> Result<&'a mut [u8], &'static str> {
    let (from, to) = (usize::from(job.esp_off), usize::from(job.esp_end));
    let data = job.frame.data_mut();
    let plain_at = usize::from(route.plain_at);
    if plain_at != 0 && data.get(plain_at..plain_at + 8) == Some(&route.plain) {
        return Err("plaintext for ciphertext");
    }
    let esp = data.get_mut(from..to).ok_or("a packet out of its frame")?;
    if esp.first_chunk() != Some(&route.header) {
        return Err("another ESP header");
    }
    Ok(esp)
}

fn finish_crypto(
    slot: &Slot,
    route: &Route,
    job: &mut EspJob,
    result: Done,
    counts_icv: Option<bool>,
) -> Result<(), &'static str> {
    let (bare, icv) = (usize::from(route.length), slot.parts.icv_len());
    let fits = match (job.kind, counts_icv) {
        (JobKind::Open, _) | (JobKind::Seal, Some(false)) => result.length == bare,
        (JobKind::Seal, Some(true)) => result.length == bare + icv,
        (JobKind::Seal, None) => result.length == bare || result.length == bare + icv,
    };
    if !fits {
        return Err("another length");
    }
    let kind = job.kind;
    let esp = sealed(route, job)?;
    if kind == JobKind::Seal {
        // The hash leaves the engine in native words; the wire has them the other way round.
        for word in esp[bare..].as_chunks_mut::<4>().0 {
            word.reverse();
        }
    }
    Ok(())
}

fn finish_seal(
    slot: &mut Slot,
    route: &Route,
    job: &mut EspJob,
    result: Done,
) -> Result<(), &'static str> {
    if result.length != usize::from(route.length) {
        return Err("another length");
    }
    let esp = sealed(route, job)?;
    let mut iv = [0; 16];
    let n = slot.parts.iv_len();
    iv[..n].copy_from_slice(&esp[HEADER..HEADER + n]);
    if iv == slot.last_iv || iv == [0; 16] {
        return Err("an IV that is not random");
    }
    slot.last_iv = iv;
    slot.reached = job.seq;
    Ok(())
}

fn finish_open(
    slot: &mut Slot,
    route: &Route,
    job: &mut EspJob,
    result: Done,
) -> Result<(), &'static str> {
    let most = usize::from(route.length);
    let front = HEADER + slot.parts.iv_len();
    // RFC 4303 section 2.4: up to 255 bytes of padding.
    if !(front..=most).contains(&result.length) || most - result.length > 255 {
        return Err("another length");
    }
    sealed(route, job)?;
    let end = usize::from(job.esp_off) + result.length;
    job.esp_end = u16::try_from(end).map_err(|_| "another length")?;
    let behind = job.frame.len() - end;
    job.frame.trim_back(behind);
    job.next_header = result.next_header();
    slot.reached = slot.reached.max(job.seq);
    Ok(())
}
