//! Two gateways back to back in one process: what goes in at one end comes out at the other, and every frame is
//! accounted for.

use std::net::IpAddr;
use std::sync::Arc;

use etherparse::PacketBuilder;
use gateway::app::{Assembled, AssemblyConfig, OpenPort, assemble};
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::worker::{Locals, PortSetup, Side};
use pmd::memory::{MemoryQueue, PairConfig, pair};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, HugePolicy, Pool, PortQueue};
use sa_store::drops::{Consumed, DropReason};
use sa_store::fib::{Fib, Neighbours, Route, RouteTo};
use sa_store::ledger::Balance;
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::runtime::Start;
use sa_store::sa::*;
use sa_store::spd::Spd;
use sa_store::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};

const MAC_HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GCM: Suite = Suite::Gcm(AesBits::B128, AeadIcv::L16);

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn prefix(s: &str) -> AddrRange {
    let (a, l) = s.split_once('/').unwrap();
    AddrRange::prefix(ip(a), l.parse().unwrap()).unwrap()
}

fn any(src: &str, dst: &str) -> Selector {
    Selector {
        src: prefix(src),
        dst: prefix(dst),
        proto: None,
        ports: Ports::Any,
    }
}

fn sa(name: &str, direction: Direction, spi: u32, a: &str, b: &str, suite: Suite) -> SaSpec {
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

fn policy(name: &str, direction: Direction, selectors: Vec<Selector>, action: Action) -> Policy {
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

/// One gateway with its far ends of the inside and, for the second one, nothing else.
struct Site {
    gw: Assembled,
    host: MemoryQueue,
}

struct Bed {
    arena: Arc<Arena>,
    pool: Pool,
    left: Site,
    right: Site,
}

/// `shape` may change the two outbound SAs (left to right, right to left) before they are installed on both sides.
fn bed(workers: usize, suite: Suite, mtu: u16, shape: impl Fn(&mut SaSpec)) -> Bed {
    let stride = if mtu > 1600 { 10_240 } else { 2048 };
    let arena = Arena::new(ArenaConfig {
        frames: 4096,
        stride,
        huge: HugePolicy::Never,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap();
    let cfg = PairConfig {
        queues: 1,
        ring: 1024,
        mtu: u32::from(mtu),
    };
    let (host_l, in_l) = pair("host-l", "in-l", &cfg);
    let (out_l, out_r) = pair("out-l", "out-r", &cfg);
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
    sas.iter_mut().for_each(&shape);
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
                queues: vec![Box::new(outside)],
            },
        ];
        let config = AssemblyConfig {
            cpus: vec![None; workers],
            locals: Locals::new(
                [own, &format!("{own_net}.0.254"), &format!("{own6}ffff")].map(|a| (Vrf(0), ip(a))),
            ),
            ..AssemblyConfig::default()
        };
        let mut gw = assemble(config, &arena, ports).unwrap();
        let mut n = Neighbours::default();
        let host = n.add(0, ip(&format!("{own_net}.0.1")));
        n.learn(host, MAC_HOST);
        let far = n.add(1, ip(peer));
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
            let start = Start {
                next_seq: 1,
                lease_end: u64::from(u32::MAX),
                window_top: 0,
            };
            gw.store
                .add_sa(&mut draft, Arc::new(s), &selection, start, 0)
                .unwrap();
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
    };
    let right = Site {
        gw: site(in_r, out_r, false),
        host: open(host_r),
    };
    Bed {
        pool: Pool::new(&arena, 256),
        arena,
        left,
        right,
    }
}

impl Bed {
    fn send_left(&mut self, packets: &[Vec<u8>]) {
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
    fn settle(&mut self) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
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
            quiet = if work == 0 { quiet + 1 } else { 0 };
        }
        for site in [&self.left, &self.right] {
            let b = Balance::of(site.gw.counters.iter().map(|c| &**c));
            assert!(b.holds(), "every frame is accounted for: {b:?}");
            assert_eq!(b.inside, 0, "{b:?}");
        }
        (l, r)
    }

    fn dropped(&self, left: bool) -> Vec<(DropReason, u64)> {
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
        }
        if !std::thread::panicking() {
            assert_eq!(self.arena.outstanding(), 0, "no frame is lost");
        }
    }
}

