//! The wrapper around an engine that does as the test says, in virtual time; and around the real drivers with their models.

mod engine;
mod lies;
mod models;
mod quarantine;
mod reasons;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pmd::arena::{Arena, ArenaConfig};
use pmd::engine::{EspEngine, EspJob, JobKind, JobStatus};
use sa_store::runtime::{Place, SaEntry, Start};
use sa_store::sa::{Direction, OffloadMode, SaId, Spi};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::Suite;

use super::packets::{self, Known, SPI};
use super::*;
use crate::crypto::Fixed;
use crate::crypto::differential::keys;
use crate::crypto::rustcrypto::RustCrypto;
use engine::{Fault, Script, Shared, TestEngine};

/// SAs of the store.
const SAS: u32 = 64;
pub(super) const SECOND: u64 = 1_000_000_000;

fn gcm() -> Suite {
    "aes-128-gcm-16".parse().unwrap()
}

fn cbc() -> Suite {
    "aes-128-cbc+hmac-sha1-96".parse().unwrap()
}

/// The wrapper, and who uses it.
struct Rig {
    trusted: Option<Trusted>,
    script: Shared,
    bare: bool,
    arena: Arc<Arena>,
    pool: Pool,
    store: Store,
    view: Arc<Snapshot>,
    clock: Arc<AtomicU64>,
    jobs: Vec<EspJob>,
    done: Vec<EspJob>,
    trust: Arc<TrustStats>,
}

