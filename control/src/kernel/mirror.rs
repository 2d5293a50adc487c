//! The kernel's tables as they are told: a dump, and what changes while it runs and after it.
//!
//! Dump and changes come through one socket, in the order in which the kernel made them. While a dump runs, a second
//! copy of what it dumps is built from nothing: by the parts of the dump, which know a whole entry, and by the changes.
//! The first copy follows the changes too and stays in use; the second takes its place when the dump is complete, so
//! that what the dump did not show is gone.
//!
//! Where a change cannot be understood alone (a route is removed that is not known so), or a part of a dump and a change that came
//! before it contradict each other, another dump is asked for. The kernel itself tells not all: it removes IPv4 routes
//! silently with their device and with their preferred source address, so these ask for a dump, too.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use super::model::{
    Address, Change, Class, Hops, KernelRoute, Link, LinkKind, Reach, RouteKey, RouteKind, Update,
};

/// Everything that is mirrored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// Devices by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses by device.
    pub addresses: BTreeMap<(u32, IpAddr), Address>,
    /// Neighbours that can be used, by device.
    pub neighbours: BTreeMap<(u32, IpAddr), Reach>,
    /// Routes. Several with one key are in the kernel's order: it uses the first.
    pub routes: BTreeMap<RouteKey, Vec<KernelRoute>>,
}

/// Tables and the dump that runs.
#[derive(Debug, Default)]
pub struct Mirror {
    tables: Tables,
    dump: Option<Dump>,
    wanted: BTreeSet<Class>,
    seen: BTreeSet<Class>,
    changed: Changed,
}

/// What has changed since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Links, addresses or routes.
    pub routes: bool,
    /// Neighbours.
    pub neighbours: bool,
}

#[derive(Debug)]
struct Dump {
    class: Class,
    next: Tables,
    /// What changed while the dump runs.
    touched: HashSet<Subject>,
    /// The route that the dump showed last.
    last: Option<RouteKey>,
    doubtful: bool,
}

/// What an update is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Subject {
    Link(u32),
    Address(u32, IpAddr),
    Neighbour(u32, IpAddr),
    Route(RouteKey),
}

fn subject(update: &Update) -> Subject {
    match update {
        Update::Link(index, _) | Update::LinkGone(index) => Subject::Link(*index),
        Update::Address(index, addr, _) | Update::AddressGone(index, addr) => {
            Subject::Address(*index, *addr)
        }
        Update::Neighbour(index, addr, _) | Update::NeighbourGone(index, addr) => {
            Subject::Neighbour(*index, *addr)
        }
        Update::Route(key, ..) | Update::RouteGone(key, _) => Subject::Route(*key),
    }
}

/// A change could not be understood alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt(bool);

impl Mirror {
    /// The tables as far as they are known.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Whether every class was dumped once.
    pub fn is_complete(&self) -> bool {
        self.seen.len() == Class::ALL.len()
    }

    /// What has changed since the last call.
    pub fn take_changed(&mut self) -> Changed {
        std::mem::take(&mut self.changed)
    }

    /// The dump that runs.
    pub fn dumping(&self) -> Option<Class> {
        self.dump.as_ref().map(|d| d.class)
    }

    /// The next dump to make.
    pub fn wanted(&self) -> Option<Class> {
        self.wanted.first().copied()
    }

    /// Whether a dump of the class is to be made.
    pub fn wants(&self, class: Class) -> bool {
        self.wanted.contains(&class)
    }

    /// Asks for dumps of everything: changes were lost. A dump that runs is worth nothing any more.
    pub fn lose(&mut self) {
        self.dump = None;
        self.wanted.extend(Class::ALL);
    }

    /// Asks for a dump.
    pub fn want(&mut self, class: Class) {
        self.wanted.insert(class);
    }

    /// A dump was asked for: its parts follow.
    pub fn begin(&mut self, class: Class) {
        self.wanted.remove(&class);
        self.dump = Some(Dump {
            class,
            next: Tables::default(),
            touched: HashSet::new(),
            last: None,
            doubtful: false,
        });
    }

