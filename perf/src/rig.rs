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

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use gateway::app::{AssemblyConfig, OpenPort, assemble};
use gateway::worker::{Locals, PortSetup, Side, StageTicks, Worker};
use pmd::memory::{MemoryPort, PairConfig, pair};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, Frame, HugePolicy, Pool, Port, PortQueue};
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::ledger::WorkerCounters;
use sa_store::sa::{Direction, Vrf};
use sa_store::store::Store;

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
/// And the least time of it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// One worker with its generator.
struct Lane {
    generator: Generator,
    feed: Box<dyn PortQueue>,
    collect: Box<dyn PortQueue>,
    sealer: Option<(Worker, Arc<WorkerCounters>)>,
    worker: Worker,
    idle: Vec<Frame>,
    /// Frames that it sends in a step.
    frames: usize,
    /// Packets that the worker's rounds told of.
    worked: u64,
    pool: Pool,
}

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

impl Lane {
    /// Writes all frames anew and puts them before the worker. The clock stands still.
    fn prepare(&mut self) -> Result<()> {
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
    fn run(&mut self, clock: &Clock, done: impl Fn() -> bool) -> u64 {
        self.worker.skip_stage();
        let start = clock.raw();
        let mut idle = 0;
        while !done() {
            let worked = self.worker.round();
            self.worked += worked as u64;
            idle = if worked == 0 { idle + 1 } else { 0 };
            // Other workers may not have been scheduled yet: stuck is a matter of rounds and of time.
            if idle > STUCK && clock.delta(start, clock.raw()) > PATIENCE {
                break;
            }
        }
        clock.raw() - start
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

/// A gateway of one worker that seals what the lane's generator makes.
fn sealer(
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

#[cfg(test)]
mod tests {
    use super::*;
    use gateway::crypto::{Fixed, rustcrypto::RustCrypto};

    fn step_all(direction: Direction, workers: usize, spread: Spread) -> Rig {
        let one = spread == Spread::Help;
        let scenario = Scenario {
            suite: "aes-128-gcm-16".parse().unwrap(),
            direction,
            sas: if one { 1 } else { 12 },
            flows: 24,
            policies: 50,
            workers,
            spread,
            mix: if one { "1420" } else { "imix" }.parse().unwrap(),
            frames: if one { 1024 } else { 128 },
        };
        let arena = arena_for(workers, scenario.frames).unwrap();
        let mut rig = Rig::new(&scenario, &Fixed(RustCrypto), &arena).unwrap();
        for _ in 0..5 {
            let packets = rig.step(|_| ()).unwrap().packets;
            assert_eq!(packets, if one { 1024 } else { 128 * workers });
        }
        rig
    }

    #[test]
    fn every_packet_comes_out_sealed_and_opened_again() {
        for direction in [Direction::Out, Direction::In] {
            let rig = step_all(direction, 1, Spread::Owner);
            let counters = &rig.counters[0];
            let (sealed, opened) = (counters.encrypted.value(), counters.decrypted.value());
            match direction {
                Direction::Out => assert_eq!((sealed, opened), (640, 0)),
                Direction::In => assert_eq!((sealed, opened), (0, 640)),
            }
        }
    }

    #[test]
    fn packets_are_handed_over_only_when_they_come_to_the_wrong_worker() {
        for direction in [Direction::Out, Direction::In] {
            assert_eq!(step_all(direction, 2, Spread::Owner).handed_over(), 0);
            let handed = step_all(direction, 2, Spread::Any).handed_over();
            assert!((500..800).contains(&handed), "{handed} of 1280");
        }
    }

    #[test]
    fn workers_help_with_one_sa_and_its_packets_stay_in_order() {
        for direction in [Direction::Out, Direction::In] {
            let rig = step_all(direction, 2, Spread::Help);
            let snapshot = rig.store.current();
            let sa = snapshot.sa_at(0).unwrap();
            assert_eq!(sa.live.counters.replays.value(), 0);
            assert!(rig.helped() > 0, "{direction:?}: nobody helped");
            assert_eq!(rig.handed_over(), 0);
        }
    }
}