fn arena() -> Arc<Arena> {
    Arena::new(ArenaConfig {
        frames: 4096,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap()
}

fn config() -> TrustConfig {
    TrustConfig::new("e0", SAS)
}

impl Rig {
    /// Around an engine that does as the script says; `bare` as in [`TestEngine::new`].
    fn new(bare: bool, config: TrustConfig, script: Script) -> Rig {
        let script = Arc::new(Mutex::new(script));
        let engine = TestEngine::new(SAS, bare, &[gcm(), cbc()], &script);
        Rig::around(Box::new(engine), arena(), config, script)
    }

    fn around(
        engine: Box<dyn EspEngine>,
        arena: Arc<Arena>,
        config: TrustConfig,
        script: Shared,
    ) -> Rig {
        Rig::at(engine, arena, config, script, None)
    }

    /// As [`Rig::new`], with an engine that is opened anew when it does not come back.
    fn reopening(bare: bool, config: TrustConfig) -> Rig {
        let script = Shared::default();
        let shared = Arc::clone(&script);
        let engine = move || {
            let mut script = shared.lock().unwrap();
            script.installed.clear();
            (script.hangs, script.ill) = (false, false);
            drop(script);
            TestEngine::new(SAS, bare, &[gcm(), cbc()], &shared)
        };
        let first = Box::new(engine());
        let reopen: Reopen = Box::new(move || Ok(Box::new(engine())));
        Rig::at(first, arena(), config, script, Some(reopen))
    }

    fn at(
        engine: Box<dyn EspEngine>,
        arena: Arc<Arena>,
        config: TrustConfig,
        script: Shared,
        reopen: Option<Reopen>,
    ) -> Rig {
        let clock = Arc::new(AtomicU64::new(1000 * SECOND));
        let time = TrustClock::Manual(Arc::clone(&clock));
        let bare = engine.capabilities().outer_headers;
        let ciphers = Arc::new(Fixed(RustCrypto));
        let pool = Pool::new(&arena, 8);
        let trusted = Trusted::with_reopen(engine, config, pool, ciphers, time, reopen).unwrap();
        let store = Store::new(1, SAS);
        Rig {
            trust: Arc::clone(&trusted.trust),
            trusted: Some(trusted),
            script,
            bare,
            pool: Pool::new(&arena, 16),
            arena,
            view: store.current(),
            store,
            clock,
            jobs: Vec::new(),
            done: Vec::new(),
        }
    }

    fn trusted(&mut self) -> &mut Trusted {
        self.trusted.as_mut().unwrap()
    }

    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.script().faults = faults.into_iter().collect::<VecDeque<_>>();
    }

    /// Adds an SA to the store. All have the same SPI, and addresses of their own.
    fn add(&mut self, suite: Suite, direction: Direction, mode: OffloadMode) -> SaId {
        let spec = packets::entry(
            SaId {
                index: 0,
                generation: 0,
            },
            suite,
            &keys(suite, 9),
            direction,
            mode,
        )
        .unwrap()
        .spec
        .clone();
        let mut spec = Arc::unwrap_or_clone(spec);
        let n = self.view.sas.iter().flatten().count();
        spec.name = format!("sa{n}");
        spec.tunnel = format!("t{n}");
        spec.spi = Spi::new(SPI).unwrap();
        spec.dst = std::net::IpAddr::from([10, 9, 0, u8::try_from(n).unwrap()]);
        let start = Start {
            lease_end: u64::MAX,
            ..Start::default()
        };
        let mut draft = self.store.draft();
        let place = Place {
            engine: 1,
            mode,
            outer_headers: self.bare && mode == OffloadMode::Packet,
        };
        let factory = Fixed(RustCrypto);
        let id = self
            .store
            .add_sa_on(&mut draft, Arc::new(spec), &factory, start, place, 0)
            .unwrap();
        self.store.publish(draft);
        self.view = self.store.current();
        id
    }

    fn install(&mut self, id: SaId) -> Result<(), Refusal> {
        let entry = Arc::clone(self.view.sa(id).unwrap());
        self.trusted().install(&entry)
    }

    /// An SA of the engine.
    fn sa(&mut self, suite: Suite, direction: Direction, mode: OffloadMode) -> SaId {
        let id = self.add(suite, direction, mode);
        self.install(id).unwrap();
        id
    }

    fn remove(&mut self, id: SaId) {
        let mut draft = self.store.draft();
        assert!(draft.remove_sa(id));
        self.store.publish(draft);
        self.view = self.store.current();
        self.trusted().remove(id);
    }

    fn entry(&self, id: SaId) -> &Arc<SaEntry> {
        self.view.sa(id).unwrap()
    }

    fn known(&self, id: SaId, seq: u64) -> Known {
        let entry = self.entry(id);
        let suite = entry.spec.suite;
        let cipher = packets::reference(suite, &entry.spec.keys).unwrap();
        let len = u16::try_from(40 + seq % 900).unwrap();
        Known::new(suite, &*cipher, u32::try_from(seq).unwrap(), len).unwrap()
    }

    /// Queues packet number `seq` of an SA: to be sealed, or to be opened.
    fn queue(&mut self, id: SaId, seq: u64) {
        let entry = Arc::clone(self.entry(id));
        let known = self.known(id, seq);
        let (kind, bytes) = match (entry.spec.direction, entry.spec.offload) {
            (Direction::Out, OffloadMode::Packet) => (JobKind::Seal, &known.inner),
            (Direction::Out, _) => (JobKind::Seal, &known.framed),
            (Direction::In, _) => (JobKind::Open, &known.sealed),
        };
        let frame = self.pool.get().unwrap();
        let mut job = packets::job(frame, &entry, kind, seq, bytes, self.bare).unwrap();
        job.tag = seq << 8 | 0x5a;
        job.note = 77;
        self.jobs.push(job);
    }

    /// The next packets of an outbound SA, with numbers as a worker takes them.
    fn send(&mut self, id: SaId, n: u64) {
        for _ in 0..n {
            let seq = self.entry(id).next_out(1, 0).unwrap();
            self.queue(id, seq);
        }
        self.submit();
    }

    fn receive(&mut self, id: SaId, numbers: impl IntoIterator<Item = u64>) {
        for seq in numbers {
            self.queue(id, seq);
        }
        self.submit();
    }

    fn submit(&mut self) {
        let Rig {
            trusted,
            view,
            jobs,
            done,
            ..
        } = self;
        trusted.as_mut().unwrap().submit(view, jobs, done);
    }

    fn poll(&mut self) {
        let Rig { trusted, done, .. } = self;
        trusted.as_mut().unwrap().poll(done);
    }

    fn later(&mut self, nanoseconds: u64) {
        self.clock.fetch_add(nanoseconds, Relaxed);
        self.submit();
        self.poll();
    }

    /// One call, later: a thread that resets the engine is not heard of in it.
    fn tick(&mut self, nanoseconds: u64) {
        self.clock.fetch_add(nanoseconds, Relaxed);
        self.submit();
    }

    fn state(&self) -> (EngineState, Reason) {
        (self.trust.state(), self.trust.reason())
    }

    /// Waits, in real time, for the thread that resets the engine. Jobs that come back meanwhile stay in `done`.
    fn healed(&mut self) {
        self.until(|r| r.trust.state() != EngineState::Recovering);
    }

    fn until(&mut self, mut end: impl FnMut(&mut Rig) -> bool) {
        let begin = Instant::now();
        while !end(self) {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{:?}",
                self.state()
            );
            self.submit();
            self.poll();
            std::thread::yield_now();
        }
    }

    /// All that came back: number and status, each right if it is done. Frames go home.
    fn take(&mut self) -> Vec<(u64, JobStatus)> {
        self.poll();
        let mut all = Vec::new();
        for job in std::mem::take(&mut self.done) {
            assert_eq!((job.tag & 0xff, job.note), (0x5a, 77));
            let seq = job.tag >> 8;
            if job.status == JobStatus::Done {
                self.check(&job, seq);
            }
            all.push((seq, job.status));
            self.pool.put(job.frame);
        }
        all
    }

    /// The job is what the reference makes of it.
    fn check(&mut self, job: &EspJob, seq: u64) {
        let Some(entry) = self.view.sa(job.sa) else {
            panic!("done under an SA that is gone")
        };
        let (suite, mode) = (entry.spec.suite, entry.spec.offload);
        let cipher = packets::reference(suite, &entry.spec.keys).unwrap();
        let known = self.known(job.sa, seq);
        let by_cpu = job.mode == OffloadMode::Software;
        let mode = if by_cpu { OffloadMode::Crypto } else { mode };
        let number = u32::try_from(job.seq).unwrap();
        let outcome = packets::Outcome::of(job, suite, self.bare);
        assert!(
            outcome.is_right(&known, suite, &*cipher, job.kind, mode, number),
            "{job:?}"
        );
    }

    /// Every frame is home.
    fn end(mut self) {
        let left = self.take();
        assert_eq!(left, []);
        assert_eq!(self.trusted().in_flight(), 0);
        self.trusted = None;
        assert_eq!(self.arena.outstanding(), 0);
    }
}

