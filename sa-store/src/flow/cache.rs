//! Verdicts of flows seen lately, one cache per worker.
//!
//! A set-associative table of fixed size: a key's hash picks a set of eight ways, each with a 15-bit tag.
//! Tags of a set share a quarter of a cache line and are compared first; an entry is one line of its own.
//! The hash is seeded, so that whoever chooses the tuples cannot choose the set, and a flood of new flows
//! replaces entries one by one at random but never makes the table grow or a look-up take longer.

use super::FlowKey;
use crate::prefetch;
use foldhash::SharedSeed;
use foldhash::fast::FoldHasher;
use std::hash::Hasher;

const WAYS: usize = 8;
/// Keys that one pass of the batched look-up handles.
const BATCH: usize = 64;

/// Cache from flow to `V`, valid for a generation; see [`Spd::generation`](crate::spd::Spd::generation).
pub struct FlowCache<V> {
    seed: Seed,
    set_mask: usize,
    tags: Box<[[u16; WAYS]]>,
    entries: Box<[[Entry<V>; WAYS]]>,
    /// State of the choice of victims.
    random: u32,
    stats: FlowCacheStats,
}

/// One line when `V` has 12 bytes or less, as a verdict has.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Entry<V> {
    key: FlowKey,
    generation: u32,
    value: V,
}

/// What happened in a cache so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCacheStats {
    /// Batched look-ups that had to ask.
    pub misses: u64,
    /// Valid or outdated entries of other flows that had to make room.
    pub evictions: u64,
}

impl<V: Copy + Default> FlowCache<V> {
    /// A cache that holds about `flows` flows (rounded up to a power of two, at least 64; 64 bytes each),
    /// with a random seed.
    ///
    /// # Panics
    /// When the system has no random numbers to give.
    pub fn new(flows: usize) -> Self {
        let mut seed = [0; 16];
        getrandom::fill(&mut seed).expect("the system's random number generator works");
        Self::with_seed(flows, u128::from_ne_bytes(seed))
    }

    /// As [`new`](Self::new) with a given seed, for repeatable runs.
    pub fn with_seed(flows: usize, seed: u128) -> Self {
        let sets = flows.max(64).next_power_of_two() / WAYS;
        let empty = Entry {
            key: FlowKey::default(),
            generation: 0,
            value: V::default(),
        };
        Self {
            seed: Seed::new(seed),
            set_mask: sets - 1,
            tags: vec![[0; WAYS]; sets].into(),
            entries: vec![[empty; WAYS]; sets].into(),
            random: 0x9e37_79b9,
            stats: FlowCacheStats::default(),
        }
    }

    /// Fetches the set of a key that is about to be looked up.
    #[inline]
    pub fn prefetch(&self, key: &FlowKey) {
        let set = self.place(key).set;
        prefetch::read(&self.tags[set]);
    }

    /// The flow's value if it was stored under this generation.
    #[inline]
    pub fn lookup(&self, key: &FlowKey, generation: u32) -> Option<V> {
        let place = self.place(key);
        let e = self.entry(&place, key)?;
        (e.generation == generation).then_some(e.value)
    }

    /// Stores the flow's value, in place of an older one of the same flow, in a free way, or instead of
    /// any other flow of the set.
    pub fn insert(&mut self, key: &FlowKey, generation: u32, value: V) {
        let place = self.place(key);
        let way = self.way_for(&place, key);
        self.tags[place.set][way] = place.tag;
        self.entries[place.set][way] = Entry {
            key: *key,
            generation,
            value,
        };
    }

