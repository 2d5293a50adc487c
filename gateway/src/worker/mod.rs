//! Workers: pinned threads that own queues and SAs and run packets to completion.

mod core;
mod cover;
mod egress;
mod handover;
mod hold;
mod idle;
mod inbound;
mod inject;
mod lane;
mod moved;
mod offload;
mod outbound;
mod punt;
mod related;
mod reports;
mod setup;
mod stages;
mod thread;
mod wait;

pub use handover::{Handed, Handover, Task, Waker};
pub use idle::{Backoff, Idle, IdlePolicy};
pub(crate) use reports::RING as REPORTS;
pub use setup::{Mtus, PipelineConfig, PolicyHits, PortSetup, PuntLimits, Side, WorkerParts};
pub use stages::{Stage, StageTicks};
pub use thread::{Crew, Worker, gateway_now};
