//! A worker's thread: pinning, the poll loop, sleeping, the orderly stop.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use quanta::Clock;
use sa_store::ledger::WorkerCounters;
use sa_store::snapshot::Reader;

use super::core::{Core, Shared};
use super::egress::Ports;
use super::handover::Waker;
use super::idle::{Backoff, Idle};
use super::punt::Taps;
use super::reports::Reports;
use super::setup::WorkerParts;
use super::stages::{Stage, StageClock, StageTicks};
use crate::engine::parallel::CryptoHelper;
use crate::esp::iv::CbcIvGen;
use crate::wire::NattPorts;

/// Empty rounds, in a row and of all workers, after which a stopping crew is drained.
const QUIET_ROUNDS: u32 = 64;
/// Longest time that a stop waits for what is inside.
const DRAIN: Duration = Duration::from_secs(2);

/// One worker, not tied to a thread: [`round`](Worker::round) is all that a benchmark needs.
pub struct Worker {
    core: Core,
    reader: Reader,
    clock: Clock,
    counters: Arc<WorkerCounters>,
    backoff: Backoff,
    cpu: Option<usize>,
}

impl Worker {
    /// Puts the parts together. `clock` must be the one that control uses.
    pub fn new(parts: WorkerParts, clock: Clock, iv: CbcIvGen) -> Self {
        let WorkerParts {
            id,
            cpu,
            reader,
            pool,
            queues,
            queue_owner,
            taps,
            bank,
            helper,
            handover,
            counters,
            policy_hits,
            reports,
            config,
        } = parts;
        let backoff = Backoff::new(config.idle);
        let shared = Shared {
            id,
            natt: NattPorts([4500, config.natt_port]),
            ports: Ports::new(&config, queues, queue_owner),
            taps: Taps::new(&config, taps),
            config,
            counters: Arc::clone(&counters),
            hits: policy_hits,
            pool,
            handover,
            bank,
            helper,
            stages: StageClock::new(&clock),
            reports: Reports::new(reports),
            now: 0,
        };
        Self {
            core: Core::new(shared, iv),
            reader,
            clock,
            counters,
            backoff,
            cpu,
        }
    }

    /// One poll round. Returns how many frames it moved.
    #[inline]
    pub fn round(&mut self) -> usize {
        let started = self.clock.raw();
        let now = nanos(&self.clock, started);
        let snapshot = self.reader.load();
        let work = self.core.round(snapshot, now);
        if work != 0 {
            self.counters.busy_polls.add(1);
            self.counters
                .burst_latency
                .observe(self.clock.delta_as_nanos(started, self.clock.raw()));
        } else {
            self.counters.idle_polls.add(1);
        }
        self.core.shared.stages.mark(Stage::Rest);
        work
    }

    /// Ticks spent in each stage so far; nothing in a build without the feature `stages`.
    pub fn stage_ticks(&self) -> Option<StageTicks> {
        #[cfg(feature = "stages")]
        return Some(self.core.shared.stages.ticks());
        #[cfg(not(feature = "stages"))]
        None
    }

    /// Leaves the time since the last round out of the stages' account.
    pub fn skip_stage(&mut self) {
        self.core.shared.stages.skip();
    }

    /// Whether no port will ever receive anything again and nothing is inside.
    pub fn finished(&self) -> bool {
        self.core.shared.ports.finished() && self.core.is_empty()
    }

    /// Sleeps until a descriptor is ready, a peer hands something over, or `longest` has passed.
    fn sleep(&mut self, longest: Duration) {
        let waker_ready = {
            let shared = &mut self.core.shared;
            shared.ports.arm(&mut shared.pool);
            shared.taps.arm(&mut shared.pool);
            shared.handover.waker().announce_sleep();
            let helper = shared.helper.as_ref();
            shared.handover.pending() || helper.is_some_and(CryptoHelper::is_wanted)
        };
        // A frame may have come in before the port was armed.
        if !waker_ready && self.round() == 0 {
            self.reader.park();
            self.counters.sleeps.add(1);
            self.wait(longest);
        }
        self.core.shared.taps.hurry();
        self.core.shared.handover.waker().announce_awake();
        self.backoff.woken();
    }

