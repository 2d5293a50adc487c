//! Reassembly of arbitrary fragments.
#![no_main]

#[path = "../common.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| common::with_pool(|pool| {
    gateway::esp::reassembly::fuzz_reassembly(data, pool)
}));
