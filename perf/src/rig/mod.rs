//! Real workers between memory ports, driven by one thread each, with everything that is not the gateway's work
//! done while the clock stands still.
//!
//! ```text
//!   outbound:  generator ─▶ port 0 │ worker │ port 1 ─▶ generator
//!   inbound:   generator ─▶ port 0 │ sealer │ ─▶ port 0 │ worker │ port 1 ─▶ generator
//!                                    (clock stopped)      (clock runs)
//! ```
//!
//! All frames of a lane take part in every step: written anew by the generator (for inbound then sealed by
//! another gateway, with numbers that go on, so that the replay window is at work), taken in by the worker in
//! bursts, sent. Only the rounds of the worker are timed.

mod lane;
mod sealer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use gateway::app::{AssemblyConfig, OpenPort, assemble};
use gateway::worker::{PortSetup, Side, StageTicks};
use pmd::memory::{MemoryPort, PairConfig, pair};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, Frame, HugePolicy, Pool, Port, PortQueue};
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::ledger::WorkerCounters;
use sa_store::local::Locals;
use sa_store::sa::{Direction, Vrf};
use sa_store::store::Store;

use self::lane::Lane;
pub use self::sealer::sealed;
use self::sealer::sealer;
use crate::machine;
use crate::scenario::{Scenario, Spread};
use crate::traffic::Generator;

/// Bytes from frame to frame.
pub const STRIDE: u32 = 2048;
const WORKER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0xb];
const POOL_CACHE: usize = 64;
/// More than the caches hold.
const BROOM: usize = 64 << 20;
/// Rounds without progress after which a measurement is broken.
const STUCK: u32 = 10_000_000;

/// Everything that a scenario needs, ready to be stepped.
pub struct Rig {
    lanes: Vec<Lane>,
    counters: Vec<Arc<WorkerCounters>>,
    /// Store of the gateway that is measured.
    pub store: Store,
    clock: Clock,
    sent: u64,
    /// One SA, whose packets must come out in order.
    helps: bool,
    /// Memory that is read before each step, so that no CPU has the packets in its caches.
    broom: Vec<u8>,
    mean_size: f64,
}

/// What a step took.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Packets.
    pub packets: usize,
    /// Time-stamp counter ticks from the first worker's start to the last one's end.
    pub ticks: u64,
}

/// What workers of a rig with [`Spread::Help`] did with their time, in ticks since the rig was made: the SA's owner, and its
/// helpers together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Effort {
    /// The owner in rounds that moved packets,
    pub owner_busy: u64,
    /// and in those that did not: all it has is with helpers.
    pub owner_waits: u64,
    /// Helpers in rounds that ciphered,
    pub helpers_busy: u64,
    /// and in those that found nothing to do.
    pub helpers_idle: u64,
    /// Packets that helpers ciphered.
    pub helped: u64,
    /// Packets of the shared SA that the owner ciphered.
    pub kept: u64,
    /// Times that ciphered packets waited for earlier ones at a helper.
    pub held_up: u64,
}

impl std::ops::Sub for Effort {
    type Output = Effort;

    fn sub(self, before: Effort) -> Effort {
        Effort {
            owner_busy: self.owner_busy - before.owner_busy,
            owner_waits: self.owner_waits - before.owner_waits,
            helpers_busy: self.helpers_busy - before.helpers_busy,
            helpers_idle: self.helpers_idle - before.helpers_idle,
            helped: self.helped - before.helped,
            kept: self.kept - before.kept,
            held_up: self.held_up - before.held_up,
        }
    }
}

