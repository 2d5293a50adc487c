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
use crate::rig::Rig;
use crate::scenario::{Scenario, Spread};

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
}

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
    let (mut ones, mut alls) = (Vec::new(), Vec::new());
    let (mut packets, before) = (0, all.helped());
    let wanted = bench.effort.time * u32::try_from(bench.effort.runs).unwrap_or(u32::MAX);
    let end = Instant::now() + wanted * 20 + Duration::from_secs(2);
    let mut spent = Duration::ZERO;
    while spent < wanted && Instant::now() < end {
        for (rig, steps) in [(&mut one, &mut ones), (&mut all, &mut alls)] {
            let step = rig.step(|_| ())?;
            let ns = step.ticks as f64 / bench.rates.tsc_ghz;
            spent += Duration::from_secs_f64(ns / 1e9);
            steps.push(ns / step.packets as f64);
            packets += step.packets as u64;
        }
    }
    let helped = (all.helped() - before) as f64 / (packets as f64 / 2.0);
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
    })
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
}
