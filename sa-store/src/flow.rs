//! What the gateway knows of a packet when it decides where it goes, and what it remembers of flows.

mod cache;
mod key;

pub use cache::{FlowCache, FlowCacheStats};
pub(crate) use key::{Class, halves, has_ports, is_icmp, scope_word};
pub use key::{FlowKey, L4};
