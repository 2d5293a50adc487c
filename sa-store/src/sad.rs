//! Inbound SA look-up: by SPI, then destination and VRF (RFC 4301 section 4.1).

use std::sync::Arc;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::runtime::SaEntry;
use crate::sa::Vrf;

const SHARDS: usize = 256;

/// Entries that share one SPI: nearly always one.
#[derive(Clone, Debug)]
enum Slot {
    One(Arc<SaEntry>),
    Many(Arc<[Arc<SaEntry>]>),
}

// SPIs are chosen by this side, not by an attacker, so an unseeded hash is safe.
type Shard = HashMap<u32, Slot, FxBuildHasher>;

/// The inbound SAD. Cloning copies 256 pointers; a change copies one shard.
#[derive(Clone, Debug)]
pub struct Sad {
    shards: Box<[Arc<Shard>; SHARDS]>,
    len: usize,
}

impl Default for Sad {
    fn default() -> Self {
        let empty = Arc::new(Shard::default());
        Self {
            shards: Box::new(std::array::from_fn(|_| Arc::clone(&empty))),
            len: 0,
        }
    }
}

#[inline(always)]
fn shard_of(spi: u32) -> usize {
    (spi.wrapping_mul(0x9e37_79b1) >> 24) as usize
}

fn same_place(a: &SaEntry, b: &SaEntry) -> bool {
    a.fixed.dst == b.fixed.dst && a.fixed.vrf == b.fixed.vrf
}

impl Sad {
    /// The SA for `spi` at `dst` (IPv4 as IPv4-mapped) in `vrf`.
    #[inline]
    pub fn find(&self, spi: u32, dst: u128, vrf: Vrf) -> Option<&Arc<SaEntry>> {
        let fits = |e: &&Arc<SaEntry>| e.fixed.dst == dst && e.fixed.vrf == vrf;
        match self.shards[shard_of(spi)].get(&spi)? {
            Slot::One(e) => Some(e).filter(fits),
            Slot::Many(list) => list.iter().find(fits),
        }
    }

    /// First half of a batched look-up: the entry for `spi` whatever its destination, so that its lines can be
    /// prefetched before [`find`](Self::find) compares them.
    #[inline]
    pub fn hint(&self, spi: u32) -> Option<&Arc<SaEntry>> {
        match self.shards[shard_of(spi)].get(&spi)? {
            Slot::One(e) => Some(e),
            Slot::Many(list) => list.first(),
        }
    }

    /// Adds or replaces the entry at its SPI, destination and VRF.
    pub fn insert(&mut self, entry: Arc<SaEntry>) {
        let shard = Arc::make_mut(&mut self.shards[shard_of(entry.fixed.spi)]);
        let spi = entry.fixed.spi;
        let slot = match shard.remove(&spi) {
            None => {
                self.len += 1;
                Slot::One(entry)
            }
            Some(Slot::One(old)) if same_place(&old, &entry) => Slot::One(entry),
            Some(Slot::One(old)) => {
                self.len += 1;
                Slot::Many([old, entry].into())
            }
            Some(Slot::Many(list)) => {
                let before = list.len();
                let mut list: Vec<_> = list
                    .iter()
                    .filter(|e| !same_place(e, &entry))
                    .cloned()
                    .collect();
                list.push(entry);
                self.len = self.len + list.len() - before;
                Slot::Many(list.into())
            }
        };
        shard.insert(spi, slot);
    }

    /// Removes exactly this entry; one that has already been replaced stays.
    pub fn remove(&mut self, entry: &SaEntry) -> bool {
        let shard = Arc::make_mut(&mut self.shards[shard_of(entry.fixed.spi)]);
        let spi = entry.fixed.spi;
        let is_it = |e: &Arc<SaEntry>| e.fixed.id == entry.fixed.id;
        let left: Vec<_> = match shard.get(&spi) {
            Some(Slot::One(e)) if is_it(e) => Vec::new(),
            Some(Slot::Many(list)) if list.iter().any(is_it) => {
                list.iter().filter(|e| !is_it(e)).cloned().collect()
            }
            _ => return false,
        };
        self.len -= 1;
        match <[_; 1]>::try_from(left) {
            Ok([one]) => drop(shard.insert(spi, Slot::One(one))),
            Err(left) if left.is_empty() => drop(shard.remove(&spi)),
            Err(left) => drop(shard.insert(spi, Slot::Many(left.into()))),
        }
        true
    }

    /// Number of inbound SAs.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
