//! A device without hardware: registers by a [`RegisterSpace`], memory by a table that checks every address as an IOMMU
//! does. Init sequences and hostile devices are tested with it.
//!
//! The device side holds a [`ModelBus`]: it reads and writes memory at device addresses and raises interrupts. Transfers
//! outside of what the driver mapped, or with bus-master off, fail and are counted. Device addresses are never addresses of
//! this process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::heap::DmaSpace;
use super::interrupt::eventfds;
use super::iova::IovaSpace;
use super::map::{Mapper, MemoryRange, Translation};
use super::memory::Pages;
use super::pci::{COMMAND, COMMAND_BUS_MASTER};
use super::{
    ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio, PciInfo, RegisterSpace, check_config,
};
use crate::arena::Arena;

/// A transfer of the device that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("DMA fault at {iova:#x}, {len} bytes")]
pub struct DmaFault {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub len: usize,
}

/// What the device sees of the machine. Share it between the [`ModelDevice`] and its register spaces.
#[derive(Default)]
pub struct ModelBus {
    bus_master: AtomicBool,
    faults: AtomicU64,
    memory: Mutex<Memory>,
    vectors: Mutex<Vec<File>>,
}

struct Memory {
    space: IovaSpace,
    maps: BTreeMap<u64, Mapped>,
}

struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is only used for volatile byte accesses while the table holds it, under the table's lock.
unsafe impl Send for Mapped {}

impl Default for Memory {
    fn default() -> Self {
        Memory {
            space: IovaSpace::new([0x1_0000..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1]),
            maps: BTreeMap::new(),
        }
    }
}

impl ModelBus {
    /// A bus with nothing mapped and bus-master off.
    pub fn new() -> Arc<ModelBus> {
        Arc::default()
    }

    /// Reads memory.
    ///
    /// # Errors
    /// [`DmaFault`], with nothing read, when not all of it is mapped or bus-master is off.
    pub fn read(&self, iova: u64, out: &mut [u8]) -> Result<(), DmaFault> {
        self.transfer(iova, out.len(), |at, i| {
            // SAFETY: `transfer` found the byte inside a mapping that its owner keeps while it is in the table.
            out[i] = unsafe { at.read_volatile() };
        })
    }

