#!/usr/bin/env bash
# Runs every fuzz target for some seconds: `fuzz.sh 5`. Needs a nightly compiler; no other tool.
set -euo pipefail
cd "$(dirname "$0")/../../gateway/fuzz"
seconds=${1:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
# What cargo-fuzz passes, without it: coverage instrumentation for libFuzzer and the address sanitizer.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Cdebug-assertions"
cargo +nightly build --release --locked --target "$host" --bins
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in fuzz_targets/*.rs; do
    name=$(basename "$target" .rs)
    mkdir -p "$work/$name"
    echo "fuzzing $name for ${seconds}s"
    "target/$host/release/$name" -max_total_time="$seconds" -max_len=4096 -print_final_stats=0 -verbosity=0 \
        -artifact_prefix="$work/" "$work/$name"
done
