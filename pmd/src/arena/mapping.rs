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
    /// Bytes of the mapping before the first frame.
    skip: usize,
    /// Place of the first frame in the file.
    file_offset: u64,
    len: usize,
    page_size: usize,
    huge_bytes: usize,
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
                match Mapping::with_huge_pages(len, page, &config.name) {
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
        Mapping::with_normal_pages(len, config)
            .map_err(|source| ArenaError::NoMemory { bytes: len, source })
    }

    /// Pages from the system's pool of huge pages, which are never swapped.
    fn with_huge_pages(len: usize, page: usize, name: &str) -> io::Result<Mapping> {
        let len = round_up(len, page)?;
        let file = memfd(name, page, len)?;
        let map = MmapOptions::new().len(len).populate().map_raw(&file)?;
        Ok(Mapping {
            map,
            file,
            skip: 0,
            file_offset: 0,
            len,
            page_size: page,
            huge_bytes: len,
            locked: true,
        })
    }

    /// Normal pages, gathered into transparent huge ones where the kernel can, touched and locked.
    fn with_normal_pages(len: usize, config: &ArenaConfig) -> io::Result<Mapping> {
        let page = normal_page_size();
        let len = round_up(len, page)?;
        // One huge page more, so that a place where file and address are both aligned can be chosen.
        let room = len
            .checked_add(2 * MIB2)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let file = memfd(&config.name, page, room)?;
        let (map, skip, file_offset) = if config.huge == HugePolicy::Never {
            (MmapOptions::new().len(len).map_raw(&file)?, 0, 0)
        } else {
            map_congruent(&file, len)?
        };
        let mut mapping = Mapping {
            map,
            file,
            skip,
            file_offset,
            len,
            page_size: page,
            huge_bytes: 0,
            locked: false,
        };
        mapping.touch();
        if config.huge != HugePolicy::Never {
            // Only what is there can be gathered.
            mapping.huge_bytes = mapping.collapse();
        }
        if config.lock {
            // Not the whole mapping: what lies before and behind the frames is never used.
            // SAFETY: the range lies in the mapping; locking changes no content.
            if unsafe { libc::mlock(mapping.base().as_ptr().cast(), len) } == 0 {
                mapping.locked = true;
            } else {
                let error = io::Error::last_os_error();
                tracing::info!(arena = %config.name, %error, "packet memory is not locked");
            }
        }
        Ok(mapping)
    }

    /// Makes each aligned 2 MiB one huge page (Linux 6.1); returns how many bytes that worked for.
    fn collapse(&self) -> usize {
        let mut huge = 0;
        while huge + MIB2 <= self.len {
            let at = self.map.as_mut_ptr().wrapping_add(self.skip + huge);
            // SAFETY: the range lies in the mapping, which holds no references yet; the call changes no content.
            if unsafe { libc::madvise(at.cast(), MIB2, libc::MADV_COLLAPSE) } != 0 {
                tracing::debug!(error = %io::Error::last_os_error(), "no transparent huge pages");
                break;
            }
            huge += MIB2;
        }
        huge
    }

    /// Touches every page, so that none is missing when packets flow.
    fn touch(&self) {
        let base = self.base().as_ptr();
        for at in (0..self.len).step_by(self.page_size) {
            // SAFETY: the byte lies in the mapping; nobody else has it yet.
            unsafe { base.add(at).write_volatile(0) };
        }
    }

    /// The first frame.
    pub(super) fn base(&self) -> NonNull<u8> {
        NonNull::new(self.map.as_mut_ptr().wrapping_add(self.skip)).unwrap_or(NonNull::dangling())
    }

    /// Bytes for frames.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn file_offset(&self) -> u64 {
        self.file_offset
    }

    pub(super) fn page_size(&self) -> usize {
        self.page_size
    }

    /// Bytes in huge pages, of either kind.
    pub(super) fn huge_bytes(&self) -> usize {
        self.huge_bytes
    }

    pub(super) fn locked(&self) -> bool {
        self.locked
    }
}

/// Maps the file so that addresses and file offsets agree modulo 2 MiB, which huge pages need. Returns the mapping, and the
/// first place in it, and in the file, where both are multiples of 2 MiB.
fn map_congruent(file: &File, len: usize) -> io::Result<(MmapRaw, usize, u64)> {
    let map = |offset: usize| {
        MmapOptions::new()
            .offset(offset as u64)
            .len(len + MIB2)
            .map_raw(file)
    };
    // The address cannot be asked for, but what was just freed is given again, unless another thread takes it.
    let mut remainder = 0;
    for _ in 0..4 {
        let mapping = map(remainder)?;
        let now = mapping.as_mut_ptr().addr() % MIB2;
        if now == remainder {
            let skip = (MIB2 - remainder) % MIB2;
            return Ok((mapping, skip, (remainder + skip) as u64));
        }
        remainder = now;
    }
    // Works as well, without huge pages.
    Ok((map(0)?, 0, 0))
}

fn round_up(len: usize, page: usize) -> io::Result<usize> {
    len.checked_next_multiple_of(page)
        .filter(|n| n.checked_add(2 * MIB2).is_some())
        .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// A file of `len` bytes of memory in pages of `page` bytes. Whoever it is shared with cannot change its length: an access
/// behind a shortened file would end this process.
pub(crate) fn memfd(name: &str, page: usize, len: usize) -> io::Result<File> {
    let name: Vec<u8> = name
        .bytes()
        .filter(|&b| b != 0)
        .take(200)
        .chain([0])
        .collect();
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
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
    file.set_len(len as u64)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call takes a number, no pointer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn normal_page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let n = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(n).unwrap_or(4096)
}