    /// Writes memory.
    ///
    /// # Errors
    /// As [`ModelBus::read`].
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, bytes.len(), |at, i| {
            // SAFETY: as in `read`.
            unsafe { at.write_volatile(bytes[i]) };
        })
    }

    /// Reads a little-endian word.
    ///
    /// # Errors
    /// As [`ModelBus::read`].
    pub fn read_u64(&self, iova: u64) -> Result<u64, DmaFault> {
        let mut b = [0; 8];
        self.read(iova, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes a little-endian word.
    ///
    /// # Errors
    /// As [`ModelBus::read`].
    pub fn write_u64(&self, iova: u64, value: u64) -> Result<(), DmaFault> {
        self.write(iova, &value.to_le_bytes())
    }

    /// Raises an interrupt; false when the driver has not connected it.
    pub fn interrupt(&self, vector: usize) -> bool {
        lock(&self.vectors)
            .get(vector)
            .is_some_and(|mut f| f.write_all(&1u64.to_ne_bytes()).is_ok())
    }

    /// Whether the driver lets the device transfer.
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// Transfers refused so far.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Bytes that the device can reach now.
    pub fn mapped_bytes(&self) -> usize {
        lock(&self.memory).maps.values().map(|m| m.len).sum()
    }

    fn transfer(
        &self,
        iova: u64,
        len: usize,
        mut each: impl FnMut(*mut u8, usize),
    ) -> Result<(), DmaFault> {
        let memory = lock(&self.memory);
        let place = memory
            .maps
            .range(..=iova)
            .next_back()
            .and_then(|(start, m)| {
                let offset = usize::try_from(iova - start).ok()?;
                let end = offset.checked_add(len)?;
                (end <= m.len).then(|| m.base.as_ptr().wrapping_add(offset))
            })
            .filter(|_| self.bus_master());
        let Some(base) = place else {
            self.faults.fetch_add(1, Ordering::Relaxed);
            return Err(DmaFault { iova, len });
        };
        for i in 0..len {
            each(base.wrapping_add(i), i);
        }
        Ok(())
    }
}

struct ModelMapper(Arc<ModelBus>);

impl Mapper for ModelMapper {
    unsafe fn map(
        &self,
        range: &MemoryRange<'_>,
        class: IovaClass,
    ) -> Result<Translation, DeviceError> {
        let mut memory = lock(&self.0.memory);
        let iova = memory.space.allocate(range.len as u64, 2 << 20, class)?;
        memory.maps.insert(
            iova,
            Mapped {
                base: range.base,
                len: range.len,
            },
        );
        Ok(Translation::contiguous(iova, range.len))
    }

    fn unmap(&self, translation: &Translation) -> Result<(), DeviceError> {
        let mut memory = lock(&self.0.memory);
        memory.maps.remove(&translation.start());
        memory.space.release(translation.start());
        Ok(())
    }
}

/// A [`Device`] whose other side is code.
pub struct ModelDevice {
    name: String,
    bus: Arc<ModelBus>,
    config: Mutex<Vec<u8>>,
    pci: Option<PciInfo>,
    regions: Vec<(u32, Mmio)>,
    interrupts: usize,
    on_reset: Option<Box<dyn Fn() + Send + Sync>>,
    dma: DmaSpace,
}

impl ModelDevice {
    /// A PCI device with this configuration space (256 or 4096 bytes, all writable) and these BARs; with an empty one a
    /// platform device.
    ///
    /// # Errors
    /// What [`PciInfo::read`] finds wrong.
    pub fn new(
        name: &str,
        bus: &Arc<ModelBus>,
        config: Vec<u8>,
        regions: impl IntoIterator<Item = (u32, Arc<dyn RegisterSpace>)>,
    ) -> Result<ModelDevice, DeviceError> {
        let pci = if config.is_empty() {
            None
        } else {
            let read = |offset, size| Ok(get(&config, offset, size));
            Some(PciInfo::read(config.len(), read)?)
        };
        Ok(ModelDevice {
            name: name.into(),
            bus: Arc::clone(bus),
            pci,
            config: Mutex::new(config),
            regions: regions
                .into_iter()
                .map(|(i, space)| (i, Mmio::trapped(space)))
                .collect(),
            interrupts: 8,
            on_reset: None,
            dma: DmaSpace::new(Arc::new(ModelMapper(Arc::clone(bus))), Pages::Normal),
        })
    }

    /// What else happens when the driver resets the device.
    #[must_use]
    pub fn on_reset(mut self, f: impl Fn() + Send + Sync + 'static) -> ModelDevice {
        self.on_reset = Some(Box::new(f));
        self
    }

    /// How many interrupts it has (8 unless told).
    #[must_use]
    pub fn with_interrupts(mut self, n: usize) -> ModelDevice {
        self.interrupts = n;
        self
    }

    fn check(&self, offset: usize, size: usize) -> Result<MutexGuard<'_, Vec<u8>>, DeviceError> {
        let config = lock(&self.config);
        check_config(offset, size, config.len())?;
        Ok(config)
    }
}

