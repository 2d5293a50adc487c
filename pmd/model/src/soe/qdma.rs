//! One QDMA instance: rings of 32-byte descriptors, reports of what was sent, interrupt status.

use crate::{Bus, DmaFault};

pub(super) const LEN: usize = 0x2000;

const GLOBAL: usize = 0x004;
const GLOBAL_TX: u32 = 1;
const GLOBAL_RX: u32 = 1 << 2;
const GLOBAL_BUSY: u32 = 1 << 1 | 1 << 3;
const LMGR: usize = 0x1000;
const FWD_BUF: usize = 0x0014;
const FWD_DSCP: usize = 0x0010;
const STATUS: [usize; 5] = [0x020, 0x024, 0x720, 0x724, 0x730];
/// Base, configuration, clear, status of both queues of reports.
const REPORTS: [[usize; 4]; 2] = [[0x50, 0x54, 0x58, 0x5c], [0x48, 0x4c, 0x64, 0x68]];

/// Offsets of words in a descriptor.
const CTRL: u64 = 4;
const ADDR: u64 = 8;
const DATA: u64 = 12;
const MSG: [u64; 4] = [16, 20, 24, 28];

const DONE: u32 = 1 << 31;
const DROP: u32 = 1 << 30;
const MORE: u32 = 1 << 29;
/// Buffers of one frame, at most.
const MOST_PARTS: usize = 128;

/// A frame that the driver gave.
pub(super) struct Given {
    pub(super) ring: u8,
    pub(super) bytes: Vec<u8>,
    pub(super) msg: [u32; 3],
    descriptors: Vec<u16>,
    next: u32,
}

pub(super) struct Qdma {
    words: Vec<u32>,
    /// Queue head and reports waiting, as the status register shows them.
    reports: [(u32, u32); 2],
    turn: u8,
}

fn tx(n: u8) -> usize {
    let n = usize::from(n);
    if n < 8 {
        0x100 + 0x20 * n
    } else {
        0xb00 + 0x20 * (n - 8)
    }
}

fn rx(n: u8) -> usize {
    let n = usize::from(n);
    if n < 16 {
        0x200 + 0x20 * n
    } else {
        0xe00 + 0x20 * (n - 16)
    }
}

/// Registers that the reference names.
fn is_known(at: usize) -> bool {
    let inside = |from: usize, to: usize| (from..to).contains(&at);
    matches!(
        at,
        0x4 | 0x10 | 0x14 | 0x18 | 0x48..=0x5c | 0x64 | 0x68 | 0x70 | 0x1000 | 0x1004 | 0x10a0
    ) || inside(0x20, 0x48)
        || inside(0x100, 0x500)
        || inside(0x720, 0x7c8)
        || inside(0xb00, 0x1000)
        || inside(0x100c, 0x1160)
}

impl Qdma {
    pub(super) fn new() -> Qdma {
        Qdma {
            words: vec![0; LEN / 4],
            reports: [(0, 0); 2],
            turn: 0,
        }
    }

    fn get(&self, at: usize) -> u32 {
        self.words.get(at / 4).copied().unwrap_or(0)
    }

    fn set(&mut self, at: usize, v: u32) {
        if let Some(w) = self.words.get_mut(at / 4) {
            *w = v;
        }
    }

    pub(super) fn read(&self, bus: &Bus, at: usize) -> u32 {
        for (queue, (head, held)) in REPORTS.iter().zip(self.reports) {
            if at == queue[3] {
                return held << 16 | head;
            }
        }
        if !is_known(at) {
            bus.broke(
                "only registers that are known",
                format!("QDMA read {at:#x}"),
            );
            return 0;
        }
        match at {
            GLOBAL => self.get(at) & !GLOBAL_BUSY,
            _ => self.get(at),
        }
    }

    pub(super) fn write(&mut self, bus: &Bus, at: usize, value: u32) {
        if !is_known(at) {
            bus.broke(
                "only registers that are known",
                format!("QDMA write {at:#x}"),
            );
            return;
        }
        for (i, queue) in REPORTS.iter().enumerate() {
            if at == queue[0] || at == queue[1] {
                self.reports[i] = (0, 0);
            }
            if at == queue[2] {
                return self.clear_reports(bus, i, value);
            }
            if at == queue[3] {
                bus.broke("the report status is read only", format!("{value:#x}"));
                return;
            }
        }
        match at {
            _ if STATUS.contains(&at) => self.set(at, self.get(at) & !value),
            LMGR => {
                if self.get(FWD_BUF) == 0 || self.get(FWD_DSCP) == 0 {
                    bus.broke("forward buffers have addresses before they are counted", "");
                }
                self.set(at, value & !(1 << 31));
            }
            GLOBAL => {
                if value & (GLOBAL_TX | GLOBAL_RX) != 0 && self.get(LMGR) & 0x1_ffff == 0 {
                    bus.broke("the forward pool is made before DMA starts", "");
                }
                self.set(at, value);
            }
            _ => {
                if self.is_base(at) && !value.is_multiple_of(32) {
                    bus.broke(
                        "rings are aligned to 32 bytes",
                        format!("{at:#x} = {value:#x}"),
                    );
                }
                self.set(at, value);
            }
        }
    }

