//! Register access that all families share.

use std::time::{Duration, Instant};

use crate::device::{DeviceError, Mmio};

/// How long to sleep between two looks at a register.
const STEP: Duration = Duration::from_micros(50);
/// Least number of looks before a wait is given up.
const LOOKS: u32 = 50;

/// The 32-bit registers of one device.
#[derive(Debug, Clone)]
pub(super) struct Regs(Mmio);

impl Regs {
    /// Takes the registers when there are at least `needed` bytes of them.
    pub(super) fn new(mmio: Mmio, needed: usize) -> Result<Regs, DeviceError> {
        if mmio.len() < needed {
            return Err(DeviceError::Broken(format!(
                "{} bytes of registers, {needed} expected",
                mmio.len()
            )));
        }
        Ok(Regs(mmio))
    }

    #[inline(always)]
    pub(super) fn read(&self, offset: usize) -> u32 {
        self.0.read32(offset)
    }

    #[inline(always)]
    pub(super) fn write(&self, offset: usize, value: u32) {
        self.0.write32(offset, value);
    }

    /// Sets the bits of `bits`, leaves the others.
    pub(super) fn set(&self, offset: usize, bits: u32) {
        self.write(offset, self.read(offset) | bits);
    }

    /// Clears the bits of `bits`, leaves the others.
    pub(super) fn clear(&self, offset: usize, bits: u32) {
        self.write(offset, self.read(offset) & !bits);
    }

    /// Replaces the bits of `mask` by those of `bits`.
    pub(super) fn replace(&self, offset: usize, mask: u32, bits: u32) {
        self.write(offset, self.read(offset) & !mask | bits & mask);
    }

    /// Writes a 64-bit address as low and high half.
    pub(super) fn write_address(&self, low: usize, high: usize, address: u64) {
        self.write(low, low_half(address));
        self.write(high, low_half(address >> 32));
    }

    /// Waits until the bits of `mask` are `want`.
    ///
    /// # Errors
    /// `Gone` when all bits are ones for longer than a reset takes, `Timeout` naming `what` otherwise.
    pub(super) fn wait(
        &self,
        offset: usize,
        mask: u32,
        want: u32,
        limit: Duration,
        what: &'static str,
    ) -> Result<(), DeviceError> {
        let end = Instant::now() + limit;
        let mut looks = 0;
        loop {
            // A thread that was not running for a while must look some more before it gives up.
            looks += 1;
            let over = Instant::now() >= end && looks > LOOKS;
            let value = self.read(offset);
            if value != u32::MAX && value & mask == want {
                return Ok(());
            }
            if over {
                return Err(if value == u32::MAX {
                    DeviceError::Gone
                } else {
                    DeviceError::Timeout(what)
                });
            }
            std::thread::sleep(STEP);
        }
    }

    /// A register that is written once per burst.
    pub(super) fn doorbell(&self, offset: usize) -> Doorbell {
        Doorbell {
            regs: self.0.clone(),
            offset,
        }
    }
}

/// The tail register of a ring.
#[derive(Debug, Clone)]
pub(super) struct Doorbell {
    regs: Mmio,
    offset: usize,
}

impl Doorbell {
    /// Hands the descriptors in front of `tail` to the device, after all writes to them.
    #[inline(always)]
    pub(super) fn ring(&self, tail: u32) {
        crate::device::fence_release();
        self.regs.write32(self.offset, tail);
    }
}

/// The low 32 bits.
pub(super) fn low_half(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}

/// The address in a pair of receive-address registers.
pub(super) fn mac_of(low: u32, high: u32) -> crate::port::MacAddr {
    let [a, b, c, d] = low.to_le_bytes();
    let [e, f, ..] = high.to_le_bytes();
    crate::port::MacAddr([a, b, c, d, e, f])
}

/// True for an address that a station can have: not zero, not a group address.
pub(super) fn is_station(mac: crate::port::MacAddr) -> bool {
    mac.0 != [0; 6] && mac.0[0] & 1 == 0
}
