//! What split and packed rings have in common: buffers, errors, and one type for each side.
//!
//! Both sides work in bursts: [`DeviceRing::next`] and [`DeviceRing::put_used`], or [`DriverRing::add`] and
//! [`DriverRing::take_used`], touch private state and entries that the other side does not look at yet; one
//! [`publish`](DeviceRing::publish) shows the burst.

use super::packed::{PackedDevice, PackedDriver};
use super::split::{SplitDevice, SplitDriver};
use crate::device::DmaMem;

/// Largest ring (virtio 1.2, section 2.7).
pub const MAX_RING: u16 = 32_768;
/// Most descriptors of one chain, indirect ones included. Bounds the work that one entry can cause; drivers use up to 19.
pub const MAX_CHAIN: usize = 64;

/// Descriptor flag: the chain goes on.
pub(super) const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub(super) const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;

/// A rule that the other side broke. The queue is unusable until it is set up anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Its index moved by more than the ring holds.
    #[error("the ring's index went from {seen} to {now}, the ring has {size} entries")]
    Index {
        /// Last index that was seen.
        seen: u16,
        /// Index now.
        now: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor that the ring does not have.
    #[error("descriptor {0} is outside the ring")]
    Descriptor(u16),
    /// A chain of more than [`MAX_CHAIN`] descriptors, or one in a circle.
    #[error("a chain of more than {MAX_CHAIN} descriptors")]
    ChainTooLong,
    /// An indirect table that was not agreed on, is nested, empty, not a whole number of descriptors, or not in memory.
    #[error("indirect table: {0}")]
    Indirect(&'static str),
    /// A used entry for a buffer that the device does not have.
    #[error("buffer {0} was not given to the device")]
    Id(u16),
    /// The device says it wrote more than the buffer holds.
    #[error("{written} bytes were written to a buffer of {len}")]
    Written {
        /// Bytes claimed.
        written: u32,
        /// Bytes of the buffer.
        len: u32,
    },
    /// A buffer is outside the memory that the peer shares.
    #[error("{len} bytes at {addr:#x} are not in shared memory")]
    Memory {
        /// Address of the buffer.
        addr: u64,
        /// Its length.
        len: u32,
    },
    /// A buffer to read where one to write belongs, or the other way around.
    #[error("a buffer of the wrong direction")]
    Direction,
}

/// Why there is no ring: its description is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The size is 0, above [`MAX_RING`], or, for a split ring, not a power of two.
    #[error("a ring cannot have {0} entries")]
    Size(u32),
    /// A part of the ring is smaller than its size needs.
    #[error("the ring's {part} has {len} bytes and needs {needed}")]
    Short {
        /// Which part.
        part: &'static str,
        /// Bytes that there are.
        len: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// The position to go on from is outside the ring.
    #[error("position {0} is outside the ring")]
    Position(u32),
}

/// Which form a ring has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Descriptor table, available ring, used ring.
    Split,
    /// One ring of descriptors.
    Packed,
}

/// The three areas of a ring: descriptors, what the driver writes beside them, what the device writes.
#[derive(Debug, Clone)]
pub struct Areas {
    /// Descriptor area.
    pub descriptors: DmaMem,
    /// Driver area: available ring, or driver event suppression.
    pub driver: DmaMem,
    /// Device area: used ring, or device event suppression.
    pub device: DmaMem,
}

/// Bytes of the three areas of a ring of `size` entries: descriptors, driver, device.
pub fn area_sizes(format: Format, size: u16) -> [usize; 3] {
    let n = usize::from(size);
    match format {
        Format::Split => [DESCRIPTOR * n, 6 + 2 * n, 6 + 8 * n],
        Format::Packed => [DESCRIPTOR * n, 4, 4],
    }
}

/// What was agreed for a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingOptions {
    /// Form.
    pub format: Format,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
}

/// A piece of memory of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// First byte, an address of the driver's.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A chain that was taken from a ring and is owed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The driver's name for the chain.
    pub id: u16,
    /// Entries of a packed ring that it covers.
    pub entries: u16,
}

/// A place in the ring to go back to; see [`DeviceRing::position`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub(super) next: u16,
    pub(super) wrap: bool,
}

/// Reads indirect descriptors.
pub trait Tables {
    /// The 16 bytes at `addr`, as two little-endian words; `None` when they are not all in shared memory.
    fn descriptor(&self, addr: u64) -> Option<[u64; 2]>;
}

