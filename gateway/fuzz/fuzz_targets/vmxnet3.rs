//! The vmxnet3 driver against a hostile device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::vmxnet3::fuzz::fuzz_device(data));
