//! Packet memory, ports and the engine interface of the Esplanade gateway.
//!
//! The layers, bottom up: an [`arena::Arena`] is one mapping cut into equal frames; a [`frame::Frame`] is the only handle of
//! one of them; a [`pool::Pool`] is a worker's private stock; a [`port::PortQueue`] moves frames in bursts. A frame has one
//! owner at a time (a pool, a worker, a ring, a device), so nothing here ever copies or locks per packet.

pub mod af_xdp;
pub mod airoha;
pub mod arena;
pub mod capture;
pub mod capture_file;
pub mod checksum;
pub mod device;
pub mod eip93;
pub mod engine;
pub mod fault;
pub mod frame;
pub mod intel;
pub mod memory;
mod netif;
mod netlink;
pub mod nic;
pub mod pcap;
pub mod pool;
pub mod port;
pub mod qdma;
pub mod quiesce;
pub mod soe;
pub mod supervisor;
pub mod tap;
pub mod virtio;
pub mod vmxnet3;

pub use arena::{Arena, ArenaConfig, ArenaError, HugePolicy};
pub use frame::{Frame, RawFrame};
pub use pool::{Pool, PoolStats};
pub use port::{BURST, Port, PortError, PortInfo, PortQueue, PortQueueStats};
