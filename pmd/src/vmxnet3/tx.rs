//! The transmit ring and its completions.
//!
//! A descriptor belongs to the device while its generation bit is the current one of its lap. The driver asks for a completion
//! of the last frame of a burst and of every 32nd, which frees all descriptors up to it. The doorbell is written once as many
//! frames as the device asked for are waiting, and by [`TxRing::ring_rest`] otherwise.
//!
//! A frame across two pages gets a descriptor for each: emulated devices behind an emulated IOMMU map each descriptor's bytes at
//! once and drop what lies in two pages. The frame rests in the slot of its last descriptor.
//!
//! Checksums are left to the device for frames of one descriptor: it looks for headers in the first.

use crate::arena::Arena;
use crate::checksum;
use crate::device::ring::FrameRing;
use crate::device::{ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio, fence_release};
use crate::frame::Frame;
use crate::pool::Pool;

use super::Fault;
use super::regs::*;

/// A completion is asked for at least this often.
const REPORT_EVERY: usize = 32;
/// Sent frames are looked for once this many are on their way.
const RECLAIM_FROM: u32 = 64;
/// The device may ask the driver to gather this many frames before a doorbell, not more.
const GATHER_MAX: u32 = 64;

/// What [`TxRing::send`] did.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// Frames given to the device.
    pub(super) packets: usize,
    /// Their bytes.
    pub(super) bytes: usize,
    /// Frames that cannot be sent; they went back to the pool.
    pub(super) errors: usize,
}

pub(super) struct TxRing {
    ring: DmaMem,
    done: DmaMem,
    /// Queue descriptor.
    queue: DmaMem,
    doorbell: Mmio,
    /// Frames that the device reads, by their last descriptor.
    frames: FrameRing,
    mask: u32,
    fill: u32,
    generation: u32,
    oldest: u32,
    /// Descriptors that the device has.
    in_flight: u32,
    /// Bytes of the arena's pages, and most descriptors that a frame can need.
    page: u64,
    most: u32,
    done_next: u32,
    done_generation: u32,
    deferred: u32,
    returned: Vec<Frame>,
}

impl TxRing {
    /// `frames` is empty and has 32 to 4096 slots; `doorbell` is the queue's own register.
    pub(super) fn new(
        device: &dyn Device,
        frames: FrameRing,
        arena: &Arena,
        queue: DmaMem,
        doorbell: Mmio,
    ) -> Result<TxRing, DeviceError> {
        let page = arena.page_size() as u64;
        let most = u32::try_from(arena.pages_of_a_frame()).unwrap_or(u32::MAX);
        let bytes = frames.size() as usize * DESCRIPTOR;
        Ok(TxRing {
            ring: device.dma_alloc(bytes, RING_ALIGN, IovaClass::Any)?,
            done: device.dma_alloc(bytes, RING_ALIGN, IovaClass::Any)?,
            queue,
            doorbell,
            returned: Vec::with_capacity(frames.size() as usize),
            mask: frames.size() - 1,
            frames,
            fill: 0,
            generation: 1,
            oldest: 0,
            in_flight: 0,
            page,
            most,
            done_next: 0,
            done_generation: CD_GENERATION,
            deferred: 0,
        })
    }

    /// Tells the device where the rings are, in the queue descriptor.
    pub(super) fn describe(&self, vector: u8) {
        let size = self.frames.size();
        self.queue.write64(Q_RING, self.ring.iova());
        self.queue.write64(Q_COMPLETION, self.done.iova());
        self.queue.write32(Q_RING_SIZE, size);
        self.queue.write32(Q_COMPLETION_SIZE, size);
        self.queue.write8(Q_VECTOR, vector);
    }

    /// Everything as before the first frame; gives the number of frames that were not sent.
    ///
    /// # Safety
    /// As for [`TxRing::take_back`].
    pub(super) unsafe fn restart(&mut self, pool: &mut Pool) -> u32 {
        // SAFETY: passed on to the caller.
        let lost = unsafe { self.take_back(pool) };
        self.ring.zero();
        self.done.zero();
        self.queue.write32(TXQ_DEFERRED, 0);
        self.queue.write32(TXQ_THRESHOLD, 1);
        (self.fill, self.generation) = (0, 1);
        (self.done_next, self.done_generation) = (0, CD_GENERATION);
        self.deferred = 0;
        lost
    }

    /// Frames that the device holds go to the pool; gives their number.
    ///
    /// # Safety
    /// The device is quiesced and has lost its bus-master right.
    pub(super) unsafe fn take_back(&mut self, pool: &mut Pool) -> u32 {
        let lost = self.frames.held();
        // SAFETY: passed on to the caller.
        unsafe { self.frames.drain(pool) };
        (self.oldest, self.in_flight) = (0, 0);
        lost
    }

