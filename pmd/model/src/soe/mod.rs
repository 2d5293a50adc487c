//! The EN7581's secure offload engine with the QDMA instances that lead to it, as its reference describes them.
//!
//! ```text
//!   CPU index ─▶ descriptors ─▶ hop descriptor, dummy header ─▶ slot ─▶ queue 8 or 9 ─▶ wait ─▶ receive ring
//! ```
//!
//! Regions: 0 the packet switch, 1 and 2 QDMA, 3 the engine. One frame a turn. Results of a direction come in order.

mod crypt;
mod esp;
mod qdma;
mod switches;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use esp::{CMD_UNTRIED, Entry, Fault, WORDS};
use qdma::{Given, Qdma};
pub use switches::Switches;

use crate::{Bus, Knobs, Model, Turn};

const FE_LEN: u64 = 0x3000;
const SOE_LEN: u64 = 0x1000;
/// Interrupts: four banks of each QDMA instance, then the engine.
const SOE_VECTOR: usize = 8;

const GLB_CFG: usize = 0x000;
const INT_EN: usize = 0x020;
const INT_STS: usize = 0x024;
const BITMAPS: [usize; 8] = [0x030, 0x038, 0x040, 0x0b0, 0x0b8, 0x0c0, 0x0c8, 0x0d0];
const CNT_CLR: usize = 0x04c;
const SA_CTRL: usize = 0x100;
const SA_DONE: usize = 0x104;
const STAGING: usize = 0x110;
const STAGING_END: usize = STAGING + 4 * WORDS;

const HOP: usize = 32;
const HEADERS: usize = HOP + 14;
const MACS: [u8; 12] = [
    0x00, 0x0c, 0xe7, 0x20, 0x21, 0x12, 0x00, 0x0c, 0xe7, 0x20, 0x22, 0x62,
];
const SLOTS: u8 = 32;

/// A result on its way back.
struct Answer {
    due: Instant,
    instance: usize,
    flags: u32,
    user: u8,
    bytes: Vec<u8>,
}

/// The engine and its rings.
pub struct Soe {
    switches: Switches,
    knobs: Arc<Knobs>,
    fe: Vec<u32>,
    qdma: [Qdma; 2],
    config: u32,
    int_en: u32,
    int_sts: u32,
    bitmaps: [u32; 8],
    ctrl: u32,
    done: bool,
    /// Reads of SA_DONE until the commit shows as done.
    commit_in: Option<u64>,
    staging: [u32; WORDS],
    slots: Vec<Option<Entry>>,
    /// Results of both directions, in order, and those that misbehaviour made late.
    queues: [VecDeque<Answer>; 2],
    late: Vec<Answer>,
    /// A result that waits to change places with the next of its direction.
    held: [Option<Answer>; 2],
    jobs: u64,
    busy_until: Option<Instant>,
}

impl Soe {
    /// An engine after power-on.
    pub fn new(switches: Switches, knobs: Arc<Knobs>) -> Soe {
        switches.print();
        let words = usize::try_from(FE_LEN).unwrap_or(0) / 4;
        Soe {
            switches,
            knobs,
            fe: vec![0; words],
            qdma: [Qdma::new(), Qdma::new()],
            config: 0,
            int_en: 0,
            int_sts: 0,
            bitmaps: [0; 8],
            ctrl: 0,
            done: false,
            commit_in: None,
            staging: [0; WORDS],
            slots: (0..SLOTS).map(|_| None).collect(),
            queues: [VecDeque::new(), VecDeque::new()],
            late: Vec::new(),
            held: [None, None],
            jobs: 0,
            busy_until: None,
        }
    }

    fn read_soe(&mut self, bus: &Bus, at: usize) -> u32 {
        match at {
            GLB_CFG => self.config,
            INT_EN => self.int_en,
            INT_STS => self.int_sts,
            SA_CTRL => self.ctrl,
            SA_DONE => {
                if let Some(left) = &mut self.commit_in {
                    *left = left.saturating_sub(1);
                    if *left == 0 {
                        self.commit_in = None;
                        self.done = true;
                    }
                }
                u32::from(self.done)
            }
            STAGING..STAGING_END => {
                let key = (0x124..0x164).contains(&at);
                let word = self.staging[(at - STAGING) / 4];
                if key && !self.switches.staging_readable {
                    0
                } else {
                    word
                }
            }
            _ => match BITMAPS.iter().position(|b| *b == at) {
                Some(i) => self.bitmaps[i],
                None => {
                    bus.broke("only registers that are known", format!("SOE read {at:#x}"));
                    0
                }
            },
        }
    }