    /// Finds the values of a burst: `out[i]` becomes that of `keys[i]`, asked of `miss` and stored where
    /// there is none of its `generation`. Stops at the shorter of the two.
    ///
    /// `miss` also gets the place of the key in the burst. All sets of a burst are fetched from memory at once instead of one after the other.
    #[inline]
    pub fn resolve(
        &mut self,
        keys: &[FlowKey],
        generation: impl Fn(&FlowKey) -> u32,
        mut miss: impl FnMut(usize, &FlowKey) -> V,
        out: &mut [V],
    ) {
        let mut first_of_chunk = 0;
        for (keys, out) in keys.chunks(BATCH).zip(out.chunks_mut(BATCH)) {
            let mut places = [Place::default(); BATCH];
            for (p, k) in places.iter_mut().zip(keys) {
                *p = self.place(k);
                prefetch::read(&self.tags[p.set]);
            }
            for p in &mut places[..keys.len()] {
                p.ways = ways_of(&self.tags[p.set], p.tag);
                if p.ways != 0 {
                    prefetch::read(&self.entries[p.set][first(p.ways)]);
                }
            }
            for (i, ((k, p), out)) in keys.iter().zip(&places).zip(out).enumerate() {
                let now = generation(k);
                let e = &self.entries[p.set][first(p.ways)];
                if p.ways != 0 && e.key == *k && e.generation == now {
                    *out = e.value;
                    continue;
                }
                // Another way of equal tag, or stored by an earlier packet of this burst.
                *out = match self.lookup(k, now) {
                    Some(value) => value,
                    None => {
                        let value = miss(first_of_chunk + i, k);
                        self.stats.misses += 1;
                        self.insert(k, now, value);
                        value
                    }
                };
            }
            first_of_chunk += keys.len();
        }
    }

    /// Counts since the cache was made.
    pub fn stats(&self) -> FlowCacheStats {
        self.stats
    }

    /// How many flows fit.
    pub fn capacity(&self) -> usize {
        self.tags.len() * WAYS
    }

    #[inline]
    fn place(&self, key: &FlowKey) -> Place {
        let h = self.seed.hash(key);
        Place {
            // The mask is narrower than usize.
            set: usize::try_from(h & 0xffff_ffff).unwrap_or(0) & self.set_mask,
            tag: (h >> 48) as u16 | 1,
            ways: 0,
        }
    }

    #[inline]
    fn entry(&self, place: &Place, key: &FlowKey) -> Option<&Entry<V>> {
        let mut ways = ways_of(&self.tags[place.set], place.tag);
        while ways != 0 {
            let e = &self.entries[place.set][first(ways)];
            if e.key == *key {
                return Some(e);
            }
            ways &= ways - 1;
        }
        None
    }

    fn way_for(&mut self, place: &Place, key: &FlowKey) -> usize {
        let tags = &self.tags[place.set];
        let entries = &self.entries[place.set];
        let mine = |&w: &usize| tags[w] == place.tag && entries[w].key == *key;
        if let Some(way) = (0..WAYS).find(mine) {
            return way;
        }
        if let Some(way) = tags.iter().position(|&t| t == 0) {
            return way;
        }
        self.stats.evictions += 1;
        // Xorshift: enough to keep two flows from throwing each other out for ever.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        self.random as usize % WAYS
    }
}

/// Where a key belongs.
#[derive(Clone, Copy, Default)]
struct Place {
    set: usize,
    tag: u16,
    ways: u8,
}

/// Bit set of the ways that carry the tag.
#[inline]
fn ways_of(tags: &[u16; WAYS], tag: u16) -> u8 {
    let mut ways = 0;
    for (i, t) in tags.iter().enumerate() {
        ways |= u8::from(*t == tag) << i;
    }
    ways
}

/// Lowest way of a set; any for the empty set.
#[inline]
fn first(ways: u8) -> usize {
    ways.trailing_zeros() as usize % WAYS
}

/// Seed of a keyed hash of flows.
struct Seed {
    own: u64,
    shared: SharedSeed,
}

impl Seed {
    fn new(seed: u128) -> Self {
        let [own, shared] = super::halves(seed);
        Self {
            own,
            shared: SharedSeed::from_u64(shared),
        }
    }

