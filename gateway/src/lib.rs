//! Data path, workers and command line of the Esplanade gateway.

#![forbid(unsafe_code)]

pub mod crypto;
pub mod esp;
pub mod wire;
