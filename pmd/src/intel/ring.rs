//! Descriptor rings, the same for all families.
//!
//! The 82574's extended receive descriptors and the advanced ones of igb and ixgbe have one layout where it matters here, and
//! so have their transmit data descriptors but for three constants ([`Format`]):
//!
//! ```text
//! receive, given          receive, written back             transmit data
//! 0  buffer address       0  packet type, RSS hash          0   buffer address
//! 8  0 (bit 0: done)      8  status, errors (bit 0: done)   8   length, type, command
//!                         12 length, VLAN tag               12  status (bit 0: done), payload length
//! ```
//!
//! Checksums: a context descriptor says once where the UDP header of a frame lies whose checksum was left to the port
//! ([`crate::checksum`]: always in the same place), and holds until the next reset; a bit of the data descriptor asks for it.
//!
//! Frames are single buffers: a packet that the device spread over several descriptors is thrown away whole. What the device
//! writes back is input: "done" counts only for descriptors that it was given, a length only within what it was given, and a
//! completion only where one was asked for.

use std::collections::VecDeque;
use std::sync::Arc;

use super::regs::Doorbell;
use crate::arena::Arena;
use crate::checksum;
use crate::device::ring::FrameRing;
use crate::device::{ArenaMap, DeviceError, DmaMem};
use crate::frame::Frame;
use crate::pool::Pool;

/// Bytes of a descriptor of any kind.
pub(super) const DESCRIPTOR: usize = 16;
/// Ring sizes are powers of two between these; all devices want whole cache lines of 128 bytes.
pub(super) const RING_MIN: u16 = 64;
/// As the 82574's and the 82576's datasheets allow, and more than enough.
pub(super) const RING_MAX: u16 = 4096;

/// Frames are given to the device in portions, so that neither the pool nor the tail register is touched for each one.
const REFILL: u32 = 32;
/// A completion is asked for every so many descriptors, and for the last of a burst.
const REPORT_EVERY: u32 = 32;
/// An Ethernet header.
const SHORTEST_RX: usize = 14;
/// Shorter frames are filled up with zeros; the devices cannot send them.
const SHORTEST_TX: usize = 17;

const RX_DONE: u64 = 1;
const RX_END_OF_PACKET: u64 = 1 << 1;
const TX_DONE: u32 = 1;

/// DCMD.EOP, the descriptor ends a packet; IFCS, insert the frame check sequence; DEXT, not a legacy descriptor.
const TX_WHOLE_FRAME: u32 = 1 << 24 | 1 << 25 | 1 << 29;
/// DCMD.RS, report status.
const TX_REPORT: u32 = 1 << 27;
/// DCMD.DEXT, for context descriptors.
const TX_EXTENDED: u64 = 1 << 29;
/// POPTS.TXSM in the fourth word: insert the checksum as the context says.
const TX_CHECKSUM: u32 = 1 << 9;

/// What differs between the families' descriptors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Format {
    /// DTYP, bits 20 to 23 of the third word: 1 for extended, 3 for advanced data descriptors.
    pub(super) tx_type: u32,
    /// Where the fourth word repeats the length of the whole packet.
    pub(super) tx_payload_shift: Option<u32>,
    /// The context descriptor's two halves.
    tx_context: [u64; 2],
    /// Bits of the status word for which a packet is thrown away. Wrong checksums inside IP are none of our business.
    pub(super) rx_errors: u32,
}

impl Format {
    /// 82574 datasheet, 3.2.4 (extended receive) and 3.3.7 (data): RXE, SEQ, SE, CE.
    pub(super) const EXTENDED: Format = Format {
        tx_type: 1 << 20,
        tx_payload_shift: None,
        tx_context: EXTENDED_CONTEXT,
        rx_errors: 1 << 31 | 1 << 26 | 1 << 25 | 1 << 24,
    };
    /// 82576 datasheet, 7.1.5 and 7.2.2.3: RXE. The MAC drops what has a wrong check sequence.
    pub(super) const ADVANCED: Format = Format {
        tx_type: 3 << 20,
        tx_payload_shift: Some(14),
        tx_context: ADVANCED_CONTEXT,
        rx_errors: 1 << 31,
    };
    /// 82599 datasheet, 7.1.6.2: RXE (CRC, length, oversize in one bit of the 82599; bits 24 to 26 and 29 in the X540 too).
    pub(super) const ADVANCED_10G: Format = Format {
        tx_type: 3 << 20,
        tx_payload_shift: Some(14),
        tx_context: ADVANCED_CONTEXT,
        rx_errors: 1 << 29,
    };
}

