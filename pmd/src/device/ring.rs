//! Which frame lies in which descriptor.
//!
//! Devices with rings that complete in order use [`FrameRing::push`] and [`FrameRing::pop`]; devices that name a slot
//! themselves (virtio, vmxnet3 completions) use [`FrameRing::put_at`] and [`FrameRing::take`]. A slot that the device names
//! is checked: outside the ring or without a frame is an error, never a panic and never a second handle of a frame.

use crate::arena::Arena;
use crate::frame::{Frame, RawFrame};
use crate::pool::Pool;
use std::sync::Arc;

/// Why a slot gives no frame: a fault of the device, after which the driver resets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The slot is outside the ring.
    #[error("descriptor {0} is outside the ring")]
    Slot(u32),
    /// The slot holds no frame: completed twice, or never given to the device.
    #[error("descriptor {0} holds no frame")]
    Empty(u32),
}

/// The frames that a device owns, by descriptor. All of one arena.
///
/// Dropping it with frames inside loses them (their arena's memory is then kept for ever), as the device may still write to
/// them: stop the device, then [`FrameRing::drain`].
#[derive(Debug)]
pub struct FrameRing {
    slots: Box<[Option<RawFrame>]>,
    arena: Arc<Arena>,
    mask: u32,
    /// Counts frames pushed, without end.
    head: u32,
    /// Counts frames popped, without end.
    tail: u32,
    held: u32,
}

impl FrameRing {
    /// A ring of `size` slots, a power of two; `None` for other sizes.
    pub fn new(size: u32, arena: &Arc<Arena>) -> Option<FrameRing> {
        if !size.is_power_of_two() {
            return None;
        }
        Some(FrameRing {
            slots: (0..size).map(|_| None).collect(),
            arena: Arc::clone(arena),
            mask: size - 1,
            head: 0,
            tail: 0,
            held: 0,
        })
    }

    /// Number of slots.
    #[inline(always)]
    pub fn size(&self) -> u32 {
        self.mask + 1
    }

    /// Frames in the ring.
    #[inline(always)]
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Slots without a frame.
    #[inline(always)]
    pub fn free(&self) -> u32 {
        self.size() - self.held
    }

    /// The slot that the next push fills.
    #[inline(always)]
    pub fn head(&self) -> u32 {
        self.head & self.mask
    }

    /// The slot that the next pop empties.
    #[inline(always)]
    pub fn tail(&self) -> u32 {
        self.tail & self.mask
    }

    /// How often the head has gone around the ring: odd or even, for devices that mark laps (packed rings, generation bits).
    #[inline(always)]
    pub fn head_lap(&self) -> u32 {
        self.head >> self.mask.count_ones()
    }

    /// How often the tail has gone around the ring.
    #[inline(always)]
    pub fn tail_lap(&self) -> u32 {
        self.tail >> self.mask.count_ones()
    }

    /// Whether the slot holds a frame; false outside the ring.
    #[inline(always)]
    pub fn holds(&self, slot: u32) -> bool {
        self.slots.get(slot as usize).is_some_and(Option::is_some)
    }

    /// Gives the frame to the device in the next slot and returns it; the frame back when the ring is full or the frame is
    /// another arena's, which the device cannot reach.
    ///
    /// # Errors
    /// The frame.
    #[inline(always)]
    pub fn push(&mut self, frame: Frame) -> Result<u32, Frame> {
        let slot = self.head();
        self.put_at(slot, frame)?;
        self.head = self.head.wrapping_add(1);
        Ok(slot)
    }

    /// Gives the frame to the device in `slot`; the frame back when the slot is taken or outside the ring or the frame is
    /// another arena's.
    ///
    /// # Errors
    /// The frame.
    #[inline(always)]
    pub fn put_at(&mut self, slot: u32, frame: Frame) -> Result<(), Frame> {
        if !self.arena.owns(&frame) {
            return Err(frame);
        }
        match self.slots.get_mut(slot as usize) {
            Some(place @ None) => {
                *place = Some(frame.into_raw());
                self.held += 1;
                Ok(())
            }
            _ => Err(frame),
        }
    }

    /// Takes the oldest frame back; `None` when there is none. Its valid bytes are as when it was given: for a received
    /// frame, given empty, [`Frame::append`] takes the length that the device reports and checks it.
    ///
    /// # Safety
    /// The device reads and writes the buffer no more: it reported the descriptor as done, or it was stopped.
    #[inline(always)]
    pub unsafe fn pop(&mut self) -> Option<Frame> {
        // SAFETY: passed on to the caller.
        let frame = unsafe { self.take(self.tail()) }.ok()?;
        self.tail = self.tail.wrapping_add(1);
        Some(frame)
    }

