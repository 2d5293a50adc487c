//! The memory that a vhost-user peer shares with us.
//!
//! All of it is the peer's: it writes there at any time. So there are never Rust references to it; bytes are copied out once
//! and judged afterwards. Every address is looked up in the table of regions and checked against the region's end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use super::guard::Guard;
use crate::device::DmaMem;
use crate::virtio::ring::Tables;

/// Most regions of one peer (the protocol's own number).
pub const MAX_REGIONS: usize = 8;

/// A region as the peer describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where descriptors see it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the peer has it mapped: ring addresses are given so.
    pub user: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// Why a peer's memory is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No region, or more than [`MAX_REGIONS`].
    #[error("{0} memory regions; there may be 1 to {MAX_REGIONS}")]
    Count(usize),
    /// An empty region, or one that goes beyond the end of the address space.
    #[error("memory region {0} is empty or goes beyond the address space")]
    Range(usize),
    /// Two regions lie over each other.
    #[error("memory regions {0} and {1} overlap")]
    Overlap(usize, usize),
    /// The file is neither in tmpfs (memfd) nor in hugetlbfs: an access could wait for somebody else.
    #[error("memory region {0} is not in memory (memfd, tmpfs or hugetlbfs)")]
    Kind(usize),
    /// The file is shorter than the region.
    #[error("memory region {index} ends at {end:#x} of a file of {len:#x} bytes")]
    Short {
        /// Region.
        index: usize,
        /// Its end.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// The system refused.
    #[error("memory region {index}: {source}")]
    System {
        /// Region.
        index: usize,
        /// The system's answer.
        source: io::Error,
    },
    /// Too many regions of all peers together.
    #[error("too many memory regions, or no handler for SIGBUS")]
    Guard,
}

/// A peer's memory, mapped.
#[derive(Debug)]
pub struct PeerMemory {
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    guest: u64,
    user: u64,
    len: usize,
    base: NonNull<u8>,
    // Before the mapping, so that it ends first.
    guard: Guard,
    _map: MmapRaw,
}

// SAFETY: the bytes are accessed by volatile operations and copies only, which any thread may do.
unsafe impl Send for Region {}
// SAFETY: as for Send.
unsafe impl Sync for Region {}

impl PeerMemory {
    /// Maps the regions. Each file must be in memory and long enough.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped.
    pub fn map(regions: Vec<(RegionSpec, OwnedFd)>) -> Result<Arc<PeerMemory>, MemoryError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(MemoryError::Count(regions.len()));
        }
        check_ranges(&regions.iter().map(|(spec, _)| *spec).collect::<Vec<_>>())?;
        let mapped = regions
            .into_iter()
            .enumerate()
            .map(|(index, (spec, fd))| map_region(index, &spec, fd))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(PeerMemory { regions: mapped }))
    }

    /// Whether the peer took some of it away.
    #[inline(always)]
    pub fn lost(&self) -> bool {
        self.regions.iter().any(|r| r.guard.lost())
    }

    /// The part of a ring at the peer's own address `user`; `None` when it is not in one region or not aligned.
    pub fn ring_area(self: &Arc<Self>, user: u64, len: usize, align: usize) -> Option<DmaMem> {
        let base = self.regions.iter().find_map(|r| {
            let offset = usize::try_from(user.checked_sub(r.user)?).ok()?;
            let inside = offset.checked_add(len).is_some_and(|end| end <= r.len);
            // SAFETY: offset + len <= the region's length.
            inside.then(|| unsafe { r.base.add(offset) })
        })?;
        if base.addr().get() % align != 0 {
            return None;
        }
        let owner = Arc::clone(self);
        // SAFETY: the bytes lie in a region that `owner` keeps mapped, readable and writable; there are no references to it.
        Some(unsafe { DmaMem::from_parts(base, len, user, owner) })
    }

    /// Copies the bytes at `addr` out; false when they are not all in the peer's memory.
    #[inline(always)]
    pub fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        if let Some((from, run)) = self.find(addr)
            && out.len() <= run
        {
            // SAFETY: `run` bytes from `from` lie in a mapped region; `out` is ours alone. The peer may write at the same
            // time: then any mixture of bytes is copied, and only the copy is looked at.
            unsafe { from.copy_to_nonoverlapping(NonNull::from(&mut *out).cast(), out.len()) };
            return true;
        }
        self.read_pieces(addr, out)
    }

    /// Copies bytes to `addr`; false when not all of them go to the peer's memory.
    #[inline(always)]
    pub fn write(&self, addr: u64, bytes: &[u8]) -> bool {
        if let Some((to, run)) = self.find(addr)
            && bytes.len() <= run
        {
            // SAFETY: `run` bytes from `to` lie in a mapped region, to which there are no references.
            unsafe { to.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
            return true;
        }
        self.write_pieces(addr, bytes)
    }

    /// Starts loading the first two cache lines at `addr`.
    #[inline(always)]
    pub fn prefetch(&self, addr: u64) {
        if let Some((at, _)) = self.find(addr) {
            prefetch_line(at.as_ptr());
            prefetch_line(at.as_ptr().wrapping_add(64));
        }
    }

    /// The byte at `addr`, and how many there are in the region from there.
    #[inline(always)]
    fn find(&self, addr: u64) -> Option<(NonNull<u8>, usize)> {
        for r in &self.regions {
            let offset = addr.wrapping_sub(r.guest);
            if offset < r.len as u64 {
                let offset = usize::try_from(offset).ok()?;
                // SAFETY: offset is less than the region's length.
                return Some((unsafe { r.base.add(offset) }, r.len - offset));
            }
        }
        None
    }

    /// Regions may follow each other for the peer.
    #[cold]
    fn read_pieces(&self, mut addr: u64, mut out: &mut [u8]) -> bool {
        while !out.is_empty() {
            let Some((from, run)) = self.find(addr) else {
                return false;
            };
            let (now, rest) = out.split_at_mut(run.min(out.len()));
            // SAFETY: as in `read`.
            unsafe { from.copy_to_nonoverlapping(NonNull::from(&mut *now).cast(), now.len()) };
            let Some(next) = addr.checked_add(now.len() as u64) else {
                return rest.is_empty();
            };
            (addr, out) = (next, rest);
        }
        true
    }

    #[cold]
    fn write_pieces(&self, mut addr: u64, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Some((to, run)) = self.find(addr) else {
                return false;
            };
            let (now, rest) = bytes.split_at(run.min(bytes.len()));
            // SAFETY: as in `write`.
            unsafe { to.copy_from_nonoverlapping(NonNull::from(now).cast(), now.len()) };
            let Some(next) = addr.checked_add(now.len() as u64) else {
                return rest.is_empty();
            };
            (addr, bytes) = (next, rest);
        }
        true
    }
}

