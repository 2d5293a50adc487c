use super::*;
use proptest::prelude::*;

fn route(to: &str, len: u8, via: RouteTo) -> Route {
    Route {
        vrf: Vrf(0),
        addr: to.parse().unwrap(),
        len,
        to: via,
    }
}

fn at(s: &str) -> u128 {
    mapped(s.parse().unwrap())
}

#[test]
fn the_longest_prefix_decides_in_both_families() {
    let fib = Fib::build(
        &[
            route("0.0.0.0", 0, RouteTo::Blackhole),
            route(
                "10.0.0.0",
                8,
                RouteTo::Via {
                    port: 1,
                    gateway: "192.0.2.1".parse().unwrap(),
                },
            ),
            route("10.1.0.0", 16, RouteTo::Local),
            route("2001:db8::", 32, RouteTo::Tunnel(TunnelIdx(7))),
        ],
        Neighbours::default(),
    )
    .unwrap();
    assert_eq!(fib.lookup(Vrf(0), at("10.1.2.3"), 0), Hop::Local);
    let Hop::Neighbour(hop) = fib.lookup(Vrf(0), at("10.2.2.3"), 0) else {
        panic!()
    };
    assert_eq!((fib.port(hop), fib.mac(hop)), (Some(1), None));
    fib.neighbours().learn(hop, [2, 0, 0, 0, 0, 9]);
    assert_eq!(fib.mac(hop), Some([2, 0, 0, 0, 0, 9]));
    assert_eq!(fib.lookup(Vrf(0), at("11.0.0.1"), 0), Hop::None);
    assert_eq!(
        fib.lookup(Vrf(0), at("2001:db8::1"), 0),
        Hop::Tunnel(TunnelIdx(7))
    );
    assert_eq!(fib.lookup(Vrf(0), at("2001:db9::1"), 0), Hop::None);
    assert_eq!(fib.lookup(Vrf(5), at("10.1.2.3"), 0), Hop::None);
}

#[test]
fn on_link_destinations_are_their_own_next_hop() {
    let mut n = Neighbours::default();
    let hop = n.add(3, "192.0.2.9".parse().unwrap());
    let fib = Fib::build(&[route("192.0.2.0", 24, RouteTo::OnLink { port: 3 })], n).unwrap();
    assert_eq!(fib.lookup(Vrf(0), at("192.0.2.9"), 0), Hop::Neighbour(hop));
    assert_eq!(
        fib.lookup(Vrf(0), at("192.0.2.10"), 0),
        Hop::Unresolved { port: 3 }
    );
}

#[test]
fn equal_paths_are_all_used_and_each_flow_keeps_its_own() {
    let via = |i: u8| RouteTo::Via {
        port: u16::from(i),
        gateway: format!("192.0.2.{i}").parse().unwrap(),
    };
    let fib = Fib::build(
        &[1, 2, 3].map(|i| route("10.0.0.0", 8, via(i))),
        Neighbours::default(),
    )
    .unwrap();
    let mut seen = [0; 4];
    for hash in 0..3000_u32 {
        let Hop::Neighbour(hop) = fib.lookup(Vrf(0), at("10.0.0.1"), hash) else {
            panic!()
        };
        assert_eq!(
            fib.lookup(Vrf(0), at("10.0.0.1"), hash),
            Hop::Neighbour(hop)
        );
        seen[usize::from(fib.port(hop).unwrap())] += 1;
    }
    assert!(
        seen[1..].iter().all(|n| (700..1300).contains(n)),
        "{seen:?}"
    );
}

#[test]
fn a_cached_answer_does_not_outlive_its_table() {
    let mut cache = RouteCache::default();
    let a = Fib::build(
        &[route("10.0.0.0", 8, RouteTo::Local)],
        Neighbours::default(),
    )
    .unwrap();
    assert_eq!(cache.lookup(&a, Vrf(0), at("10.0.0.1"), 0), Hop::Local);
    let b = Fib::build(&[], Neighbours::default()).unwrap();
    assert_eq!(cache.lookup(&b, Vrf(0), at("10.0.0.1"), 0), Hop::None);
}