    fn is_base(&self, at: usize) -> bool {
        (0..32).any(|n| at == tx(n) || at == rx(n))
    }

    fn clear_reports(&mut self, bus: &Bus, queue: usize, value: u32) {
        let depth = (self.get(REPORTS[queue][1]) & 0xfff).max(1);
        let (head, held) = self.reports[queue];
        if value > 0x80 || value > held {
            bus.broke(
                "no more reports are cleared than there are, and 0x80 at once",
                format!("{value} of {held}"),
            );
            return;
        }
        self.reports[queue] = ((head + value) % depth, held - value);
    }

    /// Whether an enabled interrupt of a bank is pending.
    pub(super) fn pending(&self, bank: usize) -> bool {
        let enable = [
            0x28 + 8 * bank,
            0x2c + 8 * bank,
            0x740 + 32 * bank,
            0x744 + 32 * bank,
            0x750 + 32 * bank,
        ];
        let words = STATUS.iter().zip(enable);
        words
            .into_iter()
            .any(|(s, e)| self.get(*s) & self.get(e) != 0)
    }

    /// The next frame of the rings, which take turns. `Err` is a ring that the engine cannot make sense of.
    pub(super) fn take(&mut self, bus: &mut Bus) -> Option<Given> {
        if self.get(GLOBAL) & GLOBAL_TX == 0 {
            return None;
        }
        for i in 0..32 {
            let n = (self.turn + i) % 32;
            let at = tx(n);
            if self.get(at) == 0 || self.get(at + 8) == self.get(at + 12) {
                continue;
            }
            self.turn = (n + 1) % 32;
            match self.fetch(bus, n) {
                Ok(given) => return Some(given),
                Err(rule) => {
                    bus.broke(rule, format!("transmit ring {n}"));
                    // As coherent errors are shown; the ring stands still.
                    let (word, bit) = if n < 8 {
                        (STATUS[0], 8 + n)
                    } else {
                        (STATUS[4], n)
                    };
                    self.set(word, self.get(word) | 1 << bit);
                    self.set(at + 12, self.get(at + 8));
                }
            }
        }
        None
    }

