//! Putting workers together: queues dealt out, rings between workers, counters, the SA store.

use std::sync::Arc;

use pmd::engine::EspEngine;
use pmd::{Arena, Pool, PortQueue, PortQueueStats};
use quanta::Clock;
use rtrb::{Consumer, RingBuffer};
use sa_store::ledger::WorkerCounters;
use sa_store::local::Locals;
use sa_store::report::Report;
use sa_store::snapshot::Reader;
use sa_store::store::Store;

use crate::engine::{Bank, Desk, SoftwareEngine, parallel};
use crate::esp::iv::CbcIvGen;
use crate::esp::reassembly::ReassemblyConfig;
use crate::worker::{
    Handover, IdlePolicy, Mtus, PipelineConfig, PolicyHits, PortSetup, PuntLimits, REPORTS, Waker,
    Worker, WorkerParts,
};

/// What a gateway is to look like, apart from its ports.
#[derive(Clone, Debug)]
pub struct AssemblyConfig {
    /// CPU of each worker; `None`: not pinned. The length is the number of workers.
    pub cpus: Vec<Option<usize>>,
    /// Most SAs.
    pub max_sas: u32,
    /// Packets in each ring between two workers.
    pub handover_slots: usize,
    /// Frames in each worker's own stock; see [`pmd::pool`].
    pub pool_cache: usize,
    /// Own addresses at the start.
    pub locals: Locals,
    /// UDP port, beside 4500, that carries ESP.
    pub natt_port: u16,
    /// Bounds for fragments of ESP packets; `None` drops fragments.
    pub reassembly: Option<ReassemblyConfig>,
    /// How long an ESP packet with an unknown SPI waits for its SA, nanoseconds.
    pub hold_unknown: Option<u64>,
    /// Idling.
    pub idle: IdlePolicy,
    /// Flows remembered per worker and direction.
    pub flow_entries: usize,
    /// Hit counters per direction and worker.
    pub policy_slots: usize,
    /// Bounds of what goes to the kernel.
    pub punt: PuntLimits,
    /// Makes what ciphers on each worker's CPU.
    pub engine: fn() -> Box<dyn EspEngine>,
    /// Workers help each other to cipher, so that one SA can use several.
    pub parallel: bool,
    /// Engines; their numbers, from 1, are their places here.
    pub desks: Vec<Arc<Desk>>,
    /// The clock that workers and control use.
    pub clock: Clock,
    /// Seed of the CBC IVs of deterministic offline runs; `None`: the system's randomness.
    pub iv_seed: Option<u64>,
}

impl Default for AssemblyConfig {
    fn default() -> Self {
        Self {
            cpus: vec![None],
            max_sas: 1 << 20,
            handover_slots: 1024,
            pool_cache: 512,
            locals: Locals::default(),
            natt_port: 4500,
            reassembly: Some(ReassemblyConfig::default()),
            hold_unknown: None,
            idle: IdlePolicy::default(),
            flow_entries: 1 << 16,
            policy_slots: 1 << 17,
            punt: PuntLimits::default(),
            engine: || Box::new(SoftwareEngine::default()),
            parallel: false,
            desks: Vec::new(),
            clock: Clock::new(),
            iv_seed: None,
        }
    }
}

/// A port with its opened queues, numbered by the order in which ports are given.
pub struct OpenPort {
    /// How the pipeline is to treat it.
    pub setup: PortSetup,
    /// Queue pairs, dealt out to the workers in turn. Fewer than workers: the others hand frames over. None for a
    /// port that shares another's.
    pub queues: Vec<Box<dyn PortQueue>>,
    /// Queues of the port's exception TAP: one for each worker, or none.
    pub taps: Vec<Box<dyn PortQueue>>,
    /// The worker that gets the first queue, where it matters.
    pub worker: Option<usize>,
}

/// Workers ready to run, and what control needs of them.
pub struct Assembled {
    /// The workers.
    pub workers: Vec<Worker>,
    /// The store: own addresses and nothing else.
    pub store: Store,
    /// Counters of each worker.
    pub counters: Vec<Arc<WorkerCounters>>,
    /// Policy hits of each worker.
    pub hits: Vec<Arc<PolicyHits>>,
    /// What each worker tells control beside counters.
    pub reports: Vec<Consumer<Report>>,
    /// Counters of each port's queues.
    pub port_stats: Vec<Vec<Arc<PortQueueStats>>>,
    /// Largest packet of each port.
    pub mtus: Mtus,
    /// The clock that workers use.
    pub clock: Clock,
    /// What wakes each worker.
    pub wakers: Arc<[Waker]>,
}

