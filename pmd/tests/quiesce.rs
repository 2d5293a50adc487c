//! A process of its own: the panic hook stops every device that the process has.

use std::sync::Arc;

use pmd::device::model::{ModelBus, ModelDevice};
use pmd::device::{Device, IovaClass};
use pmd::quiesce::{install_panic_hook, register, stop_all};

fn device() -> (Arc<ModelBus>, Arc<dyn Device>) {
    let bus = ModelBus::new();
    let mut config = vec![0; 256];
    config[0] = 1;
    let device = ModelDevice::new("model", &bus, config, []).unwrap();
    device.set_bus_master(true).unwrap();
    let device: Arc<dyn Device> = Arc::new(device);
    register(&device, None);
    (bus, device)
}

#[test]
fn a_panic_stops_every_device_that_still_lives() {
    let (gone, dropped) = device();
    drop(dropped);
    assert!(!gone.bus_master());
    let (bus, device) = device();
    let memory = device.dma_alloc(64, 64, IovaClass::Any).unwrap();
    bus.write_u64(memory.iova(), 1).unwrap();
    install_panic_hook();
    assert!(std::thread::spawn(|| panic!("on purpose")).join().is_err());
    assert!(!bus.bus_master());
    assert!(bus.write_u64(memory.iova(), 2).is_err());
    assert_eq!(memory.read64(0), 1);
    assert_eq!(stop_all(), 1);
}
