//! A device's file: configuration space, regions, interrupts, reset. The same with and without IOMMU.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};

use super::sys;
use crate::device::interrupt::eventfds;
use crate::device::pci::{COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, EXTENDED_SPACE};
use crate::device::region::{Region, SplitRegion};
use crate::device::{DeviceError, Mmio, PciInfo, RegisterSpace, check_config};

/// The open device.
pub(super) struct DeviceFile {
    file: Arc<File>,
    flags: u32,
    regions: Vec<Region>,
    pci: Option<PciInfo>,
    /// Kinds of interrupts and how many of each, the best first.
    kinds: Vec<(u32, usize)>,
    /// The kind that is connected.
    active: Mutex<Option<u32>>,
    /// Readable when the system wants the device back.
    removal: Option<OwnedFd>,
}

impl DeviceFile {
    pub(super) fn new(file: File) -> Result<DeviceFile, DeviceError> {
        let fd = file.as_fd();
        let info = sys::device_info(fd).map_err(DeviceError::system("device information"))?;
        // A device has at most a few dozen regions; more is nonsense.
        let regions = (0..info.num_regions.min(256))
            .map(|index| match sys::region(fd, index) {
                // Indexes that the device does not use (VGA, for one) are refused.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Region {
                    flags: 0,
                    size: 0,
                    offset: 0,
                    sparse: None,
                }),
                other => other.map_err(DeviceError::system("region information")),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let is_pci = info.flags & VFIO_DEVICE_FLAGS_PCI != 0;
        let mut device = DeviceFile {
            kinds: kinds(fd, is_pci, info.num_irqs),
            file: Arc::new(file),
            flags: info.flags,
            regions,
            pci: None,
            active: Mutex::new(None),
            removal: None,
        };
        if is_pci {
            let space = usize::try_from(device.config_region()?.size).unwrap_or(0);
            let info = PciInfo::read(space.min(EXTENDED_SPACE), |o, n| device.config_read(o, n))?;
            device.pci = Some(info);
            device.removal = device.watch_removal();
            device.enable_memory()?;
        }
        Ok(device)
    }

