//! The ciphering alone: what the gateway could reach if everything else cost nothing.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use pmd::{BURST, Frame, Pool};
use sa_store::cipher::{CipherJob, SaCipher};
use sa_store::plan::{ESP_HEADER, ESP_TRAILER};
use sa_store::sa::Direction;

use crate::clock::median;
use crate::measure::Bench;
use crate::scenario::{Scenario, keys};

/// Nanoseconds per packet: the scenario's provider, suite, packet sizes, number of SAs and frames, its direction.
///
/// # Errors
/// No context, or the provider does not open what it sealed.
pub fn cipher_alone(scenario: &Scenario, bench: &Bench<'_>) -> Result<f64> {
    let suite = scenario.suite;
    let make = |direction| -> Result<Vec<Box<dyn SaCipher>>> {
        (0..scenario.sas)
            .map(|sa| {
                let made = bench
                    .factory
                    .make(suite, &keys(suite, sa), false, direction);
                made.context("cipher context")
            })
            .collect()
    };
    let (sealers, openers) = (
        make(Direction::Out)?,
        match scenario.direction {
            Direction::Out => Vec::new(),
            Direction::In => make(Direction::In)?,
        },
    );
    let mut pool = Pool::new(bench.arena, 64);
    let mut frames = Vec::new();
    if pool.get_bulk(&mut frames, scenario.frames) != scenario.frames {
        pool.put_bulk(&mut frames);
        bail!("the arena has too few frames");
    }
    for (n, frame) in frames.iter_mut().enumerate() {
        shape(frame, scenario, n);
    }
    let result = time(scenario, bench, &sealers, &openers, &mut frames);
    pool.put_bulk(&mut frames);
    result
}

fn time(
    scenario: &Scenario,
    bench: &Bench<'_>,
    sealers: &[Box<dyn SaCipher>],
    openers: &[Box<dyn SaCipher>],
    frames: &mut [Frame],
) -> Result<f64> {
    let mut order = Order::new(sealers.len());
    let packets = frames.len() as f64;
    let wanted = bench.effort.time.as_secs_f64() * 1e9;
    let mut runs = Vec::new();
    for _ in 0..bench.effort.runs {
        let mut steps = Vec::new();
        let mut spent = 0.0;
        let end = Instant::now() + bench.effort.time * 20;
        while steps.len() < 20 || (spent < wanted && Instant::now() < end) {
            let from = order;
            let start = bench.clock.raw();
            seal(sealers, &mut order, frames)?;
            let mut ticks = bench.clock.raw() - start;
            if scenario.direction == Direction::In {
                order = from;
                let start = bench.clock.raw();
                open(openers, &mut order, frames)?;
                ticks = bench.clock.raw() - start;
            }
            let ns = ticks as f64 / bench.rates.tsc_ghz;
            spent += ns;
            steps.push(ns / packets);
        }
        runs.push(median(&mut steps));
    }
    Ok(median(&mut runs))
}

/// SAs in an order that no prefetcher follows: a full-period generator over the next power of two.
#[derive(Clone, Copy, Debug)]
struct Order {
    state: usize,
    mask: usize,
    count: usize,
}

impl Order {
    fn new(count: usize) -> Self {
        Self {
            state: 1,
            mask: count.next_power_of_two() - 1,
            count,
        }
    }

    fn next(&mut self) -> usize {
        loop {
            self.state = self
                .state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(1);
            // The upper bits are the random ones.
            let at = (self.state >> 33) & self.mask;
            if at < self.count {
                return at;
            }
        }
    }
}

fn seal(ctx: &[Box<dyn SaCipher>], order: &mut Order, frames: &mut [Frame]) -> Result<()> {
    bursts(ctx, order, frames, |first, jobs| first.seal(jobs))
}

fn open(ctx: &[Box<dyn SaCipher>], order: &mut Order, frames: &mut [Frame]) -> Result<()> {
    bursts(ctx, order, frames, |first, jobs| first.open(jobs))
}

/// Contexts prefetched for a burst, then one call for it: as the gateway does.
#[inline]
fn bursts(
    contexts: &[Box<dyn SaCipher>],
    order: &mut Order,
    frames: &mut [Frame],
    call: impl Fn(&dyn SaCipher, &mut [CipherJob<'_>]),
) -> Result<()> {
    let mut right = true;
    for burst in frames.chunks_mut(BURST) {
        let mut jobs = arrayvec::ArrayVec::<CipherJob<'_>, BURST>::new();
        for frame in burst {
            let ctx = &*contexts[order.next()];
            ctx.prefetch();
            frame.prefetch();
            jobs.push(CipherJob {
                ctx,
                esp: frame.data_mut(),
                seq_hi: 0,
                ok: false,
            });
        }
        if let Some(first) = jobs.first() {
            let first = first.ctx;
            call(first, &mut jobs);
        }
        right &= jobs.iter().all(|j| j.ok);
    }
    if right {
        Ok(())
    } else {
        bail!("the provider refused a packet")
    }
}

/// Makes the frame's data an ESP packet that carries an inner packet of the mix.
fn shape(frame: &mut Frame, scenario: &Scenario, n: usize) {
    let suite = scenario.suite;
    let inner = usize::from(scenario.mix.size(n)) + ESP_TRAILER;
    let body = inner.next_multiple_of(suite.pad_align());
    frame.reset_default();
    let len = ESP_HEADER + suite.iv_len() + body + suite.icv_len();
    let bytes = frame
        .append(len)
        .expect("the arena's frames hold the largest packet");
    bytes.fill(0x5a);
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
    use std::time::Duration;

    #[test]
    fn every_sa_has_its_turn() {
        let mut order = Order::new(1000);
        let seen: std::collections::HashSet<_> = (0..20_000).map(|_| order.next()).collect();
        assert_eq!(seen.len(), 1000);
    }

    #[test]
    fn what_is_timed_is_really_opened() {
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
                runs: 1,
                time: Duration::from_millis(1),
                limit: true,
            },
        };
        for suite in sa_store::suite::Suite::all() {
            let scenario = Scenario {
                suite,
                direction: Direction::In,
                sas: 3,
                flows: 3,
                policies: 3,
                workers: 1,
                spread: Spread::Owner,
                mix: "imix".parse().unwrap(),
                frames: 128,
            };
            assert!(cipher_alone(&scenario, &bench).unwrap() > 0.0, "{suite}");
        }
    }
}
