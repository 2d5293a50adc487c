//! The device's side of an instance, played by hand: for tests, and for the fuzzers' hostile devices.

#![allow(dead_code, reason = "the fuzzers use part of it, tests the rest")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::descriptor::{ADDR, CTRL, DONE, DROP, LENGTH, MORE, MSG0, MSG1, MSG2, NEXT};
use super::regs::{self, WINDOW, ring};
use crate::device::RegisterSpace;
use crate::device::model::ModelBus;

/// Registers that keep what is written, but for the few that do something.
pub(crate) struct Registers {
    words: Vec<AtomicU32>,
}

impl Registers {
    pub(crate) fn new() -> Arc<Registers> {
        Arc::new(Registers {
            words: (0..WINDOW / 4).map(|_| AtomicU32::new(0)).collect(),
        })
    }

    pub(crate) fn get(&self, at: usize) -> u32 {
        self.words[at / 4].load(Relaxed)
    }

    pub(crate) fn set(&self, at: usize, v: u32) {
        self.words[at / 4].store(v, Relaxed);
    }
}

impl RegisterSpace for Registers {
    fn read(&self, at: usize, size: usize) -> u64 {
        assert_eq!(size, 4);
        u64::from(self.get(at))
    }

    fn write(&self, at: usize, size: usize, value: u64) {
        assert_eq!(size, 4);
        let value = u32::try_from(value).unwrap();
        match at {
            regs::LMGR_INIT_CFG => self.set(at, value & !regs::LMGR_START),
            0x58 => {
                let left = (self.get(0x5c) >> 16) - value;
                let head = (self.get(0x5c) + value) % 2048;
                self.set(0x5c, left << 16 | head);
            }
            _ if regs::INT_STATUS.contains(&at) => self.set(at, self.get(at) & !value),
            _ => self.set(at, value),
        }
    }

    fn len(&self) -> usize {
        WINDOW
    }
}

/// The device's side of an instance.
pub(crate) struct Player {
    pub(crate) bus: Arc<ModelBus>,
    pub(crate) regs: Arc<Registers>,
    /// Next descriptor of each transmit and receive ring.
    tx: [u32; 32],
    rx: [u32; 32],
}

/// What the driver gave to a transmit ring.
pub(crate) struct Given {
    pub(crate) slot: u32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) msg: [u32; 3],
}

impl Player {
    pub(crate) fn new(bus: &Arc<ModelBus>, regs: &Arc<Registers>) -> Player {
        Player {
            bus: Arc::clone(bus),
            regs: Arc::clone(regs),
            tx: [0; 32],
            rx: [0; 32],
        }
    }

    fn word(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        self.bus.read(at, &mut b).unwrap();
        u32::from_le_bytes(b)
    }

    pub(super) fn put(&self, at: u64, v: u32) {
        self.bus.write(at, &v.to_le_bytes()).unwrap();
    }

    pub(super) fn tx_descriptor(&self, n: u8, slot: u32) -> u64 {
        u64::from(self.regs.get(regs::tx_ring(n))) + u64::from(slot) * 32
    }

    /// Takes the next frame of transmit ring `n`.
    pub(crate) fn take(&mut self, n: u8) -> Option<Given> {
        let slot = self.tx[usize::from(n)];
        if slot == self.regs.get(regs::tx_ring(n) + ring::CPU) {
            return None;
        }
        let d = self.tx_descriptor(n, slot);
        let ctrl = self.word(d + CTRL as u64);
        assert_eq!(ctrl & (DONE | DROP | MORE), 0);
        let mut bytes = vec![0; (ctrl & LENGTH) as usize];
        self.bus
            .read(u64::from(self.word(d + ADDR as u64)), &mut bytes)
            .unwrap();
        self.tx[usize::from(n)] = self.word(d + NEXT as u64);
        Some(Given {
            slot,
            bytes,
            msg: [MSG0, MSG1, MSG2].map(|m| self.word(d + m as u64)),
        })
    }

    /// Reports a frame of a transmit ring as done, or as dropped.
    pub(crate) fn done(&self, n: u8, slot: u32, dropped: bool) {
        let at = self.tx_descriptor(n, slot) + CTRL as u64;
        let drop = if dropped { DROP } else { 0 };
        self.put(at, self.word(at) | DONE | drop);
    }

    /// Writes a frame into receive ring `n`, over as many descriptors as it needs; false when there are too few.
    pub(crate) fn give(&mut self, n: u8, bytes: &[u8], msg: [u32; 3], flags: u32) -> bool {
        let base = u64::from(self.regs.get(regs::rx_ring(n)));
        let size = self.regs.get(regs::rx_ring(n) + ring::SIZE) & 0xffff;
        let cpu = self.regs.get(regs::rx_ring(n) + ring::CPU);
        let mut rest = bytes;
        loop {
            let slot = self.rx[usize::from(n)];
            if slot == cpu || base == 0 {
                return false;
            }
            let d = base + u64::from(slot) * 32;
            let room = (self.word(d + CTRL as u64) & LENGTH) as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            self.bus
                .write(u64::from(self.word(d + ADDR as u64)), now)
                .unwrap();
            for (at, word) in [MSG0, MSG1, MSG2].iter().zip(msg) {
                self.put(d + *at as u64, word);
            }
            let more = if later.is_empty() { 0 } else { MORE };
            let len = u32::try_from(now.len()).unwrap();
            self.put(d + CTRL as u64, DONE | more | flags | len);
            self.rx[usize::from(n)] = (slot + 1) % size;
            rest = later;
            if rest.is_empty() {
                return true;
            }
        }
    }

    /// Any words at all in the next descriptor of a receive ring.
    pub(crate) fn give_words(&mut self, n: u8, ctrl: u32, msg: [u32; 3]) -> bool {
        let base = u64::from(self.regs.get(regs::rx_ring(n)));
        let size = self.regs.get(regs::rx_ring(n) + ring::SIZE) & 0xffff;
        let slot = self.rx[usize::from(n)];
        if base == 0 || slot == self.regs.get(regs::rx_ring(n) + ring::CPU) {
            return false;
        }
        let d = base + u64::from(slot) * 32;
        for (at, word) in [MSG0, MSG1, MSG2].iter().zip(msg) {
            self.put(d + *at as u64, word);
        }
        self.put(d + CTRL as u64, ctrl);
        if ctrl & DONE != 0 {
            self.rx[usize::from(n)] = (slot + 1) % size;
        }
        true
    }

    /// The driver stopped or began anew.
    pub(crate) fn restart(&mut self) {
        self.tx = [0; 32];
        self.rx = [0; 32];
    }
}
