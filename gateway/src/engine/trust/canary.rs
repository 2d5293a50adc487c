//! Packets of known content through a running engine, under SAs and keys of their own.
//!
//! Each turn one suite and mode that is in use gets two: one to seal, and one to open, of which every second is forged. They
//! go in between the traffic, and never further than here.

use std::sync::Arc;

use pmd::Pool;
use pmd::engine::{Capabilities, EspEngine, EspJob, JobKind, JobStatus};
use sa_store::cipher::SaCipher;
use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys};
use sa_store::suite::Suite;
use zeroize::Zeroizing;

use super::packets::{Known, Outcome, entry, job, reference};

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Seal,
    Open,
    Forged,
}

/// A canary in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flown {
    perch: u16,
    what: What,
}

/// What a canary says of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Song {
    /// All is well.
    Right,
    /// It has not come back, or without an answer.
    Lost,
    /// The answer is wrong.
    Wrong,
}

/// A suite in a mode, with SAs to try it.
struct Perch {
    suite: Suite,
    mode: OffloadMode,
    pair: Option<Pair>,
    /// The engine did not take the SAs: not before the next reset.
    barred: bool,
}

struct Pair {
    out: Arc<SaEntry>,
    inb: Arc<SaEntry>,
    cipher: Box<dyn SaCipher>,
    seq: u32,
    known: Option<Known>,
    in_flight: u8,
}

/// All canaries of an engine.
pub(super) struct Canaries {
    perches: Vec<Perch>,
    /// First SA index that is ours.
    first: u32,
    /// Most pairs at once: the engine's slots are the traffic's.
    pairs: usize,
    generation: u32,
    next: usize,
    due: u64,
    interval: u64,
    lost_in_a_row: u32,
}

/// Pairs of canaries for an engine with these capabilities.
pub(super) fn pairs(caps: &Capabilities) -> usize {
    let kinds = caps.crypto.len() + caps.packet.len();
    if caps.slots <= FEW_SLOTS {
        kinds.min(2)
    } else {
        kinds
    }
}

/// An engine with so few slots has them for traffic.
const FEW_SLOTS: usize = 64;
/// Inner lengths run through these.
const SHORTEST: u16 = 40;
const LONGEST: u16 = 1280;

impl Canaries {
    /// SAs get indexes from `first` on; there are at most so many `pairs` of them.
    pub(super) fn new(first: u32, pairs: usize, interval: u64, now: u64) -> Canaries {
        Canaries {
            perches: Vec::new(),
            first,
            pairs,
            generation: 0,
            next: 0,
            due: now,
            interval,
            lost_in_a_row: 0,
        }
    }

    /// Whether one is to be sent.
    #[inline]
    pub(super) fn is_due(&self, now: u64) -> bool {
        now >= self.due && self.interval != 0
    }

    /// By how much.
    pub(super) fn late(&self, now: u64) -> u64 {
        now.saturating_sub(self.due)
    }

    /// Whether several were lost one after the other.
    pub(super) fn are_lost(&self) -> bool {
        self.lost_in_a_row >= 3
    }

    /// Makes the canaries of the next suite and mode of those in use, and installs their SAs when they have none.
    pub(super) fn fly(
        &mut self,
        now: u64,
        kinds: impl Iterator<Item = (Suite, OffloadMode)>,
        engine: &mut dyn EspEngine,
        caps: &Capabilities,
        pool: &mut Pool,
    ) -> Vec<(EspJob, Flown)> {
        self.due = now + self.interval;
        let mut used: Vec<(Suite, OffloadMode)> = kinds.collect();
        used.sort_unstable_by_key(|(s, m)| (*s, *m == OffloadMode::Packet));
        used.dedup();
        let n = used.len();
        for _ in 0..n {
            self.next = (self.next + 1) % n;
            let Some((suite, mode)) = used.get(self.next).copied() else {
                break;
            };
            let Some(perch) = self.perch(suite, mode) else {
                continue;
            };
            let jobs = self.jobs(perch, engine, caps, pool);
            if !jobs.is_empty() {
                return jobs;
            }
        }
        Vec::new()
    }

    /// Judges one that came back, and takes its frame.
    pub(super) fn land(
        &mut self,
        flown: Flown,
        job: EspJob,
        caps: &Capabilities,
        pool: &mut Pool,
    ) -> Song {
        let song = self.song(flown, &job, caps);
        pool.put(job.frame);
        match song {
            Song::Lost => self.lost_in_a_row += 1,
            // An engine that fails whatever it gets refuses forgeries too.
            Song::Right if flown.what == What::Forged => {}
            Song::Right | Song::Wrong => self.lost_in_a_row = 0,
        }
        song
    }

    /// It was not accepted.
    pub(super) fn stay(&mut self, flown: Flown, now: u64) {
        if let Some(pair) = self.pair(flown) {
            pair.in_flight = pair.in_flight.saturating_sub(1);
        }
        self.due = now + self.interval / 8;
    }

    /// Ends all pairs: the SAs to be removed from the engine.
    pub(super) fn disband(&mut self) -> Vec<SaId> {
        self.lost_in_a_row = 0;
        let mut ids = Vec::new();
        for perch in &mut self.perches {
            perch.barred = false;
            if let Some(pair) = perch.pair.take() {
                ids.extend([pair.out.fixed.id, pair.inb.fixed.id]);
            }
        }
        ids
    }