impl Device for ModelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn pci(&self) -> Option<&PciInfo> {
        self.pci.as_ref()
    }

    fn config_read(&self, offset: usize, size: usize) -> Result<u32, DeviceError> {
        Ok(get(&self.check(offset, size)?, offset, size))
    }

    fn config_write(&self, offset: usize, size: usize, value: u32) -> Result<(), DeviceError> {
        let mut config = self.check(offset, size)?;
        config[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
        let on = get(&config, COMMAND, 2) & COMMAND_BUS_MASTER != 0;
        self.bus.bus_master.store(on, Ordering::Release);
        Ok(())
    }

    fn region(&self, index: u32) -> Result<Mmio, DeviceError> {
        self.regions
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, r)| r.clone())
            .ok_or(DeviceError::NoRegion { index })
    }

    fn dma_alloc(&self, len: usize, align: usize, class: IovaClass) -> Result<DmaMem, DeviceError> {
        self.dma.allocate(len, align, class)
    }

    fn map_arena_in(&self, arena: &Arc<Arena>, class: IovaClass) -> Result<ArenaMap, DeviceError> {
        self.dma.map_arena(arena, class)
    }

    fn enable_msix(&self, vectors: usize) -> Result<Vec<OwnedFd>, DeviceError> {
        if vectors > self.interrupts {
            return Err(DeviceError::Interrupts {
                asked: vectors,
                most: self.interrupts,
            });
        }
        let (ours, theirs) = eventfds(vectors)?;
        *lock(&self.bus.vectors) = theirs.into_iter().map(File::from).collect();
        Ok(ours)
    }

    fn interrupts(&self) -> usize {
        self.interrupts
    }

    fn set_bus_master(&self, on: bool) -> Result<(), DeviceError> {
        if self.pci.is_none() {
            self.bus.bus_master.store(on, Ordering::Release);
            return Ok(());
        }
        let command = self.config_read(COMMAND, 2)? & !COMMAND_BUS_MASTER;
        let on = if on { COMMAND_BUS_MASTER } else { 0 };
        self.config_write(COMMAND, 2, command | on)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.set_bus_master(false)?;
        lock(&self.bus.vectors).clear();
        if let Some(f) = &self.on_reset {
            f();
        }
        Ok(())
    }
}

impl Drop for ModelDevice {
    fn drop(&mut self) {
        // Cannot fail: no system is involved.
        let _ = self.reset();
    }
}

