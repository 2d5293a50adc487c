use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;

use proptest::prelude::*;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

use super::*;
use crate::arena::{ArenaConfig, HugePolicy, memfd};
use crate::pool::Pool;

/// What the server was given: address, place in the file, size, file.
type Maps = Arc<Mutex<Vec<(u64, u64, u64, File)>>>;

/// A device that copies: writing 1 to register 0 moves `count` bytes from `source` to `destination`, then raises an interrupt.
/// Served by the crate vfio_user, which nobody here wrote.
#[derive(Default)]
struct Copier {
    config: Vec<u8>,
    maps: Maps,
    source: u64,
    destination: u64,
    irqs: Vec<File>,
    resets: Arc<Mutex<u32>>,
}

impl Copier {
    fn place(&self, iova: u64) -> Option<(File, u64)> {
        let maps = lock(&self.maps);
        let (address, offset, _, file) = maps
            .iter()
            .find(|(address, _, size, _)| iova >= *address && iova < address + size)?;
        Some((file.try_clone().unwrap(), offset + (iova - address)))
    }
}

impl ServerBackend for Copier {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            data.copy_from_slice(&self.config[at..at + data.len()]);
        } else {
            data.fill(0x5a);
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            self.config[at..at + data.len()].copy_from_slice(data);
            return Ok(());
        }
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        match offset {
            8 => self.source = value,
            16 => self.destination = value,
            0 if self.config[4] & 4 != 0 => {
                let mut bytes = vec![0; usize::try_from(value).unwrap()];
                let (from, at) = self.place(self.source).unwrap();
                from.read_exact_at(&mut bytes, at).unwrap();
                let (to, at) = self.place(self.destination).unwrap();
                to.write_all_at(&bytes, at).unwrap();
                for mut irq in &self.irqs {
                    irq.write_all(&1u64.to_ne_bytes()).unwrap();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> std::io::Result<()> {
        lock(&self.maps).push((address, offset, size, fd.unwrap()));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> std::io::Result<()> {
        lock(&self.maps).retain(|(a, _, s, _)| (*a, *s) != (address, size));
        Ok(())
    }

    fn reset(&mut self) -> std::io::Result<()> {
        *lock(&self.resets) += 1;
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _: u32,
        _: u32,
        start: u32,
        _: u32,
        fds: Vec<File>,
    ) -> std::io::Result<()> {
        if start == 0 {
            self.irqs.clear();
        }
        self.irqs.extend(fds);
        Ok(())
    }
}

struct Rig {
    device: VfioUserDevice,
    maps: Maps,
    resets: Arc<Mutex<u32>>,
    /// Behind BAR 2, which is mapped.
    shared: File,
    server: thread::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    let shared = memfd("bar", 4096, 8192).unwrap();
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let region = |index, size, flags| ServerRegion {
        region_info: vfio_region_info {
            argsz: 32,
            flags,
            index,
            cap_offset: 0,
            size,
            offset: 0,
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let mut regions: Vec<_> = (0..9).map(|i| region(i, 0, 0)).collect();
    regions[0] = region(0, 4096, both);
    regions[2] = region(2, 8192, both | VFIO_REGION_INFO_FLAG_MMAP);
    regions[2].sparse_areas = vec![SparseArea {
        area: vfio_region_sparse_mmap_area {
            offset: 4096,
            size: 4096,
        },
    }];
    regions[2].mmap_fd = Some(shared.as_raw_fd());
    regions[7] = region(7, 256, both);
    let irqs = [1, 0, 4, 0, 0];
    let irqs = (0..).zip(irqs).map(|(index, count)| IrqInfo {
        index,
        flags: 1,
        count,
    });
    let server = Server::new(&path, true, irqs.collect(), regions).unwrap();
    let mut config = vec![0; 256];
    config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
    let mut copier = Copier {
        config,
        ..Copier::default()
    };
    let (maps, resets) = (Arc::clone(&copier.maps), Arc::clone(&copier.resets));
    let server = thread::spawn(move || {
        // Ends with an error when the client hangs up.
        let _ = server.run(&mut copier);
    });
    let device = VfioUserDevice::connect(&path).unwrap();
    Rig {
        device,
        maps,
        resets,
        shared,
        server,
        _dir: dir,
    }
}

#[test]
fn a_foreign_server_moves_bytes_of_our_memory() {
    let rig = rig();
    let device = &rig.device;
    let pci = device.pci().unwrap();
    assert_eq!((pci.vendor, pci.device), (0x1234, 0x5678));
    // The server uses write(2), which huge pages do not have.
    let arena = Arena::new(ArenaConfig {
        frames: 64,
        huge: HugePolicy::Never,
        ..ArenaConfig::default()
    })
    .unwrap();
    let map = device.map_arena(&arena).unwrap();
    let memory = device.dma_alloc(4096, 64, IovaClass::Below4G).unwrap();
    let fds = device.enable_msix(3).unwrap();
    device.set_bus_master(true).unwrap();
    let registers = device.region(0).unwrap();
    assert_eq!(registers.read32(12), 0x5a5a_5a5a);
    let mut pool = Pool::new(&arena, 4);
    let mut frame = pool.get().unwrap();
    let at = map.iova(&frame).unwrap();
    let mut ring = crate::device::ring::FrameRing::new(2, &arena).unwrap();
    frame.reset_default();
    ring.push(frame).unwrap();
    memory.write_bytes(100, b"across the socket");
    registers.write64(8, memory.iova() + 100);
    registers.write64(16, at);
    registers.write32(0, 17);
    for fd in &fds {
        let mut count = [0; 8];
        assert_eq!(nix::unistd::read(fd.as_fd(), &mut count).unwrap(), 8);
    }
    // SAFETY: the server did what it was told, in step.
    let mut frame = unsafe { ring.pop() }.unwrap();
    assert_eq!(frame.append(17).unwrap(), b"across the socket");
    pool.put(frame);
    device.reset().unwrap();
    registers.write32(0, 17);
    let mut count = [0; 8];
    assert!(nix::unistd::read(fds[0].as_fd(), &mut count).is_err());
    assert_eq!(lock(&rig.maps).len(), 2);
    let (maps, resets) = (rig.maps, rig.resets);
    drop((memory, registers));
    drop(rig.device);
    rig.server.join().unwrap();
    assert_eq!((lock(&maps).len(), *lock(&resets)), (0, 3));
}

#[test]
fn a_region_is_mapped_where_the_server_lets_us() {
    let rig = rig();
    let region = rig.device.region(2).unwrap();
    region.write32(4096 + 8, 0x1234_5678);
    let mut bytes = [0; 4];
    rig.shared.read_exact_at(&mut bytes, 4096 + 8).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 0x1234_5678);
    // The first page is not: it is the server's to answer.
    assert_eq!(region.read16(8), 0x5a5a);
    for index in [1, 7, 99] {
        assert!(matches!(
            rig.device.region(index),
            Err(DeviceError::NoRegion { .. })
        ));
    }
    assert!(rig.device.enable_msix(5).is_err());
    assert!(rig.device.config_read(256, 1).is_err());
}

#[test]
fn a_server_that_goes_leaves_errors_behind() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(VfioUserDevice::over(ours, "x", PATIENCE).is_err());
    let (ours, _silent) = UnixStream::pair().unwrap();
    assert!(VfioUserDevice::over(ours, "x", Duration::from_millis(20)).is_err());
    assert!(VfioUserDevice::connect(Path::new("/nowhere/at/all")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_server_can_hang_crash_or_lead_astray(
        script in prop::collection::vec((
            prop_oneof![
                prop::collection::vec(any::<u8>(), 1..64),
                // Like a region of one page, or interrupts.
                Just(words(&[32, 7, 0, 0, 4096, 0, 0, 0])),
                Just(words(&[64, 15, 0, 32, 4096, 0, 0, 0, 1, 0, 1, 0, 0, 0, 4096, 0])),
                Just(words(&[16, 1, 2, 4])),
            ],
            prop_oneof![6 => Just(0u8), 1 => 1u8..8],
            any::<u32>(),
        ), 1..20),
    ) {
        super::fuzz::serve(script);
    }
}