    pub(super) fn pci(&self) -> Option<&PciInfo> {
        self.pci.as_ref()
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn removal_requested(&self) -> bool {
        self.removal.as_ref().is_some_and(|fd| {
            let mut count = [0; 8];
            nix::unistd::read(fd, &mut count).is_ok()
        })
    }

    pub(super) fn config_read(&self, offset: usize, size: usize) -> Result<u32, DeviceError> {
        let region = self.config_region()?;
        check_config(offset, size, usize::try_from(region.size).unwrap_or(0))?;
        let mut bytes = [0; 4];
        self.file
            .read_exact_at(&mut bytes[..size], region.offset + offset as u64)
            .map_err(DeviceError::system("read configuration space"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn config_write(
        &self,
        offset: usize,
        size: usize,
        value: u32,
    ) -> Result<(), DeviceError> {
        let region = self.config_region()?;
        check_config(offset, size, usize::try_from(region.size).unwrap_or(0))?;
        self.file
            .write_all_at(&value.to_le_bytes()[..size], region.offset + offset as u64)
            .map_err(DeviceError::system("write configuration space"))
    }

    pub(super) fn set_bus_master(&self, on: bool) -> Result<(), DeviceError> {
        if self.pci.is_none() {
            // Platform devices have no such switch: the driver stops the device itself, reset does too.
            return Ok(());
        }
        let command = self.config_read(COMMAND, 2)?;
        if command == 0xffff {
            return Err(DeviceError::Gone);
        }
        let on = if on { COMMAND_BUS_MASTER } else { 0 };
        self.config_write(COMMAND, 2, command & !COMMAND_BUS_MASTER | on)
    }

    /// Without it, an access to a mapped BAR ends the process.
    fn enable_memory(&self) -> Result<(), DeviceError> {
        let command = self.config_read(COMMAND, 2)?;
        let command = command & !COMMAND_BUS_MASTER | COMMAND_MEMORY;
        self.config_write(COMMAND, 2, command)
    }

    pub(super) fn region(&self, index: u32) -> Result<Mmio, DeviceError> {
        let none = DeviceError::NoRegion { index };
        let Some(region) = self.usable(index) else {
            return Err(none);
        };
        let Ok(len) = usize::try_from(region.size) else {
            return Err(none);
        };
        let trapped = Trapped {
            file: Arc::clone(&self.file),
            offset: region.offset,
            len,
        };
        if region.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Ok(Mmio::trapped(Arc::new(trapped)));
        }
        let whole = [(0, region.size)];
        let areas = region.sparse.as_deref().unwrap_or(&whole);
        let split = SplitRegion::new(areas, trapped, |at, len| self.map(region.offset + at, len))?;
        Ok(split.into_mmio())
    }

    /// The region, when it can be read and written and is not configuration space.
    fn usable(&self, index: u32) -> Option<&Region> {
        if self.pci.is_some() && index >= 6 {
            return None;
        }
        self.regions
            .get(usize::try_from(index).ok()?)
            .filter(|r| r.is_read_write())
    }

    fn map(&self, offset: u64, len: usize) -> Result<Mmio, DeviceError> {
        let map = MmapOptions::new()
            .offset(offset)
            .len(len)
            .map_raw(self.file.as_raw_fd())
            .map_err(DeviceError::system("map registers"))?;
        let (base, owner) = (map.as_mut_ptr(), RegionMap { _map: map });
        // SAFETY: the mapping of `len` bytes lives in the owner; nobody else has its address. Mappings begin at pages.
        Ok(unsafe { Mmio::mapped(base, len, Arc::new(owner)) })
    }

    fn config_region(&self) -> Result<&Region, DeviceError> {
        self.regions
            .get(VFIO_PCI_CONFIG_REGION_INDEX as usize)
            .filter(|_| self.flags & VFIO_DEVICE_FLAGS_PCI != 0)
            .ok_or(DeviceError::Unsupported("configuration space"))
    }

    pub(super) fn interrupts(&self) -> usize {
        self.kinds.iter().map(|(_, n)| *n).max().unwrap_or(0)
    }

    pub(super) fn connect_interrupts(&self, n: usize) -> Result<Vec<OwnedFd>, DeviceError> {
        let mut active = lock(&self.active);
        if let Some(kind) = active.take() {
            sys::connect_irqs(self.as_fd(), kind, &[])
                .map_err(DeviceError::system("disconnect interrupts"))?;
        }
        if n == 0 {
            return Ok(Vec::new());
        }
        let fitting = self.kinds.iter().filter(|(_, most)| *most >= n);
        let mut refused = None;
        for &(kind, _) in fitting {
            let (ours, theirs) = eventfds(n)?;
            match sys::connect_irqs(self.as_fd(), kind, &theirs) {
                Ok(()) => {
                    *active = Some(kind);
                    return Ok(ours);
                }
                // The machine may be out of vectors of one kind and have the other.
                Err(e) => refused = Some(DeviceError::system("connect interrupts")(e)),
            }
        }
        Err(refused.unwrap_or(DeviceError::Interrupts {
            asked: n,
            most: self.interrupts(),
        }))
    }

    /// As [`DeviceFile::connect_interrupts`], by the wire although there is a better kind.
    #[cfg(test)]
    pub(super) fn connect_intx(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        self.connect_interrupts(0)?;
        let (ours, theirs) = eventfds(1)?;
        sys::connect_irqs(self.as_fd(), VFIO_PCI_INTX_IRQ_INDEX, &theirs)
            .map_err(DeviceError::system("connect INTx"))?;
        *lock(&self.active) = Some(VFIO_PCI_INTX_IRQ_INDEX);
        Ok(ours)
    }

    pub(super) fn unmask_interrupt(&self) -> Result<(), DeviceError> {
        let active = *lock(&self.active);
        match active {
            Some(kind) if self.pci.is_none() || kind == VFIO_PCI_INTX_IRQ_INDEX => {
                sys::unmask_irq(self.as_fd(), kind).map_err(DeviceError::system("unmask interrupt"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn reset(&self) -> Result<(), DeviceError> {
        self.connect_interrupts(0)?;
        // The kernel restores the command register after a reset; so off before.
        self.set_bus_master(false)?;
        if self.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(DeviceError::Unsupported("reset"));
        }
        sys::reset(self.as_fd()).map_err(DeviceError::system("reset"))?;
        if self.pci.is_some() {
            self.enable_memory()?;
        }
        Ok(())
    }

    /// The kernel waits for the device when its driver is unbound or it is removed: it asks by this interrupt.
    fn watch_removal(&self) -> Option<OwnedFd> {
        let (ours, theirs) = eventfds(1).ok()?;
        sys::connect_irqs(self.as_fd(), VFIO_PCI_REQ_IRQ_INDEX, &theirs).ok()?;
        ours.into_iter().next()
    }
}

/// Stops a device whose owner has ended, by a duplicate of its file: bus-master off, which is read back, and a reset.
///
/// # Errors
/// [`DeviceError::Gone`] when it does not answer any more; what the system answers, or that bus-master stays on: the device may
/// still reach memory then.
pub fn stop_orphan(file: &File) -> Result<(), DeviceError> {
    let fd = file.as_fd();
    let info = sys::device_info(fd).map_err(DeviceError::system("device information"))?;
    let can_reset = info.flags & VFIO_DEVICE_FLAGS_RESET != 0;
    let reset = || sys::reset(fd).map_err(DeviceError::system("reset"));
    if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
        // No switch but its reset.
        return if can_reset {
            reset()
        } else {
            Err(DeviceError::Unsupported("reset"))
        };
    }
    let space = sys::region(fd, VFIO_PCI_CONFIG_REGION_INDEX)
        .map_err(DeviceError::system("region information"))?;
    let command = || {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, space.offset + COMMAND as u64)
            .map_err(DeviceError::system("read configuration space"))?;
        Ok(u32::from(u16::from_le_bytes(bytes)))
    };
    let switch_off = || {
        let now = command()?;
        if now == 0xffff {
            return Err(DeviceError::Gone);
        }
        let [low, high, ..] = (now & !COMMAND_BUS_MASTER).to_le_bytes();
        file.write_all_at(&[low, high], space.offset + COMMAND as u64)
            .map_err(DeviceError::system("write configuration space"))?;
        if command()? & COMMAND_BUS_MASTER != 0 {
            return Err(DeviceError::Timeout("bus-master stays on"));
        }
        Ok(())
    };
    switch_off()?;
    if can_reset {
        // Also ends what was under way. The kernel restores the command register, hence off before and looked at after.
        if let Err(error) = reset() {
            tracing::warn!(%error, "bus-master is off, but the device is not reset");
        }
        switch_off()?;
    }
    Ok(())
}

/// Interrupts that the device has, the best kind first.
fn kinds(device: BorrowedFd<'_>, is_pci: bool, indexes: u32) -> Vec<(u32, usize)> {
    let candidates: Vec<u32> = if is_pci {
        vec![
            VFIO_PCI_MSIX_IRQ_INDEX,
            VFIO_PCI_MSI_IRQ_INDEX,
            VFIO_PCI_INTX_IRQ_INDEX,
        ]
    } else {
        // A platform device has one kind per line; the first is the one that drivers here use.
        (0..indexes.min(1)).collect()
    };
    candidates
        .into_iter()
        .filter_map(|kind| {
            let (_, count) = sys::irq_info(device, kind).ok()?;
            Some((kind, usize::try_from(count).ok()?))
        })
        .filter(|(_, n)| *n > 0)
        .collect()
}

/// Keeps a mapping of registers.
struct RegionMap {
    _map: MmapRaw,
}

/// Registers through the device's file: for regions that cannot be mapped.
struct Trapped {
    file: Arc<File>,
    offset: u64,
    len: usize,
}

impl RegisterSpace for Trapped {
    fn read(&self, offset: usize, size: usize) -> u64 {
        let mut bytes = [0xff; 8];
        let result: io::Result<()> = match bytes.get_mut(..size) {
            Some(b) => self.file.read_exact_at(b, self.offset + offset as u64),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        // A device that does not answer reads as all ones.
        if let Err(error) = result {
            tracing::debug!(%error, offset, "register read");
            return u64::MAX;
        }
        u64::from_le_bytes(bytes)
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        let bytes = value.to_le_bytes();
        if let Some(b) = bytes.get(..size)
            && let Err(error) = self.file.write_all_at(b, self.offset + offset as u64)
        {
            tracing::debug!(%error, offset, "register write");
        }
    }

    fn len(&self) -> usize {
        self.len
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
