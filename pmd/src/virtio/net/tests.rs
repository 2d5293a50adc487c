use std::time::{Duration, Instant};

use super::model::{Features, Model};
use super::*;
use crate::arena::ArenaConfig;
use crate::checksum::test::{accepted, partial};
use crate::frame::Frame;

struct Set {
    model: Arc<Model>,
    control: Arc<dyn NicControl>,
    queues: Vec<VirtioNetQueue>,
    arena: Arc<Arena>,
    pool: Pool,
}

fn options() -> NicOptions {
    NicOptions {
        rx_ring: Some(64),
        tx_ring: Some(64),
        ..NicOptions::default()
    }
}

fn set_with(features: Features, queues: usize) -> Set {
    let arena = Arena::new(ArenaConfig {
        frames: 1024,
        ..ArenaConfig::default()
    })
    .unwrap();
    let model = Model::new(features);
    let device = Arc::new(model.device(8).unwrap());
    let port = VirtioNetPort::open(device, &options()).unwrap();
    let control = port.control().unwrap();
    let queues = port.open_queues(queues, &arena).unwrap();
    Set {
        model,
        control,
        queues,
        pool: Pool::new(&arena, 64),
        arena,
    }
}

fn both(f: impl Fn(Set)) {
    for packed in [false, true] {
        let features = Features {
            packed,
            ..Features::default()
        };
        f(set_with(features, 1));
    }
}

fn packet(n: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (n * 7 + i).to_le_bytes()[0]).collect()
}

impl Set {
    fn receive(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        self.queues[queue].rx_burst(&mut self.pool, &mut out, 64);
        let bytes = out.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut out);
        bytes
    }

    fn send(&mut self, queue: usize, packets: &[Vec<u8>]) -> usize {
        let pool = &mut self.pool;
        let make = |p: &Vec<u8>| {
            let mut frame = pool.get().unwrap();
            assert!(frame.set_data(p));
            frame
        };
        let mut burst: Vec<Frame> = packets.iter().map(make).collect();
        let n = self.queues[queue].tx_burst(&mut self.pool, &mut burst);
        self.pool.put_bulk(&mut burst);
        n
    }

    /// Polls until the device runs again.
    fn recover(&mut self) {
        let end = Instant::now() + Duration::from_secs(5);
        while !self.model.live() {
            assert!(Instant::now() < end, "it does not come back");
            for q in &mut self.queues {
                q.flush(&mut self.pool);
            }
        }
        let queue = &mut self.queues[0];
        queue.flush(&mut self.pool);
    }

    fn error(&self, name: &str) -> u64 {
        let all = self.control.device_errors();
        all.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// The driver kept the rules, and gives back all that it had.
    fn close(mut self) {
        for q in &mut self.queues {
            q.drain(&mut self.pool);
        }
        assert_eq!(self.model.violations(), [""; 0]);
        assert_eq!(self.model.bus().faults(), 0);
        assert!(!self.model.live() && !self.model.bus().bus_master());
        self.queues.clear();
        drop(self.pool);
        assert_eq!(self.arena.outstanding(), 0);
    }
}

#[test]
fn what_is_not_used_is_not_agreed_on() {
    both(|set| {
        let unused = feature::NET_MRG_RXBUF | feature::INDIRECT_DESC | 1 << 1 | 1 << 11;
        assert_eq!(set.model.accepted() & unused, 0);
        let wanted =
            feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::EVENT_IDX | feature::NET_CSUM;
        assert_eq!(set.model.accepted() & wanted, wanted);
        set.close();
    });
}

#[test]
fn packets_pass_both_ways_for_many_times_round_the_ring() {
    both(|mut set| {
        for round in 0..40 {
            let packets: Vec<_> = (0..50).map(|n| packet(n + round, 60 + 29 * n)).collect();
            for p in &packets {
                assert!(set.model.receive(0, p));
            }
            assert_eq!(set.receive(0), packets);
            assert_eq!(set.send(0, &packets), 50);
            assert_eq!(set.model.transmit(0, 64), packets);
        }
        let stats = Arc::clone(set.queues[0].stats());
        assert_eq!(
            (stats.rx_packets.value(), stats.tx_packets.value()),
            (2000, 2000)
        );
        set.close();
    });
}

