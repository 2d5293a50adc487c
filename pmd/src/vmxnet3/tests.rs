use std::sync::Arc;
use std::time::{Duration, Instant};

use super::model::Model;
use super::*;
use crate::arena::{ArenaConfig, HugePolicy};
use crate::checksum::test::{accepted, partial};
use crate::frame::Frame;

const MAC: [u8; 6] = [0x00, 0x50, 0x56, 1, 2, 3];

struct Set {
    model: Arc<Model>,
    control: Arc<Vmxnet3Control>,
    queues: Vec<Vmxnet3Queue>,
    arena: Arc<Arena>,
    pool: Pool,
}

fn set_with(revisions: u32, queues: usize, config: Vmxnet3Config) -> Set {
    let arena = Arena::new(ArenaConfig {
        frames: 16_384,
        stride: if config.mtu > 1500 { 10_240 } else { 2048 },
        huge: HugePolicy::Never,
        ..ArenaConfig::default()
    })
    .unwrap();
    let model = Model::new(revisions, MAC);
    let port = Vmxnet3Port::open(Arc::new(model.device(16).unwrap()), config).unwrap();
    let control = port.handle();
    let queues = port.open_queues(queues, &arena).unwrap();
    Set {
        model,
        control,
        queues,
        pool: Pool::new(&arena, 256),
        arena,
    }
}

fn set() -> Set {
    set_with(
        1,
        1,
        Vmxnet3Config {
            rx_ring: 64,
            tx_ring: 64,
            ..Vmxnet3Config::default()
        },
    )
}

impl Set {
    fn frame(&mut self, bytes: &[u8]) -> Frame {
        let mut f = self.pool.get().unwrap();
        assert!(f.set_data(bytes));
        f
    }

