//! Packed rings (virtio 1.2, section 2.8).
//!
//! One ring of descriptors (address 8, length 4, id 2, flags 2), written by both sides in turn. Two bits of the flags say
//! whose a descriptor is; their meaning flips each time around, which both sides follow with a wrap counter:
//!
//! ```text
//! available to the device   AVAIL == driver's wrap, USED != it
//! used by the device        AVAIL == USED == wrap
//! ```

use super::ring::{
    Areas, Buffer, DESCRIPTOR, INDIRECT, Ids, LayoutError, MAX_CHAIN, NEXT, Position, RingError,
    RingOptions, Tables, Taken, WRITE, passed, second_word,
};
use crate::device::{DmaMem, fence_full};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Place of the flags in a descriptor.
const FLAGS: usize = 14;

/// Event suppression area: a position with wrap counter, then one of the three words below.
const EVENT_FLAGS: usize = 2;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_AT_POSITION: u16 = 2;

/// A place in the ring and how often, odd or even, it was passed.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    at: u16,
    wrap: bool,
}

impl Cursor {
    const START: Cursor = Cursor { at: 0, wrap: true };

    /// From the form of an event or of `SET_VRING_BASE`.
    fn from_word(word: u16) -> Cursor {
        Cursor {
            at: word & 0x7fff,
            wrap: word >> 15 != 0,
        }
    }

    fn word(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }

