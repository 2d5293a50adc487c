//! Known answers: every suite in every mode, before the engine carries anything, and after each reset.
//!
//! The answers are those of the RustCrypto reference, which itself is held against OpenSSL at every start
//! ([`crate::crypto::known`]). Sealed, opened, forged, and in packet mode replayed: an engine that opens whatever comes has
//! the right answers too.

use std::time::{Duration, Instant};

use pmd::engine::{Capabilities, EspEngine, EspJob, JobKind, JobStatus};
use pmd::{Frame, Pool};
use sa_store::cipher::SaCipher;
use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;
use sa_store::suite::Suite;
use zeroize::Zeroizing;

use super::packets::{Known, Outcome, entry, job, reference};

/// Inner lengths: a packet in one block or two, an odd one, one that fills an Ethernet frame.
const LENGTHS: [u16; 3] = [20, 333, 1400];

/// What went wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KnownAnswerError {
    /// It says that it can, and then not.
    #[error("{suite} in {mode:?} mode: {reason}")]
    Refused {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
        /// The driver's words.
        reason: String,
    },
    /// An answer is not the right one.
    #[error("{suite} in {mode:?} mode: wrong answer, {what} of {len} bytes ({status:?})")]
    Wrong {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
        /// What was asked.
        what: &'static str,
        /// Inner bytes.
        len: u16,
        /// What the engine said.
        status: JobStatus,
    },
    /// No answer in time.
    #[error("{suite} in {mode:?} mode: no answer in {patience:?}")]
    Silent {
        /// Suite.
        suite: Suite,
        /// Mode.
        mode: OffloadMode,
        /// How long was waited.
        patience: Duration,
    },
    /// No packet buffers are free.
    #[error("no packet buffers are free")]
    NoFrames,
    /// The reference cannot answer: a fault of ours.
    #[error("no reference for {0}")]
    NoReference(Suite),
}

/// Asks the engine all of them. Its SAs get indexes from `first` on. It blocks.
///
/// # Errors
/// The first answer that is not right.
pub(super) fn run(
    engine: &mut dyn EspEngine,
    pool: &mut Pool,
    first: u32,
    generation: u32,
    patience: Duration,
) -> Result<(), KnownAnswerError> {
    let caps = engine.capabilities().clone();
    let modes = [
        (OffloadMode::Crypto, caps.crypto.clone()),
        (OffloadMode::Packet, caps.packet.clone()),
    ];
    let view = Store::new(1, 1).current();
    for (mode, suites) in modes {
        for suite in suites {
            let keys = keys(suite);
            let mut bench = Bench {
                caps: &caps,
                view: &view,
                suite,
                mode,
                patience,
                pool,
            };
            let cipher =
                reference(suite, &keys).map_err(|_| KnownAnswerError::NoReference(suite))?;
            for (n, direction) in (0..).zip([Direction::Out, Direction::In]) {
                let id = SaId {
                    index: first + n,
                    generation,
                };
                let sa = entry(id, suite, &keys, direction, mode)
                    .map_err(|_| KnownAnswerError::NoReference(suite))?;
                engine
                    .install(&sa)
                    .map_err(|refusal| KnownAnswerError::Refused {
                        suite,
                        mode,
                        reason: refusal.to_string(),
                    })?;
                let asked = match direction {
                    Direction::Out => bench.seals(engine, &sa, &*cipher),
                    Direction::In => bench.opens(engine, &sa, &*cipher),
                };
                engine.remove(id);
                asked?;
            }
        }
    }
    Ok(())
}

/// Of no value to anybody: nothing is ever sent with them.
fn keys(suite: Suite) -> SaKeys {
    let pattern = |n: usize, from: u8| -> Zeroizing<Vec<u8>> {
        let bytes = (0..n).map(|i| from.wrapping_add(i.to_le_bytes()[0].wrapping_mul(37)));
        Zeroizing::new(bytes.collect())
    };
    SaKeys {
        enc: pattern(suite.enc_key_len(), 0x11),
        auth: pattern(suite.auth_key_len(), 0x77),
    }
}

struct Bench<'a> {
    caps: &'a Capabilities,
    view: &'a Snapshot,
    suite: Suite,
    mode: OffloadMode,
    patience: Duration,
    pool: &'a mut Pool,
}

