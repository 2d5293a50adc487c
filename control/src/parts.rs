//! The parts of the mirror, and what a change of some of them means for SAs and policies: no more than what it touches
//! is looked at.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use sa_store::policy::Policy;
use sa_store::sa::Direction;
use sa_store::spd::Edit;

use crate::install::{Edits, LeftOut};
use crate::mirrored::{Kind, Mirrored, PartId};

/// From so many edits on, and a part of all policies, comparing whole lists is the quicker way.
const MANY_EDITS: usize = 32;

/// All parts.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    parts: BTreeMap<PartId, Mirrored>,
    owners: HashMap<(Kind, String), PartId>,
    /// Direction (out), priority and place of every policy.
    order: BTreeSet<(bool, u32, u64, PartId)>,
    /// What is left out at present.
    left_out: BTreeMap<PartId, Vec<LeftOut>>,
    /// SAs that no part names any more and that could not be taken out yet.
    stale: HashSet<String>,
    /// The running policies are not those of the parts.
    behind: bool,
}

/// What a change touches.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Parts, with those of which something is left out.
    pub(crate) ids: BTreeSet<PartId>,
    /// Names of SAs that these parts had.
    pub(crate) had: HashSet<String>,
    /// What to do to the policies; `None`: they are to be compared as a whole.
    pub(crate) edits: Option<Edits>,
    /// What can never be installed.
    sifted: Vec<(PartId, Vec<LeftOut>)>,
}

impl Parts {
    /// The names of all parts.
    pub(crate) fn ids(&self) -> impl Iterator<Item = PartId> {
        self.parts.keys().copied()
    }

    /// Some parts.
    pub(crate) fn of<'s>(
        &'s self,
        ids: &'s BTreeSet<PartId>,
    ) -> impl Iterator<Item = &'s Mirrored> + Clone {
        ids.iter().filter_map(|id| self.parts.get(id))
    }

    /// All parts.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Mirrored> {
        self.parts.values()
    }

    /// All policies, those of one priority in their order.
    pub(crate) fn policies(&self) -> Vec<&Policy> {
        let placed = |m: &'_ Mirrored| m.places.len() == m.config.policies.len();
        let parts = self.parts.values().filter(|m| placed(m));
        let mut all: Vec<(u64, &Policy)> = parts
            .flat_map(|m| m.places.iter().copied().zip(&m.config.policies))
            .collect();
        all.sort_by_key(|(place, p)| (p.priority, *place));
        all.into_iter().map(|(_, p)| p).collect()
    }

    /// How many policies there are.
    pub(crate) fn policy_count(&self) -> usize {
        self.order.len()
    }

    /// What is left out at present.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = &LeftOut> {
        self.left_out.values().flatten()
    }

    /// What is left out of these parts.
    pub(crate) fn left_out_of(&self, ids: &BTreeSet<PartId>) -> Vec<LeftOut> {
        let lists = ids.iter().filter_map(|id| self.left_out.get(id));
        lists.flatten().cloned().collect()
    }

    /// Whether something is left out, which another try may bring in.
    pub(crate) fn is_troubled(&self) -> bool {
        !self.left_out.is_empty() || !self.stale.is_empty() || self.behind
    }

    /// What another try touches.
    pub(crate) fn again(&mut self) -> Touched {
        self.replace(Vec::new())
    }

    /// Puts parts in the place of those of their names; an empty one is the end of its part.
    pub(crate) fn replace(&mut self, changes: Vec<(PartId, Mirrored)>) -> Touched {
        let mut t = Touched {
            had: std::mem::take(&mut self.stale),
            ..Touched::default()
        };
        let troubled: Vec<PartId> = self.left_out.keys().copied().collect();
        let whole = self.is_troubled();
        let mut news = Edited::default();
        // All that goes, first: a name may move from one part to another.
        for (id, _) in &changes {
            if let Some(old) = self.take_out(*id) {
                t.had.extend(old.config.sas.iter().map(|s| s.name.clone()));
                news.before(&old);
            }
        }
        for id in troubled {
            t.ids.insert(id);
            if let Some(part) = self.parts.get(&id) {
                t.had.extend(part.config.sas.iter().map(|s| s.name.clone()));
            }
        }
        for (id, mut part) in changes {
            let owners = &self.owners;
            let taken = |kind, name: &str| owners.contains_key(&(kind, name.to_owned()));
            t.sifted.push((id, part.sift(&taken)));
            t.ids.insert(id);
            news.after(&part);
            self.put_in(id, part);
        }
        let few = news.len() <= MANY_EDITS.max(self.order.len() / 8);
        t.edits = (few && !whole).then(|| news.edits(&self.order)).flatten();
        t
    }

    /// The change was made.
    pub(crate) fn done(&mut self, touched: &mut Touched, left_out: Vec<LeftOut>) {
        self.behind = false;
        for id in &touched.ids {
            self.left_out.remove(id);
        }
        self.leave_out(left_out);
        self.sifted(touched);
    }

    /// The change could not be made.
    pub(crate) fn failed(&mut self, touched: &mut Touched, left_out: Vec<LeftOut>) {
        self.behind = true;
        let named = |n: &String| self.owners.contains_key(&(Kind::Sa, n.clone()));
        self.stale = touched.had.drain().filter(|n| !named(n)).collect();
        for id in &touched.ids {
            self.left_out.remove(id);
        }
        self.leave_out(left_out);
        self.sifted(touched);
    }

    /// These are left out, beside what is already.
    pub(crate) fn leave_out(&mut self, left_out: Vec<LeftOut>) {
        for (name, why) in left_out {
            let owner = [Kind::Sa, Kind::PolicyOut, Kind::PolicyIn]
                .into_iter()
                .find_map(|kind| self.owners.get(&(kind, name.clone())));
            let id = owner.copied().unwrap_or(PartId(u64::MAX));
            let list = self.left_out.entry(id).or_default();
            if !list.iter().any(|(n, _)| *n == name) {
                list.push((name, why));
            }
        }
    }

    fn sifted(&mut self, touched: &mut Touched) {
        for (id, list) in touched.sifted.drain(..) {
            if !list.is_empty() {
                self.left_out.entry(id).or_default().extend(list);
            }
        }
    }

    fn take_out(&mut self, id: PartId) -> Option<Mirrored> {
        let part = self.parts.remove(&id)?;
        for (kind, name) in names(&part) {
            self.owners.remove(&(kind, name.to_owned()));
        }
        for (p, place) in part.config.policies.iter().zip(&part.places) {
            self.order.remove(&rank(p, *place, id));
        }
        Some(part)
    }

    fn put_in(&mut self, id: PartId, part: Mirrored) {
        if part.is_empty() {
            return;
        }
        for (kind, name) in names(&part) {
            self.owners.insert((kind, name.to_owned()), id);
        }
        for (p, place) in part.config.policies.iter().zip(&part.places) {
            self.order.insert(rank(p, *place, id));
        }
        self.parts.insert(id, part);
    }
}

