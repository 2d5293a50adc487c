//! From the kernel's tables, the configuration and the tunnels to what workers look up.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use sa_store::fib::{Route, RouteTo};
use sa_store::local::Locals;
use sa_store::runtime::TunnelIdx;
use sa_store::sa::Vrf;

use super::mirror::Tables;
use super::model::{
    Address, KernelHop, KernelRoute, Link, LinkKind, Reach, RouteKey, RouteKind, TABLE_LOCAL,
};

/// Refusals that are told in words; the others are only counted.
const TOLD: usize = 64;
/// Most shares of one prefix; larger weights are scaled down.
const MAX_SHARES: u32 = 256;

/// What becomes of destinations that the kernel reaches over interfaces that are not ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Foreign {
    /// The kernel gets them by the exception path, and forwards them if it is set up to.
    #[default]
    Punt,
    /// They are dropped.
    Drop,
}

/// A port and the interface by which the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortLink {
    /// The port's number.
    pub port: u16,
    /// Interface; `None` when the kernel has none for it.
    pub interface: Option<String>,
    /// Tag: then the kernel's VLAN device on the interface is meant.
    pub vlan: Option<u16>,
    /// The port's VRF.
    pub vrf: Vrf,
}

/// What is mirrored, and what stands beside it.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Routes are mirrored.
    pub routes: bool,
    /// Neighbours are mirrored, and the kernel is asked to resolve them.
    pub neighbours: bool,
    /// Addresses are mirrored.
    pub addresses: bool,
    /// Destinations beyond interfaces that are not ours.
    pub foreign: Foreign,
    /// The kernel's tables for VRF 0, beside the local one. At equal prefix length an earlier one wins.
    pub tables: Vec<u32>,
    /// Names of the kernel's VRF devices and the VRFs that their tables are here.
    pub vrfs: Vec<(String, Vrf)>,
    /// Ports.
    pub ports: Vec<PortLink>,
    /// Interfaces whose other side is a port: the kernel is a neighbour there, not this gateway.
    pub wires: Vec<String>,
    /// Routes of the configuration: they win at equal prefix length.
    pub static_routes: Vec<Route>,
    /// Addresses of the configuration.
    pub static_locals: Vec<(Vrf, IpAddr)>,
    /// Neighbours of the configuration: the kernel's word does not count for them.
    pub static_neighbours: Vec<(u16, IpAddr)>,
}

/// Where a route comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The kernel's table; 0: the configuration.
    pub table: u32,
    /// Number of the protocol that made it.
    pub protocol: u8,
    /// Metric.
    pub metric: u32,
}

/// What workers are to look up.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Routes.
    pub routes: Vec<Route>,
    /// Where each route comes from.
    pub origins: Vec<Origin>,
    /// Own addresses.
    pub locals: Locals,
    /// Prefixes whose route is not one that can be carried out here, and why; the first of them.
    pub refused: Vec<String>,
    /// How many there are.
    pub refusals: u64,
}

/// What a device is to the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Port(u16, Vrf),
    Tunnel(u32, Option<TunnelIdx>),
    Wire,
    Foreign(Vrf),
}

/// The kernel's devices as the gateway sees them.
pub struct View<'a> {
    settings: &'a Settings,
    tables: &'a Tables,
    devices: HashMap<u32, Device>,
}

impl<'a> View<'a> {
    /// Sorts devices. `tunnels` is by `if_id`.
    pub fn new(
        settings: &'a Settings,
        tables: &'a Tables,
        tunnels: &HashMap<u32, TunnelIdx>,
    ) -> Self {
        let devices = tables
            .links
            .iter()
            .map(|(index, link)| (*index, device(settings, tables, tunnels, link)))
            .collect();
        Self {
            settings,
            tables,
            devices,
        }
    }

    /// Neighbours on ports, with the kernel's name for them; those of the configuration are not among them.
    pub fn neighbours(&self) -> BTreeMap<(u16, IpAddr), (u32, Reach)> {
        let mut all = BTreeMap::new();
        if !self.settings.neighbours {
            return all;
        }
        for ((index, addr), reach) in &self.tables.neighbours {
            if let Some(Device::Port(port, _)) = self.devices.get(index)
                && !self.settings.static_neighbours.contains(&(*port, *addr))
            {
                all.insert((*port, *addr), (*index, *reach));
            }
        }
        all
    }

