//! Memory of a memfd, for rings and records of devices.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use crate::arena::memfd;

/// Size of the huge pages that are asked for first.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Which pages to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Reserved huge pages if there are any, else normal ones.
    PreferHuge,
    /// Reserved huge pages, whose physical place never changes.
    Huge,
    /// Normal pages.
    Normal,
}

/// Zeroed, locked, shareable memory; unmapped on drop.
pub(crate) struct SharedMemory {
    map: MmapRaw,
    file: File,
    page: usize,
}

impl SharedMemory {
    /// At least `len` bytes, in whole pages.
    pub(crate) fn new(len: usize, pages: Pages) -> io::Result<SharedMemory> {
        if pages != Pages::Normal {
            match SharedMemory::with(len, HUGE_PAGE) {
                Err(e) if pages == Pages::Huge => return Err(e),
                Err(_) => {}
                done => return done,
            }
        }
        let memory = SharedMemory::with(len, 4096)?;
        // VFIO pins pages by itself; for others a lock keeps them from being swapped. A refusal costs time only.
        // SAFETY: the range is the mapping; locking changes no content.
        unsafe { libc::mlock(memory.base().as_ptr().cast(), memory.len()) };
        Ok(memory)
    }

    fn with(len: usize, page: usize) -> io::Result<SharedMemory> {
        let len = len
            .checked_next_multiple_of(page)
            .filter(|&n| n > 0 && isize::try_from(n).is_ok())
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let file = memfd("dma", page, len)?;
        let map = MmapOptions::new().len(len).populate().map_raw(&file)?;
        Ok(SharedMemory { map, file, page })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling())
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes per page.
    pub(crate) fn page(&self) -> usize {
        self.page
    }
}
