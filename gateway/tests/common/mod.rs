//! Two gateways back to back over memory ports, with the wire between them in the test's hand.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod models;

use std::net::IpAddr;
use std::sync::Arc;

use etherparse::PacketBuilder;
use gateway::app::{Assembled, AssemblyConfig, OpenPort, assemble};
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::engine::{Desk, Park};
use gateway::worker::{Locals, PortSetup, Side};
use pmd::memory::{MemoryQueue, PairConfig, pair};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, Frame, HugePolicy, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::ledger::Balance;
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::runtime::{Place, Start};
use sa_store::sa::*;
use sa_store::spd::Spd;
use sa_store::suite::{AeadIcv, AesBits, Suite};

pub const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GCM: Suite = Suite::Gcm(AesBits::B128, AeadIcv::L16);

pub fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

pub fn prefix(s: &str) -> AddrRange {
    let (a, l) = s.split_once('/').unwrap();
    AddrRange::prefix(ip(a), l.parse().unwrap()).unwrap()
}

pub fn any(src: &str, dst: &str) -> Selector {
    Selector {
        src: prefix(src),
        dst: prefix(dst),
        proto: None,
        ports: Ports::Any,
    }
}

pub fn sa(name: &str, direction: Direction, spi: u32, a: &str, b: &str, suite: Suite) -> SaSpec {
    SaSpec {
        name: name.into(),
        tunnel: "t".into(),
        direction,
        spi: Spi::new(spi).unwrap(),
        src: ip(a),
        dst: ip(b),
        mode: Mode::Tunnel,
        suite,
        keys: SaKeys {
            enc: (1..).take(suite.enc_key_len()).collect::<Vec<u8>>().into(),
            auth: (100..)
                .take(suite.auth_key_len())
                .collect::<Vec<u8>>()
                .into(),
        },
        encap: None,
        esn: true,
        replay_window: 1024,
        first_use: true,
        soft: Limits::default(),
        hard: Limits::default(),
        dscp: Dscp::Copy,
        df: Df::Copy,
        ecn: true,
        ttl: 64,
        pmtu: None,
        tfc: Tfc::Off,
        mss_clamp: false,
        vrf: Vrf(0),
        if_id: IfId(0),
        selectors: Vec::new(),
        offload: OffloadMode::Software,
        engine: None,
    }
}

pub fn policy(
    name: &str,
    direction: Direction,
    selectors: Vec<Selector>,
    action: Action,
) -> Policy {
    Policy {
        name: name.into(),
        direction,
        priority: 10,
        selectors,
        action,
        vrf: Vrf(0),
        if_id: IfId(0),
    }
}

/// One gateway, its host inside and the wire outside.
pub struct Site {
    pub gw: Assembled,
    pub host: MemoryQueue,
    wire: MemoryQueue,
}

pub struct Bed {
    pub arena: Arc<Arena>,
    pub pool: Pool,
    pub left: Site,
    pub right: Site,
    /// What the left gateway sent to the right one so far.
    pub wire: Vec<Vec<u8>>,
    /// Frames from the left gateway are recorded but do not reach the right one.
    pub cut: bool,
    /// Ends after the workers, before frames are counted.
    pub kept: Option<Box<dyn std::any::Any>>,
}

/// Changes the assembly of a site; true for the left one.
pub type ConfigChange = Box<dyn Fn(&mut AssemblyConfig, bool)>;

/// What a bed is to look like.
pub struct Plan {
    pub workers: usize,
    pub suite: Suite,
    pub mtu: u16,
    /// Changes the SAs before they are installed: `l2r` and `r2l`, as outbound SAs.
    pub sa: Box<dyn Fn(&mut SaSpec)>,
    /// Changes each site's assembly; true for the left one.
    pub config: ConfigChange,
    /// Where numbering starts.
    pub start: Start,
    pub frames: u32,
    pub ring: usize,
    /// The engines of each site; true for the left one.
    pub engines: Engines,
    /// Puts something around the port from which the left gateway sends to the right one.
    pub around: Around,
}

