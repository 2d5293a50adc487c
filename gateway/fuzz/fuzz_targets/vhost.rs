//! Messages of a hostile vhost-user peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pmd::virtio::vhost::fuzz::fuzz_messages(data));
