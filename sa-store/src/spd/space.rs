//! Tuple-space search: selectors of equal shape share a hash table, and a look-up probes one bucket in
//! each table, most urgent table first, until no later table can hold a better policy.
//!
//! A table is split into shards behind `Arc`s. Changing policies copies the shards that they live in;
//! all others are shared between the snapshots.

use std::sync::Arc;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use super::cell::{Addr, Cell, Match, Rank, fold};
use super::cover::cover;
use crate::flow::{FlowKey, scope_word};

/// Buckets of a shard; also the number of cells above which a table gets more shards.
const BUCKETS: usize = 256;

/// Which bits of a packet a table is keyed by. VRF always belongs to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Shape {
    src_len: u8,
    dst_len: u8,
    sport_len: u8,
    dport_len: u8,
    proto: bool,
    if_id: bool,
}

/// All selectors of one address family and one purpose.
#[derive(Clone)]
pub(super) struct Space<A> {
    /// In the order of their best rank.
    tables: Vec<Table<A>>,
    /// Whether upper-layer fields take part in the shape.
    upper: bool,
}

#[derive(Clone)]
struct Table<A> {
    best: Rank,
    src_mask: A,
    dst_mask: A,
    scope_mask: u64,
    if_mask: u32,
    /// Number of shards minus one, a power of two minus one.
    shard_mask: u32,
    shards: Vec<Arc<Shard<A>>>,
    cells: usize,
    shape: Shape,
}

struct Shard<A> {
    /// Bucket `b` holds `cells[starts[b]..starts[b + 1]]`, in the order of ranks.
    starts: [u32; BUCKETS + 1],
    cells: Box<[Cell<A>]>,
    hashes: Box<[u32]>,
    best: Rank,
}

/// A cell and the buckets' hash, on its way into a table.
struct Placed<A> {
    hash: u32,
    cell: Cell<A>,
}

/// Cells to take out of and to put into a table.
struct Change<A> {
    out: Vec<Placed<A>>,
    new: Vec<Placed<A>>,
}

impl<A> Default for Change<A> {
    fn default() -> Self {
        Self {
            out: Vec::new(),
            new: Vec::new(),
        }
    }
}

impl<A: Addr> Space<A> {
    /// A space keyed by all fields of the selectors, or by addresses, VRF and interface alone.
    pub(super) const fn new(upper: bool) -> Self {
        Self {
            tables: Vec::new(),
            upper,
        }
    }

    /// This space without `removed` and with `added`. A removed cell is known by its rank and selector.
    pub(super) fn changed(&self, removed: &[Cell<A>], added: &[Cell<A>]) -> Self {
        let mut work: HashMap<Shape, Change<A>, FxBuildHasher> = HashMap::default();
        for c in removed {
            for_each_block(&c.when, self.upper, |shape, hash| {
                work.entry(shape)
                    .or_default()
                    .out
                    .push(Placed { hash, cell: *c });
            });
        }
        for c in added {
            for_each_block(&c.when, self.upper, |shape, hash| {
                work.entry(shape)
                    .or_default()
                    .new
                    .push(Placed { hash, cell: *c });
            });
        }
        let mut tables = Vec::with_capacity(self.tables.len() + work.len());
        for t in &self.tables {
            match work.remove(&t.shape) {
                None => tables.push(t.clone()),
                Some(change) => tables.extend(t.changed(change)),
            }
        }
        for (shape, change) in work {
            tables.extend(Table::new(shape, change.new));
        }
        tables.sort_by_key(|t| (t.best, t.shape));
        Self {
            tables,
            upper: self.upper,
        }
    }

    /// The first cell in rank order that matches.
    #[inline]
    pub(super) fn find(&self, k: &FlowKey) -> Option<&Cell<A>> {
        let p = Probe::new(k);
        let mut bound = Rank::LAST;
        let mut found = None;
        for t in &self.tables {
            if t.best >= bound {
                break;
            }
            for c in t.bucket(&p) {
                if c.rank >= bound {
                    break;
                }
                if c.when.matches(k) {
                    bound = c.rank;
                    found = Some(c);
                    break;
                }
            }
        }
        found
    }

