//! Two NICs of one kind, their cables in one hub, in a QEMU guest with an IOMMU:
//! `gateway/tests/beds/intel/run e1000e`, or by hand
//! `gateway/tests/beds/vfio/guest.py --nic igb@1 --nic igb@1 --unit-tests pmd nic::bed`.
//!
//! QEMU's models drop frames that say they are IPv4 and have a broken header, so the frames here have an experimental
//! ethertype, except where receive hashing needs IP.

use std::collections::HashSet;
use std::io::Write;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::arena::{Arena, ArenaConfig};
use crate::device::vfio::{Protection, VfioDevice};
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{MacAddr, PortQueue};

const HEADER: usize = 14;
/// Frames that the bed never counts on are other stations' and the kernel's.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// One end of the cable.
struct End {
    queues: Vec<Box<dyn PortQueue>>,
    control: Arc<dyn NicControl>,
    mac: MacAddr,
}

struct Bed {
    arena: Arc<Arena>,
    pool: Pool,
    ends: Vec<End>,
}

impl Bed {
    /// Opens the first two devices and waits for their links.
    fn open(queues: usize, mtu: u32) -> Bed {
        let arena = Arena::new(ArenaConfig {
            frames: if mtu > 1500 { 4096 } else { 8192 },
            // QEMU's e1000e and igb drop what they send from a buffer on two pages: 10 KiB want huge ones.
            stride: if mtu > 1500 { 10_240 } else { 2048 },
            ..ArenaConfig::default()
        })
        .unwrap();
        let devices = std::env::var("VFIO_DEVICES").unwrap();
        let mut ends = Vec::new();
        for (n, address) in devices.split(' ').take(2).enumerate() {
            let device = VfioDevice::pci(address, Protection::Iommu).unwrap();
            let options = NicOptions {
                name: format!("nic{n}"),
                mtu,
                ..NicOptions::default()
            };
            let port = open(Arc::new(device), &options).unwrap();
            let info = port.info();
            let queues = queues.min(info.max_queues);
            ends.push(End {
                control: port.control().unwrap(),
                mac: info.mac,
                queues: port.queues(queues, &arena).unwrap(),
            });
        }
        assert_eq!(ends.len(), 2, "two devices in VFIO_DEVICES");
        let mut bed = Bed {
            pool: Pool::new(&arena, 256),
            arena,
            ends,
        };
        // Receive buffers first: what arrives before is lost.
        bed.poll(0);
        bed.poll(1);
        bed.wait("link", |b| b.ends.iter().all(|e| e.control.link().up));
        bed
    }

    /// Takes what arrived at an end.
    fn poll(&mut self, end: usize) -> Vec<Frame> {
        let mut out = Vec::new();
        for queue in &mut self.ends[end].queues {
            queue.rx_burst(&mut self.pool, &mut out, 64);
            queue.flush(&mut self.pool);
        }
        out
    }

    /// Polls both ends, throwing frames away, until `done` says so.
    fn wait(&mut self, what: &str, done: impl Fn(&Bed) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(
                start.elapsed() < Duration::from_secs(15),
                "{what}: nothing in 15 s"
            );
            for end in [0, 1] {
                let mut frames = self.poll(end);
                self.pool.put_bulk(&mut frames);
            }
        }
    }

    /// A frame from one end to the other that can be told from all others.
    fn frame(&mut self, from: usize, len: usize, number: u32) -> Option<Frame> {
        let (to, from) = (self.ends[1 - from].mac, self.ends[from].mac);
        let mut frame = self.pool.get_spare()?;
        frame
            .append(len)?
            .copy_from_slice(&bytes(from, to, len, number));
        Some(frame)
    }

    /// Ends everything; no frame may be missing.
    fn close(mut self) {
        for end in &mut self.ends {
            for queue in &mut end.queues {
                queue.drain(&mut self.pool);
            }
            for (rule, count) in end.control.device_errors() {
                assert_eq!(count, 0, "{rule}");
            }
        }
        drop(self.ends);
        drop(self.pool);
        assert_eq!(self.arena.outstanding(), 0);
        assert_eq!(crate::frame::leaked(), 0);
    }
}

fn bytes(from: MacAddr, to: MacAddr, len: usize, number: u32) -> Vec<u8> {
    let mut all = Vec::with_capacity(len);
    all.extend(to.0);
    all.extend(from.0);
    all.extend(ETHERTYPE);
    all.extend(number.to_be_bytes());
    let mut state = number.wrapping_mul(0x9e37_79b9) | 1;
    while all.len() < len {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        all.push(state.to_le_bytes()[1]);
    }
    all
}

