//! Makes a table from the one before and the policies of a new file: finds out what changed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use rustc_hash::FxBuildHasher;

use super::Spd;
use super::cell::Rank;
use super::compile::{Delta, Item, SpdError, resolve, validate};
use super::labels::{self, Place};
use super::regions::Regions;
use super::verdict::{Action, PolicyIdx, TunnelIdx};
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
        let mut new = Vec::with_capacity(self.items.len());
        for p in policies.iter().filter(|p| p.direction == self.direction) {
            new.push((p, resolve(p, &tunnel)?));
        }
        // Most updates touch few policies: both lists have a long head and tail in common.
        let same = |(item, (p, action)): &(&Arc<Item>, &(&Policy, Action))| {
            item.action == *action && item.policy == **p
        };
        let old = &self.items;
        let head = old.iter().zip(&new).take_while(same).count();
        let (old_rest, new_rest) = (old[head..].iter().rev(), new[head..].iter().rev());
        let tail = old_rest.zip(new_rest).take_while(same).count();
        if old.len() == head + tail && new.len() == head + tail {
            return Ok((self.clone(), Changes::default()));
        }
        let mut entries = self.compare(head, tail, &new)?;
        if rank_between(&old[..head], &mut entries, &old[old.len() - tail..]) {
            return Ok(self.assemble(head, tail, &entries));
        }
        let mut entries = self.compare(0, 0, &new)?;
        rank_all(&mut entries);
        Ok(self.assemble(0, 0, &entries))
    }

    /// The part of the new list between the common head and tail, each with its old counterpart.
    fn compare<'a>(
        &'a self,
        head: usize,
        tail: usize,
        new: &[(&'a Policy, Action)],
    ) -> Result<Vec<Entry<'a>>, SpdError> {
        let (before, rest) = self.items.split_at(head);
        let (middle, after) = rest.split_at(rest.len() - tail);
        let mut names: HashMap<&str, &Arc<Item>, FxBuildHasher> = HashMap::default();
        names.extend(middle.iter().map(|i| (i.policy.name.as_str(), i)));
        let mut seen: HashSet<&str, FxBuildHasher> = HashSet::default();
        let mut entries = Vec::new();
        for &(policy, action) in &new[head..new.len() - tail] {
            validate(policy)?;
            if !seen.insert(&policy.name) {
                return Err(duplicate(policy));
            }
            let old = names.get(policy.name.as_str()).copied();
            entries.push(Entry {
                policy,
                action,
                old,
                same: old.is_some_and(|i| i.action == action && i.policy == *policy),
                rank: Rank::LAST,
                moved: false,
            });
        }
        seen.retain(|n| !names.contains_key(n));
        let mut unchanged = before.iter().chain(after);
        match unchanged.find(|i| !seen.is_empty() && seen.contains(i.policy.name.as_str())) {
            Some(i) => Err(duplicate(&i.policy)),
            None => Ok(entries),
        }
    }

    /// The new table: `head` and `tail` policies stay, `entries` take the place of those between.
    fn assemble(&self, head: usize, tail: usize, entries: &[Entry<'_>]) -> (Self, Changes) {
        let (before, rest) = self.items.split_at(head);
        let (middle, after) = rest.split_at(rest.len() - tail);
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
        let kept: HashSet<PolicyIdx, FxBuildHasher> =
            entries.iter().filter_map(|e| Some(e.old?.id)).collect();
        let mut items = Vec::with_capacity(head + entries.len() + tail);
        items.extend_from_slice(before);
        for e in entries {
            let id = match e.old {
                Some(old) => {
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
        items.extend_from_slice(after);
        for gone in middle.iter().filter(|i| !kept.contains(&i.id)) {
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

impl Entry<'_> {
    /// Label of the old counterpart, if its priority is the same.
    fn old_label(&self) -> Option<u64> {
        let old = self.old?;
        (old.policy.priority == self.policy.priority).then(|| old.rank.label())
    }

    fn place(&mut self, place: Place) {
        self.rank = Rank::new(self.policy.priority, place.label);
        self.moved = place.moved;
    }
}

fn duplicate(p: &Policy) -> SpdError {
    SpdError::DuplicateName {
        policy: p.name.clone(),
    }
}

/// Positions of the entries of each priority, in file order.
fn by_priority(entries: &[Entry<'_>]) -> BTreeMap<u32, Vec<usize>> {
    let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, e) in entries.iter().enumerate() {
        groups.entry(e.policy.priority).or_default().push(i);
    }
    groups
}

/// Ranks the entries between policies that stay. False when these leave no room.
fn rank_between(before: &[Arc<Item>], entries: &mut [Entry<'_>], after: &[Arc<Item>]) -> bool {
    for (priority, group) in by_priority(entries) {
        let label = |i: &Arc<Item>| (i.policy.priority == priority).then(|| i.rank.label());
        let below = before.iter().rev().find_map(label);
        let above = after.iter().find_map(label);
        let old: Vec<_> = group.iter().map(|&i| entries[i].old_label()).collect();
        let Some(places) = labels::assign_between(below, &old, above) else {
            return false;
        };
        for (i, place) in group.into_iter().zip(places) {
            entries[i].place(place);
        }
    }
    true
}

/// Ranks a whole list; old ranks stay wherever there is room.
fn rank_all(entries: &mut [Entry<'_>]) {
    for (_, group) in by_priority(entries) {
        let old: Vec<_> = group.iter().map(|&i| entries[i].old_label()).collect();
        for (i, place) in group.into_iter().zip(labels::assign(&old)) {
            entries[i].place(place);
        }
    }
}
