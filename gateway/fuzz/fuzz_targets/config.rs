//! Gateway.toml.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::config::fuzz_config(data));
