//! Times the CPU and engines on packets of SAs of its own. It blocks: for the start, before anything else uses the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus};
use pmd::{Frame, Pool};
use quanta::Clock;
use sa_store::cipher::{CipherError, CipherFactory, CipherJob};
use sa_store::plan::{ESP_HEADER, ESP_TRAILER};
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::Suite;
use zeroize::Zeroizing;

use super::table::{Figure, Row, Size};
use crate::engine::SoftwareEngine;
use crate::engine::private::{HERE, Private, THERE};
use crate::wire::ipv4::{self, Ipv4Repr};
use crate::wire::proto;

/// Outer header of the packets.
const OUTER: usize = ipv4::HEADER_LEN;

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Packets of each size in a run.
    pub packets: usize,
    /// Runs; the fastest counts, others were disturbed.
    pub runs: usize,
    /// How long an engine may take for a run.
    pub patience: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            packets: 128,
            runs: 3,
            patience: Duration::from_millis(500),
        }
    }
}

/// Why a place has no figures for a suite.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unmeasured {
    /// The engine does not take the SA.
    #[error("{suite} in {mode:?} mode: {reason}")]
    Refused {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
        /// The driver's words.
        reason: String,
    },
    /// What came back is not what was put in, or not what the CPU makes of it: it is never chosen.
    #[error("{suite} in {mode:?} mode: a wrong answer to {kind:?}")]
    Wrong {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
        /// Direction of the job.
        kind: JobKind,
    },
    /// Not everything came back in time.
    #[error("{suite} in {mode:?} mode: no answer in time")]
    Silent {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
    },
    /// Too few free packet buffers.
    #[error("too few packet buffers are free")]
    NoFrames,
    /// No software for the suite.
    #[error(transparent)]
    Cipher(#[from] CipherError),
}

/// What measuring takes.
pub struct Bench<'a> {
    /// Frames that the engine can reach.
    pub pool: &'a mut Pool,
    /// Clock.
    pub clock: &'a Clock,
    /// Software: what the CPU is measured with, and engines are held against.
    pub factory: &'a dyn CipherFactory,
    /// How much.
    pub effort: Effort,
}

