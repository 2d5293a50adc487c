//! Waiting for workers to let go of SAs: those whose keys are wanted again, and those that are replaced.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::runtime::SaEntry;

use super::plan::{KeyHasher, Wanted};
use super::{ApplyError, Kit};

/// How long an SA that is on its way out is waited for when its key is wanted again.
const RETIRE: Duration = Duration::from_secs(2);

/// A key that was just removed can be claimed again only when its old SA is out of use.
pub(super) fn wait_for_keys(kit: &mut Kit<'_>, wanted: &[Wanted<'_>]) {
    if wanted.is_empty() || !kit.keeper.is_retiring() {
        return;
    }
    let hasher = KeyHasher::default();
    let wanted: HashSet<u64> = wanted.iter().map(|w| hasher.of(&w.spec)).collect();
    let deadline = Instant::now() + RETIRE;
    while Instant::now() < deadline {
        kit.reap();
        let mut retiring = kit.keeper.retiring();
        if !retiring.any(|e| wanted.contains(&hasher.of(&e.spec))) {
            return;
        }
        drop(retiring);
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Stops inbound SAs and waits until no worker is still at work with them. Returns those stopped.
pub(super) fn stop_and_wait(
    kit: &mut Kit<'_>,
    heirs: &[Arc<SaEntry>],
) -> Result<Stopped, ApplyError> {
    let stopped = Stopped(heirs.iter().filter(|e| !e.disabled()).cloned().collect());
    if stopped.0.is_empty() {
        return Ok(stopped);
    }
    for e in &stopped.0 {
        e.set_disabled(true);
    }
    // A worker that acknowledges this publication has finished every burst that began before the mark. What an
    // engine or another worker's CPU still has of these SAs is refused when it comes back, as they are disabled.
    let barrier = kit.store.draft();
    kit.store.publish(barrier);
    let deadline = Instant::now() + RETIRE;
    loop {
        kit.reap();
        if kit.store.settled() {
            return Ok(stopped);
        }
        if Instant::now() > deadline {
            return Err(ApplyError::plain(
                "a worker does not let go of the SAs to be replaced",
            ));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// SAs that were stopped for a change; they resume if it fails.
pub(super) struct Stopped(Vec<Arc<SaEntry>>);

impl Stopped {
    /// The change was made: they are never used again.
    pub(super) fn for_good(mut self) {
        self.0.clear();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for e in &self.0 {
            e.set_disabled(false);
        }
    }
}
