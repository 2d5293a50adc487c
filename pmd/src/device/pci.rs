//! A PCI device's identity and its capabilities (PCI Local Bus 3.0, section 6; PCI Express Base, section 7).

use std::fmt;

use super::{DeviceError, check_config};

/// Bytes of configuration space of a conventional device.
pub const CONFIG_SPACE: usize = 256;
/// Bytes of configuration space of a PCI Express device.
pub const EXTENDED_SPACE: usize = 4096;

// Registers of the header, in the order of the specification.
/// Vendor ID, 16 bits.
pub const VENDOR_ID: usize = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: usize = 0x02;
/// Command, 16 bits.
pub const COMMAND: usize = 0x04;
/// Status, 16 bits.
pub const STATUS: usize = 0x06;
/// Revision, 8 bits; class code in the 24 bits behind it.
pub const REVISION: usize = 0x08;
/// Header type, 8 bits.
pub const HEADER_TYPE: usize = 0x0e;
/// First base address register, 32 bits; five more follow.
pub const BAR0: usize = 0x10;
/// Subsystem vendor ID, 16 bits.
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Subsystem ID, 16 bits.
pub const SUBSYSTEM_ID: usize = 0x2e;
/// Place of the first capability, 8 bits.
pub const CAPABILITIES: usize = 0x34;
/// Interrupt pin, 8 bits: 0 for none.
pub const INTERRUPT_PIN: usize = 0x3d;

/// In [`COMMAND`]: the device answers memory accesses.
pub const COMMAND_MEMORY: u32 = 1 << 1;
/// In [`COMMAND`]: the device may start transfers of its own.
pub const COMMAND_BUS_MASTER: u32 = 1 << 2;
/// In [`COMMAND`]: no INTx.
pub const COMMAND_INTX_DISABLE: u32 = 1 << 10;
/// In [`STATUS`]: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u32 = 1 << 4;

/// Capability: message-signalled interrupts.
pub const CAP_MSI: u8 = 0x05;
/// Capability: vendor-specific (virtio describes its registers there).
pub const CAP_VENDOR: u8 = 0x09;
/// Capability: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// The first capability cannot be inside the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Where a device is: domain, bus, device, function. Shown as the kernel does: `0000:01:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Address {
    /// Reads `0000:01:00.0`, or `01:00.0` in domain 0.
    pub fn parse(text: &str) -> Option<Address> {
        let hex = |s: &str, digits: usize| {
            let fine = (1..=digits).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
            fine.then(|| u32::from_str_radix(s, 16).ok()).flatten()
        };
        let (bus, slot) = text.rsplit_once(':')?;
        let (domain, bus) = bus.split_once(':').unwrap_or(("0000", bus));
        let (device, function) = slot.split_once('.')?;
        let byte = |v: u32, limit: u32| u8::try_from(v).ok().filter(|_| v < limit);
        Some(Address {
            // Host bridges behind others (VMD) have domains of more than 16 bits.
            domain: hex(domain, 8)?,
            bus: byte(hex(bus, 2)?, 256)?,
            device: byte(hex(device, 2)?, 32)?,
            function: byte(hex(function, 1)?, 8)?,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// A capability of the conventional list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Which one, `CAP_*`.
    pub id: u8,
    /// Its first byte in configuration space: a multiple of 4 in `0x40..=0xfc`.
    pub offset: usize,
}

/// A capability of PCI Express' extended list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// Which one.
    pub id: u16,
    /// Version of its layout.
    pub version: u8,
    /// Its first byte in configuration space: a multiple of 4 in `0x100..=0xffc`.
    pub offset: usize,
}

/// Identity and capabilities, read once when the device is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciInfo {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: `0x02_00_00` for an Ethernet controller.
    pub class: u32,
    /// The conventional list, in its order.
    pub capabilities: Vec<Capability>,
    /// The extended list, in its order; empty for conventional devices.
    pub extended: Vec<ExtendedCapability>,
}

