//! A device that writes whatever it is told to, for fuzzing.

use std::sync::Arc;

use crate::arena::{Arena, ArenaConfig};
use crate::nic::NicControl;
use crate::pool::Pool;
use crate::port::PortQueue;

use super::model::Model;
use super::{Vmxnet3Config, Vmxnet3Port};

/// Runs the driver against a device that `data` plays. Panics when a frame is lost, when one is there twice, or when the driver
/// has the device reach memory that it may not.
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
    let model = Model::new(1, [0, 0x50, 0x56, 0, 0, 1]);
    let Ok(device) = model.device(4) else { return };
    let config = Vmxnet3Config {
        rx_ring: 32,
        tx_ring: 32,
        buffer: Some(512),
        ..Vmxnet3Config::default()
    };
    let Ok(port) = Vmxnet3Port::open(Arc::new(device), config) else {
        return;
    };
    let control = port.handle();
    let Ok(mut queues) = port.open_queues(2, &arena) else {
        return;
    };
    let mut pool = Pool::new(&arena, 32);
    let (mut frames, mut out) = (Vec::new(), Vec::new());
    let mut data = data.iter().copied();
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        let word =
            |byte: &mut dyn FnMut() -> u8| u32::from_le_bytes([byte(), byte(), byte(), byte()]);
        let q = usize::from(what & 1);
        match what >> 1 & 15 {
            0 => model.receive_nonsense(q, [word(&mut byte), 0, word(&mut byte)]),
            // Near the truth: ring and flags right, index and length small.
            1 => {
                let [index, flags, len, error] = word(&mut byte).to_le_bytes();
                let ring = u32::try_from(q).unwrap_or(0) + 2 * u32::from(flags & 1);
                let word0 = u32::from(index & 31) | ring << 16 | u32::from(flags >> 1 & 3) << 14;
                let word2 = (u32::from(len) * 2) | (u32::from(error & 1) << 14);
                model.receive_nonsense(q, [word0, word(&mut byte), word2]);
            }
            2 => model.transmit_nonsense(q, [word(&mut byte), 0, 0]),
            3 => model.transmit_nonsense(q, [u32::from(byte() & 31), 0, 0]),
            4 => model.gather(q, word(&mut byte)),
            5 => model.raise_events(word(&mut byte)),
            6 => model.set_link(byte() & 1 != 0),
            7 => {
                let bytes = vec![what; 14 + usize::from(byte()) * 8];
                model.receive(q, &bytes);
            }
            8 => {
                model.skip_buffer(q);
            }
            9 => {
                model.transmitted(q, usize::from(byte()), |_| ());
            }
            10 => model.stop_queue(usize::from(byte() & 3), word(&mut byte)),
            11 => model.refuse(byte() & 1 != 0),
            12 => control.request_reset(),
            _ => {}
        }
        for _ in 0..what >> 5 {
            if let Some(mut frame) = pool.get_spare() {
                frame.set_data(&[what; 64]);
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
        assert!(control.counters().tx_packets < u64::MAX);
    }
    for queue in &mut queues {
        queue.drain(&mut pool);
    }
    drop((queues, pool));
    assert_eq!(arena.outstanding(), 0, "frames lost");
    assert_eq!(model.bus().faults(), 0, "DMA outside of what was mapped");
}