    /// A part of the dump that runs.
    pub fn dumped(&mut self, update: Update) {
        let Some(dump) = &mut self.dump else { return };
        if update.class() != dump.class {
            return;
        }
        match update {
            Update::Route(key, route, _) => dump.route(key, route),
            other => {
                // Filled before the change, or changed again since: another dump tells.
                if dump.touched.contains(&subject(&other)) && !dump.next.knows(&other) {
                    dump.doubtful = true;
                }
                dump.next.apply(&other);
            }
        }
    }

    /// The dump is complete. `interrupted`: the kernel says that something changed meanwhile and the dump may not show it.
    pub fn end(&mut self, interrupted: bool) {
        let Some(dump) = self.dump.take() else { return };
        if interrupted || dump.doubtful {
            self.wanted.insert(dump.class);
        }
        self.seen.insert(dump.class);
        let (now, next) = (&mut self.tables, dump.next);
        let changed = &mut self.changed;
        match dump.class {
            Class::Links => replace(&mut now.links, next.links, &mut changed.routes),
            Class::Addresses => replace(&mut now.addresses, next.addresses, &mut changed.routes),
            Class::Neighbours => {
                replace(
                    &mut now.neighbours,
                    next.neighbours,
                    &mut changed.neighbours,
                );
            }
            Class::Routes4 | Class::Routes6 => {
                let v6 = dump.class == Class::Routes6;
                let of_class = |k: &RouteKey| k.addr.is_ipv6() == v6;
                let mut next = next.routes;
                let before = now.routes.iter().filter(|(k, _)| of_class(k));
                if !before.eq(next.iter()) {
                    changed.routes = true;
                    now.routes.retain(|k, _| !of_class(k));
                    now.routes.append(&mut next);
                }
            }
        }
    }

    /// The dump that runs cannot be completed; it is asked for again.
    pub fn abort(&mut self) {
        if let Some(dump) = self.dump.take() {
            self.wanted.insert(dump.class);
        }
    }

    /// A change.
    pub fn event(&mut self, update: Update) {
        let class = update.class();
        if let Some(dump) = self.dump.as_mut().filter(|d| d.class == class) {
            dump.touched.insert(subject(&update));
            dump.next.apply(&update);
        }
        if self.tables.knows(&update) {
            return;
        }
        self.silent(&update);
        let changed = match class {
            Class::Neighbours => &mut self.changed.neighbours,
            _ => &mut self.changed.routes,
        };
        *changed = true;
        let Doubt(doubt) = self.tables.apply(&update);
        // Before the first dump nothing is known, so nothing can be missing.
        if doubt && self.seen.contains(&class) {
            self.wanted.insert(class);
        }
    }

    /// What goes away with this without being told.
    fn silent(&mut self, update: &Update) {
        let routes = [Class::Routes4, Class::Routes6];
        match update {
            Update::LinkGone(_) => {
                self.wanted.extend(routes);
                self.wanted.extend([Class::Addresses, Class::Neighbours]);
            }
            Update::Link(index, link) => {
                let before = self.tables.links.get(index);
                if before.is_some_and(|b| b.up && !link.up || b.controller != link.controller) {
                    self.wanted.extend(routes);
                }
            }
            Update::AddressGone(_, addr) if addr.is_ipv4() => {
                self.wanted.insert(Class::Routes4);
            }
            _ => {}
        }
    }
}

fn replace<K: Ord, V: PartialEq>(
    now: &mut BTreeMap<K, V>,
    next: BTreeMap<K, V>,
    changed: &mut bool,
) {
    if *now != next {
        *changed = true;
        *now = next;
    }
}

impl Dump {
    /// A part of a dump is all that there is about its key at that moment: the first of a key replaces what changes
    /// have left there.
    fn route(&mut self, key: RouteKey, route: KernelRoute) {
        let list = self.next.routes.entry(key).or_default();
        if self.last.replace(key) == Some(key) {
            if !list.iter().any(|r| r.same(&route)) {
                list.push(route);
            }
            return;
        }
        if self.touched.contains(&Subject::Route(key))
            && !list.first().is_some_and(|r| r.same(&route))
        {
            self.doubtful = true;
        }
        list.clear();
        list.push(route);
    }
}

