//! The difference between what an origin wants and what runs of it.

use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::sync::Arc;

use sa_store::file::Location;
use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, SaId, SaSpec};

use super::{ApplyError, LeftOut, Order, Roster, Rule};

/// An SA of the new configuration that has to be made.
pub(super) struct Wanted<'c> {
    pub(super) spec: Arc<SaSpec>,
    pub(super) at: Option<&'c Location>,
    pub(super) how: How,
}

/// Where its numbers come from.
pub(super) enum How {
    /// A record of its own.
    Fresh,
    /// From a running SA with the same key: its next numbers.
    Heir(Arc<SaEntry>),
}

impl Wanted<'_> {
    /// It cannot be installed: an error, or it is left out alone.
    pub(super) fn refused(
        &self,
        what: String,
        rule: Rule,
        left_out: &mut Vec<LeftOut>,
    ) -> Result<(), ApplyError> {
        match rule {
            Rule::Whole => Err(ApplyError {
                at: self.at.cloned(),
                what,
            }),
            Rule::EachAlone => {
                left_out.push((self.spec.name.clone(), what));
                Ok(())
            }
        }
    }
}

/// The difference between a configuration and what runs.
pub(super) struct Plan<'c> {
    pub(super) wanted: Vec<Wanted<'c>>,
    /// Running SAs that the configuration does not name, or not so.
    pub(super) dropped: Vec<Arc<SaEntry>>,
    /// Those of them that it named before.
    pub(super) newly_dropped: usize,
    /// Running SAs that it names.
    pub(super) kept: Vec<Arc<SaEntry>>,
}

impl<'c> Plan<'c> {
    pub(super) fn new(order: &Order<'c>, roster: &Roster) -> Self {
        let mut kept_ids: HashSet<SaId> = HashSet::with_capacity(order.sas.len());
        let mut kept = Vec::with_capacity(order.sas.len());
        let mut missing = Vec::new();
        let held: HashMap<&str, &Arc<SaEntry>> =
            roster.held().map(|e| (e.spec.name.as_str(), e)).collect();
        for (i, spec) in order.sas.iter().copied().enumerate() {
            let again = || {
                let e = held.get(spec.name.as_str()).copied()?;
                same(&e.spec, spec).then_some(e)
            };
            match roster.find(spec).or_else(again) {
                Some(e) => {
                    kept_ids.insert(e.fixed.id);
                    kept.push(Arc::clone(e));
                }
                None => missing.push((spec, order.origins.get(i))),
            }
        }
        let dropped_of = |e: &&Arc<SaEntry>| !kept_ids.contains(&e.fixed.id);
        let mut dropped: Vec<Arc<SaEntry>> = match order.had {
            None => roster.named().filter(dropped_of).cloned().collect(),
            Some(had) => {
                let had = had.iter().filter_map(|name| roster.get(name));
                had.filter(dropped_of).cloned().collect()
            }
        };
        let newly_dropped = dropped.len();
        dropped.extend(roster.held().filter(dropped_of).cloned());
        let hasher = KeyHasher::default();
        let mut by_key: HashMap<u64, Vec<&Arc<SaEntry>>> = HashMap::new();
        if !missing.is_empty() {
            for e in &dropped {
                by_key.entry(hasher.of(&e.spec)).or_default().push(e);
            }
        }
        let wanted = missing
            .into_iter()
            .map(|(spec, at)| wanted(spec, at, &by_key, &hasher))
            .collect();
        Self {
            wanted,
            dropped,
            newly_dropped,
            kept,
        }
    }

    /// Running SAs that go now: the dropped ones that are not kept for a while.
    pub(super) fn leaving(&self, keep: &HashSet<SaId>) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.dropped.iter().filter(|e| !keep.contains(&e.fixed.id))
    }

    /// As if the configuration had nothing new.
    pub(super) fn only_drop(&mut self) -> Vec<Wanted<'c>> {
        std::mem::take(&mut self.wanted)
    }

    pub(super) fn inbound_heirs(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.wanted.iter().filter_map(|w| match &w.how {
            How::Heir(e) if e.fixed.direction == Direction::In => Some(e),
            _ => None,
        })
    }
}

/// Whether the running SA is what is wanted. The mark "first use" says nothing about an SA that runs.
pub(super) fn same(running: &SaSpec, wanted: &SaSpec) -> bool {
    if running.first_use == wanted.first_use {
        return running == wanted;
    }
    let mut other = wanted.clone();
    other.first_use = running.first_use;
    *running == other
}

/// Finds equal keys without keeping them. Seeded per use; a collision is settled by comparing.
#[derive(Default)]
pub(super) struct KeyHasher(std::collections::hash_map::RandomState);

impl KeyHasher {
    pub(super) fn of(&self, spec: &SaSpec) -> u64 {
        self.0
            .hash_one((spec.direction, &*spec.keys.enc, &*spec.keys.auth))
    }
}

fn wanted<'c>(
    spec: &SaSpec,
    at: Option<&'c Location>,
    old: &HashMap<u64, Vec<&Arc<SaEntry>>>,
    hasher: &KeyHasher,
) -> Wanted<'c> {
    let heir = old.get(&hasher.of(spec)).and_then(|list| {
        list.iter()
            .find(|e| e.spec.direction == spec.direction && e.spec.keys == spec.keys)
    });
    let how = heir.map_or(How::Fresh, |e| How::Heir(Arc::clone(e)));
    Wanted {
        spec: Arc::new(spec.clone()),
        at,
        how,
    }
}