fn all(seqs: impl IntoIterator<Item = u64>, status: JobStatus) -> Vec<(u64, JobStatus)> {
    seqs.into_iter().map(|s| (s, status)).collect()
}

/// Both kinds of engine, and what they carry.
const KINDS: [(bool, OffloadMode); 3] = [
    (false, OffloadMode::Crypto),
    (false, OffloadMode::Packet),
    (true, OffloadMode::Packet),
];

#[test]
fn a_good_engine_carries_packets_and_its_canaries_are_nobodys_traffic() {
    for (bare, mode) in KINDS {
        for suite in [gcm(), cbc()] {
            let full = TrustConfig {
                sample_out: 1,
                sample_in: 1,
                ..config()
            };
            let mut rig = Rig::new(bare, full, Script::default());
            let out = rig.sa(suite, Direction::Out, mode);
            let inb = rig.sa(suite, Direction::In, mode);
            for round in 0..8 {
                rig.send(out, 10);
                rig.receive(inb, 10 * round + 1..10 * round + 11);
                assert_eq!(rig.trusted().in_flight(), 20);
                let mut got = rig.take();
                let inbound = got.split_off(10);
                let expected = all(10 * round + 1..10 * round + 11, JobStatus::Done);
                assert_eq!((got, inbound), (expected.clone(), expected));
                rig.later(SECOND / 2);
            }
            let t = Arc::clone(&rig.trust);
            // Two a second, at the beginning too.
            assert_eq!(t.canaries.value(), 2 * 5, "{bare} {mode:?}");
            assert_eq!(
                (t.canaries_failed.value(), t.samples_failed.value()),
                (0, 0)
            );
            assert_eq!((t.samples.value(), t.fallback.value()), (160, 0));
            assert_eq!(rig.state(), (EngineState::Serving, Reason::None));
            rig.end();
        }
    }
}

