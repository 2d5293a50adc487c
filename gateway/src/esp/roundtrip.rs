//! Encapsulate, seal, open, decapsulate: every suite, mode, family, encapsulation and many sizes.

use etherparse::SlicedPacket;
use pmd::Pool;
use sa_store::cipher::{CipherFactory, CipherJob, SaCipher};
use sa_store::drops::{Consumed, DropReason};
use sa_store::plan::{InPlan, OutPlan};
use sa_store::sa::*;
use sa_store::suite::Suite;

use super::decap::{Decapped, post, pre};
use super::encap::{EncapArgs, EncapState, Hop, dummy, encap, finish, inner_mtu};
use super::iv::CbcIvGen;
use super::testing::*;
use crate::crypto::Fixed;
use crate::crypto::rustcrypto::RustCrypto;
use crate::wire::ipv4::Ipv4;
use crate::wire::ipv6::Ipv6;
use crate::wire::{Family, Parsed, ipv4, proto};

struct Sa {
    out: OutPlan,
    inb: InPlan,
    seal: Box<dyn SaCipher>,
    open: Box<dyn SaCipher>,
    state: EncapState,
}

impl Sa {
    fn new(spec: &SaSpec) -> Self {
        let make = |d| {
            Fixed(RustCrypto)
                .make(spec.suite, &spec.keys, spec.esn, d)
                .unwrap()
        };
        Self {
            out: OutPlan::new(spec),
            inb: InPlan::new(spec),
            seal: make(Direction::Out),
            open: make(Direction::In),
            state: EncapState::new(CbcIvGen::from_seed(&[1; 32]), 100),
        }
    }

    /// The outer packet of `inner`, sealed.
    fn protect(
        &mut self,
        pool: &mut Pool,
        inner: &[u8],
        args: EncapArgs,
    ) -> Result<Vec<u8>, DropReason> {
        let mut f = frame(pool, inner);
        let done = encap(&mut f, &parsed(inner), &self.out, args, &mut self.state);
        let r = done.map(|ok| {
            run(
                &*self.seal,
                &mut f.data_mut()[usize::from(ok.esp_off)..],
                ok.seq_hi,
                true,
            );
            if self.out.needs_udp_checksum() {
                finish(&mut f, ok.esp_off);
            }
            f.data().to_vec()
        });
        pool.put(f);
        r
    }

    /// What is inside, with whether it was a dummy.
    fn unprotect(
        &self,
        pool: &mut Pool,
        outer: &[u8],
        seq_hi: u32,
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let mut f = frame(pool, outer);
        let p = parsed(outer);
        let r = pre(&p, &self.inb).and_then(|pre| {
            let esp = &mut f.data_mut()[usize::from(pre.esp_off)..];
            if !run(&*self.open, esp, seq_hi, false) {
                return Err(DropReason::IcvMismatch);
            }
            let mut inner = Parsed::NOTHING;
            match post(&mut f, p.tos, pre.esp_off, &self.inb, NATT, &mut inner)? {
                Decapped::Packet => {
                    assert_eq!(inner, parsed(f.data()), "description fits the frame");
                    assert_eq!(f.len(), usize::from(inner.l3_len));
                    Ok(Some(f.data().to_vec()))
                }
                Decapped::Consumed(c) => {
                    assert_eq!(c, Consumed::Dummy);
                    Ok(None)
                }
            }
        });
        pool.put(f);
        r
    }
}

fn run(ctx: &dyn SaCipher, esp: &mut [u8], seq_hi: u32, seal: bool) -> bool {
    let mut jobs = [CipherJob {
        ctx,
        esp,
        seq_hi,
        ok: false,
    }];
    if seal {
        ctx.seal(&mut jobs);
    } else {
        ctx.open(&mut jobs);
    }
    jobs[0].ok
}

fn args(seq: u64) -> EncapArgs {
    EncapArgs {
        seq,
        hop: Hop::Local,
        inner_mtu: 9000,
    }
}

const GCM: Suite = Suite::Gcm(
    sa_store::suite::AesBits::B128,
    sa_store::suite::AeadIcv::L16,
);
const CBC: Suite = Suite::CipherHmac(
    sa_store::suite::Cipher::Cbc(sa_store::suite::AesBits::B128),
    sa_store::suite::Hmac::Sha256_128,
);

