//! From a checked configuration to opened ports, routes and workers.

use std::sync::Arc;
use std::time::Duration;

use pmd::af_xdp::{AfXdpConfig, AfXdpPort, SteerError, SteerMap, Steering, XdpMode};
use pmd::airoha::PortOptions;
use pmd::capture::Capture;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::fault::{FaultQueue, Faults};
use pmd::memory::{self, MemoryPort, PairConfig};
use pmd::nic::{self, NicControl, NicOptions};
use pmd::pcap::{self, PcapConfig, PcapPort};
use pmd::port::{MacAddr, Port, PortError, PortInfo};
use pmd::qdma::QdmaError;
use pmd::tap::{Exception, TapConfig, TapPort};
use pmd::virtio::vhost::{self, VhostConfig, VhostPort};
use pmd::{Arena, ArenaConfig, ArenaError, HugePolicy};
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::fib::{Fib, FibError, Neighbours, Route, RouteTo};
use sa_store::local::Locals;
use sa_store::sa::Vrf;
use sa_store::store::Store;

use super::assembly::{Assembled, AssemblyConfig, AssemblyError, OpenPort, assemble};
use super::blocks::Blocks;
use super::engines::{EngineOpenError, OpenEngines};
use crate::config::{self, AfXdpMode, GatewayConfig, Idle, NextHop, Nic, PortConfig, PortKind};
use crate::engine::Desk;
use crate::esp::reassembly::ReassemblyConfig;
use crate::worker::{IdlePolicy, PortSetup, Side};

/// Bytes of each capture point's ring.
const CAPTURE_RING: usize = 1 << 20;

