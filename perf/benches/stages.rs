//! Parts of a packet's way alone, as far as the crates' own benchmarks do not have them: SAD, replay window, routes,
//! rings. Parsing, encapsulation and decapsulation are in `gateway/benches/esp.rs`, ciphers in
//! `gateway/benches/crypto.rs`, policies and flow cache in `sa-store/benches/lookup.rs`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gateway::crypto::{Fixed, rustcrypto::RustCrypto};
use perf::rig::arena_for;
use perf::scenario::{FIRST_PEER, Scenario, Spread, spi};
use pmd::memory::{PairConfig, pair};
use pmd::{BURST, Pool, Port};
use quanta::Clock;
use sa_store::replay::{Replay, ReplayWindow};
use sa_store::sa::{Direction, Vrf};
use sa_store::store::Store;

const ELEMENTS: Throughput = Throughput::Elements(BURST as u64);

fn scenario(sas: u32) -> Scenario {
    Scenario {
        suite: "aes-128-gcm-16".parse().expect("a suite"),
        direction: Direction::In,
        sas,
        flows: sas,
        policies: sas,
        workers: 1,
        spread: Spread::Owner,
        mix: "64".parse().expect("a size"),
        frames: 1024,
    }
}

fn store(sas: u32) -> Store {
    let mut store = Store::new(1, sas);
    scenario(sas)
        .install(
            &mut store,
            Direction::In,
            &Fixed(RustCrypto),
            &Clock::new(),
            |_| true,
        )
        .expect("SAs");
    store
}

/// Visits `n` numbers in an order that no prefetcher foresees.
fn shuffled(n: u32) -> impl Iterator<Item = u32> {
    (0..n)
        .map(move |i| i.wrapping_mul(2_654_435_761) % n)
        .cycle()
}

fn sad(c: &mut Criterion) {
    let mut g = c.benchmark_group("sad");
    g.throughput(ELEMENTS);
    for sas in [1, 1000, 10_000] {
        let store = store(sas);
        let snapshot = store.current();
        let mut order = shuffled(sas);
        g.bench_function(BenchmarkId::new("look_up", sas), |b| {
            b.iter(|| {
                for sa in order.by_ref().take(BURST) {
                    black_box(snapshot.sad.hint(spi(sa).value()));
                }
            });
        });
    }
    g.finish();
}

fn replay(c: &mut Criterion) {
    let mut g = c.benchmark_group("replay");
    g.throughput(ELEMENTS);
    for size in [64, 1024, 65_536] {
        let window = ReplayWindow::new(size, true);
        let mut next = 0u64;
        g.bench_function(BenchmarkId::new("check_and_commit", size), |b| {
            b.iter(|| {
                for _ in 0..BURST {
                    next += 1;
                    let low = u32::try_from(next & 0xffff_ffff).expect("masked");
                    if let Replay::Fresh(seq) = window.check(low) {
                        black_box(window.commit(seq));
                    }
                }
            });
        });
    }
    g.finish();
}

fn route(c: &mut Criterion) {
    let mut g = c.benchmark_group("route");
    g.throughput(ELEMENTS);
    let store = store(1);
    let fib = &store.current().fib;
    for peers in [1, 10_000] {
        let mut order = shuffled(peers);
        g.bench_function(BenchmarkId::new("look_up", peers), |b| {
            b.iter(|| {
                for peer in order.by_ref().take(BURST) {
                    let mapped = u128::from(FIRST_PEER + peer) | 0xffff << 32;
                    black_box(fib.lookup(Vrf(0), mapped, peer));
                }
            });
        });
    }
    g.finish();
}

fn ring(c: &mut Criterion) {
    let mut g = c.benchmark_group("ring");
    g.throughput(ELEMENTS);
    let arena = arena_for(1, 256).expect("frames");
    let config = PairConfig {
        queues: 1,
        ring: 256,
        mtu: 1500,
    };
    let (near, far) = pair("near", "far", &config);
    let mut near = Box::new(near).queues(1, &arena).expect("a queue");
    let mut far = Box::new(far).queues(1, &arena).expect("a queue");
    let mut pool = Pool::new(&arena, 64);
    let mut frames = Vec::with_capacity(BURST);
    pool.get_bulk(&mut frames, BURST);
    g.bench_function("burst_there", |b| {
        b.iter(|| {
            near[0].tx_burst(&mut pool, &mut frames);
            far[0].rx_burst(&mut pool, &mut frames, BURST)
        });
    });
    pool.put_bulk(&mut frames);
    g.finish();
}

criterion_group!(benches, sad, replay, route, ring);
criterion_main!(benches);