#[test]
fn what_the_engine_has_no_room_for_stays_as_it_was() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.script().room = Some(3);
    rig.send(out, 10);
    assert_eq!((rig.jobs.len(), rig.trusted().in_flight()), (7, 3));
    let mut got = Vec::new();
    while !rig.jobs.is_empty() {
        assert_eq!(rig.jobs[0].tag >> 8, got.len() as u64 + 4);
        got.append(&mut rig.take());
        rig.submit();
    }
    got.append(&mut rig.take());
    assert_eq!(got, all(1..=10, JobStatus::Done));
    rig.end();
}

#[test]
fn an_engine_is_not_offered_over_and_over_what_it_leaves() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.sa(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.script().room = Some(3);
    rig.script().offered = 0;
    rig.send(out, 60);
    let mut got = Vec::new();
    while !rig.jobs.is_empty() {
        got.append(&mut rig.take());
        rig.submit();
    }
    got.append(&mut rig.take());
    assert_eq!(got, all(1..=60, JobStatus::Done));
    // All at first, before anything is known; then what it took and as many more.
    let offered = rig.script().offered;
    assert!(offered <= 60 + 2 * 60 + 20, "{offered}");
    // It takes more again, and is asked soon.
    rig.script().room = None;
    rig.send(out, 60);
    let (mut got, mut rounds) = (Vec::new(), 0);
    while !rig.jobs.is_empty() {
        got.append(&mut rig.take());
        rig.submit();
        rounds += 1;
    }
    got.append(&mut rig.take());
    assert_eq!(got, all(61..=120, JobStatus::Done));
    assert!(rounds < 8, "{rounds}");
    rig.end();
}

#[test]
fn an_engine_without_the_known_answers_never_begins() {
    for fault in [
        Fault::Body,
        Fault::Icv,
        Fault::Untouched,
        Fault::Mismatch,
        Fault::Gullible,
        Fault::Failed,
    ] {
        for bare in [false, true] {
            let script = Script {
                private: Some(fault),
                ..Script::default()
            };
            let mut rig = Rig::new(bare, config(), script);
            rig.healed();
            let (state, reason) = rig.state();
            assert_ne!(state, EngineState::Serving, "{fault:?}");
            assert_eq!(reason, Reason::KnownAnswer, "{fault:?}");
            assert_eq!(rig.trust.resets_failed.value(), 1);
            let packet = rig.add(cbc(), Direction::Out, OffloadMode::Packet);
            assert!(rig.install(packet).is_err());
            rig.end();
        }
    }
}

#[test]
fn an_engine_that_opens_whatever_comes_never_begins() {
    for crypto_only in [false, true] {
        let script = Script {
            private: Some(Fault::Gullible),
            crypto_only,
            ..Script::default()
        };
        let mut rig = Rig::new(!crypto_only, config(), script);
        rig.healed();
        assert_eq!(rig.state(), (EngineState::Quarantined, Reason::KnownAnswer));
        rig.end();
    }
}

#[test]
fn an_sa_that_was_never_given_is_nobodys() {
    let mut rig = Rig::new(false, config(), Script::default());
    let out = rig.add(gcm(), Direction::Out, OffloadMode::Crypto);
    rig.send(out, 2);
    assert_eq!(rig.take(), all(1..=2, JobStatus::SaGone));
    rig.install(out).unwrap();
    rig.send(out, 2);
    assert_eq!(rig.take(), all(3..=4, JobStatus::Done));
    rig.remove(out);
    assert_eq!(
        rig.script()
            .installed
            .iter()
            .filter(|i| i.index < SAS)
            .count(),
        0
    );
    rig.end();
}
