//! Devices without an IOMMU: the kernel gives the device's file, and nothing confines what the device writes.
//!
//! Addresses are physical ones, read from `/proc/self/pagemap` (needs CAP_SYS_ADMIN). Only reserved huge pages are used: the
//! kernel may move any other page, locked or not. The group's file needs CAP_SYS_RAWIO and the kernel must have been built
//! with VFIO_NOIOMMU and told `enable_unsafe_noiommu_mode`. A device that is still running when this process ends goes on
//! writing, hence the [supervisor](crate::supervisor) of the gateway.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_GROUP_FLAGS_VIABLE, VFIO_NOIOMMU_IOMMU,
};

use super::sys;
use crate::device::map::{Mapper, MemoryRange, Translation};
use crate::device::memory::HUGE_PAGE;
use crate::device::{DeviceError, IovaClass};
use crate::supervisor;

const SMALL_PAGE: usize = 4096;

/// What must stay open while the device is used.
pub(super) struct Opened {
    pub(super) device: File,
    pub(super) group: File,
    pub(super) container: File,
}

/// Opens the device `name` of the group `noiommu-<group>` under `dev` (`/dev/vfio`).
pub(super) fn open(dev: &Path, group: u32, name: &str) -> Result<Opened, DeviceError> {
    let file = |path: &Path, step| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(DeviceError::system(step))
    };
    let container = file(&dev.join("vfio"), "open /dev/vfio/vfio")?;
    let version =
        sys::api_version(container.as_fd()).map_err(DeviceError::system("VFIO version"))?;
    if u32::try_from(version) != Ok(VFIO_API_VERSION) {
        return Err(DeviceError::Unsupported("this version of VFIO"));
    }
    let supported = sys::check_extension(container.as_fd(), VFIO_NOIOMMU_IOMMU)
        .map_err(DeviceError::system("VFIO extensions"))?;
    if !supported {
        return Err(DeviceError::Unsupported(
            "VFIO without IOMMU (kernel option VFIO_NOIOMMU, parameter enable_unsafe_noiommu_mode)",
        ));
    }
    let group = file(
        &dev.join(format!("noiommu-{group}")),
        "open the group without IOMMU (needs CAP_SYS_RAWIO)",
    )?;
    let flags = sys::group_flags(group.as_fd()).map_err(DeviceError::system("group status"))?;
    if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(DeviceError::Unsupported(
            "a group with devices in other use",
        ));
    }
    sys::set_container(group.as_fd(), container.as_fd())
        .map_err(DeviceError::system("put the group into a container"))?;
    sys::set_iommu(container.as_fd(), VFIO_NOIOMMU_IOMMU)
        .map_err(DeviceError::system("choose no IOMMU"))?;
    let device: OwnedFd =
        sys::device_fd(group.as_fd(), name).map_err(DeviceError::system("open the device"))?;
    Ok(Opened {
        device: device.into(),
        group,
        container,
    })
}

/// Translation by the page table of this process.
pub(super) struct PhysicalMapper {
    pagemap: File,
}

impl PhysicalMapper {
    pub(super) fn new() -> Result<PhysicalMapper, DeviceError> {
        let pagemap =
            File::open("/proc/self/pagemap").map_err(DeviceError::system("open pagemap"))?;
        Ok(PhysicalMapper { pagemap })
    }

    /// Physical address of the page at `address`, which must be in memory.
    fn physical(&self, address: usize) -> Result<u64, DeviceError> {
        let mut entry = [0; 8];
        self.pagemap
            .read_exact_at(&mut entry, (address / SMALL_PAGE) as u64 * 8)
            .map_err(DeviceError::system("read pagemap"))?;
        page_address(u64::from_ne_bytes(entry)).map_err(DeviceError::system("physical address"))
    }
}

/// Physical address in a pagemap entry (Documentation/admin-guide/mm/pagemap.rst): bits 0–54 frame number, bit 62 swapped,
/// bit 63 present. The number is 0 for those who may not know it.
fn page_address(entry: u64) -> io::Result<u64> {
    let number = entry & ((1 << 55) - 1);
    if entry >> 62 != 0b10 {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "a page is not in memory",
        ));
    }
    // 52 bits of physical address are the most of any architecture.
    if number == 0 || number >= 1 << 40 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the kernel hides physical addresses (needs CAP_SYS_ADMIN)",
        ));
    }
    Ok(number * SMALL_PAGE as u64)
}

