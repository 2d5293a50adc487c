//! Workers: pinned threads that own queues and SAs and run packets to completion.

mod core;
mod cover;
mod egress;
mod handover;
mod idle;
mod inbound;
mod lane;
mod offload;
mod outbound;
mod reports;
mod setup;
mod stages;
mod thread;

pub use handover::{Handed, Handover, Task, Waker};
pub use idle::{Backoff, Idle, IdlePolicy};
pub(crate) use reports::RING as REPORTS;
pub use setup::{Locals, PipelineConfig, PolicyHits, PortSetup, Side, WorkerParts};
pub use stages::{Stage, StageTicks};
pub use thread::{Crew, Worker, gateway_now};
