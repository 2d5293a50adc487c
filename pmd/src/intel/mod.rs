//! Drivers of Intel's Ethernet controllers.
//!
//! | driver | devices | queues | verified |
//! |---|---|---|---|
//! | [`e1000e`] | 82574, 82583; I217 to I219 as `experimental` | 2 | QEMU's 82574 |
//! | [`igb`] | 82576, 82580, i350, i210, i211 (copper) | up to 16 | QEMU's 82576 |
//! | [`ixgbe`] (`experimental`) | 82599, X540, X550 | up to 16 | register model |
//! | [`ixgbevf`] (`experimental`) | their virtual functions | up to 4 | register model |
//!
//! A family's module holds its registers and its initialization; `ring` the descriptors, `queue` the queue pair and `port`
//! opening, statistics, reset and shutdown of all of them. None of these devices can hash ESP by its SPI, nor by anything
//! but addresses: a worker hands over what is for another one's SA.
//!
//! Checksums: the UDP checksum of encapsulated ESP over IPv6 is left to the device ([`crate::checksum`]). A received frame's IPv4
//! header is verified by the pipeline: what the device says of it is not used (deploy/nics.md has the figures). Flow control is
//! off: a gateway drops rather than stop its peers.

pub mod e1000e;
pub mod fuzz;
mod gigabit;
pub mod igb;
pub mod ixgbe;
pub mod ixgbevf;
mod mailbox;
pub mod model;
mod model_vf;
mod port;
mod queue;
mod regs;
mod ring;
#[cfg(test)]
mod tests;