    /// `n` entries on, at most the ring's size.
    #[inline(always)]
    fn advance(&mut self, n: u16, size: u16) {
        self.at += n;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    #[inline(always)]
    fn offset(self) -> usize {
        DESCRIPTOR * usize::from(self.at)
    }

    /// Flag bits of an available descriptor here.
    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Flag bits of a used descriptor here.
    #[inline(always)]
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// Whether the other side, whose event suppression area is `area`, wants to know of the way from `old` to `now`.
#[inline(always)]
fn wanted(area: &DmaMem, event_idx: bool, now: Cursor, moved: u16, size: u16) -> bool {
    fence_full();
    let event = Cursor::from_word(area.read16(0));
    match area.read16(EVENT_FLAGS) & 3 {
        EVENT_DISABLE => false,
        EVENT_AT_POSITION if event_idx => {
            let at = if event.wrap == now.wrap {
                event.at
            } else {
                event.at.wrapping_sub(size)
            };
            passed(at, now.at, now.at.wrapping_sub(moved))
        }
        _ => true,
    }
}

/// Asks to be told when the other side passes `at`.
fn arm(area: &DmaMem, event_idx: bool, at: Cursor) {
    if event_idx {
        area.write16(0, at.word());
        area.store_release16(EVENT_FLAGS, EVENT_AT_POSITION);
    } else {
        area.write16(EVENT_FLAGS, EVENT_ENABLE);
    }
    fence_full();
}

/// A first descriptor whose flags are written last, so that the other side sees a burst at once.
#[derive(Debug, Default)]
struct Held(Option<(usize, u16)>);

impl Held {
    /// Writes the flags at `offset`, or keeps them when they are the first of the burst.
    #[inline(always)]
    fn put(&mut self, descriptors: &DmaMem, offset: usize, flags: u16) {
        if self.0.is_none() {
            self.0 = Some((offset + FLAGS, flags));
        } else {
            descriptors.write16(offset + FLAGS, flags);
        }
    }

    #[inline(always)]
    fn release(&mut self, descriptors: &DmaMem) {
        if let Some((at, flags)) = self.0.take() {
            descriptors.store_release16(at, flags);
        }
    }
}

/// The device's side; see [`super::ring::DeviceRing`].
#[derive(Debug)]
pub struct PackedDevice {
    areas: Areas,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next: Cursor,
    used: Cursor,
    /// Entries taken and not given back.
    owed: u16,
    /// Entries given back since the last decision about a call.
    moved: u16,
    held: Held,
}

impl PackedDevice {
    pub(super) fn new(
        options: RingOptions,
        areas: Areas,
        size: u16,
        base: u32,
    ) -> Result<PackedDevice, LayoutError> {
        let [a, b, _, _] = base.to_le_bytes();
        // A stopped ring owes nothing, so the used position, which not all peers give, is the same.
        let next = Cursor::from_word(u16::from_le_bytes([a, b]));
        if next.at >= size {
            return Err(LayoutError::Position(base));
        }
        Ok(PackedDevice {
            areas,
            size,
            event_idx: options.event_idx,
            indirect: options.indirect,
            next,
            used: next,
            owed: 0,
            moved: 0,
            held: Held::default(),
        })
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next.word()) | u32::from(self.used.word()) << 16
    }

    #[inline(always)]
    pub(super) fn next(
        &mut self,
        tables: &impl Tables,
        out: &mut Vec<Buffer>,
    ) -> Result<Option<Taken>, RingError> {
        let ring = &self.areas.descriptors;
        let mut at = self.next;
        let flags = ring.load_acquire16(at.offset() + FLAGS);
        if flags & (AVAIL | USED) != at.available() || self.owed >= self.size {
            return Ok(None);
        }
        let mut entries = 0;
        loop {
            // A chain cannot be longer than what the device does not have already.
            if usize::from(entries) >= MAX_CHAIN || self.owed + entries >= self.size {
                return Err(RingError::ChainTooLong);
            }
            let addr = ring.read64(at.offset());
            let (len, id, flags) = second_word(ring.read64(at.offset() + 8));
            entries += 1;
            if flags & INDIRECT != 0 {
                if !self.indirect || flags & NEXT != 0 || entries != 1 {
                    return Err(RingError::Indirect("not agreed on, or in a chain"));
                }
                packed_table(addr, len, tables, out)?;
            } else {
                out.push(Buffer {
                    addr,
                    len,
                    writable: flags & WRITE != 0,
                });
            }
            at.advance(1, self.size);
            if flags & NEXT == 0 {
                self.next = at;
                self.owed += entries;
                return Ok(Some(Taken { id, entries }));
            }
        }
    }

    #[inline(always)]
    pub(super) fn position(&self) -> Position {
        Position {
            next: self.next.at,
            wrap: self.next.wrap,
        }
    }

    #[inline(always)]
    pub(super) fn rewind(&mut self, position: Position) {
        let back = if position.wrap == self.next.wrap {
            self.next.at.saturating_sub(position.next)
        } else {
            self.next.at + self.size - position.next
        };
        self.owed = self.owed.saturating_sub(back);
        self.next = Cursor {
            at: position.next,
            wrap: position.wrap,
        };
    }

    #[inline(always)]
    pub(super) fn put_used(&mut self, taken: Taken, written: u32) {
        let ring = &self.areas.descriptors;
        let at = self.used.offset();
        ring.write32(at + 8, written);
        ring.write16(at + 12, taken.id);
        let flags = self.used.used() | if written > 0 { WRITE } else { 0 };
        self.held.put(ring, at, flags);
        self.used.advance(taken.entries, self.size);
        self.owed = self.owed.saturating_sub(taken.entries);
        self.moved = self.moved.saturating_add(taken.entries);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        self.held.release(&self.areas.descriptors);
    }

    #[inline(always)]
    pub(super) fn wants_call(&mut self) -> bool {
        let moved = std::mem::take(&mut self.moved);
        moved > 0
            && wanted(
                &self.areas.driver,
                self.event_idx,
                self.used,
                moved,
                self.size,
            )
    }

    pub(super) fn arm(&mut self) {
        arm(&self.areas.device, self.event_idx, self.next);
    }

    pub(super) fn disarm(&mut self) {
        self.areas.device.write16(EVENT_FLAGS, EVENT_DISABLE);
    }
}

/// Takes all descriptors of an indirect table: they lie in order.
fn packed_table(
    table: u64,
    bytes: u32,
    tables: &impl Tables,
    out: &mut Vec<Buffer>,
) -> Result<(), RingError> {
    let entries = bytes / 16;
    if entries == 0 || !bytes.is_multiple_of(16) {
        return Err(RingError::Indirect("not a whole number of descriptors"));
    }
    if entries as usize > MAX_CHAIN {
        return Err(RingError::ChainTooLong);
    }
    for i in 0..u64::from(entries) {
        let words = table
            .checked_add(16 * i)
            .and_then(|addr| tables.descriptor(addr));
        let [addr, word] = words.ok_or(RingError::Indirect("not in shared memory"))?;
        let (len, _, flags) = second_word(word);
        if flags & INDIRECT != 0 {
            return Err(RingError::Indirect("a table in a table"));
        }
        out.push(Buffer {
            addr,
            len,
            writable: flags & WRITE != 0,
        });
    }
    Ok(())
}

/// The driver's side; see [`super::ring::DriverRing`].
#[derive(Debug)]
pub struct PackedDriver {
    areas: Areas,
    size: u16,
    event_idx: bool,
    ids: Ids,
    next: Cursor,
    used: Cursor,
    /// Descriptors added since the last decision about a kick.
    moved: u16,
    held: Held,
}

impl PackedDriver {
    pub(super) fn new(options: RingOptions, areas: Areas, size: u16) -> PackedDriver {
        PackedDriver {
            areas,
            size,
            event_idx: options.event_idx,
            ids: Ids::new(size),
            next: Cursor::START,
            used: Cursor::START,
            moved: 0,
            held: Held::default(),
        }
    }

    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        self.ids.room()
    }

