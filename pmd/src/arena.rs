//! One memory mapping cut into equal frames.
//!
//! The memory comes from a memfd, so that the very same frames can be registered as an AF_XDP UMEM, mapped for DMA or shared
//! with a trusted device model. Huge pages are taken from the system's pool when enough are free (1 GiB, then 2 MiB);
//! otherwise normal pages, which the kernel is asked to gather into transparent huge ones (Linux 6.1; needs no reservation
//! and no privilege). All are touched at start and locked when allowed, so that the data path never faults.
//!
//! **Who owns a frame.** Each frame is at any time in exactly one of: the depot here, one pool, one [`Frame`] handle, one
//! device ([`RawFrame`]). The mapping outlives them all: an arena that is dropped while frames are missing keeps its mapping
//! for ever (logged and counted by [`leaked_mappings`]).
//!
//! **No frame lies on two huge pages.** Huge pages need not be neighbours in the memory that a device sees, and there are
//! devices that lose a packet which lies on two (QEMU's igb and e1000e), drivers that would need two descriptors for it, and
//! modes that cannot offer it (no IOMMU). Frames whose stride does not divide 2 MiB therefore leave out the number whose frame
//! would cross such an edge: it is never in the depot, and as many frames more are mapped (one in 205 of 10240 bytes). A
//! frame's address stays its number times the stride.
//!
//! **Head-room colours.** Frames whose stride is a multiple of 1 KiB would all begin on the same few cache sets. For such
//! strides the default head-room of neighbouring frames differs by up to seven cache lines, where at least 1664 bytes stay
//! free behind it. An odd number of cache lines as stride (2112, say) needs no colours.

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::frame::{Frame, RawFrame};
use crate::pool::PoolStats;

mod mapping;
mod reused;

use mapping::Mapping;
pub(crate) use mapping::memfd;
pub(crate) use reused::reused;

/// Smallest default head-room: room for the outer Ethernet, VLAN, IPv6, UDP and ESP headers and the IV.
pub const MIN_HEADROOM: u16 = 128;
/// Largest default head-room, which the frames' colours may add to.
pub const MAX_HEADROOM: u16 = crate::frame::HEADROOM_MAX - 7 * 64;

/// Smallest huge page; all larger ones are multiples of it.
const HUGE_PAGE: u64 = 2 << 20;

/// Which page size the arena asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePolicy {
    /// Huge pages when the system has enough free, else normal pages.
    #[default]
    Auto,
    /// Huge pages or an error.
    Require,
    /// Normal pages.
    Never,
}

/// What an arena looks like.
#[derive(Debug, Clone)]
pub struct ArenaConfig {
    /// Number of frames. See [`crate::pool`] for the sizing formula.
    pub frames: u32,
    /// Bytes per frame: a multiple of 64, at most 65472. AF_XDP is fastest with 2048 or 4096.
    pub stride: u32,
    /// Smallest default head-room in bytes, at least [`MIN_HEADROOM`].
    pub headroom: u16,
    /// Page size.
    pub huge: HugePolicy,
    /// Whether to lock the pages into memory (when allowed; a refusal is logged).
    pub lock: bool,
    /// Shown in logs and in `/proc/PID/maps`.
    pub name: String,
}

impl Default for ArenaConfig {
    fn default() -> Self {
        ArenaConfig {
            frames: 8192,
            stride: 2048,
            headroom: 192,
            huge: HugePolicy::Auto,
            lock: true,
            name: "frames".into(),
        }
    }
}