/// Completes a checksum as devices do: the sum of all 16-bit words from `start` on, complemented, is stored at `field`. False
/// when these do not lie in the packet.
pub fn insert_checksum(packet: &mut [u8], start: usize, field: usize) -> bool {
    let Some(rest) = packet.get(start..) else {
        return false;
    };
    let mut sum = 0u32;
    for (n, byte) in rest.iter().enumerate() {
        sum += u32::from(*byte) << (8 * (1 - n % 2));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    match packet.get_mut(field..field + 2) {
        // Zero stands for "none".
        Some(place) if [high, low] == [0, 0] => place.fill(0xff),
        Some(place) => place.copy_from_slice(&[high, low]),
        None => return false,
    }
    true
}

fn get(config: &[u8], offset: usize, size: usize) -> u32 {
    let mut v = [0; 4];
    if let Some(bytes) = config.get(offset..offset + size) {
        v[..size].copy_from_slice(bytes);
    }
    u32::from_le_bytes(v)
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;
    use crate::pool::Pool;

    fn nic() -> (Arc<ModelBus>, ModelDevice) {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        let bus = ModelBus::new();
        let device = ModelDevice::new("model", &bus, config, []).unwrap();
        (bus, device)
    }

    #[test]
    fn the_device_reaches_what_is_mapped_and_nothing_else() {
        let (bus, device) = nic();
        let memory = device.dma_alloc(256, 4096, IovaClass::Below4G).unwrap();
        assert!(memory.iova() < 1 << 32 && memory.iova() % 4096 == 0);
        assert!(bus.write(memory.iova(), b"x").is_err());
        device.set_bus_master(true).unwrap();
        bus.write(memory.iova() + 4, b"ring").unwrap();
        let mut out = [0; 4];
        memory.read_bytes(4, &mut out);
        assert_eq!(&out, b"ring");
        memory.write32(8, 0x0403_0201);
        assert_eq!(bus.read_u64(memory.iova() + 8).unwrap(), 0x0403_0201);
        assert!(bus.read_u64(memory.iova() + (2 << 20) - 7).is_err());
        assert!(bus.read_u64(u64::MAX).is_err());
        device.reset().unwrap();
        assert!(bus.write(memory.iova(), b"x").is_err());
        assert_eq!(bus.faults(), 4);
    }

    #[test]
    fn frames_are_reached_through_the_map_and_unmapped_with_the_device() {
        let (bus, device) = nic();
        let arena = Arena::new(ArenaConfig {
            frames: 64,
            ..ArenaConfig::default()
        })
        .unwrap();
        let map = device.map_arena(&arena).unwrap();
        assert_eq!(
            device.map_arena(&arena).unwrap().addr_of_index(0),
            map.addr_of_index(0)
        );
        device.set_bus_master(true).unwrap();
        let mut pool = Pool::new(&arena, 4);
        let frame = pool.get().unwrap();
        let at = map.iova(&frame).unwrap();
        let mut ring = crate::device::ring::FrameRing::new(2, &arena).unwrap();
        ring.push(frame).unwrap();
        bus.write(at, b"received").unwrap();
        // SAFETY: the model wrote all it will.
        let mut frame = unsafe { ring.pop() }.unwrap();
        assert_eq!(frame.append(8).unwrap(), b"received");
        assert!(frame.append(100_000).is_none());
        pool.put(frame);
        drop(device);
        assert_eq!(bus.mapped_bytes(), 0);
        assert!(bus.write(at, b"late").is_err());
    }

    #[test]
    fn memory_is_wiped_and_used_again() {
        let (bus, device) = nic();
        device.set_bus_master(true).unwrap();
        let a = device.dma_alloc(1000, 1024, IovaClass::Any).unwrap();
        let b = device.dma_alloc(100, 128, IovaClass::Any).unwrap();
        let (at, next) = (a.iova(), b.iova());
        assert_eq!(next, at + 1024);
        a.write64(0, u64::MAX);
        let part = a.slice(8, 8).unwrap();
        drop(a);
        assert_eq!(bus.read_u64(at).unwrap(), u64::MAX);
        drop(part);
        assert_eq!(bus.read_u64(at).unwrap(), 0);
        assert_eq!(device.dma_alloc(1, 1, IovaClass::Any).unwrap().iova(), at);
        drop(b);
        let big = device.dma_alloc(2 << 20, 2 << 20, IovaClass::Any).unwrap();
        assert_eq!(big.iova(), at);
        drop(device);
        // The driver's handle outlives the device: the memory stays, the device is off.
        big.write64(0, 1);
        assert!(bus.read_u64(at).is_err());
        drop(big);
        assert_eq!(bus.mapped_bytes(), 0);
    }

    #[test]
    fn requests_that_cannot_be_served_are_errors() {
        let (bus, device) = nic();
        for (len, align) in [(0, 64), (64, 3), (64, 4 << 20), (usize::MAX, 64)] {
            assert!(device.dma_alloc(len, align, IovaClass::Any).is_err());
        }
        assert!(matches!(
            device.region(0),
            Err(DeviceError::NoRegion { index: 0 })
        ));
        assert!(device.config_read(254, 4).is_err() && device.config_read(1, 2).is_err());
        assert!(device.config_write(256, 1, 0).is_err() && device.config_read(0, 3).is_err());
        assert!(device.enable_msix(9).is_err());
        assert!(!bus.interrupt(0));
        let fds = device.enable_msix(2).unwrap();
        assert!(bus.interrupt(1) && !bus.interrupt(2));
        let mut count = [0; 8];
        assert_eq!(nix::unistd::read(&fds[1], &mut count).unwrap(), 8);
        assert_eq!(u64::from_ne_bytes(count), 1);
        device.reset().unwrap();
        assert!(!bus.interrupt(1));
    }

    #[test]
    fn accesses_outside_dma_memory_do_nothing() {
        let (_, device) = nic();
        let m = device.dma_alloc(64, 64, IovaClass::Any).unwrap();
        m.write32(61, 1);
        m.write64(64, 1);
        m.write_bytes(60, b"12345");
        m.store_release16(usize::MAX, 1);
        m.store_release32(2, 1);
        let mut out = [7; 5];
        m.read_bytes(60, &mut out);
        assert_eq!(out, [0; 5]);
        assert_eq!((m.read64(60), m.load_acquire64(4)), (0, 0));
        assert_eq!(m.faults(), 8);
        assert!(m.slice(60, 5).is_err() && m.slice(usize::MAX, 2).is_err());
        m.store_release16(2, 0xabcd);
        assert_eq!(m.load_acquire32(0), 0xabcd_0000);
    }
}
