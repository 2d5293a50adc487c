//! Gets the arena's memory from the kernel: the best pages that are to be had.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use super::{ArenaConfig, ArenaError, HugePolicy};

const MIB2: usize = 2 << 20;
const GIB1: usize = 1 << 30;

/// A shared mapping of a memfd; unmapped on drop.
pub(super) struct Mapping {
    map: MmapRaw,
    file: File,
    page_size: usize,
    transparent_huge: bool,
    locked: bool,
}

impl Mapping {
    pub(super) fn new(len: usize, config: &ArenaConfig) -> Result<Mapping, ArenaError> {
        let mut refused = io::Error::from_raw_os_error(libc::ENOMEM);
        if config.huge != HugePolicy::Never {
            for page in [GIB1, MIB2] {
                // A 1 GiB page for a small arena would waste most of it.
                if page == GIB1 && len < GIB1 / 4 * 3 {
                    continue;
                }
                match Mapping::with_pages(len, page, config) {
                    Ok(mapping) => return Ok(mapping),
                    Err(e) => {
                        tracing::debug!(arena = %config.name, page, error = %e, "no huge pages");
                        refused = e;
                    }
                }
            }
        }
        if config.huge == HugePolicy::Require {
            return Err(ArenaError::NoHugePages {
                bytes: len,
                source: refused,
            });
        }
        let page = normal_page_size();
        Mapping::with_pages(len, page, config)
            .map_err(|source| ArenaError::NoMemory { bytes: len, source })
    }

    fn with_pages(len: usize, page: usize, config: &ArenaConfig) -> io::Result<Mapping> {
        let huge = page >= MIB2;
        let len = len
            .checked_next_multiple_of(page)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let file = memfd(&config.name, page)?;
        file.set_len(len as u64)?;
        let map = MmapOptions::new().len(len).populate().map_raw(&file)?;
        let transparent_huge = !huge
            && config.huge != HugePolicy::Never
            && map.advise(memmap2::Advice::HugePage).is_ok()
            && shmem_honours_advice();
        // Pages from the huge-page pool are never swapped, so only normal ones have anything to lock.
        let locked = huge || (config.lock
            && map
                .lock()
                .inspect_err(|e| {
                    tracing::info!(arena = %config.name, error = %e, "packet memory is not locked");
                })
                .is_ok());
        Ok(Mapping {
            map,
            file,
            page_size: page,
            transparent_huge,
            locked,
        })
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling())
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    pub(super) fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    pub(super) fn page_size(&self) -> usize {
        self.page_size
    }

    pub(super) fn transparent_huge(&self) -> bool {
        self.transparent_huge
    }

    pub(super) fn locked(&self) -> bool {
        self.locked
    }
}

fn memfd(name: &str, page: usize) -> io::Result<File> {
    let name: Vec<u8> = name
        .bytes()
        .filter(|&b| b != 0)
        .take(200)
        .chain([0])
        .collect();
    let mut flags = libc::MFD_CLOEXEC;
    if page >= MIB2 {
        // The page size is given as its logarithm, in the same place as for mmap.
        flags |= libc::MFD_HUGETLB | (page.trailing_zeros() << libc::MAP_HUGE_SHIFT);
    }
    // SAFETY: the name ends with a zero byte and outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr().cast(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    debug_assert!(file.as_raw_fd() >= 0);
    Ok(file)
}

fn shmem_honours_advice() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").is_ok_and(|s| {
        ["[advise]", "[always]", "[within_size]", "[force]"]
            .iter()
            .any(|m| s.contains(m))
    })
}

fn normal_page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let n = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(n).unwrap_or(4096)
}
