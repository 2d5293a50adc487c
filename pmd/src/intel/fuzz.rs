//! A controller that writes whatever it is told to, for fuzzing.

use std::sync::Arc;

use super::model::{Family, Model};
use crate::arena::{Arena, ArenaConfig};
use crate::nic::{self, NicOptions};
use crate::pool::Pool;

/// Runs a driver against a device that `data` plays. Panics when a frame is lost, when one is there twice, or when the driver
/// has the device reach memory that it may not.
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_device(data: &[u8]) {
    let mut data = data.iter().copied();
    let family = match data.next().unwrap_or(0) & 3 {
        0 => Family::E1000e,
        1 => Family::Igb,
        2 => Family::Ixgbe,
        _ => Family::IxgbeVf,
    };
    let config = ArenaConfig {
        frames: 512,
        stride: 4096,
        lock: false,
        ..ArenaConfig::default()
    };
    let options = NicOptions {
        rx_ring: Some(64),
        tx_ring: Some(64),
        experimental: true,
        ..NicOptions::default()
    };
    let model = Model::new(family);
    let (Ok(arena), Ok(device)) = (Arena::new(config), model.device(4)) else {
        return;
    };
    let Ok(port) = nic::open(Arc::new(device), &options) else {
        return;
    };
    let Ok(mut queues) = port.queues(2, &arena) else {
        return;
    };
    let mut pool = Pool::new(&arena, 32);
    let (mut frames, mut out) = (Vec::new(), Vec::new());
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        let q = usize::from(what & 1);
        match what >> 1 & 7 {
            0 => {
                let bytes = [
                    byte(),
                    byte(),
                    byte(),
                    byte(),
                    byte(),
                    byte(),
                    byte(),
                    byte(),
                ];
                model.write_back(q, &[what; 64], u64::from_le_bytes(bytes));
            }
            // Near the truth: done, maybe the last of its packet, a length about the limit, an error bit.
            1 => {
                let (kind, len) = (byte(), u64::from(byte()) * 7);
                let error = u64::from(kind >> 2 & 1) << (24 + (kind >> 5));
                model.write_back(q, b"", len << 32 | error | 1 | u64::from(kind & 2));
            }
            2 => model.scribble(byte() & 1 != 0, q, u32::from(byte()), u64::MAX),
            3 => model.scribble(true, q, u32::from(byte()), u64::from(byte()) << 32),
            4 => {
                let len = 14 + usize::from(byte()) * 6;
                model.receive(q, &vec![what; len], 2048);
            }
            5 => model.complete(q, usize::from(byte())),
            6 => model.set_register(0x4000 + 4 * usize::from(byte()), u32::from(byte())),
            _ => model.set_link(byte() & 1 != 0),
        }
        for _ in 0..what >> 4 {
            if let Some(mut frame) = pool.get_spare() {
                frame.set_data(&vec![what; usize::from(what) * 8]);
                frames.push(frame);
            }
        }
        for queue in &mut queues {
            queue.tx_burst(&mut pool, &mut frames);
            queue.rx_burst(&mut pool, &mut out, 8);
            queue.flush(&mut pool);
        }
        pool.put_bulk(&mut frames);
        pool.put_bulk(&mut out);
    }
    for queue in &mut queues {
        queue.drain(&mut pool);
    }
    drop((queues, pool));
    assert_eq!(arena.outstanding(), 0, "frames lost");
    assert_eq!(model.bus().faults(), 0, "DMA outside of what was mapped");
    assert!(model.violations().is_empty(), "{:?}", model.violations());
}
