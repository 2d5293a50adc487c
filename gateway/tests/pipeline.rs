//! Two gateways back to back in one process: what goes in at one end comes out at the other, and every frame is
//! accounted for.

mod common;

use common::{Bed, GCM, Plan, bed, payload_of, udp, with_byte};
use sa_store::drops::{Consumed, DropReason};
use sa_store::report::Report;
use sa_store::sa::*;
use sa_store::spd::PolicyIdx;
use sa_store::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};

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
            let sa = move |s: &mut SaSpec| s.encap = encap;
            let mut bed = bed(&Plan {
                suite,
                sa: Box::new(sa),
                ..Plan::default()
            });
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
    let mut bed = bed(&Plan {
        workers: 3,
        ..Plan::default()
    });
    for _ in 0..20 {
        let burst: Vec<_> = (0..50)
            .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &[i; 100]))
            .collect();
        bed.send_left(&burst);
        let (_, r) = bed.settle();
        bed.expect(&r, 50);
        let order: Vec<u8> = r.iter().map(|p| payload_of(p)[0]).collect();
        assert!(order.is_sorted(), "order within the flow is kept");
    }
    let handed = bed.right.count(|c| c.handed_out.value());
    assert!(handed > 0, "the receiving worker is not the owner");
}

#[test]
fn jumbo_packets_cross() {
    let mut bed = bed(&Plan {
        mtu: 9100,
        ..Plan::default()
    });
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &vec![7; 8972])]);
    assert_eq!(bed.settle().1.len(), 1);
}

#[test]
fn too_big_packets_are_answered_with_the_mtu_that_fits_exactly() {
    let mut bed = bed(&Plan {
        sa: Box::new(|s| s.df = Df::Set),
        ..Plan::default()
    });
    let big = udp("10.1.0.1", "10.2.0.1", 64, &[1; 1472]);
    let df = big[20] | 0x40;
    let big = with_byte(big, 20, df);
    bed.send_left(std::slice::from_ref(&big));
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
    let mut bed = bed(&Plan {
        sa: Box::new(|s| s.df = Df::Clear),
        ..Plan::default()
    });
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, &[9; 1472])]);
    let (_, r) = bed.settle();
    bed.expect(&r, 1);
    assert_eq!(payload_of(&r[0]), [9; 1472]);
    let merged = bed.right.gw.counters[0].consumed[Consumed::Reassembled as usize].value();
    assert_eq!(merged, 1);
}

#[test]
fn policy_bypasses_discards_and_demands_protection() {
    let mut bed = bed(&Plan::default());
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
fn every_packet_counts_for_the_policy_that_decided_about_it() {
    let mut bed = bed(&Plan::default());
    let protected: Vec<_> = (1..=50)
        .map(|host| udp(&format!("10.1.0.{host}"), "10.2.0.1", 64, b"protect"))
        .collect();
    for _ in 0..3 {
        bed.send_left(&protected);
        bed.send_left(&[udp("10.1.0.1", "198.51.100.1", 64, b"no policy")]);
        bed.settle();
    }
    let hits = |gw: &gateway::app::Assembled, direction, name: &str| -> u64 {
        let snapshot = gw.store.current();
        let (spd, hits) = match direction {
            Direction::Out => (&snapshot.spd_out, &gw.hits[0].out),
            Direction::In => (&snapshot.spd_in, &gw.hits[0].inbound),
        };
        let mut named = spd.policies().filter(|(_, p)| p.name == name);
        let index = named.next().map_or(PolicyIdx::DEFAULT, |(idx, _)| idx);
        hits[index.index()].value()
    };
    let (left, right) = (&bed.left.gw, &bed.right.gw);
    assert_eq!(hits(left, Direction::Out, "out"), 150);
    assert_eq!(hits(left, Direction::Out, "web-out"), 0);
    assert_eq!(hits(left, Direction::Out, "(default)"), 3);
    assert_eq!(hits(right, Direction::In, "in"), 150);
}

#[test]
fn an_expired_hop_limit_is_answered() {
    let mut bed = bed(&Plan::default());
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
fn dummy_packets_fill_the_silence_and_end_at_the_peer() {
    let sa = |s: &mut SaSpec| s.tfc = Tfc::of(600, 1000);
    let mut bed = bed(&Plan {
        sa: Box::new(sa),
        ..Plan::default()
    });
    bed.settle();
    std::thread::sleep(std::time::Duration::from_millis(5));
    bed.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, b"real")]);
    let (_, r) = bed.settle();
    assert_eq!(r.len(), 1, "only the real packet reaches the host");
    let eaten = bed.right.gw.counters[0].consumed[Consumed::Dummy as usize].value();
    assert!(eaten >= 1, "{eaten}");
    let lengths: std::collections::BTreeSet<usize> = bed.wire.iter().map(Vec::len).collect();
    assert_eq!(
        lengths.len(),
        1,
        "dummies and padded packets look alike: {lengths:?}"
    );
}

