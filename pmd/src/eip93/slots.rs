//! The SAs that the engine knows. A record is written once, before its first packet, and wiped after its last.

use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, OffloadMode, SaId};

use super::NAME;
use super::record::{Image, Parts, SA_LEN};
use super::unknown::Unknowns;
use crate::device::{DeviceError, DmaMem};
use crate::engine::Refusal;

/// The engine's replay window, packets.
pub(super) const WINDOW: u32 = 64;

/// An SA in the engine.
pub(super) struct Slot {
    pub(super) id: SaId,
    pub(super) direction: Direction,
    pub(super) packet: bool,
    pub(super) parts: Parts,
    /// In wire order.
    pub(super) spi: [u8; 4],
    pub(super) nonce: [u8; 4],
    pub(super) in_flight: u32,
    /// Removed: free once nothing is in flight.
    going: bool,
    /// The engine said that the record is wrong: nothing more goes there.
    pub(super) broken: bool,
    /// Outbound packet mode: the last number given to the engine.
    pub(super) last: u32,
    /// Outbound packet mode: the IV of the last packet.
    pub(super) last_iv: [u8; 16],
    /// The last number that a completion told of.
    pub(super) reached: u64,
    image: Image,
    record: DmaMem,
}

impl Slot {
    /// Where the engine finds the record.
    pub(super) fn address(&self) -> u32 {
        // Below 4 GiB by the class it was allocated in, which was checked.
        u32::try_from(self.record.iova()).unwrap_or(0)
    }

    /// Lets numbering go on behind `last`, with nothing in flight: as a record that was never used.
    pub(super) fn renumber(&mut self, last: u32) {
        debug_assert_eq!(self.in_flight, 0);
        self.last = last;
        self.image
            .number(u32::from_be_bytes(self.spi), last, u64::MAX);
        self.image.store(&self.record);
    }
}

/// All of them.
pub(super) struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// Slot by SA index, plus 1.
    index: Vec<u32>,
    records: DmaMem,
}

impl Slots {
    /// As many as `records` has room for.
    pub(super) fn new(records: DmaMem) -> Slots {
        let n = u32::try_from(records.len() / SA_LEN).unwrap_or(0);
        Slots {
            slots: (0..n).map(|_| None).collect(),
            free: (0..n).rev().collect(),
            index: Vec::new(),
            records,
        }
    }

    /// Makes the record of an SA.
    pub(super) fn install(
        &mut self,
        sa: &SaEntry,
        options: u32,
        unknowns: &Unknowns,
    ) -> Result<(), Refusal> {
        let spec = &sa.spec;
        let refuse = |reason: String| {
            Err(Refusal::Unsupported {
                engine: NAME,
                sa: spec.name.clone(),
                reason,
            })
        };
        let Some(parts) = Parts::of(spec.suite).filter(|p| p.offered(options)) else {
            return refuse(format!("it has no {}", spec.suite));
        };
        if spec.esn {
            return refuse("it has no 64-bit sequence numbers".into());
        }
        let direction = spec.direction;
        let packet = spec.offload == OffloadMode::Packet;
        let numbered = direction == Direction::Out || spec.replay_window != 0;
        if packet && parts.counter && !unknowns.counter_mode_in_packet_mode {
            return refuse("its IVs are random, which counter mode cannot have".into());
        }
        if packet && spec.replay_window > WINDOW {
            return refuse(format!(
                "its replay window is {WINDOW} packets, {} are asked for",
                spec.replay_window
            ));
        }
        let commands = if packet {
            parts.packet(direction, numbered)
        } else {
            parts.crypto(direction)
        };
        let Some(mut image) = Image::new(parts, commands, &spec.keys) else {
            return refuse("the keys are not the suite's".into());
        };
        let mut last = 0;
        if packet {
            let (at, mask) = match direction {
                Direction::Out => (sa.next_seq().saturating_sub(1), u64::from(u32::MAX)),
                // Everything up to the top counts as seen; the first 32 numbers behind a fresh start are below 0.
                Direction::In if sa.live.window.top() == 0 => (0, u64::from(u32::MAX)),
                Direction::In => (sa.live.window.top(), u64::MAX),
            };
            let Ok(at) = u32::try_from(at) else {
                return refuse("its numbers are past 32 bits".into());
            };
            image.number(spec.spi.value(), at, mask);
            last = at;
        }
        let Some(number) = self.free.pop() else {
            return Err(Refusal::NoSlot {
                engine: NAME,
                sa: spec.name.clone(),
            });
        };
        let Ok(record) = self.record(number) else {
            self.free.push(number);
            return refuse("its memory of records is damaged".into());
        };
        image.store(&record);
        let nonce = spec.keys.enc.last_chunk().copied().unwrap_or_default();
        let id = sa.fixed.id;
        self.remove(id);
        if let Some(slot) = self.slots.get_mut(number as usize) {
            *slot = Some(Slot {
                id,
                direction,
                packet,
                parts,
                spi: spec.spi.value().to_be_bytes(),
                nonce: if parts.counter { nonce } else { [0; 4] },
                in_flight: 0,
                going: false,
                broken: false,
                last,
                last_iv: [0; 16],
                reached: u64::from(last),
                image,
                record,
            });
        }
        let at = id.index as usize;
        if self.index.len() <= at {
            self.index.resize(at + 1, 0);
        }
        self.index[at] = number + 1;
        Ok(())
    }

    fn record(&self, number: u32) -> Result<DmaMem, DeviceError> {
        self.records.slice(number as usize * SA_LEN, SA_LEN)
    }

    /// The slot of an SA that takes packets.
    #[inline]
    pub(super) fn find(&self, id: SaId) -> Option<u32> {
        let number = self.index.get(id.index as usize)?.checked_sub(1)?;
        let slot = self.slots.get(number as usize)?.as_ref()?;
        (slot.id == id && !slot.going).then_some(number)
    }

    #[inline]
    pub(super) fn get(&mut self, number: u32) -> Option<&mut Slot> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    pub(super) fn by_id(&self, id: SaId) -> Option<&Slot> {
        self.slots.get(self.find(id)? as usize)?.as_ref()
    }

    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().flatten()
    }

    /// Takes no more packets for the SA, and forgets it once none is in flight.
    pub(super) fn remove(&mut self, id: SaId) {
        let Some(number) = self.find(id) else { return };
        if let Some(place) = self.index.get_mut(id.index as usize) {
            *place = 0;
        }
        if let Some(slot) = self.get(number) {
            slot.going = true;
        }
        self.free_if_idle(number);
    }

    /// A packet of the slot is no more in flight.
    #[inline]
    pub(super) fn landed(&mut self, number: u32) {
        let Some(slot) = self.get(number) else { return };
        slot.in_flight -= 1;
        if slot.going {
            self.free_if_idle(number);
        }
    }

    fn free_if_idle(&mut self, number: u32) {
        let Some(place) = self.slots.get_mut(number as usize) else {
            return;
        };
        if let Some(slot) = place.as_ref().filter(|s| s.going && s.in_flight == 0) {
            slot.record.zero();
            *place = None;
            self.free.push(number);
        }
    }

    /// SAs that are known, those going included.
    pub(super) fn used(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
