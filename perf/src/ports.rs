//! What a port costs: cycles for receiving a frame and sending it again, next to the memory port.
//!
//! A step makes a burst receivable while the clock stands still ([`wires`]), then times one `rx_burst` and one `tx_burst`, as
//! a worker calls them under load, and takes away what was sent, untimed. Ports of the kernel do their part of the kernel's
//! work inside these calls; drivers of NICs run against the device models of `pmd`, which work only while the clock stands
//! still, so that what remains is the driver's own cost. A model's doorbell is a function call and a lock; a real one is a
//! posted write across PCI Express.

use std::sync::Arc;

use anyhow::{Result, bail};
use pmd::{Arena, ArenaConfig, BURST, Pool, PortQueue};
use quanta::Clock;
use serde::Serialize;

use crate::clock::{Rates, median};
use crate::measure::Effort;

mod handover;
mod wires;

/// IP packet sizes measured, in bytes.
pub const SIZES: [usize; 2] = [64, 1420];
/// Bursts until rings have gone around and caches are warm.
const WARM_UP: usize = 200;
/// Steps that may find nothing to receive in a row: the kernel's softirqs come late now and then.
const PATIENCE: usize = 1000;

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct PortCost {
    /// Kind of port.
    pub port: &'static str,
    /// What is on its other side.
    pub other_side: &'static str,
    /// IP packet size in bytes.
    pub size: usize,
    /// Nanoseconds for receiving and sending one frame: median of the runs.
    pub ns: f64,
    /// The fastest and the slowest run.
    pub range: (f64, f64),
    /// Time-stamp counter cycles.
    pub tsc_cycles: f64,
    /// Estimated core cycles.
    pub core_cycles: f64,
    /// Mean burst received.
    pub burst: f64,
}

/// The side of a port that the clock does not see.
trait Wire {
    /// Makes up to `n` frames receivable.
    fn give(&mut self, n: usize) -> Result<()>;
    /// Takes away what was sent; how many frames.
    fn take(&mut self) -> usize;
}

/// A port to measure.
struct Subject {
    port: &'static str,
    other_side: &'static str,
    queue: Box<dyn PortQueue>,
    wire: Box<dyn Wire>,
}

/// Measures every kind of port that this machine can run, and the hand-over to another worker; what it cannot is said on standard error.
///
/// # Errors
/// When a port loses frames, or no frame arrives at all.
pub fn measure(clock: &Clock, rates: &Rates, effort: &Effort) -> Result<Vec<PortCost>> {
    // Two AF_XDP ports hold 8192 frames in their rings.
    let arena = &Arena::new(ArenaConfig {
        frames: 16_384,
        // Intel's controllers want buffers of 2048 bytes behind the head-room.
        stride: 4096,
        name: "ports".into(),
        ..ArenaConfig::default()
    })?;
    let mut costs = Vec::new();
    for size in SIZES {
        for (name, make) in wires::IN_PROCESS {
            costs.extend(one(
                name,
                make(arena, size),
                arena,
                clock,
                rates,
                effort,
                size,
            )?);
        }
    }
    costs.extend(handover::measure(arena, clock, rates, effort, SIZES[0])?);
    // Ports of the kernel live in a network namespace, which goes with its thread.
    let kernel = std::thread::scope(|scope| {
        scope
            .spawn(|| -> Result<Vec<PortCost>> {
                let mut costs = Vec::new();
                if let Err(error) = wires::enter_namespace() {
                    eprintln!("no network namespace, so no af_xdp and no tap: {error:#}");
                    return Ok(costs);
                }
                for size in SIZES {
                    for (name, make) in wires::IN_NAMESPACE {
                        costs.extend(one(
                            name,
                            make(arena, size),
                            arena,
                            clock,
                            rates,
                            effort,
                            size,
                        )?);
                    }
                }
                Ok(costs)
            })
            .join()
    });
    match kernel {
        Ok(more) => costs.extend(more?),
        Err(_) => bail!("the thread of the kernel's ports panicked"),
    }
    costs.sort_by_key(|c| c.size);
    Ok(costs)
}