    #[inline]
    fn hash(&self, key: &FlowKey) -> u64 {
        let mut h = FoldHasher::with_seed(self.own, &self.shared);
        let w = key.words();
        h.write_u64(w[0]);
        h.write_u64(w[2]);
        if key.is_v6() {
            h.write_u64(w[3]);
            h.write_u64(w[4]);
            h.write_u64(w[5]);
        }
        h.write_u64(w[1]);
        h.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::L4;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn key(n: u32) -> FlowKey {
        let ports = L4::Ports { src: 1, dst: 2 };
        if n.is_multiple_of(2) {
            FlowKey::v4(n.into(), 7.into(), 17, ports)
        } else {
            FlowKey::v6(u128::from(n).into(), 7.into(), 17, ports)
        }
    }

    #[test]
    fn an_entry_with_a_verdict_is_one_cache_line() {
        assert_eq!(size_of::<Entry<crate::spd::Verdict>>(), 64);
    }

    #[test]
    fn a_value_of_another_generation_is_not_given() {
        let mut c = FlowCache::with_seed(64, 1);
        c.insert(&key(1), 5, 'a');
        assert_eq!(c.lookup(&key(1), 5), Some('a'));
        assert_eq!(c.lookup(&key(1), 6), None);
        assert_eq!(c.lookup(&key(2), 5), None);
        c.insert(&key(1), 6, 'b');
        assert_eq!(c.lookup(&key(1), 6), Some('b'));
        assert_eq!(c.stats().evictions, 0);
    }

    #[test]
    fn half_as_many_flows_as_fit_stay_with_few_exceptions() {
        let mut c = FlowCache::with_seed(1 << 14, 2);
        let keys: Vec<_> = (0..1 << 13).map(key).collect();
        for k in &keys {
            c.insert(k, 0, ());
        }
        let lost = keys.iter().filter(|k| c.lookup(k, 0).is_none()).count();
        assert!(lost < keys.len() / 20, "{lost}");
    }

    #[test]
    fn a_flood_evicts_but_never_grows() {
        let mut c = FlowCache::with_seed(256, 3);
        for n in 0..100_000 {
            c.insert(&key(n), 0, n);
        }
        assert_eq!(c.capacity(), 256);
        let held = (0..100_000).filter(|&n| c.lookup(&key(n), 0).is_some());
        assert!(held.count() <= 256);
    }

    #[test]
    fn seeds_place_flows_differently() {
        let place = |seed| {
            let c = FlowCache::<()>::with_seed(1 << 12, seed);
            (0..64).map(|n| c.place(&key(n)).set).collect::<Vec<_>>()
        };
        assert_eq!(place(1), place(1));
        assert_ne!(place(1), place(2));
        assert_ne!(place(1), place(1 << 64 | 1));
    }

    proptest! {
        #[test]
        fn values_are_those_of_the_last_insertion_or_absent(
            ops in prop::collection::vec((0u32..200, 0u32..3, any::<u8>()), 0..2000),
        ) {
            let mut c = FlowCache::with_seed(64, 4);
            let mut model = HashMap::new();
            for (n, generation, value) in ops {
                if let Some(v) = c.lookup(&key(n), generation) {
                    prop_assert_eq!(model.get(&n), Some(&(generation, v)));
                }
                c.insert(&key(n), generation, value);
                model.insert(n, (generation, value));
                prop_assert_eq!(c.lookup(&key(n), generation), Some(value));
            }
        }

        #[test]
        fn a_burst_resolves_as_packet_by_packet(
            bursts in prop::collection::vec(prop::collection::vec(0u32..300, 0..150), 1..20),
        ) {
            let mut c = FlowCache::with_seed(64, 5);
            for (generation, burst) in (0u32..).zip(bursts) {
                let generation = generation / 3;
                let keys: Vec<_> = burst.iter().map(|&n| key(n)).collect();
                let mut out = vec![FlowKey::default(); keys.len()];
                // The value names key and generation, so that a wrong or an outdated one shows.
                let value = |k: &FlowKey| k.with_if_id(crate::sa::IfId(generation));
                let mut asked = 0;
                c.resolve(&keys, |_| generation, |_, k| { asked += 1; value(k) }, &mut out);
                prop_assert_eq!(&out, &keys.iter().map(value).collect::<Vec<_>>());
                prop_assert!(asked <= keys.len());
            }
        }
    }
}
