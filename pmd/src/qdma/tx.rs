//! Transmit rings, and the queue in which the device reports what was sent.
//!
//! Completion is read from the descriptors themselves, so that no register is read on the packet's way. The reports are taken
//! off their queue every so often, because the device stops when it is full; one may free a descriptor out of order.

use std::sync::Arc;

use super::descriptor::{
    ADDR, CTRL, DESCRIPTOR, DONE, DROP, LENGTH, MSG0, MSG1, MSG2, MSG3, NEXT, TxMsg,
};
use super::regs::{self, ring};
use super::{QdmaCounters, QdmaError};
use crate::arena::Arena;
use crate::device::ring::FrameRing;
use crate::device::{ArenaMap, Device, DmaMem, IovaClass, Mmio, fence_release};
use crate::frame::Frame;
use crate::pool::Pool;

/// Descriptors in a transmit ring. There is no register for it: descriptors are a list, each names the next.
pub(super) const TX_ENTRIES: u32 = 1024;
/// Reports that may wait before they are taken off; below the depth of either queue.
const REPORTS_MOST: u32 = 256;

/// A frame that left memory, or did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Ring.
    pub ring: u8,
    /// The sender's own mark.
    pub cookie: u64,
    /// The device threw it away: nothing will come of it.
    pub dropped: bool,
}

/// One transmit ring.
pub(super) struct TxRing {
    pub(super) number: u8,
    mem: DmaMem,
    slots: FrameRing,
    cookies: Box<[u64]>,
    at: usize,
    unannounced: bool,
    /// Counts of frames pushed, and of descriptors free again in order, without end.
    pushed: u32,
    freed: u32,
}

impl TxRing {
    pub(super) fn new(
        device: &dyn Device,
        number: u8,
        arena: &Arc<Arena>,
    ) -> Result<TxRing, QdmaError> {
        let len = DESCRIPTOR * TX_ENTRIES as usize;
        Ok(TxRing {
            number,
            mem: device.dma_alloc(len, 4096, IovaClass::Below4G)?,
            slots: FrameRing::new(TX_ENTRIES, arena).ok_or(QdmaError::RingSize(TX_ENTRIES))?,
            cookies: vec![0; TX_ENTRIES as usize].into(),
            at: regs::tx_ring(number),
            unannounced: false,
            pushed: 0,
            freed: 0,
        })
    }

    /// Points the stopped device at the empty ring.
    pub(super) fn start(
        &mut self,
        regs: &Mmio,
        lossless: bool,
        reports: usize,
    ) -> Result<(), QdmaError> {
        for slot in 0..TX_ENTRIES {
            let d = descriptor(slot);
            self.mem.write32(d + CTRL, DONE);
            self.mem.write32(d + NEXT, (slot + 1) % TX_ENTRIES);
        }
        let mut blocking = regs.read32(self.at + ring::BLOCKING);
        blocking &= !(regs::TX_DROP_EN | regs::TX_IRQ_QUEUE_1);
        if !lossless {
            blocking |= regs::TX_DROP_EN;
        }
        if reports == 1 {
            blocking |= regs::TX_IRQ_QUEUE_1;
        }
        regs.write32(self.at + ring::BLOCKING, blocking);
        regs.write32(self.at + ring::BASE, super::low(self.mem.iova())?);
        regs.write32(self.at + ring::CPU, 0);
        regs.write32(self.at + ring::DMA, 0);
        self.unannounced = false;
        Ok(())
    }

    /// Free descriptors; the last one is never used, as equal indexes mean an empty ring.
    pub(super) fn room(&self) -> u32 {
        (TX_ENTRIES - 1).saturating_sub(self.pushed.wrapping_sub(self.freed))
    }

    /// Puts a frame into the ring without telling the device yet.
    pub(super) fn push(
        &mut self,
        map: &ArenaMap,
        frame: Frame,
        msg: TxMsg,
        cookie: u64,
    ) -> Result<(), Frame> {
        let address = map.iova(&frame).and_then(|a| u32::try_from(a).ok());
        let length = u32::try_from(frame.len()).ok().filter(|&n| n <= LENGTH);
        let (Some(address), Some(length)) = (address, length) else {
            return Err(frame);
        };
        if self.room() == 0 {
            return Err(frame);
        }
        let slot = self.slots.push(frame)?;
        let d = descriptor(slot);
        self.mem.write32(d + ADDR, address);
        self.mem.write32(d + NEXT, (slot + 1) % TX_ENTRIES);
        self.mem.write32(d + MSG0, msg.msg0);
        self.mem.write32(d + MSG1, msg.msg1);
        self.mem.write32(d + MSG2, msg.msg2);
        self.mem.write32(d + MSG3, 0);
        // Clears what the last round left there.
        self.mem.write32(d + CTRL, length);
        if let Some(place) = self.cookies.get_mut(slot as usize) {
            *place = cookie;
        }
        self.pushed = self.pushed.wrapping_add(1);
        self.unannounced = true;
        Ok(())
    }

    /// One doorbell for all frames pushed since the last.
    pub(super) fn kick(&mut self, regs: &Mmio) -> bool {
        if !std::mem::take(&mut self.unannounced) {
            return false;
        }
        fence_release();
        regs.write32(self.at + ring::CPU, self.slots.head());
        true
    }

