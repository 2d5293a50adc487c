//! The two receive rings of a queue and their completions.
//!
//! Ring 0 holds a buffer for each frame's head, large enough for the whole of it. Ring 1 holds a few buffers for the bodies of
//! frames that a device splits all the same; such frames are joined by copying when they fit, else dropped and counted.
//!
//! The device uses the buffers of a ring in order and may skip some: a skipped buffer stays in its slot and is given again.

use crate::device::ring::FrameRing;
use crate::device::{ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio, fence_release};
use crate::frame::Frame;
use crate::pool::Pool;

use super::Fault;
use super::regs::*;

/// Entries of ring 1.
pub(super) const BODIES: u32 = 32;
/// Free descriptors of ring 0 are filled this many at a time.
const REFILL_FROM: u32 = 32;

/// What a completion was.
pub(super) enum Received {
    /// A whole frame.
    Frame(Frame),
    /// A part of a frame that goes on.
    Part,
    /// A broken frame; its buffers are free again.
    Error,
}

/// One ring of buffers.
struct Buffers {
    ring: DmaMem,
    frames: FrameRing,
    mask: u32,
    /// [`RXD_BODY`] or 0.
    kind: u32,
    fill: u32,
    generation: u32,
    /// Oldest descriptor that the device has.
    oldest: u32,
    posted: u32,
}

pub(super) struct RxRing {
    rings: [Buffers; 2],
    done: DmaMem,
    done_mask: u32,
    done_next: u32,
    done_generation: u32,
    /// Queue descriptor.
    queue: DmaMem,
    doorbells: [Mmio; 2],
    /// Numbers of the two rings in completions.
    numbers: [u32; 2],
    buffer: u16,
    /// Frame that goes on, and whether it is still good.
    open: Option<(Frame, bool)>,
    stock: Vec<Frame>,
}

impl RxRing {
    /// `frames`: for the two rings, empty, of 32 to 4096 and of [`BODIES`] slots. `numbers`: of the two rings in completions.
    /// `buffer`: bytes to receive into each frame behind its default head-room.
    pub(super) fn new(
        device: &dyn Device,
        frames: [FrameRing; 2],
        queue: DmaMem,
        doorbells: [Mmio; 2],
        numbers: [u32; 2],
        buffer: u16,
    ) -> Result<RxRing, DeviceError> {
        // Room for a completion of every buffer: devices do not check for room. Both are powers of two.
        let [heads, bodies] = frames;
        let done = 2 * heads.size().max(bodies.size());
        let stock = Vec::with_capacity(heads.size() as usize);
        Ok(RxRing {
            rings: [
                Buffers::new(device, heads, 0)?,
                Buffers::new(device, bodies, RXD_BODY)?,
            ],
            done: device.dma_alloc(done as usize * DESCRIPTOR, RING_ALIGN, IovaClass::Any)?,
            done_mask: done - 1,
            done_next: 0,
            done_generation: CD_GENERATION,
            queue,
            doorbells,
            numbers,
            buffer,
            open: None,
            stock,
        })
    }

    /// Tells the device where the rings are, in the queue descriptor.
    pub(super) fn describe(&self, vector: u8) {
        let [heads, bodies] = &self.rings;
        self.queue.write64(Q_RING, heads.ring.iova());
        self.queue.write64(RXQ_RING1, bodies.ring.iova());
        self.queue.write64(Q_COMPLETION, self.done.iova());
        self.queue.write32(Q_RING_SIZE, heads.frames.size());
        self.queue.write32(RXQ_RING1_SIZE, bodies.frames.size());
        self.queue.write32(Q_COMPLETION_SIZE, self.done_mask + 1);
        self.queue.write8(Q_VECTOR, vector);
    }

    /// Everything as before the first frame, buffers given.
    ///
    /// # Safety
    /// As for [`RxRing::take_back`].
    pub(super) unsafe fn restart(&mut self, map: &ArenaMap, pool: &mut Pool) {
        // SAFETY: passed on to the caller.
        unsafe { self.take_back(pool) };
        for ring in &mut self.rings {
            ring.ring.zero();
            (ring.fill, ring.generation) = (0, 1);
            ring.oldest = 0;
        }
        self.done.zero();
        (self.done_next, self.done_generation) = (0, CD_GENERATION);
        self.refill_all(map, pool);
    }

    /// Frames that the device holds go to the pool.
    ///
    /// # Safety
    /// The device is quiesced and has lost its bus-master right.
    pub(super) unsafe fn take_back(&mut self, pool: &mut Pool) {
        for ring in &mut self.rings {
            // SAFETY: passed on to the caller.
            unsafe { ring.frames.drain(pool) };
            ring.posted = 0;
        }
        if let Some((frame, _)) = self.open.take() {
            pool.put(frame);
        }
    }

