//! Interrupt status. The driver polls: all enables stay off, and the status words are looked at now and then for what the
//! rings do not tell: broken descriptors, rings without buffers.

use super::regs::{BANKS, INT_STATUS, int_enable};
use crate::device::Mmio;

/// What the status words said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Events {
    /// Transmit rings, by bit, whose descriptors the device could not make sense of.
    pub tx_broken: u32,
    /// Receive rings likewise.
    pub rx_broken: u32,
    /// Receive rings that had no buffer for a frame.
    pub rx_starved: u32,
    /// A queue of transmit reports was full.
    pub reports_full: bool,
    /// Buffers for forwarding without the CPU ran low or out.
    pub forward_low: bool,
}

impl Events {
    /// Whether the device must be started anew.
    pub fn is_fatal(self) -> bool {
        self.tx_broken | self.rx_broken != 0
    }

    fn of(words: [u32; 5]) -> Events {
        let [a, b, c, d, e] = words;
        Events {
            tx_broken: a >> 8 & 0xff | e & 0xffff_ff00,
            rx_broken: a >> 16 | d & 0xffff_0000,
            rx_starved: b >> 16 | c & 0xffff_0000,
            reports_full: a & (1 << 1 | 1 << 5) != 0,
            forward_low: a & (1 << 2 | 1 << 3) != 0,
        }
    }
}

/// Switches all interrupts of all banks off and clears what was pending.
pub(super) fn silence(regs: &Mmio) {
    for bank in 0..BANKS {
        for word in 0..INT_STATUS.len() {
            regs.write32(int_enable(bank, word), 0);
        }
    }
    for status in INT_STATUS {
        regs.write32(status, u32::MAX);
    }
}

/// Lets the "frame received" interrupts of `rings` (by bit) of one bank through; 0 none.
pub(super) fn enable_rx(regs: &Mmio, bank: usize, rings: u32) {
    regs.write32(int_enable(bank, 1), rings & 0xffff);
    regs.write32(int_enable(bank, 2), rings >> 16);
}

/// Reads and clears. All ones in every word is a device that is gone: `None`.
pub(super) fn take(regs: &Mmio) -> Option<Events> {
    let words = INT_STATUS.map(|at| regs.read32(at));
    if words == [u32::MAX; 5] {
        return None;
    }
    for (at, word) in INT_STATUS.iter().zip(words) {
        if word != 0 {
            regs.write32(*at, word);
        }
    }
    Some(Events::of(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_sorted_by_ring() {
        let e = Events::of([1 << 16 | 1 << 8 | 1 << 1, 1 << 17, 1 << 16, 1 << 31, 1 << 8]);
        assert_eq!(e.tx_broken, 1 | 1 << 8);
        assert_eq!(e.rx_broken, 1 | 1 << 31);
        assert_eq!(e.rx_starved, 1 << 1 | 1 << 16);
        assert!(e.reports_full && e.is_fatal() && !e.forward_low);
        assert_eq!(Events::of([0; 5]), Events::default());
    }

    #[test]
    fn a_device_that_is_gone_tells_nothing() {
        let gone = Mmio::memory(0);
        assert_eq!(take(&gone), None);
    }
}
