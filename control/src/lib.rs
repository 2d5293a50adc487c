//! Control thread of the Esplanade gateway: loads SA files and publishes what they say, keeps sequence leases
//! ahead of the workers, turns sticky events into logs, and serves metrics and the API.
//!
//! ```text
//!   SA files ──watch──▶ desired ──▶ installer ──▶ snapshot ──▶ workers
//!                                      │ claims            │ sticky events, numbers used
//!                                      ▼                   ▼
//!                                 lease writer ◀──── keeper (every 10 ms while packets flow)
//!   HTTP /metrics /healthz /readyz ─┐
//!   unix socket API ────────────────┴─▶ one single-threaded runtime; nothing here is on a packet's way
//! ```
//!
//! What it needs of ports and workers it declares as [`plane::DataPlane`]; the gateway supplies it.

#![forbid(unsafe_code)]

pub mod api;
pub mod core;
pub mod desired;
mod engines;
pub mod events;
pub mod explain;
pub mod health;
pub mod http;
pub mod install;
pub mod keeper;
pub mod kernel;
pub mod metrics;
pub mod mirrored;
mod origins;
mod parts;
pub mod plane;
pub mod rekey;
mod reload;
pub mod run;
pub mod vici;
pub mod watch;
pub mod xfrm;

// What the tests beside this crate are made of serves those inside it.
#[cfg(test)]
extern crate self as control;
#[cfg(test)]
#[allow(dead_code, reason = "each test uses its part")]
#[path = "../tests/common/mod.rs"]
mod common;