/// Prints the table.
pub fn print(costs: &[PortCost]) {
    println!(
        "{:<26} {:>5} {:>9} {:>17} {:>8} {:>8} {:>7} {:>9}",
        "port", "size", "ns", "range", "TSC", "core", "burst", "x memory"
    );
    for cost in costs {
        let memory = costs
            .iter()
            .find(|c| c.size == cost.size && c.port == "memory")
            .map_or(f64::NAN, |c| c.ns);
        println!(
            "{:<26} {:>5} {:>9.1} {:>8.1}-{:<8.1} {:>8.0} {:>8.0} {:>7.1} {:>8.1}x",
            format!("{} ({})", cost.port, cost.other_side),
            cost.size,
            cost.ns,
            cost.range.0,
            cost.range.1,
            cost.tsc_cycles,
            cost.core_cycles,
            cost.burst,
            cost.ns / memory
        );
    }
}

#[allow(clippy::too_many_arguments, reason = "the common ground of all lines")]
fn one(
    name: &str,
    subject: Result<Subject>,
    arena: &Arc<Arena>,
    clock: &Clock,
    rates: &Rates,
    effort: &Effort,
    size: usize,
) -> Result<Option<PortCost>> {
    let mut subject = match subject {
        Ok(subject) => subject,
        Err(error) => {
            eprintln!("{name}: not measured: {error:#}");
            return Ok(None);
        }
    };
    let mut pool = Pool::new(arena, 512);
    let mut run = Run::default();
    for _ in 0..WARM_UP {
        run.step(&mut subject, &mut pool, clock)?;
    }
    let (mut medians, mut bursts) = (Vec::new(), Vec::new());
    for _ in 0..effort.runs {
        run = Run::default();
        let wanted = effort.time.as_secs_f64() * 1e9;
        let mut spent = 0.0;
        while spent < wanted {
            run.step(&mut subject, &mut pool, clock)?;
            spent = run.ticks as f64 / rates.tsc_ghz;
        }
        bursts.push(run.packets as f64 / run.steps.len() as f64);
        let mut ns: Vec<f64> = run.steps.iter().map(|t| t / rates.tsc_ghz).collect();
        medians.push(median(&mut ns));
    }
    subject.queue.drain(&mut pool);
    let ns = median(&mut medians);
    Ok(Some(PortCost {
        port: subject.port,
        other_side: subject.other_side,
        size,
        ns,
        range: (
            medians.first().copied().unwrap_or(0.0),
            medians.last().copied().unwrap_or(0.0),
        ),
        tsc_cycles: ns * rates.tsc_ghz,
        core_cycles: ns * rates.core_ghz,
        burst: median(&mut bursts),
    }))
}

#[derive(Default)]
struct Run {
    /// Ticks per packet of each step.
    steps: Vec<f64>,
    ticks: u64,
    packets: usize,
    /// Frames received and sent that have not come out at the other side yet.
    missing: usize,
    empty: usize,
}

impl Run {
    fn step(&mut self, subject: &mut Subject, pool: &mut Pool, clock: &Clock) -> Result<()> {
        let mut burst = Vec::with_capacity(BURST);
        subject.wire.give(BURST)?;
        let start = clock.raw();
        let n = subject.queue.rx_burst(pool, &mut burst, BURST);
        if n > 0 {
            subject.queue.tx_burst(pool, &mut burst);
        }
        let ticks = clock.raw() - start;
        if n == 0 {
            self.empty += 1;
            if self.empty > PATIENCE {
                bail!("{}: no frame arrives", subject.port);
            }
            return Ok(());
        }
        self.empty = 0;
        while !burst.is_empty() {
            // A full ring: not what is measured here, but nothing may be lost.
            subject.queue.flush(pool);
            self.missing = self.missing.saturating_sub(subject.wire.take());
            subject.queue.tx_burst(pool, &mut burst);
        }
        self.missing += n;
        self.missing = self.missing.saturating_sub(subject.wire.take());
        if self.missing > 4 * BURST {
            subject.queue.flush(pool);
            self.missing = self.missing.saturating_sub(subject.wire.take());
            if self.missing > 64 * BURST {
                bail!("{}: frames that were sent do not arrive", subject.port);
            }
        }
        self.steps.push(ticks as f64 / n as f64);
        self.ticks += ticks;
        self.packets += n;
        Ok(())
    }
}
