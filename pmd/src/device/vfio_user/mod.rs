//! Devices in another process, by the vfio-user protocol: device models, and device servers such as SPDK's.
//!
//! The server gets the memory itself (the memfds of arenas and DMA memory): it is trusted with every frame, as hardware behind
//! an IOMMU is. It is not trusted with this process: replies are checked, a region is mapped only when its file is sealed
//! against shrinking (else an access could end this process) and is read and written by messages otherwise, and our own
//! files are sealed likewise.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};

use super::heap::DmaSpace;
use super::interrupt::eventfds;
use super::iova::IovaSpace;
use super::map::{Mapper, MemoryRange, Translation};
use super::memory::Pages;
use super::pci::{COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, EXTENDED_SPACE};
use super::region::{Region, SplitRegion, parse_region};
use super::{
    ArenaMap, Device, DeviceError, DmaMem, IovaClass, Mmio, PciInfo, RegisterSpace, check_config,
};
use crate::arena::Arena;

pub mod fuzz;
mod wire;

#[cfg(test)]
mod tests;

use wire::{Command, Connection};

/// How long a server may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// `DMA_MAP`: the device may read and write.
const DMA_READ_WRITE: u32 = 3;
/// Bytes of `vfio_region_info`.
const REGION_INFO: u32 = 32;
/// No device has more; a server that says so is broken.
const MOST_REGIONS: u32 = 256;

type Shared = Arc<Mutex<Connection>>;

/// A device behind a unix socket.
pub struct VfioUserDevice {
    name: String,
    connection: Shared,
    flags: u32,
    regions: Vec<(Region, Option<Arc<File>>)>,
    pci: Option<PciInfo>,
    kinds: Vec<(u32, usize)>,
    active: Mutex<Option<u32>>,
    dma: DmaSpace,
}

impl VfioUserDevice {
    /// Connects to the server that listens at `path`. The device is reset, where it can be.
    ///
    /// # Errors
    /// [`DeviceError`]: nobody listens, another version, what the server refuses or breaks.
    pub fn connect(path: &Path) -> Result<VfioUserDevice, DeviceError> {
        let stream = UnixStream::connect(path).map_err(DeviceError::system("vfio-user socket"))?;
        VfioUserDevice::over(stream, &path.display().to_string(), PATIENCE)
    }

    fn over(
        stream: UnixStream,
        name: &str,
        patience: Duration,
    ) -> Result<VfioUserDevice, DeviceError> {
        let mut connection = Connection::new(stream, patience)?;
        let info = connection.ask(Command::DeviceGetInfo, &words(&[16, 0, 0, 0]), &[])?;
        let number = |at| word(&info.body, at).ok_or_else(|| short("device information"));
        let (flags, regions, irqs) = (number(4)?, number(8)?, number(12)?);
        if regions > MOST_REGIONS {
            return Err(DeviceError::Broken(format!("{regions} regions")));
        }
        let is_pci = flags & VFIO_DEVICE_FLAGS_PCI != 0;
        let regions = (0..regions)
            .map(|index| region_info(&mut connection, index))
            .collect::<Result<Vec<_>, _>>()?;
        let kinds = irq_kinds(&mut connection, is_pci, irqs)?;
        let connection = Arc::new(Mutex::new(connection));
        let mapper = ServerMapper {
            connection: Arc::clone(&connection),
            space: Mutex::new(IovaSpace::new([0x1_0000..=(1 << 48) - 1])),
        };
        let mut device = VfioUserDevice {
            name: name.into(),
            connection,
            flags,
            regions,
            pci: None,
            kinds,
            active: Mutex::new(None),
            dma: DmaSpace::new(Arc::new(mapper), Pages::PreferHuge),
        };
        if is_pci {
            let space = device.config_space()?;
            device.pci = Some(PciInfo::read(space, |o, n| device.config_read(o, n))?);
            device.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER)?;
        }
        match device.reset() {
            Ok(()) | Err(DeviceError::Unsupported(_)) => Ok(device),
            Err(e) => Err(e),
        }
    }

    fn config_space(&self) -> Result<usize, DeviceError> {
        let none = DeviceError::Unsupported("configuration space");
        if self.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(none);
        }
        let (region, _) = self
            .regions
            .get(VFIO_PCI_CONFIG_REGION_INDEX as usize)
            .ok_or(none)?;
        Ok(usize::try_from(region.size).map_or(EXTENDED_SPACE, |n| n.min(EXTENDED_SPACE)))
    }

    /// Sets and clears bits of the command register.
    fn set_command(&self, set: u32, clear: u32) -> Result<(), DeviceError> {
        let command = self.config_read(COMMAND, 2)?;
        self.config_write(COMMAND, 2, command & !clear | set)
    }

    fn window(&self, index: u32, len: usize) -> Messages {
        Messages {
            connection: Arc::clone(&self.connection),
            region: index,
            len,
        }
    }
}

