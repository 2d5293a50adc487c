//! TAP interfaces in a namespace, with AF_PACKET sockets as the kernel's independent view.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Netns, Raw, privileged};
use pmd::tap::{TapConfig, TapPort};
use pmd::{Arena, ArenaConfig, BURST, Frame, Pool, Port, PortError};

fn arena() -> Arc<Arena> {
    Arena::new(ArenaConfig {
        frames: 512,
        ..ArenaConfig::default()
    })
    .unwrap()
}

fn packet(i: u32) -> Vec<u8> {
    let mut p = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5];
    p.extend(i.to_be_bytes());
    p.resize(60 + (i as usize * 31) % 1400, 7);
    p
}

fn ours(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x88, 0xb5])
}

#[test]
fn frames_cross_both_ways_whole_and_in_order() {
    if !privileged("TAP traffic") {
        return;
    }
    let ns = Netns::new();
    let arena = arena();
    let mut pool = Pool::new(&arena, 64);
    let (mut queue, kernel) = ns.enter(|| {
        let port = TapPort::open(&TapConfig {
            name: "tap%d".into(),
            mtu: Some(1500),
            up: true,
            exception: None,
        })
        .unwrap();
        assert_eq!((port.name(), port.info().mtu), ("tap0", 1500));
        assert_ne!(port.info().mac, port.kernel_mac().unwrap());
        let kernel = Raw::open("tap0");
        (Box::new(port).queues(1, &arena).unwrap().remove(0), kernel)
    });
    let total = 2000;
    let until = Instant::now() + Duration::from_secs(20);
    let mut frames: Vec<Frame> = Vec::new();
    let (mut next, mut arrived) = (0, 0);
    while arrived < total {
        assert!(Instant::now() < until, "{arrived} arrived");
        while frames.len() < BURST && next < total {
            let mut f = pool.get().unwrap();
            assert!(f.set_data(&packet(next)));
            frames.push(f);
            next += 1;
        }
        queue.tx_burst(&mut pool, &mut frames);
        while let Some(seen) = kernel.receive() {
            if ours(&seen) {
                assert_eq!(seen, packet(arrived));
                arrived += 1;
            }
        }
    }
    let (mut sent, mut got) = (0, 0);
    while got < total {
        assert!(Instant::now() < until, "{got} received");
        while sent < total && sent - got < 100 {
            kernel.send(&packet(sent));
            sent += 1;
        }
        queue.rx_burst(&mut pool, &mut frames, BURST);
        for f in frames.iter().filter(|f| ours(f.data())) {
            assert_eq!(f.data(), packet(got));
            got += 1;
        }
        pool.put_bulk(&mut frames);
    }
    assert_eq!(queue.stats().tx_packets.value(), u64::from(total));
    assert!(queue.stats().rx_packets.value() >= u64::from(total));
    queue.drain(&mut pool);
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn several_queues_serve_one_interface_that_goes_with_them() {
    if !privileged("TAP queues") {
        return;
    }
    let ns = Netns::new();
    let arena = arena();
    let mut pool = Pool::new(&arena, 64);
    let config = TapConfig {
        name: "multi".into(),
        mtu: None,
        up: true,
        exception: None,
    };
    let (mut queues, kernel) = ns.enter(|| {
        let port = TapPort::open(&config).unwrap();
        let queues = Box::new(port).queues(3, &arena).unwrap();
        (queues, Raw::open("multi"))
    });
    let exists = || ns.enter(|| nix::net::if_::if_nametoindex("multi").is_ok());
    assert!(exists());
    for (i, queue) in (0..).zip(&mut queues) {
        assert!(queue.wait_fd().is_some());
        let mut frames = vec![pool.get().unwrap()];
        assert!(frames[0].set_data(&packet(i)));
        assert_eq!(queue.tx_burst(&mut pool, &mut frames), 1);
        assert_eq!(kernel.wait_for(&i.to_be_bytes()).unwrap(), packet(i));
    }
    // The kernel chooses the queue; nothing is lost between them.
    for i in 0..50 {
        kernel.send(&packet(i));
    }
    let (mut got, until) = (0, Instant::now() + Duration::from_secs(5));
    let mut frames = Vec::new();
    while got < 50 {
        assert!(Instant::now() < until, "{got} received");
        for queue in &mut queues {
            queue.rx_burst(&mut pool, &mut frames, BURST);
        }
        got += frames.iter().filter(|f| ours(f.data())).count();
        pool.put_bulk(&mut frames);
    }
    queues.clear();
    assert!(!exists());
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn an_interface_that_is_down_loses_frames_by_count_and_keeps_none() {
    if !privileged("TAP down") {
        return;
    }
    let ns = Netns::new();
    let arena = arena();
    let mut pool = Pool::new(&arena, 64);
    let mut queue = ns.enter(|| {
        let config = TapConfig {
            name: "down0".into(),
            ..TapConfig::default()
        };
        let port = TapPort::open(&config).unwrap();
        Box::new(port).queues(1, &arena).unwrap().remove(0)
    });
    let mut frames = vec![pool.get().unwrap(), pool.get().unwrap()];
    for f in &mut frames {
        assert!(f.set_data(&packet(1)));
    }
    assert_eq!(queue.tx_burst(&mut pool, &mut frames), 2);
    assert_eq!(queue.stats().tx_errors.value(), 2);
    assert_eq!(queue.rx_burst(&mut pool, &mut frames, BURST), 0);
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn a_wrong_setting_is_refused() {
    let open = |name: &str, mtu| {
        TapPort::open(&TapConfig {
            name: name.into(),
            mtu,
            up: false,
            exception: None,
        })
    };
    assert!(matches!(open("a/b", None), Err(PortError::Name { .. })));
    assert!(matches!(
        open("t0", Some(67)),
        Err(PortError::Setting { .. })
    ));
    if privileged("TAP frame size") {
        let ns = Netns::new();
        let result = ns.enter(|| {
            let port = open("big0", Some(9000)).unwrap();
            Box::new(port).queues(1, &arena()).map(drop)
        });
        assert!(matches!(
            result,
            Err(PortError::FrameTooSmall { needed: 9018, .. })
        ));
    }
}