    fn received(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        self.queues[queue].rx_burst(&mut self.pool, &mut out, 64);
        let bytes = out.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut out);
        bytes
    }

    fn send(&mut self, queue: usize, frames: &[Vec<u8>]) -> usize {
        let mut burst: Vec<Frame> = frames.iter().map(|f| self.frame(f)).collect();
        let n = self.queues[queue].tx_burst(&mut self.pool, &mut burst);
        self.pool.put_bulk(&mut burst);
        n
    }

    /// Polls until the device runs again.
    fn recover(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        while !self.model.active() {
            assert!(Instant::now() < end, "it does not come back");
            for q in &mut self.queues {
                q.rx_burst(&mut self.pool, &mut Vec::new(), 1);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn error(&self, name: &str) -> u64 {
        let all = self.control.device_errors();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Shuts down and looks for lost frames.
    fn end(self) {
        let Set {
            model,
            mut queues,
            arena,
            mut pool,
            ..
        } = self;
        for q in &mut queues {
            q.drain(&mut pool);
        }
        assert!(!model.active() && !model.bus().bus_master());
        drop((queues, pool));
        assert_eq!(arena.outstanding(), 0);
        assert_eq!(model.bus().faults(), 0, "DMA outside of what was mapped");
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + seed) & 0xff).unwrap())
        .collect()
}

#[test]
fn frames_of_all_sizes_pass_both_ways_over_many_laps_of_the_rings() {
    let mut s = set();
    for round in 0..200 {
        let frames: Vec<_> = (0..20)
            .map(|n| pattern(60 + (round * 53 + n * 211) % 1455, round + n))
            .collect();
        assert_eq!(s.send(0, &frames), 20);
        let mut sent = Vec::new();
        s.model.transmitted(0, 64, |f| sent.push(f.to_vec()));
        assert_eq!(sent, frames);
        for f in &frames {
            assert!(s.model.receive(0, f));
        }
        assert_eq!(s.received(0), frames);
    }
    let c = s.control.counters();
    assert_eq!((c.tx_packets, c.rx_packets), (4000, 4000));
    assert_eq!((c.tx_errors, c.rx_no_buffer, c.rx_errors), (0, 0, 0));
    let stats = Arc::clone(s.queues[0].stats());
    assert_eq!(stats.rx_bytes.value(), c.rx_bytes);
    assert_eq!(stats.tx_bytes.value(), c.tx_bytes);
    s.end();
}

/// Also where a frame needs two descriptors, for which the driver does it.
#[test]
fn checksums_that_were_left_are_completed() {
    let config = Vmxnet3Config {
        mtu: 9000,
        ..Vmxnet3Config::default()
    };
    let mut s = set_with(1, 1, config);
    for round in 0..20 {
        let bytes: Vec<_> = (0..40)
            .map(|n| partial(&pattern(220 * n + round, n)))
            .collect();
        let mut burst = Vec::new();
        for (n, bytes) in bytes.iter().enumerate() {
            let mut frame = s.frame(bytes);
            if n % 4 != 0 {
                frame.leave_checksum();
            }
            burst.push(frame);
        }
        assert_eq!(s.queues[0].tx_burst(&mut s.pool, &mut burst), 40);
        let mut sent = Vec::new();
        s.model.transmitted(0, 64, |f| sent.push(f.to_vec()));
        for (n, (sent, bytes)) in sent.iter().zip(&bytes).enumerate() {
            assert_eq!(accepted(sent), n % 4 != 0, "{n}");
            assert_eq!(sent[62..], bytes[62..]);
        }
    }
    s.end();
}

#[test]
fn set_up_goes_through_the_published_order() {
    let s = set_with(0b1001, 4, Vmxnet3Config::default());
    assert_eq!(s.control.mac().0, MAC);
    let commands = s.model.commands();
    let activated = commands.iter().position(|&c| c == 0xcafe_0000).unwrap();
    assert_eq!(commands[0], 0xcafe_0002, "reset first");
    assert!(
        commands[activated..].contains(&0xcafe_0010),
        "ESP is hashed by SPI"
    );
    assert_eq!(s.model.rss_fields() & 0x10, 0x10);
    assert_eq!(s.model.mode(), 1 | 4 | 8);
    assert_eq!(s.control.link().mbps, 10_000);
    s.control.set_promiscuous(true).unwrap();
    assert_eq!(s.model.mode(), 1 | 4 | 8 | 16);
    s.control.set_promiscuous(false).unwrap();
    s.control.set_all_multicast(false);
    assert_eq!(s.model.mode(), 1 | 4);
    s.end();
}

#[test]
fn revision_one_is_not_asked_to_hash_esp() {
    let s = set_with(1, 2, Vmxnet3Config::default());
    assert!(!s.model.commands().contains(&0xcafe_0010));
    s.end();
}

#[test]
fn each_queue_has_its_own_rings_and_interrupt() {
    let mut s = set_with(1, 4, Vmxnet3Config::default());
    for q in 0..4 {
        let f = pattern(100 + q, q);
        s.queues[q].arm();
        assert!(s.model.receive(q, &f));
        let ready = |s: &Set, q: usize| {
            let mut count = [0; 8];
            nix::unistd::read(s.queues[q].wait_fd().unwrap(), &mut count).is_ok()
        };
        assert!(ready(&s, q), "its interrupt fired");
        assert!(!(0..4).any(|other| ready(&s, other)));
        assert_eq!(s.send(q, std::slice::from_ref(&f)), 1);
        let mut sent = Vec::new();
        s.model.transmitted(q, 64, |f| sent.push(f.to_vec()));
        assert_eq!(sent, std::slice::from_ref(&f));
        assert_eq!(s.received(q), [f]);
    }
    s.end();
}

#[test]
fn jumbo_frames_lie_in_one_buffer() {
    let mut s = set_with(
        1,
        1,
        Vmxnet3Config {
            mtu: 9000,
            ..Vmxnet3Config::default()
        },
    );
    let f = pattern(9014, 3);
    assert!(s.model.receive(0, &f));
    assert_eq!(s.received(0), std::slice::from_ref(&f));
    assert_eq!(s.send(0, std::slice::from_ref(&f)), 1);
    let mut sent = Vec::new();
    s.model.transmitted(0, 64, |f| sent.push(f.to_vec()));
    assert_eq!(sent, [f]);
    s.end();
}

#[test]
fn frames_across_pages_get_a_descriptor_for_each() {
    let mut s = set_with(
        1,
        1,
        Vmxnet3Config {
            mtu: 9000,
            tx_ring: 64,
            ..Vmxnet3Config::default()
        },
    );
    // Frames of 10 KiB in small pages: each is across some.
    for round in 0..100 {
        let frames: Vec<_> = (0..12)
            .map(|n| pattern(60 + (round * 331 + n * 877) % 8955, round + n))
            .collect();
        assert_eq!(s.send(0, &frames), 12);
        let mut sent = Vec::new();
        s.model.transmitted(0, 64, |f| sent.push(f.to_vec()));
        assert_eq!(sent, frames);
    }
    s.end();
}

#[test]
fn split_frames_are_joined_and_too_long_ones_counted() {
    let mut s = set_with(
        1,
        1,
        Vmxnet3Config {
            rx_ring: 64,
            buffer: Some(256),
            ..Vmxnet3Config::default()
        },
    );
    for round in 0..300 {
        let f = pattern(60 + (round * 97) % 1455, round);
        assert!(s.model.receive(0, &f));
        assert_eq!(s.received(0), [f]);
    }
    let long = pattern(9000, 0);
    assert!(!s.model.receive(0, &long));
    assert_eq!(s.received(0).len(), 0);
    assert_eq!(s.queues[0].stats().rx_errors.value(), 1);
    let f = pattern(1000, 1);
    assert!(s.model.receive(0, &f));
    assert_eq!(s.received(0), [f]);
    s.end();
}

#[test]
fn skipped_buffers_are_used_again() {
    let mut s = set();
    for round in 0..500 {
        if round % 3 == 0 {
            assert!(s.model.skip_buffer(0));
        }
        let f = pattern(60 + round, round);
        assert!(s.model.receive(0, &f));
        assert_eq!(s.received(0), [f]);
    }
    s.end();
}

#[test]
fn doorbells_wait_for_as_many_frames_as_the_device_asks_for() {
    let mut s = set();
    s.model.gather(0, 8);
    for _ in 0..7 {
        s.send(0, &[pattern(60, 0)]);
    }
    assert_eq!(s.model.doorbells(), 0);
    s.send(0, &[pattern(60, 0)]);
    assert_eq!(s.model.doorbells(), 1);
    s.send(0, &[pattern(60, 0)]);
    assert_eq!(s.model.doorbells(), 1);
    s.queues[0].flush(&mut s.pool);
    assert_eq!(s.model.doorbells(), 2, "a pause rings for the rest");
    s.model.gather(0, u32::MAX);
    s.send(0, &vec![pattern(60, 0); 50]);
    s.queues[0].flush(&mut s.pool);
    assert_eq!(s.model.doorbells(), 3);
    s.end();
}

#[test]
fn a_full_ring_leaves_frames_with_the_caller_and_gives_the_rest_back() {
    let mut s = set();
    let frames = vec![pattern(60, 0); 100];
    assert_eq!(s.send(0, &frames), 63);
    assert_eq!(s.send(0, &frames[..1]), 0);
    assert_eq!(s.model.transmitted(0, 200, |_| ()), 63);
    assert_eq!(s.send(0, &frames[..40]), 40);
    s.end();
}

#[test]
fn frames_that_cannot_be_sent_are_counted() {
    let mut s = set();
    assert_eq!(s.send(0, &[pattern(13, 0), pattern(60, 1), Vec::new()]), 3);
    assert_eq!(s.model.transmitted(0, 64, |_| ()), 1);
    assert_eq!(s.queues[0].stats().tx_errors.value(), 2);
    s.end();
}

#[test]
fn link_changes_are_seen_without_an_interrupt() {
    let mut s = set();
    assert!(s.control.link().up);
    s.model.set_link(false);
    s.queues[0].flush(&mut s.pool);
    assert_eq!(s.control.link_changes(), 2, "up at the start, then down");
    assert!(!s.control.link().up);
    s.model.set_link(true);
    s.queues[0].flush(&mut s.pool);
    assert!(s.control.link().up);
    s.end();
}

#[test]
fn a_stopped_queue_restarts_the_device_and_loses_no_frame() {
    let mut s = set_with(1, 2, Vmxnet3Config::default());
    s.send(0, &vec![pattern(60, 0); 5]);
    for (restart, index) in [(1, 0), (2, 3)] {
        s.model.stop_queue(index, 0x8000_0001);
        s.queues[1].flush(&mut s.pool);
        assert!(!s.model.active() && !s.model.bus().bus_master());
        s.recover();
        assert_eq!(s.control.restarts(), restart);
        assert_eq!(s.error("queue_stopped"), restart);
        let f = pattern(500, 1);
        assert!(s.model.receive(1, &f));
        assert_eq!(s.received(1), [f]);
    }
    assert_eq!(s.queues[0].stats().tx_errors.value(), 5);
    s.end();
}

/// By the kernel, say: `echo 1 > /sys/bus/pci/devices/…/reset`.
#[test]
fn a_device_that_somebody_else_has_reset_is_started_again() {
    let mut s = set();
    s.model.reset_by_others();
    let end = Instant::now() + Duration::from_secs(5);
    while s.error("inactive") == 0 {
        assert!(Instant::now() < end);
        s.queues[0].arm();
    }
    s.recover();
    assert_eq!(s.control.restarts(), 1);
    let f = pattern(500, 1);
    assert!(s.model.receive(0, &f));
    assert_eq!(s.received(0), [f]);
    s.end();
}

#[test]
fn sleeping_workers_are_woken_to_restart() {
    let mut s = set_with(1, 2, Vmxnet3Config::default());
    for q in &mut s.queues {
        q.arm();
    }
    s.control.request_reset();
    for q in &s.queues {
        let mut count = [0; 8];
        assert!(nix::unistd::read(q.wait_fd().unwrap(), &mut count).is_ok());
    }
    s.recover();
    assert_eq!(s.control.restarts(), 1);
    s.end();
}

#[test]
fn counters_go_on_over_restarts() {
    let mut s = set();
    s.model.receive(0, &pattern(100, 0));
    s.control.request_reset();
    s.recover();
    s.model.receive(0, &pattern(100, 0));
    assert_eq!(s.control.counters().rx_packets, 2);
    assert_eq!(s.received(0).len(), 1, "the first was lost with the rings");
    s.end();
}

#[test]
fn a_device_that_does_not_start_again_is_tried_again() {
    let mut s = set();
    s.model.refuse(true);
    s.control.request_reset();
    let end = Instant::now() + Duration::from_secs(5);
    while s.error("start_failed") == 0 {
        assert!(Instant::now() < end);
        assert!(s.received(0).is_empty());
    }
    assert!(!s.model.bus().bus_master());
    s.model.refuse(false);
    s.recover();
    assert_eq!(s.send(0, &[pattern(60, 0)]), 1);
    s.end();
}

#[test]
fn impossible_completions_stop_the_device() {
    let cases = [
        (
            "rx_completion_of_unknown_ring",
            [0x3ff << 16 | 0xc000, 0, 60],
        ),
        ("rx_completion_of_idle_descriptor", [0xfff | 0xc000, 0, 60]),
        ("rx_completion_of_idle_descriptor", [63 | 0xc000, 0, 60]),
        ("rx_longer_than_buffer", [0xc000, 0, 1600]),
    ];
    for (rule, words) in cases {
        let mut s = set();
        s.model.receive_nonsense(0, words);
        assert!(s.received(0).is_empty());
        assert_eq!(s.error(rule), 1, "{rule}");
        assert!(!s.model.active());
        s.recover();
        let f = pattern(70, 0);
        assert!(s.model.receive(0, &f));
        assert_eq!(s.received(0), [f]);
        s.end();
    }
    for index in [0, 5, 0xfff] {
        let mut s = set();
        if index != 0 {
            s.send(0, &vec![pattern(60, 0); 5]);
        } else {
            // A completion for nothing at all is seen with the next frame's.
            s.send(0, &[pattern(60, 0)]);
            s.model.transmit_nonsense(0, [0, 0, 0]);
            s.queues[0].flush(&mut s.pool);
            s.send(0, &[pattern(60, 0)]);
        }
        s.model.transmit_nonsense(0, [index, 0, 0]);
        s.queues[0].flush(&mut s.pool);
        assert_eq!(s.error("tx_completion_of_idle_descriptor"), 1, "{index}");
        s.recover();
        s.end();
    }
}

#[test]
fn the_same_buffer_twice_is_refused() {
    let mut s = set();
    s.model.receive_nonsense(0, [0xc000, 0, 60]);
    s.model.receive_nonsense(0, [0xc000, 0, 60]);
    assert_eq!(s.received(0).len(), 1);
    assert_eq!(s.error("rx_completion_of_idle_descriptor"), 1);
    s.recover();
    s.end();
}

#[test]
fn quiesce_stops_at_once_and_for_good() {
    let mut s = set();
    s.send(0, &[pattern(60, 0)]);
    s.control.quiesce();
    assert!(!s.model.active() && !s.model.bus().bus_master());
    assert_eq!(s.send(0, &[pattern(60, 0)]), 0);
    assert!(s.received(0).is_empty());
    s.control.request_reset();
    assert!(s.received(0).is_empty() && !s.model.active());
    s.end();
}

#[test]
fn queues_that_are_dropped_undrained_lose_nothing() {
    let mut s = set_with(1, 2, Vmxnet3Config::default());
    s.send(0, &vec![pattern(60, 0); 5]);
    let Set {
        model,
        queues,
        arena,
        pool,
        control,
    } = s;
    drop(queues);
    assert!(!model.active() && !model.bus().bus_master());
    drop(pool);
    assert_eq!(arena.outstanding(), 0);
    assert_eq!(control.counters(), DeviceCounters::default());
}

#[test]
fn what_cannot_be_is_refused() {
    let model = Model::new(1, MAC);
    let open = |config| Vmxnet3Port::open(Arc::new(model.device(16).unwrap()), config);
    let with = |f: fn(&mut Vmxnet3Config)| {
        let mut c = Vmxnet3Config::default();
        f(&mut c);
        c
    };
    assert!(open(with(|c| c.mtu = 9001)).is_err());
    assert!(open(with(|c| c.rx_ring = 100)).is_err());
    assert!(open(with(|c| c.tx_ring = 8192)).is_err());
    assert!(open(with(|c| c.buffer = Some(64))).is_err());
    let arena = Arena::new(ArenaConfig::default()).unwrap();
    let jumbo = open(with(|c| c.mtu = 9000)).unwrap();
    assert!(matches!(
        jumbo.open_queues(1, &arena),
        Err(PortError::FrameTooSmall { needed: 9022, .. })
    ));
    for n in [0, 3, 9] {
        let port = open(Vmxnet3Config::default()).unwrap();
        assert!(port.open_queues(n, &arena).is_err());
    }
    model.refuse(true);
    let port = open(Vmxnet3Config::default()).unwrap();
    assert!(matches!(
        port.open_queues(1, &arena),
        Err(PortError::Device { .. })
    ));
    assert_eq!(arena.outstanding(), 0);
    for (revisions, mac) in [(0, MAC), (u32::MAX, MAC), (1, [1, 0, 0, 0, 0, 0])] {
        let model = Model::new(revisions, mac);
        let device = Arc::new(model.device(16).unwrap());
        assert!(Vmxnet3Port::open(device, Vmxnet3Config::default()).is_err());
    }
}

#[test]
fn a_device_without_interrupts_is_polled() {
    let model = Model::new(1, MAC);
    let arena = Arena::new(ArenaConfig::default()).unwrap();
    let device = Arc::new(model.device(1).unwrap());
    let port = Vmxnet3Port::open(device, Vmxnet3Config::default()).unwrap();
    let mut queues = port.open_queues(1, &arena).unwrap();
    assert!(queues[0].wait_fd().is_none());
    let mut pool = Pool::new(&arena, 64);
    assert!(model.receive(0, &pattern(60, 0)));
    let mut out = Vec::new();
    assert_eq!(queues[0].rx_burst(&mut pool, &mut out, 8), 1);
    pool.put_bulk(&mut out);
}

#[test]
fn arbitrary_devices_lose_no_frame() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..64 {
        let data: Vec<u8> = (0..600)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed.to_le_bytes()[3]
            })
            .collect();
        fuzz::fuzz_device(&data);
    }
}