impl Device for VfioUserDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn pci(&self) -> Option<&PciInfo> {
        self.pci.as_ref()
    }

    fn config_read(&self, offset: usize, size: usize) -> Result<u32, DeviceError> {
        let space = self.config_space()?;
        check_config(offset, size, space)?;
        let mut bytes = [0; 4];
        self.window(VFIO_PCI_CONFIG_REGION_INDEX, space)
            .get(offset, &mut bytes[..size])?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn config_write(&self, offset: usize, size: usize, value: u32) -> Result<(), DeviceError> {
        let space = self.config_space()?;
        check_config(offset, size, space)?;
        self.window(VFIO_PCI_CONFIG_REGION_INDEX, space)
            .put(offset, &value.to_le_bytes()[..size])
    }

    fn region(&self, index: u32) -> Result<Mmio, DeviceError> {
        let none = DeviceError::NoRegion { index };
        let is_config = self.pci.is_some() && index >= 6;
        let found = usize::try_from(index)
            .ok()
            .and_then(|i| self.regions.get(i));
        let Some((region, file)) = found.filter(|(r, _)| r.is_read_write() && !is_config) else {
            return Err(none);
        };
        let Ok(len) = usize::try_from(region.size) else {
            return Err(none);
        };
        let messages = self.window(index, len);
        let mappable = region.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        let Some(file) = file.as_ref().filter(|_| mappable) else {
            return Ok(Mmio::trapped(Arc::new(messages)));
        };
        if !sealed(file) {
            tracing::info!(device = %self.name, index, "a region whose file may shrink is accessed by messages");
            return Ok(Mmio::trapped(Arc::new(messages)));
        }
        let whole = [(0, region.size)];
        let areas = region.sparse.as_deref().unwrap_or(&whole);
        let split = SplitRegion::new(areas, messages, |at, len| {
            map_file(file, region.offset.checked_add(at), len)
        })?;
        Ok(split.into_mmio())
    }

    fn dma_alloc(&self, len: usize, align: usize, class: IovaClass) -> Result<DmaMem, DeviceError> {
        self.dma.allocate(len, align, class)
    }

    fn map_arena_in(&self, arena: &Arc<Arena>, class: IovaClass) -> Result<ArenaMap, DeviceError> {
        self.dma.map_arena(arena, class)
    }

    fn enable_msix(&self, vectors: usize) -> Result<Vec<OwnedFd>, DeviceError> {
        let mut active = lock(&self.active);
        let mut connection = lock(&self.connection);
        let none = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        if let Some(kind) = active.take() {
            connection.ask(Command::DeviceSetIrqs, &words(&[20, none, kind, 0, 0]), &[])?;
        }
        if vectors == 0 {
            return Ok(Vec::new());
        }
        let most = self.interrupts();
        let kind = self.kinds.iter().find(|(_, n)| *n >= vectors);
        let Some(&(kind, _)) = kind else {
            return Err(DeviceError::Interrupts {
                asked: vectors,
                most,
            });
        };
        let (ours, theirs) = eventfds(vectors)?;
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        // One by one: a server need not take more than one descriptor in a message.
        for (i, fd) in (0u32..).zip(&theirs) {
            let body = words(&[20, flags, kind, i, 1]);
            connection.ask(Command::DeviceSetIrqs, &body, &[fd.as_raw_fd()])?;
            *active = Some(kind);
        }
        Ok(ours)
    }

    fn interrupts(&self) -> usize {
        self.kinds.iter().map(|(_, n)| *n).max().unwrap_or(0)
    }

    fn unmask_interrupt(&self) -> Result<(), DeviceError> {
        let Some(kind) = *lock(&self.active) else {
            return Ok(());
        };
        if self.pci.is_some() && kind != VFIO_PCI_INTX_IRQ_INDEX {
            return Ok(());
        }
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
        let body = words(&[20, flags, kind, 0, 1]);
        lock(&self.connection)
            .ask(Command::DeviceSetIrqs, &body, &[])
            .map(drop)
    }

    fn set_bus_master(&self, on: bool) -> Result<(), DeviceError> {
        match (&self.pci, on) {
            (None, _) => Ok(()),
            (Some(_), true) => self.set_command(COMMAND_BUS_MASTER, 0),
            (Some(_), false) => self.set_command(0, COMMAND_BUS_MASTER),
        }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.enable_msix(0)?;
        self.set_bus_master(false)?;
        if self.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(DeviceError::Unsupported("reset"));
        }
        lock(&self.connection).ask(Command::DeviceReset, &[], &[])?;
        if self.pci.is_some() {
            self.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER)?;
        }
        Ok(())
    }
}

