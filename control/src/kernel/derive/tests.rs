use super::super::model::{Hops, TABLE_MAIN};
use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(name: &str) -> Link {
    Link {
        name: name.into(),
        up: true,
        carrier: true,
        mtu: 1500,
        ..Link::default()
    }
}

fn settings() -> Settings {
    let port = |port, interface: &str, vlan| PortLink {
        port,
        interface: Some(interface.into()),
        vlan,
        vrf: Vrf(0),
    };
    Settings {
        routes: true,
        neighbours: true,
        addresses: true,
        tables: vec![TABLE_MAIN],
        vrfs: vec![("blue".into(), Vrf(7))],
        ports: vec![
            port(0, "lan", None),
            port(1, "wan", None),
            port(2, "lan", Some(30)),
        ],
        wires: vec!["wire".into()],
        ..Settings::default()
    }
}

/// lan 1, wan 2, mgmt 3, xfrm0 4 (if_id 42), blue 5 (table 70), lan.30 6, wire 7.
fn tables() -> Tables {
    let mut t = Tables::default();
    for (index, name) in [(1, "lan"), (2, "wan"), (3, "mgmt"), (7, "wire")] {
        t.links.insert(index, link(name));
    }
    let with = |name, kind| Link { kind, ..link(name) };
    t.links
        .insert(4, with("ipsec0", LinkKind::Xfrm { if_id: 42 }));
    t.links.insert(5, with("blue", LinkKind::Vrf { table: 70 }));
    t.links
        .insert(6, with("lan.30", LinkKind::Vlan { parent: 1, id: 30 }));
    t
}

fn hop(oif: u32, via: Option<&str>, weight: u16) -> KernelHop {
    KernelHop {
        oif,
        via: via.map(ip),
        weight,
        wrapped: false,
    }
}

fn add(t: &mut Tables, table: u32, prefix: &str, metric: u32, kind: RouteKind, hops: &[KernelHop]) {
    let (addr, len) = prefix.split_once('/').unwrap();
    let key = RouteKey {
        table,
        addr: ip(addr),
        len: len.parse().unwrap(),
        metric,
    };
    t.routes.entry(key).or_default().push(KernelRoute {
        kind,
        protocol: 4,
        hops: Hops::new(hops),
    });
}

fn wanted(s: &Settings, t: &Tables) -> Wanted {
    let tunnels = HashMap::from([(42, TunnelIdx(5))]);
    View::new(s, t, &tunnels).wanted()
}

/// The routes of a prefix in words.
fn of(w: &Wanted, vrf: u16, prefix: &str) -> Vec<String> {
    let (addr, len) = prefix.split_once('/').unwrap();
    w.routes
        .iter()
        .filter(|r| (r.vrf, r.addr, r.len.to_string()) == (Vrf(vrf), ip(addr), len.to_owned()))
        .map(|r| match r.to {
            RouteTo::Via { port, gateway } => format!("{gateway}@{port}"),
            RouteTo::OnLink { port } => format!("link@{port}"),
            RouteTo::Tunnel(t) => format!("tunnel {}", t.0),
            RouteTo::Local => "local".into(),
            RouteTo::Blackhole => "blackhole".into(),
        })
        .collect()
}