/// The number of a frame of ours, after all its bytes were compared.
fn number_of(frame: &Frame, from: MacAddr, to: MacAddr) -> Option<u32> {
    let data = frame.data();
    if data.get(12..HEADER) != Some(&ETHERTYPE) {
        return None;
    }
    let number = u32::from_be_bytes(data.get(HEADER..HEADER + 4)?.try_into().ok()?);
    assert!(
        data == bytes(from, to, data.len(), number),
        "frame {number} of {} bytes is not as it was sent",
        data.len()
    );
    Some(number)
}

/// Sends frames of these lengths from both ends at once; every one must arrive, once, in order.
fn exchange(bed: &mut Bed, lengths: &[usize], count: u32) {
    let start = Instant::now();
    let mut sent = [0u32; 2];
    let mut arrived = [0u32; 2];
    let mut waiting: [Vec<Frame>; 2] = Default::default();
    while arrived != [count; 2] {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{arrived:?} of {sent:?} frames arrived"
        );
        for end in [0, 1] {
            // No more under way than the other end has buffers.
            while sent[end] < count && sent[end] - arrived[1 - end] < 256 {
                let len = lengths[sent[end] as usize % lengths.len()];
                let Some(frame) = bed.frame(end, len, sent[end]) else {
                    break;
                };
                waiting[end].push(frame);
                sent[end] += 1;
            }
            bed.ends[end].queues[0].tx_burst(&mut bed.pool, &mut waiting[end]);
            let (from, to) = (bed.ends[1 - end].mac, bed.ends[end].mac);
            for frame in bed.poll(end) {
                if let Some(number) = number_of(&frame, from, to) {
                    assert_eq!(number, arrived[end], "order");
                    assert_eq!(
                        frame.len(),
                        lengths[number as usize % lengths.len()].max(60)
                    );
                    arrived[end] += 1;
                }
                bed.pool.put(frame);
            }
        }
    }
}

#[test]
#[ignore = "needs two devices: gateway/tests/beds/intel/run"]
fn frames_of_every_size_cross_both_ways_unchanged() {
    let mut bed = Bed::open(1, 1500);
    let lengths: Vec<usize> = (60..=1514).collect();
    exchange(&mut bed, &lengths, 20_000);
    for end in &bed.ends {
        let stats = end.queues[0].stats();
        assert_eq!(stats.tx_packets.value(), 20_000);
        assert!(stats.rx_packets.value() >= 20_000);
        assert_eq!((stats.rx_errors.value(), stats.tx_errors.value()), (0, 0));
        assert_eq!(stats.rx_dropped.value(), 0);
    }
    bed.close();
}

#[test]
#[ignore = "needs two devices: gateway/tests/beds/intel/run"]
fn jumbo_frames_cross_both_ways_unchanged() {
    let mut bed = Bed::open(1, 9000);
    exchange(
        &mut bed,
        &[60, 1514, 1515, 2048, 4096, 8192, 9000, 9014],
        4_000,
    );
    bed.close();
}

#[test]
#[ignore = "needs two devices: gateway/tests/beds/intel/run"]
fn a_reset_under_load_loses_no_buffer_and_traffic_goes_on() {
    let mut bed = Bed::open(2, 1500);
    let mut waiting = Vec::new();
    let mut number = 0;
    for round in 0..3 {
        // Both ends full of frames under way.
        for _ in 0..2000 {
            if let Some(frame) = bed.frame(0, 1000, number) {
                waiting.push(frame);
                number += 1;
            }
            bed.ends[0].queues[number as usize % 2].tx_burst(&mut bed.pool, &mut waiting);
        }
        bed.ends[round % 2].control.request_reset();
        let start = Instant::now();
        let mut after = 0;
        // Frames sent after the reset arrive.
        let first = number;
        while after < 1000 {
            assert!(start.elapsed() < Duration::from_secs(30), "round {round}");
            if waiting.len() < 64
                && let Some(frame) = bed.frame(0, 200, number)
            {
                waiting.push(frame);
                number += 1;
            }
            bed.ends[0].queues[0].tx_burst(&mut bed.pool, &mut waiting);
            let (from, to) = (bed.ends[0].mac, bed.ends[1].mac);
            for frame in bed.poll(1) {
                after += u32::from(number_of(&frame, from, to).is_some_and(|n| n >= first));
                bed.pool.put(frame);
            }
            let mut back = bed.poll(0);
            bed.pool.put_bulk(&mut back);
        }
    }
    bed.pool.put_bulk(&mut waiting);
    bed.close();
}