    fn write_soe(&mut self, bus: &Bus, at: usize, value: u32) {
        match at {
            GLB_CFG => self.config = value & 3,
            INT_EN => self.int_en = value & 0xffff,
            INT_STS => self.int_sts &= !value,
            CNT_CLR => {}
            SA_CTRL => self.command(bus, value),
            SA_DONE => {
                if value & 1 == 1 {
                    self.done = false;
                }
            }
            STAGING..STAGING_END => self.staging[(at - STAGING) / 4] = value,
            _ => match BITMAPS.iter().position(|b| *b == at) {
                Some(i) => self.bitmaps[i] &= !value,
                None => bus.broke(
                    "only registers that are known",
                    format!("SOE write {at:#x}"),
                ),
            },
        }
    }

    fn command(&mut self, bus: &Bus, value: u32) {
        let busy = self.ctrl & 1 == 1;
        self.ctrl = value;
        if value & 1 == 0 {
            return;
        }
        if busy {
            bus.broke("SA_CTRL is 0 between commits", format!("{value:#x}"));
            return;
        }
        let slot = value >> 8 & 0xff;
        if self.done {
            bus.broke("SA_DONE is cleared before a commit", format!("slot {slot}"));
        }
        self.done = false;
        let place = usize::try_from(slot).ok();
        let Some(place) = place.and_then(|i| self.slots.get_mut(i)) else {
            bus.broke("slots 0 to 31", format!("{slot}"));
            self.commit_in = None;
            return;
        };
        if self.switches.no_commit {
            return;
        }
        let entry = Entry::decode(&self.staging, &self.switches);
        if let Some(e) = &entry {
            let cmd = self.staging[0];
            if cmd & CMD_UNTRIED != 0 {
                bus.broke("no command bits that nobody has tried", format!("{cmd:#x}"));
            }
            if !e.has_suite() {
                bus.broke(
                    "a valid SA has a cipher and a hash that go together",
                    format!("{cmd:#x}"),
                );
            }
            if self.staging[3] < 256 {
                bus.broke("an SPI above 255", format!("slot {slot}"));
            }
        }
        *place = entry;
        self.commit_in = Some(1 + self.knobs.random() % 10);
    }

    /// Does what a frame to port 7 asks for.
    fn request(&mut self, bus: &mut Bus, instance: usize, given: &Given) {
        let lint = |rule, detail: String| bus.broke(rule, detail);
        let [msg0, msg1, msg2] = given.msg;
        let oq = msg1 >> 15 & 0x1f;
        let bytes = &given.bytes;
        let Some((hop, packet)) = bytes.split_at_checked(HEADERS) else {
            return lint(
                "a request has its headers",
                format!("{} bytes", bytes.len()),
            );
        };
        let word = |at: usize| u32::from_le_bytes([hop[at], hop[at + 1], hop[at + 2], hop[at + 3]]);
        let encrypt = match hop[30] {
            0xa0 => true,
            0xb0 => false,
            other => return lint("byte 30 is hop 2 or 3", format!("{other:#x}")),
        };
        let first = if encrypt { 0xffff_ff81 } else { 0xffff_ff82 };
        let expected = [first, 0, 0, 0x1ff, 0, 0, 0x05dc_0000];
        for (i, e) in expected.into_iter().enumerate() {
            if word(4 * i) != e {
                lint(
                    "the constants of the hop descriptor",
                    format!("word {i}: {:#x}", word(4 * i)),
                );
            }
        }
        if hop[31] != 0 {
            lint(
                "the constants of the hop descriptor",
                format!("byte 31: {:#x}", hop[31]),
            );
        }
        let meters = 0x7f74_07ff | 1 << 13;
        if msg1 & !(0x1f << 15) != meters & !(0x1f << 15) || msg2 != 0xff00_ffff {
            lint(
                "the constants of a request's messages",
                format!("{msg1:#x} {msg2:#x}"),
            );
        }
        if msg0 & !(0x3f << 24) != 0 {
            lint("message 0 holds the slot only", format!("{msg0:#x}"));
        }
        let kind = match (packet.first().map(|b| b >> 4), encrypt) {
            (Some(6), true) => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        if hop[HOP..HOP + 12] != MACS || hop[HOP + 12..] != kind {
            lint("the dummy Ethernet header", String::new());
        }
        let slot = hop[29] & 0x3f;
        let user = hop[28];
        let agree = u32::from(slot) == msg0 >> 24 & 0x3f && user & 0x1f == slot;
        if !agree {
            lint(
                "one slot in message 0, byte 28 and byte 29",
                format!("{slot} {user}"),
            );
        }
        if user & 0xe0 != 0 {
            lint("bits 5 to 7 of byte 28 are 0", format!("{user:#x}"));
        }
        if oq != if encrypt { 8 } else { 9 } {
            lint("queue 8 encrypts, 9 decrypts", format!("{oq}"));
        }
        let right = agree && oq == if encrypt { 8 } else { 9 };
        if self.config & if encrypt { 1 } else { 2 } == 0 {
            // Frames for a stopped engine disappear.
            return;
        }
        self.jobs += 1;
        if self.knobs.hangs(self.jobs) {
            return;
        }
        let outcome = self.work(if right { slot } else { u8::MAX }, encrypt, packet);
        self.conclude(instance, slot, user, encrypt, packet, outcome);
    }

    fn work(&mut self, slot: u8, encrypt: bool, packet: &[u8]) -> Result<Vec<u8>, Fault> {
        let entry = self.slots.get_mut(usize::from(slot));
        let entry = entry.and_then(Option::as_mut).ok_or(Fault::Slot)?;
        if entry.is_outbound() != encrypt {
            return Err(Fault::Slot);
        }
        if !encrypt {
            return entry.decrypt(packet);
        }
        let random = [self.knobs.random(), self.knobs.random()];
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&random[0].to_ne_bytes());
        iv[8..].copy_from_slice(&random[1].to_ne_bytes());
        let extra = match self.switches.extra_padding {
            0 => 0,
            most => usize::try_from(self.knobs.random() % (u64::from(most) + 1)).unwrap_or(0),
        };
        entry.encrypt(packet, iv, extra, &self.switches)
    }

