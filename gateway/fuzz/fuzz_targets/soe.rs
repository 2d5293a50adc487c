//! The drivers of SOE and QDMA against a hostile device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::soe::fuzz::fuzz_device(data));
