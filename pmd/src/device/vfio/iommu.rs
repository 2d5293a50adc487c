//! Memory for a device behind an IOMMU: addresses from what the IOMMU can translate, pages pinned by the kernel.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_ioctls::VfioContainer;

use super::sys;
use crate::device::iova::IovaSpace;
use crate::device::map::{Mapper, MemoryRange, Translation};
use crate::device::memory::HUGE_PAGE;
use crate::device::{DeviceError, IovaClass};
use crate::supervisor;

/// The container's address space.
pub(super) struct IommuMapper {
    container: Arc<VfioContainer>,
    space: Mutex<IovaSpace>,
    smallest_page: u64,
}

impl IommuMapper {
    /// Asks what can be translated. The container has its group already.
    pub(super) fn new(container: Arc<VfioContainer>) -> Result<IommuMapper, DeviceError> {
        // SAFETY: the container keeps its descriptor open as long as it lives, which is longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) };
        let info = sys::iommu_info(fd).map_err(DeviceError::system("IOMMU information"))?;
        let space = info
            .ranges
            .map_or_else(IovaSpace::conservative, IovaSpace::new);
        tracing::debug!(windows = ?space.windows(), "device addresses");
        Ok(IommuMapper {
            container,
            space: Mutex::new(space),
            smallest_page: info.smallest_page,
        })
    }

    #[cfg(test)]
    pub(super) fn windows(&self) -> Vec<std::ops::RangeInclusive<u64>> {
        self.lock().windows().to_vec()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, IovaSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapper for IommuMapper {
    unsafe fn map(
        &self,
        memory: &MemoryRange<'_>,
        class: IovaClass,
    ) -> Result<Translation, DeviceError> {
        if !(memory.len as u64).is_multiple_of(self.smallest_page) {
            return Err(DeviceError::Unsupported(
                "memory in pages smaller than the IOMMU's",
            ));
        }
        // Aligned so that the IOMMU can use pages as large as the memory's own.
        let align = memory.page.max(HUGE_PAGE) as u64;
        supervisor::keep_memory(memory.file)?;
        let iova = self.lock().allocate(memory.len as u64, align, class)?;
        // SAFETY: the caller promises what this call asks: the memory stays, and is not behind references meanwhile.
        let mapped = unsafe {
            self.container
                .vfio_dma_map(iova, memory.len, memory.base.as_ptr())
        };
        match mapped {
            Ok(()) => Ok(Translation::contiguous(iova, memory.len)),
            Err(e) => {
                self.lock().release(iova);
                Err(DeviceError::system("map memory for the device")(
                    std::io::Error::other(e),
                ))
            }
        }
    }

    fn unmap(&self, translation: &Translation) -> Result<(), DeviceError> {
        let iova = translation.start();
        self.container
            .vfio_dma_unmap(iova, translation.len)
            .map_err(|e| DeviceError::system("unmap memory")(std::io::Error::other(e)))?;
        self.lock().release(iova);
        Ok(())
    }
}
