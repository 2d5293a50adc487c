//! Two gateways out of a plan, with their SAs, policies and routes.

use std::sync::Arc;

use gateway::app::{AssemblyConfig, OpenPort, assemble};
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::engine::Park;
use gateway::worker::{PortSetup, Side};
use pmd::memory::{MemoryQueue, PairConfig, pair};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, HugePolicy, Pool, PortQueue};
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::local::Locals;
use sa_store::policy::Action;
use sa_store::runtime::Place;
use sa_store::sa::*;
use sa_store::spd::Spd;

use super::{Bed, MAC_HOST, Plan, Site, any, ip, policy, sa};

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
    let (mut kernel, mut taps) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    if let Some(ring) = plan.taps {
        for side in 0..2 {
            let cfg = PairConfig {
                queues: plan.workers,
                ring,
                ..cfg.clone()
            };
            let (ours, theirs) = pair("tap", "kernel", &cfg);
            let queues = |p: pmd::memory::MemoryPort| p.open(plan.workers, &arena).unwrap();
            taps[side] = queues(ours);
            kernel[side] = queues(theirs);
        }
    }
    let mut site = |inside: MemoryQueue, outside: MemoryQueue, left: bool| {
        let mut tap = |side: usize| -> Vec<Box<dyn PortQueue>> {
            let queues = if left {
                std::mem::take(&mut taps[side])
            } else {
                Vec::new()
            };
            queues.into_iter().map(|q| Box::new(q) as _).collect()
        };
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
                taps: tap(0),
                worker: None,
            },
            OpenPort {
                setup: setup("outside", Side::Outside),
                queues: vec![if left {
                    (plan.around)(outside)
                } else {
                    Box::new(outside)
                }],
                taps: tap(1),
                worker: None,
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
                route(own, 32, RouteTo::Local),
                route(own_v6, 128, RouteTo::Local),
                route(&format!("{own_net}.0.254"), 32, RouteTo::Local),
                route(&format!("{own6}ffff"), 128, RouteTo::Local),
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
        kernel,
    };
    let right = Site {
        gw: site(in_r, out_r, false),
        host: open(host_r),
        wire: open(wire_r),
        kernel: [Vec::new(), Vec::new()],
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
