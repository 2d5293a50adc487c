//! The CPU as an engine: software suites behind the same trait as hardware.

mod software;

pub use software::SoftwareEngine;
