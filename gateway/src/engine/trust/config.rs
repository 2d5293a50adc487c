//! How much trust an engine gets, and by which clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How much trust an engine gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustConfig {
    /// Operator's name of the engine.
    pub name: String,
    /// SA indexes from here on are this module's own, 256 of them: the store's limit of SAs.
    pub first_private: u32,
    /// Time between canaries; zero for none.
    pub canaries: Duration,
    /// Outbound packets of which software ciphers one again: 1 for all, 0 for none.
    pub sample_out: u32,
    /// Likewise inbound.
    pub sample_in: u32,
    /// Samples that may be in the engine at once.
    pub sample_places: u16,
    /// A job that has not come back by then counts as lost. More than the driver's own deadline.
    pub deadline: Duration,
    /// Jobs in 10 000 that may be lost in a second of 100 jobs or more.
    pub most_lost: u64,
    /// Pause before the second attempt to bring the engine back; it doubles with each.
    pub pause: Duration,
    /// The longest.
    pub longest_pause: Duration,
    /// An engine that serves for so long begins with a clean record.
    pub probation: Duration,
    /// Failures after which it stays out of service.
    pub most_failures: u32,
    /// How long a known answer may take.
    pub patience: Duration,
}

impl TrustConfig {
    /// The usual amount.
    pub fn new(name: &str, first_private: u32) -> TrustConfig {
        TrustConfig {
            name: name.into(),
            first_private,
            canaries: Duration::from_secs(1),
            sample_out: 1024,
            sample_in: 1024,
            sample_places: 64,
            deadline: Duration::from_secs(2),
            most_lost: 100,
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(60),
            probation: Duration::from_secs(60),
            most_failures: 10,
            patience: Duration::from_secs(3),
        }
    }
}

/// Where the time comes from, nanoseconds.
#[derive(Clone, Debug)]
pub enum TrustClock {
    /// The system's.
    Real(Instant),
    /// A value that somebody moves.
    Manual(Arc<AtomicU64>),
}

impl TrustClock {
    /// The system's.
    pub fn real() -> TrustClock {
        TrustClock::Real(Instant::now())
    }

    pub(super) fn now(&self) -> u64 {
        match self {
            Self::Real(begin) => nanos(begin.elapsed()),
            Self::Manual(value) => value.load(Ordering::Relaxed),
        }
    }
}

/// Nanoseconds of a duration.
pub(super) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}