/// Why a gateway could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Packet memory.
    #[error("packet memory: {0}")]
    Arena(#[from] ArenaError),
    /// A port.
    #[error("port \"{name}\": {source}")]
    Port {
        /// Operator's name of it.
        name: String,
        /// Cause.
        #[source]
        source: PortError,
    },
    /// An engine.
    #[error("engine \"{name}\": {source}")]
    Engine {
        /// Operator's name of it.
        name: String,
        /// Cause.
        #[source]
        source: EngineOpenError,
    },
    /// The rings of an Ethernet block do not start.
    #[error("Ethernet block: {0}")]
    Rings(#[from] QdmaError),
    /// Destinations to take from an interface.
    #[error("port \"{name}\": {source}")]
    Steer {
        /// Operator's name of the port.
        name: String,
        /// Cause.
        #[source]
        source: SteerError,
    },
    /// Routes.
    #[error(transparent)]
    Route(#[from] FibError),
    /// Workers.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
}

/// An opened port, for reports.
#[derive(Clone)]
pub struct PortView {
    /// Operator's name.
    pub name: String,
    /// What the port says of itself.
    pub info: PortInfo,
    /// Side.
    pub side: Side,
    /// Destinations that are taken from the interface (af_xdp).
    pub steer: Option<SteerMap>,
    /// Whether these follow the policies: nothing was configured.
    pub steer_follows_policies: bool,
    /// The way to its device or vhost-user peer, where it has one.
    pub control: Option<Arc<dyn NicControl>>,
}

/// A gateway whose ports are open and whose workers do not run yet.
pub struct Opened {
    /// Workers, store, counters.
    pub assembled: Assembled,
    /// Packet memory.
    pub arena: Arc<Arena>,
    /// Ports by number.
    pub ports: Vec<PortView>,
    /// Switch of all capture points.
    pub capture: Capture,
    /// Look-aside engines.
    pub engines: OpenEngines,
}

/// Opens what the configuration names, for workers that go by `clock`. Engines are checked with `ciphers`. The routes are published; SAs and policies are not loaded.
///
/// # Errors
/// See [`OpenError`]. Nothing stays open.
pub fn open(
    config: &GatewayConfig,
    clock: Clock,
    ciphers: &Arc<dyn CipherFactory>,
) -> Result<Opened, OpenError> {
    let workers = config.workers.number();
    let arena = Arena::new(ArenaConfig {
        frames: config.memory.frames,
        stride: config.memory.stride,
        huge: match config.memory.huge {
            config::Huge::Auto => HugePolicy::Auto,
            config::Huge::Require => HugePolicy::Require,
            config::Huge::Never => HugePolicy::Never,
        },
        lock: config.memory.lock,
        ..ArenaConfig::default()
    })?;
    let capture = Capture::new(CAPTURE_RING);
    let mut memory_ends: Vec<Option<MemoryPort>> = config.ports.iter().map(|_| None).collect();
    let mut engines = OpenEngines::default();
    let mut open_ports = Vec::with_capacity(config.ports.len());
    let mut views = Vec::with_capacity(config.ports.len());
    for (number, port) in config.ports.iter().enumerate() {
        let shares = sharing(&config.ports[..number], port);
        let (view, queues) = match shares {
            Some(carrier) => {
                let of: &PortView = &views[usize::from(carrier)];
                (
                    PortView {
                        name: port.name.clone(),
                        side: side(port.side),
                        // The carrier speaks for the device.
                        control: None,
                        ..of.clone()
                    },
                    Vec::new(),
                )
            }
            None => {
                let fail = |source| OpenError::Port {
                    name: port.name.clone(),
                    source,
                };
                let shared = Shared {
                    arena: &arena,
                    ends: &mut memory_ends,
                    blocks: &mut engines.blocks,
                };
                let (opened, steer) = open_port(config, number, workers, shared).map_err(fail)?;
                let info = opened.info();
                let count = port
                    .queues
                    .map_or(workers, usize::from)
                    .min(info.max_queues)
                    .max(1);
                let (mut info, control) = (info, opened.control());
                let queues = opened.queues(count, &arena).map_err(fail)?;
                // What was asked for may have left a choice.
                let mut modes: Vec<&str> = queues.iter().filter_map(|q| q.mode()).collect();
                modes.dedup();
                if !modes.is_empty() {
                    info.mode = modes.join(", ");
                }
                let completes = queues.iter().all(|q| q.completes_checksums());
                tracing::info!(port = %port.name, kind = info.kind, mode = %info.mode, queues = count, mtu = info.mtu, udp_checksums = completes, "port open");
                let queues = queues
                    .into_iter()
                    .map(|q| -> Box<dyn pmd::PortQueue> {
                        let q = Box::new(capture.wrap(q, &port.name));
                        match &port.fault {
                            None => q,
                            Some(f) => {
                                Box::new(FaultQueue::new(q, faults(f), Faults::default(), f.seed))
                            }
                        }
                    })
                    .collect();
                let view = PortView {
                    name: port.name.clone(),
                    info,
                    side: side(port.side),
                    steer_follows_policies: follows_policies(port),
                    steer,
                    control,
                };
                (view, queues)
            }
        };
        if let (Some(map), PortKind::AfXdp { steer, .. }) = (&view.steer, &port.kind) {
            for prefix in steer.destinations.iter().flatten() {
                let fail = |source| OpenError::Steer {
                    name: port.name.clone(),
                    source,
                };
                map.insert(prefix.addr(), prefix.len()).map_err(fail)?;
            }
        }
        let setup_mac = port.mac.map_or(view.info.mac, MacAddr::from);
        let setup_mtu = port
            .mtu
            .unwrap_or_else(|| u16::try_from(view.info.mtu).unwrap_or(u16::MAX));
        let taps =
            exception_tap(port, setup_mac, setup_mtu, workers, &arena).map_err(|source| {
                OpenError::Port {
                    name: port.name.clone(),
                    source,
                }
            })?;
        open_ports.push(OpenPort {
            setup: PortSetup {
                name: port.name.clone(),
                side: view.side,
                vrf: Vrf(port.vrf),
                vlan: port.vlan,
                mac: setup_mac,
                mtu: setup_mtu,
                shares,
            },
            queues,
            taps,
            worker: match &port.kind {
                PortKind::Airoha(a) => Some(a.worker),
                _ => None,
            },
        });
        views.push(view);
    }
    for engine in &config.engines {
        engines
            .open(engine, &arena, ciphers, config.sas.max)
            .map_err(|source| OpenError::Engine {
                name: engine.name.clone(),
                source,
            })?;
    }
    engines.blocks.start()?;
    let desks = engines.desks.clone();
    let mut assembled = assemble(assembly(config, clock, desks), &arena, open_ports)?;
    let fib = routes(config, &mut assembled.store)?;
    let mut draft = assembled.store.draft();
    draft.set_fib(Arc::new(fib));
    assembled.store.publish(draft);
    Ok(Opened {
        assembled,
        arena,
        ports: views,
        capture,
        engines,
    })
}

fn assembly(config: &GatewayConfig, clock: Clock, desks: Vec<Arc<Desk>>) -> AssemblyConfig {
    let cpus = match &config.workers.cpus {
        Some(cpus) => cpus.iter().map(|c| Some(usize::from(*c))).collect(),
        None => vec![None; config.workers.number()],
    };
    let locals = config
        .ports
        .iter()
        .flat_map(|p| p.addresses.iter().map(|a| (Vrf(p.vrf), a.addr())));
    let natt = config.ports.iter().find_map(|p| match &p.kind {
        PortKind::AfXdp { steer, .. } => steer.udp_ports.iter().copied().find(|port| *port != 4500),
        _ => None,
    });
    let spin = config.workers.spin_us;
    AssemblyConfig {
        cpus,
        max_sas: config.sas.max,
        locals: Locals::new(locals),
        natt_port: natt.unwrap_or(4500),
        reassembly: config.reassembly.enabled.then(|| ReassemblyConfig {
            datagrams: config.reassembly.max_packets as usize,
            timeout: u64::from(config.reassembly.timeout_ms) * 1_000_000,
            ..ReassemblyConfig::default()
        }),
        hold_unknown: config
            .ike
            .as_ref()
            .filter(|ike| ike.hold_ms != 0)
            .map(|ike| u64::from(ike.hold_ms) * 1_000_000),
        punt: config.exception.limits(),
        idle: IdlePolicy {
            // An empty round takes roughly 50 ns.
            spins: spin.saturating_mul(20),
            busy: config.workers.idle == Idle::Spin,
            ..IdlePolicy::default()
        },
        clock,
        parallel: config.crypto.parallel,
        desks,
        iv_seed: config.test_seed,
        ..AssemblyConfig::default()
    }
}

/// The earlier port on whose interface this one lies, as another VLAN.
fn sharing(earlier: &[PortConfig], port: &PortConfig) -> Option<u16> {
    let interface = |p: &PortConfig| match &p.kind {
        PortKind::AfXdp { interface, .. } | PortKind::Tap { interface } => Some(interface.clone()),
        PortKind::Vfio(n) => Some(n.device.clone()),
        PortKind::Airoha(a) => Some(format!("GDM {} of {}", a.gdm.number(), a.at)),
        _ => None,
    };
    let wanted = interface(port)?;
    let found = earlier
        .iter()
        .position(|p| interface(p).as_ref() == Some(&wanted))?;
    u16::try_from(found).ok()
}

/// What several ports have a part of.
struct Shared<'a> {
    arena: &'a Arc<Arena>,
    /// Far ends of memory pairs.
    ends: &'a mut [Option<MemoryPort>],
    blocks: &'a mut Blocks,
}

fn open_port(
    config: &GatewayConfig,
    number: usize,
    workers: usize,
    shared: Shared<'_>,
) -> Result<(Box<dyn Port>, Option<SteerMap>), PortError> {
    let Shared {
        arena,
        ends,
        blocks,
    } = shared;
    let port = &config.ports[number];
    let mtu = port.mtu.map(u32::from);
    match &port.kind {
        PortKind::AfXdp {
            interface,
            mode,
            ring,
            steer,
        } => {
            let steering = if steer.all {
                Steering::All
            } else {
                Steering::Ipsec {
                    udp_ports: steer.udp_ports.clone(),
                }
            };
            let opened = AfXdpPort::open(AfXdpConfig {
                interface: interface.clone(),
                ring: *ring,
                mode: match mode {
                    AfXdpMode::Auto => XdpMode::Auto,
                    AfXdpMode::ZeroCopy => XdpMode::ZeroCopy,
                    AfXdpMode::Copy => XdpMode::NativeCopy,
                    AfXdpMode::Generic => XdpMode::Generic,
                },
                steering,
            })?;
            let map = opened.steer_map();
            Ok((Box::new(opened), Some(map)))
        }
        PortKind::Tap { interface } => {
            let opened = TapPort::open(&TapConfig {
                name: interface.clone(),
                mtu,
                up: true,
                exception: None,
            })?;
            Ok((Box::new(opened), None))
        }
        PortKind::Pcap {
            read,
            write,
            repeat,
        } => {
            let opened = PcapPort::open(PcapConfig {
                name: port.name.clone(),
                read: read.clone(),
                write: write.clone(),
                repeat: match repeat {
                    config::Repeat::Times(n) => pcap::Repeat::Times(*n),
                    config::Repeat::Forever => pcap::Repeat::Forever,
                },
                clock: if config.test_seed.is_some() {
                    pcap::Clock::Counter {
                        start: Duration::ZERO,
                        step: Duration::from_micros(1),
                    }
                } else {
                    pcap::Clock::System
                },
                mtu: mtu.unwrap_or(1500),
                ..PcapConfig::default()
            })?;
            Ok((Box::new(opened), None))
        }
        PortKind::VhostUser { socket, role, mode } => {
            let opened = VhostPort::open(VhostConfig {
                name: port.name.clone(),
                place: vhost::Place {
                    path: socket.clone(),
                    role: match role {
                        config::SocketRole::Server => vhost::Role::Server,
                        config::SocketRole::Client => vhost::Role::Client,
                    },
                },
                mode: *mode,
                mtu: mtu.unwrap_or(1500),
            })?;
            Ok((Box::new(opened), None))
        }
        PortKind::Memory { peer, ring } => {
            let own = match ends[number].take() {
                Some(end) => end,
                None => {
                    let other = &config.ports[*peer];
                    let pair = PairConfig {
                        queues: port.queues.map_or(workers, usize::from),
                        ring: *ring,
                        mtu: mtu.unwrap_or(1500),
                    };
                    let (own, far) = memory::pair(&port.name, &other.name, &pair);
                    ends[*peer] = Some(far);
                    own
                }
            };
            Ok((Box::new(own), None))
        }
        PortKind::Vfio(n) => Ok((open_nic(&port.name, n, mtu)?, None)),
        PortKind::Airoha(a) => {
            let fail = |e| match e {
                QdmaError::Device(source) => PortError::Device {
                    port: a.at.to_string(),
                    source,
                },
                e => PortError::Setting {
                    port: port.name.clone(),
                    reason: e.to_string(),
                },
            };
            let block = blocks.get(&a.at, &config.engines, arena).map_err(fail)?;
            let opened = block.port(PortOptions {
                name: port.name.clone(),
                gdm: a.gdm,
                instance: a.instance,
                mac: MacAddr::from(a.mac),
                mtu: mtu.unwrap_or(1500),
            });
            Ok((Box::new(opened), None))
        }
    }
}

/// The kernel's side of a port: a TAP with a queue for each worker.
fn exception_tap(
    port: &PortConfig,
    mac: MacAddr,
    mtu: u16,
    workers: usize,
    arena: &Arc<Arena>,
) -> Result<Vec<Box<dyn pmd::PortQueue>>, PortError> {
    let Some(name) = &port.tap else {
        return Ok(Vec::new());
    };
    let tap = TapPort::open(&TapConfig {
        name: name.clone(),
        mtu: Some(u32::from(mtu)),
        up: true,
        exception: Some(Exception {
            mac,
            // The interface itself has them.
            neighbours: !matches!(port.kind, PortKind::AfXdp { .. }),
        }),
    })?;
    Box::new(tap).queues(workers, arena)
}

fn open_nic(name: &str, n: &Nic, mtu: Option<u32>) -> Result<Box<dyn Port>, PortError> {
    let protection = if n.no_iommu {
        Protection::NoIommu
    } else {
        Protection::Iommu
    };
    let device = VfioDevice::pci(&n.device, protection).map_err(|source| PortError::Device {
        port: n.device.clone(),
        source,
    })?;
    nic::open(
        Arc::new(device),
        &NicOptions {
            name: name.into(),
            mtu: mtu.unwrap_or(1500),
            promiscuous: n.promiscuous,
            rx_ring: n.rx_ring,
            tx_ring: n.tx_ring,
            experimental: n.experimental,
            ..NicOptions::default()
        },
    )
}

pub(crate) fn routes(config: &GatewayConfig, store: &mut Store) -> Result<Fib, FibError> {
    let number = |port: usize| u16::try_from(port).unwrap_or(u16::MAX);
    let mut list = Vec::new();
    for (port, p) in config.ports.iter().enumerate() {
        for address in &p.addresses {
            let (vrf, addr) = (Vrf(p.vrf), address.addr());
            let whole = if addr.is_ipv4() { 32 } else { 128 };
            list.push(Route {
                vrf,
                addr,
                len: whole,
                to: RouteTo::Local,
            });
            if address.len() < whole {
                list.push(Route {
                    vrf,
                    addr,
                    len: address.len(),
                    to: RouteTo::OnLink { port: number(port) },
                });
            }
        }
    }
    for r in &config.routes {
        let to = match &r.next {
            NextHop::Port {
                port,
                via: Some(gateway),
            } => RouteTo::Via {
                port: number(*port),
                gateway: *gateway,
            },
            NextHop::Port { port, via: None } => RouteTo::OnLink {
                port: number(*port),
            },
            NextHop::Tunnel(name) => RouteTo::Tunnel(store.tunnel(name)),
            NextHop::Blackhole => RouteTo::Blackhole,
        };
        list.push(Route {
            vrf: Vrf(r.vrf),
            addr: r.to.addr(),
            len: r.to.len(),
            to,
        });
    }
    let mut neighbours = Neighbours::default();
    for n in &config.neighbours {
        let hop = neighbours.add(number(n.port), n.ip);
        neighbours.learn(hop, n.mac.0);
    }
    Fib::build(&list, neighbours)
}

fn side(side: config::Side) -> Side {
    match side {
        config::Side::Inside => Side::Inside,
        config::Side::Outside => Side::Outside,
    }
}

fn follows_policies(port: &PortConfig) -> bool {
    matches!(&port.kind, PortKind::AfXdp { steer, .. } if steer.destinations.is_none() && !steer.all)
        && port.side == config::Side::Inside
}

fn faults(f: &config::Fault) -> Faults {
    Faults {
        drop: f.drop,
        flip: f.flip,
        duplicate: f.duplicate,
        reorder: f.reorder,
    }
}
