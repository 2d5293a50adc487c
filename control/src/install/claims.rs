//! The leases of one attempt.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use sa_store::lease::LeaseWriter;
use sa_store::sa::SaSpec;

use super::ahead::Ahead;
use super::plan::{How, Wanted};
use super::{ApplyError, LeftOut, Rule};
use crate::keeper::{Keeper, Tracked};

/// Leases of one attempt: given back unless the attempt succeeds.
pub(super) struct Claims<'w> {
    writer: &'w LeaseWriter,
    taken: Vec<Tracked>,
}

impl<'w> Claims<'w> {
    pub(super) fn new(writer: &'w LeaseWriter) -> Self {
        Self {
            writer,
            taken: Vec::new(),
        }
    }

    /// Claims and extends, so that every number the SAs will start with is on disk. Nothing waits for what was claimed ahead
    /// and is durable; one sync for all the rest.
    pub(super) fn take(
        &mut self,
        wanted: &[Wanted<'_>],
        ahead: &mut Ahead,
        keeper: &Keeper,
        rule: Rule,
        left_out: &mut Vec<LeftOut>,
    ) -> Result<(), ApplyError> {
        let deadline = ahead.deadline();
        let mut fresh: Vec<&Wanted<'_>> = Vec::new();
        for w in wanted.iter().filter(|w| matches!(w.how, How::Fresh)) {
            match ahead.take(&w.spec) {
                Some(t) => self.taken.push(t),
                None => fresh.push(w),
            }
        }
        let specs = fresh.iter().map(|w| SaSpec::clone(&w.spec)).collect();
        let mut first_error = None;
        for (w, answer) in fresh.iter().zip(self.writer.claim(specs)) {
            match answer {
                Ok(lease) => self.taken.push(Tracked::new(lease, &w.spec)),
                Err(e) => {
                    if let Err(e) = w.refused(e.to_string(), rule, left_out) {
                        first_error.get_or_insert(e);
                    }
                }
            }
        }
        if let Some(e) = first_error {
            return Err(e);
        }
        for t in &mut self.taken {
            t.extend(t.lease().resume(), Duration::ZERO, self.writer)
                .map_err(|e| ApplyError::plain(e.to_string()))?;
        }
        // Heirs go on where the lease of the running SA ends: the numbers before it stay with that one.
        for w in wanted {
            if let How::Heir(e) = &w.how
                && let Some(mut t) = keeper.heir_of(e.fixed.id, &w.spec)
            {
                let used = t.lease().limit();
                t.extend(used, Duration::ZERO, self.writer)
                    .map_err(|e| ApplyError::plain(e.to_string()))?;
                self.taken.push(t);
            }
        }
        for t in &self.taken {
            while !t.is_durable() {
                if t.lease().has_failed() || Instant::now() > deadline {
                    return Err(ApplyError::plain(
                        "the lease store does not answer: see its log line",
                    ));
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    /// By name of the SA.
    pub(super) fn by_name(&self) -> HashMap<&str, &Tracked> {
        self.taken.iter().map(|t| (t.name(), t)).collect()
    }

    /// The attempt succeeded with these SAs; what it took for others is given back.
    pub(super) fn keep(mut self, used: &[Tracked]) {
        let used: HashSet<&str> = used.iter().map(Tracked::name).collect();
        self.taken.retain(|t| !used.contains(t.name()));
    }
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        // A block that an heir was given is lost, not reused: the running SA keeps its own.
        let unused: Vec<_> = self
            .taken
            .drain(..)
            .filter(|t| !t.is_heir())
            .map(|t| t.unused())
            .collect();
        if unused.is_empty() {
            return;
        }
        if let Err(e) = self.writer.give_back(unused) {
            tracing::error!(error = %e, "leases of SAs that were refused could not be given back");
        }
    }
}