/// An independent parser accepts the outer packet and its checksums.
fn check_outer(outer: &[u8], udp: bool) {
    let sliced = SlicedPacket::from_ip(outer).unwrap();
    if outer[0] >> 4 == 4 {
        assert!(Ipv4::new(outer).unwrap().checksum_ok());
        assert_eq!(Ipv4::new(outer).unwrap().total_len(), outer.len());
    } else {
        assert_eq!(Ipv6::new(outer).unwrap().total_len(), outer.len());
    }
    if udp {
        let Some(etherparse::TransportSlice::Udp(u)) = sliced.transport else {
            panic!("no UDP header");
        };
        assert_eq!((u.source_port(), u.destination_port()), (4500, 4500));
        if outer[0] >> 4 == 4 {
            assert_eq!(u.checksum(), 0);
        } else {
            let header = etherparse::UdpHeader::from_slice(u.slice()).unwrap().0;
            let ip = etherparse::Ipv6Header::from_slice(outer).unwrap().0;
            let want = header.calc_checksum_ipv6(&ip, u.payload()).unwrap();
            assert_eq!(u.checksum(), want);
        }
    }
}

#[test]
fn every_suite_mode_family_and_encapsulation_carries_packets_unchanged() {
    let (_arena, mut pool) = pool(64, 10240);
    for suite in Suite::all() {
        for (mode, outer, inner) in [
            (Mode::Tunnel, Family::V4, Family::V4),
            (Mode::Tunnel, Family::V4, Family::V6),
            (Mode::Tunnel, Family::V6, Family::V4),
            (Mode::Tunnel, Family::V6, Family::V6),
            (Mode::Transport, Family::V4, Family::V4),
            (Mode::Transport, Family::V6, Family::V6),
        ] {
            for (udp, esn) in [(false, false), (false, true), (true, false), (true, true)] {
                let mut s = spec(suite, mode, outer, udp);
                s.esn = esn;
                let mut sa = Sa::new(&s);
                for (n, len) in (0..20).chain([64, 511, 1400, 1401, 8952]).enumerate() {
                    let packet = Ip::new(inner).udp(len);
                    let seq = if esn { 5 << 32 } else { 0 } + u64::try_from(n).unwrap() + 1;
                    let sealed = sa.protect(&mut pool, &packet, args(seq)).unwrap();
                    let header = usize::from(parsed(&packet).upper_off);
                    assert_eq!(sealed.len(), sa.out.outer_len(packet.len(), header));
                    check_outer(&sealed, udp);
                    let hi = u32::try_from(seq >> 32).unwrap();
                    let opened = sa.unprotect(&mut pool, &sealed, hi).unwrap();
                    assert_eq!(
                        opened.as_deref(),
                        Some(&packet[..]),
                        "{suite} {mode:?} {len}"
                    );
                    if esn {
                        assert_eq!(
                            sa.unprotect(&mut pool, &sealed, hi + 1),
                            Err(DropReason::IcvMismatch)
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn esp_stands_before_destination_options_and_behind_routing() {
    let (_arena, mut pool) = pool(16, 2048);
    let mut sa = Sa::new(&spec(GCM, Mode::Transport, Family::V6, false));
    let ext = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let udp = &Ip::new(Family::V6).udp(5)[40..];
    let chain = [
        &ext(proto::ROUTING)[..],
        &ext(proto::FRAGMENT),
        &[proto::DEST_OPTS, 0, 0, 0, 1, 2, 3, 4],
        &ext(proto::UDP),
        udp,
    ]
    .concat();
    let packet = Ip::new(Family::V6).packet(proto::HOP_BY_HOP, &chain);
    let sealed = sa.protect(&mut pool, &packet, args(1)).unwrap();
    let w = Ipv6::new(&sealed).unwrap().walk().unwrap();
    assert_eq!((w.proto, w.upper_at), (proto::ESP, 64));
    assert_eq!(
        sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap(),
        packet
    );
    // The exact MTU counts the part in front of ESP only.
    let p = parsed(&packet);
    let mtu = inner_mtu(&sa.out, &packet, &p, u16::try_from(sealed.len()).unwrap());
    assert!(usize::from(mtu) >= packet.len());
    let mtu = inner_mtu(
        &sa.out,
        &packet,
        &p,
        u16::try_from(sealed.len() - 1).unwrap(),
    );
    assert!(usize::from(mtu) < packet.len());
}

#[test]
fn transport_mode_keeps_ipv4_options_and_refuses_fragments() {
    let (_arena, mut pool) = pool(16, 2048);
    let mut sa = Sa::new(&spec(CBC, Mode::Transport, Family::V4, true));
    let mut packet = Ip::new(Family::V4).packet(
        proto::UDP,
        &[&[1, 1, 1, 0][..], &[0, 9, 0, 9, 0, 8, 0, 0]].concat(),
    );
    packet[0] = 0x46;
    ipv4::fill_checksum_options(&mut packet[..24]);
    let sealed = sa.protect(&mut pool, &packet, args(1)).unwrap();
    assert_eq!(sealed[..1], [0x46]);
    assert_eq!(
        sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap(),
        packet
    );
    let mut fragment = Ip::new(Family::V4);
    fragment.frag = ipv4::MF;
    let r = sa.protect(&mut pool, &fragment.udp(8), args(2));
    assert_eq!(r, Err(DropReason::FragmentPolicy));
}

#[test]
fn the_outer_header_follows_rfc_4301_section_5_1_2() {
    let (_arena, mut pool) = pool(16, 2048);
    let mut ip = Ip::new(Family::V4);
    ip.tos = 0xb8 | 1;
    ip.frag = ipv4::DF;
    let mut s = spec(GCM, Mode::Tunnel, Family::V4, false);
    s.ttl = 33;
    let outer = |s: &SaSpec, pool: &mut Pool, inner: &[u8]| {
        Sa::new(s).protect(pool, inner, args(1)).unwrap()
    };
    let b = outer(&s, &mut pool, &ip.udp(8));
    let h = Ipv4::new(&b).unwrap();
    assert_eq!((h.tos(), h.ttl(), h.df(), h.id()), (0xb9, 33, true, 0));
    // Clear DF in the inner header: fragmentable, so the ID counts.
    ip.frag = 0;
    let b = outer(&s, &mut pool, &ip.udp(8));
    let h = Ipv4::new(&b).unwrap();
    assert_eq!((h.df(), h.id()), (false, 101));
    s.df = Df::Set;
    assert!(Ipv4::new(&outer(&s, &mut pool, &ip.udp(8))).unwrap().df());
    s.df = Df::Clear;
    s.dscp = Dscp::Fixed(10);
    s.ecn = false;
    let b = outer(&s, &mut pool, &Ip::new(Family::V6).udp(8));
    let h = Ipv4::new(&b).unwrap();
    assert_eq!((h.df(), h.tos()), (false, 40));
    let mut s = spec(GCM, Mode::Tunnel, Family::V6, false);
    s.ttl = 7;
    let b = outer(&s, &mut pool, &ip.udp(8));
    let h = Ipv6::new(&b).unwrap();
    assert_eq!((h.tos(), h.hop_limit()), (0xb9, 7));
    assert_ne!(h.flow_label(), 0);
}

#[test]
fn ecn_marks_on_the_way_reach_the_inner_header_unless_turned_off() {
    let (_arena, mut pool) = pool(16, 2048);
    for family in [Family::V4, Family::V6] {
        let mut ip = Ip::new(family);
        ip.tos = 0xb8 | 2;
        let mut s = spec(GCM, Mode::Tunnel, Family::V4, false);
        let mut sa = Sa::new(&s);
        let mut sealed = sa.protect(&mut pool, &ip.udp(8), args(1)).unwrap();
        ipv4::set_tos(sealed.first_chunk_mut().unwrap(), 3);
        let got = sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap();
        assert_eq!(parsed(&got).tos, 0xb8 | 3);
        ip.tos = 0xb8;
        let mut sealed = sa.protect(&mut pool, &ip.udp(8), args(1)).unwrap();
        ipv4::set_tos(sealed.first_chunk_mut().unwrap(), 3);
        let r = sa.unprotect(&mut pool, &sealed, 0);
        assert_eq!(r, Err(DropReason::EcnInvalid));
        s.ecn = false;
        let r = Sa::new(&s).unprotect(&mut pool, &sealed, 0).unwrap();
        assert_eq!(parsed(&r.unwrap()).tos, 0xb8);
    }
}

#[test]
fn forwarding_takes_one_from_the_inner_ttl_and_refuses_the_last() {
    let (_arena, mut pool) = pool(16, 2048);
    let mut sa = Sa::new(&spec(GCM, Mode::Tunnel, Family::V6, false));
    let mut forwarded = args(1);
    forwarded.hop = Hop::Forwarded;
    for family in [Family::V4, Family::V6] {
        let mut ip = Ip::new(family);
        let sealed = sa.protect(&mut pool, &ip.udp(3), forwarded).unwrap();
        let inner = sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap();
        assert_eq!(parsed(&inner).ttl, 63);
        ip.ttl = 1;
        let r = sa.protect(&mut pool, &ip.udp(3), forwarded);
        assert_eq!(r, Err(DropReason::TtlExpired));
    }
}

#[test]
fn traffic_flow_padding_makes_sizes_equal_up_to_the_mtu() {
    let (_arena, mut pool) = pool(16, 2048);
    let mut s = spec(GCM, Mode::Tunnel, Family::V4, false);
    s.tfc = Tfc::PadTo(1000);
    let mut sa = Sa::new(&s);
    for len in [0, 100, 972] {
        let packet = Ip::new(Family::V4).udp(len);
        let sealed = sa.protect(&mut pool, &packet, args(1)).unwrap();
        assert_eq!(sealed.len(), sa.out.outer_len(1000, 0));
        assert_eq!(
            sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap(),
            packet
        );
    }
    let mut small = args(1);
    small.inner_mtu = 500;
    let sealed = sa
        .protect(&mut pool, &Ip::new(Family::V4).udp(5), small)
        .unwrap();
    assert_eq!(sealed.len(), sa.out.outer_len(500, 0));
    let sealed = sa
        .protect(&mut pool, &Ip::new(Family::V4).udp(1100), small)
        .unwrap();
    assert_eq!(sealed.len(), sa.out.outer_len(1128, 0));
}

#[test]
fn dummies_are_consumed_in_both_modes() {
    let (_arena, mut pool) = pool(16, 2048);
    for mode in [Mode::Tunnel, Mode::Transport] {
        for family in [Family::V4, Family::V6] {
            let mut sa = Sa::new(&spec(CBC, mode, family, true));
            let mut f = pool.get().unwrap();
            let ok = dummy(&mut f, 333, &sa.out, 9, &mut sa.state).unwrap();
            run(
                &*sa.seal,
                &mut f.data_mut()[usize::from(ok.esp_off)..],
                0,
                true,
            );
            if sa.out.needs_udp_checksum() {
                finish(&mut f, ok.esp_off);
            }
            check_outer(f.data(), true);
            let outer = f.data().to_vec();
            pool.put(f);
            assert_eq!(sa.unprotect(&mut pool, &outer, 0), Ok(None));
        }
    }
}

/// Seals what `change` made of the clear ESP payload (from behind the IV to before the ICV).
fn with_forged_payload(
    s: &SaSpec,
    change: impl Fn(&mut [u8]),
) -> Result<Option<Vec<u8>>, DropReason> {
    let (_arena, mut pool) = pool(8, 2048);
    let mut sa = Sa::new(s);
    let packet = Ip::new(Family::V4).udp(8);
    let mut f = frame(&mut pool, &packet);
    let ok = encap(&mut f, &parsed(&packet), &sa.out, args(1), &mut sa.state).unwrap();
    let esp = &mut f.data_mut()[usize::from(ok.esp_off)..];
    let (from, to) = (8 + s.suite.iv_len(), esp.len() - s.suite.icv_len());
    change(&mut esp[from..to]);
    run(&*sa.seal, esp, 0, true);
    let outer = f.data().to_vec();
    pool.put(f);
    sa.unprotect(&mut pool, &outer, 0)
}

#[test]
fn what_the_peer_sealed_wrongly_is_named() {
    let s = spec(GCM, Mode::Tunnel, Family::V4, false);
    let t = spec(GCM, Mode::Transport, Family::V4, false);
    // 36 bytes of IP packet: padding 1, 2, then pad length 2.
    assert!(with_forged_payload(&s, |_| ()).is_ok());
    let last = |b: &[u8]| b.len() - 1;
    for bad in [
        (|b: &mut [u8]| {
            let n = b.len();
            b[n - 4] = 9
        }) as fn(&mut [u8]),
        |b| {
            let n = b.len();
            b[n - 2] = 255
        },
        |b| {
            let n = b.len();
            b[n - 2] = 37
        },
        |b| {
            let n = b.len();
            b[n - 2] = 3
        },
    ] {
        assert_eq!(with_forged_payload(&s, bad), Err(DropReason::BadPadding));
    }
    for nh in [17, 0, 50, 255] {
        let r = with_forged_payload(&s, |b| {
            let n = last(b);
            b[n] = nh
        });
        assert_eq!(r, Err(DropReason::BadNextHeader), "tunnel {nh}");
    }
    for nh in [0, 43, 44, 255] {
        let r = with_forged_payload(&t, |b| {
            let n = last(b);
            b[n] = nh
        });
        assert_eq!(r, Err(DropReason::BadNextHeader), "transport {nh}");
    }
    let r = with_forged_payload(&s, |b| {
        let n = last(b);
        b[n] = 41
    });
    assert_eq!(r, Err(DropReason::InnerMalformed));
    let r = with_forged_payload(&s, |b| b[3] += 1);
    assert_eq!(r, Err(DropReason::InnerMalformed));
    let r = with_forged_payload(&s, |b| b[8] -= 1);
    assert_eq!(r, Err(DropReason::InnerMalformed), "inner checksum");
}

#[test]
fn packets_of_wrong_length_or_encapsulation_are_refused_before_the_icv() {
    let (_arena, mut pool) = pool(8, 2048);
    let plain = spec(CBC, Mode::Tunnel, Family::V4, false);
    let natt = spec(CBC, Mode::Tunnel, Family::V4, true);
    let packet = Ip::new(Family::V4).udp(20);
    let (mut a, mut b) = (Sa::new(&plain), Sa::new(&natt));
    let in_plain = a.protect(&mut pool, &packet, args(1)).unwrap();
    let in_udp = b.protect(&mut pool, &packet, args(1)).unwrap();
    assert_eq!(
        b.unprotect(&mut pool, &in_plain, 0),
        Err(DropReason::EncapMismatch)
    );
    assert_eq!(
        a.unprotect(&mut pool, &in_udp, 0),
        Err(DropReason::EncapMismatch)
    );
    for cut in [1, 4, 15] {
        let esp = &in_plain[20..in_plain.len() - cut];
        let p = Ip::new(Family::V4).packet(proto::ESP, esp);
        assert_eq!(a.unprotect(&mut pool, &p, 0), Err(DropReason::EspTooShort));
    }
    // Header, IV, one block, ICV: the least that can be.
    for (len, want) in [(56, DropReason::IcvMismatch), (40, DropReason::EspTooShort)] {
        let p = Ip::new(Family::V4).packet(proto::ESP, &vec![1; len]);
        assert_eq!(a.unprotect(&mut pool, &p, 0), Err(want));
    }
}

#[test]
fn checksums_are_right_again_behind_nat_in_transport_mode() {
    let (_arena, mut pool) = pool(8, 2048);
    let mut sa = Sa::new(&spec(GCM, Mode::Transport, Family::V4, true));
    let packet = Ip::new(Family::V4).udp(33);
    let mut sealed = sa.protect(&mut pool, &packet, args(1)).unwrap();
    // The NAT rewrites the source address.
    sealed[12..16].copy_from_slice(&[203, 0, 113, 5]);
    ipv4::fill_checksum(sealed.first_chunk_mut().unwrap());
    let got = sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap();
    let mut zeroed = got.clone();
    zeroed[26..28].fill(0);
    let want = transport_checksum(&zeroed, 20, proto::UDP);
    assert_eq!(got[26..28], want.to_be_bytes());
    assert_ne!(got[26..28], packet[26..28]);
    // "No checksum" stays so.
    let mut none = packet.clone();
    none[26..28].fill(0);
    let mut sealed = sa.protect(&mut pool, &none, args(2)).unwrap();
    sealed[12..16].copy_from_slice(&[203, 0, 113, 5]);
    ipv4::fill_checksum(sealed.first_chunk_mut().unwrap());
    let got = sa.unprotect(&mut pool, &sealed, 0).unwrap().unwrap();
    assert_eq!(got[26..28], [0, 0]);
}

#[test]
fn a_frame_without_room_is_refused_not_overrun() {
    let (_arena, mut pool) = pool(8, 2048);
    let mut sa = Sa::new(&spec(GCM, Mode::Tunnel, Family::V6, true));
    let packet = Ip::new(Family::V4).udp(100);
    let mut f = pool.get().unwrap();
    f.reset(63);
    f.append(packet.len()).unwrap().copy_from_slice(&packet);
    let p = parsed(&packet);
    let r = encap(&mut f, &p, &sa.out, args(1), &mut sa.state);
    assert_eq!(r, Err(DropReason::NoRoom));
    f.reset(2048 - packet.len() - 17);
    f.append(packet.len()).unwrap().copy_from_slice(&packet);
    let r = encap(&mut f, &p, &sa.out, args(1), &mut sa.state);
    assert_eq!(r, Err(DropReason::NoRoom));
    pool.put(f);
}
