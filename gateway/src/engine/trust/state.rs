//! What is told of an engine: its state, why it was taken out of service, and counts. Written by the engine's owner, read by
//! anybody.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use control::plane::EngineReport;
use pmd::engine::EngineStats;
use sa_store::counters::Counter;

/// Whether an engine carries packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// It does.
    Serving,
    /// It is out of service, and rests before the next attempt.
    Quarantined,
    /// It is being reset, or checked after a reset.
    Recovering,
    /// It failed too often: it stays out of service until the gateway is started again.
    Dead,
}

impl EngineState {
    /// Name in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Quarantined => "quarantined",
            Self::Recovering => "recovering",
            Self::Dead => "dead",
        }
    }

    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Serving,
        Self::Quarantined,
        Self::Recovering,
        Self::Dead,
    ];
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $id:ident $name:literal,)*) => {
        /// Why an engine was taken out of service.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason { $($(#[$doc])* $id,)* }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$id,)*];

            /// Name in logs and reports.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$id => $name,)* }
            }
        }
    };
}

reasons! {
    /// It never was.
    None "none",
    /// A known answer came out wrong, or not at all.
    KnownAnswer "known_answer",
    /// A canary came back wrong, or several were lost in a row.
    Canary "canary",
    /// Software made something else of the same packet.
    Sample "sample",
    /// An outbound IV that is not the one given, or was used before.
    Iv "iv",
    /// An outbound number that was used before, or that nobody gave.
    Number "number",
    /// SPI or number is not what was given, or the outer headers are not the SA's.
    Header "header",
    /// Lengths or offsets that cannot be.
    Length "length",
    /// Plaintext where ciphertext belongs.
    Plaintext "plaintext",
    /// Packets of an SA in another order than they were given.
    Order "order",
    /// A result of a job that was never given, or of another job.
    Stranger "stranger",
    /// Too many jobs failed.
    Loss "loss",
    /// A job did not come back in time.
    Deadline "deadline",
    /// The driver does not trust the engine any more.
    Driver "driver",
    /// Somebody asked for it.
    Asked "asked",
}

/// An engine's state and counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct TrustStats {
    state: AtomicU8,
    reason: AtomicU8,
    /// Packets of the gateway's own sent through the engine.
    pub canaries: Counter,
    /// Those that came back wrong or not at all.
    pub canaries_failed: Counter,
    /// Packets that software ciphered again.
    pub samples: Counter,
    /// Those of which it made something else.
    pub samples_failed: Counter,
    /// Jobs that failed or did not come back in time.
    pub lost: Counter,
    /// Results that cannot be right.
    pub wrong: Counter,
    /// Times that the engine was taken out of service.
    pub quarantines: Counter,
    /// Attempts to bring it back.
    pub resets: Counter,
    /// Those that did not.
    pub resets_failed: Counter,
    /// Packets that the CPU ciphered because the engine was out of service.
    pub fallback: Counter,
    /// Packets that could not be carried because of that.
    pub refused: Counter,
}

impl TrustStats {
    /// The state now.
    pub fn state(&self) -> EngineState {
        let n = usize::from(self.state.load(Relaxed));
        EngineState::ALL
            .get(n)
            .copied()
            .unwrap_or(EngineState::Dead)
    }

    /// Why it was taken out of service the last time.
    pub fn reason(&self) -> Reason {
        let n = usize::from(self.reason.load(Relaxed));
        Reason::ALL.get(n).copied().unwrap_or(Reason::None)
    }

    pub(super) fn set_state(&self, state: EngineState) {
        let place = EngineState::ALL.iter().position(|s| *s == state);
        self.state.store(
            place.and_then(|n| u8::try_from(n).ok()).unwrap_or(0),
            Relaxed,
        );
    }

    pub(super) fn set_reason(&self, reason: Reason) {
        let place = Reason::ALL.iter().position(|r| *r == reason);
        self.reason.store(
            place.and_then(|n| u8::try_from(n).ok()).unwrap_or(0),
            Relaxed,
        );
    }
}

/// What the driver counts. An engine that was opened anew has a new one, and counts go on.
#[derive(Clone, Debug, Default)]
pub struct Drivers(Arc<Mutex<Vec<Arc<EngineStats>>>>);

impl Drivers {
    /// Counts these too, unless it does.
    pub(super) fn add(&self, stats: Option<&Arc<EngineStats>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = stats
            && !all.iter().any(|s| Arc::ptr_eq(s, stats))
        {
            all.push(Arc::clone(stats));
        }
    }

    fn sum(&self, of: fn(&EngineStats) -> &Counter) -> u64 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|s| of(s).value()).sum()
    }
}

/// An engine, for reports; see [`Trusted::watch`](super::Trusted::watch).
#[derive(Clone, Debug)]
pub struct EngineWatch {
    /// Operator's name.
    pub name: String,
    /// Driver.
    pub kind: &'static str,
    /// What this module counts.
    pub trust: Arc<TrustStats>,
    /// What the driver counts.
    pub drivers: Drivers,
}

impl EngineWatch {
    /// As control tells it. `worker` owns the engine.
    pub fn report(&self, worker: usize) -> EngineReport {
        let t = &self.trust;
        let of = |f: fn(&EngineStats) -> &Counter| self.drivers.sum(f);
        EngineReport {
            name: self.name.clone(),
            kind: self.kind.into(),
            worker,
            state: t.state().name().into(),
            reason: t.reason().name().into(),
            submitted: of(|d| &d.submitted),
            completed: of(|d| &d.completed),
            bytes: of(|d| &d.bytes),
            doorbells: of(|d| &d.doorbells),
            busy: of(|d| &d.busy),
            canaries: t.canaries.value(),
            canaries_failed: t.canaries_failed.value(),
            samples: t.samples.value(),
            samples_failed: t.samples_failed.value(),
            lost: t.lost.value(),
            wrong: t.wrong.value(),
            quarantines: t.quarantines.value(),
            resets: t.resets.value(),
            resets_failed: t.resets_failed.value(),
            fallback: t.fallback.value(),
            refused: t.refused.value(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_and_state_is_described_for_operators() {
        let text = include_str!("../../../../deploy/engines.md");
        let (states, reasons) = text.split_once("## Reasons").unwrap();
        for state in EngineState::ALL {
            assert!(
                states.contains(&format!("\n| {} |", state.name())),
                "{state:?}"
            );
        }
        let described: Vec<_> = reasons
            .lines()
            .filter_map(|l| l.strip_prefix("| `")?.split('`').next())
            .collect();
        let known: Vec<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(described, known);
    }

    #[test]
    fn state_and_reason_read_as_they_were_written() {
        let stats = TrustStats::default();
        assert_eq!(
            (stats.state(), stats.reason()),
            (EngineState::Serving, Reason::None)
        );
        for state in EngineState::ALL {
            stats.set_state(state);
            assert_eq!(stats.state(), state);
        }
        for reason in Reason::ALL {
            stats.set_reason(*reason);
            assert_eq!(stats.reason(), *reason);
        }
    }
}
