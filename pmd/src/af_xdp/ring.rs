//! The four rings that an AF_XDP socket shares with the kernel.
//!
//! Each has one producer and one consumer; an index is written by one side only and counts without end. The protocol, as in
//! any ring of one producer and one consumer: entries are written before the producer index is stored (release), and
//! read after it is loaded (acquire); entries are read before the consumer index is stored (release), and overwritten after
//! it is loaded (acquire). So neither side ever touches an entry at the same time as the other.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

/// Which end of a ring we are.
pub(super) trait Role {}
/// We write entries.
pub(super) struct Produce;
/// We read entries.
pub(super) struct Consume;
impl Role for Produce {}
impl Role for Consume {}

/// A ring of `T`, of which we are one end.
pub(super) struct Ring<T, R: Role> {
    map: MmapRaw,
    offsets: libc::xdp_ring_offset,
    mask: u32,
    /// Our own index, ahead of what the kernel has been told.
    own: u32,
    /// The kernel's index, as last read.
    other: u32,
    _entries: PhantomData<(*mut T, R)>,
}

// SAFETY: the ring is the only user of our end of the mapping; moving it to another thread moves that use.
unsafe impl<T: Send, R: Role> Send for Ring<T, R> {}

impl<T: Copy, R: Role> Ring<T, R> {
    /// Maps the ring of `size` entries (a power of two) at `page_offset` of the socket.
    pub(super) fn map(
        socket: &OwnedFd,
        page_offset: u64,
        offsets: libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Ring<T, R>> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "ring offsets out of range");
        let at = |n: u64| usize::try_from(n).map_err(|_| bad());
        let len = at(offsets.desc)?
            .checked_add(size as usize * size_of::<T>())
            .ok_or_else(bad)?;
        let aligned = |n: u64, to: usize| Ok::<_, io::Error>(at(n)?.is_multiple_of(to));
        if !size.is_power_of_two()
            || !aligned(offsets.desc, align_of::<T>())?
            || [offsets.producer, offsets.consumer, offsets.flags]
                .iter()
                .any(|&n| n % 4 != 0 || n.saturating_add(4) > len as u64)
        {
            return Err(bad());
        }
        let map = MmapOptions::new()
            .offset(page_offset)
            .len(len)
            .populate()
            .map_raw(socket.as_raw_fd())?;
        let mut ring = Ring {
            map,
            offsets,
            mask: size - 1,
            own: 0,
            other: 0,
            _entries: PhantomData,
        };
        ring.own = ring.word(ring.offsets.producer).load(Ordering::Acquire);
        ring.other = ring.own;
        Ok(ring)
    }

    pub(super) fn size(&self) -> u32 {
        self.mask + 1
    }

    /// Whether the kernel wants a system call to go on.
    #[inline(always)]
    pub(super) fn needs_wakeup(&self) -> bool {
        // The kernel sets the flag, then looks at the ring once more; so our index must be visible before we read the flag.
        fence(Ordering::SeqCst);
        self.word(self.offsets.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    #[inline(always)]
    fn word(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: `map` checked that the offset is aligned and lies in the mapping, which lives as long as `self`; both
        // sides access these words atomically only. The offset was checked to fit, so the cast loses nothing.
        unsafe {
            #[allow(
                clippy::cast_possible_truncation,
                reason = "checked against the mapping's length"
            )]
            AtomicU32::from_ptr(self.map.as_mut_ptr().add(offset as usize).cast())
        }
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> *mut T {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "checked against the mapping's length"
        )]
        let first = self
            .map
            .as_mut_ptr()
            .wrapping_add(self.offsets.desc as usize);
        first.cast::<T>().wrapping_add((index & self.mask) as usize)
    }
}

impl<T: Copy> Ring<T, Produce> {
    /// Entries that can be written now.
    #[inline(always)]
    pub(super) fn free(&mut self) -> u32 {
        self.other = self.word(self.offsets.consumer).load(Ordering::Acquire);
        // A kernel that counts backwards would make this more than the size: then nothing is free.
        self.size()
            .saturating_sub(self.own.wrapping_sub(self.other))
    }

    /// Writes an entry. Only as many as [`Ring::free`] said.
    #[inline(always)]
    pub(super) fn push(&mut self, value: T) {
        // SAFETY: the entry lies in the mapping (index masked, length and alignment checked in `map`); the kernel does not
        // read it before `submit`, and has read what it held, as `free` said.
        unsafe { self.entry(self.own).write(value) };
        self.own = self.own.wrapping_add(1);
    }

