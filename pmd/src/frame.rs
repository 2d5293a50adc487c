//! The handle of one packet buffer.
//!
//! A frame's bytes lie in the arena; everything known about it lies in the 24-byte handle, never in the frame's own cache
//! lines. The valid bytes are `offset..offset + len` of the buffer:
//!
//! ```text
//! |<------------------------- stride ------------------------->|
//! |   head-room   |            data (len)       |  tail-room   |
//! 0             offset                    offset + len       stride
//! ```
//!
//! The handle is the buffer's ownership: neither `Copy` nor `Clone`, so a buffer cannot be in two places, and there is no
//! safe way to make a second handle of it. Dropping one instead of giving it to a pool is a bug of the program: it panics in
//! debug builds; in release builds it is counted ([`leaked`]) and the buffer is brought home on a slow path.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::arena;

static LEAKED: AtomicU64 = AtomicU64::new(0);

/// Frames of this process that were dropped instead of given back to a pool. Anything but 0 is a bug.
pub fn leaked() -> u64 {
    LEAKED.load(Relaxed)
}

/// The owning handle of one buffer of an [`Arena`](arena::Arena).
pub struct Frame {
    base: NonNull<u8>,
    arena: u32,
    index: u32,
    offset: u16,
    len: u16,
    stride: u16,
    /// Default head-room, at most [`HEADROOM_MAX`], and [`CHECKSUM_LEFT`].
    headroom: u16,
}

/// Largest default head-room.
pub(crate) const HEADROOM_MAX: u16 = 0x7fff;
/// See [`Frame::leave_checksum`].
const CHECKSUM_LEFT: u16 = 0x8000;

// SAFETY: the handle owns its buffer exclusively (see `Frame::from_parts`), so moving it to another thread moves the only
// access to these bytes with it.
unsafe impl Send for Frame {}
// SAFETY: through a shared reference the bytes can only be read.
unsafe impl Sync for Frame {}

/// What is left of a frame while a device owns its bytes: its place, but no access. Made by [`Frame::into_raw`], undone by
/// [`Arena::from_raw`](arena::Arena::from_raw). Losing one loses the buffer (it shows in `Arena::outstanding`).
#[must_use = "a lost RawFrame is a lost buffer"]
#[derive(Debug, PartialEq, Eq)]
pub struct RawFrame {
    pub(crate) arena: u32,
    pub(crate) index: u32,
    pub(crate) offset: u16,
    pub(crate) len: u16,
}

impl RawFrame {
    /// Position of the buffer in its arena.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// First valid byte, from the start of the buffer.
    pub fn offset(&self) -> u16 {
        self.offset
    }

    /// Number of valid bytes.
    pub fn len(&self) -> u16 {
        self.len
    }

    /// True when there are no valid bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Frame {
    /// Makes the handle of a buffer, empty, with the default head-room.
    ///
    /// # Safety
    /// `base..base + stride` lies in the mapping of the live arena `arena`, is initialised, and nobody else (handle, pool,
    /// device) owns it. The obligation ends when the handle is taken apart again by `into_raw` or `into_index`.
    #[inline(always)]
    pub(crate) unsafe fn from_parts(
        base: NonNull<u8>,
        arena: u32,
        index: u32,
        stride: u16,
        headroom: u16,
    ) -> Frame {
        Frame {
            base,
            arena,
            index,
            offset: headroom,
            len: 0,
            stride,
            headroom,
        }
    }

    /// Sets the valid bytes; false and unchanged when they do not lie in the buffer.
    #[inline(always)]
    pub(crate) fn set_range(&mut self, offset: u16, len: u16) -> bool {
        if u32::from(offset) + u32::from(len) > u32::from(self.stride) {
            return false;
        }
        self.offset = offset;
        self.len = len;
        true
    }

    /// The valid bytes.
    #[inline(always)]
    pub fn data(&self) -> &[u8] {
        // SAFETY: offset + len <= stride is kept by every method, the buffer is initialised memory of a mapping that stays
        // while a handle exists, and this handle is its only owner; `&self` forbids writing meanwhile.
        unsafe {
            std::slice::from_raw_parts(
                self.base.as_ptr().add(usize::from(self.offset)),
                usize::from(self.len),
            )
        }
    }

