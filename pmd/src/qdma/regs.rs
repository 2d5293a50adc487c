//! Registers of one QDMA instance, by offset, and their bits. Names as in the public Ethernet driver.

/// DMA enables, busy bits, formats.
pub(crate) const GLOBAL_CFG: usize = 0x0004;
pub(crate) const FWD_DSCP_BASE: usize = 0x0010;
pub(crate) const FWD_BUF_BASE: usize = 0x0014;
pub(crate) const HW_FWD_DSCP_CFG: usize = 0x0018;
/// Base, configuration, clear and status of the two queues of transmit completions.
pub(crate) const TX_IRQ: [TxIrqRegs; 2] = [
    TxIrqRegs {
        base: 0x0050,
        cfg: 0x0054,
        clear: 0x0058,
        status: 0x005c,
    },
    TxIrqRegs {
        base: 0x0048,
        cfg: 0x004c,
        clear: 0x0064,
        status: 0x0068,
    },
];
/// Where packets are dropped on congestion, per queue: bits 31 and 30.
pub(crate) const CONGESTION_DROP: usize = 0x10a0;
pub(crate) const CONGESTION_DROP_EN: u32 = 3 << 30;
pub(crate) const LMGR_INIT_CFG: usize = 0x1000;
pub(crate) const FWD_DSCP_LOW_THR: usize = 0x1004;

/// Bytes of the register window.
pub const WINDOW: usize = 0x2000;

/// Interrupt status words, write one to clear.
pub(crate) const INT_STATUS: [usize; 5] = [0x0020, 0x0024, 0x0720, 0x0724, 0x0730];

/// Interrupt banks, each with a line of its own.
pub(crate) const BANKS: usize = 4;

/// GLOBAL_CFG: as the public driver sets it, both DMA engines off.
pub(crate) const GLOBAL_CFG_BASE: u32 = 0x7638_0060;
pub(crate) const TX_DMA_EN: u32 = 1;
pub(crate) const TX_DMA_BUSY: u32 = 1 << 1;
pub(crate) const RX_DMA_EN: u32 = 1 << 2;
pub(crate) const RX_DMA_BUSY: u32 = 1 << 3;

/// HW_FWD_DSCP_CFG 29:28: size of a forward buffer.
pub(crate) const FWD_PAYLOAD_2K: u32 = 0;
pub(crate) const FWD_PAYLOAD_1K: u32 = 1 << 28;
/// LMGR_INIT_CFG: initialisation under way.
pub(crate) const LMGR_START: u32 = 1 << 31;
pub(crate) const LMGR_SRAM: u32 = 1 << 30;

/// Blocking register of a transmit ring: frames are dropped when the packet switch is full.
pub(crate) const TX_DROP_EN: u32 = 1 << 2;
/// Blocking register: completions go to the second queue.
pub(crate) const TX_IRQ_QUEUE_1: u32 = 1 << 4;

/// IRQ_STATUS and TX_IRQ_CFG: head or depth, and number of entries or threshold.
pub(crate) const IRQ_LOW: u32 = 0xfff;
pub(crate) const IRQ_HIGH_SHIFT: u32 = 16;
/// Most entries that one write to the clear register takes.
pub(crate) const IRQ_CLEAR_MOST: u32 = 0x80;

/// Rings of each kind.
pub const RINGS: u8 = 32;

/// Registers of a queue of transmit completions.
pub(crate) struct TxIrqRegs {
    pub(crate) base: usize,
    pub(crate) cfg: usize,
    pub(crate) clear: usize,
    pub(crate) status: usize,
}

/// First register of transmit ring `n`: base, then blocking, CPU index, DMA index, 4 bytes each.
pub(crate) fn tx_ring(n: u8) -> usize {
    let n = usize::from(n & 31);
    if n < 8 {
        0x0100 + 32 * n
    } else {
        0x0b00 + 32 * (n - 8)
    }
}

/// First register of receive ring `n`: base, then size, CPU index, DMA index, delay, scatter.
pub(crate) fn rx_ring(n: u8) -> usize {
    let n = usize::from(n & 31);
    if n < 16 {
        0x0200 + 32 * n
    } else {
        0x0e00 + 32 * (n - 16)
    }
}

/// Enable register of status word `word` for `bank`.
pub(crate) fn int_enable(bank: usize, word: usize) -> usize {
    match word {
        0 => 0x0028 + 8 * bank,
        1 => 0x002c + 8 * bank,
        2 => 0x0740 + 32 * bank,
        3 => 0x0744 + 32 * bank,
        _ => 0x0750 + 32 * bank,
    }
}

/// Places inside the registers of a ring.
pub(crate) mod ring {
    pub(crate) const BASE: usize = 0;
    /// Transmit.
    pub(crate) const BLOCKING: usize = 4;
    /// Receive.
    pub(crate) const SIZE: usize = 4;
    pub(crate) const CPU: usize = 8;
    pub(crate) const DMA: usize = 12;
    pub(crate) const DELAY: usize = 16;
    pub(crate) const SCATTER: usize = 20;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rings_of_the_secure_offload_engine_lie_where_the_reference_has_them() {
        assert_eq!(tx_ring(2), 0x140);
        assert_eq!(tx_ring(8), 0xb00);
        assert_eq!(rx_ring(1) + ring::SCATTER, 0x234);
        assert_eq!(rx_ring(10), 0x340);
        assert_eq!(rx_ring(16), 0xe00);
        assert_eq!(int_enable(3, 4), 0x07b0);
        assert_eq!(int_enable(3, 0), 0x0040);
    }
}
