//! Every crypto provider against the reference.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::crypto::fuzz_differential(data));
