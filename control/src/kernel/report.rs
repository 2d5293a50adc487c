//! What `esplanade routes` and `esplanade neighbours` show.

use std::net::IpAddr;

use sa_store::fib::{Route, RouteTo};
use sa_store::runtime::mapped;
use sa_store::sa::Vrf;
use serde::{Deserialize, Serialize};

use super::derive::Origin;
use super::model::{TABLE_LOCAL, TABLE_MAIN};
use crate::core::Control;

/// How the mirror of the kernel's tables stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelStatus {
    /// Whether everything was read once.
    pub synced: bool,
    /// Times that everything that was asked for was read.
    pub syncs: u64,
    /// Seconds since 1970 of the last time.
    pub last_sync: u64,
    /// Milliseconds that it took.
    pub last_sync_millis: u64,
    /// Times that everything had to be read again.
    pub resyncs: u64,
    /// Times that the kernel's messages came faster than they were read.
    pub overruns: u64,
    /// Messages that were not understood.
    pub not_understood: u64,
    /// Routes that the kernel has.
    pub routes: u64,
    /// Prefixes whose route cannot be carried out here: their packets are dropped.
    pub refused: u64,
    /// Neighbours on ports.
    pub neighbours: u64,
    /// Addresses of the host.
    pub addresses: u64,
    /// Tables published.
    pub publications: u64,
    /// Microseconds from what was read to what was published, the last time.
    pub last_publish_micros: u64,
    /// Neighbours that the kernel was asked for.
    pub requests: u64,
    /// Requests that failed.
    pub requests_failed: u64,
}

/// Which routes are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteQuery {
    /// Only those of this VRF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vrf: Option<u16>,
    /// Only those that cover this address, the one that decides last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<IpAddr>,
    /// At most so many.
    #[serde(default = "most")]
    pub limit: usize,
}

fn most() -> usize {
    1000
}

/// Which neighbours are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeighbourQuery {
    /// At most so many.
    #[serde(default = "most")]
    pub limit: usize,
}

/// A path of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    /// VRF.
    pub vrf: u16,
    /// Prefix.
    pub to: String,
    /// `via 192.0.2.1 on "wan"`, `on "lan"`, `tunnel "berlin"`, `local`, `blackhole`.
    pub path: String,
    /// Share among the paths of the prefix.
    pub share: u32,
    /// `static`, or the kernel's table: `main`, `local`, a number.
    pub from: String,
    /// Who made it: `kernel`, `static`, `bgp`, … ; empty for those of the configuration.
    pub protocol: String,
    /// Metric.
    pub metric: u32,
}

/// Answer about routes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routes {
    /// How many paths there are.
    pub total: usize,
    /// Those that were asked for, as far as the limit goes.
    pub routes: Vec<RouteInfo>,
    /// Prefixes whose route cannot be carried out here, and why: the first of them.
    pub refused: Vec<String>,
    /// The mirror, when there is one.
    pub kernel: Option<KernelStatus>,
}

/// A neighbour.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighbourInfo {
    /// Port.
    pub port: String,
    /// Address.
    pub addr: IpAddr,
    /// Link address; absent while it is not known.
    pub mac: Option<String>,
    /// `static`, `kernel`.
    pub from: String,
}

impl Routes {
    /// Looks them up.
    pub(crate) fn of(c: &Control, query: &RouteQuery) -> Self {
        let snapshot = c.store.current();
        let all = snapshot.fib.routes();
        let published = c.kernel.as_ref().map(|k| k.0.origins());
        let origins = published.as_ref().map_or(&[][..], |p| &p.origins);
        let ports = c.plane.ports();
        let mut routes: Vec<RouteInfo> = Vec::new();
        let covers = |r: &Route| query.addr.is_none_or(|a| covers(r, a));
        for (i, r) in all.iter().enumerate() {
            if query.vrf.is_some_and(|v| v != r.vrf.0) || !covers(r) {
                continue;
            }
            let path = path(c, r.to, &|p| port_name(&ports, p));
            let (vrf, to) = (r.vrf.0, format!("{}/{}", r.addr, r.len));
            if let Some(last) = routes.last_mut()
                && (last.vrf, &last.to, &last.path) == (vrf, &to, &path)
            {
                last.share += 1;
                continue;
            }
            if routes.len() == query.limit {
                break;
            }
            let origin = origins.get(i).copied().unwrap_or_default();
            routes.push(RouteInfo {
                vrf,
                to,
                path,
                share: 1,
                from: table_name(origin.table),
                protocol: if origin.table == 0 {
                    String::new()
                } else {
                    protocol_name(origin.protocol)
                },
                metric: origin.metric,
            });
        }
        if query.addr.is_some() {
            routes.sort_by_key(|r| {
                let len = r.to.rsplit('/').next();
                len.and_then(|l| l.parse::<u8>().ok())
            });
        }
        Self {
            total: all.len(),
            routes,
            refused: published.map_or_else(Vec::new, |p| p.refused.clone()),
            kernel: c.kernel.as_ref().map(super::Handle::status),
        }
    }
}

