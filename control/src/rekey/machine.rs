//! The order of steps of a rekey: a pure core. It is given facts and the time, and says what is to be done.
//!
//! ```text
//!            files name a successor
//!  steady ───────────────────────────▶ workers ──────────▶ peer ──────────────▶ switched ─────────▶ overlap ──▶ steady
//!    │ soft limit                      inbound SA is in,   every worker has it;  new SA sends; the   old inbound SAs
//!    ▼                                 old one sends on    the peer gets time    old one is unused   until it is quiet
//!  expired: ask for a successor,                                                 once all workers
//!  again and again; overdue: alarm                                               have seen it
//! ```
//!
//! Invariants, which `model` checks in every order of events: an inbound SA stays for as long as the peer may send on
//! it; no SA sends before the peer was given the time to install its own side, unless nothing else can send; the SA
//! that sends is never removed; there is one at a time.

use std::collections::{BTreeMap, BTreeSet};

use sa_store::runtime::TunnelIdx;

use super::Timing;
use super::terms::{Hold, Published, Step, View, Wanted, World};
use super::tunnel::{Moment, Phase, Tunnel, renew};

/// The rekeys of all tunnels.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    timing: Timing,
    tunnels: BTreeMap<TunnelIdx, Tunnel>,
    /// Tunnels that something is to be done for.
    active: BTreeSet<TunnelIdx>,
    /// Attempts under way.
    asked: BTreeSet<TunnelIdx>,
}

