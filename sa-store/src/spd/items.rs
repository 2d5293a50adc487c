//! The policies of a table in the order of look-up, and by name. Versions share all chunks and shards that do not
//! differ, so that a change of a few policies costs the same among a hundred thousand as among ten.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use rustc_hash::FxHasher;

use super::cell::Rank;
use super::compile::Item;

/// Policies per chunk when it is made; it is split at twice that.
const CHUNK: usize = 256;
/// Names per shard on average, at most.
const SHARD: usize = 256;

/// Policies, ordered by rank and found by name.
#[derive(Clone)]
pub(super) struct Items {
    /// None is empty.
    chunks: Vec<Arc<Vec<Arc<Item>>>>,
    /// By the hash of the name; a power of two.
    names: Vec<Arc<Vec<Named>>>,
    len: usize,
}

#[derive(Clone)]
struct Named {
    hash: u32,
    item: Arc<Item>,
}

impl Items {
    pub(super) fn new() -> Self {
        Self {
            chunks: Vec::new(),
            names: vec![Arc::default()],
            len: 0,
        }
    }

    /// From policies in any order.
    pub(super) fn from_all(mut all: Vec<Arc<Item>>) -> Self {
        all.sort_unstable_by_key(|i| i.rank);
        let mut items = Self {
            chunks: all.chunks(CHUNK).map(|c| Arc::new(c.to_vec())).collect(),
            names: Vec::new(),
            len: all.len(),
        };
        items.hash_names();
        items
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// In the order of look-up.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Item>> {
        self.chunks.iter().flat_map(|c| c.iter())
    }

    /// The policy of this name.
    pub(super) fn named(&self, name: &str) -> Option<&Arc<Item>> {
        let hash = hash_of(name);
        let shard = &self.names[self.shard_of(hash)];
        let mut same = shard.iter().filter(|n| n.hash == hash);
        same.find(|n| n.item.policy.name == name).map(|n| &n.item)
    }

    /// The last policy of this priority or, when there is none, of a more urgent one.
    pub(super) fn last_up_to(&self, priority: u32) -> Option<&Arc<Item>> {
        let end = Rank::new(priority, u64::MAX);
        let chunk = self.chunks[..self.chunks.partition_point(|c| c[0].rank <= end)].last()?;
        chunk[..chunk.partition_point(|i| i.rank <= end)].last()
    }

    /// These policies without `out` and with `new`.
    pub(super) fn changed(&self, out: &[&Arc<Item>], new: Vec<Arc<Item>>) -> Self {
        if out.len() + new.len() > self.len / 8 + 8 {
            let mut gone: Vec<Rank> = out.iter().map(|i| i.rank).collect();
            gone.sort_unstable();
            let stays = |i: &&Arc<Item>| gone.binary_search(&i.rank).is_err();
            let mut all: Vec<_> = self.iter().filter(stays).cloned().collect();
            all.extend(new);
            return Self::from_all(all);
        }
        let mut items = self.clone();
        for item in out {
            items.remove(item);
        }
        for item in new {
            items.insert(item);
        }
        items
    }

    fn insert(&mut self, item: Arc<Item>) {
        if self.len >= SHARD * self.names.len() {
            self.hash_names();
        }
        let hash = hash_of(&item.policy.name);
        let shard = self.shard_of(hash);
        Arc::make_mut(&mut self.names[shard]).push(Named {
            hash,
            item: Arc::clone(&item),
        });
        self.len += 1;
        let after = self.chunks.partition_point(|c| c[0].rank <= item.rank);
        let Some(slot) = self.chunks.get_mut(after.saturating_sub(1)) else {
            self.chunks.push(Arc::new(vec![item]));
            return;
        };
        let chunk = Arc::make_mut(slot);
        let at = chunk.partition_point(|i| i.rank < item.rank);
        chunk.insert(at, item);
        if chunk.len() >= 2 * CHUNK {
            let half = chunk.split_off(CHUNK);
            self.chunks.insert(after.max(1), Arc::new(half));
        }
    }

