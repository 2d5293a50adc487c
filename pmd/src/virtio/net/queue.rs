//! One queue pair: bursts between the device's rings and frames of the arena, without a copy.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::core::Adapter;
use crate::checksum;
use crate::device::ArenaMap;
use crate::device::ring::FrameRing;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{BURST, PortQueue, PortQueueStats};
use crate::virtio::NET_HEADER;
use crate::virtio::pci::Bell;
use crate::virtio::ring::{Buffer, DriverRing};

/// Shortest frame worth having: an Ethernet header.
const SHORTEST: usize = 14;
/// A frame that is longer on its way out has been forgotten: the device is told once more. QEMU's packed rings lose the place
/// at which they want to be told when the link goes down.
const FORGOTTEN: Duration = Duration::from_millis(50);
/// In front of each packet to send (section 5.1.6).
const PLAIN: [u8; NET_HEADER] = [0; NET_HEADER];
/// The same when the device is to complete the checksum: `NEEDS_CSUM`, where to start and where to store (section 5.1.6.2).
const PARTIAL: [u8; NET_HEADER] = {
    let [a, b] = checksum::UDP_AT.to_le_bytes();
    let [c, d] = checksum::FIELD.to_le_bytes();
    [1, 0, 0, 0, 0, 0, a, b, c, d, 0, 0]
};
/// Idle rounds between two looks at the device's status, which is slow to read.
const CHECK_EVERY: u32 = 1 << 14;

/// One queue pair of a [`super::VirtioNetPort`].
pub struct VirtioNetQueue {
    adapter: Arc<Adapter>,
    pair: usize,
    /// State of the adapter for which the rings are set up and the device runs.
    current: u64,
    /// Epoch that the rings were last set up for.
    prepared: Option<u64>,
    rings: Option<Rings>,
    map: ArenaMap,
    rx_frames: FrameRing,
    tx_frames: FrameRing,
    /// Frames on their way into the receive ring.
    fresh: Vec<Frame>,
    interrupt: Option<OwnedFd>,
    armed: bool,
    /// Largest received frame.
    largest: usize,
    checksums: bool,
    rounds: u32,
    /// Frames that came back from sending, and what that number was when it last changed.
    returned: u32,
    progress: (u32, Instant),
    stats: Arc<PortQueueStats>,
}

struct Rings {
    rx: DriverRing,
    rx_bell: Bell,
    tx: DriverRing,
    tx_bell: Bell,
}

impl VirtioNetQueue {
    pub(super) fn new(
        adapter: Arc<Adapter>,
        pair: usize,
        map: ArenaMap,
        [rx_frames, tx_frames]: [FrameRing; 2],
        interrupt: Option<OwnedFd>,
        largest: usize,
    ) -> VirtioNetQueue {
        VirtioNetQueue {
            checksums: adapter.completes_checksums(),
            adapter,
            pair,
            // Not a state that the adapter can have.
            current: u64::MAX,
            prepared: None,
            rings: None,
            map,
            rx_frames,
            tx_frames,
            fresh: Vec::with_capacity(BURST),
            interrupt,
            armed: false,
            largest,
            rounds: 0,
            returned: 0,
            progress: (0, Instant::now()),
            stats: Arc::default(),
        }
    }

