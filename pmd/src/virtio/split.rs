//! Split rings (virtio 1.2, section 2.7).
//!
//! ```text
//! descriptors  16 bytes each: address 8, length 4, flags 2, next 2
//! driver       flags 2, index 2, head of a chain 2 × size, used event 2
//! device       flags 2, index 2, (id 4, length 4) × size, available event 2
//! ```
//!
//! Both indices count without end; entry *i* is at *i* modulo size.

use super::ring::{
    Areas, Buffer, DESCRIPTOR, INDIRECT, MAX_CHAIN, NEXT, Position, RingError, RingOptions, Tables,
    Taken, WRITE, passed, second_word,
};
use crate::device::fence_full;

/// Index of the driver area and of the device area.
const INDEX: usize = 2;
/// First entry of both.
const ENTRIES: usize = 4;
/// In the first word of the driver area: no interrupts; of the device area: no notifications.
const QUIET: u16 = 1;

/// The device's side; see [`super::ring::DeviceRing`].
#[derive(Debug)]
pub struct SplitDevice {
    areas: Areas,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Next available entry to take.
    next: u16,
    /// The driver's index as last read.
    seen: u16,
    /// Next used entry to write.
    used: u16,
    /// `used` at the last decision about a call.
    called: u16,
}

impl SplitDevice {
    pub(super) fn new(options: RingOptions, areas: Areas, size: u16) -> SplitDevice {
        // What an earlier device took and never gave back is taken again: better twice than lost for ever.
        let next = areas.device.read16(INDEX);
        SplitDevice {
            areas,
            size,
            event_idx: options.event_idx,
            indirect: options.indirect,
            next,
            seen: next,
            used: next,
            called: next,
        }
    }

    pub(super) fn base(&self) -> u32 {
        self.next.into()
    }

    #[inline(always)]
    pub(super) fn next(
        &mut self,
        tables: &impl Tables,
        out: &mut Vec<Buffer>,
    ) -> Result<Option<Taken>, RingError> {
        if self.next == self.seen {
            let now = self.areas.driver.load_acquire16(INDEX);
            if now == self.seen {
                return Ok(None);
            }
            // Entries that were taken and not given back are still the device's, so the room is what it has given back.
            if now.wrapping_sub(self.used) > self.size {
                return Err(RingError::Index {
                    seen: self.seen,
                    now,
                    size: self.size,
                });
            }
            self.seen = now;
        }
        let head = self
            .areas
            .driver
            .read16(ENTRIES + 2 * self.place(self.next));
        self.chain(head, tables, out)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some(Taken {
            id: head,
            entries: 1,
        }))
    }

    #[inline(always)]
    pub(super) fn position(&self) -> Position {
        Position {
            next: self.next,
            wrap: false,
        }
    }

    #[inline(always)]
    pub(super) fn rewind(&mut self, position: Position) {
        self.next = position.next;
    }

    #[inline(always)]
    pub(super) fn put_used(&mut self, taken: Taken, written: u32) {
        let at = ENTRIES + 8 * self.place(self.used);
        self.areas.device.write32(at, taken.id.into());
        self.areas.device.write32(at + 4, written);
        self.used = self.used.wrapping_add(1);
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        self.areas.device.store_release16(INDEX, self.used);
    }

    #[inline(always)]
    pub(super) fn wants_call(&mut self) -> bool {
        let old = std::mem::replace(&mut self.called, self.used);
        if old == self.used {
            return false;
        }
        fence_full();
        if self.event_idx {
            let event = self
                .areas
                .driver
                .read16(ENTRIES + 2 * usize::from(self.size));
            return passed(event, self.used, old);
        }
        self.areas.driver.read16(0) & QUIET == 0
    }

    pub(super) fn arm(&mut self) {
        if self.event_idx {
            let at = ENTRIES + 8 * usize::from(self.size);
            self.areas.device.write16(at, self.next);
        } else {
            self.areas.device.write16(0, 0);
        }
        fence_full();
    }

    pub(super) fn disarm(&mut self) {
        if self.event_idx {
            // A position just behind: passed again only after a whole round of the index.
            let at = ENTRIES + 8 * usize::from(self.size);
            self.areas.device.write16(at, self.next.wrapping_sub(1));
        } else {
            self.areas.device.write16(0, QUIET);
        }
    }

    #[inline(always)]
    fn chain(
        &self,
        head: u16,
        tables: &impl Tables,
        out: &mut Vec<Buffer>,
    ) -> Result<(), RingError> {
        let mut at = head;
        for _ in 0..MAX_CHAIN {
            if at >= self.size {
                return Err(RingError::Descriptor(at));
            }
            let place = DESCRIPTOR * usize::from(at);
            let addr = self.areas.descriptors.read64(place);
            let (len, flags, next) = second_word(self.areas.descriptors.read64(place + 8));
            if flags & INDIRECT != 0 {
                if !self.indirect || flags & NEXT != 0 {
                    return Err(RingError::Indirect("not agreed on, or in a chain"));
                }
                return split_table(addr, len, tables, out);
            }
            out.push(Buffer {
                addr,
                len,
                writable: flags & WRITE != 0,
            });
            if flags & NEXT == 0 {
                return Ok(());
            }
            at = next;
        }
        Err(RingError::ChainTooLong)
    }

    #[inline(always)]
    fn place(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }
}