    /// Frees the oldest descriptors as far as they are done.
    pub(super) fn reap(&mut self, pool: &mut Pool, each: &mut impl FnMut(Sent)) -> u32 {
        let before = self.freed;
        while self.freed != self.pushed {
            let slot = self.freed % TX_ENTRIES;
            if self.slots.holds(slot) && !self.free(slot, pool, each) {
                break;
            }
            self.freed = self.freed.wrapping_add(1);
        }
        self.freed.wrapping_sub(before)
    }

    /// Frees one descriptor, if the device is through with it.
    fn free(&mut self, slot: u32, pool: &mut Pool, each: &mut impl FnMut(Sent)) -> bool {
        let ctrl = self.mem.load_acquire32(descriptor(slot) + CTRL);
        if ctrl & (DONE | DROP) == 0 {
            return false;
        }
        // SAFETY: the device reported the descriptor as done or dropped, so it reads the buffer no more.
        let Ok(frame) = (unsafe { self.slots.take(slot) }) else {
            return false;
        };
        pool.put(frame);
        each(Sent {
            ring: self.number,
            cookie: self.cookies.get(slot as usize).copied().unwrap_or(0),
            dropped: ctrl & DROP != 0,
        });
        true
    }

    /// Takes all frames back.
    ///
    /// # Safety
    /// The device was stopped.
    pub(super) unsafe fn reclaim(&mut self, pool: &mut Pool) {
        // SAFETY: passed on to the caller.
        unsafe { self.slots.drain(pool) };
        self.pushed = 0;
        self.freed = 0;
    }

    pub(super) fn held(&self) -> u32 {
        self.slots.held()
    }

    /// Makes the device forget what it was given: it must be stopped.
    pub(super) fn forget(&self, regs: &Mmio) {
        let dma = regs.read32(self.at + ring::DMA);
        regs.write32(self.at + ring::CPU, dma);
    }
}

/// A queue of transmit reports: an array of words that the device fills round and round.
pub(super) struct Reports {
    mem: DmaMem,
    index: usize,
    depth: u32,
    /// Descriptors freed since the queue was last looked at.
    owed: u32,
}

impl Reports {
    pub(super) fn new(device: &dyn Device, index: usize) -> Result<Reports, QdmaError> {
        let depth = if index == 0 { 2048 } else { 1024 };
        Ok(Reports {
            mem: device.dma_alloc(4 * depth as usize, 4096, IovaClass::Below4G)?,
            index,
            depth,
            owed: 0,
        })
    }

    pub(super) fn start(&mut self, regs: &Mmio) -> Result<(), QdmaError> {
        for i in 0..self.depth as usize {
            self.mem.write32(4 * i, u32::MAX);
        }
        let at = &regs::TX_IRQ[self.index & 1];
        regs.write32(at.base, super::low(self.mem.iova())?);
        regs.write32(at.cfg, 1 << regs::IRQ_HIGH_SHIFT | self.depth);
        self.owed = 0;
        Ok(())
    }

    /// Whether so much was sent that the queue must be looked at.
    pub(super) fn due(&mut self, freed: u32) -> bool {
        self.owed = self.owed.saturating_add(freed);
        self.owed >= REPORTS_MOST
    }

    /// Takes all reports off the queue. Each must name a descriptor that is done.
    pub(super) fn drain(
        &mut self,
        regs: &Mmio,
        rings: &mut [TxRing],
        pool: &mut Pool,
        counters: &QdmaCounters,
        each: &mut impl FnMut(Sent),
    ) {
        self.owed = 0;
        let at = &regs::TX_IRQ[self.index & 1];
        let status = regs.read32(at.status);
        let (mut head, queued) = (
            status & regs::IRQ_LOW,
            status >> regs::IRQ_HIGH_SHIFT & regs::IRQ_LOW,
        );
        if queued > self.depth {
            // All ones from a device that is gone, or nonsense.
            counters.bad_reports.add(1);
            return;
        }
        let mut taken = 0;
        while taken < queued {
            head %= self.depth;
            let place = 4 * head as usize;
            let entry = self.mem.load_acquire32(place);
            if entry & 0xff == 0xff && entry >> 16 & 0x1f == 0x1f {
                break;
            }
            self.mem.write32(place, u32::MAX);
            head += 1;
            taken += 1;
            let (number, slot) = (entry >> 16 & 0x1f, entry & 0xffff);
            let ring = rings.iter_mut().find(|r| u32::from(r.number) == number);
            let Some(ring) = ring.filter(|_| slot < TX_ENTRIES) else {
                counters.bad_reports.add(1);
                continue;
            };
            // Mostly it was freed already, by its descriptor.
            if ring.slots.holds(slot) {
                ring.free(slot, pool, each);
            }
        }
        let mut left = taken;
        while left > 0 {
            let n = left.min(regs::IRQ_CLEAR_MOST);
            regs.write32(at.clear, n);
            left -= n;
        }
    }
}

fn descriptor(slot: u32) -> usize {
    slot as usize * DESCRIPTOR
}
