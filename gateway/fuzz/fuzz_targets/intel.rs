//! The Intel drivers against a hostile device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::intel::fuzz::fuzz_device(data));
