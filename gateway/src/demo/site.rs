//! One of the two gateways.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use control::core::{Control, Parts};
use control::plane::WorkerView;
use control::run::{Options, Running, start_loaded};
use pmd::capture::Capture;
use pmd::memory::MemoryPort;
use pmd::{Arena, Port};
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::file::Config;
use sa_store::lease::{LeaseError, LeaseStore, LeaseWriter};
use sa_store::ledger::{Balance, WorkerCounters};
use sa_store::local::Locals;
use sa_store::sa::Vrf;

use super::tunnels::Site;
use crate::app::{AssemblyConfig, OpenPort, Plane, PlaneParts, PortView, assemble};
use crate::crypto::select::Selection;
use crate::engine::Park;
use crate::worker::{Crew, PortSetup, Side};

const INSIDE: u16 = 0;
const OUTSIDE: u16 = 1;
/// Room for the outer headers of the largest packet.
pub(super) const OUTER_MTU: u32 = 1600;

/// A gateway of the demo at work.
pub(super) struct Gateway {
    crew: Crew,
    alive: Arc<AtomicBool>,
    pub(super) running: Running,
    pub(super) counters: Vec<Arc<WorkerCounters>>,
}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

impl Gateway {
    /// Starts it with these ends of memory pairs.
    pub(super) fn start(
        site: Site,
        arena: &Arc<Arena>,
        inside: MemoryPort,
        outside: MemoryPort,
        crypto: Arc<Selection>,
        config: Config,
        metrics: Option<SocketAddr>,
    ) -> Result<Self, Boxed> {
        let mut ports = Vec::new();
        let mut views = Vec::new();
        for (name, side, port) in [
            ("inside", Side::Inside, inside),
            ("outside", Side::Outside, outside),
        ] {
            let info = port.info();
            ports.push(OpenPort {
                setup: PortSetup {
                    name: name.into(),
                    side,
                    vrf: Vrf(0),
                    vlan: None,
                    mac: info.mac,
                    mtu: u16::try_from(info.mtu)?,
                    shares: None,
                },
                queues: Box::new(port).queues(1, arena)?,
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
        let locals = [Vrf(0); 2]
            .into_iter()
            .zip([site.outer(false), site.outer(true)]);
        let mut assembled = assemble(
            AssemblyConfig {
                locals: Locals::new(locals),
                ..AssemblyConfig::default()
            },
            arena,
            ports,
        )?;
        let mut draft = assembled.store.draft();
        draft.set_fib(Arc::new(routes(site)?));
        assembled.store.publish(draft);
        let alive = Arc::new(AtomicBool::new(true));
        let seen = Arc::clone(&alive);
        let counters = assembled.counters;
        let plane = Plane::new(PlaneParts {
            engines: Park::default(),
            watches: Vec::new(),
            workers: counters
                .iter()
                .map(|c| WorkerView {
                    counters: Arc::clone(c),
                    cpu: None,
                })
                .collect(),
            hits: assembled.hits,
            reports: assembled.reports,
            ports: views,
            mtus: assembled.mtus,
            stats: assembled.port_stats,
            capture: Capture::new(1),
            arena: Arc::clone(arena),
            clock: assembled.clock,
            crypto: Arc::clone(&crypto),
            alive: Box::new(move || seen.load(Ordering::Relaxed)),
        });
        let on_failure =
            Box::new(|e: &LeaseError| tracing::error!(error = %e, "the lease store failed"));
        let mut control = Control::new(Parts {
            store: assembled.store,
            leases: LeaseWriter::start(LeaseStore::throw_away()?, on_failure)?,
            ciphers: crypto,
            plane: Arc::new(plane),
            sa_files: Vec::new(),
            metrics_max_sas: 1000,
            kernel: None,
            // Both gateways are given each step in the same moment.
            rekey: control::rekey::Config::immediate(),
        });
        let loaded = control.apply(config);
        if !loaded.ok {
            return Err(loaded.problems.join("\n").into());
        }
        let running = start_loaded(
            control,
            Options {
                metrics,
                ..Options::default()
            },
        )?;
        let crew = Crew::start(assembled.workers)?;
        Ok(Self {
            crew,
            alive,
            running,
            counters,
        })
    }

    /// Makes another configuration the running one.
    pub(super) fn apply(&self, config: Config) -> Result<(), Boxed> {
        self.alive.store(self.crew.alive(), Ordering::Relaxed);
        let mut control = self.running.control();
        let outcome = control.apply(config);
        if outcome.ok {
            Ok(())
        } else {
            Err(outcome.problems.join("\n").into())
        }
    }

    /// Stops it; its account of all frames.
    pub(super) fn stop(self) -> Result<Balance, Boxed> {
        self.crew.stop();
        let balance = Balance::of(self.counters.iter().map(|c| &**c));
        if let Some(control) = self.running.stop() {
            control.finish(true)?;
        }
        Ok(balance)
    }
}

/// Own networks are inside, the other site's are reached over the outside.
fn routes(site: Site) -> Result<Fib, Boxed> {
    let host4 = |net: u8, host: u8| Ipv4Addr::new(192, 168, net, host);
    let own = site.number();
    let peer = site.other().number();
    let hosts = (
        host4(own, 2).into(),
        Ipv6Addr::new(0xfd01, u16::from(own), 0, 0, 0, 0, 0, 2).into(),
    );
    let far = (site.other().outer(false), site.other().outer(true));
    let half = |s: Site| if s == Site::A { 0 } else { 128 };
    let route = |addr, len, port, gateway| Route {
        vrf: Vrf(0),
        addr,
        len,
        to: RouteTo::Via { port, gateway },
    };
    let net6 = |n: u8| Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, 0).into();
    let list = [
        route(
            Ipv4Addr::new(10, half(site), 0, 0).into(),
            9,
            INSIDE,
            hosts.0,
        ),
        route(net6(own), 32, INSIDE, hosts.1),
        route(
            Ipv4Addr::new(10, half(site.other()), 0, 0).into(),
            9,
            OUTSIDE,
            far.0,
        ),
        route(net6(peer), 32, OUTSIDE, far.1),
        route(far.0, 32, OUTSIDE, far.0),
        route(far.1, 128, OUTSIDE, far.1),
    ];
    let mut neighbours = Neighbours::default();
    for (port, addr) in [
        (INSIDE, hosts.0),
        (INSIDE, hosts.1),
        (OUTSIDE, far.0),
        (OUTSIDE, far.1),
    ] {
        let hop = neighbours.add(port, addr);
        neighbours.learn(hop, [2, 0, 0, 0, 3, peer]);
    }
    Ok(Fib::build(&list, neighbours)?)
}
