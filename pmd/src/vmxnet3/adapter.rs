//! The device as a whole: start, stop, events, recovery, statistics.
//!
//! # Recovery
//! The device is one for all queues, so it restarts as a whole. Whoever finds an error (an event, nonsense in a ring) or is
//! asked to reset *trips* the adapter: the device is quiesced, its bus-master right withdrawn and the epoch advanced. Each
//! queue sees the new epoch at its next burst (a sleeping worker is woken through its interrupt's eventfd), takes its frames
//! back, restarts its rings and reports. When all have reported and the pause between attempts is over, the next one that
//! comes by activates the device again.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device::{Device, DeviceError, DmaMem, Mmio, fence_release};
use crate::nic::Link;
use crate::nic::attempts::Attempts;
use crate::port::MacAddr;

use super::regs::*;
use super::{DeviceCounters, Fault};

/// Least time between two starts of a device that fails.
const PAUSE: Duration = Duration::from_millis(100);
/// Time between two looks at whether the device still does what it is told.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// Bit 0 of the state word: the device runs. The rest is the epoch.
const RUNNING: u64 = 1;

/// What the device is doing; guarded by the lock that also serialises commands.
#[derive(Debug)]
pub(super) enum Phase {
    /// Frames move.
    Running,
    /// Stopped until this many queues have restarted, and not before this time.
    Restarting { missing: usize, not_before: Instant },
    /// Stopped for good.
    Closed,
}

/// What to receive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
}

impl Filter {
    fn mode(self) -> u32 {
        let mut mode = RX_UNICAST | RX_BROADCAST;
        if self.promiscuous {
            mode |= RX_PROMISCUOUS;
        }
        if self.all_multicast || self.promiscuous {
            mode |= RX_ALL_MULTICAST;
        }
        mode
    }
}

/// State that only changes under the lock.
#[derive(Debug)]
pub(super) struct Inner {
    phase: Phase,
    filter: Filter,
    /// Counters of earlier lives of the device, and those of this one when they were last read.
    before: DeviceCounters,
    last_start: Option<Instant>,
    checked: Instant,
}

pub(super) struct Adapter {
    /// Name of the port.
    pub(super) name: String,
    pub(super) attempts: Attempts,
    pub(super) device: Arc<dyn Device>,
    /// BAR 0 and BAR 1.
    pub(super) data: Mmio,
    pub(super) config: Mmio,
    pub(super) shared: DmaMem,
    /// Queue descriptors: transmit, then receive.
    pub(super) queues: DmaMem,
    /// Kept for the device.
    pub(super) _rss: Option<DmaMem>,
    pub(super) revision: u32,
    pub(super) mac: MacAddr,
    pub(super) count: usize,
    /// Interrupts of the queues, to wake their workers.
    pub(super) wakers: Vec<OwnedFd>,
    vectors: usize,
    state: AtomicU64,
    inner: Mutex<Inner>,
    /// Set by the panic hook too, which takes no lock.
    closed: AtomicBool,
    link: AtomicU32,
    faults: [AtomicU64; Fault::ALL.len()],
    restarts: AtomicU64,
    link_changes: AtomicU64,
}

/// What an adapter is made of.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) device: Arc<dyn Device>,
    pub(super) data: Mmio,
    pub(super) config: Mmio,
    pub(super) shared: DmaMem,
    pub(super) queues: DmaMem,
    pub(super) rss: Option<DmaMem>,
    pub(super) revision: u32,
    pub(super) mac: MacAddr,
    pub(super) count: usize,
    pub(super) wakers: Vec<OwnedFd>,
    pub(super) vectors: usize,
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
}

