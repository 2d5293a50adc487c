//! The EIP-93, ring and direct host mode, as its reference describes it.
//!
//! ```text
//!   doorbell ─▶ fetch ─▶ operation ─▶ data, SA, state ─▶ wait (latency, rate) ─▶ result ─▶ counters
//! ```
//!
//! One descriptor a turn. Results come in the order of their commands and have the same index.

mod crypt;
mod direct;
mod operation;
mod record;
mod registers;
mod ring;
mod switches;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crypt::Prng;
use direct::Direct;
use registers::*;
use ring::Completion;
pub use switches::Switches;

use crate::{Bus, Knobs, Model, Turn};

/// A rule that several places watch.
const WORDS: &str = "registers are words of 32 bits";

/// The engine.
pub struct Eip93 {
    switches: Switches,
    knobs: Arc<Knobs>,
    config: u32,
    cdr: u32,
    rdr: u32,
    ring_config: u32,
    /// Registers that only keep what is written.
    kept: [(usize, u32); 4],
    clock: u32,
    ring_stat: u32,
    interrupts: u32,
    enabled: u32,
    commands: u32,
    results: u32,
    /// Index of the next command to fetch, and how many are fetched without a result.
    fetch: u32,
    fetched: u32,
    /// Index of the next result to write.
    write: u32,
    done: VecDeque<Completion>,
    jobs: u64,
    busy_until: Option<Instant>,
    halted: bool,
    prng: Prng,
    seeds: Vec<[u8; 48]>,
    direct: Direct,
}

impl Eip93 {
    /// An engine after power-on.
    pub fn new(switches: Switches, knobs: Arc<Knobs>) -> Eip93 {
        Eip93 {
            switches,
            knobs,
            config: RESET_ENGINE | RESET_RINGS,
            cdr: 0,
            rdr: 0,
            ring_config: 0,
            kept: [
                (RING_THRESH, 0),
                (BUF_THRESH, 0),
                (DMA_CONFIG, 0),
                (INT_CONFIG, 0),
            ],
            clock: 0,
            ring_stat: 0,
            interrupts: 0,
            enabled: 0,
            commands: 0,
            results: 0,
            fetch: 0,
            fetched: 0,
            write: 0,
            done: VecDeque::new(),
            jobs: 0,
            busy_until: None,
            halted: false,
            prng: Prng::default(),
            seeds: Vec::new(),
            direct: Direct::default(),
        }
    }

    fn ring_size(&self) -> u32 {
        (self.ring_config & RING_SIZE) + 1
    }

    fn mode(&self) -> u32 {
        self.config & MODE
    }

    /// Whether descriptors are worked on.
    fn runs(&self) -> bool {
        self.mode() == MODE_RING
            && self.config & (RESET_ENGINE | RESET_RINGS) == 0
            && self.cdr != 0
            && self.rdr != 0
            && self.ring_config & RING_SIZE != 0
            && self.clock & CLOCK_ENGINE != 0
            && !self.halted
            && !self.knobs.hangs(self.jobs)
    }

    fn configure(&mut self, bus: &Bus, value: u32) {
        if value & SWAPS != 0 {
            bus.broke("the swap bits stay 0", format!("CONFIG {value:#x}"));
        }
        self.config = value;
        if value & RESET_RINGS != 0 {
            self.commands = 0;
            self.results = 0;
            self.fetch = 0;
            self.write = 0;
            self.ring_stat = 0;
        }
        if value & RESET_ENGINE != 0 {
            self.commands = self.commands.saturating_sub(self.fetched);
            self.jobs = 0;
            self.busy_until = None;
            self.halted = false;
            self.prng = Prng::default();
            self.direct = Direct::default();
        }
        if value & (RESET_ENGINE | RESET_RINGS) != 0 {
            self.done.clear();
            self.fetched = 0;
        }
    }

    fn add_commands(&mut self, bus: &Bus, value: u32) {
        let n = value & DOORBELL;
        if n == 0 || value > DOORBELL {
            bus.broke("a doorbell adds 1 to 255", format!("CD_COUNT {value}"));
        }
        if self.commands + n > self.ring_size() {
            bus.broke(
                "no more commands than the ring holds",
                format!("{} + {n}", self.commands),
            );
            self.ring_stat |= CDR_OVERFLOW;
            self.interrupts |= INT_RING;
            return;
        }
        self.commands += n;
    }

    fn release_results(&mut self, bus: &Bus, value: u32) {
        let n = value & DOORBELL;
        if n == 0 || value > DOORBELL {
            bus.broke("a doorbell takes 1 to 255", format!("RD_COUNT {value}"));
        }
        if n > self.results {
            bus.broke(
                "no more results are released than there are",
                format!("{n} of {}", self.results),
            );
            self.ring_stat |= RDR_UNDERFLOW;
            self.interrupts |= INT_RING;
            return;
        }
        self.results -= n;
    }

    fn raw_interrupts(&self) -> u32 {
        let rdr = if self.results > self.kept[0].1 >> 16 & RING_SIZE {
            INT_RDR
        } else {
            0
        };
        self.interrupts | rdr | self.direct.interrupts()
    }

    fn raise(&self, bus: &mut Bus) {
        if self.raw_interrupts() & self.enabled & INT_ALL != 0 {
            bus.interrupt(0);
        }
    }
}

