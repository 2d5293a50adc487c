use std::cell::RefCell;
use std::os::unix::fs::symlink;
use std::rc::Rc;

use super::*;

/// A tree of sysfs whose files do what the kernel does when they are written.
struct Fake {
    _dir: tempfile::TempDir,
    machine: Machine,
    written: Rc<RefCell<Vec<String>>>,
}

const NIC: &str = "0000:03:00.0";

/// One vmxnet3 NIC that the kernel drives as eth9, alone in its group; a disk; a NIC that nobody here drives.
fn fake(vfio_takes_it: bool) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let sys = dir.path().join("sys");
    let device = |address: &str, class: &str, id: (&str, &str), group: &str, driver: &str| {
        let d = sys.join("bus/pci/devices").join(address);
        let g = sys.join("kernel/iommu_groups").join(group).join("devices");
        let r = sys.join("bus/pci/drivers").join(driver);
        for p in [&d, &g, &r] {
            fs::create_dir_all(p).unwrap();
        }
        fs::write(d.join("class"), class).unwrap();
        fs::write(d.join("vendor"), id.0).unwrap();
        fs::write(d.join("device"), id.1).unwrap();
        fs::write(d.join("numa_node"), "-1\n").unwrap();
        symlink(g.parent().unwrap(), d.join("iommu_group")).unwrap();
        symlink(&d, g.join(address)).unwrap();
        symlink(&r, d.join("driver")).unwrap();
    };
    device(NIC, "0x020000\n", ("0x15ad\n", "0x07b0\n"), "7", "vmxnet3");
    device(
        "0000:04:00.0",
        "0x010802\n",
        ("0x1b36\n", "0x0010\n"),
        "8",
        "nvme",
    );
    device(
        "0000:05:00.0",
        "0x020000\n",
        ("0x1d0f\n", "0xec20\n"),
        "9",
        "ena",
    );
    let net = sys.join("bus/pci/devices").join(NIC).join("net/eth9");
    fs::create_dir_all(&net).unwrap();
    let class = sys.join("class/net/eth9");
    fs::create_dir_all(&class).unwrap();
    fs::write(class.join("carrier"), "1\n").unwrap();
    fs::write(class.join("speed"), "10000\n").unwrap();
    fs::create_dir_all(sys.join("bus/pci/drivers/vfio-pci")).unwrap();
    let written = Rc::new(RefCell::new(Vec::new()));
    let log = Rc::clone(&written);
    let root = sys.clone();
    let write = move |path: &Path, text: &str| {
        let file = path.file_name().unwrap().to_str().unwrap();
        log.borrow_mut().push(format!("{file}={}", text.trim()));
        let device = root.join("bus/pci/devices").join(NIC);
        let link = device.join("driver");
        match file {
            "driver_override" => fs::write(device.join("wanted"), text.trim())?,
            "unbind" => fs::remove_file(link)?,
            "drivers_probe" if !link.exists() => {
                let wanted = fs::read_to_string(device.join("wanted")).unwrap_or_default();
                let driver = match wanted.as_str() {
                    "" => "vmxnet3",
                    "vfio-pci" if !vfio_takes_it => return Ok(()),
                    other => other,
                };
                symlink(root.join("bus/pci/drivers").join(driver), link)?;
            }
            _ => {}
        }
        Ok(())
    };
    let machine = Machine {
        dev: dir.path().join("dev"),
        state: dir.path().join("run/bound"),
        sys,
        write: Box::new(write),
    };
    Fake {
        _dir: dir,
        machine,
        written,
    }
}

fn free() -> Interfaces {
    Interfaces::default()
}

#[test]
fn network_devices_are_listed_with_what_can_be_done() {
    let f = fake(true);
    let list = f.machine.devices().unwrap();
    assert_eq!(list.len(), 2);
    let nic = &list[0];
    assert_eq!((nic.address.as_str(), nic.id.as_str()), (NIC, "15ad:07b0"));
    assert_eq!(nic.gateway_driver, Some("vmxnet3"));
    assert_eq!((nic.iommu_group, nic.numa_node), (Some(7), None));
    assert_eq!(
        (nic.usable, nic.driver.as_deref()),
        (Usable::AfterBind, Some("vmxnet3"))
    );
    assert_eq!(nic.interfaces[0].name, "eth9");
    assert_eq!(
        (nic.interfaces[0].link, nic.interfaces[0].mbps),
        (Some(true), Some(10_000))
    );
    assert_eq!(list[1].usable, Usable::No);
    assert!(list[1].reason.contains("af_xdp"), "{}", list[1].reason);
    f.machine.bind(NIC, &free(), false).unwrap();
    assert_eq!(f.machine.devices().unwrap()[0].usable, Usable::Now);
}

