//! What an SA has learnt of its packets' way: path MTU, a NAT's mapping, next hop.

use std::sync::atomic::Ordering;

use super::SaEntry;
use crate::fib::HopIdx;

/// How often it is told that a mapping has changed, nanoseconds.
const MOVED_AGAIN: u64 = 1_000_000_000;
/// Ten minutes, nanoseconds.
const PATH_MTU_AGE: u64 = 600_000_000_000;

impl SaEntry {
    /// Largest outer packet that the path takes, as ICMP told, or the largest number.
    #[inline(always)]
    pub fn path_mtu(&self) -> u16 {
        self.live.path_mtu.load(Ordering::Relaxed)
    }

    /// Notes a smaller path MTU. Larger ones are for time to find out: [`age_path_mtu`](Self::age_path_mtu).
    pub fn lower_path_mtu(&self, mtu: u16, now: u64) {
        if mtu <= self.path_mtu() {
            self.live.noted_at.store(now, Ordering::Relaxed);
            self.live.path_mtu.store(mtu, Ordering::Relaxed);
        }
    }

    /// Forgets a path MTU that was learnt more than ten minutes ago (RFC 1191 section 6.3, RFC 8201 section 4).
    pub fn age_path_mtu(&self, now: u64) {
        let at = self.live.noted_at.load(Ordering::Relaxed);
        if now.saturating_sub(at) >= PATH_MTU_AGE && self.path_mtu() != u16::MAX {
            self.live.path_mtu.store(u16::MAX, Ordering::Relaxed);
        }
    }

    /// A successor's packets take the same way: it knows what its predecessor learnt.
    pub fn inherit_path_mtu(&self, before: &SaEntry) {
        let same = |e: &SaEntry| (e.spec.src, e.spec.dst, e.spec.vrf);
        if same(self) == same(before) && before.path_mtu() != u16::MAX {
            let at = before.live.noted_at.load(Ordering::Relaxed);
            self.lower_path_mtu(before.path_mtu(), at);
        }
    }

    /// Whether authentic packets came from elsewhere than the SA says: a NAT on the way has another mapping now.
    #[inline(always)]
    pub fn has_moved(&self) -> bool {
        self.live.noted_at.load(Ordering::Relaxed) != 0
    }

    /// Whether it is time to tell of that, again: once a second. Owner only.
    pub fn tell_moved(&self, now: u64) -> bool {
        let told = self.live.noted_at.load(Ordering::Relaxed);
        let due = told == 0 || now.saturating_sub(told) >= MOVED_AGAIN;
        if due {
            self.live.noted_at.store(now.max(1), Ordering::Relaxed);
        }
        due
    }

    /// Packets come from where they should again. Owner only.
    pub fn settled(&self) {
        self.live.noted_at.store(0, Ordering::Relaxed);
    }

    /// Where the outer packets go, as remembered from the route table of this generation.
    #[inline(always)]
    pub fn hop(&self, generation: u32) -> Option<HopIdx> {
        let hop = self.live.hop.load(Ordering::Relaxed);
        let [a, b, c, d, e, f, g, h] = hop.to_le_bytes();
        (u32::from_le_bytes([e, f, g, h]) == generation && hop != u64::MAX)
            .then(|| HopIdx(u32::from_le_bytes([a, b, c, d])))
    }

    /// Remembers where the outer packets go. Owner only.
    #[inline]
    pub fn remember_hop(&self, generation: u32, hop: HopIdx) {
        let value = u64::from(generation) << 32 | u64::from(hop.0);
        self.live.hop.store(value, Ordering::Relaxed);
    }
}
