//! Nanoseconds per batch of 32 packets: provider × suite × packet size × number of SAs, sealing and opening.
//!
//! Contexts are prefetched as workers do it, packets stay in the cache: this is the crypto-only limit of the data
//! path. `cargo bench -p gateway --bench crypto -- aes-128-gcm-16/ipsec-mb` runs a part.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gateway::crypto::measure::{BATCH, Rig};
use gateway::crypto::select::available;

const SUITES: [&str; 9] = [
    "aes-128-gcm-16",
    "aes-256-gcm-16",
    "aes-128-gcm-8",
    "aes-128-gmac",
    "chacha20-poly1305",
    "aes-128-cbc+hmac-sha1-96",
    "aes-256-cbc+hmac-sha2-256-128",
    "aes-128-ctr+hmac-sha2-512-256",
    "null+hmac-sha2-256-128",
];

fn providers_by_suite(c: &mut Criterion) {
    for suite in SUITES.map(|s| s.parse().expect("a suite")) {
        for provider in available() {
            let mut group = c.benchmark_group(format!("{suite}/{}", provider.id()));
            group.throughput(Throughput::Elements(BATCH as u64));
            for sas in [1, 1_000, 10_000] {
                for body in [64, 512, 1420] {
                    if Rig::new(&*provider, suite, 1, body).is_err() {
                        continue;
                    }
                    // Made only when the filter lets a benchmark run.
                    let mut rig: Option<Rig> = None;
                    let make = || Rig::new(&*provider, suite, sas, body).expect("offered");
                    for opening in [false, true] {
                        let what = if opening { "open" } else { "seal" };
                        let id = BenchmarkId::new(what, format!("{body}B/{sas}SA"));
                        group.bench_function(id, |b| {
                            let rig = rig.get_or_insert_with(make);
                            b.iter_custom(|n| total(rig, n, opening));
                        });
                    }
                }
            }
            group.finish();
        }
    }
}

fn total(rig: &mut Rig, rounds: u64, opening: bool) -> Duration {
    (0..rounds)
        .map(|_| {
            let (sealed, opened) = rig.round_trip().expect("every packet opens");
            if opening { opened } else { sealed }
        })
        .sum()
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(20);
    targets = providers_by_suite
}
criterion_main!(benches);
