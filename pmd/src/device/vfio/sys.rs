//! The VFIO calls that no crate offers in a checked form, and the parsing of what they return.
//!
//! Every call answers with the system's error. What the kernel returns in variable-length structures is parsed with bounds
//! checks, by functions that need no device.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE, vfio_device_info, vfio_group_status, vfio_iommu_type1_info,
    vfio_irq_info, vfio_region_info,
};

use crate::device::region::{Region, capabilities, parse_region, u32_at, u64_at};

/// The most that a variable-length answer is believed to need.
const MOST_ANSWER: usize = 64 << 10;

const fn request(n: u32) -> libc::c_ulong {
    // VFIO numbers carry neither direction nor size. MIPS, PowerPC and SPARC mark "neither" by a bit of its own.
    let none: libc::c_ulong = if cfg!(any(
        target_arch = "mips",
        target_arch = "mips64",
        target_arch = "powerpc",
        target_arch = "powerpc64",
        target_arch = "sparc64"
    )) {
        1 << 29
    } else {
        0
    };
    none | (VFIO_TYPE as libc::c_ulong) << 8 | (VFIO_BASE + n) as libc::c_ulong
}

/// Calls with a pointer that the kernel reads and writes.
fn call(fd: BorrowedFd<'_>, n: u32, argument: *mut u8) -> io::Result<i32> {
    // SAFETY: every caller in this module passes a buffer whose first word says how long it is, as the call's ABI asks.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request(n), argument) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

fn call_value(fd: BorrowedFd<'_>, n: u32, value: u32) -> io::Result<i32> {
    // SAFETY: the call takes a number, no pointer.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request(n), libc::c_ulong::from(value)) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(0)
}

/// Asks a container whether it supports an IOMMU type or feature.
pub(super) fn check_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    Ok(call_value(container, 1, extension)? > 0)
}

/// Version of the API.
pub(super) fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    call_value(container, 0, 0)
}

/// Gives a container with at least one group its way of translation.
pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    call_value(container, 2, kind).map(drop)
}

/// Flags of a group.
pub(super) fn group_flags(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: argsz::<vfio_group_status>(),
        flags: 0,
    };
    call(group, 3, (&raw mut status).cast())?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd = container.as_raw_fd();
    call(group, 4, (&raw mut fd).cast()).map(drop)
}

/// Opens a device of a group that is in a container.
pub(super) fn device_fd(group: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let mut name: Vec<u8> = name.bytes().filter(|&b| b != 0).chain([0]).collect();
    let fd = call(group, 6, name.as_mut_ptr())?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Flags and numbers of regions and interrupts of a device.
pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info {
        argsz: argsz::<vfio_device_info>(),
        flags: 0,
        num_regions: 0,
        num_irqs: 0,
        cap_offset: 0,
        pad: 0,
    };
    call(device, 7, (&raw mut info).cast())?;
    Ok(info)
}

/// Describes region `index`.
pub(super) fn region(device: BorrowedFd<'_>, index: u32) -> io::Result<Region> {
    let bytes = variable::<vfio_region_info>(device, 8, |b| put_u32(b, 8, index))?;
    parse_region(&bytes).ok_or_else(|| broken("region information"))
}

/// Flags and count of the interrupts of one kind.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<(u32, u32)> {
    let mut info = vfio_irq_info {
        argsz: argsz::<vfio_irq_info>(),
        flags: 0,
        index,
        count: 0,
    };
    call(device, 9, (&raw mut info).cast())?;
    Ok((info.flags, info.count))
}

/// Connects interrupts of one kind, from the first on, to eventfds; none switches the kind off.
pub(super) fn connect_irqs(device: BorrowedFd<'_>, index: u32, fds: &[OwnedFd]) -> io::Result<()> {
    let data = if fds.is_empty() {
        VFIO_IRQ_SET_DATA_NONE
    } else {
        VFIO_IRQ_SET_DATA_EVENTFD
    };
    let fds = fds.iter().map(AsRawFd::as_raw_fd);
    let mut b = irq_set(data | VFIO_IRQ_SET_ACTION_TRIGGER, index, fds);
    call(device, 10, b.as_mut_ptr()).map(drop)
}

/// Lets the first interrupt of a masked kind through again.
pub(super) fn unmask_irq(device: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
    let mut b = irq_set(flags, index, [].into_iter());
    put_u32(&mut b, 16, 1);
    call(device, 10, b.as_mut_ptr()).map(drop)
}

/// `vfio_irq_set` with descriptors as data.
fn irq_set(flags: u32, index: u32, fds: impl ExactSizeIterator<Item = i32>) -> Vec<u8> {
    let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
    let mut b = Vec::with_capacity(20 + 4 * fds.len());
    for word in [20 + 4 * count, flags, index, 0, count] {
        b.extend(word.to_ne_bytes());
    }
    for fd in fds {
        b.extend(fd.to_ne_bytes());
    }
    b
}