impl Drop for VfioUserDevice {
    fn drop(&mut self) {
        match self.reset() {
            Ok(()) | Err(DeviceError::Unsupported(_) | DeviceError::Gone) => {}
            Err(error) => tracing::warn!(device = %self.name, %error, "reset at the end"),
        }
    }
}

/// A region by messages.
struct Messages {
    connection: Shared,
    region: u32,
    len: usize,
}

impl Messages {
    fn head(&self, offset: usize, count: usize) -> Vec<u8> {
        let mut body = (offset as u64).to_ne_bytes().to_vec();
        body.extend(words(&[self.region, u32::try_from(count).unwrap_or(0)]));
        body
    }

    fn get(&self, offset: usize, out: &mut [u8]) -> Result<(), DeviceError> {
        let head = self.head(offset, out.len());
        let reply = lock(&self.connection).ask(Command::RegionRead, &head, &[])?;
        let data = reply
            .body
            .get(16..)
            .filter(|d| d.len() == out.len())
            .ok_or_else(|| short("register"))?;
        out.copy_from_slice(data);
        Ok(())
    }

    fn put(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let mut body = self.head(offset, bytes.len());
        body.extend_from_slice(bytes);
        lock(&self.connection)
            .ask(Command::RegionWrite, &body, &[])
            .map(drop)
    }
}

impl RegisterSpace for Messages {
    fn read(&self, offset: usize, size: usize) -> u64 {
        let mut bytes = [0; 8];
        let done = bytes.get_mut(..size).map(|b| self.get(offset, b));
        // A device that does not answer reads as all ones.
        match done {
            Some(Ok(())) => u64::from_le_bytes(bytes),
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        if let Some(bytes) = value.to_le_bytes().get(..size)
            && let Err(error) = self.put(offset, bytes)
        {
            tracing::debug!(%error, offset, "register write");
        }
    }

    fn len(&self) -> usize {
        self.len
    }
}

struct ServerMapper {
    connection: Shared,
    space: Mutex<IovaSpace>,
}

impl Mapper for ServerMapper {
    unsafe fn map(
        &self,
        memory: &MemoryRange<'_>,
        class: IovaClass,
    ) -> Result<Translation, DeviceError> {
        let align = memory.page.max(2 << 20) as u64;
        let iova = lock(&self.space).allocate(memory.len as u64, align, class)?;
        let mut body = words(&[32, DMA_READ_WRITE]);
        for n in [memory.file_offset, iova, memory.len as u64] {
            body.extend(n.to_ne_bytes());
        }
        let fd = memory.file.as_raw_fd();
        match lock(&self.connection).ask(Command::DmaMap, &body, &[fd]) {
            Ok(_) => Ok(Translation::contiguous(iova, memory.len)),
            Err(e) => {
                lock(&self.space).release(iova);
                Err(e)
            }
        }
    }

