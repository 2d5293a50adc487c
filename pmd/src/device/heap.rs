//! All memory that one device can reach: its own, cut from chunks, and arenas.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dma::wipe;
use super::map::{Mapper, MemoryRange, Translation};
use super::memory::{HUGE_PAGE, Pages, SharedMemory};
use super::{ArenaMap, DeviceError, DmaMem, IovaClass};
use crate::arena::Arena;

/// Unit of allocation: two cache lines, so that neighbours never share a line that is prefetched in pairs.
const GRANULE: usize = 128;

/// What a device can reach. Owned by the device, which quiesces itself before it drops this.
pub(crate) struct DmaSpace {
    mapper: Arc<dyn Mapper>,
    pages: Pages,
    chunks: Mutex<Vec<Arc<Chunk>>>,
    arenas: Mutex<Vec<MappedArena>>,
}

impl DmaSpace {
    pub(crate) fn new(mapper: Arc<dyn Mapper>, pages: Pages) -> DmaSpace {
        DmaSpace {
            mapper,
            pages,
            chunks: Mutex::default(),
            arenas: Mutex::default(),
        }
    }

    /// See [`super::Device::dma_alloc`].
    pub(crate) fn allocate(
        &self,
        len: usize,
        align: usize,
        class: IovaClass,
    ) -> Result<DmaMem, DeviceError> {
        let refuse = |reason| DeviceError::DmaRequest { len, align, reason };
        if len == 0 || len > 1 << 30 {
            return Err(refuse("the size must be between 1 byte and 1 GiB"));
        }
        if !align.is_power_of_two() || align > HUGE_PAGE {
            return Err(refuse("the alignment must be a power of two up to 2 MiB"));
        }
        let align = align.max(GRANULE);
        let mut chunks = lock(&self.chunks);
        for chunk in chunks.iter().filter(|c| c.class == class) {
            if let Some(memory) = chunk.cut(len, align) {
                return Ok(memory);
            }
        }
        // Normal pages are only aligned to 4 KiB, device addresses of the whole chunk to 2 MiB.
        let chunk = Chunk::new(&self.mapper, len.max(HUGE_PAGE), self.pages, class)?;
        let memory = chunk
            .cut(len, align)
            .ok_or_else(|| refuse("no pages that are adjacent for the device"))?;
        chunks.push(chunk);
        Ok(memory)
    }

    /// See [`super::Device::map_arena_in`].
    pub(crate) fn map_arena(
        &self,
        arena: &Arc<Arena>,
        class: IovaClass,
    ) -> Result<ArenaMap, DeviceError> {
        let mut arenas = lock(&self.arenas);
        let known = arenas
            .iter()
            .find(|m| m.map.arena().id() == arena.id() && m.class == class);
        if let Some(known) = known {
            return Ok(known.map.clone());
        }
        let (file, file_offset) = arena
            .fd()
            .ok_or(DeviceError::Unsupported("an arena without a file"))?;
        let range = MemoryRange {
            base: NonNull::new(arena.base())
                .ok_or(DeviceError::Unsupported("an arena without memory"))?,
            len: arena.len(),
            page: arena.page_size(),
            file,
            file_offset,
        };
        // SAFETY: `MappedArena` keeps the arena until it is unmapped; a frame that a driver gives to the device is a
        // `RawFrame` meanwhile, without access.
        let translation = unsafe { self.mapper.map(&range, class)? };
        let map = match ArenaMap::new(arena, translation.clone()) {
            Ok(map) => map,
            Err(e) => {
                unmap_or_keep(&*self.mapper, &translation, Arc::clone(arena));
                return Err(e);
            }
        };
        arenas.push(MappedArena {
            map: map.clone(),
            class,
            translation,
            mapper: Arc::clone(&self.mapper),
        });
        Ok(map)
    }
}

struct MappedArena {
    map: ArenaMap,
    class: IovaClass,
    translation: Translation,
    mapper: Arc<dyn Mapper>,
}

impl Drop for MappedArena {
    fn drop(&mut self) {
        unmap_or_keep(
            &*self.mapper,
            &self.translation,
            Arc::clone(self.map.arena()),
        );
    }
}

