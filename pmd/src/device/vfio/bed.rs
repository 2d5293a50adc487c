//! What only a machine with an IOMMU can show. Run in a QEMU guest with its `edu` device, which can be told to transfer
//! (https://www.qemu.org/docs/master/specs/edu.html):
//! `gateway/tests/beds/vfio/guest.py --device edu,dma_mask=0xffffffffffffffff --unit-tests pmd device::vfio::bed`

use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::arena::{ArenaConfig, HugePolicy};
use crate::device::fence_release;
use crate::device::map::{Mapper, MemoryRange};
use crate::device::memory::SharedMemory;
use crate::pool::Pool;

// Registers of edu, in the order of its specification.
const ID: usize = 0x00;
const LIVENESS: usize = 0x04;
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;

const DMA_START: u64 = 1;
const DMA_FROM_DEVICE: u64 = 2;
/// The device's own buffer.
const BUFFER: u64 = 0x4_0000;

fn edu() -> VfioDevice {
    let devices = std::env::var("VFIO_DEVICES").unwrap();
    let name = devices.split(' ').next().unwrap();
    VfioDevice::pci(name, Protection::Iommu).unwrap()
}

/// Starts a transfer and waits for the device to say that it is done.
fn transfer(registers: &Mmio, source: u64, destination: u64, count: u64, command: u64) {
    fence_release();
    registers.write64(DMA_SOURCE, source);
    registers.write64(DMA_DESTINATION, destination);
    registers.write64(DMA_COUNT, count);
    registers.write64(DMA_COMMAND, command | DMA_START);
    let begin = Instant::now();
    while registers.read64(DMA_COMMAND) & DMA_START != 0 {
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}

fn kernel_log() -> String {
    let mut log = vec![0; 1 << 20];
    // SAFETY: the buffer and its length are given; 3 reads everything in the log.
    let n = unsafe { libc::klogctl(3, log.as_mut_ptr().cast(), 1 << 20) };
    log.truncate(usize::try_from(n).unwrap());
    String::from_utf8_lossy(&log).into_owned()
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn registers_and_configuration_are_the_devices_own() {
    let device = edu();
    let pci = device.pci().unwrap();
    assert_eq!((pci.vendor, pci.device), (0x1234, 0x11e8));
    assert!(pci.find(crate::device::pci::CAP_MSI).is_some());
    let registers = device.region(0).unwrap();
    assert_eq!(registers.len(), 1 << 20);
    assert_eq!(registers.read32(ID) & 0xffff, 0x00ed);
    registers.write32(LIVENESS, 0x1234_5678);
    assert_eq!(registers.read32(LIVENESS), !0x1234_5678);
    assert!(matches!(
        device.region(1),
        Err(DeviceError::NoRegion { index: 1 })
    ));
    assert!(matches!(
        device.region(7),
        Err(DeviceError::NoRegion { index: 7 })
    ));
    assert!(device.region(u32::MAX).is_err());
    assert_eq!(device.config_read(0, 2).unwrap(), 0x1234);
    assert!(device.config_read(4096, 4).is_err());
    assert!(!device.removal_requested());
    device.reset().unwrap();
    assert_eq!(registers.read32(ID) & 0xffff, 0x00ed);
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn the_device_moves_bytes_between_what_was_mapped() {
    for huge in [HugePolicy::Require, HugePolicy::Never] {
        let device = edu();
        let registers = device.region(0).unwrap();
        let arena = Arena::new(ArenaConfig {
            frames: 2048,
            huge,
            ..ArenaConfig::default()
        })
        .unwrap();
        let map = device.map_arena(&arena).unwrap();
        let memory = device.dma_alloc(4096, 64, IovaClass::Below4G).unwrap();
        assert!(memory.iova() < 1 << 32);
        device.set_bus_master(true).unwrap();
        let mut pool = Pool::new(&arena, 64);
        let mut frames = Vec::new();
        pool.get_bulk(&mut frames, 2048);
        let mut frame = frames.pop().unwrap();
        memory.write_bytes(0, b"from the ring to the device and into a frame");
        transfer(&registers, memory.iova(), BUFFER, 44, 0);
        let mut ring = crate::device::ring::FrameRing::new(2, &arena).unwrap();
        let at = map.iova(&frame).unwrap();
        frame.reset_default();
        ring.push(frame).unwrap();
        transfer(&registers, BUFFER, at, 44, DMA_FROM_DEVICE);
        // SAFETY: the device said that it is done.
        let mut frame = unsafe { ring.pop() }.unwrap();
        assert_eq!(
            frame.append(44).unwrap(),
            b"from the ring to the device and into a frame"
        );
        frames.push(frame);
        pool.put_bulk(&mut frames);
        println!(
            "arena of {} KiB pages at {:#x}, ring at {:#x}",
            arena.page_size() >> 10,
            map.addr_of_index(0).unwrap(),
            memory.iova()
        );
    }
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn what_is_not_mapped_is_not_reached_and_the_fault_is_reported() {
    let device = edu();
    let registers = device.region(0).unwrap();
    let memory = device.dma_alloc(4096, 4096, IovaClass::Any).unwrap();
    device.set_bus_master(true).unwrap();
    memory.write64(0, 0x600d_600d_600d_600d);
    transfer(&registers, memory.iova(), BUFFER, 8, 0);
    // The address of the memory in this process is no address of the device's.
    let other = Box::new(0x0123_4567_89ab_cdefu64);
    let faults = kernel_log().matches("DMAR").count();
    let outside = (&raw const *other).addr() as u64;
    transfer(&registers, BUFFER, outside, 8, DMA_FROM_DEVICE);
    transfer(&registers, BUFFER, 0x1000, 8, DMA_FROM_DEVICE);
    assert_eq!(*other, 0x0123_4567_89ab_cdef);
    let begin = Instant::now();
    while kernel_log().matches("DMAR").count() == faults {
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "no fault in the log"
        );
    }
    let log = kernel_log();
    let line = log.lines().rev().find(|l| l.contains("fault addr"));
    println!("{}", line.unwrap_or("(a fault without an address)"));
    // Bus-master off: nothing arrives, even where it may.
    device.set_bus_master(false).unwrap();
    memory.write64(8, 7);
    transfer(&registers, BUFFER, memory.iova() + 8, 8, DMA_FROM_DEVICE);
    assert_eq!(memory.read64(8), 7);
    device.set_bus_master(true).unwrap();
    transfer(&registers, BUFFER, memory.iova() + 8, 8, DMA_FROM_DEVICE);
    assert_eq!(memory.read64(8), 0x600d_600d_600d_600d);
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn reserved_and_taken_addresses_are_refused_by_the_system_and_never_chosen() {
    let devices = std::env::var("VFIO_DEVICES").unwrap();
    let sysfs = Path::new("/sys/bus/pci/devices").join(devices.split(' ').next().unwrap());
    let container = Arc::new(VfioContainer::new(None).unwrap());
    let ops: Arc<dyn VfioOps> = container.clone();
    let _device = GroupDevice::new(&sysfs, ops, false).unwrap();
    let mapper = iommu::IommuMapper::new(container.clone()).unwrap();
    let windows = mapper.windows();
    println!("windows {windows:#x?}");
    assert_eq!(windows[0], 1..=0xfedf_ffff);
    assert_eq!(*windows[1].start(), 0xfef0_0000);
    let memory = SharedMemory::new(1 << 20, Pages::Normal).unwrap();
    let try_at = |iova, len| {
        // SAFETY: the memory outlives the container's use of it in this test and is never touched.
        unsafe { container.vfio_dma_map(iova, len, memory.base().as_ptr()) }
    };
    let answer = |r: Result<(), vfio_ioctls::VfioError>| match r {
        Err(vfio_ioctls::VfioError::IommuDmaMap(e)) => e.errno(),
        other => panic!("{other:?}"),
    };
    assert_eq!(answer(try_at(0xfee0_0000, 4096)), libc::EINVAL);
    assert_eq!(answer(try_at(0xfedf_f000, 8192)), libc::EINVAL);
    assert_eq!(answer(try_at(1 << 62, 4096)), libc::EINVAL);
    assert_eq!(answer(try_at(0x10_0000, 100)), libc::EINVAL);
    try_at(0x10_0000, 8192).unwrap();
    assert_eq!(answer(try_at(0x10_1000, 4096)), libc::EEXIST);
    container.vfio_dma_unmap(0x10_0000, 8192).unwrap();
    // All that can be had below 4 GiB is given, without any of the above.
    let range = MemoryRange {
        base: memory.base(),
        len: memory.len(),
        page: memory.page(),
        file: memory.file().as_fd(),
        file_offset: 0,
    };
    let mut given = Vec::new();
    for _ in 0..64 {
        // SAFETY: as above.
        given.push(unsafe { mapper.map(&range, IovaClass::Below4G) }.unwrap());
    }
    assert!(
        given
            .iter()
            .all(|t| t.start() + (1 << 20) <= 0xfee0_0000 && t.start() != 0)
    );
    for t in &given {
        mapper.unmap(t).unwrap();
    }
    assert!(mapper.unmap(&given[0]).is_err());
}

/// Waits for an interrupt; how long it took.
fn wait(fd: &OwnedFd, limit: Duration) -> Option<Duration> {
    let begin = Instant::now();
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap();
    if poll(&mut fds, limit).unwrap() == 0 {
        return None;
    }
    let took = begin.elapsed();
    let mut count = [0; 8];
    std::fs::File::from(fd.try_clone().unwrap())
        .read_exact(&mut count)
        .unwrap();
    Some(took)
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn interrupts_wake_a_sleeper_until_they_are_off() {
    let device = edu();
    let registers = device.region(0).unwrap();
    device.set_bus_master(true).unwrap();
    assert!(matches!(
        device.enable_msix(99),
        Err(DeviceError::Interrupts { asked: 99, .. })
    ));
    let fds = device.enable_msix(1).unwrap();
    assert_eq!(wait(&fds[0], Duration::from_millis(20)), None);
    let mut latencies = Vec::new();
    for _ in 0..200 {
        let begin = Instant::now();
        registers.write32(RAISE, 1);
        wait(&fds[0], Duration::from_secs(5)).unwrap();
        latencies.push(begin.elapsed());
        registers.write32(ACKNOWLEDGE, 1);
    }
    latencies.sort_unstable();
    println!(
        "interrupt to awake: median {:?}, worst {:?} of 200",
        latencies[100], latencies[199]
    );
    device.enable_msix(0).unwrap();
    registers.write32(RAISE, 1);
    assert_eq!(wait(&fds[0], Duration::from_millis(50)), None);
    registers.write32(ACKNOWLEDGE, 1);
    // By the wire: masked by the kernel until told otherwise.
    let fds = device.file.connect_intx().unwrap();
    for _ in 0..3 {
        registers.write32(RAISE, 1);
        wait(&fds[0], Duration::from_secs(5)).unwrap();
        registers.write32(ACKNOWLEDGE, 1);
        device.unmask_interrupt().unwrap();
    }
    device.reset().unwrap();
    registers.write32(RAISE, 1);
    assert_eq!(wait(&fds[0], Duration::from_millis(50)), None);
}

#[test]
#[ignore = "needs a device: gateway/tests/beds/vfio/guest.py"]
fn a_device_is_one_owners_and_free_again_after_it() {
    let device = edu();
    let name = device.name().to_owned();
    let busy = VfioDevice::pci(&name, Protection::Iommu).err().unwrap();
    println!("{busy}");
    let memory = device.dma_alloc(64, 64, IovaClass::Any).unwrap();
    drop(device);
    let again = edu();
    // What outlives its device still is memory.
    memory.write64(0, 1);
    assert_eq!(memory.read64(0), 1);
    drop(again);
    assert!(VfioDevice::pci("0000:ff:1f.7", Protection::Iommu).is_err());
    assert!(VfioDevice::pci("../x", Protection::Iommu).is_err());
}
