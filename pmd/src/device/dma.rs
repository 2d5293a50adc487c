//! Memory that a device and its driver share.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::DeviceError;

/// Coherent memory private to one device and its driver: rings, SA records. Cheap to clone; clones and slices share the
/// bytes, which are wiped and free again when the last of them is dropped. Never part of the frame arena.
///
/// Accesses never leave the memory: reads outside of it or not aligned to their size give zero, such writes do nothing, and
/// both are counted by [`DmaMem::faults`].
#[derive(Clone)]
pub struct DmaMem {
    base: NonNull<u8>,
    len: usize,
    iova: u64,
    owner: Arc<dyn Any + Send + Sync>,
    faults: Arc<AtomicU64>,
}

// SAFETY: the bytes are accessed by volatile and atomic operations only, which any thread may do; `owner` keeps them.
unsafe impl Send for DmaMem {}
// SAFETY: as for Send.
unsafe impl Sync for DmaMem {}

macro_rules! plain {
    ($read:ident, $write:ident, $t:ty) => {
        #[doc = concat!("Reads a little-endian `", stringify!($t), "` at byte `offset`; not ordered against other accesses.")]
        #[inline(always)]
        pub fn $read(&self, offset: usize) -> $t {
            match self.at(offset, size_of::<$t>()) {
                // SAFETY: `at` found the access inside and aligned; the device may write at the same time, hence volatile.
                Some(p) => <$t>::from_le(unsafe { p.cast::<$t>().read_volatile() }),
                None => 0,
            }
        }

        #[doc = concat!("Writes a little-endian `", stringify!($t), "` at byte `offset`; not ordered against other accesses.")]
        #[inline(always)]
        pub fn $write(&self, offset: usize, value: $t) {
            if let Some(p) = self.at(offset, size_of::<$t>()) {
                // SAFETY: as for reading.
                unsafe { p.cast::<$t>().write_volatile(value.to_le()) };
            }
        }
    };
}

macro_rules! ordered {
    ($load:ident, $store:ident, $t:ty, $atomic:ty) => {
        #[doc = concat!("Reads a `", stringify!($t), "` before all reads that follow.")]
        #[inline(always)]
        pub fn $load(&self, offset: usize) -> $t {
            match self.at(offset, size_of::<$t>()) {
                Some(p) => {
                    // SAFETY: `at` found the access inside and aligned; the memory lives as long as `self`.
                    let word = unsafe { <$atomic>::from_ptr(p.cast::<$t>().as_ptr()) };
                    let value = <$t>::from_le(word.load(Ordering::Relaxed));
                    super::fence_acquire();
                    value
                }
                None => 0,
            }
        }

        #[doc = concat!("Writes a `", stringify!($t), "` after all writes so far.")]
        #[inline(always)]
        pub fn $store(&self, offset: usize, value: $t) {
            if let Some(p) = self.at(offset, size_of::<$t>()) {
                super::fence_release();
                // SAFETY: as for reading.
                let word = unsafe { <$atomic>::from_ptr(p.cast::<$t>().as_ptr()) };
                word.store(value.to_le(), Ordering::Relaxed);
            }
        }
    };
}

