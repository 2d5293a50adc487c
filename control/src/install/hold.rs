//! What stays for a while although the files do not name it any more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sa_store::runtime::{SaEntry, TunnelIdx, mapped};
use sa_store::sa::{Direction, SaId};
use sa_store::store::Store;

use super::plan::{How, Plan};
use super::{Order, Roster};
use crate::rekey::machine::Machine;
use crate::rekey::terms::{Published, Wanted};

/// SAs that stay, and tunnels that go on with another sender than the files name.
#[derive(Default)]
pub(super) struct Holding {
    pub(super) keep: HashSet<SaId>,
    pub(super) senders: HashMap<TunnelIdx, SaId>,
}

impl Holding {
    /// Asks the machine about every tunnel that loses an SA or is to send on another.
    pub(super) fn new(
        machine: &Machine,
        plan: &Plan<'_>,
        order: &Order<'_>,
        store: &Store,
    ) -> Self {
        let gone_at_once = replaced(plan);
        let mut tunnels: HashMap<&str, Wanted> = HashMap::new();
        let running: HashMap<&str, SaId> = plan
            .kept
            .iter()
            .map(|e| (e.spec.name.as_str(), e.fixed.id))
            .collect();
        for spec in &order.sas {
            let t = tunnels.entry(&spec.tunnel).or_default();
            match spec.direction {
                Direction::In => t.inbound = true,
                Direction::Out => t.target = Some(running.get(spec.name.as_str()).copied()),
            }
        }
        for e in &plan.dropped {
            let Some(t) = tunnels.get_mut(e.spec.tunnel.as_str()) else {
                continue;
            };
            match e.fixed.direction {
                _ if gone_at_once.contains(&e.fixed.id) => {}
                Direction::In => t.dropped_in.push(e.fixed.id),
                Direction::Out => t.dropped_out.push(e.fixed.id),
            }
        }
        let mut all = Self::default();
        for (name, wanted) in tunnels {
            let Some(idx) = store.find_tunnel(name) else {
                continue;
            };
            let hold = machine.hold(idx, &wanted);
            all.keep.extend(hold.keep);
            if let Some(sender) = hold.sender
                && !gone_at_once.contains(&sender)
            {
                all.senders.insert(idx, sender);
            }
        }
        all
    }
}

/// SAs that cannot stay: their key or their place in the SAD is the successor's.
fn replaced(plan: &Plan<'_>) -> HashSet<SaId> {
    let mut places = HashSet::new();
    let mut gone = HashSet::new();
    for w in &plan.wanted {
        if let How::Heir(old) = &w.how {
            gone.insert(old.fixed.id);
        }
        if w.spec.direction == Direction::In {
            places.insert((w.spec.spi.value(), mapped(w.spec.dst), w.spec.vrf));
        }
    }
    let taken = |e: &&Arc<SaEntry>| {
        e.fixed.direction == Direction::In
            && places.contains(&(e.fixed.spi, e.fixed.dst, e.fixed.vrf))
    };
    gone.extend(plan.dropped.iter().filter(taken).map(|e| e.fixed.id));
    gone
}

/// Tells the machine what runs now.
pub(super) fn publish(
    machine: &mut Machine,
    order: &Order<'_>,
    roster: &Roster,
    store: &mut Store,
    epoch: u64,
) {
    let snapshot = store.current();
    let mut tunnels: HashMap<TunnelIdx, Published> = HashMap::new();
    // Tunnels without an SA too: their last one may have gone.
    for name in &order.tunnels {
        tunnels.insert(store.tunnel(name), Published::default());
    }
    for spec in &order.sas {
        let Some(e) = roster.get(&spec.name) else {
            continue;
        };
        let p = tunnels.entry(e.fixed.tunnel).or_default();
        match e.fixed.direction {
            Direction::In => p.inbound.push(e.fixed.id),
            Direction::Out => {
                p.outbound.push(e.fixed.id);
                p.target = Some(e.fixed.id);
            }
        }
    }
    for e in roster.held() {
        tunnels
            .entry(e.fixed.tunnel)
            .or_default()
            .held
            .push(e.fixed.id);
    }
    let gone: Vec<TunnelIdx> = machine
        .tunnels()
        .filter(|t| !tunnels.contains_key(t))
        .collect();
    for (idx, mut p) in tunnels {
        p.sender = snapshot.outbound(idx).map(|e| e.fixed.id);
        machine.published(idx, &p, epoch);
    }
    for idx in gone {
        machine.published(idx, &Published::default(), epoch);
    }
}
