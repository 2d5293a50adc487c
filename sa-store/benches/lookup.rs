//! Look-ups that every packet needs, per packet: policy (flow cached or not, while policies change or
//! not), selectors of an SA, routes; and what a change of policies costs.
//!
//! `cargo bench -p sa-store --bench lookup`

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sa_store::flow::{FlowCache, FlowKey, L4};
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::sa::{Direction, IfId, Vrf};
use sa_store::spd::{Edit, SelectorSet, Spd, TunnelIdx, Verdict};

const BURST: usize = 64;

fn tunnel(_: &str) -> Option<TunnelIdx> {
    Some(TunnelIdx(1))
}

fn prefix(a: u32, len: u8) -> AddrRange {
    AddrRange::prefix(IpAddr::V4(Ipv4Addr::from(a)), len).expect("prefix")
}

/// `n` policies for distinct /24 destinations in 10/8 and beyond, a third each for any protocol, for TCP
/// to port 443, and for a source /16; behind them a bypass for everything else.
fn policies(n: u32) -> Vec<Policy> {
    let mut list: Vec<Policy> = (0..n)
        .map(|i| Policy {
            name: format!("p{i}"),
            direction: Direction::Out,
            priority: 100 + i % 7,
            selectors: vec![Selector {
                src: if i % 3 == 2 {
                    prefix(0xc0a8_0000, 16)
                } else {
                    prefix(0, 0)
                },
                dst: prefix(dst_net(i), 24),
                proto: (i % 3 == 1).then_some(6),
                ports: if i % 3 == 1 {
                    Ports::Range {
                        src: 0..=u16::MAX,
                        dst: 443..=443,
                    }
                } else {
                    Ports::Any
                },
            }],
            action: Action::Protect {
                tunnel: format!("t{}", i % 1000),
            },
            vrf: Vrf(0),
            if_id: IfId(0),
        })
        .collect();
    list.push(Policy {
        name: "rest".into(),
        direction: Direction::Out,
        priority: 1000,
        selectors: vec![Selector {
            src: prefix(0, 0),
            dst: prefix(0, 0),
            proto: None,
            ports: Ports::Any,
        }],
        action: Action::Bypass,
        vrf: Vrf(0),
        if_id: IfId(0),
    });
    list
}

fn dst_net(i: u32) -> u32 {
    0x0a00_0000 + (i << 8)
}

/// Flows spread over the policies, in an order that no prefetcher foresees.
fn flows(n: u32, policies: u32) -> Vec<FlowKey> {
    (0..n)
        .map(|i| {
            let i = i.wrapping_mul(2_654_435_761) % n;
            let l4 = L4::Ports {
                src: u16::try_from(1024 + i / 7 % 60_000).expect("port"),
                dst: 443,
            };
            let host = i % 251;
            let dst = dst_net(i % policies.max(1)) + host;
            FlowKey::v4((0xc0a8_0000 + i % 65_536).into(), dst.into(), 6, l4)
        })
        .collect()
}

fn resolve(cache: &mut FlowCache<Verdict>, spd: &Spd, keys: &[FlowKey], out: &mut [Verdict]) {
    for keys in keys.chunks(BURST) {
        cache.resolve(
            keys,
            |k| spd.generation(k),
            |_, k| spd.lookup(k),
            |_, _| (),
            out,
        );
        black_box(&out);
    }
}

fn cached(c: &mut Criterion) {
    let mut g = c.benchmark_group("policy_cached");
    for (n_flows, sizes) in [(10_000, &[1, 1000, 100_000][..]), (100_000, &[100_000][..])] {
        for &n in sizes {
            let spd = Spd::build(Direction::Out, &policies(n), tunnel).expect("policies");
            let keys = flows(n_flows, n);
            let mut cache = FlowCache::with_seed(4 * keys.len(), 1);
            let mut out = [Verdict::DEFAULT; BURST];
            g.throughput(Throughput::Elements(keys.len() as u64));
            g.bench_function(
                BenchmarkId::new(format!("{n_flows}_flows"), format!("{n}_policies")),
                |b| b.iter(|| resolve(&mut cache, &spd, &keys, &mut out)),
            );
        }
    }
    g.finish();
}

