//! Driver, model and the socket between them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use esplanade_model::soe::{Soe, Switches};
use esplanade_model::{Knobs, Running, Server};
use pmd::airoha::Block;
use pmd::device::Device;
use pmd::device::vfio_user::VfioUserDevice;
use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus, Refusal};
use pmd::qdma::QdmaPlan;
use pmd::soe::{SoeConfig, SoeEngine};
use pmd::{Arena, ArenaConfig, Pool};
use sa_store::cipher::NoCipher;
use sa_store::runtime::{Install, Place, SaEntry, Start, TunnelIdx};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;

use super::reference::{Sa, inner};

pub(crate) fn gcm_on() -> SoeConfig {
    let mut c = super::calm();
    c.assume.gcm = true;
    c
}

/// A job that came back.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) sa: SaId,
    pub(crate) tag: u64,
    pub(crate) seq: u64,
    pub(crate) status: JobStatus,
    pub(crate) bytes: Vec<u8>,
}

/// A model and a way to it, without a driver.
pub(crate) struct Bare {
    path: PathBuf,
    _running: Running,
    _dir: tempfile::TempDir,
}

impl Bare {
    pub(crate) fn device(&self) -> VfioUserDevice {
        VfioUserDevice::connect(&self.path).unwrap()
    }
}

pub(crate) struct Rig {
    pub(crate) engine: SoeEngine,
    pub(crate) knobs: Arc<Knobs>,
    block: Block,
    pool: Pool,
    arena: Arc<Arena>,
    view: Arc<Snapshot>,
    running: Running,
    next: u32,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new(config: SoeConfig) -> Rig {
        Rig::with(config, |_| {})
    }

    pub(crate) fn with(config: SoeConfig, switch: impl FnOnce(&mut Switches)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let knobs = Arc::<Knobs>::default();
        knobs.late.store(10_000, Relaxed);
        let mut switches = Switches::default();
        switch(&mut switches);
        let model = Soe::new(switches, Arc::clone(&knobs));
        let path = dir.path().join("soe");
        let running = Server::bind(&path).unwrap().spawn(Box::new(model)).unwrap();
        let device: Arc<dyn Device> = Arc::new(VfioUserDevice::connect(&path).unwrap());
        let arena = Arena::new(ArenaConfig {
            frames: 8192,
            ..ArenaConfig::default()
        })
        .unwrap();
        let plans = vec![QdmaPlan::shared(0, 2, true), QdmaPlan::shared(1, 2, true)];
        let block = Block::new(&device, None, plans, &arena).unwrap();
        let engine = block.engine(config).unwrap();
        block.start().unwrap();
        Rig {
            engine,
            knobs,
            block,
            pool: Pool::new(&arena, 64),
            arena,
            view: Store::new(1, 16).current(),
            running,
            next: 0,
            _dir: dir,
        }
    }

    pub(crate) fn bare() -> Bare {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("soe");
        let model = Soe::new(Switches::default(), Arc::default());
        let running = Server::bind(&path).unwrap().spawn(Box::new(model)).unwrap();
        Bare {
            path,
            _running: running,
            _dir: dir,
        }
    }

    pub(crate) fn add(&mut self, spec: SaSpec) -> Sa {
        self.try_add(spec).unwrap()
    }

    pub(crate) fn try_add(&mut self, spec: SaSpec) -> Result<Sa, Refusal> {
        let id = SaId {
            index: self.next,
            generation: 0,
        };
        let entry = SaEntry::new(
            Arc::new(spec.clone()),
            Install {
                id,
                tunnel: TunnelIdx(self.next % 4),
                owner: 0,
                cipher: Box::new(NoCipher),
                provider: "none",
                start: Start::default(),
                place: Place::CPU,
                now: 0,
            },
        );
        self.engine.install(&entry)?;
        self.next += 1;
        Ok(Sa { spec, id })
    }

    pub(crate) fn remove(&mut self, sa: &Sa) {
        self.engine.remove(sa.id);
        self.idle();
    }