/// 82574 datasheet, 3.3.6: TUCSS and TUCSO; TUCSE 0 is the end of the packet; neither TCP nor IPv4.
const EXTENDED_CONTEXT: [u64; 2] = [
    (checksum::UDP_AT as u64) << 32 | (checksum::FIELD_AT as u64) << 40,
    TX_EXTENDED,
];
/// 82576 datasheet, 7.2.2.2, and 82599 datasheet, 7.2.3.2.3: IPLEN and MACLEN; DTYP 2, L4T 0 (UDP), not IPv4, context 0.
const ADVANCED_CONTEXT: [u64; 2] = [
    checksum::IPV6_LEN as u64 | (checksum::ETHERNET_LEN as u64) << 9,
    TX_EXTENDED | 2 << 20,
];

/// What one call of [`RxRing::poll`] found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) packets: usize,
    pub(super) bytes: usize,
    /// Packets thrown away: marked broken, too long, or written back in a way that the datasheet does not have.
    pub(super) errors: usize,
}

/// A receive ring.
pub(super) struct RxRing {
    mem: DmaMem,
    /// Frames of the descriptors that the device has.
    slots: FrameRing,
    /// In the middle of a packet that does not fit one buffer.
    skipping: bool,
    /// Largest length that the device may report.
    largest: usize,
    errors: u64,
    tail: Doorbell,
    scratch: Vec<Frame>,
}

impl RxRing {
    pub(super) fn new(
        mem: DmaMem,
        entries: u16,
        largest: usize,
        format: Format,
        tail: Doorbell,
        arena: &Arc<Arena>,
    ) -> Result<RxRing, DeviceError> {
        Ok(RxRing {
            slots: slots(&mem, entries, arena)?,
            mem,
            skipping: false,
            largest,
            errors: u64::from(format.rx_errors),
            tail,
            scratch: Vec::with_capacity(usize::from(entries)),
        })
    }

