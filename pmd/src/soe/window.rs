//! The engine's register window: on and off, interrupt status, and the staging window through which SAs are written.

use std::time::{Duration, Instant};

use crate::device::{DeviceError, Mmio};

/// Bytes of the window that are used.
pub(crate) const WINDOW: usize = 0x268;
const GLB_CFG: usize = 0x000;
const INT_EN: usize = 0x020;
const INT_STS: usize = 0x024;
const CNT_CLR: usize = 0x04c;
const SA_CTRL: usize = 0x100;
const SA_DONE: usize = 0x104;
const STAGING: usize = 0x110;

/// Both directions on.
const ENABLE: u32 = 3;
const INT_ALL: u32 = 0xffff;
/// Bits of one word for each SA, write one to clear.
const BITMAPS: [usize; 8] = [0x030, 0x038, 0x040, 0x0b0, 0x0b8, 0x0c0, 0x0c8, 0x0d0];
const SEQ_HARD_STS: usize = 0x0b0;
const INT_SEQ_HARD: u32 = 1 << 11;

/// As the public driver waits for a commit.
const COMMIT_PATIENCE: Duration = Duration::from_millis(1);
/// Reads of the status, at least: a socket to a model may take longer than the patience.
const COMMIT_READS: u32 = 1000;

/// Words of the staging window.
pub(super) const RECORD: usize = 47;
/// Words that hold keys: the cipher's, then the authentication key or salt.
const KEYS: std::ops::Range<usize> = 5..21;
/// Threshold of the upper part of the byte counter, which means "none" when all ones, also in an invalid entry.
const BCNT_THSHD_80: usize = (0x1b0 - STAGING) / 4;

/// The window, used by one thread.
#[derive(Debug)]
pub(super) struct Window {
    regs: Mmio,
    scrub: bool,
}

impl Window {
    pub(super) fn new(regs: Mmio, scrub: bool) -> Result<Window, DeviceError> {
        if regs.len() < WINDOW {
            return Err(DeviceError::Window {
                offset: 0,
                len: WINDOW,
                size: regs.len(),
            });
        }
        Ok(Window { regs, scrub })
    }

    /// Whether it answers.
    pub(super) fn is_present(&self) -> bool {
        self.regs.read32(GLB_CFG) != u32::MAX
    }

    /// Brings the engine from whatever a boot loader or an earlier owner left to "on, no SAs".
    pub(super) fn start(&self, slots: u8) -> Result<(), DeviceError> {
        self.stop()?;
        for at in BITMAPS {
            self.regs.write32(at, u32::MAX);
        }
        for slot in 0..slots {
            self.invalidate(slot)?;
        }
        self.regs.write32(CNT_CLR, 1);
        self.configure(ENABLE)
    }

    /// Both directions off, no interrupts.
    pub(super) fn stop(&self) -> Result<(), DeviceError> {
        self.regs.write32(INT_EN, 0);
        self.configure(0)?;
        self.regs.write32(INT_STS, INT_ALL);
        Ok(())
    }

    /// Writes an SA.
    pub(super) fn install(&self, slot: u8, record: &[u32; RECORD]) -> Result<(), DeviceError> {
        let done = self.commit(slot, record);
        if self.scrub {
            for word in KEYS {
                self.regs.write32(STAGING + 4 * word, 0);
            }
        }
        done
    }

    /// Writes an SA that carries nothing, all but one register zero. Tried twice.
    pub(super) fn invalidate(&self, slot: u8) -> Result<(), DeviceError> {
        let mut nothing = [0; RECORD];
        nothing[BCNT_THSHD_80] = u32::MAX;
        self.commit(slot, &nothing)
            .or_else(|_| self.commit(slot, &nothing))
    }

    /// SAs, by bit, that have reached the hard limit of sequence numbers; `None` when the engine is gone.
    pub(super) fn hard_limits(&self) -> Option<u32> {
        let status = self.regs.read32(INT_STS);
        if status == u32::MAX {
            return None;
        }
        self.regs.write32(INT_STS, status & INT_ALL);
        if status & INT_SEQ_HARD == 0 {
            return Some(0);
        }
        let which = self.regs.read32(SEQ_HARD_STS);
        self.regs.write32(SEQ_HARD_STS, which);
        Some(which)
    }

    fn commit(&self, slot: u8, record: &[u32; RECORD]) -> Result<(), DeviceError> {
        for at in BITMAPS {
            self.regs.write32(at, 1 << (slot & 31));
        }
        for (i, word) in record.iter().enumerate() {
            self.regs.write32(STAGING + 4 * i, *word);
        }
        self.regs.write32(SA_DONE, 1);
        self.regs.write32(SA_CTRL, u32::from(slot & 31) << 8 | 1);
        let done = self.wait_done();
        self.regs.write32(SA_CTRL, 0);
        self.regs.write32(SA_DONE, 1);
        if done {
            Ok(())
        } else {
            Err(DeviceError::Timeout("commit of an SA"))
        }
    }

    fn wait_done(&self) -> bool {
        let begin = Instant::now();
        let mut reads = 0;
        loop {
            match self.regs.read32(SA_DONE) {
                u32::MAX => return false,
                v if v & 1 == 1 => return true,
                _ => {}
            }
            reads += 1;
            if reads >= COMMIT_READS && begin.elapsed() > COMMIT_PATIENCE {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn configure(&self, value: u32) -> Result<(), DeviceError> {
        self.regs.write32(GLB_CFG, value);
        match self.regs.read32(GLB_CFG) {
            u32::MAX => Err(DeviceError::Gone),
            v if v & ENABLE == value => Ok(()),
            v => Err(DeviceError::Broken(format!(
                "the engine's configuration reads {v:#x}, {value:#x} was written"
            ))),
        }
    }
}
