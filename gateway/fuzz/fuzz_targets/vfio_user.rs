//! Replies of a hostile vfio-user server.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::device::vfio_user::fuzz::fuzz_server(data));
