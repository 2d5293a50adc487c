//! Drivers of network devices, and the one table that chooses among them.

use std::sync::Arc;

use crate::device::{Device, DeviceError};
use crate::port::{Port, PortError};
use crate::quiesce;

pub(crate) mod attempts;

/// What the operator wants of a NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicOptions {
    /// Name of the port.
    pub name: String,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Whether frames for other addresses are received.
    pub promiscuous: bool,
    /// Whether frames for all multicast addresses are received.
    pub all_multicast: bool,
    /// Descriptors in a receive ring; the driver's default when `None`.
    pub rx_ring: Option<u32>,
    /// Descriptors in a send ring; the driver's default when `None`.
    pub tx_ring: Option<u32>,
    /// Whether drivers that no bed and no board has verified may be used.
    pub experimental: bool,
}

impl Default for NicOptions {
    fn default() -> Self {
        NicOptions {
            name: "nic".into(),
            mtu: 1500,
            promiscuous: false,
            all_multicast: true,
            rx_ring: None,
            tx_ring: None,
            experimental: false,
        }
    }
}

/// State of the cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// Whether frames can pass.
    pub up: bool,
    /// Megabits per second; 0 when unknown.
    pub mbps: u32,
    /// Whether both directions can be used at once.
    pub full_duplex: bool,
}

/// What control may ask and tell a NIC while workers own its queues. Never called on the packet path.
pub trait NicControl: Send + Sync {
    /// State of the link.
    fn link(&self) -> Link;

    /// The device's own counters: names as in the datasheet, in lower case with underscores; values count without end.
    fn statistics(&self) -> Vec<(&'static str, u64)>;

    /// How often the driver found the device breaking its rules, by rule, since it was opened.
    fn device_errors(&self) -> Vec<(&'static str, u64)>;

    /// Chooses which frames are received.
    ///
    /// # Errors
    /// What the device refuses.
    fn set_promiscuous(&self, on: bool) -> Result<(), DeviceError>;

    /// Asks the owners of the queues to reset the device and begin anew, as after a device error.
    fn request_reset(&self);

    /// Stops receive, send and bus-master. Called at shutdown and from the panic hook: takes no lock that a worker may hold,
    /// and allocates nothing.
    fn quiesce(&self);
}

/// Opens a device as a port.
pub type OpenNic = fn(Arc<dyn Device>, &NicOptions) -> Result<Box<dyn Port>, PortError>;

/// One driver.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    /// As shown to people: `virtio-net`.
    pub name: &'static str,
    /// PCI vendor and device IDs that it drives.
    pub ids: &'static [(u16, u16)],
    /// True until it was verified on a bed or a board.
    pub experimental: bool,
    /// Makes a port of a device with one of these IDs.
    pub open: OpenNic,
}

/// All drivers. No ID is in two of them.
pub const DRIVERS: &[Driver] = &[
    crate::intel::e1000e::DRIVER,
    crate::intel::e1000e::PCH_DRIVER,
    crate::intel::igb::DRIVER,
    crate::intel::ixgbe::DRIVER,
    crate::intel::ixgbevf::DRIVER,
    crate::virtio::net::DRIVER,
    crate::vmxnet3::DRIVER,
];

/// The driver for a PCI device.
pub fn driver_of(vendor: u16, device: u16) -> Option<&'static Driver> {
    DRIVERS.iter().find(|d| d.ids.contains(&(vendor, device)))
}

/// Opens the device with the driver that knows it.
///
/// # Errors
/// [`PortError::UnknownDevice`] when none does, [`PortError::Setting`] for an experimental driver that was not asked for, and
/// what the driver refuses.
pub fn open(device: Arc<dyn Device>, options: &NicOptions) -> Result<Box<dyn Port>, PortError> {
    let (vendor, id) = device.pci().map_or((0, 0), |p| (p.vendor, p.device));
    let Some(driver) = driver_of(vendor, id) else {
        return Err(PortError::UnknownDevice {
            port: options.name.clone(),
            vendor,
            device: id,
        });
    };
    if driver.experimental && !options.experimental {
        return Err(PortError::Setting {
            port: options.name.clone(),
            reason: format!(
                "the driver {} has not been verified on hardware; allow it with experimental = true",
                driver.name
            ),
        });
    }
    tracing::info!(port = %options.name, device = device.name(), driver = driver.name, "opening device");
    let port = (driver.open)(Arc::clone(&device), options)?;
    quiesce::register(&device, port.control().as_ref());
    Ok(port)
}

#[cfg(test)]
mod bed;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::model::{ModelBus, ModelDevice};

    #[test]
    fn a_device_has_one_driver_at_most() {
        let mut ids: Vec<_> = DRIVERS.iter().flat_map(|d| d.ids).collect();
        let n = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), n);
    }

    #[test]
    fn an_unknown_device_is_named() {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        let device = ModelDevice::new("model", &ModelBus::new(), config, []).unwrap();
        let refused = open(Arc::new(device), &NicOptions::default())
            .err()
            .unwrap();
        assert_eq!(
            refused.to_string(),
            "port nic: no driver for device 1234:5678"
        );
    }
}
