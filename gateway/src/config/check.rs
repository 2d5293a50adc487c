//! Rules between values: names that refer to each other, settings that exclude each other.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::decode::Decoded;
use super::engine;
use super::file::{AfXdpTable, PortTable, RouteTable};
use super::port::{Fault, Nic, PortConfig, PortKind, PortKindName, Repeat, Steer};
use super::problem::Problems;
use super::{GatewayConfig, NeighbourConfig, NextHop, RouteConfig};

/// Most workers: the owner of an SA is a 16-bit number, and one gateway needs no more.
const MAX_WORKERS: usize = 256;

/// Checks everything; `None` only together with problems.
pub(super) fn check(
    decoded: Decoded<'_>,
    path: &Path,
    problems: &mut Problems,
) -> Option<GatewayConfig> {
    let dir = path.parent().unwrap_or(Path::new("")).to_owned();
    let workers = decoded.file.workers.number();
    let engines = engine::check(&decoded, &dir, workers, problems);
    let mut c = Checker {
        d: &decoded,
        dir,
        problems,
    };
    c.sections();
    c.engines_without_seed();
    let ports = c.ports();
    let (routes, neighbours) = match &ports {
        Some(ports) => (c.routes(ports), c.neighbours(ports)),
        None => (Vec::new(), Vec::new()),
    };
    let f = &decoded.file;
    let resolve = |p: &PathBuf| path.parent().unwrap_or(Path::new("")).join(p);
    Some(GatewayConfig {
        file: path.to_owned(),
        workers: f.workers.clone(),
        memory: f.memory.clone(),
        ports: ports?,
        engines,
        routes,
        neighbours,
        sa_files: f.sa_files.iter().map(resolve).collect(),
        sas: f.sas.clone(),
        leases: super::Leases {
            path: resolve(&f.leases.path),
        },
        crypto: f.crypto.clone(),
        reassembly: f.reassembly.clone(),
        metrics: f.metrics.enabled.then_some(f.metrics.listen),
        metrics_max_sas: f.metrics.max_sas,
        api: f.api.enabled.then(|| super::Api {
            socket: resolve(&f.api.socket),
            ..f.api.clone()
        }),
        log: f.log.clone(),
        privileges: f.privileges.clone(),
        test_seed: f.test.seed,
    })
}

struct Checker<'a, 't> {
    d: &'a Decoded<'t>,
    dir: PathBuf,
    problems: &'a mut Problems,
}

impl Checker<'_, '_> {
    fn wrong(&mut self, path: &[&str], what: impl Into<String>) {
        self.problems.push(self.d.span(path), what);
    }

    fn require(&mut self, good: bool, path: &[&str], what: impl FnOnce() -> String) {
        if !good {
            self.wrong(path, what());
        }
    }

    fn sections(&mut self) {
        let f = &self.d.file;
        let w = &f.workers;
        self.require(
            !(w.count.is_some() && w.cpus.is_some()),
            &["workers", "count"],
            || "\"count\" and \"cpus\" exclude each other; the list says how many".into(),
        );
        self.require(
            (1..=MAX_WORKERS).contains(&w.number()),
            &["workers"],
            || format!("{} workers; there must be 1 to {MAX_WORKERS}", w.number()),
        );
        let mut cpus = w.cpus.clone().unwrap_or_default();
        cpus.sort_unstable();
        self.require(
            cpus.windows(2).all(|p| p[0] != p[1]),
            &["workers", "cpus"],
            || "a CPU is listed twice".into(),
        );
        self.require(
            (1..=1_000_000).contains(&w.spin_us),
            &["workers", "spin_us"],
            || format!("\"spin_us\" is {}; it must lie in 1 to 1000000", w.spin_us),
        );
        let m = &f.memory;
        self.require(
            (256..=1 << 24).contains(&m.frames),
            &["memory", "frames"],
            || format!("\"frames\" is {}; it must lie in 256 to 16777216", m.frames),
        );
        self.require(
            (1024..=65_472).contains(&m.stride) && m.stride.is_multiple_of(64),
            &["memory", "stride"],
            || {
                format!(
                    "\"stride\" is {}; it must be a multiple of 64 in 1024 to 65472",
                    m.stride
                )
            },
        );
        self.require(f.sas.max > 0, &["sas", "max"], || {
            "\"max\" must not be 0".into()
        });
        let known = crate::crypto::ProviderId::ALL.map(|p| p.name());
        if let Some(p) = &f.crypto.provider {
            self.require(known.contains(&p.as_str()), &["crypto", "provider"], || {
                format!("unknown provider \"{p}\"; one of {}", known.join(", "))
            });
        }
        if let Err(e) = f
            .crypto
            .objective
            .parse::<crate::engine::choice::Objective>()
        {
            self.wrong(&["crypto", "objective"], e.to_string());
        }
        let r = &f.reassembly;
        self.require(
            (1..=1 << 20).contains(&r.max_packets),
            &["reassembly", "max_packets"],
            || {
                format!(
                    "\"max_packets\" is {}; it must lie in 1 to 1048576",
                    r.max_packets
                )
            },
        );
        self.require(
            (10..=60_000).contains(&r.timeout_ms),
            &["reassembly", "timeout_ms"],
            || {
                format!(
                    "\"timeout_ms\" is {}; it must lie in 10 to 60000",
                    r.timeout_ms
                )
            },
        );
        let level = &f.log.level;
        if let Err(e) = level.parse::<tracing_subscriber::filter::targets::Targets>() {
            self.wrong(
                &["log", "level"],
                format!("\"{level}\" is no log filter: {e}"),
            );
        }
        self.require(
            f.privileges.group.is_none() || f.privileges.user.is_some(),
            &["privileges", "group"],
            || "\"group\" needs \"user\"".into(),
        );
    }