    /// Shows what was written to the kernel.
    #[inline(always)]
    pub(super) fn submit(&mut self) {
        self.word(self.offsets.producer)
            .store(self.own, Ordering::Release);
    }

    /// Entries submitted that the kernel has not taken.
    pub(super) fn pending(&self) -> u32 {
        let taken = self.word(self.offsets.consumer).load(Ordering::Acquire);
        self.own.wrapping_sub(taken)
    }
}

impl<T: Copy> Ring<T, Consume> {
    /// Entries that can be read now.
    #[inline(always)]
    pub(super) fn ready(&mut self) -> u32 {
        if self.other == self.own {
            self.other = self.word(self.offsets.producer).load(Ordering::Acquire);
        }
        self.other.wrapping_sub(self.own).min(self.size())
    }

    /// Reads an entry. Only as many as [`Ring::ready`] said.
    #[inline(always)]
    pub(super) fn pop(&mut self) -> T {
        // SAFETY: the entry lies in the mapping (see `push`); the kernel wrote it before it stored the index that `ready`
        // read, and does not touch it before `release`. Any bit pattern is a valid T (plain integers).
        let value = unsafe { self.entry(self.own).read() };
        self.own = self.own.wrapping_add(1);
        value
    }

    /// Gives what was read back to the kernel.
    #[inline(always)]
    pub(super) fn release(&mut self) {
        self.word(self.offsets.consumer)
            .store(self.own, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        desc: 192,
        flags: 128,
    };

    /// Both ends of one ring in a shared file, as the kernel and we have them; the indexes begin at `start`.
    fn both_ends(size: u32, start: u32) -> (Ring<u64, Produce>, Ring<u64, Consume>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let fd = OwnedFd::from(file);
        let first = Ring::<u64, Produce>::map(&fd, 0, OFFSETS, size).unwrap();
        for offset in [OFFSETS.producer, OFFSETS.consumer] {
            first.word(offset).store(start, Ordering::Relaxed);
        }
        (
            Ring::map(&fd, 0, OFFSETS, size).unwrap(),
            Ring::map(&fd, 0, OFFSETS, size).unwrap(),
        )
    }

    #[test]
    fn offsets_outside_the_mapping_are_refused() {
        let fd = OwnedFd::from(tempfile::tempfile().unwrap());
        let map = |offsets, size| Ring::<u64, Consume>::map(&fd, 0, offsets, size).is_err();
        assert!(map(OFFSETS, 3));
        assert!(map(
            libc::xdp_ring_offset {
                flags: 2,
                ..OFFSETS
            },
            4
        ));
        assert!(map(libc::xdp_ring_offset { desc: 4, ..OFFSETS }, 4));
        assert!(map(
            libc::xdp_ring_offset {
                desc: u64::MAX - 7,
                ..OFFSETS
            },
            4
        ));
        assert!(map(
            libc::xdp_ring_offset {
                producer: 4096,
                ..OFFSETS
            },
            4
        ));
    }

    #[test]
    fn the_wake_up_flag_is_the_kernels() {
        let (ring, _) = both_ends(4, 0);
        assert!(!ring.needs_wakeup());
        ring.word(OFFSETS.flags)
            .store(libc::XDP_RING_NEED_WAKEUP, Ordering::Relaxed);
        assert!(ring.needs_wakeup());
    }

    proptest! {
        #[test]
        fn entries_cross_once_and_in_order_also_where_the_indexes_wrap(
            log in 0u32..6,
            start in prop_oneof![Just(0u32), (u32::MAX - 40)..],
            steps in prop::collection::vec((any::<bool>(), 0u32..40), 1..80),
        ) {
            let size = 1 << log;
            let (mut tx, mut rx) = both_ends(size, start);
            let mut model = VecDeque::new();
            let mut next = 0u64;
            for (send, n) in steps {
                if send {
                    let free = tx.free();
                    prop_assert_eq!(free as usize, size as usize - model.len());
                    for _ in 0..n.min(free) {
                        tx.push(next);
                        model.push_back(next);
                        next += 1;
                    }
                    tx.submit();
                } else {
                    let ready = rx.ready();
                    prop_assert!(ready as usize <= model.len());
                    prop_assert!(ready > 0 || model.is_empty());
                    for _ in 0..n.min(ready) {
                        prop_assert_eq!(Some(rx.pop()), model.pop_front());
                    }
                    rx.release();
                }
                prop_assert_eq!(tx.pending() as usize, model.len());
            }
        }
    }
}
