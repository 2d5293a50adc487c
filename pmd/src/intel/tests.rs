//! The drivers against register models, well-behaved and hostile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fuzz::fuzz_device;
use super::model::{Family, Model};
use crate::arena::{Arena, ArenaConfig};
use crate::checksum::test::{accepted, partial};
use crate::frame::Frame;
use crate::nic::{self, NicControl, NicOptions};
use crate::pool::Pool;
use crate::port::{PortError, PortQueue};
use proptest::prelude::*;

const ALL: [Family; 4] = [Family::E1000e, Family::Igb, Family::Ixgbe, Family::IxgbeVf];

struct Bed {
    model: Arc<Model>,
    arena: Arc<Arena>,
    pool: Pool,
    queues: Vec<Box<dyn PortQueue>>,
    control: Arc<dyn NicControl>,
    /// How many bytes the device puts into one buffer.
    buffer: usize,
}

fn options(mtu: u32) -> NicOptions {
    NicOptions {
        mtu,
        rx_ring: Some(64),
        tx_ring: Some(64),
        experimental: true,
        ..NicOptions::default()
    }
}

fn arena(stride: u32) -> Arc<Arena> {
    Arena::new(ArenaConfig {
        frames: 1024,
        stride,
        lock: false,
        ..ArenaConfig::default()
    })
    .unwrap()
}

impl Bed {
    fn open(family: Family, queues: usize, mtu: u32) -> Bed {
        let model = Model::new(family);
        let device = Arc::new(model.device(8).unwrap());
        let port = nic::open(device, &options(mtu)).unwrap();
        assert_eq!(port.info().mac.to_string(), "52:54:00:03:01:02");
        let control = port.control().unwrap();
        let arena = arena(if mtu > 1500 { 12 * 1024 } else { 4096 });
        let mut bed = Bed {
            pool: Pool::new(&arena, 16),
            queues: port.queues(queues, &arena).unwrap(),
            model,
            arena,
            control,
            buffer: if mtu > 1500 { 10 * 1024 } else { 2048 },
        };
        assert_eq!(bed.model.violations(), Vec::<String>::new());
        bed.poll(0);
        bed
    }

    fn poll(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        self.queues[queue].rx_burst(&mut self.pool, &mut out, 64);
        let bytes = out.iter().map(|f| f.data().to_vec()).collect();
        self.pool.put_bulk(&mut out);
        bytes
    }

    fn send(&mut self, queue: usize, frames: &[Vec<u8>]) -> usize {
        let mut burst: Vec<Frame> = Vec::new();
        for bytes in frames {
            let mut f = self.pool.get().unwrap();
            assert!(f.set_data(bytes));
            burst.push(f);
        }
        let taken = self.queues[queue].tx_burst(&mut self.pool, &mut burst);
        self.pool.put_bulk(&mut burst);
        taken
    }

    /// Bursts on all queues until `done` says so.
    fn until(&mut self, done: impl Fn(&Bed) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < end, "nothing happens");
            for queue in 0..self.queues.len() {
                for _ in 0..1024 {
                    self.poll(queue);
                }
            }
        }
    }

    fn error_count(&self, name: &str) -> u64 {
        let errors = self.control.device_errors();
        errors.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// Ends the port; nothing may be lost, nothing may have been reached that was not mapped.
    fn close(mut self) {
        for queue in &mut self.queues {
            queue.drain(&mut self.pool);
        }
        assert!(!self.model.bus().bus_master());
        drop(self.queues);
        assert_eq!(self.model.bus().faults(), 0);
        assert_eq!(self.arena.outstanding(), 0);
        assert_eq!(self.model.violations(), Vec::<String>::new());
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| {
            seed.wrapping_mul(31)
                .wrapping_add(u8::try_from(i & 0xff).unwrap())
        })
        .collect()
}

#[test]
fn frames_of_every_size_cross_both_ways_many_times_around_the_rings() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 1500);
        for round in 0..50u8 {
            let sizes = [14, 17, 60, 64, 128, 1000, 1514, 1518];
            let frames: Vec<_> = sizes.iter().map(|&n| frame(n, round)).collect();
            for f in &frames {
                assert!(bed.model.receive(0, f, bed.buffer), "{family:?}");
            }
            assert_eq!(bed.poll(0), frames, "{family:?}");
            assert_eq!(bed.send(0, &frames), frames.len());
            let sent: Vec<_> = bed.model.transmit(0, 64).into_iter().map(|s| s.1).collect();
            assert_eq!(sent[1..], frames[1..]);
            assert_eq!(sent[0][..14], frames[0]);
            assert_eq!(sent[0][14..], [0; 3]);
        }
        let stats = Arc::clone(bed.queues[0].stats());
        assert_eq!(
            (stats.rx_packets.value(), stats.tx_packets.value()),
            (400, 400)
        );
        assert_eq!((stats.rx_errors.value(), stats.tx_errors.value()), (0, 0));
        bed.close();
    }
}