impl DmaMem {
    /// Memory that `owner` keeps.
    ///
    /// # Safety
    /// `base..base + len` is readable, writable and, for the device, at `iova..iova + len`, as long as `owner` lives. Nobody
    /// makes Rust references to it.
    pub(crate) unsafe fn from_parts(
        base: NonNull<u8>,
        len: usize,
        iova: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> DmaMem {
        DmaMem {
            base,
            len,
            iova,
            owner,
            faults: Arc::default(),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an empty slice.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte for the device.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// A part, which keeps the whole alive.
    ///
    /// # Errors
    /// [`DeviceError::Window`] when the part is not inside.
    pub fn slice(&self, offset: usize, len: usize) -> Result<DmaMem, DeviceError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(DeviceError::Window {
                offset,
                len,
                size: self.len,
            });
        }
        Ok(DmaMem {
            // SAFETY: offset <= len, so the pointer stays inside or one past the memory.
            base: unsafe { self.base.add(offset) },
            len,
            iova: self.iova + offset as u64,
            owner: Arc::clone(&self.owner),
            faults: Arc::clone(&self.faults),
        })
    }

    /// Accesses outside the memory or not aligned, over all slices. Anything but 0 is a bug of the driver.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// The `LEN` bytes (a power of two) at `offset`: a descriptor, whose place is checked once for all its words. `None`, and
    /// counted, when it is not inside or not aligned to its length.
    #[inline(always)]
    pub fn block<const LEN: usize>(&self, offset: usize) -> Option<DmaBlock<'_, LEN>> {
        const { assert!(LEN.is_power_of_two() && LEN >= 8) };
        Some(DmaBlock {
            base: self.at(offset, LEN)?,
            memory: PhantomData,
        })
    }

    plain!(read8, write8, u8);
    plain!(read16, write16, u16);
    plain!(read32, write32, u32);
    plain!(read64, write64, u64);
    ordered!(load_acquire16, store_release16, u16, AtomicU16);
    ordered!(load_acquire32, store_release32, u32, AtomicU32);
    ordered!(load_acquire64, store_release64, u64, AtomicU64);

    /// Copies bytes out; zeros when they are not all inside.
    pub fn read_bytes(&self, offset: usize, out: &mut [u8]) {
        if self.range(offset, out.len()).is_none() {
            out.fill(0);
            return;
        }
        for (i, byte) in out.iter_mut().enumerate() {
            // SAFETY: the range lies inside; bytes are always aligned; volatile because the device may write.
            *byte = unsafe { self.base.add(offset + i).read_volatile() };
        }
    }