#[test]
fn checksums_that_were_left_are_completed_by_the_device_or_by_the_driver() {
    for (packed, checksums) in [(false, true), (true, true), (false, false), (true, false)] {
        let features = Features {
            packed,
            checksums,
            ..Features::default()
        };
        let mut set = set_with(features, 1);
        assert_eq!(set.queues[0].completes_checksums(), checksums);
        let mut burst = Vec::new();
        let bytes: Vec<_> = (0..40).map(|n| partial(&packet(n, 31 * n))).collect();
        for (n, bytes) in bytes.iter().enumerate() {
            let mut frame = set.pool.get().unwrap();
            assert!(frame.set_data(bytes));
            if n % 4 != 0 {
                frame.leave_checksum();
            }
            burst.push(frame);
        }
        assert_eq!(set.queues[0].tx_burst(&mut set.pool, &mut burst), 40);
        for (n, sent) in set.model.transmit(0, 64).iter().enumerate() {
            assert_eq!(accepted(sent), n % 4 != 0, "{n}");
            assert_eq!(sent[62..], bytes[n][62..]);
        }
        set.close();
    }
}

#[test]
fn a_full_ring_keeps_the_rest_for_the_caller() {
    both(|mut set| {
        let packets: Vec<_> = (0..64).map(|n| packet(n, 60)).collect();
        assert_eq!(set.send(0, &packets), 64);
        assert_eq!(set.send(0, &packets), 0);
        assert_eq!(set.model.transmit(0, 10).len(), 10);
        assert_eq!(set.send(0, &packets), 10);
        set.model.transmit(0, 64);
        set.close();
    });
}

/// One announcement a burst at most: each is an exit of the virtual machine.
#[test]
fn a_burst_is_announced_once() {
    both(|mut set| {
        let packets: Vec<_> = (0..50).map(|n| packet(n, 60)).collect();
        for round in 1..20 {
            set.send(0, &packets);
            assert!(set.model.kicks(1) <= round);
            set.model.transmit(0, 64);
        }
        set.close();
    });
}

#[test]
fn an_interrupt_comes_when_asked_for_and_only_then() {
    both(|mut set| {
        let fired = |set: &Set| {
            let fd = set.queues[0].wait_fd().unwrap();
            nix::unistd::read(fd, &mut [0; 8]).is_ok()
        };
        assert!(set.model.receive(0, &packet(0, 60)));
        assert!(!fired(&set), "not asked for");
        set.receive(0);
        set.queues[0].arm();
        assert!(set.model.receive(0, &packet(0, 60)));
        assert!(fired(&set), "asked for");
        assert_eq!(set.receive(0).len(), 1);
        for n in 0..40 {
            assert!(set.model.receive(0, &packet(n, 60)));
        }
        assert!(!fired(&set), "polled again");
        set.receive(0);
        set.close();
    });
}

#[test]
fn all_pairs_are_used_and_the_device_is_told_how_many() {
    for packed in [false, true] {
        let features = Features {
            packed,
            pairs: 4,
            ..Features::default()
        };
        let mut set = set_with(features, 3);
        assert!(set.model.commands().contains(&[4, 0, 3]));
        for q in &mut set.queues {
            q.flush(&mut set.pool);
        }
        for pair in 0..3u16 {
            let p = packet(pair.into(), 100);
            assert!(set.model.receive(pair, &p));
            assert_eq!(set.receive(pair.into()), std::slice::from_ref(&p));
            assert_eq!(set.send(pair.into(), std::slice::from_ref(&p)), 1);
            assert_eq!(set.model.transmit(pair, 8), [p]);
        }
        set.close();
    }
}