/// Memory that the device may still reach must not be freed: it is kept for ever.
fn unmap_or_keep<T>(mapper: &dyn Mapper, translation: &Translation, memory: T) {
    if let Err(error) = mapper.unmap(translation) {
        tracing::error!(%error, "memory of a device cannot be unmapped and is kept");
        std::mem::forget(memory);
    }
}

/// A mapped piece of memory, cut into [`DmaMem`]s.
struct Chunk {
    memory: Option<SharedMemory>,
    base: NonNull<u8>,
    class: IovaClass,
    translation: Translation,
    mapper: Arc<dyn Mapper>,
    /// Free ranges: sorted by start, not touching each other.
    free: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: `base` is only used to make `DmaMem`s and to wipe them, by volatile accesses.
unsafe impl Send for Chunk {}
// SAFETY: as for Send.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(
        mapper: &Arc<dyn Mapper>,
        len: usize,
        pages: Pages,
        class: IovaClass,
    ) -> Result<Arc<Chunk>, DeviceError> {
        let memory = SharedMemory::new(len, pages)
            .map_err(|source| DeviceError::NoMemory { len, source })?;
        let range = MemoryRange {
            base: memory.base(),
            len: memory.len(),
            page: memory.page(),
            file: memory.file().as_fd(),
            file_offset: 0,
        };
        // SAFETY: the chunk unmaps before it frees the memory, and `DmaMem` never makes references to it.
        let translation = unsafe { mapper.map(&range, class)? };
        Ok(Arc::new(Chunk {
            base: memory.base(),
            free: Mutex::new(vec![(0, memory.len())]),
            memory: Some(memory),
            class,
            translation,
            mapper: Arc::clone(mapper),
        }))
    }

    /// First fit.
    fn cut(self: &Arc<Self>, len: usize, align: usize) -> Option<DmaMem> {
        let size = len.checked_next_multiple_of(GRANULE)?;
        let mut free = lock(&self.free);
        let mut found = None;
        'ranges: for (i, &(start, end)) in free.iter().enumerate() {
            let mut at = start;
            while let Some(iova) = self.translation.at(at as u64).filter(|_| at < end) {
                let skip = usize::try_from(iova.wrapping_neg() & (align as u64 - 1)).ok()?;
                at += skip;
                if at.checked_add(size).is_none_or(|e| e > end) {
                    break;
                }
                if let Some(iova) = self.translation.range(at, size)
                    && iova.is_multiple_of(align as u64)
                {
                    found = Some((i, start, end, at, iova));
                    break 'ranges;
                }
                // Not contiguous here: go on at the next page.
                at = (at + 1).next_multiple_of(4096);
            }
        }
        let (i, start, end, at, iova) = found?;
        let rest = [(start, at), (at + size, end)];
        free.splice(i..=i, rest.into_iter().filter(|(s, e)| s < e));
        drop(free);
        let piece = Arc::new(Piece {
            chunk: Arc::clone(self),
            start: at,
            size,
        });
        // SAFETY: the range was free and now belongs to the piece, which gives it back when the last user is gone.
        let memory = unsafe { DmaMem::from_parts(self.base.add(at), len, iova, piece) };
        memory.zero();
        Some(memory)
    }

    fn give_back(&self, start: usize, size: usize) {
        let mut free = lock(&self.free);
        let i = free.partition_point(|&(s, _)| s < start);
        free.insert(i, (start, start + size));
        // With the one behind, then with the one before.
        for left in [i, i.wrapping_sub(1)] {
            if let (Some(&(s, e)), Some(&(next, last))) =
                (free.get(left), free.get(left.wrapping_add(1)))
                && e == next
            {
                free.splice(left..=left + 1, [(s, last)]);
            }
        }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        unmap_or_keep(&*self.mapper, &self.translation, self.memory.take());
    }
}

/// The owner behind a [`DmaMem`].
struct Piece {
    chunk: Arc<Chunk>,
    start: usize,
    size: usize,
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: the piece owns the range, of the chunk's memory, until it is given back below.
        unsafe { wipe(self.chunk.base.add(self.start), self.size) };
        self.chunk.give_back(self.start, self.size);
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