impl Machine {
    /// Nothing runs.
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            ..Self::default()
        }
    }

    /// Which SAs stay, and which one sends, when the files of a tunnel change. Nothing is changed by asking.
    pub fn hold(&self, tunnel: TunnelIdx, wanted: &Wanted) -> Hold {
        let mut hold = Hold::default();
        let Some(t) = self.tunnels.get(&tunnel) else {
            return hold;
        };
        // Without a successor that was the operator's word to stop.
        if wanted.inbound {
            hold.keep.extend(&wanted.dropped_in);
        }
        if let (Some(target), Some(sender)) = (wanted.target, t.sender)
            && target != Some(sender)
        {
            hold.sender = Some(sender);
            hold.keep
                .extend(wanted.dropped_out.iter().filter(|sa| **sa == sender));
        }
        hold
    }

    /// The files of a tunnel were published as `epoch`.
    pub fn published(&mut self, tunnel: TunnelIdx, p: &Published, epoch: u64) {
        let none = p.inbound.is_empty() && p.outbound.is_empty() && p.held.is_empty();
        if none && self.tunnels.get(&tunnel).is_none_or(|t| t.wish.is_none()) {
            self.tunnels.remove(&tunnel);
            self.active.remove(&tunnel);
            return;
        }
        if none {
            // What it wished for is taken back with the next step, and it is gone then.
            self.active.insert(tunnel);
        }
        let t = self.tunnels.entry(tunnel).or_default();
        let changed_in = renew(&mut t.inbound, &p.inbound, &p.held, true);
        let changed_out = renew(&mut t.outbound, &p.outbound, &p.held, false);
        let retarget = t.target != p.target;
        t.target = p.target;
        t.sender = p.sender;
        if t.target == t.sender {
            // Old SAs still wait for the workers.
            if t.inbound.iter().chain(&t.outbound).any(|h| !h.wanted) {
                let grace = self.timing.switch_delay;
                t.phase = Phase::Switched { epoch, grace };
            } else {
                t.phase = Phase::Steady;
            }
        } else if retarget || changed_in || t.phase == Phase::Steady {
            t.phase = Phase::Workers { epoch };
        }
        if retarget || changed_in || changed_out || t.phase != Phase::Steady {
            self.active.insert(tunnel);
        }
    }

    /// Something about the tunnel's SAs has changed: it is looked at with the next step.
    pub fn attend(&mut self, tunnel: TunnelIdx) {
        if self.tunnels.contains_key(&tunnel) {
            self.active.insert(tunnel);
        }
    }

    /// An attempt to fetch a successor is over.
    pub fn answered(&mut self, tunnel: TunnelIdx, now: u64) {
        self.asked.remove(&tunnel);
        if let Some(w) = self.tunnels.get_mut(&tunnel).and_then(|t| t.wish.as_mut()) {
            w.next = now.saturating_add(self.timing.back_off(w.attempts));
        }
    }

    /// What is to be done at `now`, when every worker has publication `acknowledged`. Switches and removals are taken
    /// for published as `epoch`.
    pub fn step(
        &mut self,
        now: u64,
        acknowledged: u64,
        epoch: u64,
        world: &dyn World,
    ) -> Vec<Step> {
        let at = Moment {
            timing: &self.timing,
            now,
            acknowledged,
            epoch,
            world,
        };
        let mut steps = Vec::new();
        let tunnels = &mut self.tunnels;
        let asked = &mut self.asked;
        let mut due = Vec::new();
        self.active.retain(|&tunnel| {
            let Some(t) = tunnels.get_mut(&tunnel) else {
                return false;
            };
            t.advance(tunnel, &at, &mut steps);
            t.remove_old(tunnel, &at, &mut steps);
            t.renew_wish(tunnel, &at, &mut steps);
            if let Some(w) = t.wish.filter(|w| now >= w.next && !asked.contains(&tunnel)) {
                due.push((!w.overdue, w.next, tunnel));
            }
            let gone = t.is_gone();
            let rests = t.rests();
            if gone {
                tunnels.remove(&tunnel);
            }
            !rests
        });
        // Where the attempts are fewer than the tunnels that wait: the overdue first, then by how long they wait.
        let room = at.timing.attempts_at_once.saturating_sub(asked.len());
        due.sort_unstable();
        for (_, _, tunnel) in due.into_iter().take(room) {
            let wish = tunnels.get_mut(&tunnel).and_then(|t| t.wish.as_mut());
            if let Some(wish) = wish {
                wish.ask(tunnel, &mut steps);
                asked.insert(tunnel);
            }
        }
        steps
    }

    /// A tunnel's rekey.
    pub fn view(&self, tunnel: TunnelIdx) -> View {
        let Some(t) = self.tunnels.get(&tunnel) else {
            return View::STEADY;
        };
        let overlaps = t.inbound.iter().any(|i| !i.wanted);
        let state = match (t.phase, &t.wish) {
            (Phase::Workers { .. }, _) => "workers",
            (Phase::Peer { .. }, _) => "peer",
            (_, Some(w)) if w.overdue => "overdue",
            (_, Some(_)) => "expired",
            (Phase::Switched { .. }, _) => "switched",
            (Phase::Steady, None) if overlaps => "overlap",
            (Phase::Steady, None) => "steady",
        };
        View {
            state,
            reason: t.wish.map(|w| w.reason),
            attempts: t.wish.map_or(0, |w| w.attempts),
        }
    }

    /// Whether the tunnel's successor is overdue.
    pub fn is_overdue(&self, tunnel: TunnelIdx) -> bool {
        let wish = self.tunnels.get(&tunnel).and_then(|t| t.wish);
        wish.is_some_and(|w| w.overdue)
    }

    /// The tunnel's state with times as distances from `now`, none beyond `far`, and publications as acknowledged or
    /// not: equal ones have equal futures.
    #[cfg(test)]
    pub(super) fn fingerprint(&self, tunnel: TunnelIdx, now: u64, seen: u64, far: u64) -> String {
        let Some(t) = self.tunnels.get(&tunnel) else {
            return String::new();
        };
        let phase = match t.phase {
            Phase::Steady => (0, 0),
            Phase::Workers { epoch } => (1, u64::from(seen >= epoch)),
            Phase::Peer { until } => (2, until.saturating_sub(now)),
            Phase::Switched { epoch, grace } => (3, 2 * grace + u64::from(seen >= epoch)),
        };
        let age =
            |at: Option<u64>| at.map(|a| (now.saturating_sub(a).min(far), a.saturating_sub(now)));
        let list = |l: &[super::tunnel::Held]| -> Vec<_> {
            l.iter()
                .map(|h| (h.sa.index, h.wanted, age(h.since)))
                .collect()
        };
        let wish = t.wish.map(|w| {
            (
                w.sa,
                w.overdue,
                w.attempts.min(4),
                w.next.saturating_sub(now),
            )
        });
        format!(
            "{phase:?}{:?}{:?}{:?}{:?}{wish:?}{}",
            list(&t.inbound),
            list(&t.outbound),
            t.sender,
            t.target,
            self.active.contains(&tunnel)
        )
    }

    /// Tunnels with SAs of files.
    pub fn tunnels(&self) -> impl Iterator<Item = TunnelIdx> {
        self.tunnels.keys().copied()
    }

    /// Tunnels that are not at rest.
    pub fn active(&self) -> usize {
        self.active.len()
    }
}