/// Opens engines that work on frames of the arena.
pub type Engines = Box<dyn Fn(&Arc<Arena>, bool) -> Vec<Arc<Desk>>>;

/// See [`Plan::around`].
pub type Around = fn(MemoryQueue) -> Box<dyn PortQueue>;

impl Default for Plan {
    fn default() -> Self {
        Self {
            workers: 1,
            suite: GCM,
            mtu: 1500,
            sa: Box::new(|_| {}),
            config: Box::new(|_, _| {}),
            start: Start {
                next_seq: 1,
                lease_end: u64::from(u32::MAX),
                window_top: 0,
            },
            frames: 4096,
            ring: 1024,
            engines: Box::new(|_, _| Vec::new()),
            around: |queue| Box::new(queue),
        }
    }
}

pub fn bed(plan: &Plan) -> Bed {
    let (suite, mtu) = (plan.suite, plan.mtu);
    let stride = if mtu > 1600 { 10_240 } else { 2048 };
    let arena = Arena::new(ArenaConfig {
        frames: plan.frames,
        stride,
        huge: HugePolicy::Never,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap();
    let cfg = PairConfig {
        queues: 1,
        ring: plan.ring,
        mtu: u32::from(mtu),
    };
    let (host_l, in_l) = pair("host-l", "in-l", &cfg);
    let (wire_l, out_l) = pair("wire-l", "out-l", &cfg);
    let (wire_r, out_r) = pair("wire-r", "out-r", &cfg);
    let (host_r, in_r) = pair("host-r", "in-r", &cfg);
    let open = |p: pmd::memory::MemoryPort| p.open(1, &arena).unwrap().remove(0);
    let (in_l, out_l, out_r, in_r) = (open(in_l), open(out_l), open(out_r), open(in_r));
    let selection = Selection::new(
        Choice::Provider(gateway::crypto::ProviderId::RustCrypto),
        Compare::Features,
    )
    .unwrap();
    let mut sas = [
        sa(
            "l2r",
            Direction::Out,
            0x1001,
            "192.0.2.1",
            "192.0.2.2",
            suite,
        ),
        sa(
            "r2l",
            Direction::Out,
            0x1002,
            "192.0.2.2",
            "192.0.2.1",
            suite,
        ),
    ];
    sas.iter_mut().for_each(&plan.sa);
    let site = |inside: MemoryQueue, outside: MemoryQueue, left: bool| {
        let setup = |name: &str, side| PortSetup {
            name: name.into(),
            side,
            vrf: Vrf(0),
            vlan: None,
            mac: MacAddr([2, 0, 0, 0, 1, u8::from(left)]),
            mtu,
            shares: None,
        };
        let (own, peer) = if left {
            ("192.0.2.1", "192.0.2.2")
        } else {
            ("192.0.2.2", "192.0.2.1")
        };
        let (own_v6, peer_v6) = if left {
            ("fd0f::1", "fd0f::2")
        } else {
            ("fd0f::2", "fd0f::1")
        };
        let (own_net, far_net) = if left {
            ("10.1", "10.2")
        } else {
            ("10.2", "10.1")
        };
        let (own6, far6) = if left {
            ("fd01::", "fd02::")
        } else {
            ("fd02::", "fd01::")
        };
        let ports = vec![
            OpenPort {
                setup: setup("inside", Side::Inside),
                queues: vec![Box::new(inside)],
            },
            OpenPort {
                setup: setup("outside", Side::Outside),
                queues: vec![if left {
                    (plan.around)(outside)
                } else {
                    Box::new(outside)
                }],
            },
        ];
        let mut config = AssemblyConfig {
            cpus: vec![None; plan.workers],
            locals: Locals::new(
                [
                    own,
                    own_v6,
                    &format!("{own_net}.0.254"),
                    &format!("{own6}ffff"),
                ]
                .map(|a| (Vrf(0), ip(a))),
            ),
            ..AssemblyConfig::default()
        };
        config.desks = (plan.engines)(&arena, left);
        (plan.config)(&mut config, left);
        let desks = config.desks.clone();
        let mut gw = assemble(config, &arena, ports).unwrap();
        let mut n = Neighbours::default();
        let host = n.add(0, ip(&format!("{own_net}.0.1")));
        n.learn(host, MAC_HOST);
        let far = n.add(1, ip(peer));
        n.learn(far, [2, 0, 0, 0, 1, u8::from(!left)]);
        let far = n.add(1, ip(peer_v6));
        n.learn(far, [2, 0, 0, 0, 1, u8::from(!left)]);
        let via = |port, gateway: &str| RouteTo::Via {
            port,
            gateway: ip(gateway),
        };
        let route = |addr: &str, len, to| Route {
            vrf: Vrf(0),
            addr: ip(addr),
            len,
            to,
        };
        let fib = Fib::build(
            &[
                route(
                    &format!("{own_net}.0.0"),
                    16,
                    via(0, &format!("{own_net}.0.1")),
                ),
                route(own6, 16, via(0, &format!("{own_net}.0.1"))),
                route(&format!("{far_net}.0.0"), 16, via(1, peer)),
                route(far6, 16, via(1, peer)),
                route("192.0.2.0", 24, RouteTo::OnLink { port: 1 }),
                route("fd0f::", 64, RouteTo::OnLink { port: 1 }),
                route("203.0.113.0", 24, via(1, peer)),
            ],
            n,
        )
        .unwrap();
        let mut draft = gw.store.draft();
        draft.set_fib(Arc::new(fib));
        for s in &sas {
            let out = (s.name == "l2r") == left;
            let s = SaSpec {
                direction: if out { Direction::Out } else { Direction::In },
                ..s.clone()
            };
            let start = plan.start;
            let park = Park::new(
                desks.clone(),
                Arc::clone(&gw.wakers),
                gateway::engine::choice::Choice::default(),
            );
            let place = if desks.is_empty() {
                Place::CPU
            } else {
                park.place(&s, None, false).unwrap()
            };
            let id = gw
                .store
                .add_sa_on(&mut draft, Arc::new(s), &selection, start, place, 0)
                .unwrap();
            if place.engine != 0 {
                park.install(draft.snapshot().sa(id).unwrap()).unwrap();
            }
        }
        let v4 = |a: &str, b: &str| any(&format!("{a}.0.0/16"), &format!("{b}.0.0/16"));
        let v6 = |a: &str, b: &str| any(&format!("{a}/16"), &format!("{b}/16"));
        let protect = || Action::Protect { tunnel: "t".into() };
        let policies = [
            policy(
                "out",
                Direction::Out,
                vec![v4(own_net, far_net), v6(own6, far6)],
                protect(),
            ),
            policy(
                "in",
                Direction::In,
                vec![v4(far_net, own_net), v6(far6, own6)],
                protect(),
            ),
            policy(
                "web-out",
                Direction::Out,
                vec![any(&format!("{own_net}.0.0/16"), "203.0.113.0/24")],
                Action::Bypass,
            ),
            policy(
                "web-in",
                Direction::In,
                vec![any("203.0.113.0/24", &format!("{own_net}.0.0/16"))],
                Action::Bypass,
            ),
        ];
        let tunnel = gw.store.tunnel("t");
        let out = Spd::build(Direction::Out, &policies, |_| Some(tunnel)).unwrap();
        let inbound = Spd::build(Direction::In, &policies, |_| Some(tunnel)).unwrap();
        draft.set_spd(Arc::new(out), Arc::new(inbound));
        gw.store.publish(draft);
        gw
    };
    let left = Site {
        gw: site(in_l, out_l, true),
        host: open(host_l),
        wire: open(wire_l),
    };
    let right = Site {
        gw: site(in_r, out_r, false),
        host: open(host_r),
        wire: open(wire_r),
    };
    Bed {
        pool: Pool::new(&arena, 64),
        arena,
        left,
        right,
        wire: Vec::new(),
        cut: false,
        kept: None,
    }
}

impl Bed {
    pub fn send_left(&mut self, packets: &[Vec<u8>]) {
        let mut frames = Vec::new();
        for p in packets {
            let mut f = self.pool.get().unwrap();
            assert!(f.set_data(p));
            frames.push(f);
        }
        assert_eq!(
            self.left.host.tx_burst(&mut self.pool, &mut frames),
            packets.len()
        );
    }

    /// Runs both gateways until nothing moves; returns what their hosts received: (left, right).
    pub fn settle(&mut self) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let (mut l, mut r) = (Vec::new(), Vec::new());
        let mut quiet = 0;
        while quiet < 4 {
            let mut work = 0;
            for w in self
                .left
                .gw
                .workers
                .iter_mut()
                .chain(&mut self.right.gw.workers)
            {
                work += w.round();
            }
            for (host, out) in [
                (&mut self.left.host, &mut l),
                (&mut self.right.host, &mut r),
            ] {
                let mut got = Vec::new();
                work += host.rx_burst(&mut self.pool, &mut got, 64);
                for f in got {
                    out.push(f.data().to_vec());
                    self.pool.put(f);
                }
            }
            work += self.carry();
            quiet = if work == 0 { quiet + 1 } else { 0 };
        }
        for site in [&self.left, &self.right] {
            let b = Balance::of(site.gw.counters.iter().map(|c| &**c));
            assert!(b.holds(), "every frame is accounted for: {b:?}");
            assert_eq!(b.inside, 0, "{b:?}");
        }
        (l, r)
    }

    /// Carries frames between the two gateways.
    fn carry(&mut self) -> usize {
        let mut got = Vec::new();
        let n = self.left.wire.rx_burst(&mut self.pool, &mut got, 64);
        for f in &got {
            self.wire.push(f.data().to_vec());
        }
        if self.cut {
            self.pool.put_bulk(&mut got);
        } else {
            self.right.wire.tx_burst(&mut self.pool, &mut got);
        }
        assert!(got.is_empty());
        let m = self.right.wire.rx_burst(&mut self.pool, &mut got, 64);
        self.left.wire.tx_burst(&mut self.pool, &mut got);
        assert!(got.is_empty());
        n + m
    }

    /// Frames that reach the right gateway from outside.
    pub fn inject_right(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            let mut f = self.pool.get().unwrap();
            assert!(f.set_data(bytes));
            assert_eq!(self.right.wire.tx_burst(&mut self.pool, &mut vec![f]), 1);
        }
    }

    /// Runs rounds without asking that nothing be held.
    pub fn settle_holding(&mut self) {
        for _ in 0..4 {
            for w in self
                .left
                .gw
                .workers
                .iter_mut()
                .chain(&mut self.right.gw.workers)
            {
                w.round();
            }
            self.carry();
        }
        let b = Balance::of(self.right.gw.counters.iter().map(|c| &**c));
        assert!(b.holds(), "{b:?}");
    }

    /// Runs the left gateway alone.
    pub fn settle_left(&mut self) {
        for _ in 0..4 {
            for w in &mut self.left.gw.workers {
                w.round();
            }
        }
    }

    /// Compiles the left gateway's outbound policies anew after a change.
    pub fn set_left_policies(&mut self, change: impl FnOnce(&mut Vec<Policy>)) {
        let snapshot = self.left.gw.store.current();
        let mut policies: Vec<_> = snapshot
            .spd_out
            .policies()
            .map(|(_, p)| p.clone())
            .collect();
        change(&mut policies);
        let tunnel = self.left.gw.store.tunnel("t");
        let out = snapshot
            .spd_out
            .updated(&policies, |_| Some(tunnel))
            .unwrap()
            .0;
        let mut draft = self.left.gw.store.draft();
        draft.set_spd(Arc::new(out), Arc::clone(&snapshot.spd_in));
        self.left.gw.store.publish(draft);
    }

    /// Replaces the left gateway's routes.
    pub fn set_left_routes(&mut self, routes: &[Route]) {
        let fib = Fib::build(
            routes,
            self.left.gw.store.current().fib.neighbours().clone(),
        )
        .unwrap();
        let mut draft = self.left.gw.store.draft();
        draft.set_fib(Arc::new(fib));
        self.left.gw.store.publish(draft);
    }

    /// The left gateway forgets the right one's link address.
    pub fn forget_left_peer(&mut self) {
        let snapshot = self.left.gw.store.current();
        let n = snapshot.fib.neighbours();
        n.forget(n.find(1, ip("192.0.2.2")).unwrap());
    }

    /// A packet from the left host that ends at its frame's last byte.
    pub fn send_without_tailroom(&mut self) {
        let mut f = self.pool.get().unwrap();
        f.reset_default();
        let room = f.tailroom();
        let bytes = udp("10.1.0.1", "10.2.0.1", 64, &[0; 1000]);
        let headroom = f.headroom();
        f.reset(headroom + room - bytes.len());
        f.append(bytes.len()).unwrap().copy_from_slice(&bytes);
        assert_eq!(f.tailroom(), 0);
        assert_eq!(self.left.host.tx_burst(&mut self.pool, &mut vec![f]), 1);
    }

    /// Takes every free frame: all but one, and that one.
    pub fn starve(&mut self) -> (Vec<Frame>, Frame) {
        let mut all = Vec::new();
        while let Some(f) = self.pool.get() {
            all.push(f);
        }
        let one = all.pop().unwrap();
        (all, one)
    }

    /// Sends bytes in this frame.
    pub fn send_frame_left(&mut self, mut frame: Frame, bytes: &[u8]) {
        assert!(frame.set_data(bytes));
        assert_eq!(self.left.host.tx_burst(&mut self.pool, &mut vec![frame]), 1);
    }

    /// Ends the starvation.
    pub fn feed(&mut self, mut frames: Vec<Frame>) {
        self.pool.put_bulk(&mut frames);
    }

    pub fn dropped(&self, left: bool) -> Vec<(DropReason, u64)> {
        let site = if left { &self.left } else { &self.right };
        let sum = |r: DropReason| {
            site.gw
                .counters
                .iter()
                .map(|c| c.dropped[r.index()].value())
                .sum::<u64>()
        };
        DropReason::ALL
            .iter()
            .map(|r| (*r, sum(*r)))
            .filter(|(_, n)| *n != 0)
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for site in [&mut self.left, &mut self.right] {
            for w in std::mem::take(&mut site.gw.workers) {
                w.shut_down();
            }
            site.host.drain(&mut self.pool);
            site.wire.drain(&mut self.pool);
        }
        self.kept = None;
        if !std::thread::panicking() {
            assert_eq!(self.arena.outstanding(), 0, "no frame is lost");
        }
    }
}

