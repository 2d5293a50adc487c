//! The virtio-net driver against a hostile device, split and packed rings.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::virtio::net::fuzz::fuzz_device(data));
