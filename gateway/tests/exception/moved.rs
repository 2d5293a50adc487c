//! Peers whose NAT has given them another port.

use std::net::Ipv6Addr;

use sa_store::report::Report;
use sa_store::sa::*;

use super::common::{Bed, Plan, bed, ip, udp};
use super::{OUTSIDE, reports};

/// The same ESP in UDP from another port, as behind a NAT that has forgotten its mapping.
fn remapped(frame: &[u8], port: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame
}

/// A bed whose SAs travel in UDP; the left gateway's inbound one is called `name`.
fn behind_nat(name: &'static str) -> Bed {
    bed(&Plan {
        taps: Some(1024),
        sa: Box::new(move |sa| {
            let port = |p| UdpEncap { sport: p, dport: p };
            sa.encap = Some(port(4500));
            if sa.spi.value() == 0x1002 {
                sa.name = name.into();
            }
        }),
        ..Plan::default()
    })
}

#[test]
fn authentic_packets_from_another_port_are_taken_and_told_of() {
    let mut bed = behind_nat("r2l");
    let packets: Vec<_> = (0..4u8)
        .map(|i| udp("10.2.0.1", "10.1.0.1", 64, &[i]))
        .collect();
    let sealed = bed.sealed_by_right(&packets);
    assert_eq!(sealed.len(), 4);
    let mut forged = remapped(&sealed[1], 6000);
    *forged.last_mut().unwrap() ^= 1;
    bed.inject_left(&[
        sealed[0].clone(),
        forged,
        remapped(&sealed[1], 61_000),
        remapped(&sealed[2], 61_000),
    ]);
    let (got, _) = bed.settle();
    assert_eq!(got.len(), 3, "nobody but the peer decides where it is");
    assert!(
        bed.kernel_got(OUTSIDE).is_empty(),
        "files' SAs have no daemon"
    );
    let moved: Vec<_> = reports(&mut bed)
        .into_iter()
        .filter_map(|r| match r {
            Report::Moved { src, port, .. } => Some((Ipv6Addr::from(src).to_canonical(), port)),
            _ => None,
        })
        .collect();
    assert_eq!(moved, [(ip("192.0.2.2"), 61_000)], "once a second");
    bed.inject_left(&sealed[3..]);
    assert_eq!(bed.settle().0.len(), 1);
    let snapshot = bed.left.gw.store.current();
    assert!(snapshot.sas.iter().flatten().all(|e| !e.has_moved()));
}

#[test]
fn of_a_daemons_peer_that_moved_the_kernel_gets_one_packet_a_second() {
    let mut bed = behind_nat("ike:r2l");
    let packets: Vec<_> = (0..40u8)
        .map(|i| udp("10.2.0.1", "10.1.0.1", 64, &[i]))
        .collect();
    let sealed: Vec<_> = bed
        .sealed_by_right(&packets)
        .iter()
        .map(|f| remapped(f, 61_000))
        .collect();
    bed.inject_left(&sealed[..10]);
    assert_eq!(bed.settle().0.len(), 10, "told of, and not yet due again");
    std::thread::sleep(std::time::Duration::from_millis(1050));
    bed.inject_left(&sealed[10..]);
    assert_eq!(bed.settle().0.len(), 29);
    assert_eq!(bed.kernel_got(OUTSIDE), sealed[10..11], "as it came");
}
