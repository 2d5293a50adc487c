//! Ordering between the CPU's memory accesses and what a device sees.
//!
//! Rust's fences order normal memory between CPUs. Devices on other interconnects need the outer-shareable forms on Arm; on
//! x86 a device sees stores in program order and only the compiler, and loads after stores, must be held back.

use std::sync::atomic::{Ordering, fence};

/// All stores before are visible to the device before any store after: between descriptors (or frame bytes) and the doorbell.
#[inline(always)]
pub fn fence_release() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier instruction changes no register, memory or flag; without `nomem` the compiler keeps accesses in order.
    unsafe {
        std::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    fence(Ordering::SeqCst);
    fence(Ordering::Release);
}

/// All loads before are done before any load after: between a descriptor's "done" bit and the rest of it.
#[inline(always)]
pub fn fence_acquire() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as in `fence_release`.
    unsafe {
        std::arch::asm!("dmb oshld", options(nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    fence(Ordering::SeqCst);
    fence(Ordering::Acquire);
}

/// All accesses before are done before any access after: between publishing an index and reading the other side's flags.
#[inline(always)]
pub fn fence_full() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as in `fence_release`.
    unsafe {
        std::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
    fence(Ordering::SeqCst);
}
