//! One AF_XDP socket as a queue pair.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use super::socket::{Socket, Trial};
use crate::arena::Arena;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{PortQueue, PortQueueStats};

/// Refill in portions of at least this many frames, so that the pool is not asked for each packet.
const REFILL: u32 = 32;
/// Calls of `flush` between two looks at the kernel's own counters.
const STATISTICS_EVERY: u32 = 1024;
/// Most send calls for one burst; in copy mode older kernels send 32 packets a call.
const MAX_KICKS: u32 = 16;
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// One queue pair of an [`AfXdpPort`](super::AfXdpPort).
pub struct AfXdpQueue {
    socket: Option<(Socket, Trial)>,
    arena: Arc<Arena>,
    lent: Lent,
    in_tx: u32,
    scratch: Vec<Frame>,
    flushes: u32,
    /// Kernel counters already added to ours.
    seen_dropped: u64,
    seen_invalid: u64,
    ifindex: u32,
    queue: u32,
    mode: &'static str,
    /// Detaches the program when the last queue is gone.
    _link: Arc<OwnedFd>,
    stats: Arc<PortQueueStats>,
}

impl AfXdpQueue {
    pub(super) fn new(
        socket: Socket,
        trial: Trial,
        arena: &Arc<Arena>,
        ifindex: u32,
        queue: u32,
        mode: &'static str,
        link: Arc<OwnedFd>,
    ) -> AfXdpQueue {
        AfXdpQueue {
            scratch: Vec::with_capacity(socket.fill.size() as usize),
            socket: Some((socket, trial)),
            arena: Arc::clone(arena),
            lent: Lent::new(arena.end_of_indexes()),
            in_tx: 0,
            flushes: 0,
            seen_dropped: 0,
            seen_invalid: 0,
            ifindex,
            queue,
            mode,
            _link: link,
            stats: Arc::default(),
        }
    }

    /// Descriptor of the socket, for the map of sockets.
    pub(super) fn socket_fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(|(s, _)| s.fd.as_raw_fd())
    }

    /// Lends empty frames to the kernel, as many as fit.
    pub(super) fn refill(&mut self, pool: &mut Pool) {
        let Some((socket, _)) = &mut self.socket else {
            return;
        };
        let room = socket.fill.free();
        if room < REFILL.min(socket.fill.size()) {
            return;
        }
        pool.get_bulk(&mut self.scratch, room as usize);
        let stride = u64::from(self.arena.stride());
        for frame in self.scratch.drain(..) {
            if !self.arena.owns(&frame) {
                // A pool of another arena: its frames are not in the registered memory.
                frame.give_back();
                continue;
            }
            let index = frame.into_index();
            self.lent.lend(index);
            socket.fill.push(u64::from(index) * stride);
        }
        socket.fill.submit();
        if socket.fill.needs_wakeup() {
            socket.kick_rx();
        }
    }

    /// Takes sent frames back.
    fn complete(&mut self, pool: &mut Pool) {
        let Some((socket, _)) = &mut self.socket else {
            return;
        };
        let ready = socket.completion.ready();
        if ready == 0 {
            return;
        }
        for _ in 0..ready {
            let place = socket.completion.pop();
            match self.lent.take_back(&self.arena, place, 0) {
                Some(frame) => pool.put(frame),
                None => self.stats.tx_errors.add(1),
            }
        }
        socket.completion.release();
        self.in_tx = self.in_tx.saturating_sub(ready);
    }

    /// Adds what the kernel lost and refused since the last look.
    fn read_statistics(&mut self) {
        let Some(Ok(kernel)) = self.socket.as_ref().map(|(s, _)| s.statistics()) else {
            return;
        };
        let dropped = kernel.rx_dropped + kernel.rx_ring_full;
        let invalid = kernel.tx_invalid_descs;
        self.stats
            .rx_dropped
            .add(dropped.saturating_sub(self.seen_dropped));
        self.stats
            .tx_errors
            .add(invalid.saturating_sub(self.seen_invalid));
        self.seen_dropped = dropped;
        self.seen_invalid = invalid;
    }

    /// Closes the socket and gives every frame that the kernel had to `home`.
    fn close(&mut self, mut home: impl FnMut(Frame)) {
        self.read_statistics();
        let Some((socket, trial)) = self.socket.take() else {
            return;
        };
        drop(socket);
        if trial.wait(self.ifindex, self.queue, RELEASE_LIMIT) {
            for frame in self.lent.take_all(&self.arena) {
                home(frame);
            }
        } else {
            tracing::error!(
                ifindex = self.ifindex,
                queue = self.queue,
                "the kernel does not let go of the queue: its frames stay lost"
            );
        }
    }
}

