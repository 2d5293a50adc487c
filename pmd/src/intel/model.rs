//! Controllers without hardware, for tests and fuzzing: registers, rings and the rules of the datasheets' initialization.
//!
//! A [`Model`] plays the device's side of any family. It keeps what the driver writes, answers what a device answers, notes
//! each step that the datasheet forbids ([`Model::violations`]), moves frames through the rings, and writes nonsense into
//! them on demand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::model::{ModelBus, ModelDevice, insert_checksum};
use crate::device::{DeviceError, RegisterSpace};

/// Which controller is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// 82574.
    E1000e,
    /// 82576.
    Igb,
    /// 82599.
    Ixgbe,
    /// A virtual function of the 82599.
    IxgbeVf,
}

/// Where a family has its rings.
#[derive(Debug, Clone, Copy)]
struct Layout {
    rx: usize,
    tx: usize,
    stride: usize,
    queues: usize,
    /// Whether a queue has an enable bit.
    enables: bool,
    tx_type: u32,
    id: u16,
}

impl Family {
    fn layout(self) -> Layout {
        let (rx, tx, stride, queues, enables, tx_type, id) = match self {
            Family::E1000e => (0x2800, 0x3800, 0x100, 2, false, 1, 0x10d3),
            Family::Igb => (0xc000, 0xe000, 0x40, 16, true, 3, 0x10c9),
            Family::Ixgbe => (0x1000, 0x6000, 0x40, 16, true, 3, 0x10fb),
            Family::IxgbeVf => (0x1000, 0x2000, 0x40, 4, true, 3, 0x10ed),
        };
        Layout {
            rx,
            tx,
            stride,
            queues,
            enables,
            tx_type,
            id,
        }
    }
}

// Distances from a queue's first register; the same in all families.
const LOW: usize = 0x00;
const HIGH: usize = 0x04;
const LEN: usize = 0x08;
const HEAD: usize = 0x10;
const TAIL: usize = 0x18;
const DCTL: usize = 0x28;

const CTRL: usize = 0x0;
const STATUS: usize = 0x8;
const ENABLE: u32 = 1 << 25;
/// Looks at a register before a slow bit in it is set.
const SLOW: u32 = 3;

#[derive(Debug, Default)]
struct State {
    regs: BTreeMap<usize, u32>,
    /// Looks still to be had until the bits of a register are set.
    pending: BTreeMap<usize, (u32, u32)>,
    /// Registers whose slow bits the driver has seen set.
    seen: BTreeMap<usize, u32>,
    violations: Vec<String>,
    resets: u32,
    gone: bool,
    deaf: bool,
    link_down: bool,
    /// Context descriptor of each transmit queue, by its first register.
    contexts: BTreeMap<usize, [u64; 2]>,
    /// Mailbox of the physical function: bits that the virtual function has not read yet, and words for it.
    mailbox: u32,
    api: u32,
    messages: VecDeque<u32>,
}

/// One controller; see the module text.
pub struct Model {
    family: Family,
    bus: Arc<ModelBus>,
    state: Mutex<State>,
}

/// What the model saw of one sent frame.
pub type SentFrame = (usize, Vec<u8>);

