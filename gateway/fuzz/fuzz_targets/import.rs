//! Ip xfrm, ipsec-secgw and setkey texts.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sa_store::import::fuzz_import(data));