impl Model for Eip93 {
    fn name(&self) -> &'static str {
        "eip93"
    }

    fn regions(&self) -> Vec<u64> {
        vec![WINDOW as u64]
    }

    fn read(&mut self, bus: &mut Bus, _: usize, offset: usize, size: usize) -> u64 {
        if size != 4 {
            bus.broke(WORDS, format!("{size} bytes read at {offset:#x}"));
            return u64::MAX;
        }
        let value = match offset {
            0..=DESCRIPTOR_END => self.direct.descriptor(offset / 4),
            CDR_BASE => self.cdr,
            RDR_BASE => self.rdr,
            RING_CONFIG => self.ring_config,
            CD_COUNT => self.commands,
            RD_COUNT => self.results,
            RING_POINTERS => self.fetch | self.write << 16,
            RING_STAT => self.ring_stat,
            CONFIG => self.config,
            STATUS => self.direct.status(),
            INBUF => 0,
            OUTBUF => self.direct.output_count(),
            BUF_POINTERS => self.direct.pointers(),
            // Identity: byte i comes from lane i.
            ENDIAN => 0x00e4_00e4,
            CLOCK => self.clock,
            OPTION_1 => self.switches.options,
            OPTION_0 => 0,
            REVISION => self.switches.revision,
            INT_RAW => self.raw_interrupts(),
            INT_MASKED => self.raw_interrupts() & self.enabled,
            INT_ENABLE => self.enabled,
            SA_WINDOW..=SA_READY => self.direct.sa_word(offset - SA_WINDOW),
            STATE_WINDOW..STATE_WINDOW_END => self.direct.state_word(offset - STATE_WINDOW),
            DATA..DATA_END => self.direct.read(offset - DATA),
            _ => {
                let kept = self.kept.iter().find(|(at, _)| *at == offset);
                if kept.is_none() {
                    bus.broke("a register that exists", format!("read at {offset:#x}"));
                }
                kept.map_or(0, |(_, value)| *value)
            }
        };
        value.into()
    }

    fn write(&mut self, bus: &mut Bus, _: usize, offset: usize, size: usize, value: u64) {
        let (4, Ok(value)) = (size, u32::try_from(value)) else {
            bus.broke(WORDS, format!("{size} bytes written at {offset:#x}"));
            return;
        };
        let direct = self.mode() == MODE_DIRECT;
        match offset {
            CDR_BASE | RDR_BASE | RING_CONFIG if self.runs() && self.commands != 0 => {
                bus.broke(
                    "rings are not changed while commands are in them",
                    format!("write at {offset:#x}"),
                );
            }
            CDR_BASE | RDR_BASE if !value.is_multiple_of(4) => {
                bus.broke("rings lie at multiples of 4", format!("{value:#x}"));
            }
            CDR_BASE => self.cdr = value,
            RDR_BASE => self.rdr = value,
            RING_CONFIG => self.ring_config = value,
            CD_COUNT if direct => self.direct.start(),
            CD_COUNT => self.add_commands(bus, value),
            RD_COUNT => self.release_results(bus, value),
            CONFIG => self.configure(bus, value),
            CLOCK => self.clock = value,
            INT_MASKED => self.interrupts &= !value,
            INT_ENABLE => self.enabled = value & INT_ALL,
            INT_SET => self.enabled |= value & INT_ALL,
            INT_UNSET => self.enabled &= !value,
            0..=DESCRIPTOR_END if direct => self.direct.set_descriptor(offset / 4, value),
            SA_WINDOW..=SA_READY if direct => self.direct.set_sa(offset - SA_WINDOW, value),
            STATE_WINDOW..STATE_WINDOW_END if direct => {
                self.direct.set_state(offset - STATE_WINDOW, value);
            }
            DATA..DATA_END if direct => self.direct.write(offset - DATA, value),
            INBUF if direct => self.direct.feed(value),
            OUTBUF if direct => self.direct.release(value),
            _ => match self.kept.iter_mut().find(|(at, _)| *at == offset) {
                Some((_, kept)) => *kept = value,
                None => bus.broke(
                    "a register that can be written in this mode",
                    format!("write at {offset:#x}"),
                ),
            },
        }
        self.raise(bus);
    }

    fn turn(&mut self, bus: &mut Bus) -> Turn {
        let reset = self.config & (RESET_ENGINE | RESET_RINGS) != 0;
        if self.mode() == MODE_DIRECT && !reset && self.clock & CLOCK_ENGINE != 0 {
            let broke = self.direct.work(&self.switches, &mut self.prng);
            if let Some((rule, detail)) = broke {
                bus.broke(rule, detail);
            }
            return Turn::Idle;
        }
        if !self.runs() {
            return Turn::Idle;
        }
        let now = Instant::now();
        let due = self.done.front().map(|c| c.due);
        // One that changes places needs another.
        let lonely = self.done.len() == 1 && self.done[0].mischief.reorder;
        if lonely && self.fetched < self.commands {
            self.fetch(bus, now);
            return Turn::Busy;
        }
        if due.is_some_and(|due| due <= now) && self.results < self.ring_size() {
            self.deliver(bus, now);
            return Turn::Busy;
        }
        if self.fetched < self.commands {
            self.fetch(bus, now);
            return Turn::Busy;
        }
        match due {
            Some(due) if due > now => Turn::At(due),
            // The result ring is full, or there is nothing to do.
            _ => Turn::Idle,
        }
    }

    fn reset(&mut self) {
        let (switches, knobs) = (self.switches.clone(), Arc::clone(&self.knobs));
        let seeds = std::mem::take(&mut self.seeds);
        *self = Eip93::new(switches, knobs);
        self.seeds = seeds;
    }
}