impl Bench<'_> {
    fn seals(
        &mut self,
        engine: &mut dyn EspEngine,
        sa: &SaEntry,
        cipher: &dyn SaCipher,
    ) -> Result<(), KnownAnswerError> {
        for (seq, len) in (1..).zip(LENGTHS) {
            let known = self.known(cipher, seq, len)?;
            let bytes = match self.mode {
                OffloadMode::Packet => &known.inner,
                _ => &known.framed,
            };
            let back = self.ask(engine, sa, JobKind::Seal, seq, bytes)?;
            let right = self.is_right(&back, &known, cipher, JobKind::Seal, seq);
            self.judge(back, right, "sealing", len)?;
        }
        Ok(())
    }

    fn opens(
        &mut self,
        engine: &mut dyn EspEngine,
        sa: &SaEntry,
        cipher: &dyn SaCipher,
    ) -> Result<(), KnownAnswerError> {
        for (n, len) in (0..).zip(LENGTHS) {
            let seq = 1 + 2 * n;
            let known = self.known(cipher, seq, len)?;
            let back = self.ask(engine, sa, JobKind::Open, seq, &known.sealed)?;
            let right = self.is_right(&back, &known, cipher, JobKind::Open, seq);
            self.judge(back, right, "opening", len)?;
            if self.mode == OffloadMode::Packet {
                let back = self.ask(engine, sa, JobKind::Open, seq, &known.sealed)?;
                let right = back.status != JobStatus::Done;
                self.judge(back, right, "refusing a replay", len)?;
            }
            let mut forged = self.known(cipher, seq + 1, len)?.sealed;
            if let Some(last) = forged.last_mut() {
                *last ^= 1;
            }
            let back = self.ask(engine, sa, JobKind::Open, seq + 1, &forged)?;
            let right = back.status != JobStatus::Done;
            self.judge(back, right, "refusing a forgery", len)?;
        }
        Ok(())
    }

    fn known(&self, cipher: &dyn SaCipher, seq: u32, len: u16) -> Result<Known, KnownAnswerError> {
        let known = Known::new(self.suite, cipher, seq, len);
        known.ok_or(KnownAnswerError::NoReference(self.suite))
    }

    fn is_right(
        &self,
        back: &EspJob,
        known: &Known,
        cipher: &dyn SaCipher,
        kind: JobKind,
        seq: u32,
    ) -> bool {
        let (suite, mode) = (self.suite, self.mode);
        Outcome::of(back, suite, self.caps.outer_headers)
            .is_right(known, suite, cipher, kind, mode, seq)
    }

    fn judge(
        &mut self,
        back: EspJob,
        right: bool,
        what: &'static str,
        len: u16,
    ) -> Result<(), KnownAnswerError> {
        let status = back.status;
        self.pool.put(back.frame);
        if right {
            return Ok(());
        }
        Err(KnownAnswerError::Wrong {
            suite: self.suite,
            mode: self.mode,
            what,
            len,
            status,
        })
    }

    /// One job there and back.
    fn ask(
        &mut self,
        engine: &mut dyn EspEngine,
        sa: &SaEntry,
        kind: JobKind,
        seq: u32,
        bytes: &[u8],
    ) -> Result<EspJob, KnownAnswerError> {
        let frame: Frame = self.pool.get_spare().ok_or(KnownAnswerError::NoFrames)?;
        let mut jobs = match job(frame, sa, kind, seq.into(), bytes, self.caps.outer_headers) {
            Ok(mut job) => {
                job.tag = u64::MAX;
                vec![job]
            }
            Err(frame) => {
                self.pool.put(frame);
                return Err(KnownAnswerError::NoFrames);
            }
        };
        let mut done = Vec::new();
        let begin = Instant::now();
        loop {
            engine.submit(self.view, &mut jobs, &mut done);
            engine.poll(&mut done);
            if let Some(back) = done.pop() {
                // Others' jobs are not in flight now.
                done.into_iter().for_each(|j| self.pool.put(j.frame));
                return Ok(back);
            }
            if begin.elapsed() > self.patience {
                jobs.into_iter().for_each(|j| self.pool.put(j.frame));
                return Err(KnownAnswerError::Silent {
                    suite: self.suite,
                    mode: self.mode,
                    patience: self.patience,
                });
            }
            std::thread::yield_now();
        }
    }
}
