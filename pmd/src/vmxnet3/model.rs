//! The other side of a vmxnet3 adapter, in plain code: for tests, fuzzing and the measurement of the driver's own cost.
//!
//! It keeps to the rules unless told otherwise, and works only when told to ([`Model::transmitted`], [`Model::receive`]), so
//! that a measurement can leave its time out. Offsets are written as numbers here, not taken from the driver's constants: a
//! slip in one of them shows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::model::{ModelBus, ModelDevice, insert_checksum};
use crate::device::{DeviceError, RegisterSpace};

/// Queue of a device, as it understood the queue descriptors.
#[derive(Debug, Default, Clone)]
struct Ring {
    base: u64,
    size: u32,
    next: u32,
    generation: u32,
}

impl Ring {
    fn new(base: u64, size: u32) -> Ring {
        Ring {
            base,
            size,
            next: 0,
            generation: 1,
        }
    }

    fn at(&self) -> u64 {
        self.base + 16 * u64::from(self.next)
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.next >= self.size {
            self.next = 0;
            self.generation ^= 1;
        }
    }
}

#[derive(Debug, Default, Clone)]
struct Queue {
    tx: Ring,
    tx_done: Ring,
    rx: [Ring; 2],
    rx_done: Ring,
    vector: u8,
    tx_counters: [u64; 10],
    rx_counters: [u64; 10],
}

#[derive(Debug, Default)]
struct State {
    revisions: u32,
    revision: u32,
    shared_low: u32,
    shared: u64,
    answer: u32,
    active: bool,
    refuse: bool,
    commands: Vec<u32>,
    masked: Vec<bool>,
    pending: Vec<bool>,
    link: u32,
    mac: [u8; 6],
    own: [u8; 8],
    parts: u16,
    mode: u32,
    rss_fields: u32,
    queues: Vec<Queue>,
    descriptors: u64,
    doorbells: u64,
}

/// The model. Everything it does is asked for by a method or by a register access.
pub struct Model {
    bus: Arc<ModelBus>,
    state: Mutex<State>,
}

impl Model {
    /// A device that offers these revisions (bit 0: revision 1) and has this address.
    pub fn new(revisions: u32, mac: [u8; 6]) -> Arc<Model> {
        Arc::new(Model {
            bus: ModelBus::new(),
            state: Mutex::new(State {
                revisions,
                mac,
                masked: vec![true; 25],
                pending: vec![false; 25],
                link: 10_000 << 16 | 1,
                ..State::default()
            }),
        })
    }

