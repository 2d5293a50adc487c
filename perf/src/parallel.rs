//! One SA's packets on several workers beside one: the owner does everything but part of the ciphering.
//!
//! Both gateways run in one process and take turns, so that what else the machine does meets both. A step in which packets
//! are missing, late for the replay window or in another order ends the measurement ([`Rig::step`]).

use std::time::{Duration, Instant};

use anyhow::Result;
use sa_store::sa::Direction;
use serde::Serialize;

use crate::clock::median;
use crate::measure::Bench;
use crate::rig::{Effort, Rig};
use crate::scenario::{Scenario, Spread};
use crate::{machine, together};

/// What is to be reached at 1420 bytes.
pub const WANTED: f64 = 1.6;
/// Share of the steps that are called quiet: the fastest, which nobody else disturbed.
const QUIET: usize = 20;

/// Where packets are when a step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Packets {
    /// In memory: equally far from all workers.
    Memory,
    /// As the generator left them: in the caches of the first worker's CPU.
    Cache,
}

/// One suite and direction.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// Algorithms.
    pub suite: String,
    /// Who ciphers.
    pub provider: String,
    /// `out` or `in`.
    pub direction: &'static str,
    /// Inner packets.
    pub size: String,
    /// Workers.
    pub workers: usize,
    /// Where packets were.
    pub packets_at: Packets,
    /// Nanoseconds per packet with one worker and with all: medians of the steps.
    pub one_ns: f64,
    /// See `one_ns`.
    pub all_ns: f64,
    /// The same of the fastest twentieth of the steps.
    pub quiet_one_ns: f64,
    /// See `quiet_one_ns`.
    pub quiet_all_ns: f64,
    /// Share of the packets that helpers ciphered.
    pub helped: f64,
    /// Packets.
    pub packets: u64,
    /// Why: what the machine and the workers did meanwhile.
    pub profile: Profile,
}

/// Where the time of all workers went, nanoseconds for each of the SA's packets unless said otherwise; medians of the quiet steps (see `quiet_all_ns`).
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// How many times the work of one CPU two of them did together, measured beside each step: median and lowest twentieth.
    /// See [`crate::together`].
    pub together: Option<(f64, f64)>,
    /// Share of the CPU time that the host gave to others meanwhile, where the system tells.
    pub stolen: f64,
    /// The owner: framing, numbers, windows, its part of the ciphering, putting packets down and taking them back.
    pub owner_works: f64,
    /// The owner with nothing to do but wait for helpers.
    pub owner_waits: f64,
    /// Helpers, for each packet that they ciphered: fetching it from the other CPU, and ciphering.
    pub helper_ns: f64,
    /// Share of the time that helpers had nothing to do.
    pub helpers_idle: f64,
    /// Share of the packets that the owner ciphered although their SA was shared.
    pub kept: f64,
    /// Times in a thousand packets that ciphered ones waited for earlier ones at a helper.
    pub held_up: f64,
    /// Ratios of the steps beside which two CPUs did at least [`TWO`] times the work of one, and of those beside which they did
    /// not: medians and numbers of steps.
    pub on_two: (f64, usize),
    /// See `on_two`.
    pub on_less: (f64, usize),
}

/// Two CPUs that do so many times the work of one are two.
pub const TWO: f64 = 1.8;

impl Ratio {
    /// How many times as fast, by the medians.
    pub fn ratio(&self) -> f64 {
        self.one_ns / self.all_ns
    }

    /// The same of the quiet steps.
    pub fn quiet(&self) -> f64 {
        self.quiet_one_ns / self.quiet_all_ns
    }
}

/// Measures `scenario`, whose workers help each other, against one worker.
///
/// # Errors
/// Packets were lost or reordered; see [`Rig::step`].
pub fn measure(bench: &Bench<'_>, scenario: &Scenario, packets_at: Packets) -> Result<Ratio> {
    let scenario = Scenario {
        spread: Spread::Help,
        ..scenario.clone()
    };
    let alone = Scenario {
        workers: 1,
        ..scenario.clone()
    };
    let rig = |scenario| -> Result<Rig> {
        let rig = Rig::new(scenario, bench.factory, bench.arena)?;
        Ok(match packets_at {
            Packets::Memory => rig.with_cold_packets(),
            Packets::Cache => rig,
        })
    };
    let (mut one, mut all) = (rig(&alone)?, rig(&scenario)?);
    for _ in 0..one.warm_up_steps() {
        one.step(|_| ())?;
        all.step(|_| ())?;
    }
    let clock = quanta::Clock::new();
    let (mut ones, mut alls) = (Vec::new(), Vec::new());
    let (mut packets, before) = (0, all.helped());
    let mut beside: Vec<(f64, f64)> = Vec::new();
    let mut efforts = Vec::new();
    let stolen = machine::stolen();
    let wanted = bench.effort.time * u32::try_from(bench.effort.runs).unwrap_or(u32::MAX);
    let end = Instant::now() + wanted * 20 + Duration::from_secs(2);
    let mut spent = Duration::ZERO;
    while spent < wanted && Instant::now() < end {
        let begun = all.effort();
        for (rig, steps) in [(&mut one, &mut ones), (&mut all, &mut alls)] {
            let step = rig.step(|_| ())?;
            let ns = step.ticks as f64 / bench.rates.tsc_ghz;
            spent += Duration::from_secs_f64(ns / 1e9);
            steps.push(ns / step.packets as f64);
            packets += step.packets as u64;
        }
        efforts.extend(alls.last().map(|ns| (*ns, all.effort() - begun)));
        let ratio = ones.last().zip(alls.last()).map(|(one, all)| one / all);
        beside.extend(together::measure(&clock).zip(ratio));
    }
    let helped = (all.helped() - before) as f64 / (packets as f64 / 2.0);
    let stolen = machine::stolen()
        .zip(stolen)
        .map_or(0.0, |(now, before)| now.since(before));
    let step = packets as f64 / 2.0 / efforts.len().max(1) as f64;
    // Of steps that nobody disturbed: in the others a worker that lost its CPU seems to work.
    efforts.sort_by(|a, b| a.0.total_cmp(&b.0));
    efforts.truncate(efforts.len().div_ceil(QUIET));
    let profile = profile(&efforts, step, bench.rates.tsc_ghz, &mut beside, stolen);
    let [one_ns, all_ns] = [median(&mut ones), median(&mut alls)];
    // Sorted by now.
    let quiet = |steps: &[f64]| median(&mut steps[..steps.len().div_ceil(QUIET)].to_vec());
    let provider = bench.factory.provider_for(scenario.suite);
    Ok(Ratio {
        suite: scenario.suite.to_string(),
        provider: provider.unwrap_or("none").to_owned(),
        direction: match scenario.direction {
            Direction::Out => "out",
            Direction::In => "in",
        },
        size: scenario.mix.to_string(),
        workers: scenario.workers,
        packets_at,
        one_ns,
        all_ns,
        quiet_one_ns: quiet(&ones),
        quiet_all_ns: quiet(&alls),
        helped,
        packets,
        profile,
    })
}

