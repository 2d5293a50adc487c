//! PCI and platform devices through VFIO.
//!
//! Container, group, device and DMA maps are those of the crate vfio-ioctls; [`sys`] adds what it lacks, with every error
//! returned. One container per device: each has an address space of its own, so no device can reach what another one was
//! given.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfio_ioctls::{VfioContainer, VfioDevice as GroupDevice, VfioOps};

use super::heap::DmaSpace;
use super::memory::Pages;
use super::{ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio, PciInfo};
use crate::arena::Arena;
use crate::supervisor;

#[cfg(test)]
mod bed;
mod fd;
mod iommu;
mod noiommu;
mod sys;

use fd::DeviceFile;
pub use fd::stop_orphan;

/// Whether a device may be used without an IOMMU between it and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protection {
    /// Only with an IOMMU.
    #[default]
    Iommu,
    /// Without, where the system has none for this device: the device can write anywhere. Explicit choice of the operator.
    NoIommu,
}

/// A device bound to vfio-pci or vfio-platform.
pub struct VfioDevice {
    name: String,
    numa_node: Option<u32>,
    file: DeviceFile,
    // Dropped in this order, after `drop` has stopped the device: memory, then the device's own files.
    dma: DmaSpace,
    files: Files,
}

#[allow(dead_code, reason = "held for their Drop")]
enum Files {
    Group(GroupFiles),
    NoIommu(File, File),
}

/// The crate's device, which on drop finds its group again by the link in sysfs and panics without: then it is not dropped.
struct GroupFiles {
    device: Option<GroupDevice>,
    sysfs: PathBuf,
}

impl Drop for GroupFiles {
    fn drop(&mut self) {
        if self.sysfs.join("iommu_group").read_link().is_err() {
            tracing::warn!(device = %self.sysfs.display(), "the device has vanished; its files stay open");
            std::mem::forget(self.device.take());
        }
    }
}

impl VfioDevice {
    /// Opens the PCI device at `address` (`0000:01:00.0`), bound to vfio-pci. It is reset, where it can be, and stopped.
    ///
    /// # Errors
    /// [`DeviceError`]: not bound, no IOMMU, group in other use, what the system answers.
    pub fn pci(address: &str, protection: Protection) -> Result<VfioDevice, DeviceError> {
        VfioDevice::open(Path::new("/sys/bus/pci/devices"), address, protection)
    }

    /// Opens the platform device `name` (as under `/sys/bus/platform/devices`), bound to vfio-platform.
    ///
    /// # Errors
    /// As [`VfioDevice::pci`].
    pub fn platform(name: &str, protection: Protection) -> Result<VfioDevice, DeviceError> {
        VfioDevice::open(Path::new("/sys/bus/platform/devices"), name, protection)
    }

    fn open(bus: &Path, name: &str, protection: Protection) -> Result<VfioDevice, DeviceError> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(DeviceError::Unsupported("a device name like this"));
        }
        let sysfs = bus.join(name);
        fs::metadata(&sysfs).map_err(DeviceError::system("find the device in sysfs"))?;
        let group = group_of(&sysfs)?;
        let (file, dma, files) = if group.has_iommu {
            open_with_iommu(&sysfs)?
        } else if protection == Protection::NoIommu {
            open_without_iommu(group.number, name)?
        } else {
            return Err(DeviceError::Unsupported(
                "use without an IOMMU (allow it with no_iommu = true)",
            ));
        };
        supervisor::keep_device(name, file.as_fd())?;
        let device = VfioDevice {
            name: name.into(),
            numa_node: numa_node(&sysfs),
            file,
            dma,
            files,
        };
        match device.reset() {
            Ok(()) => {}
            Err(DeviceError::Unsupported(_)) => device.set_bus_master(false)?,
            Err(e) => return Err(e),
        }
        Ok(device)
    }
}

