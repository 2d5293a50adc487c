//! Stopping all devices at once, when the program is about to end without its destructors: a panic in a release build aborts.
//!
//! With an IOMMU the kernel stops a device when the last file of it is closed; without one nobody does. So the panic hook
//! calls [`stop_all`], which needs no allocation and takes no lock that the panicking thread may hold for long.

use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::nic::NicControl;

/// How long [`stop_all`] waits for somebody who is adding a device.
const PATIENCE: Duration = Duration::from_millis(100);

struct Entry {
    device: Weak<dyn Device>,
    control: Option<Weak<dyn NicControl>>,
}

static DEVICES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// Adds a device that moves frames. It leaves by itself when it is dropped.
pub fn register(device: &Arc<dyn Device>, control: Option<&Arc<dyn NicControl>>) {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    devices.retain(|e| e.device.strong_count() > 0);
    devices.push(Entry {
        device: Arc::downgrade(device),
        control: control.map(Arc::downgrade),
    });
}

/// Stops every device: its queues by the driver, its transfers by the bus-master bit. Returns how many could be stopped.
///
/// For a process that ends: the devices are of no use afterwards.
pub fn stop_all() -> usize {
    let begin = Instant::now();
    let devices = loop {
        match DEVICES.try_lock() {
            Ok(d) => break d,
            Err(TryLockError::Poisoned(e)) => break e.into_inner(),
            Err(TryLockError::WouldBlock) if begin.elapsed() < PATIENCE => std::hint::spin_loop(),
            Err(TryLockError::WouldBlock) => return 0,
        }
    };
    let mut stopped = 0;
    for entry in devices.iter() {
        let Some(device) = entry.device.upgrade() else {
            continue;
        };
        // First what cannot fail half-way; then the driver's own way, which some devices need to be usable again.
        let off = device.set_bus_master(false).is_ok();
        if let Some(control) = entry.control.as_ref().and_then(Weak::upgrade) {
            control.quiesce();
            // It must not free anything here, whoever else drops it meanwhile.
            std::mem::forget(control);
        }
        std::mem::forget(device);
        stopped += usize::from(off);
    }
    stopped
}

/// Names of devices that the system wants to have back since the last call: see [`Device::removal_requested`].
pub fn wanted_back() -> Vec<String> {
    let devices: Vec<_> = {
        let all = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(|e| e.device.upgrade()).collect()
    };
    devices
        .iter()
        .filter(|d| d.removal_requested())
        .map(|d| d.name().to_owned())
        .collect()
}

/// Puts [`stop_all`] in front of the panic hook that is set. Once a process.
pub fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            stop_all();
            before(info);
        }));
    });
}
