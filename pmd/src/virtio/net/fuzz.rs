//! A device that writes whatever it is told to, for fuzzing.

use std::sync::Arc;

use super::VirtioNetPort;
use super::model::{Features, Model};
use crate::arena::{Arena, ArenaConfig};
use crate::nic::NicOptions;
use crate::pool::Pool;
use crate::port::{Port, PortQueue};

/// Runs the driver against a device that `data` plays: split or packed rings. Panics when a frame is lost, when one is there
/// twice, or when the device still runs at the end.
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_device(data: &[u8]) {
    let Ok(arena) = Arena::new(ArenaConfig {
        frames: 512,
        lock: false,
        ..ArenaConfig::default()
    }) else {
        return;
    };
    let mut data = data.iter().copied();
    let model = Model::new(Features {
        packed: data.next().unwrap_or(0) & 1 != 0,
        pairs: 2,
        ..Features::default()
    });
    let Ok(device) = model.device(4) else { return };
    let options = NicOptions {
        rx_ring: Some(32),
        tx_ring: Some(32),
        ..NicOptions::default()
    };
    let Ok(port) = VirtioNetPort::open(Arc::new(device), &options) else {
        return;
    };
    let Some(control) = port.control() else {
        return;
    };
    let Ok(mut queues) = port.open_queues(2, &arena) else {
        return;
    };
    let mut pool = Pool::new(&arena, 32);
    let (mut frames, mut out) = (Vec::new(), Vec::new());
    let mut pauses = 0;
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        let q = u16::from(what & 3);
        match what >> 2 & 7 {
            0 => {
                let (area, at) = (usize::from(byte()), u64::from(byte()) * 8);
                let value = std::array::from_fn(|_| byte());
                model.scribble(q, area, at, u64::from_le_bytes(value));
            }
            // Near the truth: a buffer of the ring, a length about the limit.
            1 => model.lie(q, u32::from(byte() & 31), u32::from(byte()) * 7),
            2 => model.lie(q, u32::from_le_bytes([byte(), byte(), 0, 0]), u32::MAX),
            3 => {
                let bytes = vec![what; 14 + usize::from(byte()) * 6];
                model.receive(q & 1, &bytes);
            }
            4 => drop(model.transmit(q & 1, usize::from(byte()))),
            5 => model.fail(),
            6 => control.request_reset(),
            // Devices are not started again at once.
            _ if pauses < 2 && !model.live() => {
                pauses += 1;
                std::thread::sleep(std::time::Duration::from_millis(101));
            }
            _ => model.set_link(byte() & 1 != 0),
        }
        for _ in 0..what >> 4 {
            if let Some(mut frame) = pool.get_spare() {
                frame.set_data(&[what; 64]);
                frames.push(frame);
            }
        }
        for queue in &mut queues {
            queue.tx_burst(&mut pool, &mut frames);
            queue.rx_burst(&mut pool, &mut out, 8);
            queue.flush(&mut pool);
            if what & 0x80 != 0 {
                queue.arm();
            }
        }
        pool.put_bulk(&mut frames);
        pool.put_bulk(&mut out);
    }
    for queue in &mut queues {
        queue.drain(&mut pool);
    }
    drop((queues, pool));
    assert_eq!(arena.outstanding(), 0, "frames lost");
    assert!(!model.bus().bus_master() && !model.live());
}