/// Why workers could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// A port has no queue at all.
    #[error("port {0} has no queue")]
    NoQueue(String),
    /// The system refused an event descriptor.
    #[error("cannot make event descriptors: {0}")]
    Events(#[from] nix::Error),
    /// No randomness for IVs.
    #[error("the system gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// Puts a gateway's workers together.
///
/// # Errors
/// See [`AssemblyError`].
pub fn assemble(
    config: AssemblyConfig,
    arena: &Arc<Arena>,
    ports: Vec<OpenPort>,
) -> Result<Assembled, AssemblyError> {
    let count = config.cpus.len();
    let clock = config.clock.clone();
    let mut store = Store::new(count, config.max_sas);
    let mut draft = store.draft();
    draft.set_locals(Arc::new(config.locals));
    store.publish(draft);
    let mut setups = Vec::new();
    let mut port_stats = Vec::new();
    let mut owners: Vec<Vec<usize>> = Vec::new();
    let mut dealt: Vec<Vec<Vec<Box<dyn PortQueue>>>> = (0..count).map(|_| Vec::new()).collect();
    let mut tapped: Vec<Vec<Option<Box<dyn PortQueue>>>> = (0..count).map(|_| Vec::new()).collect();
    for (number, port) in ports.into_iter().enumerate() {
        let OpenPort {
            setup,
            queues,
            taps,
            worker,
        } = port;
        for slot in &mut dealt {
            slot.push(Vec::new());
        }
        let mut taps = taps.into_iter();
        for slot in &mut tapped {
            slot.push(taps.next());
        }
        port_stats.push(queues.iter().map(|q| Arc::clone(q.stats())).collect());
        if let Some(carrier) = setup.shares {
            let Some(holders) = owners.get(usize::from(carrier)).cloned() else {
                return Err(AssemblyError::NoQueue(setup.name));
            };
            owners.push(holders);
            setups.push(setup);
            continue;
        }
        let have = queues.len();
        if have == 0 {
            return Err(AssemblyError::NoQueue(setup.name));
        }
        // Ports with fewer queues than workers are spread over them.
        let first = match worker {
            Some(worker) => worker % count,
            None if have < count => number % count,
            None => 0,
        };
        let holders: Vec<usize> = (0..have.min(count)).map(|i| (first + i) % count).collect();
        for (queue, worker) in queues.into_iter().zip(holders.iter().cycle()) {
            dealt[*worker][number].push(queue);
        }
        owners.push(holders);
        setups.push(setup);
    }
    let mtus = Mtus::new(&setups);
    let pipeline = Arc::new(PipelineConfig {
        ports: setups,
        mtus: mtus.clone(),
        natt_port: config.natt_port,
        reassembly: config.reassembly,
        idle: config.idle,
        hold_unknown: config.hold_unknown,
        flow_entries: config.flow_entries,
        punt: config.punt,
    });
    let counters: Vec<_> = (0..count)
        .map(|_| Arc::new(WorkerCounters::default()))
        .collect();
    let hits: Vec<_> = (0..count)
        .map(|_| Arc::new(PolicyHits::new(config.policy_slots)))
        .collect();
    let mut workers = Vec::with_capacity(count);
    let mut reports = Vec::with_capacity(count);
    let mesh = Handover::mesh(count, config.handover_slots)?;
    let wakers = mesh
        .first()
        .map_or_else(|| Arc::from([]), |h| Arc::clone(h.wakers()));
    let (mut cpus, mut helpers) = (Vec::new(), Vec::new());
    if config.parallel && count > 1 {
        for (engine, helper) in parallel::crew(&wakers, &counters) {
            cpus.push(Box::new(engine) as Box<dyn EspEngine>);
            helpers.push(Some(helper));
        }
    } else {
        cpus.extend((0..count).map(|_| (config.engine)()));
        helpers.extend((0..count).map(|_| None));
    }
    let banks = Bank::mesh(cpus, &config.desks);
    let dealt = dealt.into_iter().zip(tapped);
    let parts = dealt.zip(mesh).zip(banks).zip(helpers);
    for (id, ((((queues, taps), handover), bank), helper)) in parts.enumerate() {
        let iv = match config.iv_seed {
            None => CbcIvGen::from_os()?,
            Some(seed) => CbcIvGen::from_seed(&spread(seed, id)),
        };
        let (told, heard) = RingBuffer::new(REPORTS);
        reports.push(heard);
        let parts = WorkerParts {
            id,
            cpu: config.cpus[id],
            reader: Reader::new(Arc::clone(store.shared()), id),
            pool: Pool::new(arena, config.pool_cache),
            queues,
            taps,
            queue_owner: owners
                .iter()
                .map(|holders| holders[id % holders.len()])
                .collect(),
            bank,
            helper,
            handover,
            counters: Arc::clone(&counters[id]),
            policy_hits: Arc::clone(&hits[id]),
            reports: told,
            config: Arc::clone(&pipeline),
        };
        workers.push(Worker::new(parts, clock.clone(), iv));
    }
    Ok(Assembled {
        workers,
        store,
        counters,
        hits,
        reports,
        port_stats,
        mtus,
        clock,
        wakers,
    })
}

/// A 32-byte seed per worker out of the test seed.
fn spread(seed: u64, worker: usize) -> [u8; 32] {
    let mut out = [0; 32];
    out[..8].copy_from_slice(&seed.to_le_bytes());
    out[8..16].copy_from_slice(&(worker as u64).to_le_bytes());
    out
}