/// The fields of a descriptor's second word.
pub(super) fn second_word(word: u64) -> (u32, u16, u16) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u16::from_le_bytes([e, f]),
        u16::from_le_bytes([g, h]),
    )
}

/// Checks size and areas of a ring.
pub(super) fn check_layout(format: Format, areas: &Areas, size: u16) -> Result<(), LayoutError> {
    let fits = format == Format::Packed || size.is_power_of_two();
    if size == 0 || size > MAX_RING || !fits {
        return Err(LayoutError::Size(size.into()));
    }
    let [d, a, u] = area_sizes(format, size);
    for (part, area, needed) in [
        ("descriptor area", &areas.descriptors, d),
        ("driver area", &areas.driver, a),
        ("device area", &areas.device, u),
    ] {
        if area.len() < needed {
            return Err(LayoutError::Short {
                part,
                len: area.len(),
                needed,
            });
        }
    }
    Ok(())
}

/// Whether a position that was asked for was passed on the way from `old` to `new` (section 2.7.10).
pub(super) fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The device's side of a ring.
#[derive(Debug)]
pub enum DeviceRing {
    /// Split.
    Split(SplitDevice),
    /// Packed.
    Packed(PackedDevice),
}

/// Calls the same method of whichever form.
macro_rules! either {
    ($self:expr, $kind:ident, $r:ident => $call:expr) => {
        match $self {
            $kind::Split($r) => $call,
            $kind::Packed($r) => $call,
        }
    };
}

impl DeviceRing {
    /// The ring in `areas`. A packed one begins at `base`: the position in 15 bits, the wrap counter above (vhost-user's
    /// `SET_VRING_BASE`); a split one at the index in its device area, the last that its driver knows of.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(
        options: RingOptions,
        areas: Areas,
        size: u16,
        base: u32,
    ) -> Result<DeviceRing, LayoutError> {
        check_layout(options.format, &areas, size)?;
        Ok(match options.format {
            Format::Split => DeviceRing::Split(SplitDevice::new(options, areas, size)),
            Format::Packed => DeviceRing::Packed(PackedDevice::new(options, areas, size, base)?),
        })
    }

    /// Where the ring stands: the available index, or the available position and, in the upper half, the used one.
    pub fn base(&self) -> u32 {
        either!(self, DeviceRing, r => r.base())
    }

    /// Takes the next chain: appends its buffers to `out`. `None` when the driver has no more.
    ///
    /// # Errors
    /// [`RingError`]; `out` may then hold a part of the chain.
    #[inline(always)]
    pub fn next(
        &mut self,
        tables: &impl Tables,
        out: &mut Vec<Buffer>,
    ) -> Result<Option<Taken>, RingError> {
        either!(self, DeviceRing, r => r.next(tables, out))
    }

    /// The place of the next chain.
    #[inline(always)]
    pub fn position(&self) -> Position {
        either!(self, DeviceRing, r => r.position())
    }

    /// Gives back chains taken since `position`, as if they had not been taken. None of them may have been put.
    #[inline(always)]
    pub fn rewind(&mut self, position: Position) {
        either!(self, DeviceRing, r => r.rewind(position));
    }

    /// Gives a chain back as used, with the number of bytes written to it. Chains may be given back in any order that
    /// [`DeviceRing::next`] gave them in; the driver sees it after [`DeviceRing::publish`].
    #[inline(always)]
    pub fn put_used(&mut self, taken: Taken, written: u32) {
        either!(self, DeviceRing, r => r.put_used(taken, written));
    }

    /// Shows the driver what was put.
    #[inline(always)]
    pub fn publish(&mut self) {
        either!(self, DeviceRing, r => r.publish());
    }

    /// Whether the driver wants to be told of what was published since the last call of this method.
    #[inline(always)]
    pub fn wants_call(&mut self) -> bool {
        either!(self, DeviceRing, r => r.wants_call())
    }

    /// Asks the driver for a notification when it adds something. Look once more afterwards: it may have done so before.
    pub fn arm(&mut self) {
        either!(self, DeviceRing, r => r.arm());
    }

    /// Tells the driver that no notifications are needed.
    pub fn disarm(&mut self) {
        either!(self, DeviceRing, r => r.disarm());
    }
}

