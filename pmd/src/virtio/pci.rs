//! Virtio over PCI, modern interface only (virtio 1.2, section 4.1).
//!
//! Vendor capabilities say where the register structures lie; each is checked against its BAR before it is used.

use std::time::{Duration, Instant};

use super::feature;
use super::ring::{Areas, DriverRing};
use crate::device::pci::CAP_VENDOR;
use crate::device::{Device, DeviceError, Mmio, fence_full};

// Capability (section 4.1.4): bytes from its first.
const CAP_LEN: usize = 2;
const CAP_TYPE: usize = 3;
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_NOTIFY_MULTIPLIER: usize = 16;
const TYPE_COMMON: u32 = 1;
const TYPE_NOTIFY: u32 = 2;
const TYPE_DEVICE: u32 = 4;

// Common configuration (section 4.1.4.3).
const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
const COMMON_LEN: usize = 0x38;

// Device status (section 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;

/// No interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// A reset may take a device a while; QEMU's take none.
const RESET_PATIENCE: Duration = Duration::from_millis(500);

/// The registers of a virtio device.
pub(super) struct Transport {
    common: Mmio,
    notify: Mmio,
    notify_multiplier: u32,
    /// Device-specific configuration.
    pub(super) config: Mmio,
}

/// How to tell the device of a queue.
#[derive(Clone)]
pub(super) struct Bell {
    registers: Mmio,
    offset: usize,
    queue: u16,
    with_position: bool,
}

impl Bell {
    /// Tells the device to look at the queue.
    #[inline(always)]
    pub(super) fn ring(&self, ring: &DriverRing) {
        if self.with_position {
            let position = u32::from(ring.notification_position());
            self.registers
                .write32(self.offset, u32::from(self.queue) | position << 16);
        } else {
            self.registers.write16(self.offset, self.queue);
        }
    }
}

impl Transport {
    /// Walks the device's capabilities. The first of each type is used, as section 4.1.4.1 says.
    pub(super) fn find(device: &dyn Device) -> Result<Transport, DeviceError> {
        let info = device
            .pci()
            .ok_or(DeviceError::Unsupported("virtio without PCI"))?;
        let (mut common, mut notify, mut config) = (None, None, None);
        for cap in info.all(CAP_VENDOR) {
            let byte = |at: usize| device.config_read(cap.offset + at, 1);
            let word = |at: usize| device.config_read(cap.offset + at, 4);
            let kind = byte(CAP_TYPE)?;
            let short = byte(CAP_LEN)? < if kind == TYPE_NOTIFY { 20 } else { 16 };
            let (bar, bad) = (byte(CAP_BAR)?, |reason| DeviceError::Capability {
                offset: cap.offset,
                reason,
            });
            if !matches!(kind, TYPE_COMMON | TYPE_NOTIFY | TYPE_DEVICE) || bar > 5 {
                // Other types, and BARs that are reserved, are to be ignored.
                continue;
            }
            if short {
                return Err(bad("shorter than its type needs"));
            }
            let (offset, len) = (word(CAP_OFFSET)? as usize, word(CAP_LENGTH)? as usize);
            let place = match kind {
                TYPE_COMMON => &mut common,
                TYPE_NOTIFY => &mut notify,
                _ => &mut config,
            };
            if place.is_none() {
                let multiplier = if kind == TYPE_NOTIFY {
                    word(CAP_NOTIFY_MULTIPLIER)?
                } else {
                    0
                };
                *place = Some((device.region(bar)?.window(offset, len)?, multiplier));
            }
        }
        let missing = DeviceError::Unsupported("virtio before version 1");
        let (Some((common, _)), Some((notify, notify_multiplier)), Some((config, _))) =
            (common, notify, config)
        else {
            return Err(missing);
        };
        Ok(Transport {
            common: common.window(0, COMMON_LEN)?,
            notify,
            notify_multiplier,
            config,
        })
    }

