//! The kernel's IPsec tables, as an IKE daemon fills them, mirrored into the store.
//!
//! ```text
//!   charon ─▶ kernel ─▶ follower ─▶ table ─▶ seize ─▶ picture ─▶ Control::mirror_parts
//!      ▲         ▲                                                     │
//!      └─ expire ┴── counters, replay state, limits, acquires ◀────────┘
//! ```
//!
//! The daemon is not changed and knows nothing of the gateway: it installs SAs and policies by XFRM netlink, hears of limits by
//! XFRM expiries, of packets that want an SA by acquires, and reads counters from the kernel's SAs. Only one of the two may send
//! with a key: see [`seize`].

mod acquire;
mod audit;
mod held;
mod message;
mod mirror;
mod picture;
#[cfg(test)]
mod scale;
mod seize;
mod settings;
mod socket;
mod table;
#[cfg(test)]
mod tests;
mod translate;
#[cfg(test)]
mod whole;

pub use mirror::{Mirror, MirrorReport};
pub use settings::{Settings, Take};
