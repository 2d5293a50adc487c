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

/// One change to a table, see [`Spd::edited`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Replaces the policy of that name, which keeps its place among those of its priority; a new one, or one of
    /// another priority than before, comes behind all others of its priority.
    Put(Policy),
    /// Takes away the policy of that name.
    Remove(String),
}

impl Spd {
    /// The table of `policies` (all of the file, in order; those of the other direction are ignored),
    /// sharing with this one whatever did not change.
    ///
    /// # Errors
    /// See [`SpdError`]; this table is as it was.
    pub fn updated<'p>(
        &self,
        policies: impl IntoIterator<Item = &'p Policy>,
        tunnel: impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<(Self, Changes), SpdError> {
        let mut new = Vec::with_capacity(self.items.len());
        for p in policies
            .into_iter()
            .filter(|p| p.direction == self.direction)
        {
            new.push((p, resolve(p, &tunnel)?));
        }
        // In the order of look-up; the file's order decides among equals.
        new.sort_by_key(|(p, _)| p.priority);
        // Most updates touch few policies: both lists have a long head and tail in common.
        let same = |(item, (p, action)): &(&Arc<Item>, &(&Policy, Action))| {
            item.action == *action && item.policy == **p
        };
        let old = &self.items;
        let head = old.iter().zip(&new).take_while(same).count();
        let rest = old.len().min(new.len()) - head;
        let tails = old.iter().rev().zip(new.iter().rev()).take(rest);
        let tail = tails.take_while(same).count();
        if old.len() == head + tail && new.len() == head + tail {
            return Ok((self.clone(), Changes::default()));
        }
        let middle: Vec<_> = old
            .iter()
            .skip(head)
            .take(old.len() - head - tail)
            .collect();
        let mut entries = self.compare(&middle, &new[head..new.len() - tail])?;
        let before = head.checked_sub(1).and_then(|n| old.iter().nth(n));
        let after = old.iter().nth(old.len() - tail);
        if rank_between(before, &mut entries, after) {
            return Ok(self.assemble(&middle, &entries));
        }
        let all: Vec<_> = old.iter().collect();
        let mut entries = self.compare(&all, &new)?;
        rank_all(&mut entries);
        Ok(self.assemble(&all, &entries))
    }