fn names(part: &Mirrored) -> impl Iterator<Item = (Kind, &str)> {
    let c = &part.config;
    let tunnels = c.tunnels.iter().map(|t| (Kind::Tunnel, t.name.as_str()));
    let sas = c.sas.iter().map(|s| (Kind::Sa, s.name.as_str()));
    let policies = c.policies.iter();
    let policies = policies.map(|p| (Kind::policy(p.direction), p.name.as_str()));
    tunnels.chain(sas).chain(policies)
}

fn rank(p: &Policy, place: u64, id: PartId) -> (bool, u32, u64, PartId) {
    (p.direction == Direction::Out, p.priority, place, id)
}

/// Policies of the touched parts, before and after.
#[derive(Default)]
struct Edited {
    before: HashMap<(bool, String), (u64, Policy)>,
    after: Vec<(u64, Policy)>,
}

impl Edited {
    fn before(&mut self, part: &Mirrored) {
        for (p, place) in part.config.policies.iter().zip(&part.places) {
            let key = (p.direction == Direction::Out, p.name.clone());
            self.before.insert(key, (*place, p.clone()));
        }
    }

    /// Keeps what is not as it was.
    fn after(&mut self, part: &Mirrored) {
        for (p, place) in part.config.policies.iter().zip(&part.places) {
            let key = (p.direction == Direction::Out, p.name.clone());
            match self.before.get(&key) {
                Some((at, old)) if at == place && old == p => drop(self.before.remove(&key)),
                _ => self.after.push((*place, p.clone())),
            }
        }
    }

    fn len(&self) -> usize {
        self.before.len() + self.after.len()
    }

    /// The edits that make the one the other. `None` when one of the new would have to stand before one that was there:
    /// an edit puts it behind all others of its priority.
    fn edits(mut self, order: &BTreeSet<(bool, u32, u64, PartId)>) -> Option<Edits> {
        let mut edits = Edits::default();
        self.after.sort_by_key(|(place, p)| (p.priority, *place));
        let mut news: BTreeMap<(bool, u32), (u64, usize)> = BTreeMap::new();
        let mut puts = Vec::with_capacity(self.after.len());
        for (place, p) in self.after {
            let out = p.direction == Direction::Out;
            let old = self.before.get(&(out, p.name.clone()));
            if old.is_some_and(|(at, o)| *at == place && o.priority == p.priority) {
                // It keeps its place.
                self.before.remove(&(out, p.name.clone()));
            } else {
                let first = news.entry((out, p.priority)).or_insert((place, 0));
                first.1 += 1;
            }
            puts.push(Edit::Put(p));
        }
        for ((out, priority), (first, count)) in news {
            let from = (out, priority, first, PartId(0));
            let to = (out, priority, u64::MAX, PartId(u64::MAX));
            if order.range(from..=to).count() != count {
                return None;
            }
        }
        // What comes again elsewhere in the order goes first.
        for ((out, name), _) in self.before {
            edits.of(out).push(Edit::Remove(name));
        }
        for put in puts {
            if let Edit::Put(p) = &put {
                edits.of(p.direction == Direction::Out).push(put);
            }
        }
        Some(edits)
    }
}