    fn engines_without_seed(&mut self) {
        let f = &self.d.file;
        let both = f.test.seed.is_some() && !f.engine.is_empty();
        self.require(!both, &["test", "seed"], || {
            "a seed makes nonces repeat, so it is refused together with engines".into()
        });
    }

    fn ports(&mut self) -> Option<Vec<PortConfig>> {
        if !self.d.ports_complete {
            return None;
        }
        let tables = &self.d.file.port;
        if tables.is_empty() {
            self.problems
                .push(None, "no [[port]]; a gateway needs at least one");
            return None;
        }
        let mut by_name: HashMap<&str, usize> = HashMap::new();
        for (i, t) in tables.iter().enumerate() {
            let at = i.to_string();
            let fine = (1..=32).contains(&t.name.len())
                && t.name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b));
            self.require(fine, &["port", &at, "name"], || {
                format!(
                    "\"{}\" is no name: 1 to 32 of the characters A-Z a-z 0-9 . _ : - are",
                    t.name
                )
            });
            if by_name.insert(&t.name, i).is_some() {
                self.wrong(
                    &["port", &at, "name"],
                    format!("there are two ports \"{}\"", t.name),
                );
            }
        }
        let ports: Vec<_> = tables
            .iter()
            .enumerate()
            .map(|(i, t)| self.port(i, t, &by_name))
            .collect();
        self.shared_interfaces(tables);
        ports.into_iter().collect()
    }

    fn port(
        &mut self,
        i: usize,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortConfig> {
        let at = i.to_string();
        for (key, given, of) in [
            ("af_xdp", t.af_xdp.is_some(), PortKindName::AfXdp),
            ("pcap", t.pcap.is_some(), PortKindName::Pcap),
            ("memory", t.memory.is_some(), PortKindName::Memory),
            (
                "vhost-user",
                t.vhost_user.is_some(),
                PortKindName::VhostUser,
            ),
            ("vfio", t.vfio.is_some(), PortKindName::Vfio),
        ] {
            self.require(!given || t.kind == of, &["port", &at, key], || {
                format!("\"{key}\" settings on a port of another kind")
            });
        }
        self.require(
            t.queues.is_none_or(|q| (1..=256).contains(&q)),
            &["port", &at, "queues"],
            || "\"queues\" must lie in 1 to 256".into(),
        );
        self.require(
            t.vlan.is_none_or(|v| (1..=4094).contains(&v)),
            &["port", &at, "vlan"],
            || "\"vlan\" must lie in 1 to 4094".into(),
        );
        let has_v6 = t.addresses.iter().any(|a| a.addr().is_ipv6());
        let least = if has_v6 { 1280 } else { 576 };
        self.require(
            t.mtu.is_none_or(|m| m >= least),
            &["port", &at, "mtu"],
            || format!("\"mtu\" must be at least {least}"),
        );
        let room = self.d.file.memory.stride.saturating_sub(192 + 64 + 18);
        self.require(
            u32::from(t.mtu.unwrap_or(0)) <= room,
            &["port", &at, "mtu"],
            || {
                format!(
                    "frames of {} bytes hold packets of {room}; raise memory.stride",
                    self.d.file.memory.stride
                )
            },
        );
        for (n, a) in t.addresses.iter().enumerate() {
            let n = n.to_string();
            let host = !(a.addr().is_unspecified() || a.addr().is_multicast());
            self.require(host, &["port", &at, "addresses", &n], || {
                format!("{a} is not the address of a host")
            });
        }
        if let Some(f) = &t.fault {
            self.fault(&at, f);
        }
        Some(PortConfig {
            name: t.name.clone(),
            side: t.side,
            kind: self.port_kind(&at, t, by_name)?,
            queues: t.queues,
            vlan: t.vlan,
            mac: t.mac,
            mtu: t.mtu,
            addresses: t.addresses.clone(),
            vrf: t.vrf,
            fault: t.fault.clone(),
        })
    }

    fn port_kind(
        &mut self,
        at: &str,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortKind> {
        let interface = t.interface.clone().unwrap_or_else(|| t.name.clone());
        let named = matches!(t.kind, PortKindName::AfXdp | PortKindName::Tap);
        let live = named || matches!(t.kind, PortKindName::VhostUser | PortKindName::Vfio);
        self.require(
            named || t.interface.is_none(),
            &["port", at, "interface"],
            || "\"interface\" is for af_xdp and tap ports".into(),
        );
        let short = (1..16).contains(&interface.len());
        let clean = !interface
            .bytes()
            .any(|b| b == b'/' || b.is_ascii_whitespace())
            && interface != "."
            && interface != "..";
        self.require(
            !named || (short && clean),
            &["port", at, "interface"],
            || {
                format!(
                    "\"{interface}\" is no interface name: 1 to 15 characters, no slash, no space"
                )
            },
        );
        let seeded = self.d.file.test.seed.is_some();
        self.require(!(live && seeded), &["test", "seed"], || {
            format!(
                "a seed makes nonces repeat, so it is refused with live ports such as \"{}\"",
                t.name
            )
        });
        match t.kind {
            PortKindName::AfXdp => {
                let x = t.af_xdp.clone().unwrap_or_default();
                self.require(
                    x.ring.is_power_of_two() && (64..=32_768).contains(&x.ring),
                    &["port", at, "af_xdp", "ring"],
                    || {
                        format!(
                            "\"ring\" is {}; it must be a power of two in 64 to 32768",
                            x.ring
                        )
                    },
                );
                self.require(
                    (1..=8).contains(&x.steer_udp_ports.len()),
                    &["port", at, "af_xdp", "steer_udp_ports"],
                    || "\"steer_udp_ports\" has 1 to 8 ports".into(),
                );
                Some(PortKind::AfXdp {
                    interface,
                    mode: x.mode,
                    ring: x.ring,
                    steer: steer(x),
                })
            }
            PortKindName::Tap => Some(PortKind::Tap { interface }),
            PortKindName::Pcap => {
                let p = t.pcap.clone().unwrap_or_default();
                self.require(
                    p.read.is_some() || p.repeat.is_none(),
                    &["port", at, "pcap", "loop"],
                    || "\"loop\" needs \"read\"".into(),
                );
                let repeat = match p.repeat {
                    Some(0) => Repeat::Forever,
                    n => Repeat::Times(n.unwrap_or(1)),
                };
                let resolve = |p: Option<PathBuf>| p.map(|p| self.dir.join(p));
                Some(PortKind::Pcap {
                    read: resolve(p.read),
                    write: resolve(p.write),
                    repeat,
                })
            }
            PortKindName::Memory => self.memory_port(at, t, by_name),
            PortKindName::VhostUser => self.vhost_user_port(at, t),
            PortKindName::Vfio => self.vfio_port(at, t),
        }
    }

    fn vhost_user_port(&mut self, at: &str, t: &PortTable) -> Option<PortKind> {
        let Some(v) = &t.vhost_user else {
            self.wrong(
                &["port", at],
                "a vhost-user port needs [port.vhost-user] with \"socket\"",
            );
            return None;
        };
        self.require(
            t.queues
                .is_none_or(|q| usize::from(q) <= pmd::virtio::vhost::MAX_PAIRS),
            &["port", at, "queues"],
            || {
                format!(
                    "a vhost-user port has at most {} queues",
                    pmd::virtio::vhost::MAX_PAIRS
                )
            },
        );
        let mode = u32::from_str_radix(&v.mode, 8).ok().filter(|m| *m <= 0o777);
        self.require(mode.is_some(), &["port", at, "vhost-user", "mode"], || {
            format!(
                "\"{}\" is no access mode; write for example \"0660\"",
                v.mode
            )
        });
        Some(PortKind::VhostUser {
            socket: self.dir.join(&v.socket),
            role: v.role,
            mode: mode?,
        })
    }

    fn memory_port(
        &mut self,
        at: &str,
        t: &PortTable,
        by_name: &HashMap<&str, usize>,
    ) -> Option<PortKind> {
        let Some(m) = &t.memory else {
            self.wrong(
                &["port", at],
                "a memory port needs [port.memory] with \"peer\"",
            );
            return None;
        };
        let Some(&peer) = by_name.get(m.peer.as_str()) else {
            self.wrong(
                &["port", at, "memory", "peer"],
                format!("there is no port \"{}\"", m.peer),
            );
            return None;
        };
        let other = self.d.file.port.get(peer)?;
        let back = other.memory.as_ref().is_some_and(|o| o.peer == t.name);
        self.require(
            back && other.name != t.name,
            &["port", at, "memory", "peer"],
            || {
                format!(
                    "port \"{}\" does not name \"{}\" as its peer",
                    m.peer, t.name
                )
            },
        );
        self.require(
            (64..=65_536).contains(&m.ring),
            &["port", at, "memory", "ring"],
            || format!("\"ring\" is {}; it must lie in 64 to 65536", m.ring),
        );
        Some(PortKind::Memory {
            peer,
            ring: usize::try_from(m.ring).unwrap_or(usize::MAX),
        })
    }

    fn vfio_port(&mut self, at: &str, t: &PortTable) -> Option<PortKind> {
        let Some(v) = &t.vfio else {
            self.wrong(
                &["port", at],
                "a vfio port needs [port.vfio] with \"device\"",
            );
            return None;
        };
        let address = pmd::device::pci::Address::parse(&v.device);
        self.require(address.is_some(), &["port", at, "vfio", "device"], || {
            format!("\"{}\" is no PCI address such as 0000:01:00.0", v.device)
        });
        for (key, ring) in [("rx_ring", v.rx_ring), ("tx_ring", v.tx_ring)] {
            let fine = ring.is_none_or(|n| n.is_power_of_two() && (32..=32_768).contains(&n));
            self.require(fine, &["port", at, "vfio", key], || {
                format!("\"{key}\" must be a power of two in 32 to 32768")
            });
        }
        Some(PortKind::Vfio(Nic {
            device: address?.to_string(),
            // The device knows its own address only.
            promiscuous: v.promiscuous || t.mac.is_some(),
            rx_ring: v.rx_ring,
            tx_ring: v.tx_ring,
            no_iommu: v.no_iommu,
            experimental: v.experimental,
        }))
    }

    fn fault(&mut self, at: &str, f: &Fault) {
        for (key, rate) in [
            ("drop", f.drop),
            ("duplicate", f.duplicate),
            ("reorder", f.reorder),
            ("flip", f.flip),
        ] {
            self.require(
                (0.0..=1.0).contains(&rate),
                &["port", at, "fault", key],
                || format!("\"{key}\" is a probability: 0.0 to 1.0"),
            );
        }
    }

    /// Ports may share an interface when each has its own tag.
    fn shared_interfaces(&mut self, tables: &[PortTable]) {
        let mut seen: HashMap<(&str, Option<u16>), &str> = HashMap::new();
        for (i, t) in tables.iter().enumerate() {
            let interface = match t.kind {
                PortKindName::AfXdp | PortKindName::Tap => {
                    t.interface.as_deref().unwrap_or(&t.name)
                }
                PortKindName::Vfio => match &t.vfio {
                    Some(v) => v.device.as_str(),
                    None => continue,
                },
                PortKindName::Pcap | PortKindName::Memory | PortKindName::VhostUser => continue,
            };
            if let Some(other) = seen.insert((interface, t.vlan), &t.name) {
                let at = i.to_string();
                let what = format!(
                    "interface {interface} is already port \"{other}\"; ports that share it need different \"vlan\""
                );
                self.wrong(&["port", &at], what);
            }
        }
    }

    fn routes(&mut self, ports: &[PortConfig]) -> Vec<RouteConfig> {
        let tables = &self.d.file.route;
        let mut seen = HashMap::new();
        let mut routes = Vec::new();
        for (i, t) in tables.iter().enumerate() {
            let at = i.to_string();
            if !t.to.is_network() {
                let network =
                    t.to.range()
                        .map(|r| r.first().to_string())
                        .unwrap_or_default();
                self.wrong(
                    &["route", &at, "to"],
                    format!("{} has host bits; write {network}/{}", t.to, t.to.len()),
                );
            }
            if seen.insert((t.vrf, t.to), i).is_some() {
                self.wrong(
                    &["route", &at, "to"],
                    format!("there are two routes to {}", t.to),
                );
            }
            if let Some(next) = self.next_hop(&at, t, ports) {
                routes.push(RouteConfig {
                    to: t.to,
                    vrf: t.vrf,
                    next,
                });
            }
        }
        routes
    }

    fn next_hop(&mut self, at: &str, t: &RouteTable, ports: &[PortConfig]) -> Option<NextHop> {
        let by_port = t.port.is_some() || t.via.is_some();
        if usize::from(by_port) + usize::from(t.tunnel.is_some()) + usize::from(t.blackhole) != 1 {
            self.wrong(
                &["route", at],
                "a route has exactly one of: \"port\" or \"via\", \"tunnel\", \"blackhole = true\"",
            );
            return None;
        }
        if let Some(tunnel) = &t.tunnel {
            return Some(NextHop::Tunnel(tunnel.clone()));
        }
        if t.blackhole {
            return Some(NextHop::Blackhole);
        }
        if let Some(via) = t.via
            && via.is_ipv4() != t.to.addr().is_ipv4()
        {
            self.wrong(
                &["route", at, "via"],
                format!("{via} is of another address family than {}", t.to),
            );
        }
        let port = match (&t.port, t.via) {
            (Some(name), _) => self.port_named(&["route", at, "port"], name, ports)?,
            (None, via) => {
                let found = via.and_then(|v| connected(v, t.vrf, ports));
                self.require(found.is_some(), &["route", at, "via"], || {
                    let via = via.map(|v| v.to_string()).unwrap_or_default();
                    format!(
                        "{via} is in no network of a port in VRF {}; add \"port\"",
                        t.vrf
                    )
                });
                found?
            }
        };
        Some(NextHop::Port { port, via: t.via })
    }

    fn neighbours(&mut self, ports: &[PortConfig]) -> Vec<NeighbourConfig> {
        let mut all = Vec::new();
        let mut seen = HashMap::new();
        for (i, t) in self.d.file.neighbour.iter().enumerate() {
            let at = i.to_string();
            let Some(port) = self.port_named(&["neighbour", &at, "port"], &t.port, ports) else {
                continue;
            };
            if seen.insert((port, t.ip), i).is_some() {
                self.wrong(
                    &["neighbour", &at, "ip"],
                    format!("there are two neighbours {} on port \"{}\"", t.ip, t.port),
                );
            }
            all.push(NeighbourConfig {
                ip: t.ip,
                mac: t.mac,
                port,
            });
        }
        all
    }

    fn port_named(&mut self, path: &[&str], name: &str, ports: &[PortConfig]) -> Option<usize> {
        let found = ports.iter().position(|p| p.name == name);
        self.require(found.is_some(), path, || {
            let known: Vec<_> = ports.iter().map(|p| p.name.as_str()).collect();
            format!(
                "there is no port \"{name}\"; the ports are {}",
                known.join(", ")
            )
        });
        found
    }
}

fn connected(via: IpAddr, vrf: u16, ports: &[PortConfig]) -> Option<usize> {
    ports
        .iter()
        .position(|p| p.vrf == vrf && p.addresses.iter().any(|a| a.contains(via)))
}

fn steer(x: AfXdpTable) -> Steer {
    Steer {
        udp_ports: x.steer_udp_ports,
        destinations: x.steer_destinations,
        all: x.steer_all,
    }
}