impl Model {
    /// A controller after power-up.
    pub fn new(family: Family) -> Arc<Model> {
        let model = Model {
            family,
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
        let id = self.family.layout().id.to_le_bytes();
        config[..4].copy_from_slice(&[0x86, 0x80, id[0], id[1]]);
        // A capability list with MSI-X alone.
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        config[0x40] = 0x11;
        let space: Arc<dyn RegisterSpace> = Arc::clone(self) as _;
        let device = ModelDevice::new("model", &self.bus, config, [(0, space)])?;
        let model = Arc::clone(self);
        Ok(device
            .with_interrupts(interrupts)
            .on_reset(move || model.power_up(&mut model.lock())))
    }

    /// The model's side of memory.
    pub fn bus(&self) -> &ModelBus {
        &self.bus
    }

    /// What the driver did against the datasheet.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Resets by register so far.
    pub fn resets(&self) -> u32 {
        self.lock().resets
    }

    /// Value of a register, without the effects of reading it.
    pub fn register(&self, offset: usize) -> u32 {
        self.lock().regs.get(&offset).copied().unwrap_or(0)
    }

    /// Sets a register, without the effects of writing it.
    pub fn set_register(&self, offset: usize, value: u32) {
        self.lock().regs.insert(offset, value);
    }

    /// From now on every register reads as ones, or no longer.
    pub fn set_gone(&self, gone: bool) {
        self.lock().gone = gone;
    }

    /// From now on enable bits and resets take no effect, or do again.
    pub fn set_deaf(&self, deaf: bool) {
        self.lock().deaf = deaf;
    }

    /// Takes the cable out, or puts it in.
    pub fn set_link(&self, up: bool) {
        self.lock().link_down = !up;
    }

    /// A frame arrives for `queue`; false when it has no buffer. Spread over `buffer` bytes each.
    pub fn receive(&self, queue: usize, bytes: &[u8], buffer: usize) -> bool {
        let mut chunks = bytes.chunks(buffer.max(1)).peekable();
        while let Some(chunk) = chunks.next() {
            let end = u64::from(chunks.peek().is_none()) << 1;
            let len = u64::try_from(chunk.len()).unwrap_or(0) & 0xffff;
            if !self.write_back(queue, chunk, len << 32 | end | 1) {
                return false;
            }
        }
        true
    }

    /// Completes the next receive descriptor with this second half, after writing `bytes` to its buffer.
    pub fn write_back(&self, queue: usize, bytes: &[u8], word: u64) -> bool {
        let at = self.rx(queue);
        let (head, tail) = (self.register(at + HEAD), self.register(at + TAIL));
        if head == tail || self.slots(at) == 0 {
            return false;
        }
        let descriptor = self.base(at) + 16 * u64::from(head);
        let Ok(buffer) = self.bus.read_u64(descriptor) else {
            return false;
        };
        // A buffer that cannot be written is the bus's to count.
        let _ = self.bus.write(buffer, bytes);
        let done = self.bus.write_u64(descriptor + 8, word).is_ok();
        self.set_register(at + HEAD, (head + 1) % self.slots(at));
        done
    }

    /// Writes the second half of any descriptor of a ring.
    pub fn scribble(&self, transmit: bool, queue: usize, slot: u32, word: u64) {
        let at = if transmit {
            self.tx(queue)
        } else {
            self.rx(queue)
        };
        let slots = self.slots(at);
        if slots > 0 {
            let place = self.base(at) + 16 * u64::from(slot % slots) + 8;
            let _ = self.bus.write_u64(place, word);
        }
    }

    /// Sends up to `most` frames of the queue, completing those that ask for it.
    pub fn transmit(&self, queue: usize, most: usize) -> Vec<SentFrame> {
        let at = self.tx(queue);
        let mut sent = Vec::new();
        while sent.len() < most && self.slots(at) > 0 {
            let head = self.register(at + HEAD);
            if head == self.register(at + TAIL) {
                break;
            }
            let descriptor = self.base(at) + 16 * u64::from(head);
            let (Ok(address), Ok(word)) = (
                self.bus.read_u64(descriptor),
                self.bus.read_u64(descriptor + 8),
            ) else {
                break;
            };
            let [l0, l1, kind, command, ..] = word.to_le_bytes();
            if self.is_context(word) {
                self.lock().contexts.insert(at, [address, word]);
                self.set_register(at + HEAD, (head + 1) % self.slots(at));
                continue;
            }
            let len = usize::from(u16::from_le_bytes([l0, l1]));
            let mut bytes = vec![0; len];
            if self.bus.read(address, &mut bytes).is_err() {
                break;
            }
            let layout = self.family.layout();
            let payload = word >> 46;
            if word >> 32 & 1 << 9 != 0 && !self.checksum(at, &mut bytes) {
                self.violation(format!("no checksum for {word:#018x}"));
            }
            if u32::from(kind >> 4) != layout.tx_type
                || command & 0x23 != 0x23
                || layout.tx_type == 3 && payload != u64::try_from(len).unwrap_or(0)
            {
                self.violation(format!("transmit descriptor {word:#018x}"));
            }
            if command & 8 != 0 {
                let _ = self.bus.write_u64(descriptor + 8, 1 << 32);
            }
            self.set_register(at + HEAD, (head + 1) % self.slots(at));
            sent.push((queue, bytes));
        }
        sent
    }

    /// Whether the second half of a descriptor is a context descriptor's.
    fn is_context(&self, word: u64) -> bool {
        let context = if self.family.layout().tx_type == 1 {
            0
        } else {
            2
        };
        word >> 29 & 1 == 1 && word >> 20 & 0xf == context
    }

    /// Inserts a UDP checksum as the queue's context says.
    fn checksum(&self, at: usize, packet: &mut [u8]) -> bool {
        let Some([first, second]) = self.lock().contexts.get(&at).copied() else {
            return false;
        };
        let field_of =
            |n: u32, mask: u64| usize::try_from(first >> n & mask).unwrap_or(usize::MAX / 4);
        let (start, field) = if self.family.layout().tx_type == 1 {
            // TUCSS, TUCSO; an end other than that of the packet is not expected, nor TCP.
            if first >> 48 != 0 || second >> 24 & 1 != 0 {
                return false;
            }
            (field_of(32, 0xff), field_of(40, 0xff))
        } else {
            // MACLEN and IPLEN; L4T says UDP, IDX says context 0.
            if second >> 11 & 3 != 0 || second >> 36 & 7 != 0 {
                return false;
            }
            let start = field_of(9, 0x7f) + field_of(0, 0x1ff);
            (start, start + 6)
        };
        insert_checksum(packet, start, field)
    }

    /// Says of up to `most` transmit descriptors that they are done, whatever is in them.
    pub fn complete(&self, queue: usize, most: usize) {
        let at = self.tx(queue);
        for _ in 0..most {
            let head = self.register(at + HEAD);
            if self.slots(at) == 0 || head == self.register(at + TAIL) {
                return;
            }
            let place = self.base(at) + 16 * u64::from(head) + 8;
            let _ = self.bus.write_u64(place, 1 << 32);
            self.set_register(at + HEAD, (head + 1) % self.slots(at));
        }
    }

    fn rx(&self, queue: usize) -> usize {
        let layout = self.family.layout();
        layout.rx + layout.stride * (queue % layout.queues)
    }

    fn tx(&self, queue: usize) -> usize {
        let layout = self.family.layout();
        layout.tx + layout.stride * (queue % layout.queues)
    }

    fn base(&self, at: usize) -> u64 {
        u64::from(self.register(at + HIGH)) << 32 | u64::from(self.register(at + LOW))
    }

    fn slots(&self, at: usize) -> u32 {
        self.register(at + LEN) / 16
    }

    fn violation(&self, what: String) {
        self.lock().violations.push(what);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn power_up(&self, s: &mut State) {
        s.regs.clear();
        s.pending.clear();
        s.seen.clear();
        s.contexts.clear();
        let (low, high) = (0x0300_5452, 0x8000_0201);
        match self.family {
            Family::E1000e | Family::Igb => {
                s.regs.extend([(0x5400, low), (0x5404, high)]);
                s.pending.insert(0x0010, (1 << 9, SLOW));
            }
            Family::Ixgbe => {
                s.regs.extend([(0xa200, low), (0xa204, high)]);
                s.pending.insert(0x1_0010, (1 << 9, SLOW));
                s.pending.insert(0x2f00, (1 << 3, SLOW));
                // As the hardware has them after a reset.
                s.regs.insert(0x2f00, 0x0008_8000);
                s.regs.insert(0x1_0110, 3 << 18);
            }
            Family::IxgbeVf => {
                s.mailbox = 1 << 7;
                s.api = 0;
                s.messages.clear();
            }
        }
    }

    /// The ring whose registers hold `offset`: its first register and the distance.
    fn ring_of(&self, offset: usize) -> Option<(usize, usize, bool)> {
        let layout = self.family.layout();
        [(layout.rx, false), (layout.tx, true)]
            .into_iter()
            .find_map(|(base, transmit)| {
                let distance = offset.checked_sub(base)?;
                let inside = distance < layout.stride * layout.queues;
                let register = distance % layout.stride;
                inside.then_some((offset - register, register, transmit))
            })
    }

    fn read_register(&self, s: &mut State, offset: usize) -> u32 {
        if s.gone {
            return u32::MAX;
        }
        if let Some((bits, looks)) = s.pending.get(&offset).copied()
            && !s.deaf
        {
            if looks == 0 {
                s.pending.remove(&offset);
                *s.regs.entry(offset).or_default() |= bits;
                *s.seen.entry(offset).or_default() |= bits;
            } else {
                s.pending.insert(offset, (bits, looks - 1));
            }
        }
        let value = s.regs.get(&offset).copied().unwrap_or(0);
        match (self.family, offset) {
            (Family::IxgbeVf, _) => super::model_vf::read(s.parts(), offset, value),
            // The PHY answers at once: negotiation is on.
            (Family::E1000e | Family::Igb, 0x20) => value | 1 << 28 | 0x1140,
            (_, STATUS) => {
                let disabled = s.regs.get(&CTRL).copied().unwrap_or(0) & 4 != 0;
                let link = if s.link_down { 0 } else { 0x83 };
                link | u32::from(!disabled) << 19
            }
            (Family::Ixgbe, 0x42a4) if !s.link_down => 1 << 30 | 3 << 28,
            // Statistics and interrupt causes.
            (_, 0x4000..0x4100 | 0xc0) => {
                s.regs.insert(offset, 0);
                value
            }
            _ => value,
        }
    }

    fn write_register(&self, s: &mut State, offset: usize, value: u32) {
        if s.gone {
            return;
        }
        if self.family == Family::IxgbeVf && super::model_vf::write(s.parts(), offset, value) {
            return;
        }
        if offset == CTRL && value & 1 << 26 != 0 {
            s.resets += 1;
            if s.deaf {
                s.regs.insert(offset, value);
            } else {
                self.power_up(s);
            }
            return;
        }
        if self.family == Family::Ixgbe {
            rules_of_10g(s, offset, value);
        }
        if let Some((ring, register, transmit)) = self.ring_of(offset) {
            self.write_ring(s, ring, register, transmit, value);
            return;
        }
        s.regs.insert(offset, value);
    }

    fn write_ring(&self, s: &mut State, ring: usize, register: usize, transmit: bool, value: u32) {
        let enables = self.family.layout().enables;
        let reg = |s: &State, at: usize| s.regs.get(&at).copied().unwrap_or(0);
        let slots = reg(s, ring + LEN) / 16;
        let enabled = reg(s, ring + DCTL) & ENABLE != 0;
        let wrong = match register {
            TAIL if slots > 0 && value >= slots => Some("tail outside the ring"),
            TAIL if value != 0 && enables && !enabled => Some("tail of a queue that is off"),
            LEN if !value.is_multiple_of(128) => Some("ring length not a multiple of 128"),
            LOW if !value.is_multiple_of(128) => Some("ring not at a multiple of 128"),
            LOW | HIGH | LEN if enables && enabled => Some("ring of a queue that is on moved"),
            _ => None,
        };
        if let Some(what) = wrong {
            s.violations.push(format!("{what}: {value:#x}"));
        }
        let starts = register == DCTL && enables && value & ENABLE != 0;
        if starts && !enabled {
            let dma_on = reg(s, 0x4a80) & 1 != 0;
            if self.family == Family::Ixgbe && transmit && !dma_on {
                s.violations
                    .push("transmit queue on before DMATXCTL.TE".into());
            }
            // The bit is read as set a while after it was written.
            s.regs.insert(ring + DCTL, value & !ENABLE);
            s.pending.insert(ring + DCTL, (ENABLE, SLOW));
            return;
        }
        s.regs.insert(ring + register, value);
    }
}

/// The parts of the state that the mailbox of a virtual function touches.
pub(super) struct Parts<'a> {
    pub(super) regs: &'a mut BTreeMap<usize, u32>,
    pub(super) mailbox: &'a mut u32,
    pub(super) api: &'a mut u32,
    pub(super) resets: &'a mut u32,
    pub(super) violations: &'a mut Vec<String>,
    pub(super) link_down: bool,
    pub(super) deaf: bool,
}

impl State {
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            regs: &mut self.regs,
            mailbox: &mut self.mailbox,
            api: &mut self.api,
            resets: &mut self.resets,
            violations: &mut self.violations,
            link_down: self.link_down,
            deaf: self.deaf,
        }
    }
}

