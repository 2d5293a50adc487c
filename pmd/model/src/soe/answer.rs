//! Results: when they come back, in which order, and what misbehaviour makes of them.

use std::time::Instant;

use super::esp::Fault;
use super::{MACS, Soe};
use crate::Bus;

/// A result on its way back.
pub(super) struct Answer {
    pub(super) due: Instant,
    pub(super) instance: usize,
    pub(super) flags: u32,
    pub(super) user: u8,
    pub(super) bytes: Vec<u8>,
}

impl Soe {
    /// Queues the result, as far as misbehaviour lets it.
    pub(super) fn conclude(
        &mut self,
        instance: usize,
        slot: u8,
        user: u8,
        encrypt: bool,
        packet: &[u8],
        outcome: Result<Vec<u8>, Fault>,
    ) {
        let now = Instant::now();
        let busy = self.busy_until.unwrap_or(now);
        let (due, busy) = self.knobs.schedule(now, busy, packet.len());
        self.busy_until = Some(busy);
        let mischief = self.knobs.draw();
        let (mut flags, mut payload) = match outcome {
            Ok(bytes) => (if encrypt { 3 } else { 4 }, bytes),
            Err(fault) => {
                self.note(slot, encrypt, fault);
                let entry = self.slots.get(usize::from(slot)).and_then(Option::as_ref);
                let silent = match entry {
                    Some(e) => e.drops(fault),
                    None => false,
                };
                if silent || fault == Fault::Slot && !self.switches.answer_wrong_slot {
                    return;
                }
                (fault.flags(), packet.to_vec())
            }
        };
        if flags == 3 && user & 0xe0 != 0 && self.switches.tag_breaks_icv {
            flip(&mut payload, u64::MAX);
        }
        if mischief.corrupt {
            flip(&mut payload, self.knobs.random());
        }
        if mischief.spurious {
            flags = 5 + u32::try_from(self.knobs.random() % 3).unwrap_or(0);
        }
        if mischief.lose {
            return;
        }
        let ipv6 = payload.first().is_some_and(|b| b >> 4 == 6);
        let mut bytes = MACS.to_vec();
        bytes.extend(if ipv6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        bytes.extend(payload);
        let make = |due| Answer {
            due,
            instance,
            flags,
            user,
            bytes: bytes.clone(),
        };
        let direction = usize::from(!encrypt);
        if mischief.duplicate {
            self.late.push(make(due));
        }
        let result = make(due + mischief.delay);
        if !mischief.delay.is_zero() {
            self.late.push(result);
        } else if mischief.reorder && self.held[direction].is_none() {
            self.held[direction] = Some(result);
        } else {
            self.queues[direction].push_back(result);
            self.queues[direction].extend(self.held[direction].take());
        }
    }

    /// Interrupt status for a packet that failed.
    pub(super) fn note(&mut self, slot: u8, encrypt: bool, fault: Fault) {
        let entry = self.slots.get(usize::from(slot)).and_then(Option::as_ref);
        let dropped = entry.is_some_and(|e| e.drops(fault));
        let (bit, bitmap) = match (fault, dropped) {
            (Fault::Limit, _) => (11, Some(3)),
            (Fault::Icv, true) => (13, Some(5)),
            (Fault::Replay, true) => (14, Some(6)),
            (Fault::Padding, true) => (15, Some(7)),
            _ if encrypt => (3, None),
            _ => (6, None),
        };
        self.int_sts |= 1 << bit;
        if let Some(b) = bitmap {
            self.bitmaps[b] |= 1 << (slot & 31);
        }
    }

    /// Writes results whose time has come; the time of the next.
    pub(super) fn deliver(&mut self, bus: &mut Bus) -> Option<Instant> {
        let now = Instant::now();
        let mut ready = Vec::new();
        for (queue, held) in self.queues.iter_mut().zip(&mut self.held) {
            while queue.front().is_some_and(|r| r.due <= now) {
                ready.extend(queue.pop_front());
            }
            // Nothing came to change places with.
            if queue.is_empty() && held.as_ref().is_some_and(|r| r.due <= now) {
                ready.extend(held.take());
            }
        }
        let (due, late) = std::mem::take(&mut self.late)
            .into_iter()
            .partition(|r| r.due <= now);
        self.late = late;
        ready.extend::<Vec<_>>(due);
        for r in ready {
            let instance = match self.switches.result_instance {
                Some(i) => usize::from(i & 1),
                None => r.instance,
            };
            let msg = [r.flags, 0, u32::from(r.user) << 24];
            let ring = self.switches.result_ring & 31;
            // Lost when the ring is empty: the status tells.
            self.qdma[instance].give(bus, ring, &r.bytes, msg);
        }
        let waiting = self.queues.iter().flatten().chain(&self.late);
        let held = self.held.iter().flatten();
        waiting.chain(held).map(|r| r.due).min()
    }
}

/// Changes one bit of the last bytes (the ICV) or of any byte.
fn flip(bytes: &mut [u8], random: u64) {
    let n = bytes.len() as u64;
    if let Some(at) = random.checked_rem(n).and_then(|i| usize::try_from(i).ok()) {
        let at = if random == u64::MAX {
            bytes.len() - 1
        } else {
            at
        };
        bytes[at] ^= 1 << (random >> 32 & 7);
    }
}
