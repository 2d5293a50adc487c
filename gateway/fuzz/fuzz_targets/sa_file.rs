//! SA files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sa_store::file::fuzz_parse(data));