impl Rig {
    /// Makes the gateways of `scenario`. `arena` comes from [`arena_for`].
    ///
    /// # Errors
    /// What any part refuses.
    pub fn new(
        scenario: &Scenario,
        factory: &dyn CipherFactory,
        arena: &Arc<Arena>,
    ) -> Result<Self> {
        scenario.check()?;
        let n = scenario.workers;
        let pair_config = PairConfig {
            queues: n,
            // A worker sends what it owns, wherever it came in: at worst everything.
            ring: (scenario.frames * n).next_power_of_two(),
            mtu: 1500,
        };
        let (feed, inlet) = pair("feed", "in", &pair_config);
        let (outlet, collect) = pair("out", "collect", &pair_config);
        let mut sealers = Vec::new();
        let (feed, inlet) = match scenario.direction {
            Direction::Out => (open(feed, n, arena)?, open(inlet, n, arena)?),
            Direction::In => {
                let mut feeds = Vec::new();
                for (lane, queue) in open(feed, n, arena)?.into_iter().enumerate() {
                    let (generator, inside) = pair(
                        "generator",
                        "inside",
                        &PairConfig {
                            queues: 1,
                            ..pair_config.clone()
                        },
                    );
                    feeds.extend(open(generator, 1, arena)?);
                    let inside = open(inside, 1, arena)?;
                    sealers.push(sealer(scenario, factory, arena, lane, inside, queue)?);
                }
                (feeds, open(inlet, n, arena)?)
            }
        };
        let (first, second) = match scenario.direction {
            Direction::Out => (Side::Inside, Side::Outside),
            Direction::In => (Side::Outside, Side::Inside),
        };
        let outlet = open(outlet, n, arena)?;
        let mut gateway = assemble(
            config(scenario, n),
            arena,
            vec![port("in", first, inlet), port("out", second, outlet)],
        )?;
        scenario.install(
            &mut gateway.store,
            scenario.direction,
            factory,
            &gateway.clock,
            |_| true,
        )?;
        let mut pool = Pool::new(arena, POOL_CACHE);
        let mut lanes = Vec::new();
        let ends = feed.into_iter().zip(open(collect, n, arena)?);
        for (lane, ((feed, collect), worker)) in ends.zip(gateway.workers).enumerate() {
            let flows: Vec<u32> = (0..scenario.flows)
                .filter(|flow| lane_of(scenario, *flow) == lane)
                .map(|flow| scenario.destination(flow))
                .collect();
            let helps = scenario.spread == Spread::Help && flows.is_empty();
            let frames = if helps { 0 } else { scenario.frames };
            let mut idle = Vec::with_capacity(frames);
            if pool.get_bulk(&mut idle, frames) != frames {
                pool.put_bulk(&mut idle);
                bail!("the arena has too few frames");
            }
            lanes.push(Lane {
                generator: Generator::new(scenario.mix.clone(), flows, WORKER_MAC),
                feed,
                collect,
                sealer: (!sealers.is_empty()).then(|| sealers.remove(0)),
                worker,
                idle,
                frames,
                worked: 0,
                timed: scenario.spread == Spread::Help,
                busy: 0,
                idle_ticks: 0,
                pool: Pool::new(arena, POOL_CACHE),
            });
        }
        let unused = |l: &Lane| l.generator.flows() == 0 && l.frames != 0;
        if lanes.iter().any(unused) {
            for lane in &mut lanes {
                lane.pool.put_bulk(&mut lane.idle);
            }
            bail!("fewer SAs than workers: some worker would have nothing to do");
        }
        Ok(Self {
            lanes,
            counters: gateway.counters,
            store: gateway.store,
            clock: gateway.clock,
            sent: 0,
            helps: scenario.spread == Spread::Help,
            broom: Vec::new(),
            mean_size: scenario.mix.mean(),
        })
    }

    /// Steps after which every flow was visited, and the caches are as they will be.
    pub fn warm_up_steps(&self) -> usize {
        let flows = self.lanes.iter().map(|l| l.generator.flows()).max();
        (2 * flows.unwrap_or(0))
            .div_ceil(self.frames().max(1))
            .max(8)
    }

    /// From now on packets lie in memory when a step begins, as those of a device that does not write to caches.
    pub fn with_cold_packets(mut self) -> Self {
        self.broom = vec![1; BROOM];
        self
    }

    /// Mean inner packet, bytes.
    pub fn mean_size(&self) -> f64 {
        self.mean_size
    }