    /// Takes up to `max` packets from the ring.
    pub(super) fn poll(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> Received {
        let mut found = Received::default();
        while found.packets < max && self.slots.held() > 0 {
            let word = self.mem.load_acquire64(at(self.slots.tail()) + 8);
            if word & RX_DONE == 0 {
                break;
            }
            // SAFETY: the device reported the descriptor as done, so it is through with the buffer.
            let Some(mut frame) = (unsafe { self.slots.pop() }) else {
                break;
            };
            let end = word & RX_END_OF_PACKET != 0;
            let len = usize::try_from(word >> 32 & 0xffff).unwrap_or(usize::MAX);
            let whole = end && !self.skipping;
            self.skipping = !end;
            if whole
                && word & self.errors == 0
                && (SHORTEST_RX..=self.largest).contains(&len)
                && frame.append(len).is_some()
            {
                found.packets += 1;
                found.bytes += len;
                out.push(frame);
            } else {
                found.errors += usize::from(end);
                pool.put(frame);
            }
        }
        found
    }

    /// Gives empty frames to the device, as many as fit.
    pub(super) fn refill(&mut self, pool: &mut Pool, map: &ArenaMap) {
        // One descriptor stays empty: equal head and tail mean that the device has none.
        let room = self.slots.free() - 1;
        if room < REFILL {
            return;
        }
        let mut given = false;
        pool.get_bulk(&mut self.scratch, room as usize);
        for frame in self.scratch.drain(..) {
            let address = map
                .iova(&frame)
                .filter(|_| frame.tailroom() >= self.largest);
            // A pool of another arena: the device cannot reach its frames.
            let Some(address) = address else {
                frame.give_back();
                continue;
            };
            match self.slots.push(frame) {
                Ok(slot) => {
                    self.mem.write64(at(slot), address);
                    self.mem.write64(at(slot) + 8, 0);
                    given = true;
                }
                Err(frame) => frame.give_back(),
            }
        }
        if given {
            self.tail.ring(self.slots.head());
        }
    }

    /// Takes back everything.
    ///
    /// # Safety
    /// The device was stopped: reset, or bus-master off and every transfer done.
    pub(super) unsafe fn reclaim(&mut self, pool: &mut Pool) {
        // SAFETY: passed on to the caller.
        unsafe { self.slots.drain(pool) };
        self.mem.zero();
        self.skipping = false;
    }
}

/// A transmit ring.
pub(super) struct TxRing {
    mem: DmaMem,
    /// Frames of the descriptors that the device has.
    slots: FrameRing,
    /// Descriptors for which a completion was asked for, oldest first.
    reports: VecDeque<u32>,
    completed: u64,
    largest: usize,
    format: Format,
    /// Whether checksums may be left to the device, and whether it has been told where they lie.
    checksums: bool,
    told: bool,
    /// Completions with which the frame in the context descriptor's slot is back.
    told_until: u64,
    tail: Doorbell,
}

/// A data descriptor whose second half is to be written.
#[derive(Clone, Copy)]
struct Data {
    slot: u32,
    len: usize,
    partial: bool,
}

/// What one call of [`TxRing::push`] did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) packets: usize,
    pub(super) bytes: usize,
    /// Frames that the device cannot send: too long, not Ethernet, of another arena.
    pub(super) errors: usize,
}

impl TxRing {
    pub(super) fn new(
        mem: DmaMem,
        entries: u16,
        largest: usize,
        format: Format,
        checksums: bool,
        tail: Doorbell,
        arena: &Arc<Arena>,
    ) -> Result<TxRing, DeviceError> {
        Ok(TxRing {
            slots: slots(&mem, entries, arena)?,
            mem,
            reports: VecDeque::with_capacity(usize::from(entries)),
            completed: 0,
            largest,
            format,
            checksums,
            told: false,
            told_until: 0,
            tail,
        })
    }

    /// Whether checksums may be left to the device.
    pub(super) fn completes_checksums(&self) -> bool {
        self.checksums
    }

    /// Descriptors that the device has.
    pub(super) fn pending(&self) -> u32 {
        self.slots.held()
    }

    /// Frames that the device has not sent.
    pub(super) fn unsent(&self) -> u32 {
        let context = self.told && self.completed < self.told_until;
        self.slots.held() - u32::from(context)
    }

    /// Descriptors completed since the start.
    pub(super) fn completed(&self) -> u64 {
        self.completed
    }

    /// Takes frames from the front of `frames`, as many as fit, and gives them to the device.
    pub(super) fn push(
        &mut self,
        pool: &mut Pool,
        map: &ArenaMap,
        frames: &mut Vec<Frame>,
    ) -> Sent {
        let mut sent = Sent::default();
        // One descriptor stays empty: equal head and tail mean that the device has none.
        let mut n = frames.len().min(self.slots.free() as usize - 1);
        if self.checksums && !self.told && n > 0 {
            self.told = self.tell(pool);
            n = n.min(self.slots.free() as usize - 1);
        }
        // Newest descriptor that asks for no completion yet.
        let mut silent = None;
        for frame in frames.drain(..n) {
            match self.write(map, frame) {
                Ok(data) => {
                    sent.packets += 1;
                    sent.bytes += data.len;
                    let report = self.slots.head().is_multiple_of(REPORT_EVERY);
                    self.command(data, report);
                    silent = (!report).then_some(data);
                }
                Err(frame) => {
                    sent.errors += 1;
                    pool.put(frame);
                }
            }
        }
        if let Some(data) = silent {
            self.command(data, true);
        }
        if sent.packets > 0 {
            self.tail.ring(self.slots.head());
        }
        sent
    }

