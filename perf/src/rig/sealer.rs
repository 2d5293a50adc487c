//! The gateway that seals what inbound measurements open.

use std::sync::Arc;

use anyhow::{Context, Result};
use gateway::app::assemble;
use gateway::worker::{Side, Worker};
use pmd::memory::{PairConfig, pair};
use pmd::{Arena, Pool, PortQueue};
use sa_store::cipher::CipherFactory;
use sa_store::ledger::WorkerCounters;
use sa_store::sa::Direction;

use super::{POOL_CACHE, STUCK, config, generator, lane_of, open, port};
use crate::scenario::Scenario;

/// Gives `take` frames with `count` packets of an inbound scenario with one worker, sealed as the worker gets them.
///
/// # Errors
/// Those of `take`; or the sealing gateway does not work.
pub fn sealed(
    scenario: &Scenario,
    factory: &dyn CipherFactory,
    arena: &Arc<Arena>,
    count: usize,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let one = |near: &str, far: &str| {
        let config = PairConfig {
            queues: 1,
            ring: pmd::BURST,
            mtu: 1500,
        };
        let (near, far) = pair(near, far, &config);
        Ok::<_, anyhow::Error>((open(near, 1, arena)?, open(far, 1, arena)?))
    };
    let (mut feed, inside) = one("generator", "inside")?;
    let (outside, mut collect) = one("outside", "capture")?;
    let outside = outside
        .into_iter()
        .next()
        .context("a queue was asked for")?;
    let (mut worker, counters) = sealer(scenario, factory, arena, 0, inside, outside)?;
    let (feed, collect) = (&mut feed[0], &mut collect[0]);
    let mut generator = generator(scenario);
    let mut pool = Pool::new(arena, POOL_CACHE);
    let mut frames = Vec::with_capacity(pmd::BURST);
    let mut left = count;
    let mut outcome = Ok(());
    while left != 0 && outcome.is_ok() {
        let burst = left.min(pmd::BURST);
        pool.get_bulk(&mut frames, burst);
        for frame in &mut frames {
            generator.fill(frame);
        }
        let target = counters.sent.value() + frames.len() as u64;
        feed.tx_burst(&mut pool, &mut frames);
        let mut idle = 0;
        while counters.sent.value() < target && idle < STUCK {
            idle = if worker.round() == 0 { idle + 1 } else { 0 };
        }
        pool.put_bulk(&mut frames);
        let got = collect.rx_burst(&mut pool, &mut frames, burst);
        if got != burst {
            outcome = Err(anyhow::anyhow!("the sealing gateway lost packets"));
        }
        for frame in &frames {
            outcome = outcome.and_then(|()| take(frame.data()));
        }
        pool.put_bulk(&mut frames);
        left -= burst;
    }
    worker.shut_down();
    feed.drain(&mut pool);
    collect.drain(&mut pool);
    outcome
}

/// A gateway of one worker that seals what the lane's generator makes.
pub(super) fn sealer(
    scenario: &Scenario,
    factory: &dyn CipherFactory,
    arena: &Arc<Arena>,
    lane: usize,
    inside: Vec<Box<dyn PortQueue>>,
    outside: Box<dyn PortQueue>,
) -> Result<(Worker, Arc<WorkerCounters>)> {
    let ports = vec![
        port("clear", Side::Inside, inside),
        port("sealed", Side::Outside, vec![outside]),
    ];
    let mut gateway = assemble(config(scenario, 1), arena, ports)?;
    let mut wanted = vec![false; scenario.sas as usize];
    for flow in (0..scenario.flows).filter(|flow| lane_of(scenario, *flow) == lane) {
        wanted[scenario.sa_of(flow) as usize] = true;
    }
    scenario.install(
        &mut gateway.store,
        Direction::Out,
        factory,
        &gateway.clock,
        |sa| wanted[sa as usize],
    )?;
    let worker = gateway.workers.pop().context("one worker was asked for")?;
    Ok((worker, gateway.counters.remove(0)))
}