    /// Queues the result, as far as misbehaviour lets it.
    fn conclude(
        &mut self,
        instance: usize,
        slot: u8,
        user: u8,
        encrypt: bool,
        packet: &[u8],
        outcome: Result<Vec<u8>, Fault>,
    ) {
        let now = Instant::now();
        let busy = self.busy_until.unwrap_or(now);
        let (due, busy) = self.knobs.schedule(now, busy, packet.len());
        self.busy_until = Some(busy);
        let mischief = self.knobs.draw();
        let (mut flags, mut payload) = match outcome {
            Ok(bytes) => (if encrypt { 3 } else { 4 }, bytes),
            Err(fault) => {
                self.note(slot, encrypt, fault);
                let entry = self.slots.get(usize::from(slot)).and_then(Option::as_ref);
                let silent = match entry {
                    Some(e) => e.drops(fault),
                    None => false,
                };
                if silent || fault == Fault::Slot && !self.switches.answer_wrong_slot {
                    return;
                }
                (fault.flags(), packet.to_vec())
            }
        };
        if flags == 3 && user & 0xe0 != 0 && self.switches.tag_breaks_icv {
            flip(&mut payload, u64::MAX);
        }
        if mischief.corrupt {
            flip(&mut payload, self.knobs.random());
        }
        if mischief.spurious {
            flags = 5 + u32::try_from(self.knobs.random() % 3).unwrap_or(0);
        }
        if mischief.lose {
            return;
        }
        let ipv6 = payload.first().is_some_and(|b| b >> 4 == 6);
        let mut bytes = MACS.to_vec();
        bytes.extend(if ipv6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        bytes.extend(payload);
        let make = |due| Answer {
            due,
            instance,
            flags,
            user,
            bytes: bytes.clone(),
        };
        let direction = usize::from(!encrypt);
        if mischief.duplicate {
            self.late.push(make(due));
        }
        let result = make(due + mischief.delay);
        if !mischief.delay.is_zero() {
            self.late.push(result);
        } else if mischief.reorder && self.held[direction].is_none() {
            self.held[direction] = Some(result);
        } else {
            self.queues[direction].push_back(result);
            self.queues[direction].extend(self.held[direction].take());
        }
    }

    /// Interrupt status for a packet that failed.
    fn note(&mut self, slot: u8, encrypt: bool, fault: Fault) {
        let entry = self.slots.get(usize::from(slot)).and_then(Option::as_ref);
        let dropped = entry.is_some_and(|e| e.drops(fault));
        let (bit, bitmap) = match (fault, dropped) {
            (Fault::Limit, _) => (11, Some(3)),
            (Fault::Icv, true) => (13, Some(5)),
            (Fault::Replay, true) => (14, Some(6)),
            (Fault::Padding, true) => (15, Some(7)),
            _ if encrypt => (3, None),
            _ => (6, None),
        };
        self.int_sts |= 1 << bit;
        if let Some(b) = bitmap {
            self.bitmaps[b] |= 1 << (slot & 31);
        }
    }

    /// Writes results whose time has come; the time of the next.
    fn deliver(&mut self, bus: &mut Bus) -> Option<Instant> {
        let now = Instant::now();
        let mut ready = Vec::new();
        for (queue, held) in self.queues.iter_mut().zip(&mut self.held) {
            while queue.front().is_some_and(|r| r.due <= now) {
                ready.extend(queue.pop_front());
            }
            // Nothing came to change places with.
            if queue.is_empty() && held.as_ref().is_some_and(|r| r.due <= now) {
                ready.extend(held.take());
            }
        }
        let (due, late) = std::mem::take(&mut self.late)
            .into_iter()
            .partition(|r| r.due <= now);
        self.late = late;
        ready.extend::<Vec<_>>(due);
        for r in ready {
            let instance = match self.switches.result_instance {
                Some(i) => usize::from(i & 1),
                None => r.instance,
            };
            let msg = [r.flags, 0, u32::from(r.user) << 24];
            let ring = self.switches.result_ring & 31;
            // Lost when the ring is empty: the status tells.
            self.qdma[instance].give(bus, ring, &r.bytes, msg);
        }
        let waiting = self.queues.iter().flatten().chain(&self.late);
        let held = self.held.iter().flatten();
        waiting.chain(held).map(|r| r.due).min()
    }

    fn raise(&self, bus: &mut Bus) {
        for (i, q) in self.qdma.iter().enumerate() {
            for bank in (0..4).filter(|b| q.pending(*b)) {
                bus.interrupt(4 * i + bank);
            }
        }
        if self.int_sts & self.int_en != 0 {
            bus.interrupt(SOE_VECTOR);
        }
    }
}

/// Changes one bit of the last bytes (the ICV) or of any byte.
fn flip(bytes: &mut [u8], random: u64) {
    let n = bytes.len() as u64;
    if let Some(at) = random.checked_rem(n).and_then(|i| usize::try_from(i).ok()) {
        let at = if random == u64::MAX {
            bytes.len() - 1
        } else {
            at
        };
        bytes[at] ^= 1 << (random >> 32 & 7);
    }
}

impl Model for Soe {
    fn name(&self) -> &'static str {
        "soe"
    }

