//! Stages of the ESP core alone: nanoseconds per packet over bursts of 64 frames.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gateway::esp::decap::{self, DecapPre, Decapped};
use gateway::esp::encap::{EncapArgs, EncapState, Hop, encap};
use gateway::esp::fuzz::spec;
use gateway::esp::iv::CbcIvGen;
use gateway::esp::mss;
use gateway::wire::ipv4::Ipv4Repr;
use gateway::wire::ipv6::Ipv6Repr;
use gateway::wire::{Family, NattPorts, Parsed, parse_into, parse_ip};
use pmd::{Arena, ArenaConfig, BURST, Frame, Pool};
use sa_store::plan::{InPlan, OutPlan};
use sa_store::sa::Mode;
use sa_store::suite::Suite;

fn packet(family: Family, len: usize) -> Vec<u8> {
    let mut b = vec![0u8; len];
    match family {
        Family::V4 => {
            let (h, _) = b.split_first_chunk_mut::<20>().expect("len >= 48");
            Ipv4Repr {
                src: [10, 1, 0, 1].into(),
                dst: [10, 2, 0, 2].into(),
                proto: 17,
                ttl: 64,
                tos: 0,
                id: 1,
                frag: 0x4000,
                payload_len: u16::try_from(len - 20).expect("short"),
            }
            .emit(h);
        }
        Family::V6 => {
            let (h, _) = b.split_first_chunk_mut::<40>().expect("len >= 48");
            Ipv6Repr {
                src: "2001:db8:1::1".parse().expect("address"),
                dst: "2001:db8:2::2".parse().expect("address"),
                next_header: 17,
                hop_limit: 64,
                tos: 0,
                flow_label: 0,
                payload_len: u16::try_from(len - 40).expect("short"),
            }
            .emit(h);
        }
    }
    b
}

fn ethernet(family: Family, l3: &[u8]) -> Vec<u8> {
    let ethertype: [u8; 2] = match family {
        Family::V4 => [8, 0],
        Family::V6 => [0x86, 0xdd],
    };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &ethertype, l3].concat()
}

fn frames(bytes: &[u8]) -> (Pool, Vec<Frame>) {
    let arena = Arena::new(ArenaConfig {
        frames: 256,
        lock: false,
        ..ArenaConfig::default()
    })
    .expect("memory");
    let mut pool = Pool::new(&arena, 128);
    let mut v = Vec::new();
    assert_eq!(pool.get_bulk(&mut v, BURST), BURST);
    for f in &mut v {
        assert!(f.set_data(bytes));
    }
    (pool, v)
}

/// Times `stage` over a burst; `prepare` puts the frames into their starting state off the clock.
fn staged(
    iters: u64,
    frames: &mut [Frame],
    mut prepare: impl FnMut(&mut Frame),
    mut stage: impl FnMut(&mut Frame),
) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..iters {
        frames.iter_mut().for_each(&mut prepare);
        let start = Instant::now();
        frames.iter_mut().for_each(&mut stage);
        spent += start.elapsed();
    }
    spent
}

fn parse_stage(c: &mut Criterion) {
    let mut g = c.benchmark_group("parse");
    g.throughput(Throughput::Elements(BURST as u64));
    for (name, family) in [("ipv4", Family::V4), ("ipv6", Family::V6)] {
        let (mut pool, mut v) = frames(&ethernet(family, &packet(family, 64)));
        g.bench_function(name, |b| {
            let mut out = vec![Parsed::NOTHING; BURST];
            b.iter(|| {
                for (f, p) in v.iter().zip(&mut out) {
                    let _ = parse_into(f.data(), NattPorts::default(), p);
                }
                black_box(&mut out);
            });
        });
        pool.put_bulk(&mut v);
    }
    g.finish();
}