/// Resets a device.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    call(device, 11, std::ptr::null_mut()).map(drop)
}

/// What a container's IOMMU can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// Smallest page, a power of two.
    pub(super) smallest_page: u64,
    /// Addresses that can be mapped; `None` from kernels that do not say (before 5.4).
    pub(super) ranges: Option<Vec<RangeInclusive<u64>>>,
}

/// Asks a container about its IOMMU.
pub(super) fn iommu_info(container: BorrowedFd<'_>) -> io::Result<IommuInfo> {
    let bytes = variable::<vfio_iommu_type1_info>(container, 12, |_| ())?;
    parse_iommu(&bytes).ok_or_else(|| broken("IOMMU information"))
}

fn parse_iommu(b: &[u8]) -> Option<IommuInfo> {
    let flags = u32_at(b, 4)?;
    let mut info = IommuInfo {
        smallest_page: 4096,
        ranges: None,
    };
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0 {
        let sizes = u64_at(b, 8)?;
        info.smallest_page = 1u64.checked_shl(sizes.trailing_zeros())?;
    }
    if flags & VFIO_IOMMU_INFO_CAPS != 0 {
        for (id, body) in capabilities(b, u32_at(b, 16)?)? {
            if u32::from(id) == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
                let n = usize::try_from(u32_at(body, 0)?).ok()?;
                let ranges = body.get(8..8 + n.checked_mul(16)?)?;
                let ranges = ranges
                    .chunks_exact(16)
                    .map(|r| {
                        let (start, end) = (u64_at(r, 0)?, u64_at(r, 8)?);
                        (start <= end).then_some(start..=end)
                    })
                    .collect::<Option<Vec<_>>>()?;
                info.ranges = Some(ranges);
            }
        }
    }
    Some(info)
}

/// Calls for an answer of a length that the kernel says: first with the plain structure, then with the room it asked for.
fn variable<T>(fd: BorrowedFd<'_>, n: u32, fill: impl Fn(&mut [u8])) -> io::Result<Vec<u8>> {
    let mut len = size_of::<T>();
    loop {
        let mut b = vec![0; len];
        put_u32(&mut b, 0, u32::try_from(len).unwrap_or(0));
        fill(&mut b);
        call(fd, n, b.as_mut_ptr())?;
        let needed = u32_at(&b, 0).and_then(|n| usize::try_from(n).ok());
        match needed {
            Some(needed) if needed <= len => return Ok(b),
            Some(needed) if needed <= MOST_ANSWER => len = needed,
            _ => return Err(broken("length of an answer")),
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("nonsense in {what}"))
}

fn put_u32(b: &mut [u8], at: usize, value: u32) {
    if let Some(place) = b.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(list: &[u32]) -> Vec<u8> {
        list.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    /// What QEMU's intel-iommu gives through Linux 6.12, with the capability for free mappings in front.
    fn qemu() -> Vec<u8> {
        let mut b = words(&[88, 3, 0xffff_f000, 0xffff_ffff, 24, 0]);
        b.extend(words(&[3 | 1 << 16, 40, 65535, 0]));
        b.extend(words(&[1 | 1 << 16, 0, 2, 0]));
        for edge in [0u64, 0xfedf_ffff, 0xfef0_0000, (1 << 48) - 1] {
            b.extend(edge.to_ne_bytes());
        }
        b
    }

    #[test]
    fn the_usable_addresses_are_found_behind_other_capabilities() {
        let info = parse_iommu(&qemu()).unwrap();
        assert_eq!(info.smallest_page, 4096);
        assert_eq!(
            info.ranges.unwrap(),
            [0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1]
        );
        let old = parse_iommu(&words(&[24, 1, 0x1_0000, 0, 0, 0])).unwrap();
        assert_eq!((old.smallest_page, old.ranges), (0x1_0000, None));
    }

    #[test]
    fn a_chain_that_loops_or_leaves_the_answer_is_refused() {
        let mut b = qemu();
        put_u32(&mut b, 44, 24);
        assert_eq!(parse_iommu(&b), None);
        put_u32(&mut b, 44, 84);
        assert_eq!(parse_iommu(&b), None);
        put_u32(&mut b, 44, 0);
        put_u32(&mut b, 48, 3);
        assert_eq!(parse_iommu(&b), None);
        put_u32(&mut b, 48, u32::MAX);
        assert_eq!(parse_iommu(&b), None);
        assert_eq!(parse_iommu(&words(&[24, 1, 0, 0, 0, 0])), None);
    }

    proptest! {
        #[test]
        fn no_answer_panics(mut b in prop::collection::vec(any::<u8>(), 0..200), flags in 0u32..16, first in 0u32..200) {
            put_u32(&mut b, 4, flags);
            put_u32(&mut b, 16, first);
            let _ = parse_iommu(&b);
        }
    }
}