#[test]
fn filters_and_link_follow() {
    both(|set| {
        set.control.set_promiscuous(true).unwrap();
        assert_eq!(set.model.commands().last(), Some(&[0, 0, 1]));
        assert!(set.control.link().up);
        set.model.set_link(false);
        assert!(!set.control.link().up);
        set.close();
    });
}

#[test]
fn a_device_that_needs_a_reset_gets_it_and_traffic_goes_on() {
    both(|mut set| {
        set.control.set_promiscuous(true).unwrap();
        let packets: Vec<_> = (0..20).map(|n| packet(n, 60)).collect();
        set.send(0, &packets);
        set.model.fail();
        set.queues[0].arm();
        set.recover();
        let stats = Arc::clone(set.queues[0].stats());
        assert_eq!(stats.tx_errors.value(), 20, "lost in the device");
        assert_eq!(set.error("needs_reset"), 1);
        assert_eq!(set.control.statistics(), [("restarts", 1)]);
        assert!(
            set.model.commands().contains(&[0, 0, 1]),
            "filters are set again"
        );
        assert!(set.model.receive(0, &packets[0]));
        assert_eq!(set.receive(0), packets[..1]);
        set.close();
    });
}

#[test]
fn a_device_that_lies_is_stopped_and_begun_anew() {
    let lies: [(u16, u32, u32); 5] = [
        // Buffers outside the ring, buffers of another's, sent without having been given.
        (0, 64, 100),
        (0, 0xffff, 100),
        (1, 0, 0),
        (1, 63, 0),
        (1, 0xffff, 9),
    ];
    both(|mut set| {
        for (n, (queue, id, written)) in lies.into_iter().enumerate() {
            let p = packet(n, 60);
            set.model.lie(queue, id, written);
            // The packet behind the lie is looked at by nobody.
            set.send(0, std::slice::from_ref(&p));
            set.receive(0);
            set.receive(0);
            set.send(0, std::slice::from_ref(&p));
            std::thread::sleep(Duration::from_millis(110));
            set.recover();
            assert!(set.model.receive(0, &p), "{queue} {id}");
            assert_eq!(set.receive(0), [p]);
        }
        assert!(set.error("ring") > 0);
        set.model.transmit(0, 64);
        set.close();
    });
}

#[test]
fn lengths_that_cannot_be_are_dropped_and_counted() {
    both(|mut set| {
        for written in [0, 11, 12, 25, 1 << 16, u32::MAX] {
            // Buffer 0 is given first, and again and again.
            let id = 0;
            set.model.lie(0, id, written);
            let got = set.receive(0);
            assert!(got.is_empty());
            std::thread::sleep(Duration::from_millis(110));
            set.control.request_reset();
            set.recover();
        }
        assert_eq!(set.error("rx_length"), 6);
        set.close();
    });
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let open = |features: Features, options: &NicOptions| {
        let device = Model::new(features).device(8).unwrap();
        VirtioNetPort::open(Arc::new(device), options).err()
    };
    let small = Features {
        mtu: 1400,
        ..Features::default()
    };
    assert!(matches!(
        open(small, &options()),
        Some(PortError::Setting { .. })
    ));
    let odd = NicOptions {
        rx_ring: Some(100),
        ..NicOptions::default()
    };
    assert!(matches!(
        open(Features::default(), &odd),
        Some(PortError::Setting { .. })
    ));
}

#[test]
fn a_device_that_forgets_what_it_was_given_is_reminded() {
    both(|mut set| {
        set.send(0, &[packet(0, 60)]);
        set.queues[0].arm();
        let before = set.model.kicks(1);
        std::thread::sleep(Duration::from_millis(60));
        set.queues[0].arm();
        assert_eq!(set.model.kicks(1), before + 1);
        set.model.transmit(0, 1);
        set.queues[0].flush(&mut set.pool);
        std::thread::sleep(Duration::from_millis(60));
        set.queues[0].arm();
        assert_eq!(set.model.kicks(1), before + 1, "nothing is on its way");
        set.close();
    });
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn no_nonsense_of_the_device_loses_a_frame(
        data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
    ) {
        super::fuzz::fuzz_device(&data);
    }
}
