//! A virtio network device without hardware, for tests and measurements: registers, both forms of rings, the control queue,
//! and the rules of virtio 1.2 that a driver must keep.
//!
//! The [`Model`] reads and writes rings byte by byte at device addresses and shares no code with the driver. It works when it
//! is told to ([`Model::receive`], [`Model::transmit`]); commands are carried out as they are announced.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::model::{ModelBus, ModelDevice, insert_checksum};
use crate::device::{DeviceError, RegisterSpace};

// Feature bits, by number (sections 5.1.3 and 6).
const CSUM: u32 = 0;
const GUEST_CSUM: u32 = 1;
const MTU: u32 = 3;
const MAC: u32 = 5;
const HOST_TSO4: u32 = 11;
const MRG_RXBUF: u32 = 15;
const STATUS: u32 = 16;
const CTRL_VQ: u32 = 17;
const CTRL_RX: u32 = 18;
const MQ: u32 = 22;
const INDIRECT: u32 = 28;
const EVENT_IDX: u32 = 29;
const VERSION_1: u32 = 32;
const ACCESS_PLATFORM: u32 = 33;
const PACKED: u32 = 34;

// Where the structures lie in BAR 4.
const COMMON: usize = 0;
const DEVICE: usize = 0x1000;
const NOTIFY: usize = 0x2000;
const LEN: usize = 0x3000;
/// Distance of two queues' notification addresses: close, as in QEMU.
const MULTIPLIER: u8 = 4;

/// Bytes in front of each packet.
const HEADER: usize = 12;
const LARGEST_QUEUE: u16 = 1024;

/// What the device has.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// Packed rings.
    pub packed: bool,
    /// Queue pairs.
    pub pairs: u16,
    /// Largest IP packet.
    pub mtu: u16,
    /// Whether it goes through the IOMMU.
    pub platform: bool,
    /// Whether it completes checksums.
    pub checksums: bool,
}

