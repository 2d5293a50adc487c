//! Security Associations, policies, snapshots, SA files and sequence leases of the Esplanade gateway.
//!
//! This crate knows nothing of ports, frames or clocks: packets' addresses, numbers and the time are arguments.

#![deny(unsafe_code)]

pub mod chunked;
pub mod cipher;
pub mod counters;
pub mod drops;
pub mod fib;
pub mod file;
pub mod flow;
pub mod import;
pub mod lease;
pub mod ledger;
pub mod local;
pub mod plan;
pub mod pmtu;
pub mod policy;
pub mod prefetch;
pub mod quiesce;
pub mod replay;
pub mod report;
pub mod runtime;
pub mod sa;
pub mod sad;
pub mod sleeper;
pub mod snapshot;
pub mod spd;
pub mod store;
pub mod suite;
mod sync;