impl Bench<'_> {
    /// The CPU's rows for these suites.
    pub fn cpu(&mut self, suites: &[Suite]) -> (Vec<Row>, Vec<Unmeasured>) {
        let mut engine = SoftwareEngine::default();
        let asked = suites.iter().map(|s| (*s, Place::CPU));
        self.all(&mut engine, asked.collect())
    }

    /// The rows of an engine with this number (from 1), every suite in every mode.
    pub fn engine(
        &mut self,
        engine: &mut dyn EspEngine,
        number: u8,
    ) -> (Vec<Row>, Vec<Unmeasured>) {
        self.engine_in(engine, number, |_| true)
    }

    /// The same for the suites that are `wanted`.
    pub fn engine_in(
        &mut self,
        engine: &mut dyn EspEngine,
        number: u8,
        wanted: impl Fn(Suite) -> bool,
    ) -> (Vec<Row>, Vec<Unmeasured>) {
        let can = engine.capabilities();
        let of = |mode, suites: &[Suite]| -> Vec<_> {
            let wanted = suites.iter().filter(|s| wanted(**s));
            wanted.map(|s| (*s, mode)).collect()
        };
        let crypto = of(OffloadMode::Crypto, &can.crypto);
        let packet = of(OffloadMode::Packet, &can.packet);
        let place = |mode| Place {
            engine: number,
            mode,
            outer_headers: mode == OffloadMode::Packet && can.outer_headers,
        };
        let asked = crypto.into_iter().chain(packet);
        let asked = asked.map(|(s, mode)| (s, place(mode))).collect();
        self.all(engine, asked)
    }

    fn all(
        &mut self,
        engine: &mut dyn EspEngine,
        asked: Vec<(Suite, Place)>,
    ) -> (Vec<Row>, Vec<Unmeasured>) {
        let (mut rows, mut not) = (Vec::new(), Vec::new());
        for (n, (suite, place)) in (0..).zip(asked) {
            if !engine.is_healthy() {
                break;
            }
            match self.suite(engine, suite, place, n) {
                Ok(measured) => rows.extend(measured),
                Err(why) => not.push(why),
            }
        }
        // One that stopped in the middle does not serve at all.
        if !engine.is_healthy() {
            rows.clear();
        }
        (rows, not)
    }

    fn suite(
        &mut self,
        engine: &mut dyn EspEngine,
        suite: Suite,
        place: Place,
        number: u32,
    ) -> Result<[Row; 2], Unmeasured> {
        let pair = Pair::new(suite, place, number, self.factory)?;
        let mut installed = Ok(());
        for sa in [&pair.out, &pair.inb] {
            installed = installed.and_then(|()| engine.install(sa));
        }
        let measured = match installed {
            Ok(()) => self.sizes(engine, &pair),
            Err(refusal) => Err(Unmeasured::Refused {
                suite,
                mode: place.mode,
                reason: refusal.to_string(),
            }),
        };
        engine.remove(pair.out.fixed.id);
        engine.remove(pair.inb.fixed.id);
        measured
    }

    fn sizes(&mut self, engine: &mut dyn EspEngine, pair: &Pair) -> Result<[Row; 2], Unmeasured> {
        let row = |direction| Row::new(pair.suite, direction, pair.place);
        let (mut out, mut inb) = (row(Direction::Out), row(Direction::In));
        let mut seq = 0;
        for size in Size::ALL {
            let mut best: [Option<Figure>; 2] = [None; 2];
            for _ in 0..self.effort.runs.max(1) {
                let run = self.round_trip(engine, pair, size, &mut seq)?;
                for (best, new) in best.iter_mut().zip(run) {
                    *best = Some(best.map_or(new, |old| Figure {
                        ns: old.ns.min(new.ns),
                        cpu_ns: old.cpu_ns.min(new.cpu_ns),
                    }));
                }
            }
            let [sealing, opening] = best;
            if let (Some(sealing), Some(opening)) = (sealing, opening) {
                out.set(size, sealing);
                inb.set(size, opening);
            }
        }
        Ok([out, inb])
    }

    /// Packets sealed, looked at by the CPU, opened, and compared with what they were.
    fn round_trip(
        &mut self,
        engine: &mut dyn EspEngine,
        pair: &Pair,
        size: Size,
        seq: &mut u64,
    ) -> Result<[Figure; 2], Unmeasured> {
        let lengths = size.packets().iter().cycle().take(self.effort.packets);
        let inners: Vec<Vec<u8>> = lengths
            .zip(*seq..)
            .map(|(len, seed)| inner(*len, seed))
            .collect();
        let mut jobs = Vec::with_capacity(inners.len());
        for inner in &inners {
            *seq += 1;
            match self.pool.get().map(|frame| pair.job(frame, *seq, inner)) {
                Some(Ok(job)) => jobs.push(job),
                back => {
                    if let Some(Err(frame)) = back {
                        self.pool.put(frame);
                    }
                    self.put(&mut jobs);
                    return Err(Unmeasured::NoFrames);
                }
            }
        }
        let mut done = Vec::with_capacity(jobs.len());
        let sealing = self.run(engine, pair, &mut jobs, &mut done)?;
        let sealed_right = done
            .iter()
            .zip(&inners)
            .all(|(job, inner)| pair.opens_to(job, inner));
        for job in &mut done {
            job.kind = JobKind::Open;
            job.sa = pair.inb.fixed.id;
            job.status = JobStatus::Pending;
        }
        let mut jobs = std::mem::take(&mut done);
        if !sealed_right {
            self.put(&mut jobs);
            return Err(pair.wrong(JobKind::Seal));
        }
        let opening = self.run(engine, pair, &mut jobs, &mut done)?;
        let opened_right = done
            .iter()
            .zip(&inners)
            .all(|(job, inner)| pair.payload(job) == Some(inner));
        self.put(&mut done);
        if !opened_right {
            return Err(pair.wrong(JobKind::Open));
        }
        Ok([sealing, opening])
    }

    /// Drives the engine as a worker would, and waits for everything.
    fn run(
        &mut self,
        engine: &mut dyn EspEngine,
        pair: &Pair,
        jobs: &mut Vec<EspJob>,
        done: &mut Vec<EspJob>,
    ) -> Result<Figure, Unmeasured> {
        let count = jobs.len();
        let begin = Instant::now();
        let start = self.clock.raw();
        let (mut now, mut busy) = (start, 0);
        while done.len() < count {
            let before = (jobs.len(), done.len());
            if jobs.is_empty() {
                engine.poll(done);
            } else {
                engine.submit(&pair.view, jobs, done);
            }
            let then = std::mem::replace(&mut now, self.clock.raw());
            // A worker that finds nothing goes on with something else.
            if (jobs.len(), done.len()) != before {
                busy += self.clock.delta_as_nanos(then, now);
            } else if begin.elapsed() > self.effort.patience {
                return Err(self.give_up(engine, pair, jobs, done));
            }
        }
        let per_packet = |ns: u64| ns as f64 / count.max(1) as f64;
        Ok(Figure {
            ns: per_packet(self.clock.delta_as_nanos(start, now)),
            cpu_ns: per_packet(busy),
        })
    }

    /// Brings home what an engine holds that does not answer.
    #[cold]
    fn give_up(
        &mut self,
        engine: &mut dyn EspEngine,
        pair: &Pair,
        jobs: &mut Vec<EspJob>,
        done: &mut Vec<EspJob>,
    ) -> Unmeasured {
        if engine.in_flight() != 0
            && let Err(error) = engine.reset(done)
        {
            tracing::error!(%error, "while it was measured");
        }
        self.put(jobs);
        self.put(done);
        Unmeasured::Silent {
            suite: pair.suite,
            mode: pair.place.mode,
        }
    }

    fn put(&mut self, jobs: &mut Vec<EspJob>) {
        for job in jobs.drain(..) {
            self.pool.put(job.frame);
        }
    }
}