    /// The valid bytes, to change.
    #[inline(always)]
    pub fn data_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `data`; `&mut self` makes this the only reference.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.as_ptr().add(usize::from(self.offset)),
                usize::from(self.len),
            )
        }
    }

    /// Number of valid bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// True when there are no valid bytes.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Free bytes in front of the data.
    #[inline(always)]
    pub fn headroom(&self) -> usize {
        usize::from(self.offset)
    }

    /// Free bytes behind the data.
    #[inline(always)]
    pub fn tailroom(&self) -> usize {
        usize::from(self.stride) - usize::from(self.offset) - usize::from(self.len)
    }

    /// Grows the data by `n` bytes in front and returns these, whose content is whatever was there. `None` and unchanged
    /// when the head-room is smaller.
    #[inline(always)]
    pub fn prepend(&mut self, n: usize) -> Option<&mut [u8]> {
        let n = u16::try_from(n).ok()?;
        self.offset = self.offset.checked_sub(n)?;
        self.len += n;
        self.data_mut().get_mut(..usize::from(n))
    }

    /// As [`prepend`](Self::prepend) with a number that is known when compiling.
    #[inline(always)]
    pub fn prepend_array<const N: usize>(&mut self) -> Option<&mut [u8; N]> {
        let n = const {
            assert!(N <= 0x7fff);
            N.to_le_bytes()
        };
        let n = u16::from_le_bytes([n[0], n[1]]);
        self.offset = self.offset.checked_sub(n)?;
        self.len += n;
        self.data_mut().first_chunk_mut()
    }

    /// Grows the data by `front` bytes in front and `behind` bytes behind, whose content is whatever was there. False and
    /// unchanged when head-room or tail-room is smaller.
    #[inline(always)]
    pub fn expand(&mut self, front: u16, behind: u16) -> bool {
        // Both sums are within 17 bits, and the stride is what bounds the data.
        let end = u32::from(self.offset) + u32::from(self.len) + u32::from(behind);
        if front > self.offset || end > u32::from(self.stride) {
            return false;
        }
        self.offset -= front;
        self.len += front + behind;
        true
    }

    /// Grows the data by `n` bytes behind and returns these, whose content is whatever was there. `None` and unchanged when
    /// the tail-room is smaller.
    #[inline(always)]
    pub fn append(&mut self, n: usize) -> Option<&mut [u8]> {
        if n > self.tailroom() {
            return None;
        }
        let old = self.len();
        self.len += u16::try_from(n).ok()?;
        self.data_mut().get_mut(old..)
    }

    /// Takes `n` bytes from the front of the data; false and unchanged when there are fewer.
    #[inline(always)]
    pub fn trim_front(&mut self, n: usize) -> bool {
        match u16::try_from(n) {
            Ok(n) if n <= self.len => {
                self.offset += n;
                self.len -= n;
                true
            }
            _ => false,
        }
    }

    /// Takes `n` bytes from the end of the data; false and unchanged when there are fewer.
    #[inline(always)]
    pub fn trim_back(&mut self, n: usize) -> bool {
        match u16::try_from(n) {
            Ok(n) if n <= self.len => {
                self.len -= n;
                true
            }
            _ => false,
        }
    }

    /// Empties the frame and sets its head-room (at most the whole buffer).
    #[inline(always)]
    pub fn reset(&mut self, headroom: usize) {
        self.offset = u16::try_from(headroom)
            .unwrap_or(self.stride)
            .min(self.stride);
        self.len = 0;
    }

    /// Empties the frame and sets the arena's default head-room.
    #[inline(always)]
    pub fn reset_default(&mut self) {
        self.headroom &= HEADROOM_MAX;
        self.offset = self.headroom;
        self.len = 0;
    }

    /// Notes that the port is to complete the packet's UDP checksum, whose field holds the sum of the pseudo-header; see
    /// [`crate::checksum`]. Only for ports that [can](crate::PortQueue::completes_checksums).
    #[inline(always)]
    pub fn leave_checksum(&mut self) {
        self.headroom |= CHECKSUM_LEFT;
    }

    /// Whether the packet's UDP checksum is left to the port.
    #[inline(always)]
    pub fn checksum_left(&self) -> bool {
        self.headroom & CHECKSUM_LEFT != 0
    }

    /// Notes that the checksum is complete.
    #[inline(always)]
    pub(crate) fn checksum_done(&mut self) {
        self.headroom &= HEADROOM_MAX;
    }

    /// Makes `bytes` the frame's data, behind the default head-room. False, with an empty frame, when they do not fit.
    pub fn set_data(&mut self, bytes: &[u8]) -> bool {
        self.reset_default();
        match self.append(bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    /// Starts loading the first two cache lines of the data (outer headers) into the caches.
    #[inline(always)]
    pub fn prefetch(&self) {
        let first = self.base.as_ptr().wrapping_add(usize::from(self.offset));
        prefetch_line(first);
        prefetch_line(first.wrapping_add(64));
    }

    /// Position of the buffer in its arena.
    #[inline(always)]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Identity of the arena that the buffer belongs to.
    #[inline(always)]
    pub fn arena_id(&self) -> u32 {
        self.arena
    }

    /// Gives the bytes to a device: the handle becomes a token without access.
    #[inline(always)]
    pub fn into_raw(self) -> RawFrame {
        let this = ManuallyDrop::new(self);
        RawFrame {
            arena: this.arena,
            index: this.index,
            offset: this.offset,
            len: this.len,
        }
    }

    /// Address of the first valid byte.
    #[inline(always)]
    pub(crate) fn data_ptr(&self) -> *const u8 {
        self.base.as_ptr().wrapping_add(usize::from(self.offset))
    }

    /// Ends the handle without giving the buffer anywhere: the caller stores the index.
    #[inline(always)]
    pub(crate) fn into_index(self) -> u32 {
        ManuallyDrop::new(self).index
    }

    /// Gives the buffer back to its arena from anywhere; takes locks, for shutdown and error paths only.
    pub fn give_back(self) {
        let raw = self.into_raw();
        arena::bring_home(raw.arena, raw.index);
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("index", &self.index)
            .field("headroom", &self.headroom())
            .field("len", &self.len)
            .field("tailroom", &self.tailroom())
            .finish()
    }
}

impl Drop for Frame {
    #[cold]
    fn drop(&mut self) {
        LEAKED.fetch_add(1, Relaxed);
        arena::bring_home(self.arena, self.index);
        #[cfg(debug_assertions)]
        if !std::thread::panicking() {
            panic!(
                "frame {} was dropped instead of given back to a pool",
                self.index
            );
        }
    }
}

#[inline(always)]
fn prefetch_line(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; it never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch is a hint; it never faults, whatever the address, and changes no register or flag.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::{Arena, ArenaConfig};
    use crate::pool::Pool;

    fn one() -> (Pool, Frame) {
        let arena = Arena::new(ArenaConfig {
            frames: 16,
            stride: 2048,
            headroom: 192,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 4);
        let frame = pool.get().unwrap();
        (pool, frame)
    }

    #[test]
    fn the_handle_stays_within_24_bytes_also_in_an_option() {
        assert_eq!(size_of::<Frame>(), 24);
        assert_eq!(size_of::<Option<Frame>>(), 24);
    }

    #[test]
    fn growing_and_trimming_moves_only_the_edges() {
        let (mut pool, mut f) = one();
        assert!(f.headroom() >= 192 && f.is_empty());
        assert!(f.set_data(b"payload"));
        f.prepend(3).unwrap().copy_from_slice(b"abc");
        f.append(2).unwrap().copy_from_slice(b"yz");
        assert_eq!(f.data(), b"abcpayloadyz");
        assert!(f.trim_front(3) && f.trim_back(2));
        assert_eq!(f.data(), b"payload");
        assert!(!f.trim_front(8) && !f.trim_back(8));
        assert_eq!(f.data(), b"payload");
        f.data_mut()[0] = b'P';
        assert_eq!(f.data(), b"Payload");
        pool.put(f);
    }

    #[test]
    fn nothing_grows_past_the_buffer() {
        let (mut pool, mut f) = one();
        let (head, tail) = (f.headroom(), f.tailroom());
        assert_eq!(head + tail, 2048);
        assert!(f.prepend(head + 1).is_none());
        assert!(f.append(tail + 1).is_none());
        assert!(f.prepend(usize::MAX).is_none() && f.append(usize::MAX).is_none());
        assert_eq!(f.headroom(), head);
        f.prepend(head).unwrap().fill(1);
        f.append(tail).unwrap().fill(2);
        assert_eq!((f.len(), f.headroom(), f.tailroom()), (2048, 0, 0));
        assert!(!f.set_data(&[0; 2048]));
        assert!(f.is_empty());
        f.reset(usize::MAX);
        assert_eq!((f.headroom(), f.tailroom()), (2048, 0));
        assert!(!f.set_range(2000, 49) && f.set_range(2000, 48));
        pool.put(f);
    }

    #[test]
    fn a_checksum_left_to_the_port_is_forgotten_with_the_packet() {
        let (mut pool, mut f) = one();
        let head = f.headroom();
        assert!(f.set_data(b"packet") && !f.checksum_left());
        f.leave_checksum();
        f.prepend(14).unwrap().fill(0);
        assert!(f.checksum_left());
        f.reset_default();
        assert!(!f.checksum_left() && f.headroom() == head);
        f.leave_checksum();
        pool.put(f);
        let mut all = Vec::new();
        while let Some(f) = pool.get() {
            assert!(!f.checksum_left());
            all.push(f);
        }
        pool.put_bulk(&mut all);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped instead of given back")]
    fn dropping_a_frame_panics_in_debug_builds() {
        let (_pool, f) = one();
        drop(f);
    }
}