    /// Resets the device and waits until it says that it is done.
    pub(super) fn reset(&self) -> Result<(), DeviceError> {
        self.common.write8(DEVICE_STATUS, 0);
        let end = Instant::now() + RESET_PATIENCE;
        loop {
            match self.common.read8(DEVICE_STATUS) {
                0 => return Ok(()),
                0xff => return Err(DeviceError::Gone),
                _ if Instant::now() > end => {
                    return Err(DeviceError::Broken("the device does not reset".into()));
                }
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    /// Stops the device without waiting.
    pub(super) fn halt(&self) {
        self.common.write8(DEVICE_STATUS, 0);
    }

    /// Steps 1 to 6 of the initialisation (section 3.1.1): `choose` picks from what is offered.
    pub(super) fn negotiate(
        &self,
        choose: impl FnOnce(u64) -> Result<u64, DeviceError>,
    ) -> Result<u64, DeviceError> {
        self.reset()?;
        self.common.write8(DEVICE_STATUS, ACKNOWLEDGE);
        self.common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER);
        let half = |select| {
            self.common.write32(DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read32(DEVICE_FEATURE))
        };
        let offered = half(0) | half(1) << 32;
        if offered & feature::VERSION_1 == 0 {
            return Err(DeviceError::Unsupported("virtio before version 1"));
        }
        let chosen = choose(offered)? & offered;
        let [low, high] = [chosen & 0xffff_ffff, chosen >> 32];
        for (select, bits) in [(0, low), (1, high)] {
            self.common.write32(DRIVER_FEATURE_SELECT, select);
            self.common
                .write32(DRIVER_FEATURE, u32::try_from(bits).unwrap_or(0));
        }
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.common.write8(DEVICE_STATUS, status);
        if self.common.read8(DEVICE_STATUS) & FEATURES_OK == 0 {
            return Err(DeviceError::Broken(
                "the device refuses the features".into(),
            ));
        }
        Ok(chosen)
    }

    /// Step 8: the device lives.
    pub(super) fn start(&self) {
        fence_full();
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.common.write8(DEVICE_STATUS, status);
    }

    /// Whether the device works; an error of its own or its removal are told apart by nobody here.
    pub(super) fn healthy(&self) -> bool {
        let status = self.common.read8(DEVICE_STATUS);
        status != 0xff && status & NEEDS_RESET == 0 && status & DRIVER_OK != 0
    }

    pub(super) fn queues(&self) -> u16 {
        self.common.read16(NUM_QUEUES)
    }

    /// Changes when the device-specific configuration does.
    pub(super) fn generation(&self) -> u8 {
        self.common.read8(CONFIG_GENERATION)
    }

    /// Largest size of a queue; 0 when it is not there.
    pub(super) fn queue_size(&self, queue: u16) -> u16 {
        self.common.write16(QUEUE_SELECT, queue);
        self.common.read16(QUEUE_SIZE)
    }

    /// No interrupt for changes of the configuration.
    pub(super) fn without_config_interrupt(&self) {
        self.common.write16(CONFIG_MSIX_VECTOR, NO_VECTOR);
    }

    /// Describes a queue and enables it.
    pub(super) fn enable_queue(
        &self,
        queue: u16,
        size: u16,
        areas: &Areas,
        vector: u16,
    ) -> Result<(), DeviceError> {
        let c = &self.common;
        c.write16(QUEUE_SELECT, queue);
        c.write16(QUEUE_SIZE, size);
        c.write16(QUEUE_MSIX_VECTOR, vector);
        if c.read16(QUEUE_MSIX_VECTOR) != vector {
            return Err(DeviceError::Broken("no interrupt for a queue".into()));
        }
        for (at, area) in [
            (QUEUE_DESC, &areas.descriptors),
            (QUEUE_DRIVER, &areas.driver),
            (QUEUE_DEVICE, &areas.device),
        ] {
            let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).unwrap_or(0);
            c.write32(at, half(area.iova()));
            c.write32(at + 4, half(area.iova() >> 32));
        }
        c.write16(QUEUE_ENABLE, 1);
        Ok(())
    }

    /// Where a queue is told of; section 4.1.4.4.
    pub(super) fn bell(&self, queue: u16, features: u64) -> Result<Bell, DeviceError> {
        self.common.write16(QUEUE_SELECT, queue);
        let place =
            u64::from(self.common.read16(QUEUE_NOTIFY_OFF)) * u64::from(self.notify_multiplier);
        let with_position = features & feature::NOTIFICATION_DATA != 0;
        let len = if with_position { 4 } else { 2 };
        let offset = usize::try_from(place).unwrap_or(usize::MAX);
        let size = self.notify.len();
        if offset.checked_add(len).is_none_or(|end| end > size) || !offset.is_multiple_of(len) {
            return Err(DeviceError::Window { offset, len, size });
        }
        Ok(Bell {
            registers: self.notify.clone(),
            offset,
            queue,
            with_position,
        })
    }
}