#[test]
fn the_cache_keeps_equal_paths_apart_and_agrees_with_the_table() {
    let via = |i: u8| RouteTo::Via {
        port: u16::from(i),
        gateway: format!("192.0.2.{i}").parse().unwrap(),
    };
    let mut routes: Vec<_> = [1, 2, 3].map(|i| route("10.0.0.0", 8, via(i))).into();
    routes.push(route("10.1.0.0", 16, RouteTo::Local));
    routes.push(route("2001:db8::", 32, RouteTo::Tunnel(TunnelIdx(7))));
    let fib = Fib::build(&routes, Neighbours::default()).unwrap();
    let mut cache = RouteCache::default();
    let mut paths = std::collections::HashSet::new();
    for hash in 0..300 {
        for dst in [
            "10.0.0.1",
            "10.1.0.1",
            "11.0.0.1",
            "2001:db8::9",
            "2001:db9::9",
        ]
        .map(at)
        {
            for vrf in [Vrf(0), Vrf(1)] {
                let hop = cache.lookup(&fib, vrf, dst, hash);
                assert_eq!(hop, fib.lookup(vrf, dst, hash));
                if let Hop::Neighbour(n) = hop {
                    paths.insert(n.0);
                }
            }
        }
    }
    assert_eq!(paths.len(), 3);
}

proptest! {
    #[test]
    fn agrees_with_a_scan_over_all_routes(
        list in prop::collection::vec((any::<u32>(), 0_u8..=32, 0_u32..50), 0..60),
        probes in prop::collection::vec((any::<u32>(), any::<prop::sample::Index>(), 0_u32..256), 1..60),
    ) {
        let mask = |len: u8| u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
        let mut routes: Vec<Route> = Vec::new();
        for (addr, len, t) in &list {
            let base = addr & mask(*len);
            if !routes.iter().any(|r| r.len == *len && r.addr == IpAddr::V4(base.into())) {
                routes.push(Route { vrf: Vrf(0), addr: IpAddr::V4(base.into()), len: *len, to: RouteTo::Tunnel(TunnelIdx(*t)) });
            }
        }
        let fib = Fib::build(&routes, Neighbours::default()).unwrap();
        for (random, pick, low) in probes {
            let dst = if routes.is_empty() { random } else {
                match routes[pick.index(routes.len())].addr { IpAddr::V4(a) => u32::from(a) ^ low, IpAddr::V6(_) => unreachable!() }
            };
            let want = routes.iter().filter(|r| match r.addr {
                IpAddr::V4(a) => (u32::from(a) ^ dst) & mask(r.len) == 0,
                IpAddr::V6(_) => false,
            }).max_by_key(|r| r.len).map_or(Hop::None, |r| match r.to { RouteTo::Tunnel(t) => Hop::Tunnel(t), _ => unreachable!() });
            prop_assert_eq!(fib.lookup(Vrf(0), mapped(IpAddr::V4(dst.into())), 0), want);
        }
    }
}

#[test]
fn neighbours_that_are_added_change_no_route() {
    let net = route("192.0.2.0", 24, RouteTo::OnLink { port: 3 });
    let before = Fib::build(&[net], Neighbours::default()).unwrap();
    let mut more = before.neighbours().clone();
    let hop = more.add(3, "192.0.2.9".parse().unwrap());
    more.learn(hop, [2, 0, 0, 0, 0, 9]);
    let after = before.with_neighbours(more);
    assert_ne!(before.generation(), after.generation());
    assert_eq!(after.routes(), before.routes());
    assert_eq!(
        before.lookup(Vrf(0), at("192.0.2.9"), 0),
        Hop::Unresolved { port: 3 }
    );
    assert_eq!(
        after.lookup(Vrf(0), at("192.0.2.9"), 0),
        Hop::Neighbour(hop)
    );
    assert_eq!(after.address(hop), Some(at("192.0.2.9")));
}

