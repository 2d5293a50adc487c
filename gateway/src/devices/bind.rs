//! Giving a device to vfio-pci, and back to the kernel.
//!
//! `driver_override` names the one driver that may take the device, so that no other device with the same ID is touched. The
//! former driver is remembered; when a step fails everything is put back.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::IpAddr;

use pmd::device::pci::Address;

use super::{Interfaces, Machine, VFIO};

/// Why a device is not handed over. Nothing was changed, or all was put back.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Not an address.
    #[error("\"{0}\" is no PCI address such as 0000:01:00.0")]
    Address(String),
    /// No such device.
    #[error("there is no device {0}")]
    NoDevice(Address),
    /// Not a NIC.
    #[error("{0} is no network device")]
    NotNetwork(Address),
    /// No driver of ours.
    #[error("no driver for {0} here; use its kernel driver and kind = \"af_xdp\"")]
    NoDriver(Address),
    /// The other driver is not there.
    #[error("the kernel driver vfio-pci is not loaded; try: modprobe vfio-pci")]
    NoVfio,
    /// No IOMMU.
    #[error(
        "no IOMMU confines {0}: turn one on (firmware; intel_iommu=on), or pass --no-iommu if the kernel has VFIO's mode without it"
    )]
    NoIommu(Address),
    /// The group would be split.
    #[error("{address} shares IOMMU group {group} with {others}, which the kernel uses")]
    GroupInUse {
        /// Device.
        address: Address,
        /// Group.
        group: u32,
        /// Other devices and their drivers.
        others: String,
    },
    /// The machine is reached through it.
    #[error("{address} is {interface}, which carries the default route")]
    DefaultRoute {
        /// Device.
        address: Address,
        /// Interface.
        interface: String,
    },
    /// Somebody uses it.
    #[error("{address} is {interface}, which has addresses ({addresses}); take them away first")]
    HasAddresses {
        /// Device.
        address: Address,
        /// Interface.
        interface: String,
        /// Addresses.
        addresses: String,
    },
    /// Somebody uses it.
    #[error("{address} is {interface}, which is part of {of}; take it out first")]
    Enslaved {
        /// Device.
        address: Address,
        /// Interface.
        interface: String,
        /// Bond or bridge.
        of: String,
    },
    /// Nothing to give back.
    #[error("{address} is not bound to vfio-pci but to {driver}")]
    NotBound {
        /// Device.
        address: Address,
        /// Driver, or `nothing`.
        driver: String,
    },
    /// A program has it open.
    #[error("a program uses {0}; stop it first")]
    InUse(Address),
    /// The kernel did not do it.
    #[error("{step} {address}: {source}")]
    System {
        /// Device.
        address: Address,
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel accepted every step, and yet.
    #[error("{address} was not taken by {wanted}; the kernel log says why")]
    NotTaken {
        /// Device.
        address: Address,
        /// Driver that should have it.
        wanted: String,
    },
}

