//! Where memory of this process lies for a device.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{DeviceError, IovaClass};
use crate::arena::Arena;
use crate::frame::Frame;

/// A range of memory to make reachable for a device: page-aligned, part of a file, mapped as long as it is mapped there.
pub(crate) struct MemoryRange<'a> {
    pub(crate) base: NonNull<u8>,
    pub(crate) len: usize,
    /// Bytes per page.
    pub(crate) page: usize,
    /// File and place in it.
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) file_offset: u64,
}

/// The way of one kind of device to reach memory.
pub(crate) trait Mapper: Send + Sync {
    /// Makes the memory reachable.
    ///
    /// # Safety
    /// The memory stays mapped in this process until [`Mapper::unmap`] of the result, and what the device may write there is
    /// not behind a Rust reference at the same time.
    unsafe fn map(
        &self,
        memory: &MemoryRange<'_>,
        class: IovaClass,
    ) -> Result<Translation, DeviceError>;

    /// Ends what [`Mapper::map`] began. When the system refuses, the memory must be kept.
    fn unmap(&self, translation: &Translation) -> Result<(), DeviceError>;
}

/// Device addresses of one memory range: one for the whole, or one for each page.
#[derive(Debug, Clone)]
pub(crate) struct Translation {
    table: Arc<[u64]>,
    /// Logarithm of the page size; 63 for one contiguous range.
    shift: u32,
    pub(crate) len: usize,
}

impl Translation {
    /// A range that is contiguous for the device.
    pub(crate) fn contiguous(iova: u64, len: usize) -> Translation {
        Translation {
            table: Arc::new([iova]),
            shift: 63,
            len,
        }
    }

    /// Pages of `page` bytes (a power of two), at `table`.
    pub(crate) fn paged(table: Vec<u64>, page: usize, len: usize) -> Translation {
        debug_assert!(page.is_power_of_two());
        Translation {
            table: table.into(),
            shift: page.trailing_zeros(),
            len,
        }
    }

    /// Address of the first byte.
    pub(crate) fn start(&self) -> u64 {
        self.table.first().copied().unwrap_or(0)
    }

    /// Device address of the byte at `offset`.
    #[inline(always)]
    pub(crate) fn at(&self, offset: u64) -> Option<u64> {
        let page = self
            .table
            .get(usize::try_from(offset >> self.shift).ok()?)?;
        Some(page + (offset & ((1 << self.shift) - 1)))
    }

    /// Device address of `len` bytes at `offset`, when they are contiguous there.
    pub(crate) fn range(&self, offset: usize, len: usize) -> Option<u64> {
        let last = offset.checked_add(len.checked_sub(1)?)?;
        if last >= self.len {
            return None;
        }
        let start = self.at(offset as u64)?;
        let page = 1u64 << self.shift;
        // The first byte of each further page must follow the page before.
        let mut at = (offset as u64 | (page - 1)) + 1;
        while at <= last as u64 {
            if self.at(at)? != start + (at - offset as u64) {
                return None;
            }
            at += page;
        }
        Some(start)
    }
}

/// Where an arena's frames lie for one device. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ArenaMap {
    arena: Arc<Arena>,
    translation: Translation,
    arena_id: u32,
    stride: u64,
}

impl ArenaMap {
    pub(crate) fn new(
        arena: &Arc<Arena>,
        translation: Translation,
    ) -> Result<ArenaMap, DeviceError> {
        let stride = arena.stride();
        let across = DeviceError::FrameAcrossPages {
            stride,
            page: arena.page_size(),
        };
        // With whole frames in each page there is nothing to check frame by frame.
        if translation.shift < 63 && !(1u64 << translation.shift).is_multiple_of(u64::from(stride))
        {
            let within = |index: u32| {
                let offset = index as usize * stride as usize;
                translation.range(offset, stride as usize).is_some()
            };
            if !arena.indexes().all(within) {
                return Err(across);
            }
        }
        Ok(ArenaMap {
            arena_id: arena.id(),
            stride: u64::from(stride),
            arena: Arc::clone(arena),
            translation,
        })
    }