impl Tables {
    /// Whether the update says nothing new. Of routes it cannot be said: their order matters.
    fn knows(&self, update: &Update) -> bool {
        match update {
            Update::Link(index, link) => self.links.get(index) == Some(link),
            Update::LinkGone(index) => !self.links.contains_key(index),
            Update::Address(index, addr, a) => self.addresses.get(&(*index, *addr)) == Some(a),
            Update::AddressGone(index, addr) => !self.addresses.contains_key(&(*index, *addr)),
            Update::Neighbour(index, addr, reach) => {
                self.neighbours.get(&(*index, *addr)) == reach.as_ref()
            }
            Update::NeighbourGone(index, addr) => !self.neighbours.contains_key(&(*index, *addr)),
            Update::Route(..) | Update::RouteGone(..) => false,
        }
    }

    fn apply(&mut self, update: &Update) -> Doubt {
        match update {
            Update::Link(index, link) => {
                self.links.insert(*index, link.clone());
            }
            Update::LinkGone(index) => {
                self.links.remove(index);
                for link in self.links.values_mut() {
                    if link.controller == Some(*index) {
                        link.controller = None;
                    }
                    if matches!(link.kind, LinkKind::Vlan { parent, .. } if parent == *index) {
                        link.up = false;
                    }
                }
            }
            Update::Address(index, addr, address) => {
                self.addresses.insert((*index, *addr), *address);
            }
            Update::AddressGone(index, addr) => {
                self.addresses.remove(&(*index, *addr));
            }
            Update::Neighbour(index, addr, Some(reach)) => {
                self.neighbours.insert((*index, *addr), *reach);
            }
            Update::Neighbour(index, addr, None) | Update::NeighbourGone(index, addr) => {
                self.neighbours.remove(&(*index, *addr));
            }
            Update::Route(key, route, change) => {
                let list = self.routes.entry(*key).or_default();
                return learn(list, route, *change, key.addr.is_ipv6());
            }
            Update::RouteGone(key, route) => {
                let Some(list) = self.routes.get_mut(key) else {
                    return Doubt(false);
                };
                let doubt = forget(list, route, key.addr.is_ipv6());
                if list.is_empty() {
                    self.routes.remove(key);
                }
                return doubt;
            }
        }
        Doubt(false)
    }
}

fn learn(list: &mut Vec<KernelRoute>, route: &KernelRoute, change: Change, v6: bool) -> Doubt {
    if let Some(i) = list.iter().position(|r| r.same(route)) {
        list[i].protocol = route.protocol;
        // Told before, unless it has taken the place of another.
        return Doubt(change == Change::Replace && i != 0);
    }
    if change == Change::Replace
        && let Some(first) = list.first_mut()
    {
        *first = route.clone();
        return Doubt(list.len() > 1);
    }
    // The kernel makes one IPv6 route of several with the same key and a router each, and tells it as a whole.
    if v6 && let Some(grown) = list.iter_mut().find(|r| covers(route, r)) {
        *grown = route.clone();
        return Doubt(list.len() > 1);
    }
    if change == Change::Append || v6 {
        list.push(route.clone());
    } else {
        list.insert(0, route.clone());
    }
    Doubt(v6 && list.len() > 1)
}

fn forget(list: &mut Vec<KernelRoute>, route: &KernelRoute, v6: bool) -> Doubt {
    if let Some(i) = list.iter().position(|r| r.same(route)) {
        list.remove(i);
        return Doubt(false);
    }
    // Single next hops of an IPv6 route come and go.
    if v6 && let Some(i) = list.iter().position(|r| covers(r, route)) {
        let gone = route.hops.list();
        let left: Vec<_> = list[i]
            .hops
            .list()
            .iter()
            .filter(|h| !gone.iter().any(|g| (g.oif, g.via) == (h.oif, h.via)))
            .copied()
            .collect();
        if left.is_empty() {
            list.remove(i);
        } else {
            list[i].hops = Hops::new(&left);
        }
        return Doubt(false);
    }
    Doubt(!list.is_empty())
}

/// Whether `whole` has every next hop of `part`. Weights of IPv6 next hops are told only with the whole.
fn covers(whole: &KernelRoute, part: &KernelRoute) -> bool {
    whole.kind == RouteKind::Unicast
        && part.kind == RouteKind::Unicast
        && part.hops.list().iter().all(|p| {
            p.via.is_some()
                && whole
                    .hops
                    .list()
                    .iter()
                    .any(|w| (w.oif, w.via) == (p.oif, p.via))
        })
        && !part.hops.list().is_empty()
}

#[cfg(test)]
mod tests;