/// Why there is no arena. The first four are faults of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// No frames asked for.
    #[error("an arena needs at least one frame")]
    NoFrames,
    /// The stride is not a multiple of 64 or not in 256..=65472.
    #[error("frame size {0} is not a multiple of 64 between 256 and 65472")]
    Stride(u32),
    /// Less head-room than encapsulation in place needs, or more than anybody does.
    #[error("head-room of {0} bytes is not between {MIN_HEADROOM} and {MAX_HEADROOM}")]
    Headroom(u16),
    /// The head-room leaves no room for a packet.
    #[error("head-room of {headroom} bytes leaves no room for a packet in frames of {stride}")]
    NoRoom {
        /// Asked-for head-room.
        headroom: u16,
        /// Asked-for frame size.
        stride: u32,
    },
    /// frames × stride is more than the address space, or than 2³² frames.
    #[error("{frames} frames of {stride} bytes are more than the address space")]
    TooLarge {
        /// Asked-for number of frames.
        frames: u32,
        /// Asked-for frame size.
        stride: u32,
    },
    /// Huge pages were required and the system has not enough of them free (see `vm.nr_hugepages`).
    #[error("no huge pages for {bytes} bytes: {source}")]
    NoHugePages {
        /// Bytes needed.
        bytes: usize,
        /// The kernel's answer to the last attempt.
        source: std::io::Error,
    },
    /// The kernel refused the memory.
    #[error("no memory for {bytes} bytes: {source}")]
    NoMemory {
        /// Bytes needed.
        bytes: usize,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// One mapping cut into frames; see the module text.
pub struct Arena {
    mapping: Option<Mapping>,
    base: NonNull<u8>,
    len: usize,
    id: u32,
    frames: u32,
    /// One more than the largest index; see the module text for those that are left out.
    end: u32,
    stride: u16,
    headroom: u16,
    colours: u16,
    name: String,
    depot: Mutex<Vec<u32>>,
    /// Length of the depot, readable without its lock.
    level: AtomicU32,
    pools: Mutex<Vec<Arc<PoolStats>>>,
}

// SAFETY: the arena itself never reads or writes through `base`; it hands out disjoint frames, each owned by one handle.
unsafe impl Send for Arena {}
// SAFETY: as for Send; all other state is behind locks and atomics.
unsafe impl Sync for Arena {}

static NEXT_ID: AtomicU32 = AtomicU32::new(1);
static LEAKED_MAPPINGS: AtomicU64 = AtomicU64::new(0);
static LIVE: Mutex<Vec<(u32, Weak<Arena>)>> = Mutex::new(Vec::new());

/// Arenas of this process that could not be unmapped because frames were missing when they ended. Anything but 0 is a bug.
pub fn leaked_mappings() -> u64 {
    LEAKED_MAPPINGS.load(Relaxed)
}

impl Arena {
    /// Maps the memory and cuts it into frames, all of them in the depot.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn new(config: ArenaConfig) -> Result<Arc<Arena>, ArenaError> {
        let ArenaConfig {
            frames,
            stride,
            headroom,
            ..
        } = config;
        if frames == 0 {
            return Err(ArenaError::NoFrames);
        }
        let stride16 = match u16::try_from(stride) {
            Ok(s) if s >= 256 && s % 64 == 0 => s,
            _ => return Err(ArenaError::Stride(stride)),
        };
        if !(MIN_HEADROOM..=MAX_HEADROOM).contains(&headroom) {
            return Err(ArenaError::Headroom(headroom));
        }
        if u32::from(headroom) + 64 > stride {
            return Err(ArenaError::NoRoom { headroom, stride });
        }
        let end = end_of_indexes(frames, stride).ok_or(ArenaError::TooLarge { frames, stride })?;
        let len = usize::try_from(u64::from(end) * u64::from(stride))
            .ok()
            .filter(|&n| isize::try_from(n).is_ok())
            .ok_or(ArenaError::TooLarge { frames, stride })?;
        let mapping = Mapping::new(len, &config)?;
        tracing::info!(
            arena = %config.name,
            frames,
            stride,
            bytes = mapping.len(),
            page_size = mapping.page_size(),
            huge_bytes = mapping.huge_bytes(),
            locked = mapping.locked(),
            "packet memory mapped"
        );
        let arena = Arc::new(Arena {
            base: mapping.base(),
            len: mapping.len(),
            mapping: Some(mapping),
            id: NEXT_ID.fetch_add(1, Relaxed),
            frames,
            end,
            stride: stride16,
            headroom,
            colours: colours(stride16, headroom),
            name: config.name,
            depot: Mutex::new((0..end).rev().filter(|&i| is_whole(i, stride)).collect()),
            level: AtomicU32::new(frames),
            pools: Mutex::new(Vec::new()),
        });
        lock(&LIVE).push((arena.id, Arc::downgrade(&arena)));
        Ok(arena)
    }

    /// Number of frames.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Indexes of frames, ascending.
    pub fn indexes(&self) -> impl Iterator<Item = u32> + use<> {
        let stride = self.stride();
        (0..self.end).filter(move |&i| is_whole(i, stride))
    }

    /// One more than the largest index of a frame.
    #[inline(always)]
    pub fn end_of_indexes(&self) -> u32 {
        self.end
    }

    /// The number of pages on which a frame lies at most.
    pub fn pages_of_a_frame(&self) -> usize {
        let (page, stride) = (self.page_size(), usize::from(self.stride));
        if page.is_multiple_of(stride) || page as u64 >= HUGE_PAGE {
            return 1;
        }
        stride.div_ceil(page) + 1
    }

    /// Bytes per frame.
    pub fn stride(&self) -> u32 {
        u32::from(self.stride)
    }

    /// Smallest default head-room in bytes.
    pub fn headroom(&self) -> usize {
        usize::from(self.headroom)
    }

    /// The largest packet that fits behind every frame's default head-room, with `tailroom` bytes left behind it.
    pub fn largest_packet(&self, tailroom: usize) -> usize {
        let most = usize::from(self.headroom) + 64 * (usize::from(self.colours) - 1);
        usize::from(self.stride).saturating_sub(most + tailroom)
    }

    /// First byte of the mapping, page-aligned. For registration with devices only: the bytes belong to the frames' owners.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped: frames × stride, with what is left out, rounded up to whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: an arena has at least one frame.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd behind the mapping and the place of the first frame in it, to share it with a device model.
    pub fn fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.mapping
            .as_ref()
            .map(|m| (m.file().as_fd(), m.file_offset()))
    }

    /// How many of the bytes lie in huge pages, reserved or transparent ones.
    pub fn huge_bytes(&self) -> usize {
        self.mapping.as_ref().map_or(0, Mapping::huge_bytes)
    }

    /// Size of the pages that were got, in bytes.
    pub fn page_size(&self) -> usize {
        self.mapping.as_ref().map_or(4096, Mapping::page_size)
    }

    /// Whether the pages cannot be swapped or moved out by the kernel's memory reclaim.
    pub fn is_locked(&self) -> bool {
        self.mapping.as_ref().is_some_and(Mapping::locked)
    }

    /// The name given at start.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity in this process; the same as [`Frame::arena_id`] of its frames.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether the frame is one of this arena's.
    #[inline(always)]
    pub fn owns(&self, frame: &Frame) -> bool {
        frame.arena_id() == self.id
    }

    /// Distance of the frame's first valid byte from the start of the mapping. The frame must be this arena's
    /// ([`Arena::owns`]).
    #[inline(always)]
    pub fn offset_of(&self, frame: &Frame) -> u64 {
        debug_assert!(self.owns(frame));
        (frame.data_ptr().addr() - self.base.as_ptr().addr()) as u64
    }

    /// Distance of the first valid byte of a device-owned frame from the start of the mapping.
    #[inline(always)]
    pub fn offset_of_raw(&self, raw: &RawFrame) -> u64 {
        u64::from(raw.index) * u64::from(self.stride) + u64::from(raw.offset)
    }

    /// Takes a frame back from a device.
    ///
    /// # Safety
    /// The device reads and writes the buffer no more: it reported the completion, or its reset is proven. `raw` came from
    /// a frame of this arena.
    #[inline(always)]
    pub unsafe fn from_raw(&self, raw: RawFrame) -> Frame {
        debug_assert_eq!(raw.arena, self.id);
        // SAFETY: a RawFrame cannot be duplicated, so it is the frame's only owner beside the device, which is done with it.
        let mut frame = unsafe { self.frame_at_index(raw.index) };
        let fits = frame.set_range(raw.offset, raw.len);
        debug_assert!(fits);
        frame
    }

    /// Takes a frame back from a device that names it by the place of its data in the mapping, as an AF_XDP descriptor does.
    /// `None` when `offset..offset + len` does not lie in one frame: a broken device; the frame stays lost.
    ///
    /// # Safety
    /// The frame around `offset` was given to the device by [`Frame::into_raw`], its `RawFrame` is gone or will not be used,
    /// and the device reads and writes the buffer no more.
    #[inline(always)]
    pub unsafe fn frame_at(&self, offset: u64, len: u32) -> Option<Frame> {
        let stride = u64::from(self.stride);
        let index = u32::try_from(offset / stride)
            .ok()
            .filter(|&i| i < self.end)?;
        let within = u16::try_from(offset % stride).ok()?;
        let len = u16::try_from(len).ok()?;
        if u32::from(within) + u32::from(len) > u32::from(self.stride) {
            return None;
        }
        // SAFETY: the index is in range; ownership is the caller's promise.
        let mut frame = unsafe { self.frame_at_index(index) };
        frame.set_range(within, len);
        Some(frame)
    }

    /// Frames that are neither in the depot nor in a pool: held by workers, rings, devices, or lost. Exact when nothing moves.
    pub fn outstanding(&self) -> u32 {
        let cached: u64 = lock(&self.pools).iter().map(|p| p.cached.value()).sum();
        let home = u64::from(self.level.load(Relaxed)) + cached;
        self.frames
            .saturating_sub(u32::try_from(home).unwrap_or(u32::MAX))
    }

    /// Frames in the shared depot.
    #[inline(always)]
    pub fn depot_level(&self) -> u32 {
        self.level.load(Relaxed)
    }

    /// Handle of the frame at `index`.
    ///
    /// # Safety
    /// `index < end`, and the caller owns that frame (took its index out of the depot or a pool, or back from a device).
    #[inline(always)]
    pub(crate) unsafe fn frame_at_index(&self, index: u32) -> Frame {
        // The number of colours is a power of two.
        let colour = u16::try_from(index & u32::from(self.colours - 1)).unwrap_or(0) * 64;
        // SAFETY: index < end, so the frame lies in the mapping; the memory of a memfd is zero-initialised; ownership is
        // the caller's promise.
        unsafe {
            let base = self.base.add(index as usize * usize::from(self.stride));
            Frame::from_parts(base, self.id, index, self.stride, self.headroom + colour)
        }
    }

    /// Moves up to `n` indexes from the depot to `out`; returns how many.
    pub(crate) fn take(&self, out: &mut Vec<u32>, n: usize) -> usize {
        let mut depot = lock(&self.depot);
        let from = depot.len().saturating_sub(n);
        let taken = depot.len() - from;
        out.extend(depot.drain(from..));
        self.store_level(&depot);
        taken
    }

    /// Moves all indexes of `indexes` to the depot. They must be owned by the caller and of this arena.
    pub(crate) fn give(&self, indexes: impl Iterator<Item = u32>) {
        let mut depot = lock(&self.depot);
        depot.extend(indexes);
        self.store_level(&depot);
    }

    pub(crate) fn register_pool(&self, stats: &Arc<PoolStats>) {
        lock(&self.pools).push(Arc::clone(stats));
    }

    pub(crate) fn unregister_pool(&self, stats: &Arc<PoolStats>) {
        lock(&self.pools).retain(|p| !Arc::ptr_eq(p, stats));
    }

    /// The counters of all pools that exist now.
    pub fn pool_stats(&self) -> Vec<Arc<PoolStats>> {
        lock(&self.pools).clone()
    }

    fn store_level(&self, depot: &[u32]) {
        self.level
            .store(u32::try_from(depot.len()).unwrap_or(u32::MAX), Relaxed);
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("name", &self.name)
            .field("frames", &self.frames)
            .field("stride", &self.stride)
            .field("depot", &self.depot_level())
            .finish_non_exhaustive()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        lock(&LIVE).retain(|(id, _)| *id != self.id);
        // Pools hold an Arc of the arena, so none is left: what is not in the depot is in a handle or a device.
        let home = lock(&self.depot).len();
        if home != self.frames as usize
            && let Some(mapping) = self.mapping.take()
        {
            LEAKED_MAPPINGS.fetch_add(1, Relaxed);
            tracing::error!(
                arena = %self.name,
                missing = self.frames as usize - home,
                "frames are missing: the mapping is kept"
            );
            std::mem::forget(mapping);
        }
    }
}

