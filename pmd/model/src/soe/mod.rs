//! The EN7581's secure offload engine with the QDMA instances that lead to it, as its reference describes them.
//!
//! ```text
//!   CPU index ─▶ descriptors ─▶ hop descriptor, dummy header ─▶ slot ─▶ queue 8 or 9 ─▶ wait ─▶ receive ring
//! ```
//!
//! Regions: 0 the packet switch, 1 and 2 QDMA, 3 the engine. One frame a turn. Results of a direction come in order. The block's
//! MACs lead to [`Wire`]s; the packet switch keeps frames of a wire back while its receive ring has no descriptor.

mod answer;
mod crypt;
mod esp;
mod qdma;
mod request;
mod switches;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use answer::Answer;
use esp::{CMD_UNTRIED, Entry, WORDS};
use qdma::Qdma;
pub use switches::Switches;
pub use wire::{Line, Tap, Wire};

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

const MACS: [u8; 12] = [
    0x00, 0x0c, 0xe7, 0x20, 0x21, 0x12, 0x00, 0x0c, 0xe7, 0x20, 0x22, 0x62,
];
const SLOTS: u8 = 32;
/// Ports of the packet switch that lead to the MACs, and the first number by which received frames name each.
const MACS_AT: [(u32, u32); GDMS] = [(1, 0x10), (2, 2), (3, 3), (9, 4)];
const GDMS: usize = 4;
/// Receive ring of their frames.
const FRAMES: u8 = 0;

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
    /// Behind the MACs.
    wires: [Option<Box<dyn Wire>>; GDMS],
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
            wires: [const { None }; GDMS],
        }
    }

    /// Plugs a wire into a MAC, 1 to 4; whatever was there comes out. False when there is no such MAC.
    pub fn plug(&mut self, gdm: u8, wire: Box<dyn Wire>) -> bool {
        let place = usize::from(gdm).checked_sub(1);
        match place.and_then(|i| self.wires.get_mut(i)) {
            Some(place) => {
                *place = Some(wire);
                true
            }
            None => false,
        }
    }

    /// Which instance a MAC's frames arrive on.
    fn instance_of(&self, gdm: usize) -> usize {
        let usual = usize::from(gdm != 0);
        let chosen = self.switches.frame_instance.map(|i| usize::from(i & 1));
        chosen.unwrap_or(usual)
    }

    /// A frame for a port of the packet switch.
    fn forward(&mut self, bus: &mut Bus, instance: usize, port: u32, bytes: &[u8]) {
        let Some(gdm) = MACS_AT.iter().position(|(p, _)| *p == port) else {
            bus.broke("frames go to a port that exists", format!("{port}"));
            return;
        };
        if let Some(wire) = &mut self.wires[gdm] {
            wire.send(bytes);
        } else if self.switches.loopback {
            let msg = [0, MACS_AT[gdm].1 << 21, 0];
            self.qdma[instance].give(bus, FRAMES, bytes, msg);
        }
    }

    /// A frame of each wire, as far as there is room.
    fn arrivals(&mut self, bus: &mut Bus) -> bool {
        let mut any = false;
        for (gdm, (_, source)) in MACS_AT.into_iter().enumerate() {
            let instance = self.instance_of(gdm);
            if !self.qdma[instance].has_room(FRAMES) {
                continue;
            }
            if let Some(frame) = self.wires[gdm].as_mut().and_then(|w| w.receive()) {
                any = true;
                self.qdma[instance].give(bus, FRAMES, &frame, [0, source << 21, 0]);
            }
        }
        any
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
            } else {
                self.forward(bus, instance, port, &given.bytes);
            }
            self.qdma[instance].sent(bus, &given, false);
        }
        worked |= self.arrivals(bus);
        let next = self.deliver(bus);
        self.raise(bus);
        match (worked, next) {
            (true, _) => Turn::Busy,
            (false, Some(due)) => Turn::At(due),
            (false, None) => Turn::Idle,
        }
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        let wires = self.wires.iter().enumerate();
        let open = wires.filter(|(gdm, _)| self.qdma[self.instance_of(*gdm)].has_room(FRAMES));
        open.filter_map(|(_, wire)| Some(wire.as_ref()?.fd()))
            .collect()
    }

    fn reset(&mut self) {
        let wires = std::mem::take(&mut self.wires);
        *self = Soe::new(self.switches.clone(), Arc::clone(&self.knobs));
        self.wires = wires;
    }
}