    /// Visits, in no order, the cells below `bound` that hidden fields alone keep from matching.
    pub(super) fn for_each_hidden<'a>(
        &'a self,
        k: &FlowKey,
        bound: Rank,
        mut visit: impl FnMut(&'a Cell<A>),
    ) {
        let p = Probe::new(k);
        for t in &self.tables {
            if t.best >= bound {
                return;
            }
            for c in t.bucket(&p) {
                if c.rank >= bound {
                    break;
                }
                if c.when.could_match(k) {
                    visit(c);
                }
            }
        }
    }

    /// How many tables there are, an upper bound of the probes of one look-up.
    pub(super) fn tables(&self) -> usize {
        self.tables.len()
    }

    /// How many cells there are.
    pub(super) fn cells(&self) -> usize {
        self.tables.iter().map(|t| t.cells).sum()
    }
}

/// The parts of a key that tables mask and hash.
struct Probe<A> {
    src: A,
    dst: A,
    scope: u64,
    if_id: u32,
}

impl<A: Addr> Probe<A> {
    #[inline]
    fn new(k: &FlowKey) -> Self {
        Self {
            src: A::src(k),
            dst: A::dst(k),
            scope: k.words()[0],
            if_id: k.if_id().0,
        }
    }
}

#[inline]
fn hash<A: Addr>(src: A, dst: A, scope: u64, if_id: u32) -> u32 {
    let scope = scope ^ u64::from(if_id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let h = fold(
        A::mix(src, dst) ^ 0x4528_21e6_38d0_1377,
        scope ^ 0xbe54_66cf_34e9_0c6c,
    );
    (h >> 32) as u32
}

impl<A: Addr> Table<A> {
    /// `None` for a table without cells.
    fn new(shape: Shape, cells: Vec<Placed<A>>) -> Option<Self> {
        if cells.is_empty() {
            return None;
        }
        let n = cells.len();
        // Half full, so that policies may double before the table is split again.
        let shards = (2 * n).div_ceil(BUCKETS).next_power_of_two();
        let shard_mask = u32::try_from(shards - 1).unwrap_or(u32::MAX);
        let mut parts: Vec<Vec<Placed<A>>> = Vec::new();
        parts.resize_with(shards, Vec::new);
        for c in cells {
            if let Some(part) = parts.get_mut(shard_of(c.hash, shard_mask)) {
                part.push(c);
            }
        }
        let shards = parts.into_iter().map(|p| Arc::new(Shard::new(p))).collect();
        let mut t = Self {
            best: Rank::LAST,
            src_mask: A::mask(shape.src_len),
            dst_mask: A::mask(shape.dst_len),
            scope_mask: scope_word(
                if shape.proto { 0xff } else { 0 },
                u16::MAX,
                port_mask(shape.sport_len),
                port_mask(shape.dport_len),
            ),
            if_mask: if shape.if_id { u32::MAX } else { 0 },
            shard_mask,
            shards,
            cells: n,
            shape,
        };
        t.best = t.best_of_shards();
        Some(t)
    }

    fn changed(&self, change: Change<A>) -> Option<Self> {
        if self.cells + change.new.len() > 2 * BUCKETS * self.shards.len() {
            let mut all = self.all_except(&change.out);
            all.extend(change.new);
            return Self::new(self.shape, all);
        }
        let mut changes: HashMap<usize, Change<A>, FxBuildHasher> = HashMap::default();
        for c in change.out {
            let at = shard_of(c.hash, self.shard_mask);
            changes.entry(at).or_default().out.push(c);
        }
        for c in change.new {
            let at = shard_of(c.hash, self.shard_mask);
            changes.entry(at).or_default().new.push(c);
        }
        let mut t = self.clone();
        for (at, change) in changes {
            let Some(slot) = t.shards.get_mut(at) else {
                continue;
            };
            let mut cells = slot.cells_except(&ranks(&change.out));
            cells.extend(change.new);
            let before = slot.cells.len();
            let shard = Shard::new(cells);
            t.cells = t.cells - before + shard.cells.len();
            *slot = Arc::new(shard);
        }
        t.best = t.best_of_shards();
        (t.cells != 0).then_some(t)
    }

    fn all_except(&self, removed: &[Placed<A>]) -> Vec<Placed<A>> {
        let out = ranks(removed);
        self.shards
            .iter()
            .flat_map(|s| s.cells_except(&out))
            .collect()
    }

    fn best_of_shards(&self) -> Rank {
        self.shards
            .iter()
            .map(|s| s.best)
            .min()
            .unwrap_or(Rank::LAST)
    }

    #[inline]
    fn bucket(&self, p: &Probe<A>) -> &[Cell<A>] {
        let h = hash(
            p.src.and(self.src_mask),
            p.dst.and(self.dst_mask),
            p.scope & self.scope_mask,
            p.if_id & self.if_mask,
        );
        match self.shards.get(shard_of(h, self.shard_mask)) {
            Some(s) => s.bucket(h),
            None => &[],
        }
    }
}

/// Ranks in order.
fn ranks<A>(cells: &[Placed<A>]) -> Vec<Rank> {
    let mut ranks: Vec<Rank> = cells.iter().map(|c| c.cell.rank).collect();
    ranks.sort_unstable();
    ranks
}

#[inline]
fn shard_of(hash: u32, mask: u32) -> usize {
    (hash >> BUCKETS.trailing_zeros() & mask) as usize
}

impl<A: Addr> Shard<A> {
    fn new(mut placed: Vec<Placed<A>>) -> Self {
        placed.sort_unstable_by_key(|c| (bucket_of(c.hash), c.cell.rank));
        let mut starts = [0; BUCKETS + 1];
        for c in &placed {
            starts[bucket_of(c.hash) + 1] += 1;
        }
        for b in 0..BUCKETS {
            starts[b + 1] += starts[b];
        }
        Self {
            starts,
            best: placed
                .iter()
                .map(|c| c.cell.rank)
                .min()
                .unwrap_or(Rank::LAST),
            hashes: placed.iter().map(|c| c.hash).collect(),
            cells: placed.iter().map(|c| c.cell).collect(),
        }
    }

    /// Everything but the policies of these ranks (sorted).
    fn cells_except(&self, out: &[Rank]) -> Vec<Placed<A>> {
        let all = self.cells.iter().zip(&self.hashes);
        all.filter(|(c, _)| out.binary_search(&c.rank).is_err())
            .map(|(c, h)| Placed { hash: *h, cell: *c })
            .collect()
    }

    #[inline]
    fn bucket(&self, hash: u32) -> &[Cell<A>] {
        let b = bucket_of(hash);
        let (from, to) = (self.starts[b] as usize, self.starts[b + 1] as usize);
        self.cells.get(from..to).unwrap_or(&[])
    }
}

#[inline]
fn bucket_of(hash: u32) -> usize {
    hash as usize & (BUCKETS - 1)
}

fn port_mask(len: u8) -> u16 {
    u16::MAX
        .checked_shl(16 - u32::from(len.min(16)))
        .unwrap_or(0)
}

/// Calls `f` with shape and hash of every block that the selector's ranges cover.
fn for_each_block<A: Addr>(m: &Match<A>, upper: bool, mut f: impl FnMut(Shape, u32)) {
    let (src, dst) = m.addresses();
    let s = cover(A::BITS, A::STEP, |len| (src.0.block(len), src.1.block(len)));
    let d = cover(A::BITS, A::STEP, |len| (dst.0.block(len), dst.1.block(len)));
    let port = |(first, last): (u16, u16)| {
        cover(16, 4, |len| {
            let block = |p: u16| u128::from(p.checked_shr(16 - u32::from(len)).unwrap_or(0));
            (block(first), block(last))
        })
    };
    let (any, proto) = ((0, u16::MAX), m.proto().filter(|_| upper));
    let sp = port(if upper { m.sports() } else { any });
    let dp = port(if upper { m.dports() } else { any });
    let shape = Shape {
        src_len: s.len,
        dst_len: d.len,
        sport_len: sp.len,
        dport_len: dp.len,
        proto: proto.is_some(),
        if_id: m.if_id() != 0,
    };
    let port_start = |block: u128, len: u8| {
        let block = u16::try_from(block).unwrap_or(u16::MAX);
        block.checked_shl(16 - u32::from(len)).unwrap_or(0)
    };
    for src in s.first..=s.last {
        for dst in d.first..=d.last {
            for sport in sp.first..=sp.last {
                for dport in dp.first..=dp.last {
                    let scope = scope_word(
                        proto.unwrap_or(0),
                        m.vrf(),
                        port_start(sport, sp.len),
                        port_start(dport, dp.len),
                    );
                    let (src, dst) = (A::block_start(src, s.len), A::block_start(dst, d.len));
                    f(shape, hash(src, dst, scope, m.if_id()));
                }
            }
        }
    }
}
