//! One queue pair: a transmit and a receive queue of the same number.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::device::{ArenaMap, Mmio};
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{BURST, PortQueue, PortQueueStats};

use super::Fault;
use super::adapter::Adapter;
use super::rx::{Received, RxRing};
use super::tx::TxRing;

/// Bursts between two looks at the device's events when there is no pause.
const EVENTS_EVERY: u32 = 256;
/// Bursts between two looks at whether the device still does what it is told, which are slow.
const CHECK_EVERY: u32 = 1 << 14;

/// One queue pair of a [`super::Vmxnet3Port`].
pub struct Vmxnet3Queue {
    pub(super) adapter: Arc<Adapter>,
    /// State of the adapter for which the rings are set up and the device runs.
    current: u64,
    /// Epoch that the rings were last restarted for.
    restarted: Option<u64>,
    bursts: u32,
    map: ArenaMap,
    tx: TxRing,
    rx: RxRing,
    /// Mask register of the receive queue's vector.
    mask: Mmio,
    interrupt: Option<OwnedFd>,
    stats: Arc<PortQueueStats>,
}

impl Vmxnet3Queue {
    pub(super) fn new(
        adapter: Arc<Adapter>,
        map: ArenaMap,
        tx: TxRing,
        rx: RxRing,
        mask: Mmio,
        interrupt: Option<OwnedFd>,
    ) -> Vmxnet3Queue {
        Vmxnet3Queue {
            adapter,
            // Not a state that the adapter can have: the epoch is one ahead of any.
            current: u64::MAX,
            restarted: None,
            bursts: 0,
            map,
            tx,
            rx,
            mask,
            interrupt,
            stats: Arc::default(),
        }
    }

    /// Restarts the rings if the adapter's epoch asks for it, and the device if this queue is the last one. True when the
    /// device runs.
    #[cold]
    pub(super) fn catch_up(&mut self, pool: &mut Pool) -> bool {
        let state = self.adapter.state();
        let epoch = Adapter::epoch(state);
        if self.restarted != Some(epoch) {
            // SAFETY: whoever advanced the epoch had stopped the device, and it only starts when all queues have reported.
            let lost = unsafe {
                self.rx.restart(&self.map, pool);
                self.tx.restart(pool)
            };
            self.stats.tx_errors.add(u64::from(lost));
            self.restarted = Some(epoch);
            self.adapter.queue_ready(epoch);
        }
        match self.adapter.start_if_ready() {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                if let Some(attempts) = self.adapter.attempts.failed() {
                    tracing::error!(port = %self.adapter.name, %error, attempts, "vmxnet3 does not start");
                }
                return false;
            }
        }
        let state = self.adapter.state();
        if Adapter::runs(state) && Adapter::epoch(state) == epoch {
            self.current = state;
            return true;
        }
        false
    }

    /// Buffers that the device has to receive into.
    pub fn posted(&self) -> u32 {
        self.rx.posted()
    }

    /// Frames that the device has to send.
    pub fn in_flight(&self) -> u32 {
        self.tx.in_flight()
    }

    #[inline(always)]
    fn runs(&mut self, pool: &mut Pool) -> bool {
        self.adapter.state() == self.current || self.catch_up(pool)
    }

    #[inline(always)]
    fn look_at_events(&mut self) {
        self.bursts = self.bursts.wrapping_add(1);
        if self.bursts.is_multiple_of(EVENTS_EVERY) {
            self.adapter.poll_events();
        }
        if self.bursts.is_multiple_of(CHECK_EVERY) {
            self.adapter.check();
        }
    }

    #[cold]
    fn broken(&self, fault: Fault) {
        self.adapter.trip(Some(fault));
    }
}

impl PortQueue for Vmxnet3Queue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        if !self.runs(pool) {
            return 0;
        }
        let (mut n, mut bytes, mut errors) = (0, 0, 0);
        // Parts and errors count against the burst: a device cannot keep a worker here.
        for _ in 0..max {
            match self.rx.next(pool) {
                Ok(None) => break,
                Ok(Some(Received::Frame(frame))) => {
                    n += 1;
                    bytes += frame.len();
                    out.push(frame);
                }
                Ok(Some(Received::Part)) => {}
                Ok(Some(Received::Error)) => errors += 1,
                Err(fault) => {
                    self.broken(fault);
                    break;
                }
            }
        }
        self.rx.refill(&self.map, pool);
        if n > 0 {
            self.stats.note_rx(n, bytes);
        }
        if errors > 0 {
            self.stats.rx_errors.add(errors);
        }
        self.look_at_events();
        n
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if !self.runs(pool) {
            return 0;
        }
        if self.tx.worth_reclaiming(frames.len())
            && let Err(fault) = self.tx.reclaim(pool)
        {
            self.broken(fault);
            return 0;
        }
        let sent = self.tx.send(&self.map, pool, frames);
        if sent.packets > 0 {
            self.stats.note_tx(sent.packets, sent.bytes);
        }
        if sent.errors > 0 {
            self.stats.tx_errors.add(sent.errors as u64);
        }
        sent.packets + sent.errors
    }

    fn flush(&mut self, pool: &mut Pool) {
        if !self.runs(pool) {
            return;
        }
        self.tx.ring_rest();
        if let Err(fault) = self.tx.reclaim(pool) {
            self.broken(fault);
            return;
        }
        self.adapter.poll_events();
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.interrupt.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) {
        // A worker that sleeps makes no bursts: this is when it looks.
        self.adapter.check();
        let Some(fd) = &self.interrupt else { return };
        let mut count = [0; 8];
        // Fails when nothing fired since the last time.
        let _ = nix::unistd::read(fd, &mut count);
        // A vector that fired while masked fires as it is opened.
        self.mask.write32(0, 0);
    }

    fn completes_checksums(&self) -> bool {
        true
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    /// Stops the whole device: it cannot stop a single queue.
    fn drain(&mut self, pool: &mut Pool) {
        self.adapter.close();
        self.current = u64::MAX;
        // SAFETY: the device was stopped for good.
        let lost = unsafe {
            self.rx.take_back(pool);
            self.tx.take_back(pool)
        };
        self.stats.tx_errors.add(u64::from(lost));
    }
}

impl Drop for Vmxnet3Queue {
    fn drop(&mut self) {
        // Nothing to do after an orderly shutdown.
        if self.rx.posted() != 0 || self.tx.in_flight() != 0 {
            let mut pool = Pool::new(self.map.arena(), BURST);
            self.drain(&mut pool);
        }
    }
}
