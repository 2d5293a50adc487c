//! Generations of regions of the destination space: which cached verdicts an update makes void.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::cell::fold;
use crate::flow::FlowKey;
use crate::policy::AddrRange;

/// Regions; a power of two. Collisions only cost a look-up too many.
const REGIONS: usize = 0xfff + 1;
/// Ranges that reach more blocks than this void everything.
const MAX_BLOCKS: u64 = 256;

/// Last value given by [`Regions::next_epoch`], over all tables of the process, so that a cache that is
/// moved from one table to another cannot take an old verdict for a new one.
static EPOCH: AtomicU32 = AtomicU32::new(0);

/// Generation per region. A region holds the destinations of some IPv4 /16 and IPv6 /32 blocks of a VRF.
#[derive(Clone)]
pub(super) struct Regions(Arc<[u32; REGIONS]>);

impl Regions {
    pub(super) fn new() -> Self {
        Self(Arc::new([Self::next_epoch(); REGIONS]))
    }

    /// A generation that no region has had. It wraps after 4 billion updates.
    pub(super) fn next_epoch() -> u32 {
        EPOCH.fetch_add(1, Relaxed).wrapping_add(1)
    }

    #[inline]
    pub(super) fn generation(&self, k: &FlowKey) -> u32 {
        let block = if k.is_v6() {
            (k.words()[4] >> 32) | V6
        } else {
            u64::from(k.v4_dst() >> 16)
        };
        self.0[region(block, k.vrf().0)]
    }

    /// Moves the regions that `dst` reaches in `vrf` to `epoch`. Returns false when that was all.
    pub(super) fn void(&mut self, dst: &AddrRange, vrf: u16, epoch: u32) -> bool {
        let all = Arc::make_mut(&mut self.0);
        let (first, last) = match (dst.first(), dst.last()) {
            (IpAddr::V4(f), IpAddr::V4(l)) => {
                (u64::from(u32::from(f) >> 16), u64::from(u32::from(l) >> 16))
            }
            (IpAddr::V6(f), IpAddr::V6(l)) => (v6_block(f.into()), v6_block(l.into())),
            _ => (0, u64::MAX),
        };
        if last - first >= MAX_BLOCKS {
            all.fill(epoch);
            return false;
        }
        for block in first..=last {
            all[region(block, vrf)] = epoch;
        }
        true
    }
}

/// Tells IPv6 blocks from IPv4 blocks.
const V6: u64 = 1 << 40;

fn v6_block(a: u128) -> u64 {
    (a >> 96) as u64 | V6
}

#[inline]
fn region(block: u64, vrf: u16) -> usize {
    let h = fold(
        block ^ 0x2545_f491_4f6c_dd1d,
        u64::from(vrf) ^ 0x9e37_79b9_7f4a_7c15,
    );
    (h & 0xfff) as usize
}
