//! Assembly of a gateway: from a configuration to running workers and control.

mod assembly;
mod blocks;
mod engines;
mod kernel;
mod open;
mod plane;
mod privileges;
mod service;

pub use assembly::{Assembled, AssemblyConfig, AssemblyError, OpenPort, assemble};
pub use engines::{EngineOpenError, OpenEngines};
pub(crate) use open::routes;
pub use open::{OpenError, Opened, PortView, open};
pub use plane::{Plane, PlaneParts};
pub use privileges::PrivilegeError;
pub use service::{Offline, Service, ServiceError, crypto};