#[test]
fn jumbo_frames_cross_and_longer_ones_are_counted() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 9000);
        for len in [60, 1519, 4096, 9018] {
            assert!(bed.model.receive(0, &frame(len, 3), bed.buffer));
            assert_eq!(bed.poll(0), [frame(len, 3)], "{family:?}");
            bed.send(0, &[frame(len, 4)]);
            assert_eq!(bed.model.transmit(0, 1), [(0, frame(len, 4))]);
        }
        assert!(bed.model.receive(0, &frame(9019, 1), bed.buffer));
        assert_eq!(bed.poll(0), Vec::<Vec<u8>>::new());
        assert_eq!(bed.send(0, &[frame(9019, 1)]), 1);
        assert_eq!(bed.model.transmit(0, 1), []);
        let stats = bed.queues[0].stats();
        assert_eq!((stats.rx_errors.value(), stats.tx_errors.value()), (1, 1));
        bed.close();
    }
}

#[test]
fn a_packet_in_several_buffers_is_thrown_away_whole() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 1500);
        assert!(bed.model.receive(0, &frame(1500, 1), 600));
        assert!(bed.model.receive(0, &frame(64, 2), 2048));
        assert_eq!(bed.poll(0), [frame(64, 2)]);
        assert_eq!(bed.queues[0].stats().rx_errors.value(), 1);
        bed.close();
    }
}

#[test]
fn lengths_and_errors_of_the_device_are_checked() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 1500);
        let done = |len: u64, status: u64| len << 32 | status | 3;
        let error = match family {
            Family::Ixgbe | Family::IxgbeVf => 1 << 29,
            _ => 1 << 31,
        };
        for word in [
            done(0, 0),
            done(13, 0),
            done(1519, 0),
            done(0xffff, 0),
            done(64, error),
        ] {
            assert!(bed.model.write_back(0, b"", word));
        }
        assert_eq!(bed.poll(0), Vec::<Vec<u8>>::new(), "{family:?}");
        assert_eq!(bed.queues[0].stats().rx_errors.value(), 5, "{family:?}");
        // Done without having been given: ignored, whatever it says.
        for slot in 0..64 {
            bed.model.scribble(true, 0, slot, u64::MAX);
        }
        assert_eq!(bed.send(0, &[frame(64, 1)]), 1);
        assert_eq!(bed.model.transmit(0, 8), [(0, frame(64, 1))]);
        bed.close();
    }
}

#[test]
fn a_full_ring_takes_what_fits_and_completes_in_order() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 1500);
        let many: Vec<_> = (0..100).map(|n| frame(64, n)).collect();
        // One descriptor stays empty, and one says where checksums lie.
        assert_eq!(bed.send(0, &many), 62, "{family:?}");
        assert_eq!(bed.send(0, &many[62..]), 0);
        assert_eq!(bed.model.transmit(0, 40).len(), 40);
        // The first completion that was asked for is that of descriptor 31.
        assert_eq!(bed.send(0, &many[62..]), 32);
        assert_eq!(bed.model.transmit(0, 100).len(), 54);
        bed.close();
    }
}

/// Before and after a reset, which takes the context.
#[test]
fn checksums_that_were_left_are_completed_on_every_queue() {
    for family in ALL {
        let mut bed = Bed::open(family, 2, 1500);
        for round in 0..3usize {
            for queue in 0..2 {
                bed.poll(queue);
                let by_device = family != Family::E1000e;
                assert_eq!(bed.queues[queue].completes_checksums(), by_device);
                let bytes: Vec<_> = (0..20)
                    .map(|n| partial(&frame(40 * n + round, n.to_le_bytes()[0])))
                    .collect();
                let mut burst = Vec::new();
                for (n, bytes) in bytes.iter().enumerate() {
                    let mut f = bed.pool.get().unwrap();
                    assert!(f.set_data(bytes));
                    if n % 3 != 0 {
                        f.leave_checksum();
                    }
                    burst.push(f);
                }
                let taken = bed.queues[queue].tx_burst(&mut bed.pool, &mut burst);
                assert_eq!(taken, 20);
                let sent = bed.model.transmit(queue, 64);
                assert_eq!(sent.len(), 20, "{family:?}");
                for (n, (_, sent)) in sent.iter().enumerate() {
                    assert_eq!(accepted(sent), n % 3 != 0, "{family:?} {n}");
                    assert_eq!(sent[62..], bytes[n][62..]);
                }
            }
            bed.control.request_reset();
            for _ in 0..2 {
                (0..2).for_each(|queue| drop(bed.poll(queue)));
            }
        }
        bed.close();
    }
    let bed = Bed::open(Family::E1000e, 1, 1500);
    assert!(bed.queues[0].completes_checksums());
    bed.close();
}

