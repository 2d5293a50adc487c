//! Every header view and the data path's parser.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::wire::fuzz::fuzz_parse(data));
