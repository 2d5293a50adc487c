//! One queue pair, the same for all families.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::port::{Fault, NO_PHASE, Phase, Shared};
use super::ring::{RxRing, TxRing};
use crate::device::ArenaMap;
use crate::frame::Frame;
use crate::nic::{Link, NicControl};
use crate::pool::Pool;
use crate::port::{PortQueue, PortQueueStats};

/// Bursts between two looks at the clock.
const LOOK_EVERY: u32 = 1024;
/// Time between two looks at the device's registers.
const CHECK_EVERY: Duration = Duration::from_millis(100);
/// A descriptor is never longer in a device that works: the longest ring at 10 Mbit/s with full frames takes less.
const HANG_AFTER: Duration = Duration::from_secs(5);
/// Time between two attempts to start a device that does not start.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// One queue pair of a port.
pub(super) struct IntelQueue {
    shared: Arc<Shared>,
    index: usize,
    map: ArenaMap,
    rx: RxRing,
    tx: TxRing,
    irq: Option<File>,
    armed: bool,
    /// The phase that the rings belong to.
    phase: u32,
    /// The phase in which this queue parked.
    parked: Option<u32>,
    /// The reset is this queue's task, and was last tried then.
    resetting: Option<Instant>,
    bursts: u32,
    checked: Instant,
    /// Completions when they last changed, and when that was.
    progress: (u64, Instant),
    link: Option<Link>,
    /// Losses and errors of the device that are already in `stats`.
    seen: (u64, u64),
    stats: Arc<PortQueueStats>,
}

impl IntelQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        index: usize,
        map: ArenaMap,
        rx: RxRing,
        tx: TxRing,
        irq: Option<OwnedFd>,
    ) -> IntelQueue {
        let now = Instant::now();
        IntelQueue {
            shared,
            index,
            map,
            rx,
            tx,
            irq: irq.map(File::from),
            armed: false,
            phase: NO_PHASE,
            parked: None,
            resetting: None,
            bursts: 0,
            checked: now,
            progress: (0, now),
            link: None,
            seen: (0, 0),
            stats: Arc::default(),
        }
    }

    /// Follows the port's phase; true when the queue may touch the device.
    #[inline(always)]
    fn ready(&mut self, pool: &mut Pool) -> bool {
        self.shared.phase_number() == self.phase || self.follow(pool)
    }

    #[cold]
    fn follow(&mut self, pool: &mut Pool) -> bool {
        match self.shared.phase() {
            Phase::Closed => false,
            Phase::Running(phase) => {
                self.begin(phase, pool);
                true
            }
            Phase::Stopping(phase) => {
                if self.parked != Some(phase) {
                    self.parked = Some(phase);
                    if self.shared.park() {
                        self.reset(phase);
                    }
                } else if self.resetting.is_some_and(|t| t.elapsed() >= RETRY_EVERY) {
                    self.reset(phase);
                }
                false
            }
        }
    }

    fn reset(&mut self, phase: u32) {
        let done = self.shared.restart(phase);
        self.resetting = (!done).then(Instant::now);
    }

    /// Begins anew with a device that was just initialised.
    fn begin(&mut self, phase: u32, pool: &mut Pool) {
        self.stats.tx_errors.add(self.tx.unsent().into());
        // SAFETY: the device was reset and initialised with empty rings before the phase became `phase`, and this queue has
        // given it nothing since.
        unsafe {
            self.rx.reclaim(pool);
            self.tx.reclaim(pool);
        }
        if let Some(irq) = self.shared.new_vector(self.index) {
            self.irq = Some(File::from(irq));
        }
        self.rx.refill(pool, &self.map);
        self.phase = phase;
        self.resetting = None;
        self.armed = false;
        self.progress = (self.tx.completed(), Instant::now());
    }

    #[inline(always)]
    fn tick(&mut self) {
        self.bursts = self.bursts.wrapping_add(1);
        if self.bursts.is_multiple_of(LOOK_EVERY) {
            self.look();
        }
    }

    /// Counters, link, and whether the device still works.
    #[cold]
    fn look(&mut self) {
        let now = Instant::now();
        // Registers tell nothing while the device is being reset.
        if now.duration_since(self.checked) < CHECK_EVERY
            || self.shared.phase_number() != self.phase
        {
            return;
        }
        self.checked = now;
        let shared = Arc::clone(&self.shared);
        let Some(link) = shared.chip.link() else {
            return shared.fail(Fault::Gone);
        };
        if let Some(fault) = shared.chip.fault() {
            return shared.fail(fault);
        }
        let drops = shared.chip.queue_drops(self.index);
        self.stats.rx_dropped.add(u64::from(drops));
        if self.index == 0 {
            let (dropped, errors) = shared.collect();
            self.stats.rx_dropped.add(dropped - self.seen.0);
            self.stats.rx_errors.add(errors - self.seen.1);
            self.seen = (dropped, errors);
            if self.link != Some(link) {
                tracing::info!(port = %shared.name, up = link.up, mbps = link.mbps, "link");
            }
        }
        let completed = self.tx.completed();
        if self.tx.pending() == 0 || completed != self.progress.0 || self.link != Some(link) {
            self.progress = (completed, now);
        } else if link.up && now.duration_since(self.progress.1) >= HANG_AFTER {
            shared.fail(Fault::TransmitHang);
        }
        self.link = Some(link);
    }
}

impl PortQueue for IntelQueue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        if !self.ready(pool) {
            return 0;
        }
        self.tick();
        let got = self.rx.poll(pool, out, max);
        self.rx.refill(pool, &self.map);
        if got.packets > 0 {
            self.stats.note_rx(got.packets, got.bytes);
            if self.armed {
                self.armed = false;
                self.shared.chip.arm(self.index, false);
            }
        }
        if got.errors > 0 {
            self.stats.rx_errors.add(got.errors as u64);
        }
        got.packets
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if !self.ready(pool) {
            return 0;
        }
        self.tx.complete(pool);
        let sent = self.tx.push(pool, &self.map, frames);
        self.stats.note_tx(sent.packets, sent.bytes);
        if sent.errors > 0 {
            self.stats.tx_errors.add(sent.errors as u64);
        }
        sent.packets + sent.errors
    }

    fn flush(&mut self, pool: &mut Pool) {
        if self.ready(pool) {
            self.tick();
            self.tx.complete(pool);
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.irq.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) {
        // A worker that sleeps makes no bursts: this is when it looks.
        self.look();
        if self.shared.phase_number() != self.phase {
            return;
        }
        if let Some(mut irq) = self.irq.as_ref() {
            // Empty already is what it mostly finds.
            let _ = irq.read(&mut [0; 8]);
            self.armed = true;
            self.shared.chip.arm(self.index, true);
        }
    }

    fn completes_checksums(&self) -> bool {
        self.tx.completes_checksums()
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    fn drain(&mut self, pool: &mut Pool) {
        if !self.shared.is_safe() {
            self.shared.quiesce();
        }
        if self.shared.is_safe() {
            self.stats.tx_errors.add(self.tx.unsent().into());
            // SAFETY: bus-master is off, or the device's transfers are over and it was told to start no more.
            unsafe {
                self.rx.reclaim(pool);
                self.tx.reclaim(pool);
            }
        } else {
            tracing::error!(port = %self.shared.name, queue = self.index, "the device does not stop: its frames stay lost");
        }
    }
}

impl Drop for IntelQueue {
    /// The device must not be left with the address of a ring whose memory is free.
    fn drop(&mut self) {
        if !self.shared.is_safe() {
            self.shared.quiesce();
        }
    }
}
