//! Verdicts of flows seen lately, one cache per worker.
//!
//! A set-associative table of fixed size: a key's hash picks a set of eight ways, each with a 15-bit tag.
//! Tags of a set share a quarter of a cache line and are compared first; an entry is one line of its own.
//! The hash is seeded, so that whoever chooses the tuples cannot choose the set, and a flood of new flows
//! replaces entries one by one at random but never makes the table grow or a look-up take longer.
//!
//! An entry also counts the packets that met it, in the line that was read anyway. Counting them where the policy
//! keeps its count would cost a cache miss per packet as soon as there are many policies. Whoever owns the cache
//! collects the counts: those of entries that make room at once, all others by [`FlowCache::settle`].

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
    owing: Owing,
}

/// One line when `V` has 12 bytes or less, as a verdict has.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Entry<V> {
    /// Words of the key; the half of the second one that keys leave empty counts packets since the last report.
    words: [u64; 6],
    generation: u32,
    value: V,
}

/// One packet in an [`Entry`]'s count.
const ONE: u64 = 1 << 32;

/// Sets with packets that were not reported.
struct Owing {
    /// A bit per set.
    sets: Box<[u64]>,
    count: usize,
    /// Word of `sets` to go on with.
    next: usize,
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
            words: [0; 6],
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
            owing: Owing {
                sets: vec![0; sets.div_ceil(64)].into(),
                count: 0,
                next: 0,
            },
        }
    }

    /// Fetches the set of a key that is about to be looked up.
    #[inline]
    pub fn prefetch(&self, key: &FlowKey) {
        let set = self.place(key).set;
        prefetch::read(&self.tags[set]);
    }

    /// The flow's value if it was stored under this generation. Not counted as a packet.
    #[inline]
    pub fn lookup(&self, key: &FlowKey, generation: u32) -> Option<V> {
        let place = self.place(key);
        let e = &self.entries[place.set][self.way_of(&place, key)?];
        (e.generation == generation).then_some(e.value)
    }

    /// Finds the values of a burst: `out[i]` becomes that of `keys[i]`, asked of `miss` and stored where
    /// there is none of its `generation`. Stops at the shorter of the two.
    ///
    /// `miss` also gets the place of the key in the burst. Every key counts as a packet of its value; `report` gets
    /// the packets of entries that make room. All sets of a burst are fetched from memory at once instead of one
    /// after the other.
    #[inline]
    pub fn resolve(
        &mut self,
        keys: &[FlowKey],
        generation: impl Fn(&FlowKey) -> u32,
        mut miss: impl FnMut(usize, &FlowKey) -> V,
        mut report: impl FnMut(V, u32),
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
                let e = &mut self.entries[p.set][first(p.ways)];
                if p.ways != 0 && e.is(k) && e.generation == now {
                    *out = e.value;
                    if e.count() == 0 {
                        self.owing.add(p.set);
                    }
                    e.hit(&mut report);
                    continue;
                }
                // Another way of equal tag, or stored by an earlier packet of this burst, or not there.
                *out = self.resolve_slowly(k, p, now, |k| miss(first_of_chunk + i, k), &mut report);
            }
            first_of_chunk += keys.len();
        }
    }

    /// As [`resolve`](Self::resolve) for a single key.
    pub fn resolve_one(
        &mut self,
        key: &FlowKey,
        generation: u32,
        miss: impl FnOnce(&FlowKey) -> V,
        mut report: impl FnMut(V, u32),
    ) -> V {
        self.resolve_slowly(key, &self.place(key), generation, miss, &mut report)
    }

    #[inline(never)]
    fn resolve_slowly(
        &mut self,
        key: &FlowKey,
        place: &Place,
        generation: u32,
        miss: impl FnOnce(&FlowKey) -> V,
        report: &mut impl FnMut(V, u32),
    ) -> V {
        let way = match self.way_of(place, key) {
            Some(way) if self.entries[place.set][way].generation == generation => way,
            known => {
                let value = miss(key);
                self.stats.misses += 1;
                let way = known.unwrap_or_else(|| self.victim(place));
                self.tags[place.set][way] = place.tag;
                let entry = &mut self.entries[place.set][way];
                entry.settle(report);
                *entry = Entry {
                    words: *key.words(),
                    generation,
                    value,
                };
                way
            }
        };
        let entry = &mut self.entries[place.set][way];
        if entry.count() == 0 {
            self.owing.add(place.set);
        }
        entry.hit(report);
        entry.value
    }

    /// Reports the packets of up to `sets` sets that were not reported yet, going round the table. Returns whether
    /// it came to the end of the table.
    pub fn settle(&mut self, sets: usize, mut report: impl FnMut(V, u32)) -> bool {
        let mut left = sets;
        while left != 0 {
            let Some(word) = self.owing.sets.get_mut(self.owing.next) else {
                self.owing.next = 0;
                return true;
            };
            if *word == 0 {
                self.owing.next += 1;
                continue;
            }
            let set = self.owing.next * 64 + word.trailing_zeros() as usize;
            *word &= *word - 1;
            self.owing.count -= 1;
            left -= 1;
            for (entry, tag) in self.entries[set].iter_mut().zip(&self.tags[set]) {
                if *tag != 0 {
                    entry.settle(&mut report);
                }
            }
        }
        false
    }

    /// Whether every packet was reported.
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.owing.count == 0
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
    fn way_of(&self, place: &Place, key: &FlowKey) -> Option<usize> {
        let mut ways = ways_of(&self.tags[place.set], place.tag);
        while ways != 0 {
            let way = first(ways);
            if self.entries[place.set][way].is(key) {
                return Some(way);
            }
            ways &= ways - 1;
        }
        None
    }

    /// A free way, or that of any other flow of the set.
    fn victim(&mut self, place: &Place) -> usize {
        if let Some(way) = self.tags[place.set].iter().position(|&t| t == 0) {
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

impl<V: Copy> Entry<V> {
    /// Whether this is the key's entry.
    #[inline(always)]
    fn is(&self, key: &FlowKey) -> bool {
        let (own, other) = (&self.words, key.words());
        let mut differs = (own[1] ^ other[1]) & (ONE - 1);
        for i in [0, 2, 3, 4, 5] {
            differs |= own[i] ^ other[i];
        }
        differs == 0
    }

    /// Packets since the last report.
    #[inline(always)]
    fn count(&self) -> u32 {
        (self.words[1] >> 32) as u32
    }

    /// Counts a packet; reports when the count would overflow.
    #[inline(always)]
    fn hit(&mut self, report: &mut impl FnMut(V, u32)) {
        if self.count() == u32::MAX {
            self.settle(report);
        }
        self.words[1] += ONE;
    }

    #[inline]
    fn settle(&mut self, report: &mut impl FnMut(V, u32)) {
        let count = self.count();
        if count != 0 {
            self.words[1] &= ONE - 1;
            report(self.value, count);
        }
    }
}

impl Owing {
    fn add(&mut self, set: usize) {
        let (word, bit) = (&mut self.sets[set / 64], 1 << (set % 64));
        self.count += usize::from(*word & bit == 0);
        *word |= bit;
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

    impl<V: Copy + Default> FlowCache<V> {
        fn insert(&mut self, key: &FlowKey, generation: u32, value: V) {
            self.resolve_one(key, generation, |_| value, |_, _| ());
        }
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
    fn a_count_that_is_full_is_reported_and_begins_again() {
        let mut entry = Entry {
            words: [0, (u64::from(u32::MAX) * ONE) | 7, 0, 0, 0, 0],
            generation: 0,
            value: 'a',
        };
        let mut reported = Vec::new();
        entry.hit(&mut |v, n| reported.push((v, n)));
        assert_eq!(reported, [('a', u32::MAX)]);
        assert_eq!((entry.count(), entry.words[1] & (ONE - 1)), (1, 7));
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
        fn values_are_those_of_the_last_answer_or_absent(
            ops in prop::collection::vec((0u32..200, 0u32..3, any::<u8>()), 0..2000),
        ) {
            let mut c = FlowCache::with_seed(64, 4);
            let mut model = HashMap::new();
            for (n, generation, value) in ops {
                let known = c.lookup(&key(n), generation);
                if known.is_some() {
                    prop_assert_eq!(model.get(&n).copied(), known.map(|v| (generation, v)));
                }
                let value = known.unwrap_or(value);
                c.insert(&key(n), generation, value);
                model.insert(n, (generation, value));
                prop_assert_eq!(c.lookup(&key(n), generation), Some(value));
            }
        }

        #[test]
        fn a_burst_resolves_as_packet_by_packet_and_every_packet_is_counted_once(
            bursts in prop::collection::vec((prop::collection::vec(0u32..300, 0..150), 0usize..20), 1..20),
        ) {
            let mut c = FlowCache::with_seed(64, 5);
            let mut counted: HashMap<FlowKey, u64> = HashMap::new();
            let mut expected = HashMap::new();
            for (generation, (burst, sets)) in (0u32..).zip(bursts) {
                let generation = generation / 3;
                let keys: Vec<_> = burst.iter().map(|&n| key(n)).collect();
                let mut out = vec![FlowKey::default(); keys.len()];
                // The value names key and generation, so that a wrong or an outdated one shows.
                let value = |k: &FlowKey| k.with_if_id(crate::sa::IfId(generation));
                let mut asked = 0;
                let mut report = |v: FlowKey, n| *counted.entry(v).or_default() += u64::from(n);
                let miss = |_: usize, k: &FlowKey| { asked += 1; value(k) };
                c.resolve(&keys, |_| generation, miss, &mut report, &mut out);
                prop_assert_eq!(&out, &keys.iter().map(value).collect::<Vec<_>>());
                prop_assert!(asked <= keys.len());
                for v in out {
                    *expected.entry(v).or_default() += 1;
                }
                c.settle(sets, report);
            }
            // From wherever it stands to the end, then once round.
            for _ in 0..2 {
                prop_assert!(c.settle(usize::MAX, |v, n| *counted.entry(v).or_default() += u64::from(n)));
            }
            prop_assert!(c.is_settled());
            prop_assert_eq!(counted, expected);
        }
    }
}