#[test]
fn a_device_goes_to_vfio_and_comes_back_to_its_driver() {
    let f = fake(true);
    let former = f.machine.bind(NIC, &free(), false).unwrap();
    assert_eq!(former.as_deref(), Some("vmxnet3"));
    let steps = [
        "driver_override=vfio-pci",
        "unbind=0000:03:00.0",
        "drivers_probe=0000:03:00.0",
    ];
    assert_eq!(*f.written.borrow(), steps);
    assert_eq!(
        f.machine.bind(NIC, &free(), false).unwrap().as_deref(),
        Some(VFIO)
    );
    assert_eq!(f.written.borrow().len(), 3);
    let now = f.machine.unbind(NIC).unwrap();
    assert_eq!(now.as_deref(), Some("vmxnet3"));
    assert!(!f.machine.state.join(NIC).exists());
    let refused = f.machine.unbind(NIC).unwrap_err().to_string();
    assert!(
        refused.ends_with("not bound to vfio-pci but to vmxnet3"),
        "{refused}"
    );
}

#[test]
fn what_the_machine_needs_is_not_taken() {
    let f = fake(true);
    let refuse = |interfaces: &Interfaces| f.machine.bind(NIC, interfaces, false).unwrap_err();
    let mut with = free();
    with.addresses
        .insert("eth9".into(), vec!["192.0.2.1".parse().unwrap()]);
    assert!(refuse(&with).to_string().contains("addresses (192.0.2.1)"));
    with.default_routes.insert("eth9".into());
    assert!(matches!(refuse(&with), BindError::DefaultRoute { .. }));
    let class = f.machine.sys.join("class/net/eth9");
    symlink("../br0", class.join("master")).unwrap();
    assert!(matches!(refuse(&free()), BindError::Enslaved { of, .. } if of == "br0"));
    fs::remove_file(class.join("master")).unwrap();
    // The disk moves into the NIC's group.
    let disk = f.machine.pci().join("devices/0000:04:00.0");
    symlink(
        &disk,
        f.machine
            .path(Address::parse(NIC).unwrap())
            .join("iommu_group/devices/0000:04:00.0"),
    )
    .unwrap();
    let shared = refuse(&free()).to_string();
    assert!(
        shared.contains("group 7 with 0000:04:00.0 (nvme)"),
        "{shared}"
    );
    assert_eq!(f.machine.devices().unwrap()[0].usable, Usable::No);
    assert!(f.written.borrow().is_empty());
}

#[test]
fn other_devices_and_other_machines_are_refused() {
    let f = fake(true);
    let refuse = |a: &str| f.machine.bind(a, &free(), false).unwrap_err();
    assert!(matches!(refuse("0000:04:00.0"), BindError::NotNetwork(_)));
    assert!(matches!(refuse("0000:05:00.0"), BindError::NoDriver(_)));
    assert!(matches!(refuse("0000:06:00.0"), BindError::NoDevice(_)));
    assert!(matches!(refuse("../../x"), BindError::Address(_)));
    fs::remove_dir(f.machine.pci().join("drivers/vfio-pci")).unwrap();
    assert!(matches!(refuse(NIC), BindError::NoVfio));
    fs::remove_file(
        f.machine
            .path(Address::parse(NIC).unwrap())
            .join("iommu_group"),
    )
    .unwrap();
    assert!(matches!(refuse(NIC), BindError::NoIommu(_)));
    assert!(f.written.borrow().is_empty());
}

#[test]
fn a_device_that_vfio_does_not_take_goes_back() {
    let f = fake(false);
    let refused = f.machine.bind(NIC, &free(), false).unwrap_err();
    assert!(matches!(refused, BindError::NotTaken { .. }), "{refused}");
    let address = Address::parse(NIC).unwrap();
    assert_eq!(f.machine.driver(address).as_deref(), Some("vmxnet3"));
    assert!(!f.machine.state.join(NIC).exists());
}
