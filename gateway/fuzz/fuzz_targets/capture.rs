//! Capture files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| drop(pmd::capture_file::CaptureFile::parse(data.to_vec())));