fn udp(src: &str, dst: &str, ttl: u8, payload: &[u8]) -> Vec<u8> {
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
fn payload_of(frame: &[u8]) -> Vec<u8> {
    let s = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
    match s.transport {
        Some(etherparse::TransportSlice::Udp(u)) => u.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn packets_of_both_families_cross_the_tunnel_with_every_kind_of_suite() {
    let suites = [
        GCM,
        Suite::Gcm(AesBits::B256, AeadIcv::L8),
        Suite::Gmac(AesBits::B192),
        Suite::ChaCha20Poly1305,
        Suite::CipherHmac(Cipher::Cbc(AesBits::B256), Hmac::Sha256_128),
        Suite::CipherHmac(Cipher::Ctr(AesBits::B128), Hmac::Sha1_96),
        Suite::CipherHmac(Cipher::Null, Hmac::Sha512_256),
    ];
    for suite in suites {
        for encap in [
            None,
            Some(UdpEncap {
                sport: 4500,
                dport: 4500,
            }),
        ] {
            let mut bed = bed(1, suite, 1500, |s| s.encap = encap);
            let sent: Vec<Vec<u8>> = (0..40_usize)
                .map(|i| {
                    let body = vec![u8::try_from(i).unwrap(); 30 * i];
                    if i % 2 == 0 {
                        udp("10.1.0.1", "10.2.0.1", 64, &body)
                    } else {
                        udp("fd01::1", "fd02::1", 64, &body)
                    }
                })
                .collect();
            bed.send_left(&sent);
            let (l, r) = bed.settle();
            assert!(l.is_empty());
            assert_eq!(
                r.len(),
                sent.len(),
                "{suite} {:?} {:?}",
                bed.dropped(true),
                bed.dropped(false)
            );
            for (a, b) in sent.iter().zip(&r) {
                assert_eq!(payload_of(a), payload_of(b), "{suite}");
                let ttl = if b[14] >> 4 == 4 { b[22] } else { b[21] };
                assert_eq!(ttl, 62);
            }
        }
    }
}

#[test]
fn several_workers_hand_packets_to_the_owner_and_lose_none() {
    let mut bed = bed(3, GCM, 1500, |_| {});
    for _ in 0..20 {
        let burst: Vec<_> = (0..50)
            .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &[i; 100]))
            .collect();
        bed.send_left(&burst);
        let (_, r) = bed.settle();
        assert_eq!(
            r.len(),
            50,
            "{:?} {:?}",
            bed.dropped(true),
            bed.dropped(false)
        );
        let order: Vec<u8> = r.iter().map(|p| payload_of(p)[0]).collect();
        assert!(order.is_sorted(), "order within the flow is kept");
    }
    let handed: u64 = bed
        .right
        .gw
        .counters
        .iter()
        .map(|c| c.handed_out.value())
        .sum();
    assert!(handed > 0, "the receiving worker is not the owner");
}

#[test]
fn jumbo_packets_cross() {
    let mut bed = bed(1, GCM, 9100, |_| {});
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &vec![7; 8972])]);
    assert_eq!(bed.settle().1.len(), 1);
}

#[test]
fn too_big_packets_are_answered_with_the_mtu_that_fits_exactly() {
    let mut bed = bed(1, GCM, 1500, |s| s.df = Df::Set);
    let mut big = udp("10.1.0.1", "10.2.0.1", 64, &[1; 1472]);
    big[20] |= 0x40;
    let sum = etherparse::Ipv4HeaderSlice::from_slice(&big[14..])
        .unwrap()
        .to_header()
        .calc_header_checksum();
    big[24..26].copy_from_slice(&sum.to_be_bytes());
    bed.send_left(&[big.clone()]);
    let (l, r) = bed.settle();
    assert!(r.is_empty());
    assert_eq!(bed.dropped(true), [(DropReason::TooBig, 1)]);
    let answer = l.first().expect("an ICMP error");
    assert_eq!((answer[34], answer[35]), (3, 4), "fragmentation needed");
    let mtu = u16::from_be_bytes([answer[40], answer[41]]);
    for (len, arrives) in [(mtu, true), (mtu + 1, false)] {
        bed.send_left(&[udp(
            "10.1.0.1",
            "10.2.0.1",
            64,
            &vec![1; usize::from(len) - 28],
        )]);
        assert_eq!(bed.settle().1.len() == 1, arrives, "{len}");
    }
}

#[test]
fn with_df_clear_the_outer_packet_travels_in_fragments_and_is_put_together() {
    let mut bed = bed(1, GCM, 1500, |s| s.df = Df::Clear);
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &[9; 1472])]);
    let (_, r) = bed.settle();
    assert_eq!(
        r.len(),
        1,
        "{:?} {:?}",
        bed.dropped(true),
        bed.dropped(false)
    );
    assert_eq!(payload_of(&r[0]), [9; 1472]);
    let merged = bed.right.gw.counters[0].consumed[Consumed::Reassembled as usize].value();
    assert_eq!(merged, 1);
}

#[test]
fn policy_bypasses_discards_and_demands_protection() {
    let mut bed = bed(1, GCM, 1500, |_| {});
    bed.send_left(&[
        udp("10.1.0.1", "203.0.113.9", 64, b"bypass"),
        udp("10.1.0.1", "198.51.100.1", 64, b"no policy"),
    ]);
    bed.settle();
    assert_eq!(bed.dropped(true), [(DropReason::PolicyDiscard, 1)]);
    // The bypassed packet arrived in the clear at the right gateway, whose inbound policy does not allow it.
    assert_eq!(bed.dropped(false), [(DropReason::PolicyDiscard, 1)]);
}

#[test]
fn an_expired_hop_limit_is_answered() {
    let mut bed = bed(1, GCM, 1500, |_| {});
    bed.send_left(&[
        udp("10.1.0.1", "10.2.0.1", 1, b"x"),
        udp("fd01::1", "fd02::1", 1, b"x"),
    ]);
    let (l, r) = bed.settle();
    assert!(r.is_empty());
    assert_eq!(bed.dropped(true), [(DropReason::TtlExpired, 2)]);
    assert_eq!(
        (l[0][34], l[1][54]),
        (11, 3),
        "time exceeded in both families"
    );
}

#[test]
fn replayed_and_forged_packets_are_refused_by_name() {
    let mut bed = bed(1, GCM, 1500, |_| {});
    // Take the encrypted packet off the wire: run the left gateway alone and read at the right one's port.
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, b"one")]);
    let (_, r) = bed.settle();
    assert_eq!(r.len(), 1);
    let entry = bed.right.gw.store.current();
    let inbound = entry
        .sas
        .iter()
        .flatten()
        .find(|e| e.fixed.direction == Direction::In)
        .unwrap();
    assert_eq!(inbound.live.window.top(), 1);
    assert_eq!(inbound.live.counters.packets.value(), 1);
}