pub fn udp(src: &str, dst: &str, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(MAC_HOST, [2, 0, 0, 0, 1, 1]);
    let b = match (ip(src), ip(dst)) {
        (IpAddr::V4(s), IpAddr::V4(d)) => eth.ipv4(s.octets(), d.octets(), ttl),
        (IpAddr::V6(s), IpAddr::V6(d)) => eth.ipv6(s.octets(), d.octets(), ttl),
        _ => unreachable!(),
    };
    let b = b.udp(1000, 2000);
    let mut out = Vec::new();
    b.write(&mut out, payload).unwrap();
    out
}

/// What the far host should see: link header of the far gateway, hop limit less by two.
pub fn payload_of(frame: &[u8]) -> Vec<u8> {
    let s = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
    match s.transport {
        Some(etherparse::TransportSlice::Udp(u)) => u.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

/// Discards UDP to one port: what a fragment hides decides.
pub fn discard_one_port() -> Policy {
    let ports = Ports::Range {
        src: 0..=65535,
        dst: 2000..=2000,
    };
    let selector = Selector {
        proto: Some(17),
        ports,
        ..any("10.1.0.0/16", "10.2.0.0/16")
    };
    Policy {
        priority: 1,
        ..policy("port", Direction::Out, vec![selector], Action::Discard)
    }
}