    /// Takes out the policy of this rank and name.
    fn remove(&mut self, item: &Item) {
        let hash = hash_of(&item.policy.name);
        let shard = self.shard_of(hash);
        Arc::make_mut(&mut self.names[shard])
            .retain(|n| n.hash != hash || n.item.policy.name != item.policy.name);
        let after = self.chunks.partition_point(|c| c[0].rank <= item.rank);
        let Some(slot) = after.checked_sub(1).and_then(|c| self.chunks.get_mut(c)) else {
            return;
        };
        let chunk = Arc::make_mut(slot);
        let before = chunk.len();
        chunk.retain(|i| i.rank != item.rank);
        self.len -= before - chunk.len();
        if chunk.is_empty() {
            self.chunks.remove(after - 1);
        }
    }

    /// Distributes the names over as many shards as they need, with room for as many again.
    fn hash_names(&mut self) {
        let shards = (2 * self.len).div_ceil(SHARD).next_power_of_two();
        let mut names = vec![Vec::new(); shards];
        for item in self.iter() {
            let hash = hash_of(&item.policy.name);
            names[hash as usize & (shards - 1)].push(Named {
                hash,
                item: Arc::clone(item),
            });
        }
        self.names = names.into_iter().map(Arc::new).collect();
    }

    fn shard_of(&self, hash: u32) -> usize {
        hash as usize & (self.names.len() - 1)
    }
}

fn hash_of(name: &str) -> u32 {
    let mut h = FxHasher::default();
    name.hash(&mut h);
    (h.finish() >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;
    use crate::sa::{Direction, IfId, Vrf};
    use crate::spd::{Action, PolicyIdx};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn item(rank: u64) -> Arc<Item> {
        Arc::new(Item {
            id: PolicyIdx(0),
            rank: Rank::new(5, rank),
            action: Action::Bypass,
            policy: Policy {
                name: format!("p{rank}"),
                direction: Direction::Out,
                priority: 5,
                selectors: Vec::new(),
                action: crate::policy::Action::Bypass,
                vrf: Vrf(0),
                if_id: IfId(0),
            },
        })
    }

    fn assert_equal(items: &Items, model: &BTreeMap<u64, Arc<Item>>) {
        assert_eq!(items.len(), model.len());
        assert!(items.iter().eq_by_rank(model.values()));
        assert!(
            items
                .chunks
                .iter()
                .all(|c| (1..2 * CHUNK).contains(&c.len()))
        );
    }

    trait EqByRank<'a>: Iterator<Item = &'a Arc<Item>> + Sized {
        fn eq_by_rank(self, other: impl Iterator<Item = &'a Arc<Item>>) -> bool {
            self.map(|i| i.rank).eq(other.map(|i| i.rank))
        }
    }
    impl<'a, I: Iterator<Item = &'a Arc<Item>>> EqByRank<'a> for I {}

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn holds_what_was_put_and_not_taken_and_old_versions_stay(
            first in prop::collection::btree_set(0u64..5000, 0..1500),
            ops in prop::collection::vec((0u64..5000, any::<bool>()), 0..2000),
        ) {
            let mut model: BTreeMap<_, _> = first.into_iter().map(|n| (n, item(n))).collect();
            let mut items = Items::from_all(model.values().rev().cloned().collect());
            assert_equal(&items, &model);
            let (before, old) = (items.clone(), model.clone());
            for (n, put) in ops {
                if put && !model.contains_key(&n) {
                    model.insert(n, item(n));
                    items.insert(item(n));
                } else if let Some(gone) = model.remove(&n) {
                    items.remove(&gone);
                }
                prop_assert_eq!(items.named(&format!("p{n}")).is_some(), model.contains_key(&n));
            }
            assert_equal(&items, &model);
            assert_equal(&before, &old);
            let last = items.last_up_to(5).map(|i| i.rank);
            prop_assert_eq!(last, model.values().last().map(|i| i.rank));
            prop_assert!(items.last_up_to(4).is_none());
        }
    }
}