impl PortQueue for AfXdpQueue {
    fn mode(&self) -> Option<&'static str> {
        Some(self.mode)
    }

    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let Some((socket, _)) = &mut self.socket else {
            return 0;
        };
        let ready = socket
            .rx
            .ready()
            .min(u32::try_from(max).unwrap_or(u32::MAX));
        if ready > 0 {
            let (mut count, mut bytes) = (0, 0);
            for _ in 0..ready {
                let desc = socket.rx.pop();
                // In unaligned mode the distance of the data from the lent address is in the upper 16 bits.
                let place = (desc.addr & 0xffff_ffff_ffff) + (desc.addr >> 48);
                match self.lent.take_back(&self.arena, place, desc.len) {
                    Some(frame) => {
                        count += 1;
                        bytes += frame.len();
                        out.push(frame);
                    }
                    None => self.stats.rx_errors.add(1),
                }
            }
            socket.rx.release();
            self.stats.note_rx(count, bytes);
            self.refill(pool);
            return count;
        }
        self.refill(pool);
        0
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        self.complete(pool);
        let Some((socket, _)) = &mut self.socket else {
            let n = frames.len();
            self.stats.tx_errors.add(n as u64);
            pool.put_bulk(frames);
            return n;
        };
        // The completion ring has the send ring's size, so it cannot overflow while no more than that is under way.
        let room = socket.tx.size().saturating_sub(self.in_tx);
        let n = frames.len().min(room.min(socket.tx.free()) as usize);
        if n > 0 {
            let (mut count, mut bytes) = (0, 0);
            for frame in frames.drain(..n) {
                if !self.arena.owns(&frame) {
                    frame.give_back();
                    self.stats.tx_errors.add(1);
                    continue;
                }
                count += 1;
                bytes += frame.len();
                let raw = frame.into_raw();
                self.lent.lend(raw.index());
                socket.tx.push(libc::xdp_desc {
                    addr: self.arena.offset_of_raw(&raw),
                    len: u32::from(raw.len()),
                    options: 0,
                });
            }
            socket.tx.submit();
            self.in_tx += count;
            self.stats.note_tx(count as usize, bytes);
        }
        if socket.tx.needs_wakeup() {
            for _ in 0..MAX_KICKS {
                if socket.tx.pending() == 0 {
                    break;
                }
                let answer = socket.kick_tx();
                // EAGAIN: this call's budget is used up. ENOBUFS: the interface is full. Anything else will not get better.
                if answer.is_err_and(|e| e.raw_os_error() != Some(libc::EAGAIN)) {
                    break;
                }
            }
        }
        n
    }

    fn flush(&mut self, pool: &mut Pool) {
        self.complete(pool);
        self.refill(pool);
        if let Some((socket, _)) = &self.socket
            && socket.tx.pending() > 0
            && socket.tx.needs_wakeup()
        {
            // Refused calls are repeated at the next flush.
            let _ = socket.kick_tx();
        }
        self.flushes = self.flushes.wrapping_add(1);
        if self.flushes.is_multiple_of(STATISTICS_EVERY) {
            self.read_statistics();
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(|(s, _)| s.fd.as_fd())
    }

    /// Nothing to enable: the socket is readable while its receive ring is not empty.
    fn arm(&mut self) {
        self.read_statistics();
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    fn drain(&mut self, pool: &mut Pool) {
        // What was submitted last should still leave.
        for _ in 0..100 {
            self.flush(pool);
            if self.in_tx == 0 {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        self.close(|frame| pool.put(frame));
    }
}

impl Drop for AfXdpQueue {
    fn drop(&mut self) {
        self.close(Frame::give_back);
    }
}

/// Which frames the kernel has: one bit each, so that an answer that names any other frame is refused.
struct Lent {
    words: Box<[u64]>,
}

impl Lent {
    fn new(frames: u32) -> Lent {
        Lent {
            words: vec![0; (frames as usize).div_ceil(64)].into(),
        }
    }

    #[inline(always)]
    fn lend(&mut self, index: u32) {
        if let Some(word) = self.words.get_mut(index as usize / 64) {
            *word |= 1 << (index % 64);
        }
    }

    /// The frame around `place`, if the kernel had it and `len` bytes fit behind the place.
    #[inline(always)]
    fn take_back(&mut self, arena: &Arena, place: u64, len: u32) -> Option<Frame> {
        let index = u32::try_from(place / u64::from(arena.stride())).ok()?;
        let word = self.words.get_mut(index as usize / 64)?;
        let bit = 1 << (index % 64);
        if *word & bit == 0 {
            return None;
        }
        // SAFETY: the bit says that the frame was lent and is not back; the kernel's report says that it is done with it.
        let frame = unsafe { arena.frame_at(place, len) }?;
        *word &= !bit;
        Some(frame)
    }

    /// All frames that are not back, empty. Only after the kernel has let go of the memory.
    fn take_all(&mut self, arena: &Arena) -> Vec<Frame> {
        let stride = u64::from(arena.stride());
        let mut frames = Vec::new();
        for index in arena.indexes() {
            frames.extend(self.take_back(arena, u64::from(index) * stride, 0));
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;

    #[test]
    fn only_a_frame_that_was_lent_comes_back_and_only_once() {
        let arena = Arena::new(ArenaConfig {
            frames: 70,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 70);
        let mut lent = Lent::new(arena.end_of_indexes());
        let mut frames = Vec::new();
        pool.get_bulk(&mut frames, 70);
        let raw = frames.remove(69).into_raw();
        lent.lend(raw.index());
        let place = arena.offset_of_raw(&raw);
        assert!(
            lent.take_back(&arena, place.wrapping_sub(2048), 10)
                .is_none()
        );
        assert!(lent.take_back(&arena, u64::MAX, 10).is_none());
        assert!(lent.take_back(&arena, place, 4000).is_none());
        let back = lent.take_back(&arena, place, 10).unwrap();
        assert_eq!((back.index(), back.len()), (raw.index(), 10));
        assert!(lent.take_back(&arena, place, 10).is_none());
        frames.push(back);
        for frame in frames.drain(..) {
            lent.lend(frame.into_raw().index());
        }
        let mut all = lent.take_all(&arena);
        assert_eq!(all.len(), 70);
        pool.put_bulk(&mut all);
        assert_eq!(arena.outstanding(), 0);
    }
}