#[test]
fn every_queue_has_rings_and_an_interrupt_of_its_own() {
    for (family, n) in [
        (Family::E1000e, 2),
        (Family::Igb, 8),
        (Family::Ixgbe, 8),
        (Family::IxgbeVf, 2),
    ] {
        let mut bed = Bed::open(family, n, 1500);
        for queue in 0..n {
            bed.poll(queue);
            let seed = u8::try_from(queue).unwrap();
            assert!(bed.model.receive(queue, &frame(64, seed), 2048));
            assert!(bed.queues[queue].wait_fd().is_some(), "{family:?}");
            bed.queues[queue].arm();
            assert!(bed.model.bus().interrupt(queue));
            let mut count = [0; 8];
            let fd = bed.queues[queue].wait_fd().unwrap();
            assert_eq!(nix::unistd::read(fd, &mut count).unwrap(), 8);
        }
        for queue in (0..n).rev() {
            let seed = u8::try_from(queue).unwrap();
            assert_eq!(bed.poll(queue), [frame(64, seed)]);
            bed.send(queue, &[frame(70, seed)]);
            assert_eq!(bed.model.transmit(queue, 9), [(queue, frame(70, seed))]);
        }
        bed.close();
    }
}

#[test]
fn a_reset_asked_for_takes_all_queues_and_loses_no_frame() {
    for family in ALL {
        let mut bed = Bed::open(family, 2, 1500);
        bed.poll(1);
        let resets = bed.model.resets();
        bed.send(0, &[frame(64, 1), frame(64, 2)]);
        bed.control.request_reset();
        // One queue alone cannot go on, nor does it touch the device.
        assert_eq!(bed.poll(0), Vec::<Vec<u8>>::new());
        assert_eq!(bed.send(0, &[frame(64, 1)]), 0);
        assert_eq!(bed.model.resets(), resets);
        bed.poll(1);
        assert!(bed.model.resets() > resets);
        for queue in [0, 1] {
            bed.poll(queue);
            let lost = if queue == 0 { 2 } else { 0 };
            assert_eq!(bed.queues[queue].stats().tx_errors.value(), lost);
            assert!(bed.model.receive(queue, &frame(64, 9), 2048));
            assert_eq!(bed.poll(queue), [frame(64, 9)], "{family:?}");
            bed.send(queue, &[frame(64, 8)]);
            assert_eq!(bed.model.transmit(queue, 9), [(queue, frame(64, 8))]);
        }
        bed.close();
    }
}

#[test]
fn a_device_that_does_not_answer_is_found_and_used_again_when_it_does() {
    for family in ALL {
        let mut bed = Bed::open(family, 1, 1500);
        bed.send(0, &[frame(64, 1)]);
        bed.model.set_gone(true);
        bed.until(|b| b.error_count("restart_failed") > 0);
        assert_eq!(bed.error_count("no_answer"), 1, "{family:?}");
        assert!(!bed.control.link().up);
        bed.model.set_gone(false);
        bed.until(|b| b.model.register(bed_rx_tail(family)) != 0);
        assert!(bed.model.receive(0, &frame(64, 9), 2048));
        assert_eq!(bed.poll(0), [frame(64, 9)]);
        bed.close();
    }
}

/// By the kernel, say: `echo 1 > /sys/bus/pci/devices/…/reset`.
#[test]
fn a_device_that_somebody_else_has_reset_is_set_up_again() {
    for (family, enable) in [
        (Family::E1000e, 0x0100),
        (Family::Igb, 0x0400),
        (Family::Ixgbe, 0x3000),
    ] {
        let mut bed = Bed::open(family, 1, 1500);
        bed.send(0, &[frame(64, 1)]);
        bed.model.set_register(enable, 0);
        bed.until(|b| {
            b.error_count("foreign_reset") == 1
                && b.model.register(enable) & 3 != 0
                && b.model.register(bed_rx_tail(family)) != 0
        });
        assert!(bed.model.receive(0, &frame(64, 9), 2048));
        assert_eq!(bed.poll(0), [frame(64, 9)], "{family:?}");
        bed.close();
    }
}

