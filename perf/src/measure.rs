//! Runs of a scenario and what comes out of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use pmd::Arena;
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::sa::Direction;
use sa_store::store::Store;
use serde::Serialize;

use crate::clock::{Rates, median};
use crate::limit;
use crate::rig::{Rig, STRIDE};
use crate::scenario::{Scenario, Spread};

/// How long and how often to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs; the median counts.
    pub runs: usize,
    /// Time on the clock per run.
    pub time: Duration,
    /// Whether the ciphering alone is measured too.
    pub limit: bool,
}

/// Least steps of a run, whatever the time.
const LEAST_STEPS: usize = 20;

/// One line of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Algorithms.
    pub suite: String,
    /// Who ciphers.
    pub provider: String,
    /// `out` or `in`.
    pub direction: &'static str,
    /// Packet size or mix.
    pub size: String,
    /// SAs.
    pub sas: u32,
    /// Flows.
    pub flows: u32,
    /// Policies.
    pub policies: u32,
    /// Workers.
    pub workers: usize,
    /// Which worker got the packets.
    pub spread: Spread,
    /// Frames that cycle.
    pub frames: usize,
    /// Bytes of these frames that packets touch.
    pub working_set: u64,
    /// Nanoseconds per packet (wall time over packets of all workers): median of the runs.
    pub ns: f64,
    /// The fastest and the slowest run.
    pub range: (f64, f64),
    /// Mean of all steps of all runs: what disturbances cost.
    pub mean_ns: f64,
    /// Packets per microsecond.
    pub mpps: f64,
    /// Inner bits per nanosecond.
    pub gbps: f64,
    /// Time-stamp counter cycles per packet and worker.
    pub tsc_cycles: f64,
    /// Estimated core cycles per packet and worker.
    pub core_cycles: f64,
    /// Nanoseconds per packet of the ciphering alone, same provider, sizes and SAs.
    pub limit_ns: f64,
    /// Share of the time that the ciphering alone would take.
    pub limit_share: f64,
}

/// The common ground of measurements.
pub struct Bench<'a> {
    /// Ciphers.
    pub factory: &'a dyn CipherFactory,
    /// Frames.
    pub arena: &'a Arc<Arena>,
    /// Clock.
    pub clock: &'a Clock,
    /// What its ticks are worth.
    pub rates: Rates,
    /// How much to measure.
    pub effort: Effort,
}

impl Bench<'_> {
    /// Measures a scenario, then its ciphering alone.
    ///
    /// # Errors
    /// See [`Rig::new`] and [`Rig::step`].
    pub fn measure(&self, scenario: &Scenario) -> Result<Outcome> {
        let mut rig = Rig::new(scenario, self.factory, self.arena)?;
        let series = self.run(&mut rig, |_| ())?;
        drop(rig);
        let limit_ns = if self.effort.limit {
            limit::cipher_alone(scenario, self)?
        } else {
            0.0
        };
        Ok(self.outcome(scenario, &series, limit_ns))
    }

    /// The same with another number of runs.
    #[must_use]
    pub fn with_runs(&self, runs: usize) -> Bench<'_> {
        Bench {
            factory: self.factory,
            arena: self.arena,
            clock: self.clock,
            rates: self.rates,
            effort: Effort {
                runs,
                ..self.effort
            },
        }
    }

    /// Runs a rig. `between` is called before each step, the clock standing still.
    ///
    /// # Errors
    /// See [`Rig::step`].
    pub fn run(&self, rig: &mut Rig, mut between: impl FnMut(&mut Store)) -> Result<Series> {
        for _ in 0..rig.warm_up_steps() {
            rig.step(&mut between)?;
        }
        let mut series = Series::default();
        for _ in 0..self.effort.runs {
            let mut steps = Vec::new();
            let mut spent = 0.0;
            let wanted = self.effort.time.as_secs_f64() * 1e9;
            // A machine that others keep busy must not make a run endless.
            let end = Instant::now() + self.effort.time * 20 + Duration::from_secs(2);
            while (spent < wanted && Instant::now() < end) || steps.len() < LEAST_STEPS {
                let step = rig.step(&mut between)?;
                let ns = step.ticks as f64 / self.rates.tsc_ghz;
                spent += ns;
                steps.push(ns / step.packets as f64);
            }
            series.add_run(&mut steps);
        }
        Ok(series)
    }

    /// Puts a line together.
    pub fn outcome(&self, scenario: &Scenario, series: &Series, limit_ns: f64) -> Outcome {
        let mut medians = series.medians.clone();
        let ns = median(&mut medians);
        let mean_size = scenario.mix.mean();
        let workers = scenario.workers as f64;
        Outcome {
            suite: scenario.suite.to_string(),
            provider: self
                .factory
                .provider_for(scenario.suite)
                .unwrap_or("none")
                .to_owned(),
            direction: match scenario.direction {
                Direction::Out => "out",
                Direction::In => "in",
            },
            size: scenario.mix.to_string(),
            sas: scenario.sas,
            flows: scenario.flows,
            policies: scenario.policies,
            workers: scenario.workers,
            spread: scenario.spread,
            frames: scenario.frames,
            working_set: working_set(scenario),
            ns,
            range: (
                medians.first().copied().unwrap_or(0.0),
                medians.last().copied().unwrap_or(0.0),
            ),
            mean_ns: series.total / series.steps.max(1) as f64,
            mpps: 1e3 / ns,
            gbps: mean_size * 8.0 / ns,
            tsc_cycles: ns * workers * self.rates.tsc_ghz,
            core_cycles: ns * workers * self.rates.core_ghz,
            limit_ns,
            limit_share: limit_ns / (ns * workers),
        }
    }
}

/// Nanoseconds per packet of several runs.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Median step of each run.
    pub medians: Vec<f64>,
    /// Mean step of each run, the slowest hundredth left out: what a change costs, without what others do.
    pub trimmed: Vec<f64>,
    total: f64,
    steps: usize,
}

impl Series {
    /// Steps of all runs.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Adds the runs of another.
    pub fn join(&mut self, other: Self) {
        self.medians.extend(other.medians);
        self.trimmed.extend(other.trimmed);
        self.total += other.total;
        self.steps += other.steps;
    }

    fn add_run(&mut self, steps: &mut [f64]) {
        self.total += steps.iter().sum::<f64>();
        self.steps += steps.len();
        self.medians.push(median(steps));
        let kept = steps.len() - steps.len().div_ceil(100);
        self.trimmed
            .push(steps[..kept].iter().sum::<f64>() / kept.max(1) as f64);
    }
}

/// Cache lines of the frames that a packet touches on its way, in bytes, for all frames.
fn working_set(scenario: &Scenario) -> u64 {
    let one = |size: u16| {
        // Outer headers, ESP trailer and ICV around it.
        let packet = u64::from(size) + 14 + 20 + 16 + 34;
        (packet.div_ceil(64) * 64).min(u64::from(STRIDE))
    };
    let sizes: u64 = (0..12).map(|n| one(scenario.mix.size(n))).sum();
    sizes * (scenario.frames * scenario.workers) as u64 / 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_told_by_its_median_and_by_its_mean_without_outliers() {
        let mut series = Series::default();
        let mut steps: Vec<f64> = (0..99).map(|_| 10.0).collect();
        steps.push(1e6);
        series.add_run(&mut steps);
        assert_eq!((series.medians[0], series.trimmed[0]), (10.0, 10.0));
        assert!(series.total > 1e6);
    }
}
