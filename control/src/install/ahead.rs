//! Leases that are claimed before their SAs are installed, so that control goes on with other things while the disk takes
//! them in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sa_store::lease::{LeaseError, LeaseWriter};
use sa_store::sa::SaSpec;

use super::plan::same;
use crate::keeper::Tracked;

/// How long a change waits for the disk before it gives up.
pub(super) const DISK: Duration = Duration::from_secs(10);

/// What one origin has claimed and not installed yet.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    by_name: HashMap<String, (SaSpec, Tracked)>,
    /// When the disk has had time enough.
    deadline: Option<Instant>,
}

impl Ahead {
    /// Claims for SAs, and asks for the numbers that they start with. What cannot be claimed now is told when it is installed.
    pub(super) fn claim<'s>(
        &mut self,
        sas: impl Iterator<Item = &'s SaSpec>,
        writer: &LeaseWriter,
    ) -> Result<(), LeaseError> {
        let new: Vec<SaSpec> = sas.filter(|s| !self.has(s)).cloned().collect();
        if new.is_empty() {
            return Ok(());
        }
        let answers = writer.claim(new.clone());
        for (spec, answer) in new.into_iter().zip(answers) {
            let Ok(lease) = answer else { continue };
            let mut tracked = Tracked::new(lease, &spec);
            let asked = tracked.extend(tracked.lease().resume(), Duration::ZERO, writer);
            // One of that name with another key is not wanted any more.
            if let Some((_, old)) = self.by_name.insert(spec.name.clone(), (spec, tracked)) {
                writer.give_back(vec![old.unused()])?;
            }
            asked?;
        }
        self.deadline = Some(Instant::now() + DISK);
        Ok(())
    }

    /// Whether waiting is of no more use: all is durable, the store has failed, or the disk is too slow.
    pub(super) fn is_settled(&self) -> bool {
        let settled = |t: &Tracked| t.is_durable() || t.lease().has_failed();
        self.is_late() || self.by_name.values().all(|(_, t)| settled(t))
    }

    /// Until when a change may wait for what is not durable yet.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline.unwrap_or_else(|| Instant::now() + DISK)
    }

    /// The lease of exactly this SA.
    pub(super) fn take(&mut self, spec: &SaSpec) -> Option<Tracked> {
        if !self.has(spec) {
            return None;
        }
        self.by_name.remove(&spec.name).map(|(_, t)| t)
    }

    /// The change was made, or not: what it did not take is given back.
    pub(super) fn end(&mut self, writer: &LeaseWriter) -> Result<(), LeaseError> {
        self.deadline = None;
        let unused = self.by_name.drain().map(|(_, (_, t))| t.unused());
        writer.give_back(unused.collect())
    }

    fn has(&self, spec: &SaSpec) -> bool {
        let found = self.by_name.get(&spec.name);
        found.is_some_and(|(s, _)| same(s, spec))
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|d| Instant::now() > d)
    }
}
