//! Entry points for fuzzers, and an SA for fuzzers and benchmarks.

use pmd::Pool;
use sa_store::plan::{InPlan, OutPlan};
use sa_store::sa::*;
use sa_store::suite::Suite;

use super::decap::{self, Decapped};
use super::encap::{EncapArgs, EncapState, Hop, encap};
use super::iv::CbcIvGen;
use crate::crypto::differential::keys;
use crate::wire::fuzz::with_checksum;
use crate::wire::{Family, NattPorts, Parsed, parse_ip};

/// An SA with every option at its default. `family` is that of the outer header.
pub fn spec(suite: Suite, mode: Mode, family: Family, udp: bool) -> SaSpec {
    // Transport mode protects the packets' own addresses.
    let (src, dst) = match (mode, family) {
        (Mode::Tunnel, Family::V4) => ("192.0.2.1", "192.0.2.2"),
        (Mode::Tunnel, Family::V6) => ("2001:db8::1", "2001:db8::2"),
        (Mode::Transport, Family::V4) => ("10.1.0.1", "10.2.0.2"),
        (Mode::Transport, Family::V6) => ("2001:db8:1::1", "2001:db8:2::2"),
    };
    SaSpec {
        tunnel: "t".into(),
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        mode,
        encap: udp.then_some(UdpEncap {
            sport: 4500,
            dport: 4500,
        }),
        ..SaSpec::plain(
            "s",
            Direction::Out,
            Spi::new(0x1234_5678).unwrap(),
            suite,
            keys(suite, 7),
        )
    }
}

/// Arbitrary bytes as an IP packet: if it parses, decapsulation judges it as if its ICV had been right, and
/// encapsulation followed by decapsulation (without ciphering) must give it back.
pub fn fuzz_decap(data: &[u8], pool: &mut Pool) {
    let Some((&[choice, suite], packet)) = data.split_first_chunk::<2>() else {
        return;
    };
    let packet = &*with_checksum(packet);
    let Ok(p) = parse_ip(packet, NattPorts::default()) else {
        return;
    };
    let suites = Suite::all();
    let Some(&suite) = suites.get(usize::from(suite) % suites.len()) else {
        return;
    };
    let mode = if choice & 1 == 0 {
        Mode::Tunnel
    } else {
        Mode::Transport
    };
    let family = match mode {
        Mode::Transport => p.family,
        Mode::Tunnel if choice & 2 == 0 => Family::V4,
        Mode::Tunnel => Family::V6,
    };
    let spec = spec(suite, mode, family, choice & 4 != 0);
    let (out, inb) = (OutPlan::new(&spec), InPlan::new(&spec));
    let packet = packet.get(..usize::from(p.l3_len)).unwrap_or(packet);
    let Some(mut frame) = pool.get() else {
        return;
    };
    let natt = NattPorts::default();
    let mut inner = Parsed::NOTHING;
    if frame.set_data(packet)
        && let Ok(pre) = decap::pre(&p, &inb)
        && let Ok(Decapped::Packet) =
            decap::post(&mut frame, p.tos, pre.esp_off, &inb, natt, &mut inner)
    {
        assert_eq!(frame.len(), usize::from(inner.l3_len));
    }
    let args = EncapArgs {
        seq: 1,
        hop: Hop::Local,
        inner_mtu: 1400,
    };
    let mut state = EncapState::new(CbcIvGen::from_seed(&[0; 32]), 0);
    if frame.set_data(packet) && encap(&mut frame, &p, &out, args, &mut state).is_ok() {
        let outer = parse_ip(frame.data(), NattPorts::default());
        if let Ok(outer) = outer {
            assert_eq!(usize::from(outer.l3_len), frame.len());
            if let Ok(pre) = decap::pre(&outer, &inb) {
                let (tos, off) = (outer.tos, pre.esp_off);
                let got = decap::post(&mut frame, tos, off, &inb, natt, &mut inner);
                if mode == Mode::Tunnel {
                    assert_eq!((got, inner), (Ok(Decapped::Packet), p));
                    assert_eq!(frame.data(), packet);
                }
            }
        }
    }
    pool.put(frame);
}
