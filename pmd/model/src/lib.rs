//! Models of packet engines as vfio-user servers, so that their drivers can be tried and tested without the hardware.
//!
//! A model is written from the engine's reference alone: it has its own register constants and its own way to cipher, so that
//! a driver and its model cannot share a mistake. It refuses what silicon refuses, and writes the rule that a driver broke to
//! its [`Log`]. Where the reference says that something is not known, the model's reading is a switch.
//!
//! The parts: a [`Model`] has registers and a turn of work; a [`Bus`] is what it sees of the driver's memory; a [`Server`]
//! speaks the vfio-user protocol with one driver at a time; [`Knobs`] make a model slow, or make it misbehave.

#![deny(unsafe_code)]

mod bus;
pub mod eip93;
pub mod fuzz;
mod knobs;
mod log;
mod protocol;
mod server;
pub mod soe;
mod sys;

use std::os::fd::BorrowedFd;
use std::time::Instant;

pub use bus::{Bus, DmaFault};
pub use knobs::{KnobArgs, Knobs, Mischief};
pub use log::{Broken, Log};
pub use server::{Running, Server};

/// The registers and the work of a device. All calls come from one thread.
pub trait Model: Send {
    /// For logs.
    fn name(&self) -> &'static str;

    /// Bytes of each register region, in the order of their indexes. Every access is a call.
    fn regions(&self) -> Vec<u64>;

    /// Number of interrupts; [`Bus::interrupt`] raises them.
    fn interrupts(&self) -> u32 {
        1
    }

    /// Reads `size` bytes (1, 2, 4 or 8; `offset` is a multiple of it and inside the region) of a region.
    fn read(&mut self, bus: &mut Bus, region: usize, offset: usize, size: usize) -> u64;

    /// Writes, likewise.
    fn write(&mut self, bus: &mut Bus, region: usize, offset: usize, size: usize, value: u64);

    /// Does one small piece of work (a packet, say): registers are served in between.
    fn turn(&mut self, bus: &mut Bus) -> Turn;

    /// What else wakes the model, beside its time and its registers: each that is readable gives it a [`Model::turn`].
    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Back to the state after power-on: the driver asked for it, or it has gone.
    fn reset(&mut self);
}

/// When a model wants its next [`Model::turn`]. A register access always gives it one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// At once.
    Busy,
    /// Not before this time.
    At(Instant),
    /// After the next register access.
    Idle,
}
