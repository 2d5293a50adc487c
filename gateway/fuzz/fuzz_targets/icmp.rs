//! Readers of ICMP errors.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::esp::icmp::fuzz_icmp(data));
