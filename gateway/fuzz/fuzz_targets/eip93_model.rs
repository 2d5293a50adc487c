//! The EIP-93's model against a hostile driver.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| esplanade_model::fuzz::fuzz_eip93(data));