/// What section 4.6 of the 82599's datasheet asks of the order.
fn rules_of_10g(s: &mut State, offset: usize, value: u32) {
    let reg = |at: usize| s.regs.get(&at).copied().unwrap_or(0);
    let saw = |at: usize, bit: u32| s.seen.get(&at).copied().unwrap_or(0) & bit != 0;
    let ring = (0x1000..0x1400).contains(&offset) || (0x6000..0x6400).contains(&offset);
    let mut wrong = None;
    if ring && value != 0 && !(saw(0x1_0010, 1 << 9) && saw(0x2f00, 1 << 3)) {
        wrong = Some("queues touched before EEC.ARD and RDRXCTL.DMAIDONE were seen");
    }
    match offset {
        0x8120 | 0xcc00..0xcc20 if reg(0x4900) & 1 << 6 == 0 => {
            wrong = Some("transmit buffers changed while the arbiter runs");
        }
        0x3000 if value & 1 != 0 => {
            let crc = (reg(0x2f00) & 1 << 1 != 0, reg(0x4240) & 1 << 1 != 0);
            if reg(0x8d00) & 1 << 1 == 0 {
                wrong = Some("receiver on while the security block is");
            } else if reg(0x2f00) & 0x1f << 17 != 0 || reg(0x2f00) & 1 << 25 == 0 {
                wrong = Some("receiver on with RSCFRSTSIZE not 0 or RSCACKC not 1");
            } else if crc.0 != crc.1 {
                wrong = Some("CRC stripping in RDRXCTL and HLREG0 differs");
            }
        }
        0x3c00..0x3c20 if reg(0x3000) & 1 != 0 => {
            wrong = Some("receive buffers changed while the receiver runs");
        }
        // SECRXCTRL.RX_DIS empties the security block, which then says so.
        0x8d00 => {
            let ready = if value & 1 << 1 != 0 { 1 } else { 0 };
            s.regs.insert(0x8d04, ready);
        }
        _ => {}
    }
    if let Some(what) = wrong {
        s.violations
            .push(format!("{what}: {offset:#x} = {value:#x}"));
    }
}

impl RegisterSpace for Model {
    fn read(&self, offset: usize, size: usize) -> u64 {
        if size != 4 {
            self.violation(format!("read of {size} bytes at {offset:#x}"));
        }
        u64::from(self.read_register(&mut self.lock(), offset))
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        if size != 4 {
            self.violation(format!("write of {size} bytes at {offset:#x}"));
        }
        let value = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        self.write_register(&mut self.lock(), offset, value);
    }

    fn len(&self) -> usize {
        match self.family {
            Family::IxgbeVf => 0x4000,
            _ => 0x2_0000,
        }
    }
}
