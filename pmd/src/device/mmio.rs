//! Device registers.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::DeviceError;

/// Registers behind function calls instead of a mapping: a vfio-user server without shared memory, or a model in a test.
///
/// `size` is 1, 2, 4 or 8 and `offset` a multiple of it, with `offset + size <= len()`.
pub trait RegisterSpace: Send + Sync {
    /// Value of the register at `offset`, in the low `size` bytes.
    fn read(&self, offset: usize, size: usize) -> u64;

    /// Writes the low `size` bytes of `value`.
    fn write(&self, offset: usize, size: usize, value: u64);

    /// Bytes in the space.
    fn len(&self) -> usize;

    /// True for a space without registers.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A faster way to `len` bytes at `offset`, where there is one: the part of a region that is mapped.
    fn part(&self, offset: usize, len: usize) -> Option<Mmio> {
        let _ = (offset, len);
        None
    }
}

/// A region of registers; cheap to clone. Accesses are volatile, little-endian, and never leave the region: reads outside of it, or not aligned to their size, give all
/// ones (as a bus without a device does), such writes do nothing, and both are counted by [`Mmio::faults`].
///
/// Writes are not ordered against normal memory: use [`super::fence_release`] before a doorbell.
#[derive(Clone)]
pub struct Mmio {
    /// First byte when mapped, null when behind `space`.
    base: *mut u8,
    len: usize,
    /// Start of this window in `space`.
    start: usize,
    backing: Backing,
    faults: Arc<AtomicU64>,
}

#[derive(Clone)]
enum Backing {
    /// Keeps the mapping.
    Mapped(#[allow(dead_code, reason = "held for its Drop")] Arc<dyn Any + Send + Sync>),
    Space(Arc<dyn RegisterSpace>),
}

// SAFETY: registers are accessed by single volatile operations, which any thread may do; the mapping lives as long as `backing`.
unsafe impl Send for Mmio {}
// SAFETY: as for Send.
unsafe impl Sync for Mmio {}

macro_rules! access {
    ($read:ident, $write:ident, $t:ty) => {
        #[doc = concat!("Reads a `", stringify!($t), "` at byte `offset`.")]
        #[inline(always)]
        pub fn $read(&self, offset: usize) -> $t {
            if !self.check(offset, size_of::<$t>()) {
                return <$t>::MAX;
            }
            match &self.backing {
                Backing::Mapped(_) => {
                    // SAFETY: `check` found the access inside the mapping and aligned; the mapping lives as long as `self`
                    // and is only ever accessed by volatile operations.
                    let raw = unsafe { self.base.add(offset).cast::<$t>().read_volatile() };
                    <$t>::from_le(raw)
                }
                Backing::Space(space) => {
                    let value = space.read(self.start + offset, size_of::<$t>());
                    <$t>::try_from(value & u64::from(<$t>::MAX)).unwrap_or(<$t>::MAX)
                }
            }
        }

        #[doc = concat!("Writes a `", stringify!($t), "` at byte `offset`.")]
        #[inline(always)]
        pub fn $write(&self, offset: usize, value: $t) {
            if !self.check(offset, size_of::<$t>()) {
                return;
            }
            match &self.backing {
                Backing::Mapped(_) => {
                    // SAFETY: as for reading; the values that registers take are the driver's responsibility.
                    unsafe {
                        self.base
                            .add(offset)
                            .cast::<$t>()
                            .write_volatile(value.to_le());
                    }
                }
                Backing::Space(space) => {
                    space.write(self.start + offset, size_of::<$t>(), u64::from(value));
                }
            }
        }
    };
}

impl Mmio {
    /// Registers in a mapping that `owner` keeps.
    ///
    /// # Safety
    /// `base..base + len` is mapped readable and writable as long as `owner` lives, `base` is a multiple of 8, and nobody
    /// makes Rust references to it.
    pub(crate) unsafe fn mapped(
        base: *mut u8,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Mmio {
        Mmio {
            base,
            len,
            start: 0,
            backing: Backing::Mapped(owner),
            faults: Arc::default(),
        }
    }

    /// Plain memory, zeroed, without side effects: registers of simple models.
    pub fn memory(len: usize) -> Mmio {
        let mut words = vec![0u64; len.div_ceil(8)].into_boxed_slice();
        let base = words.as_mut_ptr().cast::<u8>();
        let words = Arc::new(Words(Box::into_raw(words)));
        // SAFETY: the words are not touched except through `base` until the last owner frees them; u64 aligns to 8.
        unsafe { Mmio::mapped(base, len, words) }
    }

    /// Registers behind calls.
    pub fn trapped(space: Arc<dyn RegisterSpace>) -> Mmio {
        Mmio {
            base: std::ptr::null_mut(),
            len: space.len(),
            start: 0,
            backing: Backing::Space(space),
            faults: Arc::default(),
        }
    }

    /// Bytes in the region.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a region without registers.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the region, sharing its fault counter.
    ///
    /// # Errors
    /// [`DeviceError::Window`] when the part is not inside, or does not begin at a multiple of 8.
    pub fn window(&self, offset: usize, len: usize) -> Result<Mmio, DeviceError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside || !offset.is_multiple_of(8) {
            return Err(DeviceError::Window {
                offset,
                len,
                size: self.len,
            });
        }
        let mut part = self.clone();
        part.len = len;
        match &self.backing {
            Backing::Mapped(_) => part.base = part.base.wrapping_add(offset),
            Backing::Space(space) => {
                part.start += offset;
                if let Some(mapped) = space.part(part.start, len) {
                    part.base = mapped.base;
                    part.backing = mapped.backing;
                    part.start = 0;
                }
            }
        }
        Ok(part)
    }

