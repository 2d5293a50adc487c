//! The lease store as a damaged disk gives it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sa_store::lease::fuzz_store(data));