/// The worker's view while another thread publishes a changed table every 10 ms.
fn changing(c: &mut Criterion) {
    let mut g = c.benchmark_group("policy_cached_while_changing");
    for n in [1, 100_000] {
        let mut list = policies(n);
        let first = Spd::build(Direction::Out, &list, tunnel).expect("policies");
        let shared = Arc::new(ArcSwap::from_pointee(first));
        let stop = Arc::new(AtomicBool::new(false));
        let writer = std::thread::spawn({
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            move || {
                let mut spare = policies(n + 1);
                let extra = spare.swap_remove(n as usize - 1);
                let at = list.len() - 1;
                while !stop.load(Relaxed) {
                    if list.len() > at + 1 {
                        list.remove(at);
                    } else {
                        let mut p = extra.clone();
                        p.name = "extra".into();
                        list.insert(at, p);
                    }
                    let next = shared.load().updated(&list, tunnel).expect("policies").0;
                    // The writer frees the old table, as control does.
                    let old = shared.swap(Arc::new(next));
                    std::thread::sleep(Duration::from_millis(10));
                    drop(old);
                }
            }
        });
        let keys = flows(10_000, n);
        let mut cache = FlowCache::with_seed(4 * keys.len(), 1);
        let mut out = [Verdict::DEFAULT; BURST];
        let mut reader = Cache::new(&*shared);
        g.throughput(Throughput::Elements(keys.len() as u64));
        g.bench_function(
            BenchmarkId::new("10000_flows", format!("{n}_policies")),
            |b| {
                b.iter(|| {
                    for keys in keys.chunks(BURST) {
                        let spd = reader.load();
                        cache.resolve(
                            keys,
                            |k| spd.generation(k),
                            |_, k| spd.lookup(k),
                            |_, _| (),
                            &mut out,
                        );
                        black_box(&out);
                    }
                });
            },
        );
        stop.store(true, Relaxed);
        writer.join().expect("writer");
    }
    g.finish();
}

fn missed(c: &mut Criterion) {
    let mut g = c.benchmark_group("policy_uncached");
    for n in [1, 1000, 100_000] {
        let spd = Spd::build(Direction::Out, &policies(n), tunnel).expect("policies");
        let keys = flows(10_000, n);
        let mut out = [Verdict::DEFAULT; BURST];
        g.throughput(Throughput::Elements(keys.len() as u64));
        g.bench_function(
            BenchmarkId::new("10000_flows", format!("{n}_policies")),
            |b| {
                b.iter(|| {
                    for keys in keys.chunks(BURST) {
                        spd.lookup_batch(keys, &mut out);
                        black_box(&out);
                    }
                });
            },
        );
    }
    g.finish();
}

fn updates(c: &mut Criterion) {
    let mut g = c.benchmark_group("policy_update");
    g.sample_size(10);
    for n in [1000, 100_000] {
        let list = policies(n);
        g.bench_function(BenchmarkId::new("build", n), |b| {
            b.iter(|| Spd::build(Direction::Out, &list, tunnel).expect("policies"));
        });
        let spd = Spd::build(Direction::Out, &list, tunnel).expect("policies");
        let mut fewer = list.clone();
        fewer.remove(n as usize / 2);
        g.bench_function(BenchmarkId::new("remove_one", n), |b| {
            b.iter(|| spd.updated(&fewer, tunnel).expect("policies"));
        });
        let removed = spd.updated(&fewer, tunnel).expect("policies").0;
        g.bench_function(BenchmarkId::new("insert_one", n), |b| {
            b.iter(|| removed.updated(&list, tunnel).expect("policies"));
        });
        let (name, policy) = (list[0].name.clone(), list[0].clone());
        g.bench_function(BenchmarkId::new("edit_one", n), |b| {
            let mut spd = spd.clone();
            b.iter(|| {
                let edits = [Edit::Remove(name.clone()), Edit::Put(policy.clone())];
                spd = spd.edited(&edits, tunnel).expect("policies").0;
            });
        });
    }
    g.finish();
}

fn selectors(c: &mut Criterion) {
    let mut g = c.benchmark_group("sa_selectors");
    let keys = flows(1024, 1);
    g.throughput(Throughput::Elements(keys.len() as u64));
    for n in [1, 100] {
        let list: Vec<Selector> = policies(n)
            .into_iter()
            .take(n as usize)
            .flat_map(|p| p.selectors)
            .collect();
        let set = SelectorSet::new(&list);
        g.bench_function(BenchmarkId::from_parameter(n), |b| {
            b.iter(|| keys.iter().filter(|k| set.matches(black_box(k))).count());
        });
    }
    g.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = cached, changing, missed, updates, selectors
}
criterion_main!(benches);