impl Adapter {
    /// A stopped adapter that waits for all of its queues.
    pub(super) fn new(parts: Parts) -> Adapter {
        Adapter {
            name: parts.name,
            attempts: Attempts::default(),
            device: parts.device,
            data: parts.data,
            config: parts.config,
            shared: parts.shared,
            queues: parts.queues,
            _rss: parts.rss,
            revision: parts.revision,
            mac: parts.mac,
            count: parts.count,
            wakers: parts.wakers,
            vectors: parts.vectors,
            state: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                phase: Phase::Restarting {
                    missing: parts.count,
                    not_before: Instant::now(),
                },
                filter: Filter {
                    promiscuous: parts.promiscuous,
                    all_multicast: parts.all_multicast,
                },
                before: DeviceCounters::default(),
                last_start: None,
                checked: Instant::now(),
            }),
            closed: AtomicBool::new(false),
            link: AtomicU32::new(0),
            faults: Default::default(),
            restarts: AtomicU64::new(0),
            link_changes: AtomicU64::new(0),
        }
    }

    /// The epoch, and whether the device runs.
    #[inline(always)]
    pub(super) fn state(&self) -> u64 {
        self.state.load(Ordering::Acquire)
    }

    /// Whether the device ran when the state word was this.
    #[inline(always)]
    pub(super) fn runs(state: u64) -> bool {
        state & RUNNING != 0
    }

    /// The epoch of a state word.
    #[inline(always)]
    pub(super) fn epoch(state: u64) -> u64 {
        state >> 1
    }

    /// A queue has restarted its rings for `epoch`.
    pub(super) fn queue_ready(&self, epoch: u64) {
        let mut inner = self.lock();
        if let Phase::Restarting { missing, .. } = &mut inner.phase
            && epoch == Self::epoch(self.state())
        {
            *missing = missing.saturating_sub(1);
        }
    }

    /// Starts the device when all queues are ready and it is time.
    ///
    /// # Errors
    /// The device's refusal; it will be tried again later.
    pub(super) fn start_if_ready(&self) -> Result<bool, DeviceError> {
        let mut inner = self.lock();
        if self.closed.load(Ordering::Acquire) {
            return Ok(false);
        }
        match inner.phase {
            Phase::Running => return Ok(true),
            Phase::Restarting {
                missing: 0,
                not_before,
            } if not_before <= Instant::now() => {}
            Phase::Restarting { .. } | Phase::Closed => return Ok(false),
        }
        let started = self.activate(&inner);
        let now = Instant::now();
        match started {
            Ok(()) => {
                self.attempts.worked();
                if inner.last_start.replace(now).is_some() {
                    self.restarts.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(port = %self.name, "device reset and running again");
                }
                inner.phase = Phase::Running;
                self.state.fetch_or(RUNNING, Ordering::AcqRel);
                Ok(true)
            }
            Err(e) => {
                // Whatever it did of the start is undone: nothing may move until the next attempt.
                self.note(Fault::Start);
                self.command(&inner, RESET);
                let _ = self.device.set_bus_master(false);
                inner.phase = Phase::Restarting {
                    missing: 0,
                    not_before: now + 10 * PAUSE,
                };
                Err(e)
            }
        }
    }

    /// Stops the device and has all queues restart: because of a fault, or because somebody asked for it.
    pub(super) fn trip(&self, fault: Option<Fault>) {
        let mut inner = self.lock();
        if !self.answers(&inner) {
            return;
        }
        if let Some(fault) = fault {
            self.note(fault);
        }
        self.save_counters(&mut inner);
        self.halt();
        let earliest = inner.last_start.map_or_else(Instant::now, |at| at + PAUSE);
        inner.phase = Phase::Restarting {
            missing: self.count,
            not_before: earliest,
        };
        // Takes the running bit away and advances the epoch in one step.
        let state = self.state.load(Ordering::Relaxed);
        self.state
            .store((Self::epoch(state) + 1) << 1, Ordering::Release);
        let why = fault.map_or("asked for", Fault::name);
        tracing::warn!(port = %self.name, why, "vmxnet3 restarts");
        drop(inner);
        for waker in &self.wakers {
            // A full eventfd is readable already.
            let _ = nix::unistd::write(waker, &1u64.to_ne_bytes());
        }
    }

    /// Stops the device for good. All frames may be taken back afterwards.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        if matches!(inner.phase, Phase::Closed) {
            return;
        }
        if self.answers(&inner) {
            self.save_counters(&mut inner);
        }
        self.halt_now();
        self.config.write32(DSAL, 0);
        self.config.write32(DSAH, 0);
        inner.phase = Phase::Closed;
        let _ = self.device.enable_msix(0);
    }

    /// Stops the device for good without waiting for anybody. Its frames stay where they are.
    pub(super) fn halt_now(&self) {
        self.closed.store(true, Ordering::Release);
        self.halt();
        self.state.fetch_and(!RUNNING, Ordering::AcqRel);
    }

    /// Looks at the events that the device has raised in the shared area.
    #[inline]
    pub(super) fn poll_events(&self) {
        if self.shared.read32(SHARED_EVENTS) != 0 {
            self.handle_events();
        }
    }

    /// Looks, now and then, whether the device still does what it is told. One that was reset by somebody else does not write
    /// its counters when asked to; nothing else tells.
    pub(super) fn check(&self) {
        let mut inner = self.lock();
        if !self.answers(&inner) || inner.checked.elapsed() < CHECK_EVERY {
            return;
        }
        inner.checked = Instant::now();
        // Packets sent with segmentation offload, of which there are none.
        self.queues.write64(Q_STATS, u64::MAX);
        self.command(&inner, GET_STATS);
        let written = self.queues.read64(Q_STATS) != u64::MAX;
        drop(inner);
        if !written {
            self.trip(Some(Fault::Inactive));
        }
    }

    #[cold]
    fn handle_events(&self) {
        let mut failed = false;
        {
            let inner = self.lock();
            if !self.answers(&inner) {
                return;
            }
            let events = self.shared.read32(SHARED_EVENTS);
            self.config.write32(ECR, events);
            if events & EVENT_LINK != 0 {
                self.read_link(&inner);
            }
            if events & EVENT_IMPLEMENTATION != 0 {
                tracing::info!(port = %self.name, "vmxnet3 changed its implementation");
            }
            if events & (EVENT_RX_ERROR | EVENT_TX_ERROR) != 0 {
                failed = true;
                self.command(&inner, GET_QUEUE_STATUS);
                if let Some((kind, queue, error)) = self.stopped_queue() {
                    tracing::error!(port = %self.name, kind, queue, error = format_args!("{error:#x}"), "queue stopped");
                }
            }
        }
        if failed {
            self.trip(Some(Fault::QueueStopped));
        }
    }

    /// Asks the device for the link state.
    pub(super) fn link(&self) -> Link {
        let inner = self.lock();
        if self.answers(&inner) {
            self.read_link(&inner);
        }
        drop(inner);
        let word = self.link.load(Ordering::Relaxed);
        Link {
            up: word & 1 != 0,
            mbps: word >> 16,
            full_duplex: true,
        }
    }

    /// How often a fault was seen.
    pub(super) fn faults(&self, fault: Fault) -> u64 {
        self.faults
            .get(fault as usize)
            .map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// Starts after the first.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// How often the link went up or down.
    pub(super) fn link_changes(&self) -> u64 {
        self.link_changes.load(Ordering::Relaxed)
    }

    /// Changes what is received.
    pub(super) fn set_filter(&self, change: impl FnOnce(&mut Filter)) {
        let mut inner = self.lock();
        change(&mut inner.filter);
        if self.answers(&inner) {
            self.write_filter(&inner);
        }
    }

    /// The device's own counters, of all its lives since the port was opened.
    pub(super) fn counters(&self) -> DeviceCounters {
        let inner = self.lock();
        let mut sum = inner.before;
        if self.answers(&inner) {
            sum += self.read_counters(&inner);
        }
        sum
    }

    /// Reads the shared area and starts; the order is the one of the interface's public drivers.
    fn activate(&self, inner: &Inner) -> Result<(), DeviceError> {
        // 1. No interrupt until a queue asks for one.
        self.shared.write32(INTR_CONTROL, INTR_DISABLE_ALL);
        self.shared.write32(SHARED_EVENTS, 0);
        self.mask_all();
        // 2. Queues are stopped and without error until the device says otherwise.
        for queue in 0..2 * self.count {
            self.queues.write8(queue * QUEUE_LEN + Q_STOPPED, 1);
            self.queues.write32(queue * QUEUE_LEN + Q_ERROR, 0);
        }
        // 3. The device may read memory, and learns where the shared area is.
        self.device.set_bus_master(true)?;
        fence_release();
        let address = self.shared.iova();
        self.config.write32(DSAL, low(address));
        self.config.write32(DSAH, high(address));
        // 4. Start.
        let status = self.command(inner, ACTIVATE);
        if status != 0 {
            return Err(match status {
                u32::MAX => DeviceError::Gone,
                _ => DeviceError::Broken(format!("activation failed with {status:#x}")),
            });
        }
        // 5. Settings that activation resets.
        let [a, b, c, d, e, f] = self.mac.0;
        self.config.write32(MACL, u32::from_le_bytes([a, b, c, d]));
        self.config.write32(MACH, u32::from_le_bytes([e, f, 0, 0]));
        if self.revision >= 4 && self.count > 1 {
            self.shared.write32(SHARED_COMMAND_INFO, RSS_FIELDS);
            let refused = self.command(inner, SET_RSS_FIELDS);
            if refused != 0 {
                tracing::info!(port = %self.name, refused, "vmxnet3 does not hash ESP by SPI");
            }
        }
        self.write_filter(inner);
        self.shared.write32(INTR_CONTROL, 0);
        self.read_link(inner);
        Ok(())
    }

    /// Nothing moves afterwards, whatever the device thinks of the command.
    fn halt(&self) {
        fence_release();
        self.config.write32(CMD, QUIESCE);
        // Reading back waits for the command to be done.
        self.config.read32(CMD);
        self.mask_all();
        if let Err(error) = self.device.set_bus_master(false) {
            tracing::error!(port = %self.name, %error, "bus-master stays on");
        }
    }

    fn mask_all(&self) {
        for vector in 0..self.vectors {
            self.data.write32(IMR + vector * STEP, 1);
        }
    }

    fn write_filter(&self, inner: &Inner) {
        self.shared.write32(RX_MODE, inner.filter.mode());
        self.command(inner, UPDATE_RX_MODE);
        self.command(inner, UPDATE_VLAN_FILTERS);
    }

    fn read_link(&self, inner: &Inner) {
        let word = self.command(inner, GET_LINK);
        // All ones is what a device that is gone answers.
        let word = if word == u32::MAX { 0 } else { word };
        let old = self.link.swap(word, Ordering::Relaxed);
        if (old ^ word) & 1 != 0 {
            self.link_changes.fetch_add(1, Ordering::Relaxed);
            let up = word & 1 != 0;
            tracing::info!(port = %self.name, up, mbits = word >> 16, "link");
        }
    }

    fn read_counters(&self, inner: &Inner) -> DeviceCounters {
        self.command(inner, GET_STATS);
        let mut sum = DeviceCounters::default();
        for queue in 0..self.count {
            let word = |kind: usize, n: usize| {
                let at = (kind * self.count + queue) * QUEUE_LEN;
                self.queues.read64(at + Q_STATS + 8 * n)
            };
            // Both kinds: two of segmentation offload, then packets and bytes of unicast, multicast, broadcast, then two kinds
            // of loss.
            let three = |kind, first| {
                (0..3).fold(0u64, |sum, n: usize| {
                    sum.wrapping_add(word(kind, first + 2 * n))
                })
            };
            sum += DeviceCounters {
                tx_packets: three(0, 2),
                tx_bytes: three(0, 3),
                tx_errors: word(0, Q_STATS_COUNT - 2),
                tx_discarded: word(0, Q_STATS_COUNT - 1),
                rx_packets: three(1, 2),
                rx_bytes: three(1, 3),
                rx_no_buffer: word(1, Q_STATS_COUNT - 2),
                rx_errors: word(1, Q_STATS_COUNT - 1),
            };
        }
        sum
    }

    /// Counters begin at zero with each activation.
    fn save_counters(&self, inner: &mut Inner) {
        let last = self.read_counters(inner);
        inner.before += last;
    }

    /// Whether the device runs, and may use memory for its answers.
    fn answers(&self, inner: &Inner) -> bool {
        matches!(inner.phase, Phase::Running) && !self.closed.load(Ordering::Acquire)
    }

    fn note(&self, fault: Fault) {
        if let Some(n) = self.faults.get(fault as usize) {
            n.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn stopped_queue(&self) -> Option<(&'static str, usize, u32)> {
        (0..2 * self.count).find_map(|n| {
            let at = n * QUEUE_LEN;
            let stopped = self.queues.read8(at + Q_STOPPED) != 0;
            let kind = ["transmit", "receive"][usize::from(n >= self.count)];
            stopped.then(|| (kind, n % self.count, self.queues.read32(at + Q_ERROR)))
        })
    }

    /// Gives a command and reads its result. The lock makes the two one step.
    fn command(&self, _held: &Inner, command: u32) -> u32 {
        fence_release();
        self.config.write32(CMD, command);
        self.config.read32(CMD)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.close();
    }
}

/// Low half of an address.
pub(super) fn low(address: u64) -> u32 {
    u32::try_from(address & u64::from(u32::MAX)).unwrap_or(0)
}

/// High half of an address.
pub(super) fn high(address: u64) -> u32 {
    u32::try_from(address >> 32).unwrap_or(0)
}
