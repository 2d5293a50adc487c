//! PCI and platform devices that this process owns: registers, DMA memory, interrupts.
//!
//! A driver sees a [`Device`], however it is reached (VFIO with or without an IOMMU, a vfio-user socket, a register model in a
//! test). The rules, stated once:
//!
//! - **Device-owned memory is never behind a Rust reference.** Registers are [`Mmio`], rings and records [`DmaMem`]: both are
//!   accessed by volatile or atomic operations of 1 to 8 bytes, little-endian, every offset checked.
//! - **What a device wrote is input.** Every length, index and status is checked by the driver; [`ring::FrameRing`] refuses a
//!   slot that holds no frame.
//! - **Memory outlives the device's access to it.** The device keeps what it was given (arenas, DMA memory) until it has been
//!   quiesced: bus-master off, then unmapped, then freed.
//! - **A driver is trusted with what it writes into descriptors and registers**: an IOMMU confines the device to the arena and
//!   its own DMA memory, but within these the driver decides.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::arena::Arena;

mod barrier;
pub(crate) mod cache;
mod dma;
mod heap;
mod interrupt;
pub mod iova;
mod map;
mod memory;
mod mmio;
pub mod model;
pub mod pci;
mod region;
pub mod ring;
pub mod vfio;
pub mod vfio_user;

pub use barrier::{fence_acquire, fence_full, fence_release};
pub use dma::{DmaBlock, DmaMem};
pub use map::ArenaMap;
pub use mmio::{Mmio, RegisterSpace};
pub use pci::PciInfo;

/// Where a device can reach memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IovaClass {
    /// Any address.
    #[default]
    Any,
    /// Below 4 GiB, for engines with 32-bit address registers.
    Below4G,
}

/// A PCI(e) or platform device that this process owns, however it is reached.
///
/// Dropping the last handle quiesces it: interrupts off, bus-master off, reset where the device has one, then its memory is
/// unmapped.
pub trait Device: Send + Sync {
    /// For people and logs: `0000:01:00.0`.
    fn name(&self) -> &str;

    /// Identity and capabilities; `None` for platform devices.
    fn pci(&self) -> Option<&PciInfo>;

    /// Reads 1, 2 or 4 bytes of configuration space, naturally aligned.
    ///
    /// # Errors
    /// [`DeviceError::ConfigAccess`] when the access is outside the space, of another size or not aligned; what the system
    /// answers.
    fn config_read(&self, offset: usize, size: usize) -> Result<u32, DeviceError>;

    /// Writes 1, 2 or 4 bytes of configuration space, naturally aligned.
    ///
    /// # Errors
    /// As [`Device::config_read`].
    fn config_write(&self, offset: usize, size: usize, value: u32) -> Result<(), DeviceError>;

    /// The registers of BAR `index` or of the platform device's region `index`.
    ///
    /// # Errors
    /// [`DeviceError::NoRegion`] when the device has none; what the system answers.
    fn region(&self, index: u32) -> Result<Mmio, DeviceError>;

    /// Zeroed memory of at least `len` bytes at one contiguous range of addresses for the device, both its address here and
    /// there multiples of `align` (a power of two, at most 2 MiB). Wiped when the last handle is dropped.
    ///
    /// # Errors
    /// [`DeviceError::DmaRequest`] for sizes that cannot be, [`DeviceError::NoIova`], [`DeviceError::NoMemory`].
    fn dma_alloc(&self, len: usize, align: usize, class: IovaClass) -> Result<DmaMem, DeviceError>;

    /// Lets the device reach the frames of `arena`, in [`IovaClass::Any`]. The second call for the same arena gives the same
    /// map.
    ///
    /// # Errors
    /// [`DeviceError::NoIova`], [`DeviceError::FrameAcrossPages`], what the system answers.
    fn map_arena(&self, arena: &Arc<Arena>) -> Result<ArenaMap, DeviceError> {
        self.map_arena_in(arena, IovaClass::Any)
    }

    /// As [`Device::map_arena`], at addresses of `class`.
    ///
    /// # Errors
    /// As [`Device::map_arena`].
    fn map_arena_in(&self, arena: &Arc<Arena>, class: IovaClass) -> Result<ArenaMap, DeviceError>;

    /// Connects `vectors` interrupts to eventfds (non-blocking): MSI-X, or MSI, or, for a single one, INTx.
    /// Replaces what was connected before; 0 switches interrupts off. They go off by themselves when the device is quiesced.
    ///
    /// # Errors
    /// [`DeviceError::Interrupts`] when the device has fewer; what the system answers.
    fn enable_msix(&self, vectors: usize) -> Result<Vec<OwnedFd>, DeviceError>;

    /// How many interrupts [`Device::enable_msix`] can connect; 0 when the device must be polled.
    fn interrupts(&self) -> usize;

