//! One worker with its generator: its frames are made ready, and it takes them through.

use std::sync::Arc;

use anyhow::{Result, bail};
use gateway::worker::Worker;
use pmd::{Frame, Pool, PortQueue};
use quanta::Clock;
use sa_store::ledger::WorkerCounters;

use super::STUCK;
use crate::traffic::Generator;

/// Time without progress, besides [`STUCK`] rounds, after which a measurement is broken.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// One worker with its generator.
pub(super) struct Lane {
    pub(super) generator: Generator,
    pub(super) feed: Box<dyn PortQueue>,
    pub(super) collect: Box<dyn PortQueue>,
    pub(super) sealer: Option<(Worker, Arc<WorkerCounters>)>,
    pub(super) worker: Worker,
    pub(super) idle: Vec<Frame>,
    /// Frames that it sends in a step.
    pub(super) frames: usize,
    /// Packets that the worker's rounds told of.
    pub(super) worked: u64,
    /// Whether rounds are timed, and the ticks of those that moved packets and of the others.
    pub(super) timed: bool,
    pub(super) busy: u64,
    pub(super) idle_ticks: u64,
    pub(super) pool: Pool,
}

impl Lane {
    /// Writes all frames anew and puts them before the worker. The clock stands still.
    pub(super) fn prepare(&mut self) -> Result<()> {
        for frame in &mut self.idle {
            self.generator.fill(frame);
        }
        self.feed.tx_burst(&mut self.pool, &mut self.idle);
        if !self.idle.is_empty() {
            bail!("the worker's receive ring is too short");
        }
        let Some((sealer, counters)) = &mut self.sealer else {
            return Ok(());
        };
        let target = counters.sent.value() + self.frames as u64;
        let mut idle = 0;
        while counters.sent.value() < target {
            idle = if sealer.round() == 0 { idle + 1 } else { 0 };
            if idle > STUCK {
                bail!("the sealing gateway lost packets");
            }
        }
        Ok(())
    }

    /// Rounds until everything is sent. Returns the ticks that it took.
    pub(super) fn run(&mut self, clock: &Clock, done: impl Fn() -> bool) -> u64 {
        self.worker.skip_stage();
        let start = clock.raw();
        let mut idle = 0;
        let mut last = start;
        while !done() {
            let worked = self.worker.round();
            self.worked += worked as u64;
            if self.timed {
                let now = clock.raw();
                let spent = now.saturating_sub(last);
                *(if worked == 0 {
                    &mut self.idle_ticks
                } else {
                    &mut self.busy
                }) += spent;
                last = now;
            }
            idle = if worked == 0 { idle + 1 } else { 0 };
            // Other workers may not have been scheduled yet: stuck is a matter of rounds and of time.
            if idle > STUCK && clock.delta(start, clock.raw()) > PATIENCE {
                break;
            }
        }
        clock.raw() - start
    }
}
