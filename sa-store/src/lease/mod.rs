//! Durable sequence leases: what keeps a number from being used twice under one key across crashes and
//! power cuts, and keeps a replay from being accepted after them.
//!
//! **Outbound.** A block of sequence numbers is on disk before its first number is used. After a crash
//! sending resumes at the end of the block, so at most a block of numbers is skipped; none is repeated.
//!
//! **Inbound.** An *edge* is on disk, ahead of the highest number accepted. After a crash everything up to
//! the edge counts as seen, so no number below it is accepted again, and what the peer sends next is lost
//! until it passes the edge: at most a block, which [`policy::Blocks::INBOUND`] keeps to some seconds of
//! traffic. As the peer goes on sending while the gateway restarts, little of that remains. The edge is a
//! 64-bit number, so ESN needs no guess.
//!
//! Authentic numbers above the edge, which a jump of the peer or a sudden burst on an SA that was slow brings,
//! are refused until a higher edge is on disk (`window_edge` among the drop reasons), so no replay is ever
//! possible. A new SA starts with an edge far ahead, and the edge of an SA that turns out slow comes back step
//! by step: nothing above it may be accepted any more *before* the lower edge is written.
//!
//! A clean stop writes the exact numbers: nothing is skipped or lost.
//!
//! # What the store relies on
//! * A synced write is durable, and a write torn by a power cut damages nothing but the 4 KiB blocks that
//!   were being written. State is kept in 4 KiB pages of two copies each; a commit writes the older copy.
//! * Nobody copies the store, restores an old one or rolls back the machine that holds it: like every
//!   counter on a disk it would count again from there. That is the operator's duty.
//!
//! Records are found by a keyed hash of the key material, not by SPI or name: renaming an SA or giving it
//! another SPI, ICV length or ESN setting does not start its numbers anew. A key without a record is
//! refused unless the operator says `first_use`.
//!
//! # Keys that never come back
//! An IKE daemon negotiates a key once. Its record stays for a day after its SA is gone; then it goes into a filter of bounded size
//! ([`LeaseStore::sweep`]) that never takes one of its keys for a new one. So the store does not grow with the number of
//! rekeys, and a key that comes again all the same (an operator who adds the SA by hand) is refused.

mod error;
mod media;
mod page;
pub mod policy;
mod records;
mod retired;
mod serve;
mod stage;
mod store;
mod sweep;
mod writer;

pub use error::LeaseError;
pub use media::{DiskMedia, Media};
pub use store::{KeyId, LeaseHandle, LeaseStore, Resume, Update};
pub use writer::{Lease, LeaseWriter, OnFailure, Release};

/// Entry for fuzzers: any bytes as a store's file. Opening, claiming and committing must not panic.
pub fn fuzz_store(data: &[u8]) {
    store::fuzz(data);
}

#[cfg(test)]
mod powercut;
#[cfg(test)]
mod tests;