impl PciInfo {
    /// Reads identity and both lists through `read(offset, size)` from a configuration space of `space` bytes.
    ///
    /// # Errors
    /// [`DeviceError::Gone`] when nothing answers, [`DeviceError::Capability`] for lists that loop, leave their place or are
    /// not aligned, and what `read` returns.
    pub fn read(
        space: usize,
        mut read: impl FnMut(usize, usize) -> Result<u32, DeviceError>,
    ) -> Result<PciInfo, DeviceError> {
        let mut checked = |offset: usize, size: usize| {
            check_config(offset, size, space)?;
            read(offset, size)
        };
        let ids = checked(VENDOR_ID, 4)?;
        // No device has vendor ID ffff.
        if low16(ids) == 0xffff {
            return Err(DeviceError::Gone);
        }
        let class = checked(REVISION, 4)?;
        let subsystem = checked(SUBSYSTEM_VENDOR_ID, 4)?;
        let mut info = PciInfo {
            vendor: low16(ids),
            device: low16(ids >> 16),
            subsystem_vendor: low16(subsystem),
            subsystem: low16(subsystem >> 16),
            revision: low8(class),
            class: class >> 8,
            capabilities: Vec::new(),
            extended: Vec::new(),
        };
        if checked(STATUS, 2)? & STATUS_CAPABILITIES != 0 {
            let first = low8(checked(CAPABILITIES, 1)?);
            info.capabilities = conventional(first, &mut checked)?;
        }
        if space >= EXTENDED_SPACE && info.find(CAP_EXPRESS).is_some() {
            info.extended = extended(&mut checked)?;
        }
        Ok(info)
    }

    /// The first capability with this ID.
    pub fn find(&self, id: u8) -> Option<Capability> {
        self.all(id).next()
    }

    /// All capabilities with this ID, in the order of the list.
    pub fn all(&self, id: u8) -> impl Iterator<Item = Capability> {
        self.capabilities
            .iter()
            .copied()
            .filter(move |c| c.id == id)
    }

    /// The first extended capability with this ID.
    pub fn find_extended(&self, id: u16) -> Option<ExtendedCapability> {
        self.extended.iter().copied().find(|c| c.id == id)
    }

    /// Whether the class code says network controller.
    pub fn is_network(&self) -> bool {
        self.class >> 16 == 0x02
    }
}

fn conventional(
    first: u8,
    read: &mut impl FnMut(usize, usize) -> Result<u32, DeviceError>,
) -> Result<Vec<Capability>, DeviceError> {
    let mut list = Vec::new();
    // The two lowest bits are reserved and to be masked.
    let mut offset = usize::from(first & 0xfc);
    while offset != 0 {
        let broken = |reason| Err(DeviceError::Capability { offset, reason });
        if offset < FIRST_CAPABILITY {
            return broken("inside the header");
        }
        if list.iter().any(|c: &Capability| c.offset == offset) {
            return broken("the list is a loop");
        }
        let head = read(offset, 2)?;
        if low16(head) == 0xffff {
            return broken("nothing there");
        }
        list.push(Capability {
            id: low8(head),
            offset,
        });
        offset = usize::from(low8(head >> 8) & 0xfc);
    }
    Ok(list)
}

fn extended(
    read: &mut impl FnMut(usize, usize) -> Result<u32, DeviceError>,
) -> Result<Vec<ExtendedCapability>, DeviceError> {
    let mut list = Vec::new();
    let mut offset = CONFIG_SPACE;
    loop {
        let broken = |reason| Err(DeviceError::Capability { offset, reason });
        let head = read(offset, 4)?;
        // The head of an empty list: nothing, or (behind some bridges) nobody answers.
        if offset == CONFIG_SPACE && (head == 0 || head == u32::MAX) {
            return Ok(list);
        }
        if head == u32::MAX {
            return broken("nothing there");
        }
        list.push(ExtendedCapability {
            id: low16(head),
            version: low8(head >> 16) & 0xf,
            offset,
        });
        // 12 bits, the lowest two reserved: always inside the space.
        let next = usize::from(low16(head >> 20) & 0xffc);
        if next == 0 {
            return Ok(list);
        }
        if next < CONFIG_SPACE {
            return Err(DeviceError::Capability {
                offset: next,
                reason: "an extended capability inside the conventional space",
            });
        }
        if list.iter().any(|c: &ExtendedCapability| c.offset == next) {
            return Err(DeviceError::Capability {
                offset: next,
                reason: "the list is a loop",
            });
        }
        offset = next;
    }
}