    /// Takes the frame in `slot` back, as [`FrameRing::pop`].
    ///
    /// # Errors
    /// [`RingError`] when the device names a slot that holds no frame.
    ///
    /// # Safety
    /// As for [`FrameRing::pop`].
    #[inline(always)]
    pub unsafe fn take(&mut self, slot: u32) -> Result<Frame, RingError> {
        let place = self
            .slots
            .get_mut(slot as usize)
            .ok_or(RingError::Slot(slot))?;
        let raw = place.take().ok_or(RingError::Empty(slot))?;
        self.held -= 1;
        // SAFETY: the token came from a frame of this arena (`put_at`) and is gone now; the caller says that the device is
        // done with it.
        Ok(unsafe { self.arena.from_raw(raw) })
    }

    /// Takes all frames back and begins anew at slot 0.
    ///
    /// # Safety
    /// The device was stopped: reset, or bus-master off and every transfer done.
    pub unsafe fn drain(&mut self, pool: &mut Pool) {
        for slot in 0..self.size() {
            // SAFETY: passed on to the caller.
            if let Ok(frame) = unsafe { self.take(slot) } {
                pool.put(frame);
            }
        }
        self.head = 0;
        self.tail = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;

    fn set() -> (Pool, FrameRing) {
        let arena = Arena::new(ArenaConfig {
            frames: 64,
            ..ArenaConfig::default()
        })
        .unwrap();
        let ring = FrameRing::new(4, &arena).unwrap();
        (Pool::new(&arena, 4), ring)
    }

    #[test]
    fn frames_come_out_in_the_order_they_went_in() {
        let (mut pool, mut ring) = set();
        let first = ring.head;
        for lap in 0..3 {
            assert_eq!((ring.head_lap(), ring.tail_lap()), (lap, lap));
            let mut indexes = Vec::new();
            for slot in 0..4 {
                let f = pool.get().unwrap();
                indexes.push(f.index());
                assert_eq!(ring.push(f).unwrap(), slot);
            }
            assert_eq!((ring.free(), ring.held()), (0, 4));
            let spare = ring.push(pool.get().unwrap()).unwrap_err();
            pool.put(spare);
            for index in indexes {
                // SAFETY: there is no device.
                let f = unsafe { ring.pop() }.unwrap();
                assert_eq!(f.index(), index);
                pool.put(f);
            }
            // SAFETY: there is no device.
            assert!(unsafe { ring.pop() }.is_none());
        }
        assert_eq!(ring.head.wrapping_sub(first), 12);
        assert_eq!(pool.arena().outstanding(), 0);
    }

    #[test]
    fn a_slot_that_holds_nothing_is_an_error() {
        let (mut pool, mut ring) = set();
        ring.put_at(2, pool.get().unwrap()).unwrap();
        let again = ring.put_at(2, pool.get().unwrap()).unwrap_err();
        let outside = ring.put_at(4, again).unwrap_err();
        pool.put(outside);
        assert!(ring.holds(2) && !ring.holds(1) && !ring.holds(u32::MAX));
        // SAFETY: there is no device.
        unsafe {
            assert_eq!(ring.take(1).unwrap_err(), RingError::Empty(1));
            assert_eq!(ring.take(4).unwrap_err(), RingError::Slot(4));
            assert_eq!(ring.take(u32::MAX).unwrap_err(), RingError::Slot(u32::MAX));
            pool.put(ring.take(2).unwrap());
            assert_eq!(ring.take(2).unwrap_err(), RingError::Empty(2));
            ring.push(pool.get().unwrap()).unwrap();
            ring.drain(&mut pool);
        }
        assert_eq!((ring.held(), ring.head(), ring.tail()), (0, 0, 0));
        assert_eq!(pool.arena().outstanding(), 0);
    }

    #[test]
    fn a_frame_that_the_device_cannot_reach_is_refused() {
        let (_, mut ring) = set();
        let (mut other, _) = set();
        let f = ring.push(other.get().unwrap()).unwrap_err();
        other.put(f);
        assert!(FrameRing::new(3, other.arena()).is_none());
        assert!(FrameRing::new(0, other.arena()).is_none());
    }
}