impl Default for Features {
    fn default() -> Self {
        Features {
            packed: false,
            pairs: 1,
            mtu: 9000,
            platform: true,
            checksums: true,
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Queue {
    size: u16,
    vector: u16,
    enabled: bool,
    areas: [u64; 3],
    /// Split: indices. Packed: position with the wrap counter in bit 15.
    available: u16,
    used: u16,
    kicks: u64,
}

#[derive(Debug, Default)]
struct State {
    status: u8,
    offered: [u32; 2],
    selected: [u32; 2],
    accepted: [u32; 2],
    queue: u16,
    queues: Vec<Queue>,
    config_vector: u16,
    link_down: bool,
    /// Commands carried out: class, command, first byte of data.
    commands: Vec<[u8; 3]>,
    violations: Vec<String>,
    resets: u32,
}

/// A chain's id and its buffers: address, length, whether the device writes it.
type Chain = (u32, Vec<(u64, u32, bool)>);

/// One device; see the module text.
pub struct Model {
    features: Features,
    bus: Arc<ModelBus>,
    state: Mutex<State>,
}

impl Model {
    /// A device after power-up.
    pub fn new(features: Features) -> Arc<Model> {
        let model = Model {
            features,
            bus: ModelBus::new(),
            state: Mutex::default(),
        };
        model.power_up(&mut model.lock());
        Arc::new(model)
    }

    /// The device to give to the driver, with `interrupts` vectors.
    ///
    /// # Errors
    /// Never, as long as the configuration space below is right.
    pub fn device(self: &Arc<Model>, interrupts: usize) -> Result<ModelDevice, DeviceError> {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        // Type, place and length of each structure; MSI-X comes last.
        for (i, (kind, place, len)) in [(1, COMMON, 0x38), (2, NOTIFY, 0x1000), (4, DEVICE, 0x20)]
            .into_iter()
            .enumerate()
        {
            let at = 0x40 + 0x20 * i;
            let next = u8::try_from(at + 0x20).unwrap_or(0);
            config[at..at + 5].copy_from_slice(&[0x09, next, 20, kind, 4]);
            for (to, value) in [(8, place), (12, len)] {
                let bytes = u32::try_from(value).unwrap_or(0).to_le_bytes();
                config[at + to..at + to + 4].copy_from_slice(&bytes);
            }
            config[at + 16] = MULTIPLIER;
        }
        config[0xa0] = 0x11;
        let space: Arc<dyn RegisterSpace> = Arc::clone(self) as _;
        let device = ModelDevice::new("model", &self.bus, config, [(4, space)])?;
        let model = Arc::clone(self);
        Ok(device
            .with_interrupts(interrupts)
            .on_reset(move || model.power_up(&mut model.lock())))
    }

    /// The model's side of memory.
    pub fn bus(&self) -> &ModelBus {
        &self.bus
    }

    /// What the driver did against the specification.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Features that the driver took.
    pub fn accepted(&self) -> u64 {
        let [low, high] = self.lock().accepted;
        u64::from(low) | u64::from(high) << 32
    }

    /// Resets through the status register so far.
    pub fn resets(&self) -> u32 {
        self.lock().resets
    }

    /// Whether the driver has started the device.
    pub fn live(&self) -> bool {
        self.lock().status & 0x44 == 4
    }

    /// Commands carried out: class, command, first byte of data.
    pub fn commands(&self) -> Vec<[u8; 3]> {
        self.lock().commands.clone()
    }

    /// Notifications of a queue so far.
    pub fn kicks(&self, queue: u16) -> u64 {
        let state = self.lock();
        state
            .queues
            .get(usize::from(queue))
            .map_or(0, |queue| queue.kicks)
    }

    /// Takes the cable out, or puts it in.
    pub fn set_link(&self, up: bool) {
        self.lock().link_down = !up;
    }

    /// The device cannot go on: `DEVICE_NEEDS_RESET`.
    pub fn fail(&self) {
        self.lock().status |= 0x40;
    }

    /// A frame arrives for `pair`; false when it has no buffer.
    pub fn receive(&self, pair: u16, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        let (number, packed) = (2 * pair, state.accepted[1] & 1 << (PACKED - 32) != 0);
        let Some((id, chain)) = self.take(&mut state, number, packed) else {
            return false;
        };
        let Some(&(addr, len, writable)) = chain.first() else {
            return false;
        };
        if !writable || (len as usize) < HEADER + bytes.len() {
            let said = format!("a buffer of {len} bytes for {}", bytes.len());
            state.violations.push(said);
            return false;
        }
        let mut header = [0; HEADER];
        header[10] = 1;
        // What cannot be written is the bus's to count.
        let _ = self.bus.write(addr, &header);
        let _ = self.bus.write(addr + HEADER as u64, bytes);
        let written = u32::try_from(HEADER + bytes.len()).unwrap_or(u32::MAX);
        self.put(&mut state, number, packed, id, written, 1);
        true
    }

    /// Says that the buffer `id` of a queue was used and `written` bytes were written, whatever the driver has given.
    pub fn lie(&self, queue: u16, id: u32, written: u32) {
        let mut state = self.lock();
        let packed = state.accepted[1] & 1 << (PACKED - 32) != 0;
        self.put(&mut state, queue, packed, id, written, 1);
    }

    /// Writes into one of a queue's three areas, near its start.
    pub fn scribble(&self, queue: u16, area: usize, offset: u64, value: u64) {
        let state = self.lock();
        let queue = state.queues.get(usize::from(queue));
        if let Some(queue) = queue.filter(|q| q.enabled && self.bus.bus_master()) {
            let room = 16 * u64::from(queue.size.max(1));
            let at = queue.areas[area % 3] + offset % room / 8 * 8;
            // What cannot be written is the bus's to count.
            let _ = self.bus.write_u64(at, value);
        }
    }

    /// Sends up to `most` frames of a pair.
    pub fn transmit(&self, pair: u16, most: usize) -> Vec<Vec<u8>> {
        let mut state = self.lock();
        let (number, packed) = (2 * pair + 1, state.accepted[1] & 1 << (PACKED - 32) != 0);
        let mut sent = Vec::new();
        while sent.len() < most {
            let Some((id, chain)) = self.take(&mut state, number, packed) else {
                break;
            };
            let mut bytes = Vec::new();
            for (addr, len, writable) in &chain {
                let mut part = vec![0; *len as usize];
                if *writable || self.bus.read(*addr, &mut part).is_err() {
                    state
                        .violations
                        .push(format!("{len} bytes at {addr:#x} to send"));
                }
                bytes.extend(part);
            }
            let mut packet = bytes.split_off(HEADER.min(bytes.len()));
            let fine = match bytes[..] {
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => true,
                // NEEDS_CSUM, nothing to cut up.
                [1, 0, 0, 0, 0, 0, s0, s1, o0, o1, 0, 0] => {
                    let start = usize::from(u16::from_le_bytes([s0, s1]));
                    let field = start + usize::from(u16::from_le_bytes([o0, o1]));
                    state.accepted[0] & 1 << CSUM != 0 && insert_checksum(&mut packet, start, field)
                }
                _ => false,
            };
            if !fine {
                state.violations.push(format!("header {bytes:?}"));
            }
            let entries = u16::try_from(chain.len()).unwrap_or(1);
            self.put(&mut state, number, packed, id, 0, entries);
            sent.push(packet);
        }
        sent
    }

    fn power_up(&self, state: &mut State) {
        let queues = usize::from(2 * self.features.pairs + 1);
        let mut low = 1 << GUEST_CSUM | 1 << MTU | 1 << MAC | 1 << HOST_TSO4;
        low |= u32::from(self.features.checksums) << CSUM;
        low |= 1 << MRG_RXBUF | 1 << STATUS | 1 << CTRL_VQ | 1 << CTRL_RX;
        low |= 1 << INDIRECT | 1 << EVENT_IDX;
        if self.features.pairs > 1 {
            low |= 1 << MQ;
        }
        let bit = |on: bool, n: u32| u32::from(on) << (n - 32);
        let high = bit(true, VERSION_1)
            | bit(self.features.platform, ACCESS_PLATFORM)
            | bit(self.features.packed, PACKED);
        *state = State {
            offered: [low, high],
            queues: vec![
                Queue {
                    size: LARGEST_QUEUE,
                    vector: 0xffff,
                    ..Queue::default()
                };
                queues
            ],
            config_vector: 0xffff,
            link_down: state.link_down,
            commands: std::mem::take(&mut state.commands),
            violations: std::mem::take(&mut state.violations),
            resets: state.resets,
            ..State::default()
        };
        if self.features.packed {
            for queue in &mut state.queues {
                (queue.available, queue.used) = (0x8000, 0x8000);
            }
        }
    }

    /// The next available chain.
    fn take(&self, state: &mut State, number: u16, packed: bool) -> Option<Chain> {
        let running = state.status & 0x44 == 4;
        let queue = state.queues.get_mut(usize::from(number))?;
        if !running || !queue.enabled {
            return None;
        }
        let mut chain = Vec::new();
        if packed {
            loop {
                let (at, wrap) = (queue.available & 0x7fff, queue.available >> 15);
                let place = queue.areas[0] + 16 * u64::from(at);
                let (addr, rest) = (self.word(place)?, self.word(place + 8)?);
                let flags = rest >> 48;
                let (avail, used) = (flags >> 7 & 1, flags >> 15 & 1);
                if avail != u64::from(wrap) || used == u64::from(wrap) {
                    return None;
                }
                chain.push((addr, low32(rest), flags & 2 != 0));
                queue.available = advance(queue.available, 1, queue.size);
                if flags & 1 == 0 {
                    return Some((low32(rest >> 32 & 0xffff), chain));
                }
            }
        }
        if self.half(queue.areas[1] + 2)? == queue.available {
            return None;
        }
        let slot = queue.available % queue.size;
        let head = self.half(queue.areas[1] + 4 + 2 * u64::from(slot))?;
        queue.available = queue.available.wrapping_add(1);
        let mut at = head;
        loop {
            let place = queue.areas[0] + 16 * u64::from(at);
            let (addr, rest) = (self.word(place)?, self.word(place + 8)?);
            chain.push((addr, low32(rest), rest >> 32 & 2 != 0));
            if rest >> 32 & 1 == 0 || chain.len() > usize::from(queue.size) {
                return Some((head.into(), chain));
            }
            at = u16::try_from(rest >> 48).unwrap_or(0);
        }
    }

    /// Gives a chain of `entries` descriptors back, asks to be told of the next one, and interrupts when that is wanted.
    fn put(
        &self,
        state: &mut State,
        number: u16,
        packed: bool,
        id: u32,
        written: u32,
        entries: u16,
    ) {
        let Some(queue) = state.queues.get_mut(usize::from(number)) else {
            return;
        };
        let wanted = if packed {
            let (at, wrap) = (queue.used & 0x7fff, queue.used >> 15);
            let place = queue.areas[0] + 16 * u64::from(at);
            let flags: u64 = if wrap == 1 { 0x8080 } else { 0 };
            let rest = u64::from(written) | u64::from(id & 0xffff) << 32 | flags << 48;
            let _ = self.bus.write_u64(place + 8, rest);
            let old = queue.used;
            queue.used = advance(queue.used, entries, queue.size);
            // Driver event suppression: a position, and what it means.
            let event = self.half(queue.areas[1]).unwrap_or(0);
            match self.half(queue.areas[1] + 2).unwrap_or(1) & 3 {
                0 => true,
                2 => event == old,
                _ => false,
            }
        } else {
            let slot = u64::from(queue.used % queue.size);
            let entry = u64::from(id) | u64::from(written) << 32;
            // Entries lie at multiples of 4, not of 8.
            let _ = self
                .bus
                .write(queue.areas[2] + 4 + 8 * slot, &entry.to_le_bytes());
            let old = queue.used;
            queue.used = queue.used.wrapping_add(1);
            let _ = self
                .bus
                .write(queue.areas[2] + 2, &queue.used.to_le_bytes());
            let asked = queue.areas[1] + 4 + 2 * u64::from(queue.size);
            let announced = queue.areas[2] + 4 + 8 * u64::from(queue.size);
            let _ = self.bus.write(announced, &queue.available.to_le_bytes());
            self.half(asked) == Some(old)
        };
        if wanted && queue.vector != 0xffff {
            self.bus.interrupt(queue.vector.into());
        }
    }

    /// Carries out what the control queue holds.
    fn control(&self, state: &mut State) {
        let number = if state.accepted[0] & 1 << MQ != 0 {
            2 * self.features.pairs
        } else {
            2
        };
        let packed = state.accepted[1] & 1 << (PACKED - 32) != 0;
        while let Some((id, chain)) = self.take(state, number, packed) {
            let (Some(&(from, len, false)), Some(&(to, 1, true))) = (chain.first(), chain.last())
            else {
                state.violations.push(format!("command {chain:?}"));
                return;
            };
            let mut bytes = vec![0; len as usize];
            let _ = self.bus.read(from, &mut bytes);
            if let [class, command, data, ..] = bytes[..] {
                state.commands.push([class, command, data]);
            }
            let _ = self.bus.write(to, &[0]);
            let entries = u16::try_from(chain.len()).unwrap_or(1);
            self.put(state, number, packed, id, 1, entries);
        }
    }

    fn config(&self, state: &State, offset: usize) -> u8 {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        bytes[6] = u8::from(!state.link_down);
        bytes[8..10].copy_from_slice(&self.features.pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.features.mtu.to_le_bytes());
        bytes.get(offset).copied().unwrap_or(0)
    }

    fn half(&self, addr: u64) -> Option<u16> {
        let mut b = [0; 2];
        self.bus.read(addr, &mut b).ok()?;
        Some(u16::from_le_bytes(b))
    }

    fn word(&self, addr: u64) -> Option<u64> {
        self.bus.read_u64(addr).ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_common(&self, state: &mut State, offset: usize, value: u32) {
        let half = u16::try_from(value & 0xffff).unwrap_or(0);
        let selected = usize::from(state.queue);
        let early = state.status & 8 == 0;
        match offset {
            0x00 => state.selected[0] = value,
            0x08 => state.selected[1] = value,
            0x0c => {
                if !early {
                    state.violations.push("features after FEATURES_OK".into());
                }
                if let Some(word) = state.accepted.get_mut(state.selected[1] as usize) {
                    *word = value;
                }
            }
            0x10 => state.config_vector = half,
            0x14 if value == 0 => {
                state.resets += 1;
                self.power_up(state);
            }
            0x14 => {
                let new = u8::try_from(value & 0xff).unwrap_or(0);
                let fits = (0..2).all(|i| state.accepted[i] & !state.offered[i] == 0)
                    && state.accepted[1] & 1 != 0;
                if new & 4 != 0 && state.status & 8 == 0 {
                    state
                        .violations
                        .push("DRIVER_OK without FEATURES_OK".into());
                }
                state.status = if fits { new } else { new & !8 };
            }
            0x16 => state.queue = half,
            _ => {
                if early {
                    let said = format!("queue register {offset:#x} before FEATURES_OK");
                    state.violations.push(said);
                }
                let Some(queue) = state.queues.get_mut(selected) else {
                    return;
                };
                match offset {
                    0x18 => queue.size = half,
                    0x1a => queue.vector = half,
                    0x1c => queue.enabled = half == 1,
                    0x20..0x38 => {
                        let area = &mut queue.areas[(offset - 0x20) / 8];
                        let shift = 8 * (offset % 8);
                        *area = *area & !(0xffff_ffff << shift) | u64::from(value) << shift;
                    }
                    _ => {}
                }
            }
        }
    }
}

impl RegisterSpace for Model {
    fn read(&self, offset: usize, size: usize) -> u64 {
        let state = self.lock();
        if (DEVICE..NOTIFY).contains(&offset) {
            let bytes = (0..size).rev();
            return bytes.fold(0, |v, i| {
                v << 8 | u64::from(self.config(&state, offset - DEVICE + i))
            });
        }
        let queue = state.queues.get(usize::from(state.queue));
        match offset - COMMON {
            0x04 => u64::from(*state.offered.get(state.selected[0] as usize).unwrap_or(&0)),
            0x10 => state.config_vector.into(),
            0x12 => 2 * u64::from(self.features.pairs) + 1,
            0x14 => state.status.into(),
            0x16 => state.queue.into(),
            0x18 => queue.map_or(0, |q| q.size.into()),
            0x1a => queue.map_or(0xffff, |q| q.vector.into()),
            0x1c => queue.map_or(0, |q| u64::from(q.enabled)),
            0x1e => state.queue.into(),
            _ => 0,
        }
    }

    fn write(&self, offset: usize, _size: usize, value: u64) {
        let mut state = self.lock();
        if offset < DEVICE {
            let value = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
            self.write_common(&mut state, offset, value);
        } else if offset >= NOTIFY {
            let number = u16::try_from(value & 0xffff).unwrap_or(0);
            if (offset - NOTIFY) != usize::from(MULTIPLIER) * usize::from(number) {
                let said = format!("queue {number} notified at {:#x}", offset - NOTIFY);
                state.violations.push(said);
            }
            if state.status & 4 == 0 {
                state
                    .violations
                    .push("a notification before DRIVER_OK".into());
            }
            if let Some(queue) = state.queues.get_mut(usize::from(number)) {
                queue.kicks += 1;
            }
            self.control(&mut state);
        }
    }

    fn len(&self) -> usize {
        LEN
    }
}

/// A packed position, `n` entries on.
fn advance(position: u16, n: u16, size: u16) -> u16 {
    let (at, wrap) = ((position & 0x7fff) + n, position & 0x8000);
    if at >= size {
        (at - size) | (wrap ^ 0x8000)
    } else {
        at | wrap
    }
}

fn low32(word: u64) -> u32 {
    u32::try_from(word & 0xffff_ffff).unwrap_or(0)
}