    /// Turns without work.
    pub(crate) fn idle(&mut self) {
        let end = Instant::now() + Duration::from_millis(250);
        while Instant::now() < end {
            assert!(self.poll().is_empty());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn job(&mut self, sa: &Sa, tag: u64, packet: &[u8]) -> EspJob {
        let mut frame = self.pool.get().unwrap();
        assert!(frame.set_data(packet));
        let len = u16::try_from(packet.len()).unwrap();
        EspJob {
            frame,
            sa: sa.id,
            seq: 0,
            tag,
            note: 0,
            esp_off: if sa.spec.encap.is_some() { 28 } else { 20 },
            esp_end: len,
            next_header: 0,
            kind: match sa.spec.direction {
                Direction::Out => JobKind::Seal,
                Direction::In => JobKind::Open,
            },
            mode: OffloadMode::Crypto,
            status: JobStatus::Pending,
        }
    }

    fn poll(&mut self) -> Vec<Ended> {
        let mut done = Vec::new();
        self.engine.poll(&mut done);
        self.end_jobs(done)
    }

    fn end_jobs(&mut self, done: Vec<EspJob>) -> Vec<Ended> {
        let pool = &mut self.pool;
        let end = |job: EspJob| {
            let ended = Ended {
                sa: job.sa,
                tag: job.tag,
                seq: job.seq,
                status: job.status,
                bytes: job.frame.data().to_vec(),
            };
            pool.put(job.frame);
            ended
        };
        done.into_iter().map(end).collect()
    }

    /// One packet there and back.
    pub(crate) fn one(&mut self, sa: &Sa, packet: &[u8]) -> Ended {
        let mut jobs = vec![self.job(sa, 0, packet)];
        let mut done = Vec::new();
        self.engine.submit(&self.view, &mut jobs, &mut done);
        assert!(jobs.is_empty());
        let begin = Instant::now();
        let mut ended = self.end_jobs(done);
        while ended.is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(10), "no result");
            ended = self.poll();
        }
        assert_eq!(ended.len(), 1);
        ended.remove(0)
    }

    /// `n` packets of the SAs in turn, each with its number as its mark, as fast as the engine takes them.
    pub(crate) fn load(&mut self, sas: &[&Sa], n: usize, len: u16, most: Duration) -> Vec<Ended> {
        let mut all = Vec::new();
        self.run(sas, n, len, most, |e| all.push(e));
        all
    }

    /// As [`Rig::load`], all of them good; only how many.
    pub(crate) fn count(&mut self, sas: &[&Sa], n: usize, len: u16, most: Duration) -> usize {
        let mut right = 0;
        self.run(sas, n, len, most, |e| {
            right += usize::from(e.status == JobStatus::Done);
        });
        right
    }

    fn run(
        &mut self,
        sas: &[&Sa],
        n: usize,
        len: u16,
        most: Duration,
        mut each: impl FnMut(Ended),
    ) {
        let begin = Instant::now();
        let (mut made, mut ended) = (0usize, 0);
        let mut jobs = Vec::new();
        while ended < n {
            assert!(begin.elapsed() < most, "{ended} of {n} came back");
            while jobs.len() < 32 && made < n {
                let sa = sas[made % sas.len()];
                let mut packet = inner(len, 0);
                packet[20..28].copy_from_slice(&(made as u64).to_be_bytes());
                jobs.push(self.job(sa, made as u64, &packet));
                made += 1;
            }
            let mut done = Vec::new();
            self.engine.submit(&self.view, &mut jobs, &mut done);
            for e in self.end_jobs(done) {
                ended += 1;
                each(e);
            }
        }
        assert!(jobs.is_empty());
    }

    /// These packets of one SA, marked by their place, as fast as the engine takes them.
    pub(crate) fn each(&mut self, sa: &Sa, packets: &[Vec<u8>], most: Duration) -> Vec<Ended> {
        let begin = Instant::now();
        let mut left = (0..).zip(packets);
        let (mut all, mut jobs) = (Vec::new(), Vec::new());
        while all.len() < packets.len() {
            assert!(begin.elapsed() < most, "{} came back", all.len());
            while jobs.len() < 32
                && let Some((tag, packet)) = left.next()
            {
                jobs.push(self.job(sa, tag, packet));
            }
            let mut done = Vec::new();
            self.engine.submit(&self.view, &mut jobs, &mut done);
            all.extend(self.end_jobs(done));
        }
        all
    }

    pub(crate) fn doorbells(&self) -> u64 {
        let shared = self.block.hub();
        shared.counters().iter().map(|c| c.doorbells.value()).sum()
    }

    /// Everything came home, and the driver broke as many rules as expected.
    pub(crate) fn end(self, broken: u64) {
        let Rig {
            engine,
            block,
            pool,
            arena,
            running,
            ..
        } = self;
        drop((engine, block, pool));
        assert_eq!(arena.outstanding(), 0, "frames are missing");
        let log = running.log();
        assert_eq!(log.count(), broken, "{:?}", log.take());
    }
}
