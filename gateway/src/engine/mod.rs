//! What ciphers: software suites behind the same trait as hardware, and the way from workers to both.

mod bank;
pub mod choice;
mod desk;
mod fit;
pub mod parallel;
mod park;
mod private;
mod software;
mod split;
pub mod trust;

pub use bank::{Bank, WAITING};
pub use desk::{Desk, DeskError};
pub use park::Park;
pub use software::SoftwareEngine;
pub use split::Split;
