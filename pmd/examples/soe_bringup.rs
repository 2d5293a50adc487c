//! The checks of `deploy/en7581.md` that a program can make, in their order: `soe_bringup --socket PATH` for the model,
//! `soe_bringup ETHERNET SOE` for a board, where these are platform devices bound to vfio-platform. The first failure ends it.
//!
//! What it finds is what the reference does not know; what the driver assumes is printed by the driver.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pmd::airoha::Block;
use pmd::device::Device;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus};
use pmd::qdma::QdmaPlan;
use pmd::soe::{SoeConfig, SoeEngine};
use pmd::{Arena, ArenaConfig, Pool};
use sa_store::cipher::NoCipher;
use sa_store::runtime::{Install, Place, SaEntry, Start, TunnelIdx};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, SaSpec, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const SUITE: Suite = Suite::CipherHmac(Cipher::Cbc(AesBits::B128), Hmac::Sha256_128);

fn main() {
    if let Err(error) = run() {
        println!("soe_bringup: FAILED: {error}");
        std::process::exit(1);
    }
    println!("soe_bringup: all passed");
}

fn run() -> Outcome {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (eth, soe): (Arc<dyn Device>, Option<Arc<dyn Device>>) = match args[..] {
        ["--socket", path] => (Arc::new(VfioUserDevice::connect(Path::new(path))?), None),
        [eth, soe] => (
            Arc::new(VfioDevice::platform(eth, Protection::NoIommu)?),
            Some(Arc::new(VfioDevice::platform(soe, Protection::NoIommu)?)),
        ),
        _ => return Err("usage: soe_bringup --socket PATH | ETHERNET SOE".into()),
    };
    let arena = Arena::new(ArenaConfig {
        frames: 8192,
        ..ArenaConfig::default()
    })?;
    let plans = vec![QdmaPlan::shared(0, 2, true), QdmaPlan::shared(1, 2, true)];
    let block = Block::new(&eth, soe.as_ref(), plans, &arena)?;
    let engine = block.engine(SoeConfig::default())?;
    println!("checks 1 and 2: registers answer, 32 slots invalidated");
    block.start()?;
    println!("check 3, first part: both QDMA instances run");
    let mut bench = Bench {
        engine,
        pool: Pool::new(&arena, 64),
        view: Store::new(1, 16).current(),
    };
    bench.check()?;
    drop((bench, block));
    match arena.outstanding() {
        0 => Ok(()),
        n => Err(format!("{n} frames are missing").into()),
    }
}

struct Bench {
    engine: SoeEngine,
    pool: Pool,
    view: Arc<Snapshot>,
}