    /// Accesses outside the region or not aligned, over all windows and clones. Anything but 0 is a bug of the driver, or
    /// a device that gave a wrong offset.
    pub fn faults(&self) -> u64 {
        self.faults.load(Relaxed)
    }

    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);
    access!(read64, write64, u64);

    #[inline(always)]
    fn check(&self, offset: usize, size: usize) -> bool {
        // `size` is a power of two up to 8, `len` at least that when the first condition holds.
        if self.len >= size && offset <= self.len - size && offset & (size - 1) == 0 {
            return true;
        }
        self.fault();
        false
    }

    #[cold]
    fn fault(&self) {
        self.faults.fetch_add(1, Relaxed);
    }
}

impl fmt::Debug for Mmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmio")
            .field("len", &self.len)
            .field("faults", &self.faults())
            .finish_non_exhaustive()
    }
}

/// Owns the words of [`Mmio::memory`].
struct Words(*mut [u64]);

// SAFETY: the pointer is only used to free the words, once.
unsafe impl Send for Words {}
// SAFETY: as for Send.
unsafe impl Sync for Words {}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` and all users of the words are gone.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn registers_are_little_endian() {
        let m = Mmio::memory(16);
        m.write32(4, 0x1122_3344);
        assert_eq!(m.read8(4), 0x44);
        assert_eq!(m.read16(6), 0x1122);
        assert_eq!(m.read64(0), 0x1122_3344_0000_0000);
        m.write64(8, u64::MAX - 1);
        m.write8(8, 7);
        assert_eq!(m.read64(8), 0xffff_ffff_ffff_ff07);
        assert_eq!(m.faults(), 0);
    }

    #[test]
    fn no_access_leaves_the_region() {
        let m = Mmio::memory(12);
        for (offset, read) in [(12, m.read8(12)), (usize::MAX, m.read8(usize::MAX))] {
            assert_eq!(read, 0xff, "{offset}");
        }
        assert_eq!(m.read32(10), u32::MAX);
        assert_eq!(m.read64(8), u64::MAX);
        assert_eq!(m.read16(1), u16::MAX);
        m.write64(8, 1);
        m.write32(usize::MAX - 3, 1);
        assert_eq!(m.faults(), 7);
        assert_eq!((m.read64(0), m.read32(8)), (0, 0));
        let w = m.window(8, 4).unwrap();
        w.write32(0, 5);
        assert_eq!(m.read32(8), 5);
        assert_eq!(w.read32(4), u32::MAX);
        assert_eq!(m.faults(), 8);
        assert!(m.window(8, 5).is_err());
        assert!(m.window(4, 4).is_err());
        assert!(m.window(usize::MAX - 7, 8).is_err());
        assert_eq!(Mmio::memory(0).read8(0), 0xff);
    }

    #[test]
    fn a_trapped_space_sees_offset_size_and_value() {
        struct Log(Mutex<Vec<(usize, usize, u64)>>);
        impl RegisterSpace for Log {
            fn read(&self, offset: usize, _: usize) -> u64 {
                0xaabb_ccdd_0000_0000 | offset as u64
            }
            fn write(&self, offset: usize, size: usize, value: u64) {
                self.0.lock().unwrap().push((offset, size, value));
            }
            fn len(&self) -> usize {
                64
            }
        }
        let log = Arc::new(Log(Mutex::new(Vec::new())));
        let m = Mmio::trapped(log.clone()).window(16, 32).unwrap();
        m.write16(2, 0x1234);
        m.write64(32, 1);
        assert_eq!(m.read8(4), 20);
        assert_eq!(*log.0.lock().unwrap(), [(18, 2, 0x1234)]);
        assert_eq!(m.faults(), 1);
    }
}
