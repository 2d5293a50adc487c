//! Rekeys without loss: what happens between a soft limit and the end of the old SA, and in which order.
//!
//! [`machine`] decides, without clock or I/O; [`drive`] gives it the facts and carries its steps out; [`hook`] runs
//! the program that fetches successors. SAs of the IKE mirror are none of its business: the daemon decides for those.

pub(crate) mod drive;
pub mod hook;
pub mod machine;
#[cfg(test)]
mod model;
pub mod terms;
mod tunnel;

use std::path::PathBuf;
use std::time::Duration;

use sa_store::sa::SaSpec;

/// What the operator decides about rekeys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// By how many per cent soft limits come earlier at most, so that SAs which began together do not expire together.
    pub jitter_percent: u8,
    /// From the time every worker has the successor of an inbound SA until its outbound one sends: what the peer needs
    /// to install its side.
    pub switch_delay: Duration,
    /// How long a superseded inbound SA stays at least.
    pub overlap: Duration,
    /// And until no packet came on it for this long.
    pub quiet: Duration,
    /// But no longer than this.
    pub overlap_max: Duration,
    /// How much of the way from the soft to the hard limit may go by before the missing successor is an alarm, per cent.
    pub overdue_percent: u8,
    /// Program that fetches successors.
    pub hook: Option<PathBuf>,
    /// How long it may run.
    pub hook_timeout: Duration,
    /// How many may run at once.
    pub hook_parallel: usize,
    /// From the end of an attempt to the next one; doubles with each.
    pub retry: Duration,
    /// But no longer than this.
    pub retry_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            jitter_percent: 10,
            switch_delay: Duration::from_secs(2),
            overlap: Duration::from_secs(30),
            quiet: Duration::from_secs(5),
            overlap_max: Duration::from_secs(600),
            overdue_percent: 50,
            hook: None,
            hook_timeout: Duration::from_secs(30),
            hook_parallel: 4,
            retry: Duration::from_secs(10),
            retry_max: Duration::from_secs(300),
        }
    }
}

impl Config {
    /// Without delays or chance: a change is complete as soon as workers have seen it. For runs that must repeat, and
    /// for peers that are changed in the same moment.
    pub fn immediate() -> Self {
        Self {
            jitter_percent: 0,
            switch_delay: Duration::ZERO,
            overlap: Duration::ZERO,
            quiet: Duration::ZERO,
            ..Self::default()
        }
    }

    /// Why an SA of the files cannot be rekeyed: its lifetime may be over before a successor like it sends.
    ///
    /// # Errors
    /// For the operator.
    pub fn check(&self, sa: &SaSpec) -> Result<(), String> {
        let Some(seconds) = sa.soft.seconds.or(sa.hard.seconds) else {
            return Ok(());
        };
        let left = 100 - u32::from(self.jitter_percent.min(100));
        let least = Duration::from_secs(seconds) * left / 100;
        if least >= self.switch_delay {
            return Ok(());
        }
        Err(format!(
            "a lifetime of {seconds} s, less rekey.jitter_percent = {}, ends before a successor may send: \
             rekey.switch_delay_ms is {}",
            self.jitter_percent,
            self.switch_delay.as_millis()
        ))
    }

    /// As the core takes it.
    pub fn timing(&self) -> Timing {
        Timing {
            switch_delay: nanos(self.switch_delay),
            overlap: nanos(self.overlap),
            quiet: nanos(self.quiet),
            overlap_max: nanos(self.overlap_max.max(self.overlap)),
            overdue_permille: u64::from(self.overdue_percent) * 10,
            attempts_at_once: if self.hook.is_some() {
                self.hook_parallel
            } else {
                0
            },
            retry: nanos(self.retry),
            retry_max: nanos(self.retry_max),
        }
    }
}

/// Times of the core, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// See [`Config::switch_delay`].
    pub switch_delay: u64,
    /// See [`Config::overlap`].
    pub overlap: u64,
    /// See [`Config::quiet`].
    pub quiet: u64,
    /// See [`Config::overlap_max`].
    pub overlap_max: u64,
    /// See [`Config::overdue_percent`], thousandths.
    pub overdue_permille: u64,
    /// Attempts to fetch a successor that may be under way; 0: there is nobody to ask.
    pub attempts_at_once: usize,
    /// See [`Config::retry`].
    pub retry: u64,
    /// See [`Config::retry_max`].
    pub retry_max: u64,
}

impl Timing {
    /// From the end of the attempt of this number to the next one.
    pub fn back_off(&self, attempt: u32) -> u64 {
        let doubled = 1_u64
            .checked_shl(attempt.saturating_sub(1))
            .unwrap_or(u64::MAX);
        self.retry.saturating_mul(doubled).min(self.retry_max)
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}