    /// One step: every frame once. Calls `between` after the packets are ready and before the clock starts.
    ///
    /// # Errors
    /// Packets were dropped, or do not come out.
    pub fn step(&mut self, between: impl FnOnce(&mut Store)) -> Result<Step> {
        let order = self.helps.then(|| self.order());
        for lane in &mut self.lanes {
            lane.prepare()?;
        }
        let swept: usize = self.broom.iter().step_by(64).map(|b| usize::from(*b)).sum();
        std::hint::black_box(swept);
        between(&mut self.store);
        let packets = self.lanes.iter().map(|lane| lane.frames).sum();
        let target = self.sent + packets as u64;
        let ticks = if let [lane] = &mut self.lanes[..] {
            let counters = &self.counters[0];
            lane.run(&self.clock, || counters.sent.value() >= target)
        } else {
            self.run_together(target)
        };
        self.check(target)?;
        self.sent = target;
        for lane in &mut self.lanes {
            while lane
                .collect
                .rx_burst(&mut lane.pool, &mut lane.idle, usize::MAX)
                != 0
            {}
        }
        if order.is_some_and(|order| order != self.order()) {
            bail!("packets of one SA came out in another order");
        }
        self.balance();
        Ok(Step { packets, ticks })
    }

    /// Most frames that a lane sends.
    fn frames(&self) -> usize {
        self.lanes.iter().map(|l| l.frames).max().unwrap_or(0)
    }

    /// The frames as they lie before the workers, or came out of them.
    fn order(&self) -> Vec<u32> {
        let idle = self.lanes.iter().flat_map(|lane| &lane.idle);
        idle.map(Frame::index).collect()
    }

    /// Packets that the workers beside the first told of: with [`Spread::Help`] those that they ciphered.
    pub fn helped(&self) -> u64 {
        self.lanes.iter().skip(1).map(|lane| lane.worked).sum()
    }

    /// What the workers did with their time so far.
    pub fn effort(&self) -> Effort {
        let mut all = Effort {
            helped: self.helped(),
            ..Effort::default()
        };
        for (n, lane) in self.lanes.iter().enumerate() {
            let (busy, idle) = match n {
                0 => (&mut all.owner_busy, &mut all.owner_waits),
                _ => (&mut all.helpers_busy, &mut all.helpers_idle),
            };
            *busy += lane.busy;
            *idle += lane.idle_ticks;
        }
        for c in &self.counters {
            all.kept += c.parallel.kept.value();
            all.held_up += c.parallel.held_up.value();
        }
        all
    }

    /// All workers at once, each on its own CPU; the clock runs from the common start to the last one's end.
    fn run_together(&mut self, target: u64) -> u64 {
        let ready = AtomicU64::new(0);
        let all = self.lanes.len() as u64;
        let (clock, counters) = (&self.clock, &self.counters);
        // The first worker where packets are written, as it is without others.
        let own = machine::pinned();
        let others = machine::allowed().iter().filter(|cpu| Some(**cpu) != own);
        let cpus: Vec<usize> = own.iter().chain(others).copied().collect();
        let done = || counters.iter().map(|c| c.sent.value()).sum::<u64>() >= target;
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .lanes
                .iter_mut()
                .zip(cpus.iter().cycle())
                .map(|(lane, cpu)| {
                    let (ready, done) = (&ready, &done);
                    scope.spawn(move || {
                        machine::pin(Some(*cpu));
                        // The last to come starts all; nobody else needs a CPU for it.
                        ready.fetch_add(1, Ordering::AcqRel);
                        while ready.load(Ordering::Acquire) != all {
                            std::hint::spin_loop();
                        }
                        lane.run(clock, done)
                    })
                })
                .collect();
            threads
                .into_iter()
                .filter_map(|t| t.join().ok())
                .max()
                .unwrap_or(0)
        })
    }

    /// Every packet came out.
    fn check(&self, target: u64) -> Result<()> {
        let sent: u64 = self.counters.iter().map(|c| c.sent.value()).sum();
        if sent == target {
            return Ok(());
        }
        let reasons: Vec<String> = self
            .counters
            .iter()
            .flat_map(|c| sa_store::drops::DropReason::ALL.iter().zip(&c.dropped))
            .filter(|(_, n)| n.value() != 0)
            .map(|(reason, n)| format!("{} {}", n.value(), reason.name()))
            .collect();
        let account = sa_store::ledger::Balance::of(self.counters.iter().map(|c| &**c));
        bail!(
            "{sent} of {target} packets came out; dropped: {}; {account:?}",
            reasons.join(", ")
        )
    }

    /// With several workers a lane may get back other frames than it sent: even them out.
    fn balance(&mut self) {
        let mut surplus = Vec::new();
        for lane in &mut self.lanes {
            let keep = lane.frames.min(lane.idle.len());
            surplus.extend(lane.idle.drain(keep..));
        }
        for lane in &mut self.lanes {
            let missing = lane.frames - lane.idle.len();
            lane.idle
                .extend(surplus.drain(surplus.len().saturating_sub(missing)..));
        }
    }

    /// Ticks spent in each stage so far, all workers; nothing in a build without the feature `stages`.
    pub fn stage_ticks(&self) -> Option<StageTicks> {
        let mut sum = StageTicks::default();
        for lane in &self.lanes {
            for (sum, ticks) in sum.iter_mut().zip(lane.worker.stage_ticks()?) {
                *sum += ticks;
            }
        }
        Some(sum)
    }

    /// Packets handed from worker to worker so far.
    pub fn handed_over(&self) -> u64 {
        self.counters.iter().map(|c| c.handed_in.value()).sum()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for lane in self.lanes.drain(..) {
            let Lane {
                mut feed,
                mut collect,
                sealer,
                worker,
                mut idle,
                mut pool,
                ..
            } = lane;
            worker.shut_down();
            if let Some((sealer, _)) = sealer {
                sealer.shut_down();
            }
            feed.drain(&mut pool);
            collect.drain(&mut pool);
            pool.put_bulk(&mut idle);
        }
    }
}