fn encap_stage(c: &mut Criterion) {
    let mut g = c.benchmark_group("encap");
    g.throughput(Throughput::Elements(BURST as u64));
    for (name, suite, outer, inner) in cases() {
        let spec = spec(suite, Mode::Tunnel, outer, false);
        let plan = OutPlan::new(&spec);
        let bytes = packet(inner, 64);
        let p = parse_ip(&bytes, NattPorts::default()).expect("valid");
        let (mut pool, mut v) = frames(&bytes);
        let mut state = EncapState::new(CbcIvGen::from_seed(&[1; 32]), 0);
        let mut seq = 0;
        g.bench_function(name, |b| {
            b.iter_custom(|iters| {
                staged(
                    iters,
                    &mut v,
                    |f| {
                        assert!(f.set_data(&bytes));
                    },
                    |f| {
                        seq += 1;
                        let args = EncapArgs {
                            seq,
                            hop: Hop::Forwarded,
                            inner_mtu: 1400,
                        };
                        let _ = black_box(encap(f, &p, &plan, args, &mut state));
                    },
                )
            });
        });
        pool.put_bulk(&mut v);
    }
    g.finish();
}

fn decap_stage(c: &mut Criterion) {
    let mut g = c.benchmark_group("decap");
    g.throughput(Throughput::Elements(BURST as u64));
    for (name, suite, outer, inner) in cases() {
        let spec = spec(suite, Mode::Tunnel, outer, false);
        let (out, inb) = (OutPlan::new(&spec), InPlan::new(&spec));
        let bytes = packet(inner, 64);
        let p = parse_ip(&bytes, NattPorts::default()).expect("valid");
        let (mut pool, mut v) = frames(&bytes);
        let mut state = EncapState::new(CbcIvGen::from_seed(&[1; 32]), 0);
        let args = EncapArgs {
            seq: 1,
            hop: Hop::Local,
            inner_mtu: 1400,
        };
        // Not ciphered: what the cipher would have restored is already in place.
        encap(&mut v[0], &p, &out, args, &mut state).expect("room");
        let opened = v[0].data().to_vec();
        let outer: Parsed = parse_ip(&opened, NattPorts::default()).expect("valid");
        let mut got: Vec<Parsed> = Vec::with_capacity(BURST);
        g.bench_function(name, |b| {
            b.iter_custom(|iters| {
                staged(
                    iters,
                    &mut v,
                    |f| {
                        assert!(f.set_data(&opened));
                    },
                    |f| {
                        let outer = black_box(&outer);
                        let pre: DecapPre = decap::pre(outer, &inb).expect("valid");
                        if got.len() == BURST {
                            black_box(&mut got).clear();
                        }
                        got.push(Parsed::NOTHING);
                        let inner = got.last_mut().expect("pushed");
                        let natt = NattPorts::default();
                        let r = decap::post(f, outer.tos, pre.esp_off, &inb, natt, inner);
                        assert_eq!(r, Ok(Decapped::Packet));
                    },
                )
            });
        });
        pool.put_bulk(&mut v);
    }
    g.finish();
}

fn mss_stage(c: &mut Criterion) {
    let mut bytes = packet(Family::V4, 64);
    bytes[9] = 17;
    let p = parse_ip(&packet(Family::V4, 64), NattPorts::default()).expect("valid");
    c.bench_function("mss/not tcp", |b| {
        b.iter(|| black_box(mss::clamp(&mut bytes, black_box(&p), 1360)));
    });
}

fn cases() -> [(&'static str, Suite, Family, Family); 4] {
    let gcm = "aes-128-gcm-16".parse().expect("a suite");
    let cbc = "aes-128-cbc+hmac-sha2-256-128".parse().expect("a suite");
    [
        ("gcm ipv4 in ipv4", gcm, Family::V4, Family::V4),
        ("gcm ipv6 in ipv4", gcm, Family::V4, Family::V6),
        ("gcm ipv4 in ipv6", gcm, Family::V6, Family::V4),
        ("cbc ipv4 in ipv4", cbc, Family::V4, Family::V4),
    ]
}

criterion_group!(benches, parse_stage, encap_stage, decap_stage, mss_stage);
criterion_main!(benches);
