//! UDP checksums of encapsulated ESP over IPv6, made here or by the port: what is on the wire is right in either case.

mod common;

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use common::{Plan, bed, ip, udp};
use pmd::checksum;
use pmd::memory::MemoryQueue;
use pmd::{Frame, Pool, PortQueue, PortQueueStats};
use sa_store::sa::{Df, UdpEncap};

thread_local! {
    /// Checksums that ports completed in this test.
    static COMPLETED: Cell<usize> = const { Cell::new(0) };
}

/// A port whose device completes checksums.
struct Completing(MemoryQueue);

impl PortQueue for Completing {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        self.0.rx_burst(pool, out, max)
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        for frame in frames.iter_mut().filter(|f| f.checksum_left()) {
            assert_eq!(frame.data()[12..14], [0x86, 0xdd]);
            assert_eq!(frame.data()[20], 17, "UDP behind the fixed header");
            COMPLETED.set(COMPLETED.get() + 1);
            checksum::complete(frame);
        }
        self.0.tx_burst(pool, frames)
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.wait_fd()
    }

    fn completes_checksums(&self) -> bool {
        true
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        self.0.stats()
    }

    fn drain(&mut self, pool: &mut Pool) {
        self.0.drain(pool);
    }
}

fn plan(workers: usize) -> Plan {
    Plan {
        workers,
        sa: Box::new(|s| {
            let out = s.name == "l2r";
            let (a, b) = (ip("fd0f::1"), ip("fd0f::2"));
            (s.src, s.dst) = if out { (a, b) } else { (b, a) };
            s.encap = Some(UdpEncap {
                sport: 4500,
                dport: 4500,
            });
            s.df = Df::Clear;
        }),
        ..Plan::default()
    }
}

/// What a receiver sums, after etherparse.
fn accepted(frame: &[u8]) -> bool {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
    let Some(etherparse::NetSlice::Ipv6(ip)) = packet.net else {
        return false;
    };
    let header = ip.header().to_header();
    let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else {
        return false;
    };
    let expected = udp
        .to_header()
        .calc_checksum_ipv6(&header, udp.payload())
        .unwrap();
    udp.checksum() == expected && expected != 0
}

fn packets(n: usize, longest: usize) -> Vec<Vec<u8>> {
    (0..n)
        .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &vec![7; i * longest / n]))
        .collect()
}

#[test]
fn the_receiver_finds_the_checksum_right_whoever_makes_it() {
    for port_completes in [false, true] {
        COMPLETED.set(0);
        let mut bed = bed(&Plan {
            around: if port_completes {
                |q| Box::new(Completing(q))
            } else {
                |q| Box::new(q)
            },
            ..plan(1)
        });
        bed.send_left(&packets(60, 1300));
        let (_, r) = bed.settle();
        assert_eq!(
            (r.len(), bed.wire.len()),
            (60, 60),
            "{:?}",
            bed.dropped(true)
        );
        assert!(bed.wire.iter().all(|f| accepted(f)));
        assert_eq!(COMPLETED.get(), if port_completes { 60 } else { 0 });
    }
}

#[test]
fn a_packet_that_goes_in_fragments_has_the_sum_over_all_of_them() {
    COMPLETED.set(0);
    let mut bed = bed(&Plan {
        around: |q| Box::new(Completing(q)),
        ..plan(1)
    });
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &[9; 1450])]);
    bed.settle();
    assert_eq!(bed.wire.len(), 2, "{:?}", bed.dropped(true));
    assert_eq!(COMPLETED.get(), 0);
    // Put together again: without link header, IPv6 header and fragment header, these are the UDP packet.
    let mut whole = bed.wire[0][..54].to_vec();
    for piece in &bed.wire {
        assert_eq!(piece[20], 44);
        whole.extend(&piece[62..]);
    }
    let length = u16::try_from(whole.len() - 54).unwrap();
    whole[18..20].copy_from_slice(&length.to_be_bytes());
    whole[20] = 17;
    assert!(accepted(&whole));
}

/// The port has one queue: workers without it hand their frames to the one that has it.
#[test]
fn what_another_worker_sends_has_its_checksum_already() {
    for workers in [2, 3] {
        let mut bed = bed(&Plan {
            around: |q| Box::new(Completing(q)),
            ..plan(workers)
        });
        bed.send_left(&packets(60, 1300));
        let (_, r) = bed.settle();
        assert_eq!(
            (r.len(), bed.wire.len()),
            (60, 60),
            "{:?}",
            bed.dropped(true)
        );
        assert!(bed.wire.iter().all(|f| accepted(f)));
    }
}
