//! Keys of an IKE daemon's leave the records once they are long out of use.

use std::time::Duration;

use super::error::LeaseError;
use super::media::Media;
use super::page::{Kind, Record};
use super::store::{Claim, KeyId, LeaseHandle, LeaseStore};

/// How long the key of an IKE daemon's is kept with its numbers when it is out of use. A peer that moves has it back within
/// seconds; an operator who gives it again by hand is refused after that.
const REST: Duration = Duration::from_secs(24 * 3600);
/// Keys retired at once.
const MOST_AT_ONCE: usize = 4096;
/// Record of the extent table that is there once a key was retired.
const HAS_RETIRED: usize = 1;

/// A record that nobody holds, of a key that may be retired.
#[derive(Clone, Copy)]
pub(super) struct Idle {
    pub(super) since: Duration,
    pub(super) slot: u32,
    /// The claim that was the last.
    pub(super) claim: u32,
}

impl<M: Media> LeaseStore<M> {
    /// Retires keys of an IKE daemon's that nobody has used for a day: their records make room, and a filter of bounded size
    /// keeps them from ever being taken for new ones. `now`: time since the store was opened. Returns how many.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn sweep(&mut self, now: Duration) -> Result<usize, LeaseError> {
        let retired = self.retire_due(now)?;
        if retired > 0 {
            self.commit(&[])?;
        }
        Ok(retired)
    }

    /// The same in memory, to be staged.
    ///
    /// # Errors
    /// [`LeaseError::Failed`].
    pub(super) fn retire_due(&mut self, now: Duration) -> Result<usize, LeaseError> {
        if self.failed {
            return Err(LeaseError::Failed);
        }
        self.now = self.now.max(now);
        let mut due = Vec::new();
        while due.len() < MOST_AT_ONCE
            && let Some(idle) = self.idle.front().copied()
            && idle.since + REST <= self.now
        {
            self.idle.pop_front();
            let at = usize::try_from(idle.slot).unwrap_or(usize::MAX);
            let unused = |c: &Claim| !c.held && c.number == idle.claim;
            let record = self.record_at(idle.slot).filter(|r| r.passing).copied();
            if let Some(record) = record
                && self.claims.get(at).is_some_and(unused)
            {
                due.push((idle.slot, record));
            }
        }
        if due.is_empty() {
            return Ok(0);
        }
        self.retire(&due);
        Ok(due.len())
    }

    fn retire(&mut self, due: &[(u32, Record)]) {
        // From now on the file of retired keys must be there.
        if !self.has_retired()
            && let Some(r) = self.table.records.get_mut(HAS_RETIRED)
        {
            *r = Some(Record {
                key: KeyId([0; 32]),
                kind: Kind::In,
                value: 1,
                passing: false,
            });
            self.table.dirty = true;
        }
        for (slot, r) in due {
            self.retired.add(&r.key);
            self.index.remove(&(r.key, r.kind == Kind::Out));
            self.clear(*slot);
            self.free.push(*slot);
        }
    }

    pub(super) fn has_retired(&self) -> bool {
        let mark = self.table.records.get(HAS_RETIRED);
        mark.is_some_and(Option::is_some)
    }

    /// Nobody holds the record any more.
    pub(super) fn has_ended(&mut self, handle: LeaseHandle) {
        if self.record_at(handle.slot).is_some_and(|r| r.passing) {
            self.idle.push_back(Idle {
                since: self.now,
                slot: handle.slot,
                claim: handle.claim,
            });
        }
    }
}
