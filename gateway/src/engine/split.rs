//! Runs of jobs for engines that take fewer at a time than a burst has.

use std::sync::Arc;
use std::time::Duration;

use pmd::BURST;
use pmd::engine::{Capabilities, EngineDead, EngineStats, EspEngine, EspJob, Refusal};
use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

/// An engine without a native batch, given its jobs in runs of the length that it can do ([`Capabilities::run`]). What comes
/// out is what the whole burst would have given.
pub struct Split {
    engine: Box<dyn EspEngine>,
    /// Jobs of one run.
    few: Vec<EspJob>,
    /// Jobs that were not taken.
    left: Vec<EspJob>,
}

impl Split {
    /// The engine, split where it needs it.
    pub fn around(engine: Box<dyn EspEngine>) -> Box<dyn EspEngine> {
        if engine.capabilities().run >= BURST {
            return engine;
        }
        Box::new(Self {
            engine,
            few: Vec::with_capacity(BURST),
            left: Vec::with_capacity(BURST),
        })
    }
}

impl EspEngine for Split {
    fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    fn install(&mut self, sa: &SaEntry) -> Result<(), Refusal> {
        self.engine.install(sa)
    }

    fn remove(&mut self, sa: SaId) {
        self.engine.remove(sa);
    }

    fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, done: &mut Vec<EspJob>) {
        let run = self.engine.capabilities().run.max(1);
        let mut burst = std::mem::take(jobs);
        let mut rest = burst.drain(..);
        loop {
            self.few.extend(rest.by_ref().take(run));
            if self.few.is_empty() {
                break;
            }
            self.engine.submit(view, &mut self.few, done);
            if !self.few.is_empty() {
                // Full: order is kept by leaving all that follow.
                self.left.append(&mut self.few);
                self.left.extend(rest.by_ref());
                break;
            }
        }
        drop(rest);
        // The caller's vector keeps its memory.
        *jobs = burst;
        jobs.append(&mut self.left);
    }

    fn poll(&mut self, done: &mut Vec<EspJob>) {
        self.engine.poll(done);
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn is_healthy(&self) -> bool {
        self.engine.is_healthy()
    }

    fn is_present(&self) -> bool {
        self.engine.is_present()
    }

    fn drain(&mut self, patience: Duration, done: &mut Vec<EspJob>) -> bool {
        self.engine.drain(patience, done)
    }

    fn reset(&mut self, done: &mut Vec<EspJob>) -> Result<(), EngineDead> {
        self.engine.reset(done)
    }

    fn reached(&self, sa: SaId) -> Option<u64> {
        self.engine.reached(sa)
    }

    fn stats(&self) -> Option<&Arc<EngineStats>> {
        self.engine.stats()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    use pmd::engine::{JobKind, JobStatus};
    use pmd::{Arena, ArenaConfig, HugePolicy, Pool};
    use proptest::prelude::*;
    use sa_store::runtime::Start;
    use sa_store::sa::{Mode, OffloadMode};
    use sa_store::store::Store;

    use crate::crypto::Fixed;
    use crate::crypto::differential::clear_packet;
    use crate::crypto::rustcrypto::RustCrypto;
    use crate::engine::SoftwareEngine;
    use crate::esp::fuzz::spec;
    use crate::wire::Family;

    /// Takes `run` jobs at a time and has room for `room`.
    struct Narrow {
        caps: Capabilities,
        cpu: SoftwareEngine,
        inside: VecDeque<EspJob>,
        room: usize,
        longest: Arc<std::sync::atomic::AtomicUsize>,
    }

    impl EspEngine for Narrow {
        fn capabilities(&self) -> &Capabilities {
            &self.caps
        }

        fn install(&mut self, _: &SaEntry) -> Result<(), Refusal> {
            Ok(())
        }

        fn remove(&mut self, _: SaId) {}

        fn submit(&mut self, view: &Snapshot, jobs: &mut Vec<EspJob>, _: &mut Vec<EspJob>) {
            use std::sync::atomic::Ordering::Relaxed;
            self.longest.fetch_max(jobs.len(), Relaxed);
            let n = jobs.len().min(self.room - self.inside.len());
            let mut now: Vec<EspJob> = jobs.drain(..n).collect();
            let mut done = Vec::new();
            self.cpu.submit(view, &mut now, &mut done);
            self.inside.extend(done);
        }

        fn poll(&mut self, done: &mut Vec<EspJob>) {
            // Some at a time.
            done.extend(self.inside.drain(..self.inside.len().div_ceil(2)));
        }

        fn in_flight(&self) -> usize {
            self.inside.len()
        }
    }

    fn through(
        engine: &mut dyn EspEngine,
        view: &Snapshot,
        pool: &mut Pool,
        bodies: &[usize],
    ) -> Vec<(u64, JobStatus, Vec<u8>)> {
        let entry = view.sa_at(0).unwrap();
        let mut jobs: Vec<EspJob> = (1..)
            .zip(bodies)
            .map(|(seq, body)| {
                let packet = clear_packet(entry.spec.suite, *body, seq);
                let mut frame = pool.get().unwrap();
                assert!(frame.set_data(&packet));
                EspJob {
                    esp_end: u16::try_from(packet.len()).unwrap(),
                    frame,
                    sa: entry.fixed.id,
                    seq: seq.into(),
                    tag: seq.into(),
                    note: 0,
                    esp_off: 0,
                    next_header: 4,
                    kind: JobKind::Seal,
                    mode: OffloadMode::Crypto,
                    status: JobStatus::Pending,
                }
            })
            .collect();
        let mut done = Vec::new();
        for _ in 0..10_000 {
            engine.submit(view, &mut jobs, &mut done);
            engine.poll(&mut done);
            if jobs.is_empty() && engine.in_flight() == 0 {
                break;
            }
        }
        assert!(jobs.is_empty());
        done.into_iter()
            .map(|job| {
                let outcome = (job.tag, job.status, job.frame.data().to_vec());
                pool.put(job.frame);
                outcome
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Bytes, results and order are those of the whole burst, also when the engine fills up in its midst.
        #[test]
        fn runs_give_what_the_whole_burst_gives(
            bodies in prop::collection::vec(2_usize..1400, 1..100),
            run in 1_usize..8,
            room in 1_usize..40,
        ) {
            let arena = Arena::new(ArenaConfig {
                frames: 512,
                stride: 2048,
                huge: HugePolicy::Never,
                name: "split".into(),
                ..ArenaConfig::default()
            })
            .unwrap();
            let mut pool = Pool::new(&arena, 16);
            let mut store = Store::new(1, 4);
            let mut draft = store.draft();
            let sa = spec("aes-128-cbc+hmac-sha1-96".parse().unwrap(), Mode::Tunnel, Family::V4, false);
            store.add_sa(&mut draft, Arc::new(sa), &Fixed(RustCrypto), Start::default(), 0).unwrap();
            store.publish(draft);
            let view = store.current();
            let longest = Arc::default();
            let narrow = Narrow {
                caps: Capabilities { name: "narrow", run, ..Capabilities::default() },
                cpu: SoftwareEngine::default(),
                inside: VecDeque::new(),
                room,
                longest: Arc::clone(&longest),
            };
            let whole = through(&mut SoftwareEngine::default(), &view, &mut pool, &bodies);
            let split = through(&mut *Split::around(Box::new(narrow)), &view, &mut pool, &bodies);
            prop_assert!(whole == split);
            prop_assert!(longest.load(std::sync::atomic::Ordering::Relaxed) <= run);
        }
    }
}
