//! What it costs when a packet arrives at a worker that does not own its SA: into the ring between the two, and out of it.
//!
//! As a worker does: a burst is parsed and staged, written in bulk once a round, and read in bulk by the owner. On one CPU both
//! halves are timed together, with rings and frames in its cache. On two CPUs packets circulate between two workers, each of
//! which takes what came and hands it back: a packet crosses twice while each CPU does both halves once, so the time per
//! packet on one CPU is again both halves, with the lines now coming from the other CPU's cache.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier};

use anyhow::{Context, Result, bail};
use gateway::wire::{NattPorts, Parsed, parse};
use gateway::worker::{Handed, Handover, Task};
use pmd::{Arena, BURST, Frame, Pool};
use quanta::Clock;

use super::{PortCost, wires};
use crate::clock::{Rates, median};
use crate::machine;
use crate::measure::Effort;

/// Bursts that circulate between two CPUs: enough for neither to wait for the other.
const CIRCULATING: usize = 16;
const SLOTS: usize = 4096;

/// Measures both ways; on a machine with one CPU only the first.
///
/// # Errors
/// Frames of the arena are too small, or rings refuse packets for which there is room.
pub(super) fn measure(
    arena: &Arc<Arena>,
    clock: &Clock,
    rates: &Rates,
    effort: &Effort,
    size: usize,
) -> Result<Vec<PortCost>> {
    let mut pool = Pool::new(arena, 512);
    let mut frames = wires::make(&mut pool, &wires::packet(size), CIRCULATING * BURST)?;
    let parsed = parse(
        frames.first().context("no frame")?.data(),
        NattPorts::default(),
    )
    .map_err(|reason| anyhow::anyhow!("the packet does not parse: {reason:?}"))?;
    let mut costs = Vec::new();
    let line = |other_side, mut runs: Vec<f64>| {
        let ns = median(&mut runs);
        let range = (runs.first().copied(), runs.last().copied());
        PortCost {
            port: "hand-over",
            other_side,
            size,
            ns,
            range: (range.0.unwrap_or(0.0), range.1.unwrap_or(0.0)),
            tsc_cycles: ns * rates.tsc_ghz,
            core_cycles: ns * rates.core_ghz,
            burst: BURST as f64,
        }
    };
    let mut runs = Vec::new();
    for _ in 0..effort.runs {
        let mut burst = frames.split_off(frames.len() - BURST);
        runs.push(one_cpu(&mut burst, &parsed, clock, rates, effort)?);
        frames.append(&mut burst);
    }
    costs.push(line("one CPU", runs));
    if let Some(other) = machine::allowed()
        .iter()
        .copied()
        .find(|c| Some(*c) != machine::pinned())
    {
        let mut runs = Vec::new();
        for _ in 0..effort.runs {
            runs.push(two_cpus(&mut frames, &parsed, clock, rates, effort, other)?);
        }
        costs.push(line("two CPUs", runs));
    } else {
        eprintln!("hand-over between CPUs: not measured: there is one CPU only");
    }
    pool.put_bulk(&mut frames);
    Ok(costs)
}

fn handed(frame: Frame, parsed: &Parsed) -> Handed {
    Handed {
        frame,
        port: 0,
        task: Task::Open(*parsed),
    }
}

/// Nanoseconds per packet: the median of many bursts.
fn one_cpu(
    burst: &mut Vec<Frame>,
    parsed: &Parsed,
    clock: &Clock,
    rates: &Rates,
    effort: &Effort,
) -> Result<f64> {
    let mut ends = Handover::mesh(2, SLOTS)?;
    let (mut to, mut from) = (ends.pop().context("ends")?, ends.pop().context("ends")?);
    let mut steps = Vec::new();
    let (mut spent, wanted) = (0.0, effort.time.as_secs_f64() * 1e9);
    while spent < wanted {
        let start = clock.raw();
        for frame in burst.drain(..) {
            from.stage(1, handed(frame, parsed));
        }
        let sent = from.flush(Frame::give_back);
        to.receive(usize::MAX, |h| burst.push(h.frame));
        let ns = (clock.raw() - start) as f64 / rates.tsc_ghz;
        if sent != BURST {
            bail!("{sent} packets of {BURST} were handed over");
        }
        spent += ns;
        steps.push(ns / BURST as f64);
    }
    Ok(median(&mut steps))
}

/// Nanoseconds per packet on this CPU while the other one does the same.
fn two_cpus(
    frames: &mut Vec<Frame>,
    parsed: &Parsed,
    clock: &Clock,
    rates: &Rates,
    effort: &Effort,
    other: usize,
) -> Result<f64> {
    let mut ends = Handover::mesh(2, SLOTS)?;
    let (theirs, mut ours) = (ends.pop().context("ends")?, ends.pop().context("ends")?);
    let (all, stop) = (frames.len(), AtomicBool::new(false));
    // A thread begins on the CPU of its parent, which must not spin there before the thread has moved.
    let there = Barrier::new(2);
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            let pinned = machine::pin(Some(other));
            there.wait();
            let mut end = theirs;
            while !stop.load(Relaxed) {
                round(&mut end, 0, parsed);
            }
            pinned.map(|_| end)
        });
        there.wait();
        for frame in frames.drain(..) {
            ours.stage(1, handed(frame, parsed));
        }
        ours.flush(Frame::give_back);
        let (mut packets, mut rounds, mut ticks) = (0, Vec::new(), 0);
        let wanted = effort.time.as_secs_f64() * 1e9;
        // One figure for some thousand packets: rounds find what happens to be there.
        let mut start = clock.raw();
        while (ticks as f64) / rates.tsc_ghz < wanted {
            packets += round(&mut ours, 1, parsed);
            if packets >= 8192 {
                let now = clock.raw();
                rounds.push((now - start) as f64 / rates.tsc_ghz / packets as f64);
                ticks += now - start;
                (packets, start) = (0, now);
            }
        }
        stop.store(true, Relaxed);
        let mut end = echo
            .join()
            .map_err(|_| anyhow::anyhow!("the other worker panicked"))?
            .with_context(|| format!("no thread can be pinned to CPU {other}"))?;
        // Home, wherever they are.
        ours.receive(usize::MAX, |h| frames.push(h.frame));
        end.receive(usize::MAX, |h| frames.push(h.frame));
        if frames.len() != all {
            bail!("{} packets of {all} are left", frames.len());
        }
        Ok(median(&mut rounds))
    })
}

/// Takes what came and hands it back; how many.
fn round(end: &mut Handover, other: usize, parsed: &Parsed) -> usize {
    let mut burst = Vec::with_capacity(BURST);
    end.receive(BURST, |h| burst.push(h.frame));
    for frame in burst.drain(..) {
        end.stage(other, handed(frame, parsed));
    }
    end.flush(Frame::give_back)
}
