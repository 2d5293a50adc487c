//! The names that tunnels have in strongSwan's configuration, asked of the daemon by VICI.
//!
//! ```text
//!   charon ─▶ client (a thread) ─▶ names ◀─ metrics, `sa list`
//!   kernel ─▶ xfrm ─▶ snapshot ─────▲
//! ```
//!
//! A name is a label and nothing else: no packet and no SA depends on it, and what the daemon says is read by a thread of its own
//! that has no part in anything but names. A daemon that hangs, floods or lies costs names. SAs are told apart as the kernel
//! does, by destination and SPI, so a name shows up once both the kernel and the daemon have told of the SA, in either order.
//!
//! The client is our own: the published ones are under the LGPL, or allocate whatever length a packet announces.

mod client;
mod names;
mod sas;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use client::Running;
pub use client::Settings;
pub use names::{Label, NamesReport};
pub(crate) use names::{Names, Runs};

/// Names that the client writes and reports read. Who has control's lock, too, took it first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<Mutex<Names>>);

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entry for fuzzers: a stream of a daemon's.
#[doc(hidden)]
pub fn fuzz_stream(data: &[u8]) {
    let mut framer = wire::Framer::default();
    let mut names = Names::default();
    let now = std::time::Instant::now();
    // Where it is cut must not matter.
    for part in data.chunks(1 + data.len() / 3) {
        framer.push(part);
        while let Ok(Some(packet)) = framer.next() {
            let wire::Packet::Event { message, .. } = packet else {
                continue;
            };
            for child in sas::children(message).unwrap_or_default() {
                names.learn(&child, now);
                for (dst, spi) in child.sas.into_iter().flatten() {
                    let label = names.of_sa(dst, spi).expect("it was learnt");
                    let text = format!("{}{}", label.ike, label.child);
                    assert!(!text.contains(char::is_control), "{text:?}");
                }
            }
        }
    }
    // Any message, without the packet around it.
    if let Ok(children) = sas::children(data) {
        assert!(children.len() <= data.len());
    }
}
