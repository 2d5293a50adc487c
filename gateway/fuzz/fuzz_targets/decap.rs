//! Decapsulation of arbitrary bytes, and encapsulation followed by decapsulation.
#![no_main]

#[path = "../common.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| common::with_pool(
    |pool| gateway::esp::fuzz::fuzz_decap(data, pool)
));
