//! Neighbours that the kernel is asked for, and tunnels behind its xfrm devices.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sa_store::runtime::TunnelIdx;

use super::{Follower, lock};
use crate::kernel::derive::View;

/// How often entries in use are looked after, and tunnels for xfrm devices.
const REFRESH: Duration = Duration::from_secs(1);
/// How often an entry that is stale, or a router that is unknown, is asked for.
const AGAIN: Duration = Duration::from_secs(20);
/// Most of them at a time.
const REFRESHED: usize = 64;

impl Follower {
    /// Neighbours that packets wait for.
    pub(super) fn requests(&mut self, now: Instant) {
        let wanted = std::mem::take(&mut *self.shared.requests());
        if wanted.is_empty() {
            return;
        }
        let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
        for (port, addr) in wanted {
            if let Some((index, link)) = view.interface(port) {
                self.nudger.ask(index, &link.name, addr, now);
            }
        }
    }

    /// Looks after entries in use: the kernel is to ask stale neighbours again, and for routers that it does not know. New
    /// tunnels are found for xfrm devices.
    pub(super) fn refresh(&mut self, now: Instant) {
        if now < self.refresh_at {
            return;
        }
        self.refresh_at = now + REFRESH;
        if !self.mirror.is_complete() {
            return;
        }
        self.find_tunnels(now);
        let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
        if !self.settings.neighbours {
            return;
        }
        self.refreshed
            .retain(|_, at| now.saturating_duration_since(*at) < AGAIN);
        let reached = view.neighbours();
        let routers = self
            .routers
            .iter()
            .filter(|r| !reached.contains_key(*r) && !self.settings.static_neighbours.contains(r));
        let stale = reached
            .iter()
            .filter(|(_, (_, reach))| reach.stale)
            .map(|(at, _)| at);
        let due: Vec<_> = routers
            .chain(stale)
            .filter(|at| !self.refreshed.contains_key(*at))
            .take(REFRESHED)
            .copied()
            .collect();
        for (port, addr) in due {
            // One that was asked for a moment ago, before it was forgotten, is asked for again with the next round.
            if let Some((index, link)) = view.interface(port)
                && self.nudger.ask(index, &link.name, addr, now)
            {
                self.refreshed.insert((port, addr), now);
            }
        }
    }

    fn find_tunnels(&mut self, now: Instant) {
        let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
        if !view.has_tunnels() {
            return;
        }
        let snapshot = lock(&self.control).store().current();
        if snapshot.epoch == self.epoch {
            return;
        }
        self.epoch = snapshot.epoch;
        let tunnels: HashMap<u32, TunnelIdx> = snapshot
            .sas
            .iter()
            .flatten()
            .filter(|e| e.spec.if_id.0 != 0)
            .map(|e| (e.spec.if_id.0, e.fixed.tunnel))
            .collect();
        if tunnels != self.tunnels {
            self.tunnels = tunnels;
            self.routes_dirty = true;
            self.dirty_since.get_or_insert(now);
        }
    }
}
