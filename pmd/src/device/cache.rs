//! Cache maintenance around transfers of devices that do not see the CPU's caches.
//!
//! Only Arm has such devices here, and lets user space write lines back and invalidate them by address. Elsewhere these do
//! nothing: [`super::Device::is_coherent`] is true there.

/// Writes the lines that hold these bytes back to memory: before a device reads them.
#[inline]
pub(crate) fn clean(at: *const u8, len: usize) {
    #[cfg(target_arch = "aarch64")]
    arm::each_line(at, len, |line| {
        // SAFETY: writing a line back changes no memory content and faults only where reading would; the caller owns the bytes.
        unsafe {
            std::arch::asm!("dc cvac, {p}", p = in(reg) line, options(nostack, preserves_flags));
        }
    });
    #[cfg(not(target_arch = "aarch64"))]
    let _ = (at, len);
}

/// Writes back and forgets the lines that hold these bytes: before a device writes them, and again before they are read.
#[inline]
pub(crate) fn discard(at: *const u8, len: usize) {
    #[cfg(target_arch = "aarch64")]
    arm::each_line(at, len, |line| {
        // SAFETY: as in `clean`; what is dirty is written back, so no content is lost.
        unsafe {
            std::arch::asm!("dc civac, {p}", p = in(reg) line, options(nostack, preserves_flags));
        }
    });
    #[cfg(not(target_arch = "aarch64"))]
    let _ = (at, len);
}

#[cfg(target_arch = "aarch64")]
mod arm {
    /// Calls `each` with the address of every line that holds one of the bytes, then waits until all is done.
    pub(super) fn each_line(at: *const u8, len: usize, each: impl Fn(usize)) {
        let ctr: usize;
        // SAFETY: the cache type register is readable from user space on Linux and reading it changes nothing.
        unsafe {
            std::arch::asm!("mrs {v}, ctr_el0", v = out(reg) ctr, options(nomem, nostack, preserves_flags));
        }
        // DminLine: logarithm of the words in the smallest data cache line.
        let line = 4usize << (ctr >> 16 & 0xf);
        let end = at.addr() + len;
        let mut p = at.addr() & !(line - 1);
        while p < end {
            each(p);
            p += line;
        }
        super::super::fence_full();
    }
}
