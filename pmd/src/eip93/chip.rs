//! Identity, bring-up, reset, and direct host mode.

use std::time::{Duration, Instant};

use super::Eip93Error;
use super::regs::*;
use super::ring::Rings;
use super::unknown::Unknowns;
use crate::device::Mmio;

/// How long the engine stays in reset.
const IN_RESET: Duration = Duration::from_micros(20);
/// How long a direct operation may take.
const PATIENCE: Duration = Duration::from_millis(200);
/// Bytes of the buffers of direct host mode, and how much is written at once.
const BUFFER: usize = 256;
const CHUNK: usize = 128;

/// The engine's registers.
pub(super) struct Chip {
    pub(super) regs: Mmio,
    /// OPTION_1: what it can do.
    pub(super) options: u32,
    /// REVISION.
    pub(super) revision: u32,
}

impl Chip {
    /// Looks whether this is the engine.
    pub(super) fn identify(regs: Mmio) -> Result<Chip, Eip93Error> {
        if regs.len() < WINDOW {
            return Err(Eip93Error::Window(regs.len()));
        }
        let revision = regs.read32(REVISION);
        if revision & 0xffff != IDENTITY {
            return Err(Eip93Error::NotThis(revision));
        }
        Ok(Chip {
            options: regs.read32(OPTION_1),
            revision,
            regs,
        })
    }

    /// Stops everything: no transfer of the engine is on its way afterwards. The engine stays in reset.
    pub(super) fn stop(&self) -> Result<(), Eip93Error> {
        let r = &self.regs;
        r.write32(MASK_DISABLE, u32::MAX);
        r.write32(INT_CLR, u32::MAX);
        let reset = RST_PE | RST_RING | MODE_RING | EN_CDR_UPDATE;
        r.write32(CONFIG, reset);
        wait(IN_RESET);
        // All ones, or anything else: the engine is gone, or is not in reset, and may still write.
        if r.read32(CONFIG) != reset || r.read32(CD_COUNT) & COUNT != 0 {
            return Err(Eip93Error::NoReset);
        }
        Ok(())
    }

    /// Whether it answers.
    pub(super) fn is_present(&self) -> bool {
        self.regs.read32(REVISION) & 0xffff == IDENTITY
    }

    /// From reset to running rings, in the order of the record's section 5.1.
    pub(super) fn start(
        &self,
        rings: &mut Rings,
        size: u32,
        unknowns: &Unknowns,
    ) -> Result<(), Eip93Error> {
        let r = &self.regs;
        self.stop()?;
        r.write32(CONFIG, MODE_RING | EN_CDR_UPDATE);
        r.write32(INT_CFG, 0);
        r.write32(CLOCK_CTRL, CLOCKS);
        r.write32(BUF_THRESH, THRESHOLDS);
        let pointers = r.read32(RING_POINTERS);
        let (command, result) = (pointers & 0x3ff, pointers >> 16 & 0x3ff);
        if command != result || (command != 0 && !unknowns.pointers_survive) {
            return Err(Eip93Error::Pointers(pointers));
        }
        rings.clear(command);
        let (cdr, rdr) = rings.bases();
        let below = |address: u64| u32::try_from(address).map_err(|_| Eip93Error::Address(address));
        r.write32(CDR_BASE, below(cdr)?);
        r.write32(RDR_BASE, below(rdr)?);
        r.write32(
            RING_CONFIG,
            (size - 1) | (unknowns.ring_offset & 0xff) << 16,
        );
        // No interrupts: results are polled for.
        r.write32(RING_THRESH, 0);
        if r.read32(RING_STAT) != 0 || r.read32(RD_COUNT) & COUNT != 0 {
            return Err(Eip93Error::NoReset);
        }
        Ok(())
    }

    /// One operation through the register window, without any memory. For bring-up: it tells a broken engine from a broken
    /// way to memory. The engine is in reset before and afterwards.
    pub(super) fn direct(
        &self,
        sa: impl Iterator<Item = u32>,
        iv: [u8; 16],
        control: u32,
        input: &[u8],
        length: usize,
    ) -> Result<Direct, Eip93Error> {
        let r = &self.regs;
        self.stop()?;
        r.write32(CONFIG, RST_PE | RST_RING | MODE_DIRECT);
        wait(IN_RESET);
        r.write32(CONFIG, MODE_DIRECT);
        r.write32(CLOCK_CTRL, CLOCKS);
        r.write32(BUF_THRESH, THRESHOLDS);
        // The last word of the SA's window says that all is there.
        for (i, w) in sa.enumerate().take((SA_READY - SA_WINDOW) / 4) {
            r.write32(SA_WINDOW + 4 * i, w);
        }
        for (i, w) in iv.as_chunks::<4>().0.iter().enumerate() {
            r.write32(STATE_WINDOW + 4 * i, u32::from_le_bytes(*w));
        }
        let words = u32::try_from(length).map_err(|_| Eip93Error::Direct("length"))?;
        r.write32(CTRL_STAT, control | 1);
        r.write32(LENGTH, 1 << 22 | words);
        r.write32(CD_COUNT, 1);
        r.write32(SA_READY, 1);
        let begin = Instant::now();
        let mut left = input;
        let mut output = Vec::new();
        loop {
            if !left.is_empty() && r.read32(INBUF_COUNT) == 0 {
                left = self.feed(left);
            }
            self.fetch(&mut output);
            let done = r.read32(STATUS) & OPERATION_DONE != 0 && r.read32(CTRL_STAT) & 3 == 2;
            if done && r.read32(OUTBUF_COUNT) == 0 {
                break;
            }
            if begin.elapsed() > PATIENCE || output.len() > 4 * (input.len() + BUFFER) {
                // Whatever it does: it must not do it in ring mode.
                self.stop()?;
                return Err(Eip93Error::Direct("no end of the operation"));
            }
        }
        let (status, length) = (r.read32(CTRL_STAT), r.read32(LENGTH) & 0xf_ffff);
        self.stop()?;
        output.truncate(length as usize);
        Ok(Direct { status, output })
    }

    /// Writes as much as the engine takes at once; the rest.
    fn feed<'a>(&self, input: &'a [u8]) -> &'a [u8] {
        let r = &self.regs;
        let (now, rest) = input.split_at(input.len().min(CHUNK));
        let start = (r.read32(BUF_POINTERS) & 0xff) as usize;
        for (i, part) in now.chunks(4).enumerate() {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            let at = ((start + 4 * i) % BUFFER) & !3;
            r.write32(DATA + at, u32::from_le_bytes(word));
        }
        let n = now.len().next_multiple_of(4);
        r.write32(INBUF_COUNT, u32::try_from(n).unwrap_or(0));
        rest
    }

    /// Reads what is there.
    fn fetch(&self, output: &mut Vec<u8>) {
        let r = &self.regs;
        let n = (r.read32(OUTBUF_COUNT) as usize & 0x1ff).min(BUFFER);
        if n == 0 {
            return;
        }
        let start = (r.read32(BUF_POINTERS) >> 16 & 0xff) as usize;
        let whole = n.next_multiple_of(4);
        for i in 0..whole / 4 {
            let at = ((start + 4 * i) % BUFFER) & !3;
            output.extend(r.read32(DATA + at).to_le_bytes());
        }
        output.truncate(output.len() - (whole - n));
        r.write32(OUTBUF_COUNT, u32::try_from(n).unwrap_or(0));
    }
}

/// What a direct operation gave.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) status: u32,
    pub(super) output: Vec<u8>,
}

fn wait(time: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        std::hint::spin_loop();
    }
}