    /// This table after `edits`, one after the other; policies of the other direction are ignored. Takes time in
    /// proportion to the edits, hardly to the table.
    ///
    /// # Errors
    /// See [`SpdError`]; this table is as it was.
    pub fn edited(
        &self,
        edits: &[Edit],
        tunnel: impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<(Self, Changes), SpdError> {
        let mut spd = self.clone();
        let mut changes = Changes::default();
        for edit in edits {
            let (next, more) = spd.edited_once(edit, &tunnel)?;
            spd = next;
            changes.add(more);
        }
        Ok((spd, changes))
    }

    fn edited_once(
        &self,
        edit: &Edit,
        tunnel: &impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<(Self, Changes), SpdError> {
        let policy = match edit {
            Edit::Remove(name) => {
                let gone = self
                    .items
                    .named(name)
                    .ok_or_else(|| SpdError::NoSuchPolicy {
                        policy: name.clone(),
                    })?;
                return Ok(self.assemble(&[gone], &[]));
            }
            Edit::Put(policy) => policy,
        };
        validate(policy)?;
        if policy.direction != self.direction {
            return Ok((self.clone(), Changes::default()));
        }
        let action = resolve(policy, tunnel)?;
        let old = self.items.named(&policy.name);
        let stays = old.filter(|i| i.policy.priority == policy.priority);
        let mut entry = Entry {
            policy,
            action,
            old,
            same: old.is_some_and(|i| i.action == action && i.policy == *policy),
            rank: stays.map_or(Rank::LAST, |i| i.rank),
            moved: false,
        };
        if entry.same {
            return Ok((self.clone(), Changes::default()));
        }
        let old: Vec<_> = old.into_iter().collect();
        if stays.is_some() {
            return Ok(self.assemble(&old, &[entry]));
        }
        let last = self.items.last_up_to(policy.priority);
        let below = last.filter(|i| i.policy.priority == policy.priority);
        if let Some(places) = labels::assign_between(below.map(|i| i.rank.label()), &[None], None) {
            places.into_iter().for_each(|place| entry.place(place));
            return Ok(self.assemble(&old, &[entry]));
        }
        // The labels are used up: all are given anew.
        let others = self.items.iter().filter(|i| i.policy.name != policy.name);
        let mut list: Vec<_> = others.map(|i| i.policy.clone()).collect();
        list.push(policy.clone());
        self.updated(&list, tunnel)
    }

    /// The part of the new list that takes the place of `middle`, each with its old counterpart.
    fn compare<'a>(
        &'a self,
        middle: &[&'a Arc<Item>],
        new: &[(&'a Policy, Action)],
    ) -> Result<Vec<Entry<'a>>, SpdError> {
        let mut names: HashMap<&str, &Arc<Item>, FxBuildHasher> = HashMap::default();
        names.extend(middle.iter().map(|i| (i.policy.name.as_str(), *i)));
        let mut seen: HashSet<&str, FxBuildHasher> = HashSet::default();
        let mut entries = Vec::new();
        for &(policy, action) in new {
            validate(policy)?;
            if !seen.insert(&policy.name) {
                return Err(duplicate(policy));
            }
            let old = names.get(policy.name.as_str()).copied();
            // A name that the unchanged head or tail has.
            if old.is_none() && self.items.named(&policy.name).is_some() {
                return Err(duplicate(policy));
            }
            entries.push(Entry {
                policy,
                action,
                old,
                same: old.is_some_and(|i| i.action == action && i.policy == *policy),
                rank: Rank::LAST,
                moved: false,
            });
        }
        Ok(entries)
    }

    /// The new table: `entries` take the place of the policies `middle`.
    fn assemble(&self, middle: &[&Arc<Item>], entries: &[Entry<'_>]) -> (Self, Changes) {
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
        let mut gone: HashMap<PolicyIdx, &Arc<Item>, FxBuildHasher> =
            middle.iter().map(|i| (i.id, *i)).collect();
        let (mut out, mut new) = (Vec::new(), Vec::new());
        for e in entries {
            let id = match e.old {
                Some(old) => {
                    gone.remove(&old.id);
                    if e.same && e.rank == old.rank {
                        continue;
                    }
                    delta.remove(old);
                    out.push(old);
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
            new.push(item);
        }
        // In their old order, so that numbers are freed in an order that one can foresee.
        for item in middle.iter().filter(|i| gone.contains_key(&i.id)) {
            delta.remove(item);
            out.push(item);
            void(&item.policy);
            changes.removed.push(item.id);
        }
        spd.ids.free.extend(&changes.removed);
        spd.items = self.items.changed(&out, new);
        delta.apply(&mut spd);
        (spd, changes)
    }
}

impl Changes {
    fn add(&mut self, more: Self) {
        self.added.extend(more.added);
        self.removed.extend(more.removed);
        self.changed += more.changed;
        self.voids_all |= more.voids_all;
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

/// Positions of the entries of each priority, in order.
fn by_priority(entries: &[Entry<'_>]) -> BTreeMap<u32, Vec<usize>> {
    let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, e) in entries.iter().enumerate() {
        groups.entry(e.policy.priority).or_default().push(i);
    }
    groups
}

/// Ranks the entries between the policies `before` and `after`, which stay. False when these leave no room.
fn rank_between(
    before: Option<&Arc<Item>>,
    entries: &mut [Entry<'_>],
    after: Option<&Arc<Item>>,
) -> bool {
    for (priority, group) in by_priority(entries) {
        let label = |i: &Arc<Item>| (i.policy.priority == priority).then(|| i.rank.label());
        let (below, above) = (before.and_then(label), after.and_then(label));
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