    /// What a driver opens, with this many interrupts.
    ///
    /// # Errors
    /// See [`ModelDevice::new`].
    pub fn device(self: &Arc<Model>, interrupts: usize) -> Result<ModelDevice, DeviceError> {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xad, 0x15, 0xb0, 0x07]);
        let bars: [(u32, Arc<dyn RegisterSpace>); 2] = [
            (0, Arc::new(Bar0(Arc::clone(self)))),
            (1, Arc::new(Bar1(Arc::clone(self)))),
        ];
        Ok(ModelDevice::new("model", &self.bus, config, bars)?.with_interrupts(interrupts))
    }

    /// Memory as the device sees it.
    pub fn bus(&self) -> &Arc<ModelBus> {
        &self.bus
    }

    /// Whether it was activated.
    pub fn active(&self) -> bool {
        self.lock().active
    }

    /// Resets the device beneath its driver.
    pub fn reset_by_others(&self) {
        self.lock().active = false;
    }

    /// Commands so far.
    pub fn commands(&self) -> Vec<u32> {
        self.lock().commands.clone()
    }

    /// Transmit doorbells so far.
    pub fn doorbells(&self) -> u64 {
        self.lock().doorbells
    }

    /// Receive mode that the driver chose last.
    pub fn mode(&self) -> u32 {
        self.lock().mode
    }

    /// Headers that the driver asked to be hashed (revision 4).
    pub fn rss_fields(&self) -> u32 {
        self.lock().rss_fields
    }

    /// Whether the next activations fail.
    pub fn refuse(&self, on: bool) {
        self.lock().refuse = on;
    }

    /// Takes a frame from transmit queue `queue`, completes it when asked to, and gives it to `each`. Returns how many, at
    /// most `max`.
    pub fn transmitted(&self, queue: usize, max: usize, mut each: impl FnMut(&[u8])) -> usize {
        let mut state = self.lock();
        if !state.active {
            return 0;
        }
        let Some(q) = state.queues.get_mut(queue) else {
            return 0;
        };
        let (mut buffer, mut filled, mut good) = ([0; 16_384], 0, true);
        let mut n = 0;
        while n < max {
            let at = q.tx.at();
            let (Ok(address), Ok(words)) = (self.bus.read_u64(at), self.bus.read_u64(at + 8))
            else {
                break;
            };
            let (word2, word3) = halves(words);
            if word2 >> 14 & 1 != q.tx.generation {
                assert_eq!(filled, 0, "a frame without an end");
                break;
            }
            let bytes = match word2 & 0x3fff {
                0 => 16_384,
                n => n as usize,
            };
            let index = q.tx.next;
            q.tx.advance();
            let room = buffer.get_mut(filled..filled + bytes);
            good &= room.is_some_and(|room| self.bus.read(address, room).is_ok());
            filled += bytes;
            if word3 & 1 << 12 == 0 {
                continue;
            }
            n += 1;
            // Offload mode 2, header length, and where the checksum goes; of a frame in one descriptor, so this is the first.
            match word3 >> 10 & 3 {
                0 => {}
                2 => {
                    let (start, field) = (word3 & 0x3ff, word2 >> 18);
                    assert_eq!(filled, bytes, "a checksum for a frame in parts");
                    let packet = &mut buffer[..filled];
                    assert!(insert_checksum(packet, start as usize, field as usize));
                }
                mode => panic!("offload mode {mode}"),
            }
            if good {
                q.tx_counters[2] += 1;
                q.tx_counters[3] += filled as u64;
                each(&buffer[..filled]);
            } else {
                q.tx_counters[8] += 1;
            }
            (filled, good) = (0, true);
            if word3 & 1 << 13 != 0 {
                let done = u64::from(q.tx_done.generation) << 63;
                // The second half first: the generation ends the record.
                let _ = self.bus.write_u64(q.tx_done.at(), u64::from(index));
                let _ = self.bus.write_u64(q.tx_done.at() + 8, done);
                q.tx_done.advance();
            }
        }
        n
    }

    /// A frame from the wire; false when it is lost for want of buffers.
    pub fn receive(&self, queue: usize, frame: &[u8]) -> bool {
        let mut state = self.lock();
        let count = state.queues.len();
        let parts = usize::from(state.parts.max(1));
        if !state.active {
            return false;
        }
        let Some(q) = state.queues.get_mut(queue) else {
            return false;
        };
        let mut rest = frame;
        let mut start = true;
        for part in 0..parts {
            let ring = usize::from(!start);
            let Some((index, address, room)) = self.buffer(&mut q.rx[ring], !start) else {
                break;
            };
            let n = rest.len().min(room);
            let (piece, left) = rest.split_at(n);
            rest = left;
            let _ = self.bus.write(address, piece);
            let end = rest.is_empty() || part + 1 == parts;
            let number = u64::try_from(queue + ring * count).unwrap_or(0);
            let word0 = u64::from(index)
                | u64::from(end) << 14
                | u64::from(start) << 15
                | number << 16
                | 1 << 30;
            let word2 = n as u64 | u64::from(end && !rest.is_empty()) << 14;
            let _ = self.bus.write_u64(q.rx_done.at(), word0);
            let _ = self.bus.write_u64(
                q.rx_done.at() + 8,
                word2 | u64::from(q.rx_done.generation) << 63,
            );
            q.rx_done.advance();
            start = false;
            if end {
                break;
            }
        }
        let good = rest.is_empty();
        if good {
            q.rx_counters[2] += 1;
            q.rx_counters[3] += frame.len() as u64;
        } else {
            q.rx_counters[8] += 1;
        }
        let vector = usize::from(q.vector);
        self.fire(&mut state, vector);
        good
    }

    /// Skips a receive buffer, as devices may.
    pub fn skip_buffer(&self, queue: usize) -> bool {
        let mut state = self.lock();
        let q = state.queues.get_mut(queue);
        q.is_some_and(|q| self.buffer(&mut q.rx[0], false).is_some())
    }

    /// Writes a receive completion that says whatever `words` say, with the right generation.
    pub fn receive_nonsense(&self, queue: usize, words: [u32; 3]) {
        let mut state = self.lock();
        if let Some(q) = state.queues.get_mut(queue) {
            self.nonsense(&mut q.rx_done, words);
        }
    }

    /// The same for a transmit completion.
    pub fn transmit_nonsense(&self, queue: usize, words: [u32; 3]) {
        let mut state = self.lock();
        if let Some(q) = state.queues.get_mut(queue) {
            self.nonsense(&mut q.tx_done, words);
        }
    }

    /// Asks the driver to gather frames before a doorbell.
    pub fn gather(&self, queue: usize, frames: u32) {
        let state = self.lock();
        if !self.reaches_memory() {
            return;
        }
        let at = state.descriptors + 256 * queue as u64 + 4;
        let _ = self.bus.write(at, &frames.to_le_bytes());
    }

    /// Plugs or unplugs the cable.
    pub fn set_link(&self, up: bool) {
        let mut state = self.lock();
        state.link = state.link & !1 | u32::from(up);
        self.raise(&mut state, 1 << 2);
    }

    /// Raises events.
    pub fn raise_events(&self, events: u32) {
        self.raise(&mut self.lock(), events);
    }

    /// Stops a queue with an error (transmit queues first) and says so.
    pub fn stop_queue(&self, index: usize, error: u32) {
        let mut state = self.lock();
        if !self.reaches_memory() {
            return;
        }
        let at = state.descriptors + 256 * index as u64 + 80;
        let _ = self.bus.write(at, &[1]);
        let _ = self.bus.write(at + 4, &error.to_le_bytes());
        let receive = index >= state.queues.len();
        self.raise(&mut state, if receive { 1 } else { 2 });
    }

    fn raise(&self, state: &mut State, events: u32) {
        if !self.reaches_memory() {
            return;
        }
        let at = state.shared + 696;
        let mut old = [0; 4];
        if self.bus.read(at, &mut old).is_ok() {
            let new = u32::from_le_bytes(old) | events;
            let _ = self.bus.write(at, &new.to_le_bytes());
        }
    }

    fn nonsense(&self, ring: &mut Ring, [a, b, c]: [u32; 3]) {
        if ring.size == 0 || !self.reaches_memory() {
            return;
        }
        let first = u64::from(a) | u64::from(b) << 32;
        let second = u64::from(c) | u64::from(ring.generation) << 63;
        let _ = self.bus.write_u64(ring.at(), first);
        let _ = self.bus.write_u64(ring.at() + 8, second);
        ring.advance();
    }

    fn buffer(&self, ring: &mut Ring, body: bool) -> Option<(u32, u64, usize)> {
        if ring.size == 0 || !self.reaches_memory() {
            return None;
        }
        let address = self.bus.read_u64(ring.at()).ok()?;
        let (word2, _) = halves(self.bus.read_u64(ring.at() + 8).ok()?);
        if word2 >> 31 != ring.generation {
            return None;
        }
        assert_eq!(word2 >> 14 & 1 != 0, body, "a buffer of the wrong kind");
        let index = ring.next;
        ring.advance();
        Some((index, address, (word2 & 0x3fff) as usize))
    }

    fn fire(&self, state: &mut State, vector: usize) {
        let (Some(masked), Some(pending)) =
            (state.masked.get_mut(vector), state.pending.get_mut(vector))
        else {
            return;
        };
        if *masked {
            *pending = true;
        } else {
            *masked = true;
            self.bus.interrupt(vector);
        }
    }

    fn command(&self, command: u32) {
        let mut state = self.lock();
        state.commands.push(command);
        state.answer = match command {
            0xcafe_0000 => u32::from(!self.activate(&mut state)),
            0xcafe_0001 | 0xcafe_0002 => {
                state.active = false;
                0
            }
            0xcafe_0003 => {
                let at = state.shared + 120;
                state.mode = self.word(at);
                0
            }
            0xcafe_0010 => {
                let at = state.shared + 704;
                state.rss_fields = self.word(at);
                u32::from(state.revision < 8)
            }
            0xf00d_0001 if state.active => {
                let count = state.queues.len();
                for (n, q) in state.queues.iter().enumerate() {
                    for (kind, counters) in [(0, &q.tx_counters), (1, &q.rx_counters)] {
                        let at = state.descriptors + 256 * (kind * count + n) as u64 + 88;
                        for (i, value) in counters.iter().enumerate() {
                            let _ = self.bus.write_u64(at + 8 * i as u64, *value);
                        }
                    }
                }
                0
            }
            0xf00d_0002 => state.link,
            0xf00d_0003 => {
                let [a, b, c, d, ..] = state.mac;
                u32::from_le_bytes([a, b, c, d])
            }
            0xf00d_0004 => u32::from(state.mac[4]) | u32::from(state.mac[5]) << 8,
            _ => 0,
        };
    }

    fn activate(&self, state: &mut State) -> bool {
        let shared = state.shared;
        if state.refuse || self.word(shared) != 0xbabe_fee1 {
            return false;
        }
        let mut counts = [0; 4];
        if self.bus.read(shared + 60, &mut counts).is_err() {
            return false;
        }
        let [parts_low, parts_high, tx, rx] = counts;
        state.parts = u16::from_le_bytes([parts_low, parts_high]);
        let mtu = self.word(shared + 56);
        if tx == 0 || tx > 8 || rx != tx || !(60..=9000).contains(&mtu) {
            return false;
        }
        let Ok(descriptors) = self.bus.read_u64(shared + 40) else {
            return false;
        };
        state.descriptors = descriptors;
        let word = |n: u64, at: u64| self.word(descriptors + 256 * n + at);
        let address = |n: u64, at: u64| {
            let at = descriptors + 256 * n + at;
            self.bus.read_u64(at).unwrap_or(0)
        };
        state.queues = (0..u64::from(tx))
            .map(|n| {
                let r = u64::from(tx) + n;
                Queue {
                    tx: Ring::new(address(n, 16), word(n, 56)),
                    tx_done: Ring::new(address(n, 32), word(n, 64)),
                    rx: [
                        Ring::new(address(r, 16), word(r, 56)),
                        Ring::new(address(r, 24), word(r, 60)),
                    ],
                    rx_done: Ring::new(address(r, 32), word(r, 64)),
                    vector: word(r, 72).to_le_bytes()[0],
                    ..Queue::default()
                }
            })
            .collect();
        let aligned = state.queues.iter().all(|q| {
            let rings = [&q.tx, &q.tx_done, &q.rx[0], &q.rx[1], &q.rx_done];
            rings
                .iter()
                .all(|r| r.base % 512 == 0 && r.size % 32 == 0 && r.size != 0)
        });
        state.active = aligned;
        aligned
    }

    /// A device without the bus-master right does not even try.
    fn reaches_memory(&self) -> bool {
        self.bus.bus_master()
    }

    fn word(&self, at: u64) -> u32 {
        let mut word = [0; 4];
        let _ = self.bus.read(at, &mut word);
        u32::from_le_bytes(word)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queues and interrupts.
struct Bar0(Arc<Model>);

impl RegisterSpace for Bar0 {
    fn read(&self, _offset: usize, _size: usize) -> u64 {
        0
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        assert_eq!((size, offset % 8), (4, 0), "registers are 32 bits, 8 apart");
        let mut state = self.0.lock();
        match offset {
            0x000..0x0c8 => {
                let vector = offset / 8;
                state.masked[vector] = value & 1 != 0;
                if value & 1 == 0 && std::mem::take(&mut state.pending[vector]) {
                    self.0.fire(&mut state, vector);
                }
            }
            0x600..0x640 => state.doorbells += 1,
            _ => {}
        }
    }

    fn len(&self) -> usize {
        4096
    }
}

/// Configuration.
struct Bar1(Arc<Model>);

impl RegisterSpace for Bar1 {
    fn read(&self, offset: usize, _size: usize) -> u64 {
        let state = self.0.lock();
        u64::from(match offset {
            0x00 => state.revisions,
            0x08 => 1,
            0x20 => state.answer,
            _ => 0,
        })
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        assert_eq!(size, 4, "registers are 32 bits");
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        let mut state = self.0.lock();
        match offset {
            0x00 => state.revision = value,
            0x10 => {
                state.shared_low = value;
                state.shared = 0;
            }
            0x18 => state.shared = u64::from(state.shared_low) | u64::from(value) << 32,
            0x20 => {
                drop(state);
                self.0.command(value);
            }
            0x28 => state.own[..4].copy_from_slice(&value.to_le_bytes()),
            0x30 => state.own[4..].copy_from_slice(&value.to_le_bytes()),
            0x40 => {
                let at = state.shared + 696;
                let left = self.0.word(at) & !value;
                let _ = self.0.bus.write(at, &left.to_le_bytes());
            }
            _ => {}
        }
    }

    fn len(&self) -> usize {
        4096
    }
}

fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}