    fn wait(&self, longest: Duration) {
        let shared = &self.core.shared;
        let now = gateway_now(&self.clock);
        let due = self.core.outbound.wake_at(now);
        let until = due.map_or(u64::MAX, |at| at.saturating_sub(now));
        let longest = longest.min(Duration::from_nanos(until));
        let mut fds: Vec<PollFd<'_>> = shared
            .ports
            .wait_fds()
            .chain(shared.taps.wait_fds())
            .map(|fd: BorrowedFd<'_>| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let own = shared.handover.waker().fd();
        fds.push(PollFd::new(own.as_fd(), PollFlags::POLLIN));
        let micros = longest.as_micros();
        if micros < 1000 {
            // poll(2) counts in milliseconds; naps are shorter.
            std::thread::sleep(longest);
            return;
        }
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        // An interrupted wait is a wake-up like any other.
        let _ = nix::poll::poll(&mut fds, timeout);
    }

    fn run(&mut self, stop: &Stop) {
        while !stop.asked.load(Ordering::Relaxed) {
            if self.round() != 0 {
                self.backoff.worked();
                continue;
            }
            if let Idle::Sleep(longest) = self.backoff.idle(self.core.shared.all_wake()) {
                self.sleep(longest);
            }
        }
        self.drain(stop);
    }

    /// Receives no more, but goes on until no worker has anything left: what was handed over is not lost.
    fn drain(&mut self, stop: &Stop) {
        self.core.stop_receiving();
        let end = self.clock.raw();
        let mut quiet = 0;
        let mut reported = false;
        loop {
            if self.round() == 0 && self.core.is_empty() {
                quiet += 1;
                std::thread::yield_now();
            } else {
                quiet = 0;
                if reported {
                    stop.quiet.fetch_sub(1, Ordering::AcqRel);
                    reported = false;
                }
            }
            if quiet >= QUIET_ROUNDS && !reported {
                stop.quiet.fetch_add(1, Ordering::AcqRel);
                reported = true;
            }
            if stop.quiet.load(Ordering::Acquire) >= stop.workers
                || self.clock.delta(end, self.clock.raw()) > DRAIN
            {
                break;
            }
        }
        self.core.shut_down();
        self.reader.park();
    }

    /// Ends the worker: what is inside is counted as dropped, all frames go back.
    pub fn shut_down(mut self) {
        self.core.shut_down();
    }
}

/// What a stop is agreed by.
#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    quiet: AtomicUsize,
    workers: usize,
}

/// All workers' threads.
#[derive(Debug)]
pub struct Crew {
    stop: Arc<Stop>,
    wakers: Arc<[Waker]>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts one thread per worker.
    ///
    /// # Errors
    /// The system refused a thread.
    pub fn start(workers: Vec<Worker>) -> std::io::Result<Self> {
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            quiet: AtomicUsize::new(0),
            workers: workers.len(),
        });
        let wakers = workers.first().map_or_else(
            || Arc::from([]),
            |w| Arc::clone(w.core.shared.handover.wakers()),
        );
        let mut threads = Vec::with_capacity(workers.len());
        for mut worker in workers {
            let stop = Arc::clone(&stop);
            let name = format!("worker-{}", worker.core.shared.id);
            threads.push(std::thread::Builder::new().name(name).spawn(move || {
                if let Some(cpu) = worker.cpu {
                    pin(cpu);
                }
                worker.run(&stop);
            })?);
        }
        Ok(Self {
            stop,
            wakers,
            threads,
        })
    }

    /// Whether every thread still runs.
    pub fn alive(&self) -> bool {
        self.threads.iter().all(|t| !t.is_finished())
    }

    /// Lets the workers finish what they hold, then ends them.
    pub fn stop(self) {
        self.stop.asked.store(true, Ordering::Relaxed);
        for waker in self.wakers.iter() {
            waker.wake();
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }
}

/// Pins the calling thread and says when it did not take.
fn pin(cpu: usize) {
    // core_affinity aborts on ids that the allowed set cannot hold, so look first.
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    let Some(id) = allowed.into_iter().find(|c| c.id == cpu) else {
        tracing::warn!(
            cpu,
            "the CPU is not in this process's set; the worker runs unpinned"
        );
        return;
    };
    let pinned = core_affinity::set_for_current(id);
    let now = nix::sched::sched_getcpu().ok();
    if !pinned || now != Some(cpu) {
        tracing::warn!(cpu, ?now, "pinning did not take");
    }
}

/// The gateway clock at a raw reading: nanoseconds since an arbitrary start that all threads share.
#[inline(always)]
fn nanos(clock: &Clock, raw: u64) -> u64 {
    clock.delta_as_nanos(0, raw)
}

/// The gateway clock now, nanoseconds. What control passes on as the time must come from here too.
pub fn gateway_now(clock: &Clock) -> u64 {
    nanos(clock, clock.raw())
}
