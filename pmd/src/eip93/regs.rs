//! Registers and bits, in the order of the hardware. All are words of 32 bits in a window of 4 KiB.

// The current descriptor (direct host mode).
pub(super) const CTRL_STAT: usize = 0x000;
pub(super) const LENGTH: usize = 0x01c;

// Rings.
pub(super) const CDR_BASE: usize = 0x080;
pub(super) const RDR_BASE: usize = 0x084;
/// Descriptors minus 1, both rings.
pub(super) const RING_CONFIG: usize = 0x088;
pub(super) const RING_THRESH: usize = 0x08c;
/// Read: commands not yet consumed. Write: adds 1 to 255.
pub(super) const CD_COUNT: usize = 0x090;
/// Read: results not yet released. Write: releases 1 to 255.
pub(super) const RD_COUNT: usize = 0x094;
/// Next command (low half) and next result (high half).
pub(super) const RING_POINTERS: usize = 0x098;
pub(super) const RING_STAT: usize = 0x09c;

// Engine.
pub(super) const CONFIG: usize = 0x100;
pub(super) const STATUS: usize = 0x104;
pub(super) const BUF_THRESH: usize = 0x10c;
pub(super) const INBUF_COUNT: usize = 0x110;
pub(super) const OUTBUF_COUNT: usize = 0x114;
pub(super) const BUF_POINTERS: usize = 0x118;
pub(super) const CLOCK_CTRL: usize = 0x1e8;
pub(super) const OPTION_1: usize = 0x1f4;
pub(super) const REVISION: usize = 0x1fc;

// Interrupts: only ever masked and cleared here.
pub(super) const INT_CLR: usize = 0x204;
pub(super) const INT_CFG: usize = 0x20c;
pub(super) const MASK_DISABLE: usize = 0x214;

// Windows of direct host mode.
pub(super) const SA_WINDOW: usize = 0x400;
pub(super) const SA_READY: usize = 0x47c;
pub(super) const STATE_WINDOW: usize = 0x500;
pub(super) const DATA: usize = 0x800;

/// Bytes of the window.
pub(super) const WINDOW: usize = 0x1000;

// CONFIG.
pub(super) const RST_PE: u32 = 1;
/// Bit 1; it was long taken for bit 2.
pub(super) const RST_RING: u32 = 1 << 1;
pub(super) const MODE_RING: u32 = 3 << 8;
pub(super) const MODE_DIRECT: u32 = 0;
pub(super) const EN_CDR_UPDATE: u32 = 1 << 10;

// STATUS.
pub(super) const OPERATION_DONE: u32 = 1 << 9;

/// Engine, DES, AES and hash.
pub(super) const CLOCKS: u32 = 0x17;
/// 128 bytes for either buffer.
pub(super) const THRESHOLDS: u32 = 0x0080_0080;

/// Low half of REVISION: 93 and its complement.
pub(super) const IDENTITY: u32 = 0xa25d;

// OPTION_1.
pub(super) const HAS_SHA256: u32 = 1 << 19;
pub(super) const HAS_SHA1: u32 = 1 << 17;
pub(super) const HAS_AES256: u32 = 1 << 15;
pub(super) const HAS_AES192: u32 = 1 << 14;
pub(super) const HAS_AES128: u32 = 1 << 13;
pub(super) const HAS_AES: u32 = 1 << 2;

/// Most that one write to a counter adds or releases.
pub(super) const MOST: u32 = 255;
/// Numbers in CD_COUNT and RD_COUNT.
pub(super) const COUNT: u32 = 0x7ff;
