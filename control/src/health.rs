//! Whether every worker still makes progress.

use std::time::{Duration, Instant};

use crate::plane::{DataPlane, WorkerView};

/// A worker that makes no poll round for this long is stuck: asleep it wakes at least ten times a second.
pub const STUCK: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug)]
struct Beat {
    rounds: u64,
    since: Instant,
}

/// Watches the workers' poll counters.
#[derive(Debug, Default)]
pub struct Health {
    beats: Vec<Beat>,
}

impl Health {
    /// Looks at the workers; call it at least every second.
    pub fn observe(&mut self, workers: &[WorkerView], now: Instant) {
        for (i, w) in workers.iter().enumerate() {
            let rounds = w.counters.busy_polls.value()
                + w.counters.idle_polls.value()
                + w.counters.sleeps.value();
            match self.beats.get_mut(i) {
                None => self.beats.push(Beat { rounds, since: now }),
                Some(beat) if beat.rounds != rounds => *beat = Beat { rounds, since: now },
                Some(_) => {}
            }
        }
    }

    /// What is wrong, if anything.
    pub fn problem(&self, plane: &dyn DataPlane, now: Instant) -> Option<String> {
        if !plane.alive() {
            return Some("a worker's thread has ended".into());
        }
        let stuck = self
            .beats
            .iter()
            .position(|b| now.duration_since(b.since) > STUCK);
        stuck.map(|i| format!("worker {i} has made no progress for {} s", STUCK.as_secs()))
    }
}