fn profile(
    efforts: &[(f64, Effort)],
    packets: f64,
    ghz: f64,
    beside: &mut [(f64, f64)],
    stolen: f64,
) -> Profile {
    let middle = |of: &dyn Fn(&Effort) -> f64| {
        median(&mut efforts.iter().map(|(_, e)| of(e)).collect::<Vec<_>>())
    };
    let each = |ticks: u64| ticks as f64 / ghz / packets;
    let of_steps = |wanted: bool| {
        let steps = beside.iter().filter(|(t, _)| (*t >= TWO) == wanted);
        let mut ratios: Vec<f64> = steps.map(|(_, ratio)| *ratio).collect();
        (median(&mut ratios), ratios.len())
    };
    let (on_two, on_less) = (of_steps(true), of_steps(false));
    beside.sort_by(|a, b| a.0.total_cmp(&b.0));
    let together = beside
        .get(beside.len() / 2)
        .zip(beside.get(beside.len() / 20))
        .map(|(mid, low)| (mid.0, low.0));
    Profile {
        together,
        stolen,
        owner_works: middle(&|e| each(e.owner_busy)),
        owner_waits: middle(&|e| each(e.owner_waits)),
        helper_ns: middle(&|e| e.helpers_busy as f64 / ghz / e.helped.max(1) as f64),
        helpers_idle: middle(&|e| {
            let all = (e.helpers_busy + e.helpers_idle).max(1);
            e.helpers_idle as f64 / all as f64
        }),
        kept: middle(&|e| e.kept as f64 / packets),
        held_up: middle(&|e| e.held_up as f64 * 1000.0 / packets),
        on_two,
        on_less,
    }
}

/// Heads the table of [`print`].
pub fn print_head() {
    println!(
        "{:<30} {:<9} {:<3} {:>5} {:>7} | {:>8} {:>8} {:>6} | {:>8} {:>8} {:>6} | {:>7}",
        "suite",
        "provider",
        "dir",
        "size",
        "workers",
        "one ns",
        "all ns",
        "ratio",
        "quiet 1",
        "all",
        "ratio",
        "helped"
    );
}

/// One line.
pub fn print(r: &Ratio) {
    println!(
        "{:<30} {:<9} {:<3} {:>5} {:>7} | {:>8.1} {:>8.1} {:>6.2} | {:>8.1} {:>8.1} {:>6.2} | {:>5.0} %",
        r.suite,
        r.provider,
        r.direction,
        r.size,
        r.workers,
        r.one_ns,
        r.all_ns,
        r.ratio(),
        r.quiet_one_ns,
        r.quiet_all_ns,
        r.quiet(),
        r.helped * 100.0
    );
    let p = &r.profile;
    if let Some((mid, low)) = p.together {
        println!(
            "    two CPUs together do {mid:.2} times the work of one (lowest twentieth {low:.2}); {:.1} % stolen by the host",
            p.stolen * 100.0
        );
        let steps = |(ratio, n): (f64, usize)| match n {
            0 => "no steps".to_owned(),
            n => format!("ratio {ratio:.2} in {n} steps"),
        };
        println!(
            "    where they did at least {TWO}: {}; where less: {}",
            steps(p.on_two),
            steps(p.on_less)
        );
    }
    println!(
        "    quiet steps: owner works {:.0} ns a packet and waits {:.0}, ciphers {:.0} % itself; helper {:.0} ns a packet of its own, idle {:.0} %; held up {:.1} times in 1000",
        p.owner_works,
        p.owner_waits,
        p.kept * 100.0,
        p.helper_ns,
        p.helpers_idle * 100.0,
        p.held_up
    );
}