    fn fetch(&self, bus: &mut Bus, ring: u8) -> Result<Given, &'static str> {
        let (base, cpu) = (u64::from(self.get(tx(ring))), self.get(tx(ring) + 8));
        let mut index = self.get(tx(ring) + 12);
        let mut given = Given {
            ring,
            bytes: Vec::new(),
            msg: [0; 3],
            descriptors: Vec::new(),
            next: 0,
        };
        let lost = |_: DmaFault| "descriptors and buffers are reachable";
        loop {
            if index > 0xffff || index == cpu {
                return Err("the list of descriptors goes up to the CPU index");
            }
            let at = base + u64::from(index) * 32;
            let ctrl = bus.read32(at + CTRL).map_err(lost)?;
            if ctrl & DONE != 0 {
                return Err("a descriptor that is given is not done");
            }
            let len = usize::try_from(ctrl & 0xffff).unwrap_or(0);
            if len == 0 {
                return Err("a buffer has bytes");
            }
            let mut msg = [0; 3];
            for (m, o) in msg.iter_mut().zip(MSG) {
                *m = bus.read32(at + o).map_err(lost)?;
            }
            if given.descriptors.is_empty() {
                given.msg = msg;
            } else if given.msg != msg {
                return Err("all descriptors of a frame carry the same messages");
            }
            let from = given.bytes.len();
            given.bytes.resize(from + len, 0);
            let address = u64::from(bus.read32(at + ADDR).map_err(lost)?);
            bus.read(address, &mut given.bytes[from..]).map_err(lost)?;
            given.descriptors.push(u16::try_from(index).unwrap_or(0));
            index = bus.read32(at + DATA).map_err(lost)? & 0xffff;
            if ctrl & MORE == 0 {
                given.next = index;
                return Ok(given);
            }
            if given.descriptors.len() >= MOST_PARTS {
                return Err("a frame has at most 128 buffers");
            }
        }
    }

    /// The frame left memory, or was dropped: written back and reported. False when the queue of reports is full, so that
    /// nothing more can be sent.
    pub(super) fn sent(&mut self, bus: &mut Bus, given: &Given, dropped: bool) {
        let at = tx(given.ring);
        self.set(at + 12, given.next);
        let queue = usize::from(self.get(at + 4) & 1 << 4 != 0);
        for index in &given.descriptors {
            let ctrl = u64::from(self.get(at)) + u64::from(*index) * 32 + CTRL;
            let flags = DONE | if dropped { DROP } else { 0 };
            let Ok(old) = bus.read32(ctrl) else { return };
            // A fault here is in the log already.
            let _ = bus.write32(ctrl, old | flags);
            self.report(bus, queue, u32::from(given.ring) << 16 | u32::from(*index));
        }
    }

    fn report(&mut self, bus: &mut Bus, queue: usize, entry: u32) {
        let [base, cfg, ..] = REPORTS[queue];
        let depth = self.get(cfg) & 0xfff;
        let (head, held) = self.reports[queue];
        if depth == 0 || held >= depth {
            let full = if queue == 0 { 1 << 1 } else { 1 << 5 };
            self.set(STATUS[0], self.get(STATUS[0]) | full);
            bus.broke("the queue of reports is emptied before it is full", "");
            return;
        }
        let at = u64::from(self.get(base)) + u64::from((head + held) % depth) * 4;
        if bus.write32(at, entry).is_ok() {
            self.reports[queue].1 += 1;
            let bit = if queue == 0 { 1 } else { 1 << 4 };
            self.set(STATUS[0], self.get(STATUS[0]) | bit);
        }
    }

    /// Writes a frame into a receive ring, over several buffers where it needs them. False, and lost, when there are none.
    pub(super) fn give(&mut self, bus: &mut Bus, ring: u8, bytes: &[u8], msg: [u32; 3]) -> bool {
        let (done, none) = if ring < 16 {
            (1 << ring, 1 << (ring + 16))
        } else {
            (1 << (ring - 16), 1 << ring)
        };
        let word = if ring < 16 { STATUS[1] } else { STATUS[2] };
        let given = self.get(GLOBAL) & GLOBAL_RX != 0 && self.scatter(bus, ring, bytes, msg);
        let bit = if given { done } else { none };
        self.set(word, self.get(word) | bit);
        given
    }

    /// Whether a frame for the ring would find a descriptor.
    pub(super) fn has_room(&self, ring: u8) -> bool {
        let at = rx(ring);
        self.get(GLOBAL) & GLOBAL_RX != 0
            && self.get(at) != 0
            && self.get(at + 8) != self.get(at + 12)
    }

    fn scatter(&mut self, bus: &mut Bus, ring: u8, bytes: &[u8], msg: [u32; 3]) -> bool {
        let at = rx(ring);
        let (base, size) = (u64::from(self.get(at)), self.get(at + 4) & 0xffff);
        let (cpu, mut index) = (self.get(at + 8), self.get(at + 12));
        if base == 0 || size == 0 {
            return false;
        }
        // Which descriptors are needed, before any is written.
        let (mut parts, mut rest) = (Vec::new(), bytes);
        while !rest.is_empty() {
            if index == cpu || parts.len() >= MOST_PARTS {
                return false;
            }
            let d = base + u64::from(index) * 32;
            let (Ok(ctrl), Ok(address)) = (bus.read32(d + CTRL), bus.read32(d + ADDR)) else {
                return false;
            };
            let room = usize::try_from(ctrl & 0xffff).unwrap_or(0);
            if room == 0 || ctrl & DONE != 0 {
                bus.broke(
                    "a receive descriptor has room and is not done",
                    format!("{ring}"),
                );
                return false;
            }
            let (now, later) = rest.split_at(rest.len().min(room));
            parts.push((d, u64::from(address), now));
            rest = later;
            index = (index + 1) % size;
        }
        if parts.len() > 1 && self.get(at + 20) & 1 == 0 {
            return false;
        }
        let last = parts.len() - 1;
        for (i, (d, address, now)) in parts.into_iter().enumerate() {
            if bus.write(address, now).is_err() {
                return false;
            }
            // Only the first of several descriptors tells about the frame.
            let words = if i == 0 { msg } else { [u32::MAX; 3] };
            for (o, w) in MSG.iter().zip(words) {
                if bus.write32(d + o, w).is_err() {
                    return false;
                }
            }
            let len = u32::try_from(now.len()).unwrap_or(0);
            let more = if i == last { 0 } else { MORE };
            if bus.write32(d + CTRL, DONE | more | len).is_err() {
                return false;
            }
        }
        self.set(at + 12, index);
        true
    }
}
