//! Which tunnels deserve a slot when there are more SAs than slots.
//!
//! Loads are read from the SAs' own counters, a few at a time, so that tunnels in software are seen too. A tunnel changes
//! sides only when it is rekeyed, as an SA never leaves the engine it was installed on. Those that have slots count for half
//! as much again, so that tunnels of like loads do not take turns.

use std::collections::BTreeMap;

use sa_store::runtime::SaEntry;
use sa_store::snapshot::Snapshot;

/// SAs looked at in one call.
const STEP: u32 = 4;
/// A pass over all SAs takes at least this long, nanoseconds.
const PASS: u64 = 1_000_000_000;
/// What a tunnel's load weighs when it has slots, and when not.
const WITH: u64 = 3;
const WITHOUT: u64 = 2;
/// Slots kept free for SAs that overlap while they are rekeyed.
const RESERVE: usize = 4;

/// Loads of all tunnels that have any, or slots.
#[derive(Debug, Default)]
pub(super) struct Demand {
    tunnels: BTreeMap<u32, Load>,
    /// Generation and bytes of each SA when it was last looked at.
    sas: Vec<(u32, u64)>,
    cursor: u32,
    pass_began: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Load {
    /// Bytes in this pass.
    now: u64,
    /// Bytes per pass, smoothed.
    rate: u64,
    /// Slots that the tunnel has.
    slots: u32,
}

impl Load {
    fn weight(&self) -> u64 {
        let factor = if self.slots > 0 { WITH } else { WITHOUT };
        self.rate.saturating_mul(factor)
    }
}

impl Demand {
    /// Looks at a few SAs.
    pub(super) fn observe(&mut self, view: &Snapshot, now: u64) {
        let end = u32::try_from(view.sas.capacity()).unwrap_or(u32::MAX);
        if self.cursor >= end {
            if now.saturating_sub(self.pass_began) < PASS {
                return;
            }
            self.end_pass();
            self.pass_began = now;
        }
        let upto = self.cursor.saturating_add(STEP).min(end);
        for index in self.cursor..upto {
            if let Some(entry) = view.sa_at(index) {
                self.note(entry);
            }
        }
        self.cursor = upto;
    }

    fn note(&mut self, entry: &SaEntry) {
        let (index, tunnel) = (entry.fixed.id.index as usize, entry.fixed.tunnel.0);
        let bytes = entry.live.counters.bytes.value();
        let generation = entry.fixed.id.generation;
        if self.sas.len() <= index {
            self.sas.resize(index + 1, (0, 0));
        }
        let last = std::mem::replace(&mut self.sas[index], (generation, bytes));
        let before = if last.0 == generation { last.1 } else { 0 };
        let more = bytes.saturating_sub(before);
        if more != 0 {
            self.tunnels.entry(tunnel).or_default().now += more;
        }
    }

    fn end_pass(&mut self) {
        self.cursor = 0;
        self.tunnels.retain(|_, t| {
            t.rate = (t.rate / 4).saturating_mul(3) + t.now / 4;
            t.now = 0;
            t.rate != 0 || t.slots != 0
        });
    }

    /// Whether the tunnel is among those that `slots` slots are for.
    pub(super) fn deserves(&self, tunnel: u32, slots: u8) -> bool {
        // A tunnel has two SAs.
        let places = (usize::from(slots).saturating_sub(RESERVE) / 2).max(1);
        let own = self.tunnels.get(&tunnel).map_or(0, Load::weight);
        let busier = self.tunnels.values().filter(|t| t.weight() > own);
        busier.take(places).count() < places
    }

    /// Nobody has slots any more.
    pub(super) fn forget_slots(&mut self) {
        for t in self.tunnels.values_mut() {
            t.slots = 0;
        }
    }

    /// The tunnel got a slot.
    pub(super) fn got(&mut self, tunnel: u32) {
        self.tunnels.entry(tunnel).or_default().slots += 1;
    }

    /// The tunnel lost a slot.
    pub(super) fn gave(&mut self, tunnel: u32) {
        if let Some(t) = self.tunnels.get_mut(&tunnel) {
            t.slots = t.slots.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(rates: &[(u64, u32)]) -> Demand {
        let load = |&(rate, slots): &(u64, u32)| Load {
            now: 0,
            rate,
            slots,
        };
        Demand {
            tunnels: (0..).zip(rates.iter().map(load)).collect(),
            ..Demand::default()
        }
    }

    #[test]
    fn everybody_gets_slots_while_there_are_enough() {
        let d = demand(&[(0, 0), (0, 0), (5, 0)]);
        assert!((0..3).all(|t| d.deserves(t, 32)));
        assert!(d.deserves(900, 32));
    }

    #[test]
    fn the_busiest_win_and_likes_do_not_take_turns() {
        // Two places: 8 slots less the reserve.
        let mut d = demand(&[(100, 2), (90, 2), (110, 0), (10, 0)]);
        assert!(d.deserves(0, 8) && d.deserves(1, 8));
        // 110 is not half as much again as 90.
        assert!(!d.deserves(2, 8) && !d.deserves(3, 8));
        d.tunnels.get_mut(&2).unwrap().rate = 200;
        assert!(d.deserves(2, 8));
        // At its next rekey the quieter one gives way, and then it stays out.
        assert!(d.deserves(0, 8) && !d.deserves(1, 8));
        d.gave(1);
        d.gave(1);
        d.got(2);
        assert!(!d.deserves(1, 8) && d.deserves(2, 8));
    }

    #[test]
    fn loads_fade() {
        let mut d = demand(&[(1000, 0)]);
        d.tunnels.get_mut(&0).unwrap().now = 2000;
        d.end_pass();
        assert_eq!(d.tunnels[&0].rate, 1250);
        for _ in 0..40 {
            d.end_pass();
        }
        assert!(d.tunnels.is_empty(), "and are forgotten");
        // What has slots is remembered, however quiet, and whatever its number.
        d.got(u32::MAX);
        d.end_pass();
        assert_eq!(d.tunnels.len(), 1);
        d.gave(u32::MAX);
        d.end_pass();
        assert!(d.tunnels.is_empty());
    }
}