/// An arena for a scenario, and the page size that it got.
///
/// # Errors
/// No memory.
pub fn arena_for(workers: usize, frames: usize) -> Result<Arc<Arena>> {
    // The pools of generator, sealer and worker each hold some back.
    let count = workers * (frames + 12 * POOL_CACHE) + 4 * POOL_CACHE;
    Arena::new(ArenaConfig {
        frames: u32::try_from(count).context("too many frames")?,
        stride: STRIDE,
        huge: HugePolicy::Auto,
        name: "perf".into(),
        ..ArenaConfig::default()
    })
    .context("frames")
}

/// Bytes that [`arena_for`] needs.
pub fn arena_bytes(workers: usize, frames: usize) -> usize {
    (workers * (frames + 12 * POOL_CACHE) + 4 * POOL_CACHE) * STRIDE as usize
}

/// The packets of a scenario with one worker, as that worker gets them.
pub fn generator(scenario: &Scenario) -> Generator {
    let flows = (0..scenario.flows).map(|flow| scenario.destination(flow));
    Generator::new(scenario.mix.clone(), flows.collect(), WORKER_MAC)
}

/// Lane that a flow's packets come in by.
fn lane_of(scenario: &Scenario, flow: u32) -> usize {
    let workers = scenario.workers;
    let sa = scenario.sa_of(flow) as usize;
    match scenario.spread {
        Spread::Owner => sa % workers,
        Spread::Any => sa / workers % workers,
        Spread::Help => 0,
    }
}

fn open(port: MemoryPort, n: usize, arena: &Arc<Arena>) -> Result<Vec<Box<dyn PortQueue>>> {
    Ok(Box::new(port).queues(n, arena)?)
}

fn port(name: &str, side: Side, queues: Vec<Box<dyn PortQueue>>) -> OpenPort {
    OpenPort {
        worker: None,
        setup: PortSetup {
            name: name.to_owned(),
            side,
            vrf: Vrf(0),
            vlan: None,
            mac: MacAddr(WORKER_MAC),
            mtu: 1500,
            shares: None,
        },
        queues,
        taps: Vec::new(),
    }
}

fn config(scenario: &Scenario, workers: usize) -> AssemblyConfig {
    let address = std::net::Ipv4Addr::new(192, 0, 2, 1);
    AssemblyConfig {
        cpus: vec![None; workers],
        max_sas: scenario.sas,
        handover_slots: scenario.frames.next_power_of_two(),
        pool_cache: POOL_CACHE,
        locals: Locals::new([(Vrf(0), address.into())]),
        flow_entries: (2 * scenario.flows as usize).max(1 << 16),
        policy_slots: scenario.policies as usize + 4096,
        parallel: scenario.spread == Spread::Help,
        ..AssemblyConfig::default()
    }
}

#[cfg(test)]
mod tests;
