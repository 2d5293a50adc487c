//! Ring mode: commands are fetched and carried out, results written in their order when their time has come.

use std::time::{Duration, Instant};

use super::Eip93;
use super::operation::{self, Outcome};
use super::record::{self, SA_LEN, SA_WRITTEN, STATE_LEN, Sa, State};
use super::registers::*;
use crate::{Bus, DmaFault, Mischief};

pub(super) struct Completion {
    pub(super) index: u32,
    pub(super) due: Instant,
    pub(super) words: [u32; 8],
    pub(super) sa: Option<(u64, Sa)>,
    pub(super) mischief: Mischief,
    pub(super) torn: bool,
}

impl Eip93 {
    /// Takes the next command and does what it says; its result waits for its time.
    pub(super) fn fetch(&mut self, bus: &mut Bus, now: Instant) {
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
    pub(super) fn deliver(&mut self, bus: &mut Bus, now: Instant) {
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