    fn unmap(&self, translation: &Translation) -> Result<(), DeviceError> {
        let iova = translation.start();
        let mut body = words(&[24, 0]);
        for n in [iova, translation.len as u64] {
            body.extend(n.to_ne_bytes());
        }
        let mut connection = lock(&self.connection);
        let done = connection.ask(Command::DmaUnmap, &body, &[]);
        // A server that is lost keeps pages of a file at most, none of which this process gets again for something else.
        if !connection.is_broken() {
            done?;
        }
        lock(&self.space).release(iova);
        Ok(())
    }
}

fn region_info(
    connection: &mut Connection,
    index: u32,
) -> Result<(Region, Option<Arc<File>>), DeviceError> {
    let mut ask = |argsz: u32| {
        let body = words(&[argsz, 0, index, 0, 0, 0, 0, 0]);
        connection.ask(Command::DeviceGetRegionInfo, &body, &[])
    };
    let mut reply = ask(REGION_INFO)?;
    let needed = word(&reply.body, 0).ok_or_else(|| short("region information"))?;
    if (REGION_INFO + 1..=32 << 10).contains(&needed) {
        reply = ask(needed)?;
    }
    let region = parse_region(&reply.body).ok_or_else(|| short("region information"))?;
    let file = reply.fds.into_iter().next().map(|fd| Arc::new(fd.into()));
    Ok((region, file))
}

/// Interrupts that the device has, the best kind first.
fn irq_kinds(
    connection: &mut Connection,
    is_pci: bool,
    indexes: u32,
) -> Result<Vec<(u32, usize)>, DeviceError> {
    let candidates = if is_pci {
        vec![
            VFIO_PCI_MSIX_IRQ_INDEX,
            VFIO_PCI_MSI_IRQ_INDEX,
            VFIO_PCI_INTX_IRQ_INDEX,
        ]
    } else {
        vec![0]
    };
    let mut kinds = Vec::new();
    for index in candidates.into_iter().filter(|&i| i < indexes) {
        let reply = connection.ask(Command::DeviceGetIrqInfo, &words(&[16, 0, index, 0]), &[])?;
        let count = word(&reply.body, 12).ok_or_else(|| short("interrupt information"))?;
        // As many as MSI-X can have.
        if (1..=2048).contains(&count) {
            kinds.push((index, count as usize));
        }
    }
    Ok(kinds)
}

/// Whether nobody can make the file shorter: an access behind its end would end this process.
fn sealed(file: &File) -> bool {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    fcntl(file, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK))
}

fn map_file(file: &Arc<File>, offset: Option<u64>, len: usize) -> Result<Mmio, DeviceError> {
    let size = file
        .metadata()
        .map_err(DeviceError::system("size of a region's file"))?
        .len();
    let offset = offset
        .filter(|o| o.checked_add(len as u64).is_some_and(|end| end <= size))
        .ok_or_else(|| short("file of a region"))?;
    let map = MmapOptions::new()
        .offset(offset)
        .len(len)
        .map_raw(file.as_raw_fd())
        .map_err(DeviceError::system("map registers"))?;
    if !map.as_mut_ptr().addr().is_multiple_of(8) {
        return Err(DeviceError::Broken("a region that is not aligned".into()));
    }
    let (base, owner) = (map.as_mut_ptr(), FileMap { _map: map });
    // SAFETY: the mapping of `len` bytes lives in the owner and cannot lose its file's bytes; nobody else has its address.
    Ok(unsafe { Mmio::mapped(base, len, Arc::new(owner)) })
}

struct FileMap {
    _map: MmapRaw,
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn word(b: &[u8], at: usize) -> Option<u32> {
    let bytes = b.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn short(what: &str) -> DeviceError {
    DeviceError::Broken(format!("vfio-user: nonsense in {what}"))
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