impl Tables for PeerMemory {
    fn descriptor(&self, addr: u64) -> Option<[u64; 2]> {
        let mut bytes = [0; 16];
        if !self.read(addr, &mut bytes) {
            return None;
        }
        let (words, _) = bytes.as_chunks::<8>();
        let [first, second] = words else {
            return None;
        };
        Some([u64::from_le_bytes(*first), u64::from_le_bytes(*second)])
    }
}

/// No region is empty, leaves the address space, or lies over another one.
fn check_ranges(specs: &[RegionSpec]) -> Result<(), MemoryError> {
    for (i, s) in specs.iter().enumerate() {
        let ends = [s.guest, s.user, s.offset].map(|start| start.checked_add(s.size));
        if s.size == 0 || isize::try_from(s.size).is_err() || ends.contains(&None) {
            return Err(MemoryError::Range(i));
        }
    }
    for (i, a) in specs.iter().enumerate() {
        for (j, b) in specs.iter().enumerate().skip(i + 1) {
            let apart = |x: u64, y: u64| x + a.size <= y || y + b.size <= x;
            if !apart(a.guest, b.guest) || !apart(a.user, b.user) {
                return Err(MemoryError::Overlap(i, j));
            }
        }
    }
    Ok(())
}

fn map_region(index: usize, spec: &RegionSpec, fd: OwnedFd) -> Result<Region, MemoryError> {
    let system = |source: io::Error| MemoryError::System { index, source };
    let kind = fstatfs(fd.as_fd())
        .map_err(|e| system(e.into()))?
        .filesystem_type();
    let file = File::from(fd);
    let meta = file.metadata().map_err(system)?;
    if !meta.is_file() || ![TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&kind) {
        return Err(MemoryError::Kind(index));
    }
    let end = spec.offset.saturating_add(spec.size);
    if end > meta.len() {
        return Err(MemoryError::Short {
            index,
            end,
            len: meta.len(),
        });
    }
    // Huge pages are mapped whole.
    let page = if kind == HUGETLBFS_MAGIC {
        meta.blksize().max(4096)
    } else {
        4096
    };
    let first = spec.offset - spec.offset % page;
    let to_usize = |n: u64| usize::try_from(n).map_err(|_| MemoryError::Range(index));
    let whole = end
        .checked_next_multiple_of(page)
        .ok_or(MemoryError::Range(index))?;
    let (whole, skip) = (to_usize(whole - first)?, to_usize(spec.offset - first)?);
    let map = MmapOptions::new()
        .offset(first)
        .len(whole)
        .map_raw(&file)
        .map_err(system)?;
    let start = map.as_mut_ptr();
    // SAFETY: the range is the whole mapping, which holds the peer's memory only and is unmapped after the guard has ended
    // (order of the fields).
    let guard = unsafe { Guard::new(start.expose_provenance(), whole, to_usize(page)?) };
    Ok(Region {
        guest: spec.guest,
        user: spec.user,
        len: to_usize(spec.size)?,
        base: NonNull::new(start.wrapping_add(skip)).ok_or(MemoryError::Guard)?,
        guard: guard.ok_or(MemoryError::Guard)?,
        _map: map,
    })
}

#[inline(always)]
fn prefetch_line(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