impl Device for VfioDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn pci(&self) -> Option<&PciInfo> {
        self.file.pci()
    }

    fn is_coherent(&self) -> bool {
        // On Arm, firmware says which devices snoop; PCI ones and all of x86 do.
        if self.pci().is_some() || cfg!(target_arch = "x86_64") {
            return true;
        }
        let sysfs = Path::new("/sys/bus/platform/devices").join(&self.name);
        sysfs.join("of_node/dma-coherent").exists()
    }

    fn behind_iommu(&self) -> bool {
        !matches!(self.files, Files::NoIommu(..))
    }

    fn config_read(&self, offset: usize, size: usize) -> Result<u32, DeviceError> {
        self.file.config_read(offset, size)
    }

    fn config_write(&self, offset: usize, size: usize, value: u32) -> Result<(), DeviceError> {
        self.file.config_write(offset, size, value)
    }

    fn region(&self, index: u32) -> Result<Mmio, DeviceError> {
        self.file.region(index)
    }

    fn dma_alloc(&self, len: usize, align: usize, class: IovaClass) -> Result<DmaMem, DeviceError> {
        if !self.is_coherent() {
            return Err(DeviceError::Unsupported(
                "ring memory that is not cached: no helper of the kernel for it is known here,",
            ));
        }
        self.dma.allocate(len, align, class)
    }

    fn map_arena_in(&self, arena: &Arc<Arena>, class: IovaClass) -> Result<ArenaMap, DeviceError> {
        self.dma.map_arena(arena, class)
    }

    fn enable_msix(&self, vectors: usize) -> Result<Vec<OwnedFd>, DeviceError> {
        self.file.connect_interrupts(vectors)
    }

    fn interrupts(&self) -> usize {
        self.file.interrupts()
    }

    fn unmask_interrupt(&self) -> Result<(), DeviceError> {
        self.file.unmask_interrupt()
    }

    fn set_bus_master(&self, on: bool) -> Result<(), DeviceError> {
        self.file.set_bus_master(on)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.file.reset()
    }

    fn removal_requested(&self) -> bool {
        self.file.removal_requested()
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }
}

impl Drop for VfioDevice {
    fn drop(&mut self) {
        if let Err(error) = self.file.set_bus_master(false) {
            tracing::warn!(device = %self.name, %error, "bus-master off");
        }
        match self.file.reset() {
            Ok(()) | Err(DeviceError::Unsupported(_) | DeviceError::Gone) => {}
            Err(error) => tracing::warn!(device = %self.name, %error, "reset at the end"),
        }
    }
}

/// The group that a device's DMA is confined with.
struct Group {
    number: u32,
    has_iommu: bool,
}

fn group_of(sysfs: &Path) -> Result<Group, DeviceError> {
    let link = sysfs
        .join("iommu_group")
        .read_link()
        .map_err(DeviceError::system(
            "IOMMU group (is the device bound to vfio-pci, and the IOMMU on?)",
        ))?;
    let number = link
        .file_name()
        .and_then(|n| n.to_str()?.parse().ok())
        .ok_or(DeviceError::Unsupported("an IOMMU group like this"))?;
    // Only groups made up by VFIO for want of an IOMMU have this name.
    let name = fs::read_to_string(sysfs.join("iommu_group/name")).unwrap_or_default();
    Ok(Group {
        number,
        has_iommu: name.trim() != "vfio-noiommu",
    })
}

fn open_with_iommu(sysfs: &Path) -> Result<(DeviceFile, DmaSpace, Files), DeviceError> {
    let vfio =
        |step| move |e: vfio_ioctls::VfioError| DeviceError::system(step)(std::io::Error::other(e));
    let container = Arc::new(VfioContainer::new(None).map_err(vfio("open /dev/vfio/vfio"))?);
    let ops: Arc<dyn VfioOps> = container.clone();
    let device = GroupDevice::new(sysfs, ops, false).map_err(vfio(
        "open the device (is it bound to vfio-pci, and its group free?)",
    ))?;
    // SAFETY: the crate's device keeps its descriptor open for as long as it lives, which is longer than this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    let file = fd
        .try_clone_to_owned()
        .map_err(DeviceError::system("dup"))?;
    let files = Files::Group(GroupFiles {
        device: Some(device),
        sysfs: sysfs.into(),
    });
    let file = DeviceFile::new(file.into())?;
    let dma = DmaSpace::new(
        Arc::new(iommu::IommuMapper::new(container)?),
        Pages::PreferHuge,
    );
    Ok((file, dma, files))
}

fn open_without_iommu(
    group: u32,
    name: &str,
) -> Result<(DeviceFile, DmaSpace, Files), DeviceError> {
    let opened = noiommu::open(Path::new("/dev/vfio"), group, name)?;
    tracing::warn!(
        device = name,
        "no IOMMU confines this device: it can write to all memory"
    );
    let file = DeviceFile::new(opened.device)?;
    let dma = DmaSpace::new(Arc::new(noiommu::PhysicalMapper::new()?), Pages::Huge);
    Ok((file, dma, Files::NoIommu(opened.group, opened.container)))
}

fn numa_node(sysfs: &Path) -> Option<u32> {
    // -1 for none.
    fs::read_to_string(sysfs.join("numa_node"))
        .ok()?
        .trim()
        .parse()
        .ok()
}
