//! Makes a table from the one before and the policies of a new file: finds out what changed.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::cell::Rank;
use super::compile::{Delta, Item, SpdError, resolve, validate};
use super::regions::Regions;
use super::verdict::{Action, PolicyIdx, TunnelIdx};
use super::{Spd, labels};
use crate::policy::Policy;

/// Numbers of removed policies rest until this many others were freed after them, so that a worker which
/// still holds one does not count for a new policy.
const QUARANTINE: usize = 1024;

/// Numbers given to policies.
#[derive(Clone, Default)]
pub(super) struct Ids {
    /// Largest number given; 0 is the default discard's.
    last: u32,
    free: VecDeque<PolicyIdx>,
}

impl Ids {
    pub(super) fn slots(&self) -> usize {
        self.last as usize + 1
    }

    fn give(&mut self) -> PolicyIdx {
        if self.free.len() > QUARANTINE
            && let Some(id) = self.free.pop_front()
        {
            return id;
        }
        self.last += 1;
        PolicyIdx(self.last)
    }
}

/// What an update did, for logs and for the owner of the hit counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Numbers given to names that were not there before: their counters start at 0.
    pub added: Vec<PolicyIdx>,
    /// Numbers of names that are gone.
    pub removed: Vec<PolicyIdx>,
    /// Policies of the same name with other contents or another place in the order.
    pub changed: usize,
    /// Whether a change was so wide that all cached verdicts are void.
    pub voids_all: bool,
}

/// An entry of the new list.
struct Entry<'a> {
    policy: &'a Policy,
    action: Action,
    /// Policy of that name in the old table.
    old: Option<&'a Arc<Item>>,
    /// Whether the old one has these contents.
    same: bool,
    rank: Rank,
    /// Whether it is new, or stands elsewhere in the order relative to those that do not move.
    moved: bool,
}

impl Spd {
    /// The table of `policies` (all of the file, in order; those of the other direction are ignored),
    /// sharing with this one whatever did not change.
    ///
    /// # Errors
    /// See [`SpdError`]; this table is as it was.
    pub fn updated(
        &self,
        policies: &[Policy],
        tunnel: impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<(Self, Changes), SpdError> {
        let Some(mut entries) = self.compare(policies, tunnel)? else {
            return Ok((self.clone(), Changes::default()));
        };
        rank(&mut entries);
        Ok(self.assemble(&entries))
    }

    /// The new list with each entry's old counterpart; `None` when nothing differs.
    fn compare<'a>(
        &'a self,
        policies: &'a [Policy],
        tunnel: impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<Option<Vec<Entry<'a>>>, SpdError> {
        let mut entries = Vec::with_capacity(self.items.len());
        for policy in policies.iter().filter(|p| p.direction == self.direction) {
            entries.push(Entry {
                policy,
                action: resolve(policy, &tunnel)?,
                old: None,
                same: false,
                rank: Rank::LAST,
                moved: false,
            });
        }
        // Most updates touch few policies, so that most of both lists is a common head and tail.
        let old = &self.items;
        let head = old
            .iter()
            .zip(&mut entries)
            .map(|(item, e)| e.is_unchanged(item))
            .take_while(|&same| same)
            .count();
        let tail = old[head..]
            .iter()
            .rev()
            .zip(entries[head..].iter_mut().rev())
            .map(|(item, e)| e.is_unchanged(item))
            .take_while(|&same| same)
            .count();
        let (old_end, end) = (old.len() - tail, entries.len() - tail);
        if head == old_end && head == end {
            return Ok(None);
        }
        let mut names: HashMap<&str, &Arc<Item>, FxBuildHasher> = HashMap::default();
        names.extend(
            old[head..old_end]
                .iter()
                .map(|i| (i.policy.name.as_str(), i)),
        );
        let mut seen: HashSet<&str, FxBuildHasher> = HashSet::default();
        for e in &mut entries[head..end] {
            validate(e.policy)?;
            if !seen.insert(&e.policy.name) {
                return Err(duplicate(e.policy));
            }
            if let Some(item) = names.get(e.policy.name.as_str()) {
                e.is_unchanged(item);
                e.old = Some(item);
            }
        }
        seen.retain(|n| !names.contains_key(n));
        let mut unchanged = entries[..head].iter().chain(&entries[end..]);
        match unchanged.find(|e| !seen.is_empty() && seen.contains(e.policy.name.as_str())) {
            Some(e) => Err(duplicate(e.policy)),
            None => Ok(Some(entries)),
        }
    }

    fn assemble(&self, entries: &[Entry<'_>]) -> (Self, Changes) {
        let mut spd = self.clone();
        let mut delta = Delta::default();
        let mut changes = Changes::default();
        let epoch = Regions::next_epoch();
        let mut void = |p: &Policy| {
            for s in &p.selectors {
                if changes.voids_all {
                    return;
                }
                changes.voids_all = !spd.regions.void(&s.dst, p.vrf.0, epoch);
            }
        };
        let mut kept = vec![false; spd.ids.slots()];
        let mut items = Vec::with_capacity(entries.len());
        for e in entries {
            let id = match e.old {
                Some(old) => {
                    kept[old.id.index()] = true;
                    if e.same && e.rank == old.rank {
                        items.push(Arc::clone(old));
                        continue;
                    }
                    delta.remove(old);
                    if !e.same || e.moved {
                        void(&old.policy);
                        changes.changed += 1;
                    }
                    old.id
                }
                None => {
                    let id = spd.ids.give();
                    changes.added.push(id);
                    id
                }
            };
            if !e.same || e.moved {
                void(e.policy);
            }
            let item = Arc::new(Item {
                id,
                rank: e.rank,
                action: e.action,
                policy: e.policy.clone(),
            });
            delta.add(&item);
            items.push(item);
        }
        for gone in self.items.iter().filter(|i| !kept[i.id.index()]) {
            delta.remove(gone);
            void(&gone.policy);
            changes.removed.push(gone.id);
        }
        spd.ids.free.extend(&changes.removed);
        spd.items = items;
        delta.apply(&mut spd);
        (spd, changes)
    }
}

impl<'a> Entry<'a> {
    /// Compares with the old policy and takes it as counterpart when nothing differs.
    fn is_unchanged(&mut self, item: &'a Arc<Item>) -> bool {
        self.same = item.action == self.action && item.policy == *self.policy;
        if self.same {
            self.old = Some(item);
        }
        self.same
    }
}

fn duplicate(p: &Policy) -> SpdError {
    SpdError::DuplicateName {
        policy: p.name.clone(),
    }
}

/// Gives each entry its rank, the old one wherever the order allows.
fn rank(entries: &mut [Entry<'_>]) {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    // Stable, and quick where the file is ordered by priority already.
    order.sort_by_key(|&i| entries[i].policy.priority);
    let priority = |i: usize| entries[i].policy.priority;
    let groups: Vec<_> = order
        .chunk_by(|&a, &b| priority(a) == priority(b))
        .map(|group| {
            let old = |&i: &usize| {
                let e = &entries[i];
                let old = e.old.filter(|o| o.policy.priority == e.policy.priority)?;
                Some(old.rank.label())
            };
            (
                group,
                labels::assign(&group.iter().map(old).collect::<Vec<_>>()),
            )
        })
        .collect();
    for (group, labels) in groups {
        for (&i, place) in group.iter().zip(labels) {
            let e = &mut entries[i];
            e.rank = Rank::new(e.policy.priority, place.label);
            e.moved = place.moved;
        }
    }
}
