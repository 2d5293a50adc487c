//! The model of SOE and QDMA against a hostile driver.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| esplanade_model::fuzz::fuzz_soe(data));
