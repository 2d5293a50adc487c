//! Panics while two NICs move frames: `VFIO_DEVICES="ADDRESS ADDRESS" panic_stops`. The hook must have taken the bus-master
//! right from both before anything else happens; with `panic = "abort"` no destructor runs afterwards.
//!
//! Prints the command registers as the kernel sees them, before the panic and inside the hook, behind the part that stops the
//! devices. Ends by the panic.

use std::error::Error;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pmd::device::Device;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::nic::{self, NicOptions};
use pmd::{Arena, ArenaConfig, Pool};

fn main() -> Result<(), Box<dyn Error>> {
    let names: Vec<String> = std::env::var("VFIO_DEVICES")?
        .split_whitespace()
        .map(Into::into)
        .collect();
    let inside = names.clone();
    // Set first: install_panic_hook goes in front of it.
    std::panic::set_hook(Box::new(move |info| {
        println!("panic_stops: {info}");
        show("in the hook", &inside);
    }));
    pmd::quiesce::install_panic_hook();
    let arena = Arena::new(ArenaConfig {
        frames: 4096,
        ..ArenaConfig::default()
    })?;
    let mut pool = Pool::new(&arena, 256);
    let mut queues = Vec::new();
    let mut macs = Vec::new();
    for name in &names {
        let device: Arc<dyn Device> = Arc::new(VfioDevice::pci(name, Protection::Iommu)?);
        let port = nic::open(device, &NicOptions::default())?;
        macs.push(port.info().mac.0);
        queues.extend(port.queues(1, &arena)?);
    }
    let [to, from] = macs[..] else {
        return Err("two devices are needed".into());
    };
    let frame: Vec<u8> = [&to[..], &from[..], &[0x88, 0xb5], &[7; 46]].concat();
    let (mut frames, mut out, mut received) = (Vec::new(), Vec::new(), 0u64);
    let begin = Instant::now();
    let mut panicking = false;
    // Until the panic ends all: under load.
    while begin.elapsed() < Duration::from_secs(30) {
        for _ in 0..32 {
            if let Some(mut f) = pool.get() {
                f.set_data(&frame);
                frames.push(f);
            }
        }
        queues[1].tx_burst(&mut pool, &mut frames);
        pool.put_bulk(&mut frames);
        received += queues[0].rx_burst(&mut pool, &mut out, 64) as u64;
        pool.put_bulk(&mut out);
        if received > 1000 && !panicking {
            panicking = true;
            println!("panic_stops: {received} frames have passed");
            show("before", &names);
            std::thread::spawn(|| panic!("on purpose"));
        }
    }
    Err("the panic did not end the program".into())
}

/// The command registers, by another way than the driver's.
fn show(when: &str, names: &[String]) {
    for name in names {
        let config = std::fs::read(format!("/sys/bus/pci/devices/{name}/config"));
        let bit = config.ok().and_then(|c| c.get(4).map(|b| b >> 2 & 1));
        println!("panic_stops: {when}: {name} bus-master {bit:?}");
    }
    let _ = std::io::stdout().flush();
}