#[test]
fn neighbours_that_are_kept_keep_their_link_address_under_a_new_number() {
    let mut n = Neighbours::default();
    for last in 1..=9 {
        let hop = n.add(0, IpAddr::from([192, 0, 2, last]));
        n.learn(hop, [2, 0, 0, 0, 0, last]);
    }
    n.retain(|_, addr| addr == IpAddr::from([192, 0, 2, 7]));
    assert_eq!(n.len(), 1);
    let kept: Vec<_> = n.iter().collect();
    assert_eq!(
        kept,
        [(0, IpAddr::from([192, 0, 2, 7]), Some([2, 0, 0, 0, 0, 7]))]
    );
    assert_eq!(n.find(0, IpAddr::from([192, 0, 2, 7])), Some(HopIdx(0)));
    assert_eq!(n.find(0, IpAddr::from([192, 0, 2, 1])), None);
}

#[test]
fn a_path_that_is_given_three_times_gets_three_quarters() {
    let via = |last| RouteTo::Via {
        port: 1,
        gateway: IpAddr::from([192, 0, 2, last]),
    };
    let fib = Fib::build(
        &[1, 1, 1, 2].map(|last| route("10.0.0.0", 8, via(last))),
        Neighbours::default(),
    )
    .unwrap();
    let first = fib.neighbours().find(1, IpAddr::from([192, 0, 2, 1]));
    let hits = (0..4000_u32)
        .filter(|h| match fib.lookup(Vrf(0), at("10.0.0.1"), *h) {
            Hop::Neighbour(hop) => Some(hop) == first,
            _ => false,
        })
        .count();
    assert!((2900..3100).contains(&hits), "{hits}");
}

#[test]
fn the_prefix_that_decides_is_told() {
    let fib = Fib::build(
        &[
            route("10.0.0.0", 8, RouteTo::Blackhole),
            route("10.1.0.0", 16, RouteTo::Local),
            route("2001:db8::", 32, RouteTo::Local),
        ],
        Neighbours::default(),
    )
    .unwrap();
    let prefix = |a| fib.prefix(Vrf(0), at(a)).map(|(a, l)| format!("{a}/{l}"));
    assert_eq!(prefix("10.1.2.3").as_deref(), Some("10.1.0.0/16"));
    assert_eq!(prefix("10.2.2.3").as_deref(), Some("10.0.0.0/8"));
    assert_eq!(prefix("2001:db8::5").as_deref(), Some("2001:db8::/32"));
    assert_eq!(prefix("192.0.2.1"), None);
}

/// A full table of the internet: run with `--ignored --nocapture` for the time that it takes.
#[test]
#[ignore = "takes seconds; for its figures"]
fn a_full_table_is_built_in_seconds() {
    let mut state = 1_u64;
    let mut random = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 32).unwrap_or(0)
    };
    let mut routes = Vec::new();
    for i in 0..1_000_000_u32 {
        let len = [24, 24, 24, 24, 23, 22, 21, 20, 16][(i % 9) as usize];
        let gateway = IpAddr::from([192, 0, 2, u8::try_from(i % 16).unwrap_or(0)]);
        routes.push(Route {
            vrf: Vrf(0),
            addr: IpAddr::from((random() & (u32::MAX << (32 - u32::from(len)))).to_be_bytes()),
            len,
            to: RouteTo::Via { port: 1, gateway },
        });
    }
    for _ in 0..200_000_u32 {
        let addr = u128::from(0x2000 | random() >> 20) << 112 | u128::from(random()) << 80;
        routes.push(Route {
            vrf: Vrf(0),
            addr: IpAddr::V6(addr.into()),
            len: 48,
            to: RouteTo::OnLink { port: 1 },
        });
    }
    let began = std::time::Instant::now();
    let fib = Fib::from_routes(routes, Neighbours::default()).unwrap();
    let took = began.elapsed();
    println!("{} routes in {took:?}", fib.routes().len());
    assert!(took < std::time::Duration::from_secs(30));
}