#[test]
#[ignore = "needs two devices: gateway/tests/beds/intel/run"]
fn an_interrupt_wakes_a_sleeping_queue() {
    let mut bed = Bed::open(1, 1500);
    let mut slowest = Duration::ZERO;
    for number in 0..50 {
        // Nothing under way, armed, asleep.
        let mut left = bed.poll(1);
        bed.pool.put_bulk(&mut left);
        // A message may be under way for what was polled meanwhile: it wakes once, not again and again.
        let quiet = (0..3).any(|_| {
            bed.ends[1].queues[0].arm();
            assert!(bed.poll(1).is_empty());
            let fd = bed.ends[1].queues[0].wait_fd().expect("an interrupt");
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u8)).unwrap() == 0
        });
        assert!(quiet, "interrupts without frames");
        let mut one = vec![bed.frame(0, 100, number).unwrap()];
        let sent = Instant::now();
        bed.ends[0].queues[0].tx_burst(&mut bed.pool, &mut one);
        let fd = bed.ends[1].queues[0].wait_fd().unwrap();
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::from(2000u16)).unwrap(),
            1,
            "no wake-up"
        );
        slowest = slowest.max(sent.elapsed());
        let mut got = bed.poll(1);
        assert_eq!(got.len(), 1);
        bed.pool.put_bulk(&mut got);
    }
    println!("slowest of 50 wake-ups: {slowest:?}");
    bed.close();
}

#[test]
#[ignore = "needs two devices: gateway/tests/beds/intel/run"]
fn receive_hashing_spreads_addresses_over_the_queues() {
    let mut bed = Bed::open(2, 1500);
    let queues = bed.ends[1].queues.len();
    assert_eq!(queues, 2);
    let mut per_queue = vec![0u32; queues];
    let mut places: Vec<HashSet<usize>> = vec![HashSet::new(); 64];
    for round in 0..640usize {
        let flow = u8::try_from(round % 64).unwrap();
        let mut frame = bed.pool.get().unwrap();
        frame
            .append(100)
            .unwrap()
            .copy_from_slice(&ipv4(bed.ends[0].mac, bed.ends[1].mac, flow));
        let mut one = vec![frame];
        bed.ends[0].queues[0].tx_burst(&mut bed.pool, &mut one);
        let start = Instant::now();
        let mut arrived = false;
        while !arrived {
            assert!(start.elapsed() < Duration::from_secs(5));
            for (queue, count) in per_queue.iter_mut().enumerate() {
                let mut out = Vec::new();
                bed.ends[1].queues[queue].rx_burst(&mut bed.pool, &mut out, 64);
                for frame in out {
                    if frame.data().get(29) == Some(&flow) {
                        places[usize::from(flow)].insert(queue);
                        *count += 1;
                        arrived = true;
                    }
                    bed.pool.put(frame);
                }
            }
        }
    }
    // Each flow always at one place, both places used.
    assert!(places.iter().all(|p| p.len() == 1), "{places:?}");
    assert!(per_queue.iter().all(|n| *n > 100), "{per_queue:?}");
    bed.close();
}

/// 100 bytes: ESP in IPv4 from 10.0.0.`flow` to 10.0.1.1.
fn ipv4(from: MacAddr, to: MacAddr, flow: u8) -> Vec<u8> {
    let mut all = Vec::from(to.0);
    all.extend(from.0);
    all.extend([8, 0]);
    let mut header = [
        0x45, 0, 0, 86, 0, 0, 0, 0, 64, 50, 0, 0, 10, 0, 0, flow, 10, 0, 1, 1,
    ];
    let sum: u32 = header
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&(!folded).to_be_bytes());
    all.extend(header);
    all.resize(100, 0);
    all
}

#[test]
#[ignore = "needs two devices and somebody at the cable: gateway/tests/beds/intel/run"]
fn a_cable_out_and_in_is_seen_and_traffic_goes_on() {
    let mut bed = Bed::open(1, 1500);
    exchange(&mut bed, &[60, 1514], 1000);
    for _ in 0..3 {
        set_link("off");
        bed.wait("link down", |b| !b.ends[0].control.link().up);
        set_link("on");
        bed.wait("link up", |b| b.ends.iter().all(|e| e.control.link().up));
        exchange(&mut bed, &[60, 1514], 1000);
    }
    bed.close();
}

/// Asks `guest.py` to pull or plug the cables: at the NICs, their ends of the hub stay up.
fn set_link(state: &str) {
    println!("\nBED: monitor set_link dev1 {state}");
    println!("BED: monitor set_link dev2 {state}");
    std::io::stdout().flush().unwrap();
}