    /// The next is sent at once.
    pub(super) fn hurry(&mut self, now: u64) {
        self.due = now;
    }

    fn perch(&mut self, suite: Suite, mode: OffloadMode) -> Option<u16> {
        let known = self
            .perches
            .iter()
            .position(|p| (p.suite, p.mode) == (suite, mode));
        let place = known.unwrap_or_else(|| {
            self.perches.push(Perch {
                suite,
                mode,
                pair: None,
                barred: false,
            });
            self.perches.len() - 1
        });
        u16::try_from(place).ok()
    }

    fn pair(&mut self, flown: Flown) -> Option<&mut Pair> {
        self.perches
            .get_mut(usize::from(flown.perch))?
            .pair
            .as_mut()
    }

    fn jobs(
        &mut self,
        place: u16,
        engine: &mut dyn EspEngine,
        caps: &Capabilities,
        pool: &mut Pool,
    ) -> Vec<(EspJob, Flown)> {
        let first = self.first + 2 * u32::from(place);
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let full = self.perches.iter().filter(|p| p.pair.is_some()).count() >= self.pairs;
        let Some(perch) = self.perches.get_mut(usize::from(place)) else {
            return Vec::new();
        };
        if perch.pair.is_none() && !perch.barred && !full {
            perch.pair = settle(perch, first, generation, engine);
            perch.barred = perch.pair.is_none();
        }
        // Those of the last time are still away.
        let Some(pair) = perch.pair.as_mut().filter(|p| p.in_flight == 0) else {
            return Vec::new();
        };
        let (Some(one), Some(two)) = (pool.get_spare(), pool.get_spare()) else {
            return Vec::new();
        };
        pair.seq += 1;
        let spread = u32::from(LONGEST - SHORTEST);
        let len = SHORTEST + u16::try_from(pair.seq.wrapping_mul(97) % spread).unwrap_or(0);
        let Some(known) = Known::new(perch.suite, &*pair.cipher, pair.seq, len) else {
            pool.put(one);
            pool.put(two);
            return Vec::new();
        };
        let forged = pair.seq.is_multiple_of(2);
        let mut received = known.sealed.clone();
        if let Some(last) = received.last_mut().filter(|_| forged) {
            *last ^= 1;
        }
        let sent = match perch.mode {
            OffloadMode::Packet => &known.inner,
            _ => &known.framed,
        };
        let (seq, bare) = (u64::from(pair.seq), caps.outer_headers);
        let seal = job(one, &pair.out, JobKind::Seal, seq, sent, bare);
        let open = job(two, &pair.inb, JobKind::Open, seq, &received, bare);
        let opening = if forged { What::Forged } else { What::Open };
        let mut jobs = Vec::with_capacity(2);
        for (made, what) in [(seal, What::Seal), (open, opening)] {
            match made {
                Ok(job) => {
                    pair.in_flight += 1;
                    jobs.push((job, Flown { perch: place, what }));
                }
                Err(frame) => pool.put(frame),
            }
        }
        pair.known = Some(known);
        jobs
    }

    fn song(&mut self, flown: Flown, job: &EspJob, caps: &Capabilities) -> Song {
        let Some(perch) = self.perches.get_mut(usize::from(flown.perch)) else {
            return Song::Lost;
        };
        let (suite, mode) = (perch.suite, perch.mode);
        let Some(pair) = perch.pair.as_mut() else {
            // Of a pair that was disbanded.
            return Song::Lost;
        };
        pair.in_flight = pair.in_flight.saturating_sub(1);
        let kind = match flown.what {
            What::Seal => JobKind::Seal,
            What::Open => JobKind::Open,
            What::Forged => {
                return match job.status {
                    JobStatus::Done => Song::Wrong,
                    _ => Song::Right,
                };
            }
        };
        if matches!(job.status, JobStatus::Failed | JobStatus::Pending) {
            return Song::Lost;
        }
        let outcome = Outcome::of(job, suite, caps.outer_headers);
        let right = pair.known.as_ref().is_some_and(|known| {
            outcome.is_right(known, suite, &*pair.cipher, kind, mode, pair.seq)
        });
        if right { Song::Right } else { Song::Wrong }
    }
}

/// Installs a pair of SAs with keys that nobody has.
fn settle(perch: &Perch, first: u32, generation: u32, engine: &mut dyn EspEngine) -> Option<Pair> {
    let Perch { suite, mode, .. } = *perch;
    let keys = random_keys(suite)?;
    let cipher = reference(suite, &keys).ok()?;
    let id = |n| SaId {
        index: first + n,
        generation,
    };
    let out = entry(id(0), suite, &keys, Direction::Out, mode).ok()?;
    let inb = entry(id(1), suite, &keys, Direction::In, mode).ok()?;
    for sa in [&out, &inb] {
        if let Err(refusal) = engine.install(sa) {
            tracing::warn!(%suite, ?mode, %refusal, "no canaries");
            engine.remove(out.fixed.id);
            return None;
        }
    }
    Some(Pair {
        out,
        inb,
        cipher,
        seq: 0,
        known: None,
        in_flight: 0,
    })
}

fn random_keys(suite: Suite) -> Option<SaKeys> {
    let random = |n| {
        let mut key = Zeroizing::new(vec![0; n]);
        getrandom::fill(&mut key).ok().map(|()| key)
    };
    Some(SaKeys {
        enc: random(suite.enc_key_len())?,
        auth: random(suite.auth_key_len())?,
    })
}
