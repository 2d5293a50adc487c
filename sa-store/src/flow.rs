//! What the gateway knows of a packet when it decides where it goes: the flow key.

mod key;

pub(crate) use key::{Class, halves, has_ports, is_icmp, scope_word};
pub use key::{FlowKey, L4};