    fn regions(&self) -> Vec<u64> {
        vec![FE_LEN, qdma::LEN as u64, qdma::LEN as u64, SOE_LEN]
    }

    fn interrupts(&self) -> u32 {
        9
    }

    fn read(&mut self, bus: &mut Bus, region: usize, offset: usize, size: usize) -> u64 {
        if size != 4 {
            bus.broke(
                "registers are words of 32 bits",
                format!("read {size} at {offset:#x}"),
            );
            return 0;
        }
        u64::from(match region {
            0 => self.fe.get(offset / 4).copied().unwrap_or(0),
            1 | 2 => self.qdma[region - 1].read(bus, offset),
            _ => self.read_soe(bus, offset),
        })
    }

    fn write(&mut self, bus: &mut Bus, region: usize, offset: usize, size: usize, value: u64) {
        let Some(value) = u32::try_from(value).ok().filter(|_| size == 4) else {
            bus.broke(
                "registers are words of 32 bits",
                format!("write {size} at {offset:#x}"),
            );
            return;
        };
        match region {
            0 => {
                if let Some(w) = self.fe.get_mut(offset / 4) {
                    *w = value;
                }
            }
            1 | 2 => self.qdma[region - 1].write(bus, offset, value),
            _ => self.write_soe(bus, offset, value),
        }
    }

    fn turn(&mut self, bus: &mut Bus) -> Turn {
        let mut worked = false;
        for instance in 0..2 {
            let Some(given) = self.qdma[instance].take(bus) else {
                continue;
            };
            worked = true;
            let [_, msg1, _] = given.msg;
            let (port, hop) = (msg1 >> 20 & 0xf, msg1 >> 13 & 1 == 1);
            if port == 7 && hop {
                self.request(bus, instance, &given);
            } else if hop || port == 7 {
                bus.broke("requests go to port 7 with a hop", format!("{msg1:#x}"));
            } else if self.switches.loopback {
                let source = if port == 1 { 0x10 } else { port };
                let msg = [0, source << 21, 0];
                self.qdma[instance].give(bus, 0, &given.bytes, msg);
            }
            self.qdma[instance].sent(bus, &given, false);
        }
        let next = self.deliver(bus);
        self.raise(bus);
        match (worked, next) {
            (true, _) => Turn::Busy,
            (false, Some(due)) => Turn::At(due),
            (false, None) => Turn::Idle,
        }
    }

    fn reset(&mut self) {
        *self = Soe::new(self.switches.clone(), Arc::clone(&self.knobs));
    }
}