/// Puts the frame `index` of the arena `id` into its depot; nothing to do when the arena is gone (its mapping stays).
pub(crate) fn bring_home(id: u32, index: u32) {
    let arena = lock(&LIVE)
        .iter()
        .find(|(live, _)| *live == id)
        .and_then(|(_, weak)| weak.upgrade());
    if let Some(arena) = arena {
        arena.give(std::iter::once(index));
    }
}

/// Whether the frame at `index` lies in one huge page.
fn is_whole(index: u32, stride: u32) -> bool {
    let first = u64::from(index) * u64::from(stride);
    let last = first + u64::from(stride) - 1;
    first / HUGE_PAGE == last / HUGE_PAGE
}

/// The smallest number below which `frames` indexes are of whole frames; `None` when it is too large for an index.
fn end_of_indexes(frames: u32, stride: u32) -> Option<u32> {
    // Edges below `end` that lie inside a frame. A frame is smaller than a huge page, so each costs one frame.
    let crossed = |end: u64| {
        let edges = (end * u64::from(stride) - 1) / HUGE_PAGE;
        // Every so many edges a frame ends on one: the odd part of the stride, as a huge page is a power of two.
        edges - edges / u64::from(stride >> stride.trailing_zeros())
    };
    let mut end = u64::from(frames);
    // Each round adds what the last one's additions cost, a small part of them.
    while end - crossed(end) < u64::from(frames) {
        end = u64::from(frames) + crossed(end);
    }
    u32::try_from(end).ok()
}

/// How many different head-rooms neighbouring frames get, a power of two; see the module text.
fn colours(stride: u16, headroom: u16) -> u16 {
    if !stride.is_multiple_of(1024) {
        return 1;
    }
    let most = stride.saturating_sub(headroom).saturating_sub(1664) / 64 + 1;
    // A power of two, so that a frame's colour is cheap to find.
    (1 << most.ilog2()).min(8)
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