/// The driver's side of a ring, in which each buffer is one descriptor.
#[derive(Debug)]
pub enum DriverRing {
    /// Split.
    Split(SplitDriver),
    /// Packed.
    Packed(PackedDriver),
}

impl DriverRing {
    /// A new ring in `areas`, which must be zero.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn new(options: RingOptions, areas: Areas, size: u16) -> Result<DriverRing, LayoutError> {
        check_layout(options.format, &areas, size)?;
        Ok(match options.format {
            Format::Split => DriverRing::Split(SplitDriver::new(options, areas, size)),
            Format::Packed => DriverRing::Packed(PackedDriver::new(options, areas, size)),
        })
    }

    /// Descriptors that can be added.
    #[inline(always)]
    pub fn free(&self) -> u16 {
        either!(self, DriverRing, r => r.free())
    }

    /// The id that the next [`DriverRing::add`] will use; `None` when the ring is full.
    #[inline(always)]
    pub fn next_id(&self) -> Option<u16> {
        either!(self, DriverRing, r => r.next_id())
    }

    /// Gives the device a buffer; returns the id by which it will come back, `None` when the ring is full. The device sees it
    /// after [`DriverRing::publish`].
    #[inline(always)]
    pub fn add(&mut self, buffer: Buffer) -> Option<u16> {
        either!(self, DriverRing, r => r.add(buffer))
    }

    /// Adds a chain of buffers as one entry; its id, or `None` when there is no room. For control queues.
    pub fn add_chain(&mut self, buffers: &[Buffer]) -> Option<u16> {
        either!(self, DriverRing, r => r.add_chain(buffers))
    }

    /// Shows the device what was added.
    #[inline(always)]
    pub fn publish(&mut self) {
        either!(self, DriverRing, r => r.publish());
    }

    /// Whether the device wants to be told of what was published since the last call of this method.
    #[inline(always)]
    pub fn wants_kick(&mut self) -> bool {
        either!(self, DriverRing, r => r.wants_kick())
    }

    /// The next buffer that the device is done with: its id and the bytes written.
    ///
    /// # Errors
    /// [`RingError`].
    #[inline(always)]
    pub fn take_used(&mut self) -> Result<Option<(u16, u32)>, RingError> {
        either!(self, DriverRing, r => r.take_used())
    }

    /// Asks the device for an interrupt when it is done with something. Look once more afterwards.
    pub fn arm(&mut self) {
        either!(self, DriverRing, r => r.arm());
    }

    /// Tells the device that no interrupts are needed.
    pub fn disarm(&mut self) {
        either!(self, DriverRing, r => r.disarm());
    }

    /// What a notification carries with `VIRTIO_F_NOTIFICATION_DATA`, above the queue's number (section 4.1.5.2).
    pub fn notification_position(&self) -> u16 {
        either!(self, DriverRing, r => r.notification_position())
    }
}

/// Ids that are free, and of those that are not, how many descriptors each covers.
#[derive(Debug)]
pub(super) struct Ids {
    free: Vec<u16>,
    /// Descriptors of each id in use; 0 for free ones.
    covers: Box<[u16]>,
    descriptors: u16,
}

impl Ids {
    pub(super) fn new(size: u16) -> Ids {
        Ids {
            free: (0..size).rev().collect(),
            covers: vec![0; size.into()].into(),
            descriptors: size,
        }
    }

    /// Descriptors that are free.
    #[inline(always)]
    pub(super) fn room(&self) -> u16 {
        self.descriptors
    }

    #[inline(always)]
    pub(super) fn peek(&self) -> Option<u16> {
        self.free.last().copied().filter(|_| self.descriptors > 0)
    }

    /// Takes an id for a chain of `n` descriptors.
    #[inline(always)]
    pub(super) fn take(&mut self, n: u16) -> Option<u16> {
        let left = self.descriptors.checked_sub(n)?;
        let id = self.free.pop()?;
        self.descriptors = left;
        *self.covers.get_mut(usize::from(id))? = n;
        Some(id)
    }

    /// Frees an id that the device named; how many descriptors it covered.
    #[inline(always)]
    pub(super) fn put(&mut self, id: u16) -> Result<u16, RingError> {
        let covers = self
            .covers
            .get_mut(usize::from(id))
            .filter(|n| **n > 0)
            .ok_or(RingError::Id(id))?;
        let n = std::mem::take(covers);
        self.descriptors += n;
        self.free.push(id);
        Ok(n)
    }
}
