//! Receive rings: single-buffer frames. What the device spreads over several descriptors is reported once, without content.

use std::sync::Arc;

use super::descriptor::{
    ADDR, CTRL, DESCRIPTOR, DONE, DROP, LENGTH, MORE, MSG0, MSG1, MSG2, MSG3, NEXT, RxMsg,
};
use super::regs::{self, ring};
use super::{QdmaError, low};
use crate::arena::Arena;
use crate::device::cache;
use crate::device::ring::FrameRing;
use crate::device::{ArenaMap, Device, DmaMem, IovaClass, Mmio, fence_release};
use crate::frame::Frame;
use crate::pool::Pool;

/// Frames are given to the device in portions of this.
const REFILL: u32 = 16;

/// A frame, or the news that one was lost: whoever waits for it must learn that.
#[derive(Debug)]
pub struct Received {
    /// Ring.
    pub ring: u8,
    /// The device's remarks.
    pub msg: RxMsg,
    /// The frame; empty when there is a fault.
    pub frame: Frame,
    /// Why there is no content.
    pub fault: Option<RxFault>,
}

/// Why a frame was received without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxFault {
    /// The device says that it lost the frame.
    Overflow,
    /// The frame was longer than a buffer.
    TooLong,
    /// A length that the buffer cannot hold: the device breaks its rules.
    Length,
}

/// One receive ring.
pub(super) struct RxRing {
    number: u8,
    mem: DmaMem,
    slots: FrameRing,
    at: usize,
    /// In the middle of a frame that was reported already.
    skipping: bool,
    /// Room in each buffer.
    buffer: u32,
    scratch: Vec<Frame>,
    coherent: bool,
    /// Polls since something was found.
    pub(super) idle: u32,
}

impl RxRing {
    pub(super) fn new(
        device: &dyn Device,
        number: u8,
        entries: u16,
        arena: &Arc<Arena>,
    ) -> Result<RxRing, QdmaError> {
        let entries = u32::from(entries);
        let slots = FrameRing::new(entries, arena).filter(|_| (8..=16_384).contains(&entries));
        let buffer = arena.largest_packet(0).min(LENGTH as usize);
        Ok(RxRing {
            number,
            mem: device.dma_alloc(DESCRIPTOR * entries as usize, 4096, IovaClass::Below4G)?,
            slots: slots.ok_or(QdmaError::RingSize(entries))?,
            at: regs::rx_ring(number),
            skipping: false,
            buffer: u32::try_from(buffer).unwrap_or(0),
            scratch: Vec::with_capacity(entries as usize),
            coherent: device.is_coherent(),
            idle: 0,
        })
    }

    /// Points the stopped device at the ring and fills it.
    pub(super) fn start(
        &mut self,
        regs: &Mmio,
        map: &ArenaMap,
        pool: &mut Pool,
    ) -> Result<(), QdmaError> {
        self.mem.zero();
        self.skipping = false;
        self.idle = 0;
        let size = self.slots.size();
        regs.write32(self.at + ring::BASE, low(self.mem.iova())?);
        regs.write32(self.at + ring::SIZE, (size / 8).clamp(1, 32) << 16 | size);
        regs.write32(self.at + ring::CPU, 0);
        regs.write32(self.at + ring::DMA, 0);
        regs.write32(self.at + ring::DELAY, 0);
        // Frames longer than a buffer go on in the next one.
        regs.write32(self.at + ring::SCATTER, 1);
        self.refill(regs, map, pool);
        Ok(())
    }

    /// Gives up to `max` frames to `each`.
    pub(super) fn poll(
        &mut self,
        pool: &mut Pool,
        max: usize,
        each: &mut impl FnMut(&mut Pool, Received),
    ) -> usize {
        let mut found = 0;
        while found < max && self.slots.held() > 0 {
            let d = self.slots.tail() as usize * DESCRIPTOR;
            let ctrl = self.mem.load_acquire32(d + CTRL);
            if ctrl & DONE == 0 {
                break;
            }
            let msg = RxMsg {
                msg0: self.mem.read32(d + MSG0),
                msg1: self.mem.read32(d + MSG1),
                msg2: self.mem.read32(d + MSG2),
            };
            // SAFETY: the device reported the descriptor as done, so it is through with the buffer.
            let Some(mut frame) = (unsafe { self.slots.pop() }) else {
                break;
            };
            let more = ctrl & MORE != 0;
            if std::mem::replace(&mut self.skipping, more) {
                pool.put(frame);
                continue;
            }
            let len = ctrl & LENGTH;
            let fault = if ctrl & DROP != 0 {
                Some(RxFault::Overflow)
            } else if more {
                Some(RxFault::TooLong)
            } else if len == 0 || len > self.buffer || frame.append(len as usize).is_none() {
                Some(RxFault::Length)
            } else {
                None
            };
            if !self.coherent {
                // What was read ahead while the device wrote.
                cache::discard(frame.data_ptr(), frame.len());
            }
            found += 1;
            each(
                pool,
                Received {
                    ring: self.number,
                    msg,
                    frame,
                    fault,
                },
            );
        }
        self.idle = if found > 0 {
            0
        } else {
            self.idle.saturating_add(1)
        };
        found
    }

    /// Gives empty frames to the device, as many as fit.
    pub(super) fn refill(&mut self, regs: &Mmio, map: &ArenaMap, pool: &mut Pool) {
        // Equal indexes mean that the device has none, so one descriptor stays empty.
        let room = self.slots.free() - 1;
        if room < REFILL.min(self.slots.size() / 2) {
            return;
        }
        let mut given = false;
        pool.get_bulk(&mut self.scratch, room as usize);
        for frame in self.scratch.drain(..) {
            let address = map
                .iova(&frame)
                .filter(|_| frame.tailroom() >= self.buffer as usize)
                .and_then(|a| u32::try_from(a).ok());
            let Some(address) = address else {
                frame.give_back();
                continue;
            };
            if !self.coherent {
                // A dirty line must not be written over what the device wrote.
                cache::discard(frame.data_ptr(), self.buffer as usize);
            }
            match self.slots.push(frame) {
                Ok(slot) => {
                    let d = slot as usize * DESCRIPTOR;
                    self.mem.write32(d + ADDR, address);
                    self.mem
                        .write32(d + NEXT, (slot + 1) & (self.slots.size() - 1));
                    for message in [MSG0, MSG1, MSG2, MSG3] {
                        self.mem.write32(d + message, 0);
                    }
                    self.mem.write32(d + CTRL, self.buffer);
                    given = true;
                }
                Err(frame) => frame.give_back(),
            }
        }
        if given {
            fence_release();
            regs.write32(self.at + ring::CPU, self.slots.head());
        }
    }

    /// Takes all frames back.
    ///
    /// # Safety
    /// The device was stopped.
    pub(super) unsafe fn reclaim(&mut self, pool: &mut Pool) {
        // SAFETY: passed on to the caller.
        unsafe { self.slots.drain(pool) };
    }

    pub(super) fn forget(&self, regs: &Mmio) {
        let dma = regs.read32(self.at + ring::DMA);
        regs.write32(self.at + ring::CPU, dma);
    }
}