    /// The next completion; `None` when there is none.
    #[inline]
    pub(super) fn next(&mut self, pool: &mut Pool) -> Result<Option<Received>, Fault> {
        let at = self.done_next as usize * DESCRIPTOR;
        let word3 = self.done.load_acquire32(at + 12);
        if word3 & CD_GENERATION != self.done_generation {
            return Ok(None);
        }
        let word0 = self.done.read32(at);
        let word2 = self.done.read32(at + 8);
        self.done_next = (self.done_next + 1) & self.done_mask;
        if self.done_next == 0 {
            self.done_generation ^= CD_GENERATION;
        }
        let number = word0 >> RCD_RING_SHIFT & RCD_RING_MASK;
        let ring = match self.numbers.iter().position(|&n| n == number) {
            Some(ring) => &mut self.rings[ring],
            None => return Err(Fault::RxRing),
        };
        let mut frame = ring.complete(word0 & RCD_INDEX_MASK)?;
        let len = u16::try_from(word2 & LEN_MASK).unwrap_or(u16::MAX);
        let head = u16::try_from(frame.headroom()).unwrap_or(u16::MAX);
        if len > self.buffer || !frame.set_range(head, len) {
            pool.put(frame);
            return Err(Fault::RxLength);
        }
        let good = word2 & RCD_ERROR == 0;
        let whole = RCD_START | RCD_END;
        if word0 & whole == whole && self.open.is_none() && good && len >= 14 {
            frame.prefetch();
            return Ok(Some(Received::Frame(frame)));
        }
        Ok(Some(self.part(pool, frame, word0, good)))
    }

    /// Gives the device new buffers, when enough descriptors are free.
    #[inline]
    pub(super) fn refill(&mut self, map: &ArenaMap, pool: &mut Pool) {
        if self.rings[0].free() >= REFILL_FROM || self.rings[1].free() > BODIES / 2 {
            self.refill_all(map, pool);
        }
    }

    /// Buffers that the device has.
    pub(super) fn posted(&self) -> u32 {
        self.rings[0].posted
    }

    fn refill_all(&mut self, map: &ArenaMap, pool: &mut Pool) {
        for (ring, doorbell) in self.rings.iter_mut().zip(&self.doorbells) {
            let wanted = ring.free();
            if wanted == 0 {
                continue;
            }
            pool.get_bulk(&mut self.stock, wanted as usize);
            ring.fill(map, &mut self.stock, self.buffer);
            pool.put_bulk(&mut self.stock);
            if self.queue.read8(RXQ_WANTS_DOORBELL) != 0 {
                fence_release();
                doorbell.write32(0, ring.fill);
            }
        }
    }

    /// Everything that is not one good frame in one buffer.
    #[cold]
    fn part(&mut self, pool: &mut Pool, frame: Frame, word0: u32, good: bool) -> Received {
        let starts = word0 & RCD_START != 0;
        let ends = word0 & RCD_END != 0;
        let mut broken = false;
        // A start where a frame goes on ends that one.
        if starts && let Some((old, _)) = self.open.take() {
            pool.put(old);
            broken = true;
        }
        let (mut whole, fits) = match self.open.take() {
            Some((mut whole, fits)) => {
                let room = whole.append(frame.len());
                let joined = room.is_some_and(|room| {
                    room.copy_from_slice(frame.data());
                    true
                });
                pool.put(frame);
                (whole, fits && joined)
            }
            None => (frame, starts),
        };
        if !ends {
            self.open = Some((whole, fits && good));
            return if broken {
                Received::Error
            } else {
                Received::Part
            };
        }
        if fits && good && !broken && whole.len() >= 14 {
            return Received::Frame(whole);
        }
        whole.reset_default();
        pool.put(whole);
        Received::Error
    }
}

impl Buffers {
    fn new(device: &dyn Device, frames: FrameRing, kind: u32) -> Result<Buffers, DeviceError> {
        let bytes = frames.size() as usize * DESCRIPTOR;
        Ok(Buffers {
            ring: device.dma_alloc(bytes, RING_ALIGN, IovaClass::Any)?,
            mask: frames.size() - 1,
            frames,
            kind,
            fill: 0,
            generation: 1,
            oldest: 0,
            posted: 0,
        })
    }

    /// Descriptors that can be filled; one stays empty between the newest and the oldest.
    #[inline]
    fn free(&self) -> u32 {
        self.mask - self.posted
    }

    /// Takes out the buffer that the device has filled.
    #[inline]
    fn complete(&mut self, index: u32) -> Result<Frame, Fault> {
        let ahead = index.wrapping_sub(self.oldest) & self.mask;
        if index > self.mask || ahead >= self.posted {
            return Err(Fault::RxIndex);
        }
        self.oldest = (index + 1) & self.mask;
        self.posted -= ahead + 1;
        // SAFETY: the device reported that it has filled this buffer, which it had.
        unsafe { self.frames.take(index) }.map_err(|_| Fault::RxIndex)
    }

    fn fill(&mut self, map: &ArenaMap, stock: &mut Vec<Frame>, buffer: u16) {
        while self.free() > 0 {
            // SAFETY: this descriptor is not among those that the device has; it skipped the frame, if there is one.
            let skipped = unsafe { self.frames.take(self.fill) }.ok();
            let Some(frame) = skipped.or_else(|| stock.pop()) else {
                return;
            };
            let Some(address) = map.iova(&frame) else {
                // Another arena's: the caller's pool takes it back.
                stock.push(frame);
                return;
            };
            if let Err(frame) = self.frames.put_at(self.fill, frame) {
                stock.push(frame);
                return;
            }
            let at = self.fill as usize * DESCRIPTOR;
            self.ring.write64(at, address);
            self.ring.store_release32(
                at + 8,
                u32::from(buffer) | self.kind | self.generation << RXD_GENERATION_SHIFT,
            );
            self.posted += 1;
            self.fill = (self.fill + 1) & self.mask;
            if self.fill == 0 {
                self.generation ^= 1;
            }
        }
    }
}