    /// The kernel's device for a port, when it is up.
    pub fn interface(&self, port: u16) -> Option<(u32, &Link)> {
        let found = self
            .devices
            .iter()
            .find(|(_, d)| matches!(d, Device::Port(p, _) if *p == port))?;
        let link = self.tables.links.get(found.0)?;
        link.up.then_some((*found.0, link))
    }

    /// The kernel's devices of ports.
    pub fn ports(&self) -> impl Iterator<Item = (u16, &Link)> {
        self.devices.iter().filter_map(|(index, d)| match d {
            Device::Port(port, _) => Some((*port, self.tables.links.get(index)?)),
            _ => None,
        })
    }

    /// Whether routes into tunnels depend on which tunnels there are.
    pub fn has_tunnels(&self) -> bool {
        self.devices
            .values()
            .any(|d| matches!(d, Device::Tunnel(..)))
    }

    /// Routes and addresses.
    pub fn wanted(&self) -> Wanted {
        let mut w = Wanted::default();
        let mut taken = HashSet::new();
        for r in &self.settings.static_routes {
            taken.insert((r.vrf, network(r.addr, r.len), r.len));
            w.add(*r, Origin::default());
        }
        let mut locals = self.settings.static_locals.clone();
        if self.settings.addresses {
            self.addresses(&mut w, &mut taken, &mut locals);
        }
        w.locals = Locals::new(locals);
        if self.settings.routes {
            let order = self.table_order();
            for (i, (table, vrf)) in order.iter().enumerate() {
                // Nothing is looked for behind the last table of a VRF.
                let last = !order.iter().skip(i + 1).any(|(_, v)| v == vrf);
                self.table(*table, *vrf, last, &mut w, &mut taken);
            }
        }
        w
    }

    /// Tables with their VRF, by precedence.
    fn table_order(&self) -> Vec<(u32, Vrf)> {
        let mut order = vec![(TABLE_LOCAL, Vrf(0))];
        order.extend(self.settings.tables.iter().map(|t| (*t, Vrf(0))));
        for link in self.tables.links.values() {
            if let LinkKind::Vrf { table } = link.kind
                && let Some((_, vrf)) = self.settings.vrfs.iter().find(|(n, _)| *n == link.name)
            {
                order.push((table, *vrf));
            }
        }
        let mut seen = HashSet::new();
        order.retain(|(table, _)| seen.insert(*table));
        order
    }

    fn addresses(
        &self,
        w: &mut Wanted,
        taken: &mut HashSet<(Vrf, IpAddr, u8)>,
        locals: &mut Vec<(Vrf, IpAddr)>,
    ) {
        for ((index, addr), Address { len, valid }) in &self.tables.addresses {
            if !valid || addr.is_loopback() {
                continue;
            }
            let (vrf, port) = match self.devices.get(index) {
                Some(Device::Port(port, vrf)) => (*vrf, Some(*port)),
                Some(Device::Tunnel(..)) => (Vrf(0), None),
                Some(Device::Foreign(vrf)) => (*vrf, None),
                Some(Device::Wire) | None => continue,
            };
            locals.push((vrf, *addr));
            let whole = if addr.is_ipv4() { 32 } else { 128 };
            let mut add = |addr: IpAddr, len: u8, to| {
                if taken.insert((vrf, addr, len)) {
                    let route = Route { vrf, addr, len, to };
                    let origin = Origin {
                        table: TABLE_LOCAL,
                        protocol: PROTOCOL_KERNEL,
                        metric: 0,
                    };
                    w.add(route, origin);
                }
            };
            add(*addr, whole, RouteTo::Local);
            // With routes, the kernel's own route to the network says more.
            if let (false, Some(port)) = (self.settings.routes, port)
                && *len < whole
                && !is_confined(*addr)
                && self.tables.links.get(index).is_some_and(|l| l.up)
            {
                add(network(*addr, *len), *len, RouteTo::OnLink { port });
            }
        }
    }

