//! Assembly of a gateway: from a configuration to running workers.

mod assembly;
mod open;

pub use assembly::{Assembled, AssemblyConfig, AssemblyError, OpenPort, assemble};
pub use open::{OpenError, Opened, PortView, open};
