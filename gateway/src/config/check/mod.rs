//! Rules between values: names that refer to each other, settings that exclude each other.

mod airoha;
mod ports;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::decode::Decoded;
use super::engine;
use super::file::RouteTable;
use super::ike;
use super::port::PortConfig;
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
    let ike = ike::check(&decoded, problems);
    let mut c = Checker {
        d: &decoded,
        dir,
        problems,
    };
    c.sections();
    c.engines_without_seed();
    c.kernel();
    let ports = c.ports();
    c.blocks(ports.as_deref().unwrap_or_default(), &engines);
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
        kernel: f.kernel.clone(),
        sa_files: f.sa_files.iter().map(resolve).collect(),
        sas: f.sas.clone(),
        leases: super::Leases {
            path: resolve(&f.leases.path),
        },
        rekey: super::Rekey {
            hook: f.rekey.hook.as_ref().map(resolve),
            ..f.rekey.clone()
        },
        crypto: f.crypto.clone(),
        reassembly: f.reassembly.clone(),
        exception: f.exception.clone(),
        metrics: f.metrics.enabled.then_some(f.metrics.listen),
        metrics_max_sas: f.metrics.max_sas,
        api: f.api.enabled.then(|| super::Api {
            socket: resolve(&f.api.socket),
            ..f.api.clone()
        }),
        log: f.log.clone(),
        privileges: f.privileges.clone(),
        ike,
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

    fn rekey(&mut self) {
        let r = &self.d.file.rekey;
        let max = |key: &'static str, got: u64, least: u64, most: u64| {
            (!(least..=most).contains(&got)).then(|| {
                let what = format!("\"{key}\" is {got}; it must lie in {least} to {most}");
                (key, what)
            })
        };
        // A hook that is asked anew every moment, or runs for hours, is a mistake.
        let day = 86_400_000;
        let wrong = [
            max("jitter_percent", r.jitter_percent.into(), 0, 50),
            max("switch_delay_ms", r.switch_delay_ms.into(), 0, 600_000),
            max("overlap_ms", r.overlap_ms.into(), 0, day),
            max("quiet_ms", r.quiet_ms.into(), 0, day),
            max(
                "overlap_max_ms",
                r.overlap_max_ms.into(),
                r.overlap_ms.into(),
                7 * day,
            ),
            max("overdue_percent", r.overdue_percent.into(), 1, 100),
            max("hook_timeout_ms", r.hook_timeout_ms.into(), 10, 3_600_000),
            max("hook_parallel", r.hook_parallel.into(), 1, 64),
            max("retry_ms", r.retry_ms.into(), 10, day),
            max(
                "retry_max_ms",
                r.retry_max_ms.into(),
                r.retry_ms.into(),
                day,
            ),
        ];
        for (key, what) in wrong.into_iter().flatten() {
            self.wrong(&["rekey", key], what);
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
        self.rekey();
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
        self.require(
            (1..=1024).contains(&f.exception.per_round),
            &["exception", "per_round"],
            || {
                format!(
                    "\"per_round\" is {}; it must lie in 1 to 1024",
                    f.exception.per_round
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

    fn kernel(&mut self) {
        let f = &self.d.file;
        let k = &f.kernel;
        self.require(
            !(k.enabled() && f.test.seed.is_some()),
            &["test", "seed"],
            || "a run cannot be repeated where the kernel's tables take part in it".into(),
        );
        for (i, table) in k.tables.iter().enumerate() {
            let at = ["kernel", "tables", &i.to_string()];
            self.require(!matches!(table, 0 | 255), &at, || {
                format!("table {table} is not one to choose: 0 is none, 255 (local) is always used")
            });
            self.require(!k.tables.iter().take(i).any(|t| t == table), &at, || {
                format!("table {table} is listed twice")
            });
        }
        for name in k.vrfs.keys() {
            self.require(
                (1..16).contains(&name.len()),
                &["kernel", "vrfs", name],
                || format!("\"{name}\" is no name of a device: it has 1 to 15 characters"),
            );
        }
        self.require(
            (2048..=1 << 30).contains(&k.receive_buffer),
            &["kernel", "receive_buffer"],
            || {
                format!(
                    "\"receive_buffer\" is {}; it must lie in 2048 to 1073741824",
                    k.receive_buffer
                )
            },
        );
    }

    fn engines_without_seed(&mut self) {
        let f = &self.d.file;
        let both = f.test.seed.is_some() && !f.engine.is_empty();
        self.require(!both, &["test", "seed"], || {
            "a seed makes nonces repeat, so it is refused together with engines".into()
        });
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
