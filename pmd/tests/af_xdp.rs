//! AF_XDP on veth pairs between namespaces, with AF_PACKET sockets as the kernel's independent view.

mod common;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Netns, Raw, holds, privileged};
use pmd::af_xdp::{AfXdpConfig, AfXdpPort, SteerMap, Steering, XdpMode};
use pmd::{Arena, ArenaConfig, BURST, Frame, Pool, Port, PortError, PortQueue};

struct Bed {
    // Dropped in this order: the queues before their interface.
    queues: Vec<Box<dyn PortQueue>>,
    pool: Pool,
    arena: Arc<Arena>,
    steer: SteerMap,
    /// The far end of the wire.
    peer: Raw,
    /// What the kernel sees on the port's interface.
    kernel: Raw,
    _ours: Netns,
    _theirs: Netns,
}

fn bed(config: AfXdpConfig, stride: u32, queues: usize) -> Bed {
    let (ours, theirs) = (Netns::new(), Netns::new());
    ours.veth("a0", &theirs, "b0", queues);
    let arena = Arena::new(ArenaConfig {
        frames: 2048,
        stride,
        ..ArenaConfig::default()
    })
    .unwrap();
    let config = AfXdpConfig {
        interface: "a0".into(),
        ring: 256,
        ..config
    };
    let (steer, queues) = ours.enter(|| {
        let port = AfXdpPort::open(config).unwrap();
        assert_eq!(port.info().kind, "af_xdp");
        let steer = port.steer_map();
        (steer, Box::new(port).queues(queues, &arena).unwrap())
    });
    Bed {
        queues,
        pool: Pool::new(&arena, 64),
        arena,
        steer,
        peer: theirs.enter(|| Raw::open("b0")),
        kernel: ours.enter(|| Raw::open("a0")),
        _ours: ours,
        _theirs: theirs,
    }
}