    #[inline(always)]
    pub(super) fn next_id(&self) -> Option<u16> {
        self.ids.peek()
    }

    #[inline(always)]
    pub(super) fn add(&mut self, buffer: Buffer) -> Option<u16> {
        let id = self.ids.take(1)?;
        self.describe(buffer, id, 0);
        Some(id)
    }

    pub(super) fn add_chain(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let n = u16::try_from(buffers.len()).ok().filter(|n| *n > 0)?;
        let id = self.ids.take(n)?;
        let (last, rest) = buffers.split_last()?;
        for &buffer in rest {
            self.describe(buffer, id, NEXT);
        }
        self.describe(*last, id, 0);
        Some(id)
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        self.held.release(&self.areas.descriptors);
    }

    #[inline(always)]
    pub(super) fn wants_kick(&mut self) -> bool {
        let moved = std::mem::take(&mut self.moved);
        moved > 0
            && wanted(
                &self.areas.device,
                self.event_idx,
                self.next,
                moved,
                self.size,
            )
    }

    #[inline(always)]
    pub(super) fn take_used(&mut self) -> Result<Option<(u16, u32)>, RingError> {
        if self.ids.room() == self.size {
            return Ok(None);
        }
        let ring = &self.areas.descriptors;
        let at = self.used.offset();
        let flags = ring.load_acquire16(at + FLAGS);
        if flags & (AVAIL | USED) != self.used.used() {
            return Ok(None);
        }
        let (written, id, _) = second_word(ring.read64(at + 8));
        let entries = self.ids.put(id)?;
        self.used.advance(entries, self.size);
        Ok(Some((id, written)))
    }

    pub(super) fn arm(&mut self) {
        arm(&self.areas.driver, self.event_idx, self.used);
    }

    pub(super) fn disarm(&mut self) {
        self.areas.driver.write16(EVENT_FLAGS, EVENT_DISABLE);
    }

    pub(super) fn notification_position(&self) -> u16 {
        self.next.word()
    }

    #[inline(always)]
    fn describe(&mut self, buffer: Buffer, id: u16, more: u16) {
        let ring = &self.areas.descriptors;
        let at = self.next.offset();
        ring.write64(at, buffer.addr);
        ring.write32(at + 8, buffer.len);
        ring.write16(at + 12, id);
        let flags = self.next.available() | more | if buffer.writable { WRITE } else { 0 };
        self.held.put(ring, at, flags);
        self.next.advance(1, self.size);
        self.moved = self.moved.saturating_add(1);
    }
}