    /// Writes the context descriptor, with an empty frame in its slot. The data descriptors behind it report it as done.
    #[cold]
    fn tell(&mut self, pool: &mut Pool) -> bool {
        let Some(frame) = pool.get() else {
            return false;
        };
        match self.slots.push(frame) {
            Ok(slot) => {
                let [first, second] = self.format.tx_context;
                self.mem.write64(at(slot), first);
                self.mem.write64(at(slot) + 8, second);
                self.told_until = self.completed + u64::from(self.slots.held());
                true
            }
            Err(frame) => {
                frame.give_back();
                false
            }
        }
    }

    /// Puts a frame into the next descriptor, whose second half is then to be written.
    #[inline(always)]
    fn write(&mut self, map: &ArenaMap, mut frame: Frame) -> Result<Data, Frame> {
        let short = frame.len() < SHORTEST_TX;
        if short && !pad(&mut frame) || frame.len() > self.largest {
            return Err(frame);
        }
        let Some(address) = map.iova(&frame) else {
            return Err(frame);
        };
        if frame.checksum_left() && !self.told {
            checksum::complete(&mut frame);
        }
        let (len, partial) = (frame.len(), frame.checksum_left());
        let slot = self.slots.push(frame)?;
        self.mem.write64(at(slot), address);
        Ok(Data { slot, len, partial })
    }

    #[inline(always)]
    fn command(&mut self, Data { slot, len, partial }: Data, report: bool) {
        // Lengths are at most `largest`, which fits 16 bits.
        let len = u32::try_from(len).unwrap_or(0) & 0xffff;
        let mut command = self.format.tx_type | TX_WHOLE_FRAME | len;
        if report {
            command |= TX_REPORT;
            self.reports.push_back(slot);
        }
        let mut status = self.format.tx_payload_shift.map_or(0, |shift| len << shift);
        if partial {
            status |= TX_CHECKSUM;
        }
        self.mem
            .write64(at(slot) + 8, u64::from(status) << 32 | u64::from(command));
    }

    /// Gives the frames that were sent to `pool`.
    pub(super) fn complete(&mut self, pool: &mut Pool) {
        while let Some(&report) = self.reports.front() {
            if self.mem.load_acquire32(at(report) + 12) & TX_DONE == 0 {
                return;
            }
            self.reports.pop_front();
            loop {
                let slot = self.slots.tail();
                // SAFETY: the device works in order and reported this descriptor or a later one as done.
                let Some(frame) = (unsafe { self.slots.pop() }) else {
                    break;
                };
                pool.put(frame);
                self.completed += 1;
                if slot == report {
                    break;
                }
            }
        }
    }

    /// Takes back everything.
    ///
    /// # Safety
    /// The device was stopped: reset, or bus-master off and every transfer done.
    pub(super) unsafe fn reclaim(&mut self, pool: &mut Pool) {
        // SAFETY: passed on to the caller.
        unsafe { self.slots.drain(pool) };
        self.mem.zero();
        self.reports.clear();
        self.told = false;
    }
}

/// Fills a frame up with zeros; false when it is not even an Ethernet header.
#[cold]
fn pad(frame: &mut Frame) -> bool {
    let missing = SHORTEST_TX.saturating_sub(frame.len());
    frame.len() >= SHORTEST_RX && frame.append(missing).map(|room| room.fill(0)).is_some()
}

#[inline(always)]
fn at(slot: u32) -> usize {
    slot as usize * DESCRIPTOR
}

/// The slots of a ring, after the checks that make all descriptor accesses valid.
fn slots(mem: &DmaMem, entries: u16, arena: &Arc<Arena>) -> Result<FrameRing, DeviceError> {
    let fits = mem.len() >= usize::from(entries) * DESCRIPTOR;
    (RING_MIN..=RING_MAX)
        .contains(&entries)
        .then(|| FrameRing::new(u32::from(entries), arena))
        .flatten()
        .filter(|_| fits)
        .ok_or(DeviceError::DmaRequest {
            len: mem.len(),
            align: DESCRIPTOR,
            reason: "rings have a power of two from 64 to 4096 descriptors",
        })
}
