//! Tables, link addresses and states of ports, as the mirror has them, to the data path.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use sa_store::fib::{Fib, Neighbours, RouteTo};

use super::{BATCH, Follower, lock};
use crate::kernel::derive::{Settings, View};
use crate::kernel::model::Reach;

/// Neighbours that nobody needs are kept up to this many.
const SPARE: usize = 4096;

impl Follower {
    pub(super) fn publish(&mut self, now: Instant) {
        let due = self
            .dirty_since
            .is_some_and(|since| now >= since + BATCH && now >= self.publish_at);
        if !due || !self.mirror.is_complete() {
            return;
        }
        self.dirty_since = None;
        let began = Instant::now();
        let mut neighbours = self.fib.neighbours().clone();
        let mut fib = None;
        let mut locals = None;
        if std::mem::take(&mut self.routes_dirty) {
            self.neighbours_dirty = true;
            let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
            let wanted = view.wanted();
            self.routers = wanted
                .routes
                .iter()
                .filter_map(|r| match r.to {
                    RouteTo::Via { port, gateway } => Some((port, gateway)),
                    _ => None,
                })
                .collect();
            self.shared
                .published(&wanted, self.mirror.tables().routes.len());
            if wanted.locals != *self.locals {
                locals = Some(Arc::new(wanted.locals));
            }
            if wanted.routes != self.fib.routes() {
                prune(&mut neighbours, &self.settings, &view.neighbours());
                // Every length was checked when the message was read.
                match Fib::from_routes(wanted.routes, neighbours) {
                    Ok(built) => fib = Some(built),
                    Err(e) => tracing::error!(error = %e, "the kernel's routes cannot be built"),
                }
                neighbours = fib.as_ref().unwrap_or(&self.fib).neighbours().clone();
            }
        }
        let before = fib
            .as_ref()
            .map_or(self.fib.neighbours().len(), |f| f.neighbours().len());
        self.learn(&mut neighbours);
        if neighbours.len() != before {
            let base = fib.as_ref().unwrap_or(&self.fib);
            fib = Some(base.with_neighbours(neighbours));
        }
        self.ports();
        if fib.is_none() && locals.is_none() {
            return;
        }
        if let Some(fib) = fib {
            self.fib = Arc::new(fib);
        }
        if let Some(locals) = locals {
            self.locals = locals;
        }
        lock(&self.control).adopt(&self.fib, &self.locals);
        let took = began.elapsed();
        // A table that takes long to build must not take a whole CPU when routes keep changing.
        self.publish_at = Instant::now() + took;
        let mut status = self.shared.status();
        status.publications += 1;
        status.last_publish_micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    }

    /// Brings link addresses in line: at once for whoever has a number, with the next publication for the others.
    fn learn(&mut self, neighbours: &mut Neighbours) {
        if !std::mem::take(&mut self.neighbours_dirty) {
            return;
        }
        let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
        let reached = view.neighbours();
        for (port, addr) in self.known.keys() {
            if !reached.contains_key(&(*port, *addr))
                && let Some(hop) = neighbours.find(*port, *addr)
            {
                neighbours.forget(hop);
                // If it is a router, it is looked for at once.
                self.refreshed.remove(&(*port, *addr));
            }
        }
        self.known.clear();
        for ((port, addr), (_, reach)) in reached {
            let hop = neighbours.add(port, addr);
            neighbours.learn(hop, reach.mac);
            self.known.insert((port, addr), reach.mac);
        }
        self.shared.status().neighbours = self.known.len() as u64;
    }

    /// Tells of ports whose device has changed.
    fn ports(&mut self) {
        let view = View::new(&self.settings, self.mirror.tables(), &self.tunnels);
        let now: HashMap<u16, (bool, u32)> = view
            .ports()
            .map(|(port, link)| (port, (link.up && link.carrier, link.mtu)))
            .collect();
        if now == self.ports {
            return;
        }
        let before = std::mem::replace(&mut self.ports, now);
        let mut control = lock(&self.control);
        for (port, (up, mtu)) in &self.ports {
            let was = before.get(port);
            if was.map(|w| w.1) != Some(*mtu) {
                control.plane.set_mtu(*port, *mtu);
            }
            if was.is_some_and(|w| w.0 != *up) {
                let kind = if *up { "port_up" } else { "port_down" };
                control.events.note(kind, format!("port {port}"));
            }
        }
    }
}

/// Drops neighbours that nothing refers to any more, once there are many.
fn prune(
    neighbours: &mut Neighbours,
    settings: &Settings,
    reached: &BTreeMap<(u16, IpAddr), (u32, Reach)>,
) {
    if neighbours.len() <= SPARE.max(2 * reached.len()) {
        return;
    }
    neighbours.retain(|port, addr| {
        reached.contains_key(&(port, addr)) || settings.static_neighbours.contains(&(port, addr))
    });
}
