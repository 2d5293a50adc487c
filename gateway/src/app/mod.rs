//! Assembly of a gateway: from a configuration to running workers.

mod assembly;

pub use assembly::{Assembled, AssemblyConfig, AssemblyError, OpenPort, assemble};
