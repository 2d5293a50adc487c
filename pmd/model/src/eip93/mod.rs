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
mod switches;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crypt::Prng;
use direct::Direct;
use operation::Outcome;
use record::{SA_LEN, SA_WRITTEN, STATE_LEN, Sa, State};
use registers::*;
pub use switches::Switches;

use crate::{Bus, DmaFault, Knobs, Mischief, Model, Turn};

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

struct Completion {
    index: u32,
    due: Instant,
    words: [u32; 8],
    sa: Option<(u64, Sa)>,
    mischief: Mischief,
    torn: bool,
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

    /// Takes the next command and does what it says; its result waits for its time.
    fn fetch(&mut self, bus: &mut Bus, now: Instant) {
        let index = self.fetch;
        let at = u64::from(self.cdr) + 32 * u64::from(index);
        self.fetch = (index + 1) % self.ring_size();
        self.fetched += 1;
        self.jobs += 1;
        let mut command = [0; 8];
        for (i, word) in (0..).zip(&mut command) {
            match bus.read32(at + 4 * i) {
                Ok(value) => *word = value,
                Err(_) => {
                    self.interrupts |= INT_BUS;
                    self.halted = true;
                    return;
                }
            }
        }
        let mischief = self.knobs.draw();
        let mut sa = None;
        let outcome = self
            .execute(bus, &command, &mischief, &mut sa)
            .unwrap_or_else(|DmaFault { .. }| {
                self.interrupts |= INT_BUS;
                Outcome {
                    errors: Code::Bus.bits(),
                    ..Outcome::default()
                }
            });
        if let Some((rule, detail)) = &outcome.broke {
            bus.broke(rule, detail.clone());
        }
        let mut words = command;
        if self.switches.result_without_addresses {
            words[1..5].fill(0);
        }
        let mut errors = outcome.errors;
        if mischief.spurious {
            let some = [
                AUTH_ERR,
                PAD_ERR,
                SEQ_ERR,
                Code::Spi.bits(),
                Code::Length.bits(),
                Code::Processing.bits(),
            ];
            let pick = usize::try_from(self.knobs.random() % 6).unwrap_or(0);
            errors |= some[pick];
        }
        words[0] =
            errors | PE_READY | u32::from(outcome.next_header) << 8 | u32::from(outcome.pad) << 24;
        let counted = outcome.output.len() - outcome.uncounted.min(outcome.output.len());
        words[7] = PE_READY_7 | u32::try_from(counted).unwrap_or(0) & LENGTH;
        if mischief.garble {
            let bit = self.knobs.random();
            let place = usize::try_from(bit >> 8 & 7).unwrap_or(0);
            words[place] ^= 1 << (bit & 31);
        }
        let begin = self.busy_until.unwrap_or(now);
        let bytes = (command[7] & LENGTH) as usize;
        let (due, busy) = self.knobs.schedule(now, begin, bytes);
        self.busy_until = Some(busy);
        self.done.push_back(Completion {
            index,
            due: due + mischief.delay,
            words,
            sa,
            mischief,
            torn: false,
        });
    }

    fn execute(
        &mut self,
        bus: &mut Bus,
        command: &[u32; 8],
        mischief: &Mischief,
        kept: &mut Option<(u64, Sa)>,
    ) -> Result<Outcome, DmaFault> {
        let [control, source, destination, sa_at, state_at, ..] = *command;
        if control & READY != HOST_READY || command[7] & READY_7 != HOST_READY_7 {
            bus.broke(
                "a command is handed over by both its ownership words",
                format!("{control:#x}, {:#x}", command[7]),
            );
            self.interrupts |= INT_RING;
            return Ok(Outcome {
                errors: Code::Ownership.bits(),
                ..Outcome::default()
            });
        }
        if control & (0xff_0000 | 1 << 5) != 0 || command[7] >> 24 != 0 {
            bus.broke(
                "reserved bits of a command are 0",
                format!("{control:#x}, {:#x}", command[7]),
            );
        }
        for (what, address) in [("SA", sa_at), ("state", state_at)] {
            if !address.is_multiple_of(4) {
                bus.broke(
                    "records lie at multiples of 4",
                    format!("{what} {address:#x}"),
                );
            }
        }
        if !self.switches.any_alignment && (source | destination) & 3 != 0 {
            bus.broke(
                "sources and destinations lie at multiples of 4",
                format!("{source:#x}, {destination:#x}"),
            );
        }
        let mut sa = Sa([0; SA_LEN]);
        bus.read(sa_at.into(), &mut sa.0)?;
        let mut state = State([0; STATE_LEN]);
        if state_at != 0 {
            bus.read(state_at.into(), &mut state.0)?;
        }
        let length = (command[7] & LENGTH) as usize;
        let random = control >> 6 & 3 != 0;
        if control >> 6 & 3 == 1 {
            self.watch_seed(bus, &sa);
        }
        let mut input = vec![
            0;
            if random {
                0
            } else {
                operation::input_len(&sa, length)
            }
        ];
        bus.read(source.into(), &mut input)?;
        let before = (sa.clone(), state.clone());
        let mut outcome = operation::run(
            &self.switches,
            control,
            length,
            &input,
            &mut sa,
            (state_at != 0).then_some(&mut state),
            &mut self.prng,
        );
        if let Some(over) = overtakes(source, input.len(), destination, outcome.output.len(), &sa) {
            bus.broke(
                "the output does not run ahead of the input",
                format!("by {over} bytes"),
            );
        }
        if mischief.corrupt && !outcome.output.is_empty() {
            let at = self.knobs.random() % outcome.output.len() as u64;
            let bit = self.knobs.random() & 7;
            outcome.output[usize::try_from(at).unwrap_or(0)] ^= 1 << bit;
        }
        bus.write(destination.into(), &outcome.output)?;
        if sa.0 != before.0.0 {
            bus.write(
                u64::from(sa_at) + SA_WRITTEN.start as u64,
                &sa.0[SA_WRITTEN],
            )?;
        }
        if state.0 != before.1.0 {
            bus.write(state_at.into(), &state.0)?;
        }
        *kept = Some((sa_at.into(), sa));
        Ok(outcome)
    }