    /// Copies bytes in; nothing when they do not all fit.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        if self.range(offset, bytes.len()).is_none() {
            return;
        }
        for (i, &byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read_bytes`.
            unsafe { self.base.add(offset + i).write_volatile(byte) };
        }
    }

    /// Sets all bytes to zero, also when they are never read again.
    pub fn zero(&self) {
        // SAFETY: as in `read_bytes`.
        unsafe { wipe(self.base, self.len) };
    }

    #[inline(always)]
    fn at(&self, offset: usize, size: usize) -> Option<NonNull<u8>> {
        if self.len >= size && offset <= self.len - size {
            // SAFETY: the access was found to be inside.
            let p = unsafe { self.base.add(offset) };
            if p.addr().get() & (size - 1) == 0 {
                return Some(p);
            }
        }
        self.fault();
        None
    }

    fn range(&self, offset: usize, len: usize) -> Option<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            return Some(());
        }
        self.fault();
        None
    }

    #[cold]
    fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }
}

/// A descriptor in shared memory; see [`DmaMem::block`]. Words are at multiples of their size, which the compiler checks.
pub struct DmaBlock<'m, const LEN: usize> {
    base: NonNull<u8>,
    memory: PhantomData<&'m DmaMem>,
}

impl<const LEN: usize> DmaBlock<'_, LEN> {
    /// Reads the little-endian word at byte `AT`; not ordered against other accesses.
    #[inline(always)]
    pub fn read32<const AT: usize>(&self) -> u32 {
        const { assert!(AT.is_multiple_of(4) && AT + 4 <= LEN) };
        // SAFETY: `block` found LEN bytes inside, aligned, and the memory outlives `self`; the device may write at the
        // same time, hence volatile.
        u32::from_le(unsafe { self.base.add(AT).cast::<u32>().read_volatile() })
    }

    /// Writes the little-endian word at byte `AT`; not ordered against other accesses.
    #[inline(always)]
    pub fn write32<const AT: usize>(&self, value: u32) {
        const { assert!(AT.is_multiple_of(4) && AT + 4 <= LEN) };
        // SAFETY: as for reading.
        unsafe {
            self.base
                .add(AT)
                .cast::<u32>()
                .write_volatile(value.to_le())
        };
    }

    /// Writes the little-endian double word at byte `AT`; not ordered against other accesses.
    #[inline(always)]
    pub fn write64<const AT: usize>(&self, value: u64) {
        const { assert!(AT.is_multiple_of(8) && AT + 8 <= LEN) };
        // SAFETY: as for reading.
        unsafe {
            self.base
                .add(AT)
                .cast::<u64>()
                .write_volatile(value.to_le())
        };
    }

    /// Writes the word at byte `AT` after all writes so far.
    #[inline(always)]
    pub fn store_release32<const AT: usize>(&self, value: u32) {
        const { assert!(AT.is_multiple_of(4) && AT + 4 <= LEN) };
        super::fence_release();
        // SAFETY: as for reading.
        let word = unsafe { AtomicU32::from_ptr(self.base.add(AT).cast::<u32>().as_ptr()) };
        word.store(value.to_le(), Ordering::Relaxed);
    }
}

/// Writes zeros, also where they are never read again; in blocks, as rings are large.
///
/// # Safety
/// `base..base + len` is mapped memory that can be written and that no Rust reference covers.
pub(super) unsafe fn wipe(base: NonNull<u8>, len: usize) {
    const BLOCK: usize = size_of::<[u64; 8]>();
    let head = base.align_offset(align_of::<[u64; 8]>()).min(len);
    let tail = head + (len - head) / BLOCK * BLOCK;
    for i in (0..head).chain(tail..len) {
        // SAFETY: inside of the range; bytes are always aligned.
        unsafe { base.add(i).write_volatile(0) };
    }
    for at in (head..tail).step_by(BLOCK) {
        // SAFETY: the block ends at `tail` at the latest, and `head` is aligned.
        unsafe { base.add(at).cast().write_volatile([0u64; 8]) };
    }
}

/// Shows no content: the memory may hold keys.
impl fmt::Debug for DmaMem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaMem")
            .field("len", &self.len)
            .field("iova", &format_args!("{:#x}", self.iova))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_inside_and_aligned_or_there_is_none() {
        let owner: Arc<[AtomicU64]> = (0..16).map(|_| AtomicU64::new(0)).collect();
        let base = NonNull::from(&owner[..]).cast::<u8>();
        let skip = base.align_offset(32);
        // SAFETY: 96 bytes of the owner's, which is nothing but atomics and is looked at through the memory alone.
        let m = unsafe { DmaMem::from_parts(base.add(skip), 96, 0, Arc::new(owner)) };
        let b = m.block::<32>(64).unwrap();
        b.write32::<4>(0x0102_0304);
        b.write64::<24>(5 | 6 << 32);
        b.store_release32::<0>(7);
        assert_eq!(
            [64, 68, 88, 92].map(|at| m.read32(at)),
            [7, 0x0102_0304, 5, 6]
        );
        assert_eq!((b.read32::<28>(), m.faults()), (6, 0));
        for outside in [16, 80, 96, usize::MAX - 31] {
            assert!(m.block::<32>(outside).is_none());
        }
        assert_eq!(m.faults(), 4);
    }

    #[test]
    fn a_wipe_reaches_every_byte_of_its_range_and_no_other() {
        for start in 0..10 {
            for len in (0..150).chain([511, 512, 513]) {
                let mut bytes = vec![7u8; 600];
                let base = NonNull::new(bytes.as_mut_ptr()).unwrap();
                // SAFETY: the range lies in the vector, which is not looked at meanwhile.
                unsafe { wipe(base.add(start), len) };
                let (before, rest) = bytes.split_at(start);
                let (wiped, behind) = rest.split_at(len);
                assert!(wiped.iter().all(|b| *b == 0));
                assert!(before.iter().chain(behind).all(|b| *b == 7));
            }
        }
    }
}