    fn table(
        &self,
        table: u32,
        vrf: Vrf,
        last: bool,
        w: &mut Wanted,
        taken: &mut HashSet<(Vrf, IpAddr, u8)>,
    ) {
        let first = RouteKey {
            table,
            addr: IpAddr::from([0; 4]),
            len: 0,
            metric: 0,
        };
        let mut all = self
            .tables
            .routes
            .range(first..)
            .take_while(|(k, _)| k.table == table)
            .peekable();
        let mut paths = Vec::new();
        while let Some((key, list)) = all.next() {
            let same = |k: &RouteKey| (k.addr, k.len) == (key.addr, key.len);
            let mut answer = self.usable(key, list, &mut paths);
            // Higher metrics of the same prefix follow.
            while let Some((worse, list)) = all.next_if(|(k, _)| same(k)) {
                if answer == Use::Skip {
                    answer = self.usable(worse, list, &mut paths);
                    if answer != Use::Skip {
                        self.take(worse, list, &answer, &paths, vrf, last, w, taken);
                        answer = Use::Done;
                    }
                }
            }
            if !matches!(answer, Use::Skip | Use::Done) {
                self.take(key, list, &answer, &paths, vrf, last, w, taken);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the loop above, cut in two")]
    fn take(
        &self,
        key: &RouteKey,
        list: &[KernelRoute],
        answer: &Use,
        paths: &[RouteTo],
        vrf: Vrf,
        last: bool,
        w: &mut Wanted,
        taken: &mut HashSet<(Vrf, IpAddr, u8)>,
    ) {
        let prefix = (vrf, key.addr, key.len);
        let free = if last {
            !taken.contains(&prefix)
        } else {
            taken.insert(prefix)
        };
        if !free {
            return;
        }
        let origin = Origin {
            table: key.table,
            protocol: list.first().map_or(0, |r| r.protocol),
            metric: key.metric,
        };
        let mut add = |to| {
            let route = Route {
                vrf,
                addr: key.addr,
                len: key.len,
                to,
            };
            w.add(route, origin);
        };
        match answer {
            Use::Paths => paths.iter().for_each(|to| add(*to)),
            Use::Refused(why) => {
                // Whatever the kernel would have done, it is not the next shorter prefix.
                add(RouteTo::Blackhole);
                w.refuse(key, why);
            }
            Use::Skip | Use::Done => {}
        }
    }

    /// What a route comes to: its paths are left in `paths`.
    fn usable(&self, key: &RouteKey, list: &[KernelRoute], paths: &mut Vec<RouteTo>) -> Use {
        paths.clear();
        let Some(route) = list.first() else {
            return Use::Skip;
        };
        if is_confined(key.addr) && key.len > 0 || key.addr.is_multicast() {
            return self.host_route(key, route, paths);
        }
        match route.kind {
            RouteKind::Local => self.host_route(key, route, paths),
            RouteKind::Drop | RouteKind::Broadcast => {
                paths.push(RouteTo::Blackhole);
                Use::Paths
            }
            RouteKind::Unicast => self.unicast(route, paths),
            RouteKind::Other(kind) => Use::Refused(format!("routes of type {kind} are not known")),
        }
    }

    /// Addresses of the host itself; networks that mean something only on their link are no routes here.
    fn host_route(&self, key: &RouteKey, route: &KernelRoute, paths: &mut Vec<RouteTo>) -> Use {
        let wire = |h: &KernelHop| self.devices.get(&h.oif) == Some(&Device::Wire);
        if route.kind != RouteKind::Local
            || key.addr.is_loopback()
            || key.addr.is_multicast()
            || route.hops.list().iter().any(wire)
        {
            return Use::Skip;
        }
        paths.push(RouteTo::Local);
        Use::Paths
    }

    fn unicast(&self, route: &KernelRoute, paths: &mut Vec<RouteTo>) -> Use {
        // Hops without a carrier are for when there is no other.
        let mut found: Vec<(RouteTo, u16, bool)> = Vec::new();
        let mut why = None;
        for hop in route.hops.list() {
            let Some(device) = self.devices.get(&hop.oif) else {
                continue;
            };
            let Some(link) = self.tables.links.get(&hop.oif).filter(|l| l.up) else {
                continue;
            };
            let to = match (device, hop.wrapped) {
                (Device::Wire, _) => continue,
                (_, true) => {
                    why = Some("its packets are to be wrapped by the kernel".to_owned());
                    continue;
                }
                (Device::Port(port, _), _) => match hop.via {
                    Some(gateway) => RouteTo::Via {
                        port: *port,
                        gateway,
                    },
                    None => RouteTo::OnLink { port: *port },
                },
                (Device::Tunnel(_, Some(tunnel)), _) => RouteTo::Tunnel(*tunnel),
                (Device::Tunnel(id, None), _) => {
                    why = Some(format!(
                        "no SA has if_id {id} of interface \"{}\"",
                        link.name
                    ));
                    continue;
                }
                (Device::Foreign(_), _) => match self.settings.foreign {
                    Foreign::Punt => RouteTo::Local,
                    Foreign::Drop => RouteTo::Blackhole,
                },
            };
            found.push((to, hop.weight, link.carrier));
        }
        if found.is_empty() {
            return why.map_or(Use::Skip, Use::Refused);
        }
        if found.iter().any(|(.., carrier)| *carrier) {
            found.retain(|(.., carrier)| *carrier);
        }
        share(&found, paths);
        Use::Paths
    }
}

/// Number of the protocol `kernel`.
const PROTOCOL_KERNEL: u8 = 2;

/// What a route comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Use {
    /// It is used.
    Paths,
    /// It is as if it were not there: all its devices are down.
    Skip,
    /// It cannot be carried out here.
    Refused(String),
    /// It has been used.
    Done,
}

impl Wanted {
    fn add(&mut self, route: Route, origin: Origin) {
        self.routes.push(route);
        self.origins.push(origin);
    }

    fn refuse(&mut self, key: &RouteKey, why: &str) {
        self.refusals += 1;
        if self.refused.len() < TOLD {
            self.refused
                .push(format!("{}/{}: {why}", key.addr, key.len));
        }
    }
}

fn device(
    settings: &Settings,
    tables: &Tables,
    tunnels: &HashMap<u32, TunnelIdx>,
    link: &Link,
) -> Device {
    for p in &settings.ports {
        let Some(wanted) = &p.interface else { continue };
        let is = match (p.vlan, &link.kind) {
            (None, _) => link.name == *wanted,
            (Some(tag), LinkKind::Vlan { parent, id }) => {
                *id == tag && tables.links.get(parent).is_some_and(|l| l.name == *wanted)
            }
            (Some(_), _) => false,
        };
        if is {
            return Device::Port(p.port, p.vrf);
        }
    }
    if settings.wires.contains(&link.name) {
        return Device::Wire;
    }
    if let LinkKind::Xfrm { if_id } = link.kind {
        return Device::Tunnel(if_id, tunnels.get(&if_id).copied());
    }
    let name = link
        .controller
        .and_then(|c| tables.links.get(&c))
        .map_or(&link.name, |c| &c.name);
    let vrf = settings.vrfs.iter().find(|(n, _)| n == name);
    Device::Foreign(vrf.map_or(Vrf(0), |(_, v)| *v))
}

/// Each path as often as its weight says, in lowest terms.
fn share(found: &[(RouteTo, u16, bool)], paths: &mut Vec<RouteTo>) {
    let gcd = found
        .iter()
        .fold(0, |a, (_, w, _)| gcd(a, u32::from((*w).max(1))));
    let reduced = |w: u16| u32::from(w.max(1)) / gcd.max(1);
    let sum: u32 = found.iter().map(|(_, w, _)| reduced(*w)).sum();
    for (to, weight, _) in found {
        let mut shares = reduced(*weight);
        if sum > MAX_SHARES {
            shares = (shares * MAX_SHARES / sum).max(1);
        }
        paths.extend((0..shares).map(|_| *to));
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether an address means nothing beyond its link or host.
fn is_confined(addr: IpAddr) -> bool {
    addr.is_loopback()
        || match addr {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        }
}

/// The network of an address.
pub(super) fn network(addr: IpAddr, len: u8) -> IpAddr {
    match addr {
        IpAddr::V4(a) => {
            let bits = 32_u32.saturating_sub(u32::from(len));
            IpAddr::V4((u32::from(a) & u32::MAX.checked_shl(bits).unwrap_or(0)).into())
        }
        IpAddr::V6(a) => {
            let bits = 128_u32.saturating_sub(u32::from(len));
            IpAddr::V6((u128::from(a) & u128::MAX.checked_shl(bits).unwrap_or(0)).into())
        }
    }
}

#[cfg(test)]
mod tests;