    /// Sets the rings up anew if the adapter's epoch asks for it. True when the device runs.
    #[cold]
    pub(super) fn catch_up(&mut self, pool: &mut Pool) -> bool {
        let epoch = Adapter::epoch(self.adapter.state());
        let running = if self.prepared == Some(epoch) {
            self.adapter.start_if_ready()
        } else {
            // SAFETY: the device was stopped before the epoch began, and starts only when all queues have reported.
            unsafe { self.take_back(pool) };
            match self.adapter.rings(self.pair) {
                Ok([(rx, rx_bell), (tx, tx_bell)]) => {
                    self.rings = Some(Rings {
                        rx,
                        rx_bell,
                        tx,
                        tx_bell,
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "no rings for a virtio-net queue");
                    return false;
                }
            }
            self.armed = false;
            self.prepared = Some(epoch);
            self.adapter.queue_ready(epoch)
        };
        let state = self.adapter.state();
        if !running || Adapter::epoch(state) != epoch || state & 1 == 0 {
            return false;
        }
        self.current = state;
        self.refill(pool);
        true
    }

    /// Frames that the device has to receive into.
    pub fn posted(&self) -> u32 {
        self.rx_frames.held()
    }

    /// Frames that the device has to send.
    pub fn in_flight(&self) -> u32 {
        self.tx_frames.held()
    }

    #[inline(always)]
    fn runs(&mut self, pool: &mut Pool) -> bool {
        self.adapter.state() == self.current || self.catch_up(pool)
    }

    /// Takes all frames from both rings.
    ///
    /// # Safety
    /// The device was stopped.
    unsafe fn take_back(&mut self, pool: &mut Pool) {
        self.rings = None;
        self.stats.tx_errors.add(self.tx_frames.held().into());
        // SAFETY: passed on to the caller.
        unsafe {
            self.rx_frames.drain(pool);
            self.tx_frames.drain(pool);
        }
        pool.put_bulk(&mut self.fresh);
    }

    #[cold]
    fn broken(&mut self, why: &dyn std::fmt::Display) {
        self.adapter.counts.ring_errors.fetch_add(1, Relaxed);
        tracing::warn!(pair = self.pair, error = %why, "the virtio device broke a rule");
        self.adapter.trip();
        // Nothing is to be read from these rings or announced for them any more.
        self.rings = None;
    }

    /// Gives the device empty frames to receive into.
    #[inline(always)]
    fn refill(&mut self, pool: &mut Pool) {
        let Some(rings) = &mut self.rings else { return };
        let room = usize::from(rings.rx.free());
        // Half a ring at a time when it is small, a burst when it is large.
        if room < BURST.min(self.rx_frames.size() as usize / 2) {
            return;
        }
        let mut left = room;
        while left > 0 {
            let n = left.min(BURST);
            if self.fresh.is_empty() && pool.get_bulk(&mut self.fresh, n) == 0 {
                break;
            }
            left = left.saturating_sub(self.fresh.len());
            for frame in self.fresh.drain(..) {
                // The header lies in front of the frame's bytes, in its head-room.
                let addr = self.map.iova(&frame).map(|a| a - NET_HEADER as u64);
                let (Some(addr), Some(id)) = (addr, rings.rx.next_id()) else {
                    pool.put(frame);
                    continue;
                };
                let room = self.largest.min(frame.tailroom());
                match self.rx_frames.put_at(id.into(), frame) {
                    Ok(()) => {
                        rings.rx.add(Buffer {
                            addr,
                            len: u32::try_from(NET_HEADER + room).unwrap_or(0),
                            writable: true,
                        });
                    }
                    Err(frame) => pool.put(frame),
                }
            }
        }
        rings.rx.publish();
        if rings.rx.wants_kick() {
            rings.rx_bell.ring(&rings.rx);
        }
    }

    #[inline(always)]
    fn receive(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let Some(rings) = &mut self.rings else {
            return 0;
        };
        let (mut count, mut bytes) = (0, 0);
        while count < max {
            let (id, written) = match rings.rx.take_used() {
                Ok(Some(used)) => used,
                Ok(None) => break,
                Err(error) => {
                    self.broken(&error);
                    break;
                }
            };
            // SAFETY: the device has reported the buffer as used.
            let mut frame = match unsafe { self.rx_frames.take(id.into()) } {
                Ok(frame) => frame,
                Err(error) => {
                    self.broken(&error);
                    break;
                }
            };
            let len = (written as usize).checked_sub(NET_HEADER);
            let len = len.filter(|n| (SHORTEST..=self.largest).contains(n));
            if len.and_then(|n| frame.append(n)).is_none() {
                pool.put(frame);
                self.adapter.counts.rx_length.fetch_add(1, Relaxed);
                self.stats.rx_errors.add(1);
                continue;
            }
            frame.prefetch();
            count += 1;
            bytes += frame.len();
            out.push(frame);
        }
        self.stats.note_rx(count, bytes);
        count
    }

    /// Takes back what was sent.
    #[inline(always)]
    fn reclaim(&mut self, pool: &mut Pool) {
        loop {
            let Some(rings) = &mut self.rings else { return };
            let id = match rings.tx.take_used() {
                Ok(Some((id, _))) => id,
                Ok(None) => return,
                Err(error) => return self.broken(&error),
            };
            // SAFETY: the device has reported the buffer as used.
            match unsafe { self.tx_frames.take(id.into()) } {
                Ok(frame) => {
                    self.returned = self.returned.wrapping_add(1);
                    pool.put(frame);
                }
                Err(error) => return self.broken(&error),
            }
        }
    }

    /// Looks whether the device still works, and reminds it of frames that it has not sent.
    #[cold]
    fn look(&mut self) {
        self.adapter.check();
        let now = Instant::now();
        if self.tx_frames.held() == 0 || self.progress.0 != self.returned {
            self.progress = (self.returned, now);
        } else if now.duration_since(self.progress.1) >= FORGOTTEN
            && let Some(rings) = &self.rings
            && self.adapter.state() == self.current
        {
            rings.tx_bell.ring(&rings.tx);
            self.progress.1 = now;
        }
    }
}

impl PortQueue for VirtioNetQueue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        if !self.runs(pool) {
            return 0;
        }
        let n = self.receive(pool, out, max);
        if n > 0 {
            if self.armed
                && let Some(rings) = &mut self.rings
            {
                rings.rx.disarm();
                self.armed = false;
            }
            self.refill(pool);
        } else {
            self.rounds = self.rounds.wrapping_add(1);
            if self.rounds.is_multiple_of(CHECK_EVERY) {
                self.look();
            }
        }
        n
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if !self.runs(pool) {
            return 0;
        }
        self.reclaim(pool);
        let Some(rings) = &mut self.rings else {
            return 0;
        };
        let n = frames.len().min(usize::from(rings.tx.free()));
        let (mut sent, mut bytes, mut refused) = (0, 0, 0);
        for mut frame in frames.drain(..n) {
            let len = frame.len();
            if frame.checksum_left() && !self.checksums {
                checksum::complete(&mut frame);
            }
            let header = if frame.checksum_left() {
                &PARTIAL
            } else {
                &PLAIN
            };
            let header = frame.prepend_array().map(|h| *h = *header);
            let place = header.and_then(|()| Some((self.map.iova(&frame)?, rings.tx.next_id()?)));
            let Some((addr, id)) = place else {
                pool.put(frame);
                refused += 1;
                continue;
            };
            match self.tx_frames.put_at(id.into(), frame) {
                Ok(()) => {
                    rings.tx.add(Buffer {
                        addr,
                        len: u32::try_from(len + NET_HEADER).unwrap_or(0),
                        writable: false,
                    });
                    sent += 1;
                    bytes += len;
                }
                Err(frame) => {
                    pool.put(frame);
                    refused += 1;
                }
            }
        }
        if sent > 0 {
            rings.tx.publish();
            if rings.tx.wants_kick() {
                rings.tx_bell.ring(&rings.tx);
            }
            self.stats.note_tx(sent, bytes);
        }
        if refused > 0 {
            self.stats.tx_errors.add(refused);
        }
        n
    }

    fn flush(&mut self, pool: &mut Pool) {
        if self.runs(pool) {
            self.reclaim(pool);
            self.refill(pool);
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.interrupt.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) {
        let (Some(fd), Some(rings)) = (&self.interrupt, &mut self.rings) else {
            return;
        };
        let mut count = [0; 8];
        // Fails when nothing fired since the last time.
        let _ = nix::unistd::read(fd, &mut count);
        rings.rx.arm();
        self.armed = true;
        self.look();
    }

    fn completes_checksums(&self) -> bool {
        self.checksums
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    /// Stops the whole device: it cannot stop a single queue.
    fn drain(&mut self, pool: &mut Pool) {
        // What was given to it last should still leave.
        for _ in 0..100 {
            self.reclaim(pool);
            if self.tx_frames.held() == 0 || !self.adapter.runs() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        self.adapter.close();
        self.current = u64::MAX;
        // SAFETY: the device was stopped for good.
        unsafe { self.take_back(pool) };
    }
}

impl Drop for VirtioNetQueue {
    fn drop(&mut self) {
        if self.rx_frames.held() != 0 || self.tx_frames.held() != 0 {
            let mut pool = Pool::new(self.map.arena(), BURST);
            self.drain(&mut pool);
        }
    }
}
