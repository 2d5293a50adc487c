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
            let rounds = rounds_of(w);
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
        // When control itself was held up, the last look is old and says nothing: what counts is now.
        let views = plane.workers();
        let stuck = self
            .beats
            .iter()
            .zip(views)
            .position(|(b, w)| now.duration_since(b.since) > STUCK && b.rounds == rounds_of(w));
        stuck.map(|i| format!("worker {i} has made no progress for {} s", STUCK.as_secs()))
    }
}

fn rounds_of(w: &WorkerView) -> u64 {
    let c = &w.counters;
    c.busy_polls.value() + c.idle_polls.value() + c.sleeps.value()
}