#[test]
fn each_kind_of_route_comes_to_what_the_kernel_would_do() {
    use RouteKind::{Broadcast, Drop, Local, Other, Unicast};
    let mut t = tables();
    let m = TABLE_MAIN;
    add(&mut t, m, "10.1.0.0/16", 0, Unicast, &[hop(1, None, 1)]);
    add(
        &mut t,
        m,
        "0.0.0.0/0",
        0,
        Unicast,
        &[hop(2, Some("192.0.2.1"), 1)],
    );
    add(&mut t, m, "10.2.0.0/16", 0, Unicast, &[hop(4, None, 1)]);
    add(&mut t, m, "10.3.0.0/16", 0, Drop, &[]);
    add(
        &mut t,
        m,
        "10.4.0.0/16",
        0,
        Unicast,
        &[hop(2, Some("fe80::1"), 1)],
    );
    add(&mut t, m, "10.5.0.0/16", 0, Unicast, &[hop(6, None, 1)]);
    add(&mut t, m, "10.6.0.0/16", 0, Other(9), &[]);
    add(&mut t, m, "10.7.0.0/16", 0, Unicast, &[hop(7, None, 1)]);
    add(&mut t, m, "10.8.0.0/16", 0, Unicast, &[hop(3, None, 1)]);
    add(&mut t, m, "fe80::/64", 256, Unicast, &[hop(1, None, 1)]);
    add(
        &mut t,
        TABLE_LOCAL,
        "10.1.0.1/32",
        0,
        Local,
        &[hop(1, None, 1)],
    );
    add(
        &mut t,
        TABLE_LOCAL,
        "10.1.255.255/32",
        0,
        Broadcast,
        &[hop(1, None, 1)],
    );
    add(
        &mut t,
        TABLE_LOCAL,
        "127.0.0.0/8",
        0,
        Local,
        &[hop(1, None, 1)],
    );
    add(
        &mut t,
        TABLE_LOCAL,
        "fe80::7/128",
        0,
        Local,
        &[hop(1, None, 1)],
    );
    add(&mut t, 99, "10.9.0.0/16", 0, Unicast, &[hop(1, None, 1)]);
    let mut wrapped = hop(2, Some("192.0.2.1"), 1);
    wrapped.wrapped = true;
    add(&mut t, m, "10.10.0.0/16", 0, Unicast, &[wrapped]);
    let w = wanted(&settings(), &t);
    for (prefix, expected) in [
        ("10.1.0.0/16", vec!["link@0"]),
        ("0.0.0.0/0", vec!["192.0.2.1@1"]),
        ("10.2.0.0/16", vec!["tunnel 5"]),
        ("10.3.0.0/16", vec!["blackhole"]),
        ("10.4.0.0/16", vec!["fe80::1@1"]),
        ("10.5.0.0/16", vec!["link@2"]),
        ("10.6.0.0/16", vec!["blackhole"]),
        ("10.7.0.0/16", vec![]),
        ("10.8.0.0/16", vec!["local"]),
        ("fe80::/64", vec![]),
        ("10.1.0.1/32", vec!["local"]),
        ("10.1.255.255/32", vec!["blackhole"]),
        ("127.0.0.0/8", vec![]),
        ("fe80::7/128", vec!["local"]),
        ("10.9.0.0/16", vec![]),
        ("10.10.0.0/16", vec!["blackhole"]),
    ] {
        assert_eq!(of(&w, 0, prefix), expected, "{prefix}");
    }
    assert_eq!(w.refusals, 2, "{:?}", w.refused);
    assert_eq!(w.routes.len(), w.origins.len());
    let drop = Settings {
        foreign: Foreign::Drop,
        ..settings()
    };
    assert_eq!(of(&wanted(&drop, &t), 0, "10.8.0.0/16"), ["blackhole"]);
}

#[test]
fn the_lowest_metric_with_a_device_that_is_up_wins() {
    let mut t = tables();
    for (metric, oif, via) in [(10, 1, "10.1.0.9"), (20, 2, "192.0.2.9")] {
        let hops = [hop(oif, Some(via), 1)];
        add(
            &mut t,
            TABLE_MAIN,
            "10.5.0.0/16",
            metric,
            RouteKind::Unicast,
            &hops,
        );
    }
    let s = settings();
    assert_eq!(of(&wanted(&s, &t), 0, "10.5.0.0/16"), ["10.1.0.9@0"]);
    t.links.get_mut(&1).unwrap().up = false;
    let w = wanted(&s, &t);
    assert_eq!(of(&w, 0, "10.5.0.0/16"), ["192.0.2.9@1"]);
    assert_eq!(w.origins[0].metric, 20);
    t.links.get_mut(&2).unwrap().up = false;
    assert!(of(&wanted(&s, &t), 0, "10.5.0.0/16").is_empty());
}

