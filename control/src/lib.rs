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
pub mod metrics;
pub mod plane;
pub mod run;
pub mod watch;
