//! `devices`, `bind`, `unbind`: NICs for ports of kind vfio.

use clap::Args;

use super::Failure;
use super::table::print;
use crate::devices::{Interfaces, Machine, NetDevice};

/// `devices`
#[derive(Debug, Args)]
pub(super) struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `bind`
#[derive(Debug, Args)]
pub(super) struct BindArgs {
    /// PCI address, as `devices` shows it.
    address: String,
    /// Although no IOMMU would confine the device.
    #[arg(long)]
    no_iommu: bool,
}

/// `unbind`
#[derive(Debug, Args)]
pub(super) struct UnbindArgs {
    /// PCI address, as `devices` shows it.
    address: String,
}

pub(super) fn devices(args: &DevicesArgs) -> Result<(), Failure> {
    let list = Machine::this()
        .devices()
        .map_err(|e| Failure::failed(format!("cannot list PCI devices: {e}")))?;
    if args.json {
        println!(
            "{:#}",
            serde_json::to_value(&list).map_err(Failure::failed)?
        );
        return Ok(());
    }
    let rows: Vec<_> = list.iter().map(row).collect();
    let headings = [
        "address",
        "id",
        "kernel driver",
        "driver here",
        ">group",
        ">node",
        "interface",
        "link",
        "usable",
        "why",
    ];
    print(&headings, &rows);
    Ok(())
}

fn row(d: &NetDevice) -> Vec<String> {
    let dash = |t: Option<String>| t.unwrap_or_else(|| "-".into());
    let names: Vec<_> = d.interfaces.iter().map(|i| i.name.as_str()).collect();
    let link = d.interfaces.first().and_then(|i| match (i.link, i.mbps) {
        (Some(true), Some(n)) => Some(format!("{n} Mbit/s")),
        (Some(true), None) => Some("up".into()),
        (Some(false), _) => Some("down".into()),
        (None, _) => None,
    });
    vec![
        d.address.clone(),
        d.id.clone(),
        dash(d.driver.clone()),
        dash(d.gateway_driver.map(str::to_owned)),
        dash(d.iommu_group.map(|g| g.to_string())),
        dash(d.numa_node.map(|n| n.to_string())),
        if names.is_empty() {
            "-".into()
        } else {
            names.join(",")
        },
        dash(link),
        d.usable.text().into(),
        d.reason.clone(),
    ]
}

pub(super) fn bind(args: &BindArgs) -> Result<(), Failure> {
    let interfaces = Interfaces::here()
        .map_err(|e| Failure::failed(format!("cannot see the interfaces: {e}")))?;
    let former = Machine::this()
        .bind(&args.address, &interfaces, args.no_iommu)
        .map_err(Failure::failed)?;
    match former.as_deref() {
        Some("vfio-pci") => println!("{} was bound to vfio-pci already", args.address),
        Some(driver) => println!(
            "{} is bound to vfio-pci; `esplanade unbind {0}` gives it back to {driver}",
            args.address
        ),
        None => println!("{} is bound to vfio-pci", args.address),
    }
    Ok(())
}

pub(super) fn unbind(args: &UnbindArgs) -> Result<(), Failure> {
    let now = Machine::this()
        .unbind(&args.address)
        .map_err(Failure::failed)?;
    let driver = now.unwrap_or_else(|| "no driver".into());
    println!("{} is back with {driver}", args.address);
    Ok(())
}