/// Follows the chain in an indirect table.
fn split_table(
    table: u64,
    bytes: u32,
    tables: &impl Tables,
    out: &mut Vec<Buffer>,
) -> Result<(), RingError> {
    let entries = bytes / 16;
    if entries == 0 || !bytes.is_multiple_of(16) {
        return Err(RingError::Indirect("not a whole number of descriptors"));
    }
    let mut at = 0u16;
    for _ in 0..MAX_CHAIN {
        if u32::from(at) >= entries {
            return Err(RingError::Descriptor(at));
        }
        let words = table
            .checked_add(16 * u64::from(at))
            .and_then(|addr| tables.descriptor(addr));
        let [addr, word] = words.ok_or(RingError::Indirect("not in shared memory"))?;
        let (len, flags, next) = second_word(word);
        if flags & INDIRECT != 0 {
            return Err(RingError::Indirect("a table in a table"));
        }
        out.push(Buffer {
            addr,
            len,
            writable: flags & WRITE != 0,
        });
        if flags & NEXT == 0 {
            return Ok(());
        }
        at = next;
    }
    Err(RingError::ChainTooLong)
}

/// The driver's side; see [`super::ring::DriverRing`].
#[derive(Debug)]
pub struct SplitDriver {
    areas: Areas,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    /// For each head that the device has: descriptors of the chain. 0 for all others.
    covers: Box<[u16]>,
    /// The chain's next descriptor.
    links: Box<[u16]>,
    next: u16,
    kicked: u16,
    /// Next used entry to read.
    used: u16,
    /// The device's index as last read.
    seen: u16,
}

impl SplitDriver {
    pub(super) fn new(options: RingOptions, areas: Areas, size: u16) -> SplitDriver {
        SplitDriver {
            areas,
            size,
            event_idx: options.event_idx,
            free: (0..size).rev().collect(),
            covers: vec![0; size.into()].into(),
            links: vec![0; size.into()].into(),
            next: 0,
            kicked: 0,
            used: 0,
            seen: 0,
        }
    }

    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        u16::try_from(self.free.len()).unwrap_or(u16::MAX)
    }

    #[inline(always)]
    pub(super) fn next_id(&self) -> Option<u16> {
        self.free.last().copied()
    }

    #[inline(always)]
    pub(super) fn add(&mut self, buffer: Buffer) -> Option<u16> {
        let id = self.free.pop()?;
        self.describe(id, buffer, 0, 0);
        self.offer(id, 1)
    }

    pub(super) fn add_chain(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let n = u16::try_from(buffers.len()).ok().filter(|n| *n > 0)?;
        let first = self.free.len().checked_sub(usize::from(n))?;
        let ids = self.free.split_off(first);
        for (i, (&id, &buffer)) in ids.iter().zip(buffers).enumerate() {
            match ids.get(i + 1) {
                Some(&next) => {
                    *self.links.get_mut(usize::from(id))? = next;
                    self.describe(id, buffer, NEXT, next);
                }
                None => self.describe(id, buffer, 0, 0),
            }
        }
        self.offer(*ids.first()?, n)
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        self.areas.driver.store_release16(INDEX, self.next);
    }

    #[inline(always)]
    pub(super) fn wants_kick(&mut self) -> bool {
        let old = std::mem::replace(&mut self.kicked, self.next);
        if old == self.next {
            return false;
        }
        fence_full();
        if self.event_idx {
            let at = ENTRIES + 8 * usize::from(self.size);
            return passed(self.areas.device.read16(at), self.next, old);
        }
        self.areas.device.read16(0) & QUIET == 0
    }

    #[inline(always)]
    pub(super) fn take_used(&mut self) -> Result<Option<(u16, u32)>, RingError> {
        if self.used == self.seen {
            let now = self.areas.device.load_acquire16(INDEX);
            if now == self.seen {
                return Ok(None);
            }
            if now.wrapping_sub(self.seen) > self.size {
                return Err(RingError::Index {
                    seen: self.seen,
                    now,
                    size: self.size,
                });
            }
            self.seen = now;
        }
        let at = ENTRIES + 8 * usize::from(self.used & (self.size - 1));
        let id = self.areas.device.read32(at);
        let written = self.areas.device.read32(at + 4);
        let id = u16::try_from(id).map_err(|_| RingError::Id(u16::MAX))?;
        let covers = self
            .covers
            .get_mut(usize::from(id))
            .filter(|n| **n > 0)
            .ok_or(RingError::Id(id))?;
        let n = std::mem::take(covers);
        let mut at = id;
        for _ in 0..n {
            self.free.push(at);
            at = self.links.get(usize::from(at)).copied().unwrap_or(0);
        }
        self.used = self.used.wrapping_add(1);
        Ok(Some((id, written)))
    }

    pub(super) fn arm(&mut self) {
        if self.event_idx {
            let at = ENTRIES + 2 * usize::from(self.size);
            self.areas.driver.write16(at, self.used);
        } else {
            self.areas.driver.write16(0, 0);
        }
        fence_full();
    }

    pub(super) fn disarm(&mut self) {
        if self.event_idx {
            let at = ENTRIES + 2 * usize::from(self.size);
            self.areas.driver.write16(at, self.used.wrapping_sub(1));
        } else {
            self.areas.driver.write16(0, QUIET);
        }
    }

    pub(super) fn notification_position(&self) -> u16 {
        self.next
    }

    #[inline(always)]
    fn describe(&self, id: u16, buffer: Buffer, more: u16, next: u16) {
        let at = DESCRIPTOR * usize::from(id);
        let flags = more | if buffer.writable { WRITE } else { 0 };
        let second = u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.areas.descriptors.write64(at, buffer.addr);
        self.areas.descriptors.write64(at + 8, second);
    }

    #[inline(always)]
    fn offer(&mut self, head: u16, descriptors: u16) -> Option<u16> {
        *self.covers.get_mut(usize::from(head))? = descriptors;
        let at = ENTRIES + 2 * usize::from(self.next & (self.size - 1));
        self.areas.driver.write16(at, head);
        self.next = self.next.wrapping_add(1);
        Some(head)
    }
}
