//! What of the kernel's tables the configuration wants mirrored.

use std::io;

use control::kernel::{Foreign, Plan, PortLink, Settings, Sockets};
use sa_store::sa::Vrf;
use sa_store::store::Store;

use crate::config::{self, GatewayConfig, PortConfig, PortKind};

/// Opens the sockets, for which rights may be needed; `None` when nothing is to be mirrored. The routes of the
/// configuration are in the store.
pub(super) fn plan(config: &GatewayConfig, store: &Store) -> io::Result<Option<Plan>> {
    if !config.kernel.enabled() {
        return Ok(None);
    }
    let buffer = usize::try_from(config.kernel.receive_buffer).unwrap_or(usize::MAX);
    Ok(Some(Plan {
        settings: settings(config, store),
        sockets: Sockets::open(buffer)?,
    }))
}

fn settings(config: &GatewayConfig, store: &Store) -> Settings {
    let k = &config.kernel;
    let number = |port: usize| u16::try_from(port).unwrap_or(u16::MAX);
    Settings {
        routes: k.routes,
        neighbours: k.neighbours,
        addresses: k.addresses,
        foreign: match k.foreign {
            config::Foreign::Punt => Foreign::Punt,
            config::Foreign::Drop => Foreign::Drop,
        },
        tables: k.tables.clone(),
        vrfs: k.vrfs.iter().map(|(n, v)| (n.clone(), Vrf(*v))).collect(),
        ports: config
            .ports
            .iter()
            .enumerate()
            .map(|(i, p)| link(number(i), p))
            .collect(),
        wires: config
            .ports
            .iter()
            .filter_map(|p| match &p.kind {
                PortKind::Tap { interface } => Some(interface.clone()),
                _ => None,
            })
            .collect(),
        static_routes: store.current().fib.routes().to_vec(),
        static_locals: store.current().locals.list(),
        static_neighbours: config
            .neighbours
            .iter()
            .map(|n| (number(n.port), n.ip))
            .collect(),
    }
}

/// The kernel's side of a port: with af_xdp the interface itself, else its exception TAP. What is behind a port of kind
/// `tap` is this host as a neighbour, not the gateway.
fn link(port: u16, p: &PortConfig) -> PortLink {
    let interface = match &p.kind {
        PortKind::AfXdp { interface, .. } => Some(interface.clone()),
        _ => p.tap.clone(),
    };
    PortLink {
        port,
        interface,
        vlan: p.vlan,
        vrf: Vrf(p.vrf),
    }
}
