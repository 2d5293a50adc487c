//! Data path, workers and command line of the Esplanade gateway.

#![forbid(unsafe_code)]

pub mod config;
pub mod crypto;
pub mod esp;
pub mod wire;
