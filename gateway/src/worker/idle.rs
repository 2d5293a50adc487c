//! What a worker does when there is nothing to do: spin, then sleep until a port or a peer wakes it.

use std::time::Duration;

/// How a worker idles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdlePolicy {
    /// Empty poll rounds before the first sleep. Spinning keeps latency lowest while traffic pauses briefly.
    pub spins: u32,
    /// Longest sleep. Bounds how late a worker notices what no descriptor announces.
    pub longest: Duration,
    /// Sleep length when some port has no descriptor to wait on (memory ports).
    pub nap: Duration,
    /// Never sleep.
    pub busy: bool,
}

impl Default for IdlePolicy {
    fn default() -> Self {
        Self {
            spins: 1000,
            longest: Duration::from_millis(100),
            nap: Duration::from_micros(100),
            busy: false,
        }
    }
}

/// What to do after an empty poll round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Poll again at once.
    Spin,
    /// Sleep, at most this long.
    Sleep(Duration),
}

/// Counts empty rounds.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    policy: IdlePolicy,
    empty: u32,
}

impl Backoff {
    /// Starts awake.
    pub fn new(policy: IdlePolicy) -> Self {
        Self { policy, empty: 0 }
    }

    /// A round found work.
    #[inline]
    pub fn worked(&mut self) {
        self.empty = 0;
    }

    /// A round found none. `all_wake`: every port can wake a sleeping worker.
    pub fn idle(&mut self, all_wake: bool) -> Idle {
        self.empty = self.empty.saturating_add(1);
        if self.policy.busy || self.empty <= self.policy.spins {
            std::hint::spin_loop();
            return Idle::Spin;
        }
        Idle::Sleep(if all_wake {
            self.policy.longest
        } else {
            self.policy.nap
        })
    }

    /// Woken: spin again before the next sleep, but not for long, since wake-ups may be spurious.
    pub fn woken(&mut self) {
        self.empty = self.policy.spins / 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_only_after_the_configured_spins_and_starts_over_with_work() {
        let mut b = Backoff::new(IdlePolicy {
            spins: 2,
            ..IdlePolicy::default()
        });
        assert_eq!(b.idle(true), Idle::Spin);
        assert_eq!(b.idle(true), Idle::Spin);
        assert_eq!(b.idle(true), Idle::Sleep(Duration::from_millis(100)));
        assert_eq!(b.idle(false), Idle::Sleep(Duration::from_micros(100)));
        b.worked();
        assert_eq!(b.idle(true), Idle::Spin);
    }

    #[test]
    fn a_busy_worker_never_sleeps() {
        let mut b = Backoff::new(IdlePolicy {
            busy: true,
            spins: 0,
            ..IdlePolicy::default()
        });
        for _ in 0..10 {
            assert_eq!(b.idle(true), Idle::Spin);
        }
    }
}