fn bed_rx_tail(family: Family) -> usize {
    match family {
        Family::E1000e => 0x2818,
        Family::Igb => 0xc018,
        Family::Ixgbe | Family::IxgbeVf => 0x1018,
    }
}

#[test]
fn a_device_that_does_not_start_is_an_error_and_left_alone() {
    for family in ALL {
        let model = Model::new(family);
        model.set_deaf(true);
        let device = Arc::new(model.device(2).unwrap());
        let refused = nic::open(device, &options(1500)).err().unwrap();
        assert!(
            matches!(refused, PortError::Device { .. }),
            "{family:?}: {refused}"
        );
        let model = Model::new(family);
        model.set_gone(true);
        let device = Arc::new(model.device(2).unwrap());
        assert!(nic::open(device, &options(1500)).is_err());
        assert!(!model.bus().bus_master());
    }
}

#[test]
fn descriptors_that_are_never_sent_are_a_hang_unless_the_link_is_down() {
    let mut bed = Bed::open(Family::Igb, 1, 1500);
    bed.send(0, &[frame(64, 1)]);
    let start = Instant::now();
    bed.model.set_link(false);
    while start.elapsed() < Duration::from_millis(5500) {
        bed.poll(0);
    }
    assert_eq!(bed.error_count("transmit_hang"), 0);
    bed.model.set_link(true);
    bed.until(|b| b.error_count("transmit_hang") == 1);
    assert!(start.elapsed() > Duration::from_secs(10));
    bed.close();
}

#[test]
fn settings_that_the_device_cannot_have_are_refused() {
    for family in ALL {
        let open = |options: &NicOptions, queues: usize, stride: u32| {
            let device = Arc::new(Model::new(family).device(8).unwrap());
            nic::open(device, options)?.queues(queues, &arena(stride))
        };
        assert!(open(&options(1500), 1, 4096).is_ok(), "{family:?}");
        assert!(matches!(
            open(&options(9000), 1, 4096),
            Err(PortError::FrameTooSmall { .. })
        ));
        for mtu in [0, 68, 1279, 20_000, u32::MAX] {
            assert!(matches!(
                open(&options(mtu), 1, 4096),
                Err(PortError::Setting { .. })
            ));
        }
        for ring in [0, 1, 63, 65, 8192, u32::MAX] {
            let wrong = NicOptions {
                rx_ring: Some(ring),
                ..options(1500)
            };
            assert!(matches!(
                open(&wrong, 1, 4096),
                Err(PortError::Setting { .. })
            ));
        }
        for queues in [0, 17] {
            assert!(matches!(
                open(&options(1500), queues, 4096),
                Err(PortError::Queues { .. })
            ));
        }
    }
    let device = Arc::new(Model::new(Family::Ixgbe).device(8).unwrap());
    let plain = NicOptions::default();
    assert!(
        nic::open(device, &plain).is_err(),
        "experimental by name only"
    );
}

#[test]
fn losses_and_errors_of_the_device_are_counted_once() {
    for family in [Family::E1000e, Family::Igb, Family::Ixgbe] {
        let mut bed = Bed::open(family, 1, 1500);
        let missed = if family == Family::Ixgbe {
            0x3fa0
        } else {
            0x4010
        };
        bed.model.set_register(0x4000, 3);
        bed.model.set_register(missed, 5);
        let counted = bed.control.statistics();
        assert!(counted.contains(&("crc_errors", 3)), "{family:?}");
        let stats = Arc::clone(bed.queues[0].stats());
        bed.until(|_| stats.rx_dropped.value() >= 5);
        assert_eq!(stats.rx_errors.value(), 3);
        assert_eq!(bed.control.statistics()[0], ("crc_errors", 3));
        bed.close();
    }
}

#[test]
fn quiescing_stops_the_device_and_frames_come_home() {
    for family in ALL {
        let mut bed = Bed::open(family, 2, 1500);
        bed.send(0, &[frame(64, 1)]);
        bed.control.quiesce();
        assert!(!bed.model.bus().bus_master());
        assert_eq!(bed.poll(1), Vec::<Vec<u8>>::new());
        assert_eq!(bed.send(1, &[frame(64, 1)]), 0);
        bed.control.request_reset();
        assert_eq!(bed.poll(1), Vec::<Vec<u8>>::new());
        bed.close();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_nonsense_of_the_device_loses_a_frame(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        fuzz_device(&data);
    }
}