    /// Fills descriptors from the front of `frames` and rings when it is time.
    #[inline]
    pub(super) fn send(
        &mut self,
        map: &ArenaMap,
        pool: &mut Pool,
        frames: &mut Vec<Frame>,
    ) -> Sent {
        let mut sent = Sent::default();
        // One descriptor stays empty.
        let free = (self.mask - self.in_flight) / self.most;
        let n = frames.len().min(free as usize);
        if n == 0 {
            return sent;
        }
        for (i, mut frame) in frames.drain(..n).enumerate() {
            let bytes = frame.len();
            let len = u32::try_from(bytes).unwrap_or(u32::MAX);
            let (Some(address), 14..=LEN_MASK) = (map.iova(&frame), len) else {
                sent.errors += 1;
                self.returned.push(frame);
                continue;
            };
            let report = i + 1 == n || sent.packets % REPORT_EVERY == REPORT_EVERY - 1;
            let pieces = self.pieces(address, len);
            let last = (self.fill + pieces - 1) & self.mask;
            if frame.checksum_left() && pieces > 1 {
                checksum::complete(&mut frame);
            }
            let partial = frame.checksum_left();
            if let Err(frame) = self.frames.put_at(last, frame) {
                sent.errors += 1;
                self.returned.push(frame);
                continue;
            }
            self.give(address, len, pieces, report, partial);
            sent.bytes += bytes;
            sent.packets += 1;
            self.deferred += 1;
        }
        if !self.returned.is_empty() {
            pool.put_bulk(&mut self.returned);
        }
        let threshold = self.queue.read32(TXQ_THRESHOLD).clamp(1, GATHER_MAX);
        if self.deferred >= threshold {
            self.ring_now();
        } else {
            self.queue.write32(TXQ_DEFERRED, self.deferred);
        }
        sent
    }

    /// Rings for frames that wait for more.
    #[inline]
    pub(super) fn ring_rest(&mut self) {
        if self.deferred > 0 {
            self.ring_now();
        }
    }

    /// True when it pays to look for completions.
    #[inline]
    pub(super) fn worth_reclaiming(&self, wanted: usize) -> bool {
        let free = (self.mask - self.in_flight) / self.most;
        self.in_flight >= RECLAIM_FROM || (free as usize) < wanted
    }

    /// Gives the frames that were sent to the pool.
    #[inline]
    pub(super) fn reclaim(&mut self, pool: &mut Pool) -> Result<(), Fault> {
        let mut result = Ok(());
        // At most one lap: each completion takes a descriptor at least.
        while self.in_flight > 0 {
            let at = self.done_next as usize * DESCRIPTOR;
            let word3 = self.done.load_acquire32(at + 12);
            if word3 & CD_GENERATION != self.done_generation {
                break;
            }
            let index = self.done.read32(at) & TCD_INDEX_MASK;
            let ahead = index.wrapping_sub(self.oldest) & self.mask;
            if index > self.mask || ahead >= self.in_flight || !self.frames.holds(index) {
                result = Err(Fault::TxIndex);
                break;
            }
            for _ in 0..=ahead {
                // SAFETY: the device reported the end of the last of these frames, and it sends in order.
                let frame = unsafe { self.frames.take(self.oldest) };
                // Only a frame's last descriptor holds it.
                self.returned.extend(frame.ok());
                self.oldest = (self.oldest + 1) & self.mask;
            }
            self.in_flight -= ahead + 1;
            self.done_next = (self.done_next + 1) & self.mask;
            if self.done_next == 0 {
                self.done_generation ^= CD_GENERATION;
            }
        }
        if !self.returned.is_empty() {
            pool.put_bulk(&mut self.returned);
        }
        result
    }

    /// Frames on their way.
    pub(super) fn in_flight(&self) -> u32 {
        self.frames.held()
    }

    /// Descriptors that a frame needs: one for each page that it touches.
    #[inline]
    fn pieces(&self, address: u64, len: u32) -> u32 {
        let last = (address & (self.page - 1)) + u64::from(len) - 1;
        // Below `most`, by the arena's stride.
        u32::try_from(last / self.page).unwrap_or(0) + 1
    }

    /// Writes a frame's descriptors; the generation of the first, which gives all of them away, comes last.
    #[inline]
    fn give(&mut self, address: u64, len: u32, pieces: u32, report: bool, partial: bool) {
        let mut last = TXD_END | if report { TXD_REPORT } else { 0 };
        let mut first = match pieces {
            1 => len,
            _ => self.give_rest(address, len, last),
        };
        if partial {
            first |= u32::from(checksum::FIELD_AT) << TXD_CHECKSUM_SHIFT;
            last |= TXD_CHECKSUM | u32::from(checksum::UDP_AT);
        }
        let at = self.fill as usize * DESCRIPTOR;
        self.ring.write64(at, address);
        self.ring
            .write32(at + 12, if pieces == 1 { last } else { 0 });
        self.ring
            .store_release32(at + 8, first | self.generation << TXD_GENERATION_SHIFT);
        self.in_flight += pieces;
        let next = self.fill + pieces;
        self.fill = next & self.mask;
        if next > self.mask {
            self.generation ^= 1;
        }
    }

    /// Writes all descriptors but the first; gives the length of the first.
    #[cold]
    fn give_rest(&mut self, address: u64, len: u32, last: u32) -> u32 {
        let piece = |at: u64, left: u32| {
            let room = self.page - (at & (self.page - 1));
            left.min(u32::try_from(room).unwrap_or(u32::MAX))
        };
        let first = piece(address, len);
        let (mut at, mut left) = (address + u64::from(first), len - first);
        let (mut slot, mut generation) = (self.fill, self.generation);
        while left > 0 {
            slot = (slot + 1) & self.mask;
            if slot == 0 {
                generation ^= 1;
            }
            let len = piece(at, left);
            left -= len;
            let place = slot as usize * DESCRIPTOR;
            self.ring.write64(place, at);
            self.ring
                .write32(place + 12, if left == 0 { last } else { 0 });
            self.ring
                .write32(place + 8, len | generation << TXD_GENERATION_SHIFT);
            at += u64::from(len);
        }
        first
    }

    #[inline]
    fn ring_now(&mut self) {
        self.deferred = 0;
        self.queue.write32(TXQ_DEFERRED, 0);
        fence_release();
        self.doorbell.write32(0, self.fill);
    }
}