impl Bed {
    /// Sends a frame from the far end; true when the port received it, false when the kernel did.
    fn is_steered(&mut self, frame: &[u8], mark: &[u8]) -> bool {
        self.peer.send(frame);
        let until = Instant::now() + Duration::from_secs(2);
        let mut got = Vec::new();
        while Instant::now() < until {
            for q in &mut self.queues {
                q.rx_burst(&mut self.pool, &mut got, BURST);
            }
            let steered = got.iter().any(|f| f.data() == frame);
            self.pool.put_bulk(&mut got);
            if steered {
                return true;
            }
            while let Some(seen) = self.kernel.receive() {
                if holds(&seen, mark) {
                    return false;
                }
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        panic!("the frame {frame:02x?} reached nobody");
    }

    fn end(mut self) {
        for q in &mut self.queues {
            q.drain(&mut self.pool);
        }
        assert_eq!(self.arena.outstanding(), 0, "frames are missing");
    }
}

const MARK: &[u8] = b"marked payload!!";

fn ethernet(kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut f = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    f.extend(kind.to_be_bytes());
    f.extend(rest);
    f
}

/// IPv4 with `options` (multiple of 4 bytes), fragment field and destination.
fn ipv4(proto: u8, fragment: u16, options: &[u8], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let mut p = vec![0u8; 20];
    p[0] = 0x40 | u8::try_from(header / 4).unwrap();
    p[2..4].copy_from_slice(&u16::try_from(header + payload.len()).unwrap().to_be_bytes());
    p[6..8].copy_from_slice(&fragment.to_be_bytes());
    p[8] = 64;
    p[9] = proto;
    p[12..16].copy_from_slice(&[192, 0, 2, 1]);
    p[16..20].copy_from_slice(&to);
    p.extend(options);
    p.extend(payload);
    p
}

fn ipv6(next: u8, to: &str, payload: &[u8]) -> Vec<u8> {
    let mut p = vec![0u8; 40];
    p[0] = 0x60;
    p[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    p[6] = next;
    p[7] = 64;
    p[8] = 0xfe;
    let IpAddr::V6(to) = to.parse().unwrap() else {
        panic!("not IPv6");
    };
    p[24..40].copy_from_slice(&to.octets());
    p.extend(payload);
    p
}

fn udp(to: u16, payload: &[u8]) -> Vec<u8> {
    let mut u = 4500u16.to_be_bytes().to_vec();
    u.extend(to.to_be_bytes());
    u.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
    u.extend([0, 0]);
    u.extend(payload);
    u
}

fn esp() -> Vec<u8> {
    [&[0, 0, 0x12, 0x34, 0, 0, 0, 1], MARK].concat()
}

fn ike() -> Vec<u8> {
    [&[0, 0, 0, 0], MARK].concat()
}

const HERE: [u8; 4] = [198, 51, 100, 1];
const HERE6: &str = "2001:db8::1";

fn v4(proto: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(0x0800, &ipv4(proto, 0, &[], HERE, payload))
}

fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(0x86dd, &ipv6(next, HERE6, payload))
}

/// An extension header of `8 * (1 + more)` bytes.
fn extension(next: u8, more: u8) -> Vec<u8> {
    let mut h = vec![0; 8 * (1 + usize::from(more))];
    h[0] = next;
    h[1] = more;
    h
}

fn steering_cases() -> Vec<(&'static str, Vec<u8>, bool)> {
    let tagged = |tag: u16, inner: u16, rest: &[u8]| {
        ethernet(tag, &[&[0, 7], &inner.to_be_bytes()[..], rest].concat())
    };
    let esp4 = ipv4(50, 0, &[], HERE, &esp());
    let fragment6 = |next, offset: u16, payload: &[u8]| {
        let o = (offset << 3).to_be_bytes();
        v6(44, &[&[next, 0, o[0], o[1], 0, 0, 0, 9], payload].concat())
    };
    vec![
        ("ESP over IPv4", v4(50, &esp()), true),
        ("ESP over IPv6", v6(50, &esp()), true),
        (
            "ESP behind IPv4 options",
            ethernet(0x0800, &ipv4(50, 0, &[1; 40], HERE, &esp())),
            true,
        ),
        (
            "first fragment of ESP",
            ethernet(0x0800, &ipv4(50, 0x2000, &[], HERE, &esp())),
            true,
        ),
        (
            "later fragment of ESP",
            ethernet(0x0800, &ipv4(50, 100, &[], HERE, MARK)),
            true,
        ),
        ("later IPv6 fragment of ESP", fragment6(50, 100, MARK), true),
        ("ESP in a VLAN", tagged(0x8100, 0x0800, &esp4), true),
        (
            "ESP in two VLANs",
            ethernet(0x88a8, &[&[0, 7, 0x81, 0, 0, 8, 8, 0], &esp4[..]].concat()),
            true,
        ),
        (
            "ESP behind three IPv6 extension headers",
            v6(
                0,
                &[extension(60, 0), extension(43, 3), extension(50, 31), esp()].concat(),
            ),
            true,
        ),
        ("ESP in UDP", v4(17, &udp(4500, &esp()[2..])), true),
        (
            "ESP in UDP over IPv6",
            v6(17, &udp(4500, &esp()[2..])),
            true,
        ),
        ("IKE beside ESP in UDP", v4(17, &udp(4500, &ike())), false),
        ("IKE over IPv6", v6(17, &udp(4500, &ike())), false),
        ("IKE", v4(17, &udp(500, &esp()[2..])), false),
        (
            "UDP to another port",
            v4(17, &udp(4501, &esp()[2..])),
            false,
        ),
        (
            "later fragment of UDP",
            ethernet(0x0800, &ipv4(17, 100, &[], HERE, &udp(4500, MARK))),
            false,
        ),
        (
            "later IPv6 fragment of UDP",
            fragment6(17, 100, &udp(4500, MARK)),
            false,
        ),
        ("ICMP", v4(1, MARK), false),
        ("TCP", v4(6, MARK), false),
        (
            "neighbour discovery",
            v6(58, &[&[135, 0, 0, 0], MARK].concat()),
            false,
        ),
        ("ARP", ethernet(0x0806, MARK), false),
        ("an unknown protocol", ethernet(0x88b5, MARK), false),
        (
            "an IPv4 header that is too short",
            ethernet(
                0x0800,
                &[&[0x44; 1], &ipv4(50, 0, &[], HERE, MARK)[1..]].concat(),
            ),
            false,
        ),
        (
            "IPv6 that ends in an extension header",
            v6(0, &[&[17, 200], MARK].concat()),
            false,
        ),
        (
            "IPv4 that ends in its header",
            ethernet(0x0800, &MARK[..15]),
            false,
        ),
    ]
}

fn steers_as_the_table_says(mode: XdpMode) {
    let mut bed = bed(
        AfXdpConfig {
            mode,
            ..AfXdpConfig::default()
        },
        2048,
        1,
    );
    for (name, frame, steered) in steering_cases() {
        let mark = if holds(&frame, MARK) {
            MARK
        } else {
            &MARK[..15]
        };
        assert_eq!(bed.is_steered(&frame, mark), steered, "{name}");
    }
    // A keep-alive has no room for a mark; at an Ethernet's minimal length and at its bare length.
    let keep_alive = v4(17, &udp(4500, &[0xff]));
    assert!(bed.is_steered(&keep_alive, &keep_alive));
    let padded = [&keep_alive[..], &[0; 17]].concat();
    assert!(bed.is_steered(&padded, &padded));
    bed.end();
}

#[test]
fn the_driver_steers_ipsec_to_the_port_and_leaves_the_rest_to_the_kernel() {
    if privileged("steering in the driver") {
        steers_as_the_table_says(XdpMode::NativeCopy);
    }
}

#[test]
fn generic_mode_steers_the_same() {
    if privileged("steering in generic mode") {
        steers_as_the_table_says(XdpMode::Generic);
    }
}

#[test]
fn prefixes_to_protect_follow_the_map_at_once() {
    if !privileged("steering by prefix") {
        return;
    }
    let mut bed = bed(AfXdpConfig::default(), 2048, 1);
    let to4 = |a| ethernet(0x0800, &ipv4(6, 0, &[], a, MARK));
    let to6 = |a| ethernet(0x86dd, &ipv6(6, a, MARK));
    let ip = |s: &str| s.parse::<IpAddr>().unwrap();
    assert!(!bed.is_steered(&to4([10, 1, 2, 3]), MARK));

    bed.steer.insert(ip("10.1.0.0"), 16).unwrap();
    bed.steer.insert(ip("10.1.0.0"), 16).unwrap();
    bed.steer.insert(ip("2001:db8:5::"), 48).unwrap();
    assert!(bed.is_steered(&to4([10, 1, 2, 3]), MARK));
    assert!(!bed.is_steered(&to4([10, 2, 2, 3]), MARK));
    assert!(bed.is_steered(&to6("2001:db8:5:ffff::1"), MARK));
    assert!(!bed.is_steered(&to6("2001:db8:6::1"), MARK));

    bed.steer
        .replace(&[(ip("10.2.0.0"), 16), (ip("::"), 0)])
        .unwrap();
    assert!(!bed.is_steered(&to4([10, 1, 2, 3]), MARK));
    assert!(bed.is_steered(&to4([10, 2, 2, 3]), MARK));
    assert!(bed.is_steered(&to6("2001:db8:6::1"), MARK));
    // IKE stays with the kernel, also to a protected prefix.
    let ike_there = ethernet(0x0800, &ipv4(17, 0, &[], [10, 2, 0, 1], &udp(4500, &ike())));
    assert!(!bed.is_steered(&ike_there, MARK));

    bed.steer.remove(ip("10.2.0.0"), 16).unwrap();
    bed.steer.remove(ip("10.9.0.0"), 16).unwrap();
    assert!(!bed.is_steered(&to4([10, 2, 2, 3]), MARK));
    bed.end();
}

#[test]
fn an_interface_of_our_own_gives_all_ip_but_neighbour_discovery() {
    if !privileged("steering of everything") {
        return;
    }
    let config = AfXdpConfig {
        steering: Steering::All,
        ..AfXdpConfig::default()
    };
    let mut bed = bed(config, 2048, 1);
    for (frame, steered) in [
        (v4(6, MARK), true),
        (v6(6, MARK), true),
        (v6(58, &[&[128, 0, 0, 0], MARK].concat()), true),
        (v6(58, &[&[135, 0, 0, 0], MARK].concat()), false),
        (ethernet(0x0806, MARK), false),
    ] {
        assert_eq!(bed.is_steered(&frame, MARK), steered);
    }
    bed.end();
}

#[test]
fn many_frames_cross_both_ways_whole_and_in_order() {
    if !privileged("AF_XDP traffic") {
        return;
    }
    for (mode, stride) in [
        (XdpMode::Auto, 2048),
        (XdpMode::NativeCopy, 4096),
        (XdpMode::NativeCopy, 2112),
        (XdpMode::Generic, 10240),
    ] {
        let config = AfXdpConfig {
            mode,
            ..AfXdpConfig::default()
        };
        let mut bed = bed(config, stride, 1);
        let packet = |i: u32| {
            let len = 30 + (i as usize * 37) % 1400;
            let mut payload = i.to_be_bytes().to_vec();
            payload.resize(len, u8::try_from(i % 251).unwrap());
            v4(50, &payload)
        };
        let total = 3000u32;

        let mut waiting: Vec<Frame> = Vec::new();
        let (mut next, mut arrived) = (0, 0);
        let until = Instant::now() + Duration::from_secs(20);
        while arrived < total {
            assert!(Instant::now() < until, "{arrived} of {total} arrived");
            while waiting.len() < BURST && next < total {
                let mut f = bed.pool.get().unwrap();
                assert!(f.set_data(&packet(next)));
                waiting.push(f);
                next += 1;
            }
            bed.queues[0].tx_burst(&mut bed.pool, &mut waiting);
            while let Some(seen) = bed.peer.receive() {
                if seen.get(12..14) == Some(&[8, 0]) {
                    assert_eq!(seen, packet(arrived), "stride {stride}");
                    arrived += 1;
                }
            }
        }
        assert_eq!(bed.queues[0].stats().tx_packets.value(), u64::from(total));

        let (mut sent, mut got) = (0, 0);
        let mut frames = Vec::new();
        while got < total {
            assert!(Instant::now() < until, "{got} of {total} received");
            // Fewer under way than the rings hold, so none may be lost.
            while sent < total && sent - got < 128 {
                bed.peer.send(&packet(sent));
                sent += 1;
            }
            bed.queues[0].rx_burst(&mut bed.pool, &mut frames, BURST);
            for f in &frames {
                assert_eq!(f.data(), packet(got), "stride {stride}");
                assert!(f.headroom() >= 128);
                got += 1;
            }
            bed.pool.put_bulk(&mut frames);
        }
        let stats = Arc::clone(bed.queues[0].stats());
        assert_eq!(stats.rx_packets.value(), u64::from(total));
        bed.end();
        assert_eq!(
            stats.rx_dropped.value() + stats.rx_errors.value() + stats.tx_errors.value(),
            0
        );
    }
}

#[test]
fn what_the_rings_cannot_take_is_counted_as_dropped() {
    if !privileged("AF_XDP overload") {
        return;
    }
    let mut bed = bed(AfXdpConfig::default(), 2048, 1);
    for _ in 0..400 {
        bed.peer.send(&v4(50, &esp()));
    }
    std::thread::sleep(Duration::from_millis(50));
    let mut frames = Vec::new();
    while bed.queues[0].rx_burst(&mut bed.pool, &mut frames, BURST) > 0 {}
    let got = frames.len() as u64;
    bed.pool.put_bulk(&mut frames);
    let stats = Arc::clone(bed.queues[0].stats());
    bed.end();
    assert!((256..400).contains(&got), "{got}");
    assert_eq!(got + stats.rx_dropped.value(), 400);
}

#[test]
fn every_receive_queue_needs_a_worker() {
    if !privileged("AF_XDP queues") {
        return;
    }
    let mut bed = bed(AfXdpConfig::default(), 2048, 2);
    assert_eq!(bed.queues.len(), 2);
    assert!(bed.is_steered(&v4(50, &esp()), MARK));
    let again = AfXdpConfig {
        interface: "a0".into(),
        ..AfXdpConfig::default()
    };
    bed._ours.enter(|| {
        let port = AfXdpPort::open(again).unwrap();
        assert_eq!(port.info().max_queues, 2);
        assert!(matches!(
            port.open_queues(1, &bed.arena),
            Err(PortError::Setting { .. })
        ));
        assert!(matches!(
            port.open_queues(3, &bed.arena),
            Err(PortError::Queues { .. })
        ));
        // The interface is taken; nothing of the refused attempt stays behind.
        assert!(matches!(
            port.open_queues(2, &bed.arena),
            Err(PortError::System { .. })
        ));
    });
    bed.end();
}

#[test]
fn the_socket_wakes_a_sleeper() {
    if !privileged("AF_XDP wake-up") {
        return;
    }
    let mut bed = bed(AfXdpConfig::default(), 2048, 1);
    let readable = |bed: &Bed, limit: u8| {
        let fd = bed.queues[0].wait_fd().unwrap();
        let mut fds = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, limit).unwrap();
        fds[0]
            .revents()
            .is_some_and(|e| e.contains(nix::poll::PollFlags::POLLIN))
    };
    bed.queues[0].arm();
    assert!(!readable(&bed, 50));
    bed.peer.send(&v4(50, &esp()));
    assert!(readable(&bed, 250));
    bed.end();
}

#[test]
fn frames_come_home_and_the_kernel_gets_its_packets_back_when_the_port_ends() {
    if !privileged("AF_XDP end") {
        return;
    }
    let mut bed = bed(AfXdpConfig::default(), 2048, 1);
    assert!(bed.is_steered(&v4(50, &esp()), MARK));
    bed.queues.clear();
    assert!(!bed.is_steered(&v4(50, &esp()), MARK));
    bed.end();
}

#[test]
fn a_port_that_cannot_work_says_why() {
    if !privileged("AF_XDP refusals") {
        return;
    }
    let ns = Netns::new();
    ns.ip(&[
        "link", "add", "d0", "mtu", "3000", "type", "veth", "peer", "d1",
    ]);
    let open = |interface: &str, ring| {
        ns.enter(|| {
            AfXdpPort::open(AfXdpConfig {
                interface: interface.into(),
                ring,
                ..AfXdpConfig::default()
            })
        })
    };
    assert!(matches!(open("none0", 256), Err(PortError::System { .. })));
    assert!(matches!(open("bad name", 256), Err(PortError::Name { .. })));
    assert!(matches!(open("d0", 100), Err(PortError::Setting { .. })));
    let arena = Arena::new(ArenaConfig::default()).unwrap();
    let port = open("d0", 256).unwrap();
    assert!(matches!(
        ns.enter(|| port.open_queues(1, &arena)),
        Err(PortError::FrameTooSmall {
            needed: 3022,
            room: 1792,
            ..
        })
    ));
}