impl Mapper for PhysicalMapper {
    unsafe fn map(
        &self,
        memory: &MemoryRange<'_>,
        class: IovaClass,
    ) -> Result<Translation, DeviceError> {
        if memory.page < HUGE_PAGE || !memory.base.addr().get().is_multiple_of(memory.page) {
            return Err(DeviceError::NeedsHugePages);
        }
        // Before the device learns an address: pages that outlive this process while the device may write to them.
        supervisor::keep_memory(memory.file)?;
        let mut table = Vec::with_capacity(memory.len / memory.page);
        for at in (0..memory.len).step_by(memory.page) {
            let address = self.physical(memory.base.addr().get() + at)?;
            let last = address + (memory.page as u64 - 1);
            if !address.is_multiple_of(memory.page as u64) {
                return Err(DeviceError::NeedsHugePages);
            }
            if class == IovaClass::Below4G && last > u64::from(u32::MAX) {
                return Err(DeviceError::NoIova {
                    len: memory.len as u64,
                    class,
                });
            }
            table.push(address);
        }
        Ok(Translation::paged(table, memory.page, memory.len))
    }

    fn unmap(&self, _: &Translation) -> Result<(), DeviceError> {
        // Nothing was told to anybody; the device was stopped before.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::memory::{Pages, SharedMemory};

    #[test]
    fn an_entry_is_an_address_only_when_the_page_is_there_and_known() {
        assert_eq!(page_address(1 << 63 | 0x1234).unwrap(), 0x123_4000);
        assert_eq!(
            page_address(1 << 63 | 1 << 55 | 1 << 61 | 7).unwrap(),
            0x7000
        );
        assert!(page_address(0x1234).is_err());
        assert!(page_address(3 << 62 | 0x1234).is_err());
        assert!(page_address(1 << 63).is_err());
        assert!(page_address(1 << 63 | 1 << 50).is_err());
    }

    fn map(memory: &SharedMemory, class: IovaClass) -> Result<Translation, DeviceError> {
        let range = MemoryRange {
            base: memory.base(),
            len: memory.len(),
            page: memory.page(),
            file: memory.file().as_fd(),
            file_offset: 0,
        };
        // SAFETY: no device is told the addresses.
        unsafe { PhysicalMapper::new()?.map(&range, class) }
    }

    #[test]
    fn normal_pages_are_refused() {
        let memory = SharedMemory::new(1, Pages::Normal).unwrap();
        assert!(matches!(
            map(&memory, IovaClass::Any),
            Err(DeviceError::NeedsHugePages)
        ));
    }

    #[test]
    fn huge_pages_have_the_addresses_that_the_kernel_says() {
        // Where none are reserved, or by whom they may not be seen, there is nothing to compare.
        let Ok(memory) = SharedMemory::new(2 * HUGE_PAGE, Pages::Huge) else {
            return;
        };
        let translation = match map(&memory, IovaClass::Any) {
            Err(DeviceError::System { source, .. }) => {
                assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
                return;
            }
            other => other.unwrap(),
        };
        let mapper = PhysicalMapper::new().unwrap();
        for at in [
            0,
            SMALL_PAGE,
            HUGE_PAGE - SMALL_PAGE,
            HUGE_PAGE,
            2 * HUGE_PAGE - SMALL_PAGE,
        ] {
            let address = mapper.physical(memory.base().addr().get() + at).unwrap();
            assert_eq!(translation.at(at as u64), Some(address));
        }
        let low = translation.range(0, HUGE_PAGE).unwrap() < 1 << 32
            && translation.range(HUGE_PAGE, HUGE_PAGE).unwrap() < 1 << 32;
        assert_eq!(map(&memory, IovaClass::Below4G).is_ok(), low);
    }

    #[test]
    fn a_machine_without_it_says_so() {
        let empty = tempfile::tempdir().unwrap();
        let refused = open(empty.path(), 0, "0000:01:00.0").err().unwrap();
        assert!(
            refused.to_string().starts_with("open /dev/vfio/vfio"),
            "{refused}"
        );
    }
}
