//! Requests on the API socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| control::api::fuzz_request(data));