fn low8(v: u32) -> u8 {
    v.to_le_bytes()[0]
}

fn low16(v: u32) -> u16 {
    let [a, b, ..] = v.to_le_bytes();
    u16::from_le_bytes([a, b])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(space: &[u8]) -> Result<PciInfo, DeviceError> {
        PciInfo::read(space.len(), |offset, size| {
            let mut v = [0; 4];
            v[..size].copy_from_slice(&space[offset..offset + size]);
            Ok(u32::from_le_bytes(v))
        })
    }

    fn nic(size: usize) -> Vec<u8> {
        let mut c = vec![0; size];
        c[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
        c[STATUS] = 0x10;
        c[REVISION..REVISION + 4].copy_from_slice(&[3, 0, 0, 2]);
        c[CAPABILITIES] = 0x41;
        c[0x40..0x42].copy_from_slice(&[CAP_MSI, 0xa0]);
        c[0xa0..0xa2].copy_from_slice(&[CAP_EXPRESS, 0]);
        c
    }

    #[test]
    fn lists_are_walked_in_their_order() {
        let mut c = nic(4096);
        c[0x100..0x104].copy_from_slice(&0x1401_0001u32.to_le_bytes());
        c[0x140..0x144].copy_from_slice(&0x0002_0003u32.to_le_bytes());
        let info = read(&c).unwrap();
        assert_eq!(
            (info.vendor, info.device, info.revision),
            (0x8086, 0x10d3, 3)
        );
        assert!(info.is_network());
        assert_eq!(info.find(CAP_EXPRESS).unwrap().offset, 0xa0);
        assert_eq!(info.find(CAP_MSIX), None);
        assert_eq!(info.extended.len(), 2);
        assert_eq!(info.find_extended(3).unwrap().version, 2);
        assert!(read(&nic(256)).unwrap().extended.is_empty());
    }

    #[test]
    fn a_list_that_loops_or_points_into_the_header_is_refused() {
        let mut c = nic(4096);
        c[0xa1] = 0x40;
        assert!(matches!(
            read(&c),
            Err(DeviceError::Capability { offset: 0x40, .. })
        ));
        c[0xa1] = 0x3c;
        assert!(matches!(
            read(&c),
            Err(DeviceError::Capability { offset: 0x3c, .. })
        ));
        c[0xa1] = 0;
        c[0x100..0x104].copy_from_slice(&0x1001_0001u32.to_le_bytes());
        assert!(matches!(
            read(&c),
            Err(DeviceError::Capability { offset: 0x100, .. })
        ));
        c[0x100..0x104].copy_from_slice(&0x0801_0001u32.to_le_bytes());
        assert!(matches!(
            read(&c),
            Err(DeviceError::Capability { offset: 0x80, .. })
        ));
        assert!(matches!(read(&[0xff; 256]), Err(DeviceError::Gone)));
        assert!(matches!(
            read(&[0; 8]),
            Err(DeviceError::ConfigAccess { .. })
        ));
    }

    #[test]
    fn an_address_is_read_as_the_kernel_writes_it() {
        for text in ["0000:01:00.0", "10000:fe:1f.7"] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Address::parse("3:2.1").unwrap().to_string(), "0000:03:02.1");
        for text in [
            "",
            "01:00",
            "01:20.0",
            "01:00.8",
            "1:100:00.0",
            "0:0:0:0.0",
            "+1:00.0",
            "../0:0.0",
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_configuration_space_hangs_or_panics(mut space in prop::collection::vec(any::<u8>(), 4096..=4096)) {
            space[0] = 1;
            space[STATUS] |= 0x10;
            if let Ok(info) = read(&space) {
                prop_assert!(info.capabilities.iter().all(|c| (0x40..0x100).contains(&c.offset)));
                prop_assert!(info.extended.iter().all(|c| (0x100..0x1000).contains(&c.offset)));
            }
        }
    }
}
