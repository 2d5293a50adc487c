//! Network devices of the machine, as sysfs shows them: which the gateway can own, and how to give them to it and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pmd::device::pci::Address;
use serde::Serialize;

mod bind;
mod interfaces;

pub use bind::BindError;
pub use interfaces::Interfaces;

/// The driver that hands devices to programs.
const VFIO: &str = "vfio-pci";

/// Writes text to a file of sysfs.
type Write = Box<dyn Fn(&Path, &str) -> io::Result<()>>;

/// Where the kernel shows devices, and how it is told about them. Tests bring a tree of their own.
pub struct Machine {
    sys: PathBuf,
    dev: PathBuf,
    /// Remembers the former drivers of bound devices.
    state: PathBuf,
    write: Write,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDevice {
    /// PCI address.
    pub address: String,
    /// PCI vendor and device ID: `8086:10d3`.
    pub id: String,
    /// Kernel driver that it is bound to.
    pub driver: Option<String>,
    /// The gateway's driver for it.
    pub gateway_driver: Option<&'static str>,
    /// IOMMU group.
    pub iommu_group: Option<u32>,
    /// Other devices of the group that the kernel drives.
    pub group_in_use_by: Vec<String>,
    /// NUMA node.
    pub numa_node: Option<u32>,
    /// Interfaces that the kernel has made of it.
    pub interfaces: Vec<Interface>,
    /// What to do to use it.
    pub usable: Usable,
    /// Why, or why not.
    pub reason: String,
}

/// A kernel interface of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Whether there is a link; unknown while the interface is down.
    pub link: Option<bool>,
    /// Megabits per second.
    pub mbps: Option<u32>,
}

/// Whether the gateway can own a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Usable {
    /// Bound: a port of kind vfio can open it.
    Now,
    /// After `esplanade bind`.
    AfterBind,
    /// Not as it is.
    No,
}

impl Usable {
    /// For tables.
    pub fn text(self) -> &'static str {
        match self {
            Usable::Now => "yes",
            Usable::AfterBind => "bind first",
            Usable::No => "no",
        }
    }
}

impl Machine {
    /// This machine.
    pub fn this() -> Machine {
        Machine {
            sys: "/sys".into(),
            dev: "/dev".into(),
            state: "/run/esplanade/bound".into(),
            write: Box::new(|path, text| fs::write(path, text)),
        }
    }

    /// All network devices, by address.
    ///
    /// # Errors
    /// Sysfs cannot be read.
    pub fn devices(&self) -> io::Result<Vec<NetDevice>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(self.pci().join("devices"))? {
            let name = entry?.file_name();
            let Some(address) = name.to_str().and_then(Address::parse) else {
                continue;
            };
            // Base class 2: network controllers.
            if self.hex(address, "class").is_some_and(|c| c >> 16 == 2) {
                found.insert(address, self.device(address));
            }
        }
        Ok(found.into_values().collect())
    }

    fn device(&self, address: Address) -> NetDevice {
        let id = |name| self.hex(address, name).and_then(|n| u16::try_from(n).ok());
        let (vendor, device) = (id("vendor").unwrap_or(0), id("device").unwrap_or(0));
        let known = pmd::nic::driver_of(vendor, device);
        let driver = self.driver(address);
        let mut found = NetDevice {
            address: address.to_string(),
            id: format!("{vendor:04x}:{device:04x}"),
            gateway_driver: known.map(|d| d.name),
            iommu_group: self.group(address),
            group_in_use_by: self.group_in_use_by(address),
            numa_node: self.text(address, "numa_node").and_then(|t| t.parse().ok()),
            interfaces: self.interfaces(address),
            usable: Usable::No,
            reason: String::new(),
            driver,
        };
        (found.usable, found.reason) = judge(&found, known.is_some_and(|d| d.experimental));
        found
    }

    fn interfaces(&self, address: Address) -> Vec<Interface> {
        let mut names = BTreeSet::new();
        let here = self.path(address);
        collect_interfaces(&here.join("net"), &mut names);
        // A virtio device's interface hangs below its virtio function.
        for entry in fs::read_dir(&here).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("virtio") {
                collect_interfaces(&entry.path().join("net"), &mut names);
            }
        }
        let read = |name: &str, what: &str| {
            let path = self.sys.join("class/net").join(name).join(what);
            fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
        };
        names
            .into_iter()
            .map(|name| Interface {
                link: read(&name, "carrier").map(|c| c == "1"),
                mbps: read(&name, "speed")
                    .and_then(|s| s.parse().ok())
                    .filter(|&n| n > 0),
                name,
            })
            .collect()
    }

    fn pci(&self) -> PathBuf {
        self.sys.join("bus/pci")
    }

    fn path(&self, address: Address) -> PathBuf {
        self.pci().join("devices").join(address.to_string())
    }

    fn text(&self, address: Address, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(address).join(name)).ok()?;
        Some(text.trim().to_owned())
    }

    fn hex(&self, address: Address, name: &str) -> Option<u32> {
        let text = self.text(address, name)?;
        u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    }

    fn driver(&self, address: Address) -> Option<String> {
        last_of_link(&self.path(address).join("driver"))
    }

    fn group(&self, address: Address) -> Option<u32> {
        last_of_link(&self.path(address).join("iommu_group"))?
            .parse()
            .ok()
    }

    /// Other devices of the group with a kernel driver. Bridges' and VFIO's own drivers do not count: they move no data.
    fn group_in_use_by(&self, address: Address) -> Vec<String> {
        let members = fs::read_dir(self.path(address).join("iommu_group/devices"));
        let mut list: Vec<_> = members
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| Address::parse(e.file_name().to_str()?))
            .filter(|&other| other != address)
            .filter_map(|other| {
                let driver = self.driver(other)?;
                let harmless = [VFIO, "pci-stub", "pcieport"].contains(&driver.as_str());
                (!harmless).then(|| format!("{other} ({driver})"))
            })
            .collect();
        list.sort();
        list
    }
}

/// Whether a device can be used, and why.
fn judge(d: &NetDevice, experimental: bool) -> (Usable, String) {
    let no = |reason: String| (Usable::No, reason);
    if d.gateway_driver.is_none() {
        return match d.interfaces.first() {
            Some(i) => no(format!(
                "no driver for it here; use kind = \"af_xdp\" on {}",
                i.name
            )),
            None => no(
                "no driver for it here; give it to its kernel driver and use kind = \"af_xdp\""
                    .into(),
            ),
        };
    }
    if !d.group_in_use_by.is_empty() {
        return no(format!(
            "its IOMMU group {} is shared with {}",
            d.iommu_group.unwrap_or(0),
            d.group_in_use_by.join(", ")
        ));
    }
    let mut reason = match (d.driver.as_deref(), d.iommu_group) {
        (_, None) => {
            "no IOMMU confines it: turn one on (firmware; intel_iommu=on), or see no_iommu"
                .to_owned()
        }
        (Some(VFIO), Some(_)) => "bound to vfio-pci".to_owned(),
        (Some(driver), Some(_)) => format!("the kernel drives it ({driver})"),
        (None, Some(_)) => "no kernel driver".to_owned(),
    };
    if experimental {
        reason += "; the driver is experimental";
    }
    let usable = match d.driver.as_deref() {
        Some(VFIO) => Usable::Now,
        _ if d.iommu_group.is_none() => Usable::No,
        _ => Usable::AfterBind,
    };
    (usable, reason)
}

fn collect_interfaces(net: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(net).into_iter().flatten().flatten() {
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
}

fn last_of_link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests;