    /// Seeds that come again make IVs that come again.
    fn watch_seed(&mut self, bus: &Bus, sa: &Sa) {
        let mut seed = [0; 48];
        seed[..16].copy_from_slice(&sa.0[8..24]);
        seed[16..32].copy_from_slice(&sa.0[0x28..0x38]);
        seed[32..].copy_from_slice(&sa.0[0x48..0x58]);
        let plain = seed.as_chunks::<16>().0.contains(&[0; 16]);
        if plain || self.seeds.contains(&seed) {
            bus.broke("the PRNG is loaded with fresh entropy", "");
        }
        self.seeds.push(seed);
    }

    /// Shows the result of the first completion to the driver.
    fn deliver(&mut self, bus: &mut Bus, now: Instant) {
        let Some(mut c) = self.done.pop_front() else {
            return;
        };
        if let Some((at, sa)) = c.sa.take() {
            let mut again = Sa([0; SA_LEN]);
            let same = bus.read(at, &mut again.0).is_ok() && again.same_but_written(&sa);
            if !same {
                bus.broke(
                    "an SA record is not edited in flight",
                    format!("at {at:#x}"),
                );
            }
        }
        if c.mischief.tear && !c.torn {
            // Everything but word 0 first; that and the counter later.
            self.write_result(bus, &c, false);
            c.torn = true;
            c.due = now + Duration::from_micros(50);
            self.done.push_front(c);
            return;
        }
        if c.mischief.reorder
            && let Some(next) = self.done.front_mut()
        {
            std::mem::swap(&mut c.words, &mut next.words);
        }
        let mut written = true;
        if !c.mischief.lose {
            written = self.write_result(bus, &c, true);
        }
        self.finish(bus, &c);
        if c.mischief.duplicate && self.results < self.ring_size() {
            written &= self.write_result(bus, &c, true);
            self.write = (self.write + 1) % self.ring_size();
            self.results += 1;
        }
        if !written {
            self.interrupts |= INT_BUS;
            self.halted = true;
        }
        self.raise(bus);
    }

    fn finish(&mut self, bus: &mut Bus, c: &Completion) {
        self.write = (self.write + 1) % self.ring_size();
        self.results += 1;
        self.fetched -= 1;
        self.commands -= 1;
        if self.config & CDR_UPDATE != 0 {
            let at = u64::from(self.cdr) + 32 * u64::from(c.index);
            let given = bus.read32(at).unwrap_or(0);
            let back = given & !READY | PE_READY;
            if bus.write32(at, back).is_err() {
                self.interrupts |= INT_BUS;
            }
        }
    }

    fn write_result(&self, bus: &mut Bus, c: &Completion, whole: bool) -> bool {
        let at = u64::from(self.rdr) + 32 * u64::from(self.write);
        let mut order: [usize; 8] = [1, 2, 3, 4, 5, 6, 7, 0];
        let order = if whole {
            &mut order[..]
        } else {
            &mut order[..7]
        };
        order
            .iter()
            .all(|&i| bus.write32(at + 4 * i as u64, c.words[i]).is_ok())
    }
}

/// How many bytes the output runs ahead of the input that it is made from; `None` when it does not, or where they do not meet.
fn overtakes(source: u32, input: usize, destination: u32, output: usize, sa: &Sa) -> Option<u64> {
    let (source, destination) = (u64::from(source), u64::from(destination));
    let meet = source < destination + output as u64 && destination < source + input as u64;
    // ESP outbound puts header and IV in front of what it makes of the first byte.
    let ahead = if sa.group() == 1 && !sa.inbound() {
        8 + match sa.cipher() {
            Ok((record::Cipher::AesCbc, _)) => 16,
            Ok((record::Cipher::AesCtr, _)) => 8,
            _ => 0,
        }
    } else {
        0
    };
    (destination + ahead)
        .checked_sub(source)
        .filter(|&n| meet && n > 0)
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