    /// Device address of the frame's first valid byte; `None` for a frame of another arena, which the device cannot reach.
    #[inline(always)]
    pub fn iova(&self, frame: &Frame) -> Option<u64> {
        if frame.arena_id() != self.arena_id {
            return None;
        }
        self.translation.at(self.arena.offset_of(frame))
    }

    /// Device address of the first byte of the buffer `index`, head-room included.
    #[inline(always)]
    pub fn addr_of_index(&self, index: u32) -> Option<u64> {
        if index >= self.arena.end_of_indexes() {
            return None;
        }
        self.translation.at(u64::from(index) * self.stride)
    }

    /// The arena.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;
    use crate::pool::Pool;

    fn arena(stride: u32) -> Arc<Arena> {
        Arena::new(ArenaConfig {
            frames: 64,
            stride,
            ..ArenaConfig::default()
        })
        .unwrap()
    }

    #[test]
    fn addresses_follow_the_pages() {
        let t = Translation::paged(vec![0x10_0000, 0x50_0000, 0x50_1000], 4096, 3 * 4096);
        assert_eq!(t.at(5), Some(0x10_0005));
        assert_eq!(t.at(4096), Some(0x50_0000));
        assert_eq!(t.at(3 * 4096), None);
        assert_eq!(t.range(0, 4096), Some(0x10_0000));
        assert_eq!(t.range(4000, 200), None);
        assert_eq!(t.range(5000, 4096), Some(0x50_0000 + 904));
        assert_eq!(t.range(8192, 4097), None);
        assert_eq!(t.range(0, 0), None);
    }

    #[test]
    fn frames_of_other_arenas_have_no_address() {
        let (ours, theirs) = (arena(2048), arena(2048));
        let map = ArenaMap::new(&ours, Translation::contiguous(1 << 32, ours.len())).unwrap();
        let (mut pool, mut other) = (Pool::new(&ours, 4), Pool::new(&theirs, 4));
        let (mut f, g) = (pool.get().unwrap(), other.get().unwrap());
        f.append(10).unwrap();
        let at = map.iova(&f).unwrap();
        assert_eq!(
            at,
            map.addr_of_index(f.index()).unwrap() + f.headroom() as u64
        );
        f.trim_front(3);
        assert_eq!(map.iova(&f), Some(at + 3));
        assert_eq!(map.iova(&g), None);
        assert_eq!(map.addr_of_index(64), None);
        pool.put(f);
        other.put(g);
    }

    #[test]
    fn frames_across_pages_need_pages_that_are_adjacent() {
        let odd = arena(2112);
        let pages = odd.len() / 4096;
        let adjacent: Vec<u64> = (0..pages as u64).map(|n| 0x100_0000 + n * 4096).collect();
        let scattered: Vec<u64> = (0..pages as u64).map(|n| 0x100_0000 + n * 8192).collect();
        let t = |table| Translation::paged(table, 4096, odd.len());
        assert!(ArenaMap::new(&odd, t(adjacent)).is_ok());
        assert!(matches!(
            ArenaMap::new(&odd, t(scattered.clone())),
            Err(DeviceError::FrameAcrossPages { stride: 2112, .. })
        ));
        // Frames of any size lie each in one huge page.
        let many = Arena::new(ArenaConfig {
            frames: 500,
            stride: 10_240,
            ..ArenaConfig::default()
        })
        .unwrap();
        let huge = Translation::paged(vec![7 << 21, 4 << 21, 9 << 21], 2 << 20, many.len());
        let map = ArenaMap::new(&many, huge).unwrap();
        assert_eq!(map.addr_of_index(205), Some((4 << 21) + 2048));
        let even = arena(2048);
        let t = Translation::paged(scattered, 4096, even.len());
        assert!(ArenaMap::new(&even, t).is_ok());
    }
}