impl Machine {
    /// Gives the device to vfio-pci. Returns its former driver. Nothing to do when it is there already.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(
        &self,
        address: &str,
        interfaces: &Interfaces,
        without_iommu: bool,
    ) -> Result<Option<String>, BindError> {
        let address = self.known(address)?;
        let former = self.driver(address);
        if former.as_deref() == Some(VFIO) {
            return Ok(former);
        }
        self.may_bind(address, interfaces, without_iommu)?;
        if let Some(driver) = &former {
            self.remember(address, driver)?;
        }
        match self.hand_over(address, former.as_deref(), VFIO) {
            Ok(()) => Ok(former),
            Err(e) => {
                self.put_back(address, former.as_deref());
                Err(e)
            }
        }
    }

    /// Gives the device back to the kernel driver that it had. Returns the driver that it has now.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn unbind(&self, address: &str) -> Result<Option<String>, BindError> {
        let address = self.known(address)?;
        let now = self.driver(address);
        if now.as_deref() != Some(VFIO) {
            return Err(BindError::NotBound {
                address,
                driver: now.unwrap_or_else(|| "nothing".into()),
            });
        }
        if self.is_open(address) {
            return Err(BindError::InUse(address));
        }
        let former = fs::read_to_string(self.memory(address)).ok();
        // An empty override lets every driver that knows the device take it.
        self.tell(address, "driver_override", "\n", "reset driver_override of")?;
        self.tell(
            address,
            "driver/unbind",
            &address.to_string(),
            "take vfio-pci from",
        )?;
        self.probe(address)?;
        if let (None, Some(former)) = (self.driver(address), &former) {
            // Drivers that do not probe by ID take it when asked by name.
            let bind = self.pci().join("drivers").join(former).join("bind");
            let _ = (self.write)(&bind, &address.to_string());
        }
        // It may be gone already: the file is only a memory.
        let _ = fs::remove_file(self.memory(address));
        let now = self.driver(address);
        match former {
            Some(wanted) if now.is_none() => Err(BindError::NotTaken { address, wanted }),
            _ => Ok(now),
        }
    }

    fn known(&self, text: &str) -> Result<Address, BindError> {
        let address = Address::parse(text).ok_or_else(|| BindError::Address(text.into()))?;
        if !self.path(address).exists() {
            return Err(BindError::NoDevice(address));
        }
        Ok(address)
    }

    fn may_bind(
        &self,
        address: Address,
        interfaces: &Interfaces,
        without_iommu: bool,
    ) -> Result<(), BindError> {
        if self.hex(address, "class").is_none_or(|c| c >> 16 != 2) {
            return Err(BindError::NotNetwork(address));
        }
        let device = self.device(address);
        if device.gateway_driver.is_none() {
            return Err(BindError::NoDriver(address));
        }
        for i in &device.interfaces {
            let interface = i.name.clone();
            if interfaces.default_routes.contains(&interface) {
                return Err(BindError::DefaultRoute { address, interface });
            }
            if let Some(list) = interfaces.addresses.get(&interface) {
                let list: Vec<_> = list.iter().map(IpAddr::to_string).collect();
                return Err(BindError::HasAddresses {
                    address,
                    interface,
                    addresses: list.join(", "),
                });
            }
            let master = self.sys.join("class/net").join(&interface).join("master");
            if let Some(of) = super::last_of_link(&master) {
                return Err(BindError::Enslaved {
                    address,
                    interface,
                    of,
                });
            }
        }
        if !device.group_in_use_by.is_empty() {
            return Err(BindError::GroupInUse {
                address,
                group: device.iommu_group.unwrap_or(0),
                others: device.group_in_use_by.join(", "),
            });
        }
        if device.iommu_group.is_none() && !without_iommu {
            return Err(BindError::NoIommu(address));
        }
        if !self.pci().join("drivers").join(VFIO).exists() {
            return Err(BindError::NoVfio);
        }
        Ok(())
    }

    fn hand_over(&self, address: Address, former: Option<&str>, to: &str) -> Result<(), BindError> {
        self.tell(address, "driver_override", to, "set driver_override of")?;
        if former.is_some() {
            self.tell(
                address,
                "driver/unbind",
                &address.to_string(),
                "take the kernel driver from",
            )?;
        }
        self.probe(address)?;
        if self.driver(address).as_deref() != Some(to) {
            return Err(BindError::NotTaken {
                address,
                wanted: to.into(),
            });
        }
        Ok(())
    }

    /// As it was, as far as the kernel lets us.
    fn put_back(&self, address: Address, former: Option<&str>) {
        let _ = self.tell(address, "driver_override", "\n", "");
        if former.is_some() && self.driver(address).is_none() {
            let _ = self.probe(address);
        }
        let _ = fs::remove_file(self.memory(address));
    }

    fn tell(
        &self,
        address: Address,
        file: &str,
        text: &str,
        step: &'static str,
    ) -> Result<(), BindError> {
        (self.write)(&self.path(address).join(file), text).map_err(|source| BindError::System {
            address,
            step,
            source,
        })
    }

    fn probe(&self, address: Address) -> Result<(), BindError> {
        let file = self.pci().join("drivers_probe");
        (self.write)(&file, &address.to_string()).map_err(|source| BindError::System {
            address,
            step: "find a driver for",
            source,
        })
    }

    fn memory(&self, address: Address) -> std::path::PathBuf {
        self.state.join(address.to_string())
    }

    fn remember(&self, address: Address, driver: &str) -> Result<(), BindError> {
        fs::create_dir_all(&self.state)
            .and_then(|()| fs::write(self.memory(address), driver))
            .map_err(|source| BindError::System {
                address,
                step: "remember the driver of",
                source,
            })
    }

    /// The kernel would wait, without end, until the program that has the device closes it. A group can be open once only.
    fn is_open(&self, address: Address) -> bool {
        let Some(group) = self.group(address) else {
            return false;
        };
        let name = fs::read_to_string(self.path(address).join("iommu_group/name"));
        let file = match name {
            Ok(name) if name.trim() == "vfio-noiommu" => format!("vfio/noiommu-{group}"),
            _ => format!("vfio/{group}"),
        };
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.dev.join(file));
        opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
    }
}
