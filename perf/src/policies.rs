//! What policies cost: one against many at the same number of flows and SAs, at rest and while they change.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use std::time::{Duration, Instant};

use anyhow::Result;
use sa_store::policy::{Action, Policy};
use sa_store::sa::Direction;
use sa_store::spd::{Edit, Spd, TunnelIdx};
use sa_store::store::Store;
use serde::Serialize;

use crate::clock::median;
use crate::measure::{Bench, Series};
use crate::rig::Rig;
use crate::scenario::{Scenario, block_policy};

/// Policies that come and go with each update.
const CHANGING: u32 = 10;
/// Where they apply: outside the flows' addresses, and inside the same sources.
const CHANGING_AT: u32 = 0x0b00_0000;

/// Nanoseconds per packet.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Mean of the steps without the slowest hundredth: median of the runs.
    pub ns: f64,
    /// Policy updates published while it was measured.
    pub updates: u64,
    /// Microseconds in which another thread made one, mean.
    pub update_us: f64,
}

/// Many policies beside one.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyCost {
    /// Direction.
    pub direction: &'static str,
    /// How many are many.
    pub policies: u32,
    /// Flows, in both cases.
    pub flows: u32,
    /// Nanoseconds per packet with one policy.
    pub one_ns: f64,
    /// With many.
    pub many_ns: f64,
    /// Speed with many over speed with one.
    pub share: f64,
    /// Updates published meanwhile; 0 is at rest.
    pub updates: u64,
    /// Microseconds to make one.
    pub update_us: f64,
}

impl PolicyCost {
    /// Compares `many` with `one`.
    pub fn new(direction: Direction, policies: u32, flows: u32, one: Cost, many: Cost) -> Self {
        Self {
            direction: match direction {
                Direction::Out => "out",
                Direction::In => "in",
            },
            policies,
            flows,
            one_ns: one.ns,
            many_ns: many.ns,
            share: one.ns / many.ns,
            updates: many.updates,
            update_us: many.update_us,
        }
    }
}

impl Cost {
    fn of(series: &Series, updates: u64) -> Self {
        Self {
            ns: median(&mut series.trimmed.clone()),
            updates,
            update_us: 0.0,
        }
    }
}

/// Measures with policies at rest.
///
/// # Errors
/// See [`Rig::step`].
pub fn at_rest(bench: &Bench<'_>, scenario: &Scenario) -> Result<Cost> {
    let mut rig = Rig::new(scenario, bench.factory, bench.arena)?;
    Ok(Cost::of(&bench.run(&mut rig, |_| ())?, 0))
}

/// Measures while another thread makes new policy tables as fast as it can; each is published between two steps.
///
/// # Errors
/// See [`Rig::step`].
pub fn while_changing(bench: &Bench<'_>, scenario: &Scenario) -> Result<Cost> {
    let mut rig = Rig::new(scenario, bench.factory, bench.arena)?;
    let current = rig.store.current();
    let first = match scenario.direction {
        Direction::Out => Arc::clone(&current.spd_out),
        Direction::In => Arc::clone(&current.spd_in),
    };
    drop(current);
    let stop = AtomicBool::new(false);
    let (tables, made) = sync_channel(1);
    std::thread::scope(|scope| {
        // A thread starts where its maker is pinned: on this CPU it might never get to leave it.
        let maker = crate::machine::unpinned(|| {
            scope.spawn(|| make_tables(scenario, first, &tables, &stop))
        });
        let mut updates = 0;
        let series = bench.run(&mut rig, |store| {
            updates += publish(store, scenario.direction, &made);
        });
        stop.store(true, Ordering::Relaxed);
        // The maker may wait for room.
        let _ = made.try_recv();
        let outcome = maker.join();
        let update_us = outcome.unwrap_or(Ok(0.0))?;
        Ok(Cost {
            update_us,
            ..Cost::of(&series?, updates)
        })
    })
}

/// Publishes a new table if one is there.
fn publish(store: &mut Store, direction: Direction, made: &Receiver<Arc<Spd>>) -> u64 {
    let Ok(spd) = made.try_recv() else {
        return 0;
    };
    let current = store.current();
    let mut draft = store.draft();
    match direction {
        Direction::Out => draft.set_spd(spd, Arc::clone(&current.spd_in)),
        Direction::In => draft.set_spd(Arc::clone(&current.spd_out), spd),
    }
    drop(current);
    store.publish(draft);
    store.reap();
    1
}

/// Makes tables with and without the changing policies, in turn, each from the one before. Returns microseconds per
/// table.
fn make_tables(
    scenario: &Scenario,
    mut spd: Arc<Spd>,
    tables: &SyncSender<Arc<Spd>>,
    stop: &AtomicBool,
) -> Result<f64> {
    let list = (0..CHANGING).map(|n| changing(n, scenario.direction));
    let (put, remove): (Vec<_>, Vec<_>) = list
        .map(|p| (Edit::Put(p.clone()), Edit::Remove(p.name)))
        .unzip();
    // Versions in use by the other thread end here, so that freeing them costs no time on the clock.
    let mut kept = VecDeque::new();
    let (mut spent, mut count) = (Duration::ZERO, 0u32);
    for edits in [&put, &remove].into_iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let begin = Instant::now();
        let (next, _) = spd.edited(edits, tunnel)?;
        spd = Arc::new(next);
        spent += begin.elapsed();
        count += 1;
        kept.push_back(Arc::clone(&spd));
        if tables.send(Arc::clone(&spd)).is_err() {
            break;
        }
        if kept.len() > 8 {
            kept.pop_front();
        }
    }
    Ok(spent.as_secs_f64() * 1e6 / f64::from(count.max(1)))
}

fn changing(n: u32, direction: Direction) -> Policy {
    let at = CHANGING_AT + n;
    block_policy(format!("c{n}"), direction, at, at, Action::Discard)
}

/// Tunnels are numbered as they are named.
fn tunnel(name: &str) -> Option<TunnelIdx> {
    name.strip_prefix('t')?.parse().ok().map(TunnelIdx)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Rates;
    use crate::measure::Effort;
    use crate::rig::arena_for;
    use crate::scenario::Spread;
    use gateway::crypto::{Fixed, rustcrypto::RustCrypto};
    use quanta::Clock;

    #[test]
    fn packets_flow_while_tables_are_replaced() {
        let arena = arena_for(1, 128).unwrap();
        let bench = Bench {
            factory: &Fixed(RustCrypto),
            arena: &arena,
            clock: &Clock::new(),
            rates: Rates {
                tsc_ghz: 1.0,
                core_ghz: 1.0,
            },
            effort: Effort {
                runs: 2,
                time: Duration::from_millis(50),
                limit: false,
            },
        };
        for direction in [Direction::Out, Direction::In] {
            let scenario = Scenario {
                suite: "aes-128-gcm-16".parse().unwrap(),
                direction,
                sas: 1,
                flows: 100,
                policies: 1000,
                workers: 1,
                spread: Spread::Owner,
                mix: "64".parse().unwrap(),
                frames: 128,
            };
            let cost = while_changing(&bench, &scenario).unwrap();
            assert!(cost.ns > 0.0 && cost.updates > 0, "{cost:?}");
        }
    }
}
