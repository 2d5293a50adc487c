//! The EIP-93's driver against a hostile device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::eip93::fuzz::fuzz_device(data));
