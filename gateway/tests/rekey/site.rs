//! A gateway with its control thread.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;

use control::core::Parts;
use control::plane::WorkerView;
use control::run::{Options, Running, start};
use gateway::app::{AssemblyConfig, OpenPort, Plane, PlaneParts, PortView, assemble};
use gateway::crypto::select::Selection;
use gateway::engine::Park;
use gateway::worker::{Crew, PortSetup, Side};
use pmd::capture::Capture;
use pmd::memory::MemoryPort;
use pmd::{Arena, Port};
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::lease::{LeaseStore, LeaseWriter};
use sa_store::ledger::{Balance, WorkerCounters};
use sa_store::local::Locals;
use sa_store::sa::Vrf;

use super::HOST;

const INSIDE: u16 = 0;
const OUTSIDE: u16 = 1;

/// A gateway at work.
pub(super) struct Site {
    pub(super) crew: Crew,
    pub(super) running: Arc<Running>,
    pub(super) counters: Vec<Arc<WorkerCounters>>,
}

impl Site {
    pub(super) fn start(
        site: u8,
        arena: &Arc<Arena>,
        crypto: &Arc<Selection>,
        ends: [MemoryPort; 2],
        files: PathBuf,
        rekey: control::rekey::Config,
    ) -> Self {
        let mut ports = Vec::new();
        let mut views = Vec::new();
        let sides = [("inside", Side::Inside), ("outside", Side::Outside)];
        for ((name, side), port) in sides.into_iter().zip(ends) {
            let info = port.info();
            ports.push(OpenPort {
                setup: PortSetup {
                    name: name.into(),
                    side,
                    vrf: Vrf(0),
                    vlan: None,
                    mac: info.mac,
                    mtu: u16::try_from(info.mtu).unwrap(),
                    shares: None,
                },
                queues: Box::new(port).queues(1, arena).unwrap(),
                taps: Vec::new(),
                worker: None,
            });
            views.push(PortView {
                name: name.into(),
                info,
                side,
                steer: None,
                steer_follows_policies: false,
                control: None,
            });
        }
        let config = AssemblyConfig {
            locals: Locals::new([(Vrf(0), outer(site))]),
            ..AssemblyConfig::default()
        };
        let mut assembled = assemble(config, arena, ports).unwrap();
        let mut draft = assembled.store.draft();
        draft.set_fib(Arc::new(routes(site)));
        assembled.store.publish(draft);
        let views_of = assembled.counters.iter().map(|c| WorkerView {
            counters: Arc::clone(c),
            cpu: None,
        });
        let plane = Plane::new(PlaneParts {
            engines: Park::default(),
            watches: Vec::new(),
            workers: views_of.collect(),
            hits: assembled.hits,
            reports: assembled.reports,
            ports: views,
            stats: assembled.port_stats,
            capture: Capture::new(1),
            arena: Arc::clone(arena),
            clock: assembled.clock,
            mtus: assembled.mtus,
            crypto: Arc::clone(crypto),
            alive: Box::new(|| true),
        });
        let leases = LeaseWriter::start(
            LeaseStore::throw_away().unwrap(),
            Box::new(|e| panic!("{e}")),
        );
        let parts = Parts {
            store: assembled.store,
            leases: leases.unwrap(),
            ciphers: Arc::clone(crypto) as _,
            plane: Arc::new(plane),
            sa_files: vec![files],
            metrics_max_sas: 10,
            kernel: None,
            rekey,
        };
        let options = Options {
            watch: true,
            ..Options::default()
        };
        let running = start(parts, options).unwrap_or_else(|e| panic!("{e}"));
        Self {
            crew: Crew::start(assembled.workers).unwrap(),
            running: Arc::new(running),
            counters: assembled.counters,
        }
    }

    /// Rekeys of each tunnel.
    pub(super) fn rekeys(&self) -> Vec<u64> {
        let control = self.running.control();
        let tunnels = control.store().tunnels();
        tunnels.iter().map(|t| t.rekeys).collect()
    }

    /// Ends it; nothing was dropped and no packet was refused.
    pub(super) fn stop(self, name: &str) {
        let totals = self.running.control().store().totals();
        for (out, inbound) in totals {
            for (what, t) in [("out", out), ("in", inbound)] {
                assert_eq!(t.replays, 0, "{name} {what}: replays");
                assert_eq!(
                    (t.icv_failed, t.malformed, t.selector, t.limit),
                    (0, 0, 0, 0),
                    "{name} {what}"
                );
                assert_eq!(t.lost, 0, "{name} {what}: numbers that never arrived");
            }
        }
        let metrics = String::from_utf8(self.running.scrape().unwrap()).unwrap();
        for bad in [
            "rekey_cut",
            "rekey_overdue",
            "rekey_hook_failed",
            "reload_refused",
        ] {
            let seen = format!("esplanade_events_total{{event=\"{bad}\"}}");
            assert!(!metrics.contains(&seen), "{name}: {bad}\n{metrics}");
        }
        self.crew.stop();
        let balance = Balance::of(self.counters.iter().map(|c| &**c));
        assert_eq!(balance.entered, balance.ended, "{name}: {balance:?}");
        for c in &self.counters {
            assert_eq!(c.total_dropped(), 0, "{name}");
        }
        let running = Arc::into_inner(self.running).expect("nobody else has it");
        running
            .stop()
            .expect("nobody else has it")
            .finish(true)
            .unwrap();
    }
}

fn routes(site: u8) -> Fib {
    let net = |s: u8| IpAddr::from(Ipv4Addr::new(10, s, 0, 0));
    let inside = IpAddr::from(Ipv4Addr::new(192, 168, site, 2));
    let far = outer(1 - site);
    let route = |addr, len, port, gateway| Route {
        vrf: Vrf(0),
        addr,
        len,
        to: RouteTo::Via { port, gateway },
    };
    let list = [
        route(net(site), 16, INSIDE, inside),
        route(net(1 - site), 16, OUTSIDE, far),
        route(far, 32, OUTSIDE, far),
    ];
    let mut neighbours = Neighbours::default();
    for (port, addr) in [(INSIDE, inside), (OUTSIDE, far)] {
        let hop = neighbours.add(port, addr);
        neighbours.learn(hop, HOST);
    }
    Fib::build(&list, neighbours).unwrap()
}

fn outer(site: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, 1 + site).into()
}
