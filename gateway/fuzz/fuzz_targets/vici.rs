//! What an IKE daemon tells of the names of its tunnels.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| control::vici::fuzz_stream(data));
