//! Registers and bits of the EIP-93, as its reference lists them.

/// Bytes of the register window.
pub(super) const WINDOW: usize = 0x1000;

// The current descriptor begins at 0.
pub(super) const DESCRIPTOR_END: usize = 0x01c;
// The rings.
pub(super) const CDR_BASE: usize = 0x080;
pub(super) const RDR_BASE: usize = 0x084;
pub(super) const RING_CONFIG: usize = 0x088;
pub(super) const RING_THRESH: usize = 0x08c;
pub(super) const CD_COUNT: usize = 0x090;
pub(super) const RD_COUNT: usize = 0x094;
pub(super) const RING_POINTERS: usize = 0x098;
pub(super) const RING_STAT: usize = 0x09c;
// The engine.
pub(super) const CONFIG: usize = 0x100;
pub(super) const STATUS: usize = 0x104;
pub(super) const BUF_THRESH: usize = 0x10c;
pub(super) const INBUF: usize = 0x110;
pub(super) const OUTBUF: usize = 0x114;
pub(super) const BUF_POINTERS: usize = 0x118;
pub(super) const DMA_CONFIG: usize = 0x120;
pub(super) const ENDIAN: usize = 0x1d0;
pub(super) const CLOCK: usize = 0x1e8;
pub(super) const OPTION_1: usize = 0x1f4;
pub(super) const OPTION_0: usize = 0x1f8;
pub(super) const REVISION: usize = 0x1fc;
// Interrupts.
pub(super) const INT_RAW: usize = 0x200;
pub(super) const INT_MASKED: usize = 0x204;
pub(super) const INT_ENABLE: usize = 0x208;
pub(super) const INT_CONFIG: usize = 0x20c;
pub(super) const INT_SET: usize = 0x210;
pub(super) const INT_UNSET: usize = 0x214;
// Direct host mode.
pub(super) const SA_WINDOW: usize = 0x400;
pub(super) const SA_READY: usize = 0x47c;
pub(super) const STATE_WINDOW: usize = 0x500;
pub(super) const STATE_WINDOW_END: usize = 0x538;
pub(super) const DATA: usize = 0x800;
pub(super) const DATA_END: usize = 0x900;

// CONFIG
pub(super) const RESET_ENGINE: u32 = 1;
pub(super) const RESET_RINGS: u32 = 1 << 1;
pub(super) const MODE: u32 = 3 << 8;
pub(super) const MODE_RING: u32 = 3 << 8;
pub(super) const MODE_DIRECT: u32 = 0;
pub(super) const CDR_UPDATE: u32 = 1 << 10;
pub(super) const SWAPS: u32 = 0x17 << 16;
/// The rings have been asked for a size of one more than this.
pub(super) const RING_SIZE: u32 = 0x3ff;
/// Bits of the doorbells.
pub(super) const DOORBELL: u32 = 0xff;

// RING_STAT
pub(super) const CDR_OVERFLOW: u32 = 1;
pub(super) const RDR_UNDERFLOW: u32 = 1 << 1;

// STATUS
pub(super) const STATUS_IDLE: u32 = 0x0004_0402;
pub(super) const STATUS_DONE: u32 = 1 << 9;

// CLOCK
pub(super) const CLOCK_ENGINE: u32 = 1;

// Interrupts.
pub(super) const INT_RDR: u32 = 1 << 1;
pub(super) const INT_DONE: u32 = 1 << 9;
pub(super) const INT_RING: u32 = 1 << 16;
pub(super) const INT_BUS: u32 = 1 << 18;
pub(super) const INT_ALL: u32 = 0x0007_8e03;

// Descriptor, word 0.
pub(super) const HOST_READY: u32 = 1;
pub(super) const PE_READY: u32 = 1 << 1;
pub(super) const READY: u32 = 3;
pub(super) const HASH_FINAL: u32 = 1 << 4;
pub(super) const AUTH_ERR: u32 = 1 << 16;
pub(super) const PAD_ERR: u32 = 1 << 17;
pub(super) const SEQ_ERR: u32 = 1 << 18;
pub(super) const EXT_ERR: u32 = 1 << 19;
// Descriptor, word 7.
pub(super) const LENGTH: u32 = 0xf_ffff;
pub(super) const HOST_READY_7: u32 = 1 << 22;
pub(super) const PE_READY_7: u32 = 1 << 23;
pub(super) const READY_7: u32 = 3 << 22;

/// Codes of an extended error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Bus = 0,
    Ownership = 1,
    Operation = 2,
    Algorithm = 3,
    Spi = 4,
    ZeroLength = 5,
    Length = 6,
    Block = 7,
    Processing = 8,
}

impl Code {
    /// As it stands in word 0.
    pub(super) fn bits(self) -> u32 {
        EXT_ERR | (self as u32) << 20
    }
}