impl NeighbourInfo {
    /// Looks them up.
    pub(crate) fn of(c: &Control, query: &NeighbourQuery) -> Vec<Self> {
        let snapshot = c.store.current();
        let ports = c.plane.ports();
        let settings = c.kernel.as_ref().map(|k| &k.0.settings);
        let is_static = |port, addr| {
            settings.is_none_or(|s| s.static_neighbours.contains(&(port, addr)) || !s.neighbours)
        };
        let mut list: Vec<Self> = snapshot
            .fib
            .neighbours()
            .iter()
            .map(|(port, addr, mac)| Self {
                port: port_name(&ports, port),
                addr,
                mac: mac.map(mac_text),
                from: if is_static(port, addr) {
                    "static"
                } else {
                    "kernel"
                }
                .into(),
            })
            .collect();
        list.sort_by(|a, b| (&a.port, a.addr).cmp(&(&b.port, b.addr)));
        list.truncate(query.limit);
        list
    }
}

/// Where the route that decides about a destination comes from, in words.
pub(crate) fn origin(c: &Control, vrf: Vrf, dst: IpAddr) -> Option<String> {
    let snapshot = c.store.current();
    let (addr, len) = snapshot.fib.prefix(vrf, mapped(dst))?;
    let at =
        snapshot.fib.routes().iter().position(|r| {
            r.vrf == vrf && r.len == len && super::derive::network(r.addr, len) == addr
        });
    let published = c.kernel.as_ref().map(|k| k.0.origins());
    let origin = at
        .and_then(|i| published.as_ref()?.origins.get(i).copied())
        .unwrap_or_default();
    Some(format!("{addr}/{len}, {}", origin_text(origin)))
}

fn origin_text(o: Origin) -> String {
    if o.table == 0 {
        return "of the configuration".into();
    }
    format!(
        "of the kernel's table {}, made by {}, metric {}",
        table_name(o.table),
        protocol_name(o.protocol),
        o.metric
    )
}

fn covers(r: &Route, addr: IpAddr) -> bool {
    r.addr.is_ipv4() == addr.is_ipv4()
        && super::derive::network(addr, r.len) == super::derive::network(r.addr, r.len)
}

fn path(c: &Control, to: RouteTo, port: &dyn Fn(u16) -> String) -> String {
    match to {
        RouteTo::Via { port: p, gateway } => format!("via {gateway} on \"{}\"", port(p)),
        RouteTo::OnLink { port: p } => format!("on \"{}\"", port(p)),
        RouteTo::Tunnel(t) => {
            let name = c.store.tunnels().get(t.0 as usize).map(|t| t.name.as_str());
            format!("tunnel \"{}\"", name.unwrap_or_default())
        }
        RouteTo::Local => "local".into(),
        RouteTo::Blackhole => "blackhole".into(),
    }
}

fn port_name(ports: &[crate::plane::PortReport], port: u16) -> String {
    ports
        .get(usize::from(port))
        .map_or_else(|| port.to_string(), |p| p.name.clone())
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn table_name(table: u32) -> String {
    match table {
        0 => "static".into(),
        TABLE_LOCAL => "local".into(),
        TABLE_MAIN => "main".into(),
        n => n.to_string(),
    }
}

/// Names of `/etc/iproute2/rt_protos`.
fn protocol_name(protocol: u8) -> String {
    let name = match protocol {
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        9 => "ra",
        11 => "zebra",
        12 => "bird",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        186 => "bgp",
        187 => "isis",
        188 => "ospf",
        189 => "rip",
        192 => "eigrp",
        n => return n.to_string(),
    };
    name.into()
}
