//! Data path, workers and command line of the Esplanade gateway.

#![forbid(unsafe_code)]

pub mod app;
pub mod cli;
pub mod config;
pub mod crypto;
pub mod demo;
pub mod devices;
pub mod engine;
pub mod esp;
pub mod wire;
pub mod worker;