/// Both ends of an SA that nobody else knows.
struct Pair {
    suite: Suite,
    place: Place,
    out: Arc<SaEntry>,
    inb: Arc<SaEntry>,
    view: Snapshot,
}

impl Pair {
    fn new(
        suite: Suite,
        place: Place,
        number: u32,
        factory: &dyn CipherFactory,
    ) -> Result<Self, CipherError> {
        let [out, inb] = [
            (2 * number, Direction::Out),
            (2 * number + 1, Direction::In),
        ];
        let out = entry(suite, place, out, factory)?;
        let inb = entry(suite, place, inb, factory)?;
        let mut view = Snapshot::clone(&Store::new(1, 1).current());
        for sa in [&out, &inb] {
            view.sas.set(sa.fixed.id.index, Some(Arc::clone(sa)));
        }
        Ok(Self {
            suite,
            place,
            out,
            inb,
            view,
        })
    }

    fn wrong(&self, kind: JobKind) -> Unmeasured {
        Unmeasured::Wrong {
            suite: self.suite,
            mode: self.place.mode,
            kind,
        }
    }

    /// A packet to seal, laid out as the mode asks; the frame back when it does not fit.
    fn job(&self, mut frame: Frame, seq: u64, inner: &[u8]) -> Result<EspJob, Frame> {
        let packet = self.place.mode == OffloadMode::Packet;
        let mut bytes = Vec::new();
        if packet && self.place.outer_headers {
            bytes.extend(inner);
        } else {
            bytes.resize(OUTER, 0);
            if packet {
                bytes.resize(OUTER + ESP_HEADER + self.suite.iv_len(), 0);
                bytes.extend(inner);
            } else {
                self.frame(&mut bytes, seq, inner);
            }
            let payload_len = u16::try_from(bytes.len() - OUTER).unwrap_or(u16::MAX);
            if let Some(head) = bytes.first_chunk_mut() {
                ip(proto::ESP, payload_len).emit(head);
            }
        }
        if !frame.set_data(&bytes) {
            return Err(frame);
        }
        let whole = packet && self.place.outer_headers;
        Ok(EspJob {
            esp_off: if whole { 0 } else { 20 },
            esp_end: u16::try_from(frame.len()).unwrap_or(u16::MAX),
            frame,
            sa: self.out.fixed.id,
            seq,
            tag: seq,
            note: 0,
            next_header: proto::IPV4,
            kind: JobKind::Seal,
            mode: self.place.mode,
            status: JobStatus::Pending,
        })
    }