#[test]
fn auditable_drops_are_reported_with_their_fields_and_in_measure() {
    let mut b = bed(&Plan::default());
    b.cut = true;
    b.send_left(&[udp("10.1.0.1", "10.2.0.1", 64, b"x")]);
    b.settle();
    b.cut = false;
    let good = b.wire.last().unwrap().clone();
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    let mut unknown = good.clone();
    unknown[34..38].copy_from_slice(&0xdead_beef_u32.to_be_bytes());
    let clear = udp("10.1.0.1", "10.2.0.1", 64, b"in the clear");
    b.inject_right(&[forged.clone(), unknown, good.clone(), good, clear]);
    b.settle();
    let told = |b: &mut Bed| {
        let mut lines = Vec::new();
        while let Ok(report) = b.right.gw.reports[0].pop() {
            if let Report::Audit(event) = report {
                lines.push(event);
            }
        }
        lines
    };
    let mut lines: Vec<_> = told(&mut b).iter().map(ToString::to_string).collect();
    lines.sort_unstable();
    let gateways = "src=192.0.2.1 dst=192.0.2.2 proto=50";
    assert_eq!(
        lines,
        [
            format!("reason=icv_mismatch spi=0x00001001 seq=1 {gateways}"),
            "reason=policy_must_protect src=10.1.0.1 dst=10.2.0.1 proto=17 sport=1000 dport=2000"
                .into(),
            format!("reason=replay_duplicate spi=0x00001001 seq=1 {gateways}"),
            format!("reason=sa_not_found spi=0xdeadbeef seq=1 {gateways}"),
        ]
    );
    // A flood fills no log and says how much of it was left out.
    for _ in 0..40 {
        b.inject_right(&vec![forged.clone(); 50]);
        b.settle();
    }
    let first = told(&mut b);
    assert!((1..200).contains(&first.len()), "{}", first.len());
    std::thread::sleep(std::time::Duration::from_millis(200));
    b.inject_right(&[forged]);
    b.settle();
    let all: u64 = first
        .iter()
        .chain(&told(&mut b))
        .map(|e| 1 + e.unreported)
        .sum();
    assert_eq!(all, 2001);
}

#[test]
fn workers_that_help_each_other_keep_an_sas_packets_in_order() {
    let mut bed = bed(&Plan {
        workers: 3,
        config: Box::new(|c, _| c.parallel = true),
        ..Plan::default()
    });
    for _ in 0..40 {
        let burst: Vec<_> = (0..=255)
            .map(|i| udp("10.1.0.1", "10.2.0.1", 64, &[i; 1300]))
            .collect();
        bed.send_left(&burst);
        let (_, r) = bed.settle();
        let (out, inb) = (bed.dropped(true), bed.dropped(false));
        assert_eq!(r.len(), burst.len(), "{out:?} {inb:?}");
        let order: Vec<u8> = r.iter().map(|p| payload_of(p)[0]).collect();
        assert!(order.is_sorted(), "order within the flow is kept");
    }
}