#[test]
fn weights_are_shares_and_paths_without_carrier_wait() {
    let mut t = tables();
    let hops = [hop(1, Some("10.1.0.9"), 4), hop(2, Some("192.0.2.9"), 2)];
    add(
        &mut t,
        TABLE_MAIN,
        "10.5.0.0/16",
        0,
        RouteKind::Unicast,
        &hops,
    );
    let s = settings();
    let paths = of(&wanted(&s, &t), 0, "10.5.0.0/16");
    assert_eq!(paths, ["10.1.0.9@0", "10.1.0.9@0", "192.0.2.9@1"]);
    t.links.get_mut(&1).unwrap().carrier = false;
    assert_eq!(of(&wanted(&s, &t), 0, "10.5.0.0/16"), ["192.0.2.9@1"]);
    t.links.get_mut(&2).unwrap().carrier = false;
    assert_eq!(of(&wanted(&s, &t), 0, "10.5.0.0/16").len(), 3);
    // Many large weights stay within bounds, and nobody is left out.
    let hops: Vec<_> = (1..=200)
        .map(|n| {
            hop(
                1,
                Some(&format!("10.1.0.{n}")),
                if n == 1 { 256 } else { 255 },
            )
        })
        .collect();
    let mut t = tables();
    add(
        &mut t,
        TABLE_MAIN,
        "10.5.0.0/16",
        0,
        RouteKind::Unicast,
        &hops,
    );
    let paths = of(&wanted(&s, &t), 0, "10.5.0.0/16");
    let distinct: HashSet<_> = paths.iter().collect();
    assert_eq!(distinct.len(), 200);
    assert!(paths.len() <= 256, "{}", paths.len());
}

#[test]
fn the_configuration_wins_at_equal_length_only() {
    let mut t = tables();
    for prefix in ["10.5.0.0/16", "10.5.1.0/24"] {
        let hops = [hop(2, Some("192.0.2.9"), 1)];
        add(&mut t, TABLE_MAIN, prefix, 0, RouteKind::Unicast, &hops);
    }
    let mut s = settings();
    s.static_routes.push(Route {
        vrf: Vrf(0),
        // As the address of a port gives it.
        addr: ip("10.5.0.7"),
        len: 16,
        to: RouteTo::Blackhole,
    });
    let w = wanted(&s, &t);
    assert_eq!(of(&w, 0, "10.5.0.7/16"), ["blackhole"]);
    assert!(of(&w, 0, "10.5.0.0/16").is_empty());
    assert_eq!(of(&w, 0, "10.5.1.0/24"), ["192.0.2.9@1"]);
}

#[test]
fn tables_of_vrf_devices_are_our_vrfs_and_others_are_left_out() {
    let mut t = tables();
    t.links.get_mut(&3).unwrap().controller = Some(5);
    add(
        &mut t,
        70,
        "10.5.0.0/16",
        0,
        RouteKind::Unicast,
        &[hop(2, Some("192.0.2.9"), 1)],
    );
    add(
        &mut t,
        71,
        "10.6.0.0/16",
        0,
        RouteKind::Unicast,
        &[hop(2, Some("192.0.2.9"), 1)],
    );
    let whole = Address {
        len: 24,
        valid: true,
    };
    t.addresses.insert((3, ip("198.51.100.1")), whole);
    let w = wanted(&settings(), &t);
    assert_eq!(of(&w, 7, "10.5.0.0/16"), ["192.0.2.9@1"]);
    assert!(of(&w, 0, "10.5.0.0/16").is_empty());
    assert!(w.routes.iter().all(|r| r.addr != ip("10.6.0.0")));
    assert_eq!(w.locals.list(), [(Vrf(7), ip("198.51.100.1"))]);
}