    /// Header, IV, payload, padding, trailer, room for the ICV: RFC 4303 section 2.
    fn frame(&self, bytes: &mut Vec<u8>, seq: u64, inner: &[u8]) {
        bytes.extend(self.out.fixed.spi.to_be_bytes());
        let [.., a, b, c, d] = seq.to_be_bytes();
        bytes.extend([a, b, c, d]);
        bytes.extend(seq.to_be_bytes().iter().cycle().take(self.suite.iv_len()));
        bytes.extend(inner);
        let bare = inner.len() + ESP_TRAILER;
        let pad = bare.next_multiple_of(self.suite.pad_align()) - bare;
        bytes.extend((1u8..=u8::MAX).take(pad));
        bytes.extend([u8::try_from(pad).unwrap_or(0), proto::IPV4]);
        bytes.resize(bytes.len() + self.suite.icv_len(), 0);
    }

    /// Whether the CPU opens a sealed packet to what it was made of.
    fn opens_to(&self, job: &EspJob, inner: &[u8]) -> bool {
        let range = usize::from(job.esp_off)..usize::from(job.esp_end);
        let (JobStatus::Done, Some(sealed)) = (job.status, job.frame.data().get(range)) else {
            return false;
        };
        let mut esp = sealed.to_vec();
        let cipher = &*self.inb.fixed.cipher;
        let mut open = [CipherJob {
            ctx: cipher,
            esp: &mut esp,
            seq_hi: 0,
            ok: false,
        }];
        cipher.open(&mut open);
        let front = ESP_HEADER + self.suite.iv_len();
        open[0].ok && esp.get(front..front + inner.len()) == Some(inner)
    }

    /// What lies inside an opened packet.
    fn payload<'a>(&self, job: &'a EspJob) -> Option<&'a [u8]> {
        if job.status != JobStatus::Done {
            return None;
        }
        let end = usize::from(job.esp_end);
        let data = job.frame.data();
        let front = usize::from(job.esp_off) + ESP_HEADER + self.suite.iv_len();
        match (self.place.mode, self.place.outer_headers) {
            (OffloadMode::Packet, true) => data.get(..end),
            (OffloadMode::Packet, false) => data.get(front..end),
            _ => {
                let body = data.get(front..end.checked_sub(self.suite.icv_len())?)?;
                let (rest, [pad, _]) = body.split_last_chunk::<ESP_TRAILER>()?;
                rest.get(..rest.len().checked_sub(usize::from(*pad))?)
            }
        }
    }
}

fn entry(
    suite: Suite,
    place: Place,
    (index, direction): (u32, Direction),
    factory: &dyn CipherFactory,
) -> Result<Arc<SaEntry>, CipherError> {
    // They guard nothing but made-up packets.
    let keys = SaKeys {
        enc: pattern(suite.enc_key_len(), 0x3b),
        auth: pattern(suite.auth_key_len(), 0x5d),
    };
    let cipher = factory.make(suite, &keys, false, direction)?;
    let sa = Private {
        name: "(measurement)",
        // No store counts so far: what an engine still remembers of it is never taken for another SA.
        id: SaId {
            index,
            generation: u32::MAX,
        },
        // Both ends of a pair, above the reserved numbers.
        spi: Spi::new(0x1000 + index / 2).unwrap_or_else(|| unreachable!("above 255")),
        suite,
        keys,
        direction,
        offload: place.mode,
        place,
        cipher,
        provider: factory.provider_for(suite).unwrap_or("none"),
    };
    Ok(sa.entry())
}

fn pattern(n: usize, from: u8) -> Zeroizing<Vec<u8>> {
    let bytes = (0..n).map(|i| from.wrapping_add(i.to_le_bytes()[0].wrapping_mul(29)));
    Zeroizing::new(bytes.collect())
}

fn ip(proto: u8, payload_len: u16) -> Ipv4Repr {
    Ipv4Repr {
        src: HERE,
        dst: THERE,
        proto,
        ttl: 64,
        tos: 0,
        id: 0,
        frag: ipv4::DF,
        payload_len,
    }
}

/// An inner packet of `len` bytes, whose content follows from `seed`.
fn inner(len: u16, seed: u64) -> Vec<u8> {
    let mut head = [0; ipv4::HEADER_LEN];
    // RFC 3692: for experiments.
    ip(253, len.saturating_sub(20)).emit(&mut head);
    let mut x = seed;
    let body = (20..len).map(|_| {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        x.to_be_bytes()[0]
    });
    head.into_iter().chain(body).collect()
}

#[cfg(test)]
mod tests;
