//! Speed of the Esplanade gateway: scenarios, comparison with peers, reports.
//!
//! Everything runs in one process without a NIC. The workers, stores, look-ups and crypto providers are those of
//! the gateway; see [`rig`] for what is timed and what is not.

#![forbid(unsafe_code)]

pub mod bar;
pub mod clock;
pub mod engines;
pub mod limit;
pub mod machine;
pub mod measure;
pub mod parallel;
pub mod peer;
pub mod policies;
pub mod ports;
pub mod report;
pub mod rig;
pub mod scenario;
pub mod soak;
pub mod stages;
pub mod together;
pub mod traffic;