impl Bench {
    fn check(&mut self) -> Outcome {
        let out = self.install(Direction::Out, 0)?;
        let inb = self.install(Direction::In, 1)?;
        let (status, sealed) = self.one(out, JobKind::Seal, &inner(100))?;
        if status != JobStatus::Done {
            return Err(format!("check 4: no good result: {status:?}").into());
        }
        let rings = self.engine.counters().rings.iter().enumerate();
        let rings: Vec<_> = rings
            .filter(|(_, c)| c.value() > 0)
            .map(|(i, _)| i)
            .collect();
        println!("check 4: results on receive ring {rings:?}");
        let number = sealed
            .get(24..28)
            .map(|b| b.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)));
        println!(
            "check 5: number {number:?}, {} bytes of 100, TTL {:?}, flags {:#04x}, TOS {:#04x}",
            sealed.len(),
            sealed.get(8),
            sealed.get(6).copied().unwrap_or(0),
            sealed.get(1).copied().unwrap_or(0),
        );
        let (status, opened) = self.one(inb, JobKind::Open, &sealed)?;
        if status != JobStatus::Done || opened != inner(100) {
            return Err(format!("check 7: what was sealed does not open: {status:?}").into());
        }
        self.errors(inb, &sealed)?;
        let (status, next) = self.one(out, JobKind::Seal, &inner(200))?;
        let (after, opened) = self.one(inb, JobKind::Open, &next)?;
        if (status, after) != (JobStatus::Done, JobStatus::Done) || opened != inner(200) {
            return Err("check 8: errors harmed packets after them".into());
        }
        println!("check 8: right packets pass after wrong ones");
        self.many(out)
    }

    /// Which hop flag each error has.
    fn errors(&mut self, inb: SaId, sealed: &[u8]) -> Outcome {
        let mut wrong = sealed.to_vec();
        // Above the window, so that only the ICV is wrong.
        if let (Some(n), Some(last)) = (wrong.get(27).copied(), wrong.len().checked_sub(1)) {
            wrong[27] = n.wrapping_add(7);
            wrong[last] ^= 1;
        }
        for (what, packet) in [("replay", sealed), ("wrong ICV", &wrong[..])] {
            let flags = |b: &Bench| b.engine.counters().errors.each_ref().map(|c| c.value());
            let before = flags(self);
            let (status, _) = self.one(inb, JobKind::Open, packet)?;
            if status == JobStatus::Done {
                return Err(format!("check 7: {what} was accepted").into());
            }
            let after = flags(self);
            let flag = (0..3).find(|&i| after[i] > before[i]).map(|i| i + 5);
            println!("check 7: {what}: hop flag {flag:?}, none means that no result came");
        }
        Ok(())
    }

    fn many(&mut self, out: SaId) -> Outcome {
        const N: usize = 10_000;
        let begin = Instant::now();
        let (mut made, mut ended, mut good) = (0, 0, 0);
        let (mut jobs, mut done) = (Vec::new(), Vec::new());
        let mut ivs = std::collections::HashSet::new();
        while ended < N {
            if begin.elapsed() > Duration::from_secs(120) {
                return Err(format!("check 11: {ended} of {N} came back").into());
            }
            while jobs.len() < 32 && made < N {
                jobs.push(self.job(out, JobKind::Seal, &inner(1400))?);
                made += 1;
            }
            self.engine.submit(&self.view, &mut jobs, &mut done);
            for job in done.drain(..) {
                ended += 1;
                if job.status == JobStatus::Done {
                    good += 1;
                    let iv: Option<[u8; 16]> =
                        job.frame.data().get(28..44).and_then(|b| b.try_into().ok());
                    if !iv.is_some_and(|iv| ivs.insert(iv)) {
                        return Err("check 6: an IV came twice".into());
                    }
                }
                self.pool.put(job.frame);
            }
        }
        let rate = N as f64 * 1400.0 * 8.0 / begin.elapsed().as_secs_f64() / 1e6;
        println!(
            "checks 6 and 11: {good} of {N} good, no IV twice, {rate:.0} Mbit/s with four in flight"
        );
        Ok(())
    }

    fn install(&mut self, direction: Direction, index: u32) -> Outcome<SaId> {
        let id = SaId {
            index,
            generation: 0,
        };
        let entry = SaEntry::new(
            Arc::new(spec(direction)),
            Install {
                id,
                tunnel: TunnelIdx(0),
                owner: 0,
                cipher: Box::new(NoCipher),
                provider: "none",
                start: Start::default(),
                place: Place::CPU,
                now: 0,
            },
        );
        self.engine.install(&entry)?;
        Ok(id)
    }

    fn job(&mut self, sa: SaId, kind: JobKind, packet: &[u8]) -> Outcome<EspJob> {
        let mut frame = self.pool.get().ok_or("no frame")?;
        if !frame.set_data(packet) {
            self.pool.put(frame);
            return Err("a packet longer than a frame".into());
        }
        Ok(EspJob {
            esp_end: u16::try_from(packet.len())?,
            frame,
            sa,
            seq: 0,
            tag: 0,
            note: 0,
            esp_off: 20,
            next_header: 0,
            kind,
            mode: OffloadMode::Crypto,
            status: JobStatus::Pending,
        })
    }

    fn one(&mut self, sa: SaId, kind: JobKind, packet: &[u8]) -> Outcome<(JobStatus, Vec<u8>)> {
        let mut jobs = vec![self.job(sa, kind, packet)?];
        let mut done = Vec::new();
        let begin = Instant::now();
        self.engine.submit(&self.view, &mut jobs, &mut done);
        while done.is_empty() {
            if begin.elapsed() > Duration::from_secs(5) {
                return Err("a job did not come back".into());
            }
            self.engine.poll(&mut done);
        }
        let job = done.remove(0);
        let ended = (job.status, job.frame.data().to_vec());
        self.pool.put(job.frame);
        Ok(ended)
    }
}

fn inner(len: u16) -> Vec<u8> {
    let mut p = vec![0x5a; usize::from(len)];
    p[..20].fill(0);
    p[0] = 0x45;
    p[2..4].copy_from_slice(&len.to_be_bytes());
    p
}

fn spec(direction: Direction) -> SaSpec {
    let key = |n: usize| (1..=255).take(n).collect::<Vec<u8>>().into();
    SaSpec {
        offload: OffloadMode::Packet,
        engine: Some("soe".into()),
        ..SaSpec::plain(
            "bring-up",
            direction,
            Spi::new(0x1000).unwrap_or_else(|| unreachable!("above 255")),
            SUITE,
            SaKeys {
                enc: key(SUITE.enc_key_len()),
                auth: key(SUITE.auth_key_len()),
            },
        )
    }
}
