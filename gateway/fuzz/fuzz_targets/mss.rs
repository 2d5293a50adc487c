//! TCP MSS clamping.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::esp::mss::fuzz_mss(data));