    /// Lets the next interrupt through. Only level-triggered ones (INTx, platform) need it, after each; others ignore it.
    ///
    /// # Errors
    /// What the system answers.
    fn unmask_interrupt(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Lets the device start transfers of its own, or stops all of them.
    ///
    /// # Errors
    /// As [`Device::config_write`].
    fn set_bus_master(&self, on: bool) -> Result<(), DeviceError>;

    /// Puts the device into its initial state. Interrupts are off and bus-master is off afterwards.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] when the device cannot be reset; what the system answers.
    fn reset(&self) -> Result<(), DeviceError>;

    /// True once after the system asked to have the device back: its driver is being unbound or it is being removed. The
    /// system waits until the device is dropped.
    fn removal_requested(&self) -> bool {
        false
    }

    /// Whether the device sees the CPU's caches. Where it does not, its driver maintains them around transfers of frames, and
    /// [`Device::dma_alloc`] gives memory that is not cached, or refuses.
    fn is_coherent(&self) -> bool {
        true
    }

    /// Whether an IOMMU stands between the device and memory, so that it must use the addresses given here.
    fn behind_iommu(&self) -> bool {
        true
    }

    /// The NUMA node that the device is attached to, where the system knows.
    fn numa_node(&self) -> Option<u32> {
        None
    }
}

/// Why something about a device failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A window outside of its region: a fault of the driver, or a capability that points nowhere.
    #[error("{len} bytes at {offset:#x} are not inside {size:#x}")]
    Window {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Bytes that there are.
        size: usize,
    },
    /// Configuration space is accessed in aligned units of 1, 2 or 4 bytes, inside the space only.
    #[error("configuration access of {size} bytes at {offset:#x}")]
    ConfigAccess {
        /// First byte.
        offset: usize,
        /// Bytes.
        size: usize,
    },
    /// The device has no such BAR or region, or it is not memory.
    #[error("no register region {index}")]
    NoRegion {
        /// Index asked for.
        index: u32,
    },
    /// The device's list of capabilities breaks the rules of the PCI specification.
    #[error("PCI capability at {offset:#x}: {reason}")]
    Capability {
        /// Place in configuration space.
        offset: usize,
        /// Rule broken.
        reason: &'static str,
    },
    /// A size of 0, an alignment that is not a power of two, or more than can be contiguous for the device.
    #[error("DMA memory of {len} bytes aligned to {align}: {reason}")]
    DmaRequest {
        /// Bytes.
        len: usize,
        /// Alignment.
        align: usize,
        /// Rule broken.
        reason: &'static str,
    },
    /// All addresses of the class that the device can use are taken or reserved.
    #[error("no device address range of {len:#x} bytes is free ({class:?})")]
    NoIova {
        /// Bytes.
        len: u64,
        /// Class asked for.
        class: IovaClass,
    },
    /// The system has no memory of the kind needed.
    #[error("no memory for {len} bytes: {source}")]
    NoMemory {
        /// Bytes.
        len: usize,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Without an IOMMU a frame must lie in one page: choose a frame size that divides the page size, and huge pages.
    #[error(
        "frames of {stride} bytes cross pages of {page} bytes that are not adjacent for the device"
    )]
    FrameAcrossPages {
        /// Frame size.
        stride: u32,
        /// Page size.
        page: usize,
    },
    /// Memory whose pages the kernel may move is of no use to a device without IOMMU.
    #[error("without an IOMMU, memory of devices must be in reserved huge pages")]
    NeedsHugePages,
    /// More interrupts than the device has.
    #[error("{asked} interrupts asked for, the device has {most}")]
    Interrupts {
        /// Asked for.
        asked: usize,
        /// Most that there are.
        most: usize,
    },
    /// The device, or the way it is reached, cannot do this.
    #[error("{0} is not supported by this device")]
    Unsupported(&'static str),
    /// The device does not answer (all ones): removed, or its link is down.
    #[error("the device is gone")]
    Gone,
    /// What the device reports or answers is not what its specification allows.
    #[error("the device breaks its specification: {0}")]
    Broken(String),
    /// The device did not do what it was told in the time that its specification gives it.
    #[error("timed out: {0}")]
    Timeout(&'static str),
    /// The system refused a step.
    #[error("{step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl DeviceError {
    /// `map_err` helper: what the system answered to `step`.
    pub(crate) fn system(step: &'static str) -> impl FnOnce(std::io::Error) -> DeviceError {
        move |source| DeviceError::System { step, source }
    }
}

impl fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.name()).finish()
    }
}

/// Checks a configuration access: size 1, 2 or 4, aligned, inside `space` bytes.
pub(crate) fn check_config(offset: usize, size: usize, space: usize) -> Result<(), DeviceError> {
    let fits = offset.checked_add(size).is_some_and(|end| end <= space);
    if !matches!(size, 1 | 2 | 4) || !offset.is_multiple_of(size) || !fits {
        return Err(DeviceError::ConfigAccess { offset, size });
    }
    Ok(())
}
