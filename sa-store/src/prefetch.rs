//! Asking the CPU to fetch lines early. The only unsafe code of this crate.

/// Cache line, bytes.
const LINE: usize = 64;

/// Fetches the first cache line of `value` for reading. A hint: it cannot fault and changes no result.
#[inline(always)]
pub fn read<T>(value: &T) {
    hint(std::ptr::from_ref(value).cast());
}

/// Fetches the first `lines` cache lines of `value`, no more than it has.
#[inline(always)]
pub fn read_lines<T>(value: &T, lines: usize) {
    let start: *const i8 = std::ptr::from_ref(value).cast();
    for line in 0..lines.min(size_of::<T>().div_ceil(LINE)) {
        hint(start.wrapping_add(line * LINE));
    }
}

#[inline(always)]
#[allow(unsafe_code, reason = "the prefetch instruction has no safe wrapper")]
fn hint(at: *const i8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction reads nothing architecturally and never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch(at, std::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: PRFM is a hint; it never faults, and `at` is only an address to it.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