#[test]
fn earlier_tables_win_at_equal_length() {
    let mut t = tables();
    add(
        &mut t,
        100,
        "10.5.0.0/16",
        0,
        RouteKind::Unicast,
        &[hop(1, None, 1)],
    );
    add(
        &mut t,
        TABLE_MAIN,
        "10.5.0.0/16",
        0,
        RouteKind::Unicast,
        &[hop(2, None, 1)],
    );
    let mut s = settings();
    s.tables = vec![100, TABLE_MAIN];
    assert_eq!(of(&wanted(&s, &t), 0, "10.5.0.0/16"), ["link@0"]);
    s.tables = vec![TABLE_MAIN, 100];
    assert_eq!(of(&wanted(&s, &t), 0, "10.5.0.0/16"), ["link@1"]);
}

#[test]
fn own_addresses_are_those_of_the_host_but_not_of_the_far_side_of_a_port() {
    let mut t = tables();
    let net = |len| Address { len, valid: true };
    t.addresses.insert((1, ip("10.1.0.1")), net(16));
    t.addresses.insert((3, ip("198.51.100.1")), net(24));
    t.addresses.insert((7, ip("172.16.0.1")), net(24));
    t.addresses.insert((1, ip("127.0.0.1")), net(8));
    let checked = Address {
        len: 64,
        valid: false,
    };
    t.addresses.insert((1, ip("2001:db8::1")), checked);
    let mut s = settings();
    s.routes = false;
    s.static_locals = vec![(Vrf(0), ip("192.0.2.7"))];
    let w = wanted(&s, &t);
    let own = [
        (Vrf(0), ip("10.1.0.1")),
        (Vrf(0), ip("192.0.2.7")),
        (Vrf(0), ip("198.51.100.1")),
    ];
    assert_eq!(w.locals.list(), own);
    // Without the kernel's routes, the networks of ports' addresses are reached all the same.
    assert_eq!(of(&w, 0, "10.1.0.0/16"), ["link@0"]);
    assert_eq!(of(&w, 0, "10.1.0.1/32"), ["local"]);
    assert!(of(&w, 0, "198.51.100.0/24").is_empty());
}

#[test]
fn a_route_to_an_xfrm_device_without_a_tunnel_drops() {
    let mut t = tables();
    add(
        &mut t,
        TABLE_MAIN,
        "0.0.0.0/0",
        0,
        RouteKind::Unicast,
        &[hop(2, None, 1)],
    );
    add(
        &mut t,
        TABLE_MAIN,
        "10.2.0.0/16",
        0,
        RouteKind::Unicast,
        &[hop(4, None, 1)],
    );
    let (s, none) = (settings(), HashMap::new());
    let view = View::new(&s, &t, &none);
    assert!(view.has_tunnels());
    let w = view.wanted();
    assert_eq!(of(&w, 0, "10.2.0.0/16"), ["blackhole"]);
    assert!(w.refused[0].contains("if_id 42"), "{:?}", w.refused);
}

#[test]
fn neighbours_are_those_of_ports_and_the_configuration_s_stay() {
    let mut t = tables();
    let reach = Reach {
        mac: [2, 0, 0, 0, 0, 1],
        stale: false,
    };
    for (index, addr) in [
        (1, "10.1.0.9"),
        (1, "10.1.0.8"),
        (3, "198.51.100.9"),
        (6, "10.30.0.9"),
    ] {
        t.neighbours.insert((index, ip(addr)), reach);
    }
    let mut s = settings();
    s.static_neighbours = vec![(0, ip("10.1.0.8"))];
    let none = HashMap::new();
    let view = View::new(&s, &t, &none);
    let found: Vec<_> = view.neighbours().into_keys().collect();
    assert_eq!(found, [(0, ip("10.1.0.9")), (2, ip("10.30.0.9"))]);
    assert_eq!(
        view.interface(2).map(|(i, l)| (i, l.name.as_str())),
        Some((6, "lan.30"))
    );
    s.neighbours = false;
    assert!(View::new(&s, &t, &none).neighbours().is_empty());
}
