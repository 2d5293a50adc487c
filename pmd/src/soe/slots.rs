//! The engine's SA slots: who has which, and when one may be used again.
//!
//! A late result names its slot alone. So a slot rests after its SA is gone, for longer than results may be late, and slots
//! are taken in turn.

use sa_store::sa::SaId;

use super::first::Opener;
use super::flow::{Flow, Request};
use super::record::Shape;
use crate::engine::EspJob;
use crate::qdma::hop::Action;

/// How long a slot rests.
pub(super) const REST: u64 = 2_000_000_000;

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing since then; `None`: never used.
    Free(Option<u64>),
    /// Carries an SA.
    Active,
    /// The SA is to go once nothing of it is in the engine.
    Draining,
    /// Could not be invalidated: never used again before a reset.
    Stuck,
}

/// What the driver must know of an installed SA.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    pub(super) id: SaId,
    pub(super) tunnel: u32,
    pub(super) action: Action,
    pub(super) spi: u32,
    pub(super) src: [u8; 4],
    pub(super) dst: [u8; 4],
    pub(super) ports: Option<(u16, u16)>,
    pub(super) shape: Shape,
    /// A number seen twice is an IV used twice.
    pub(super) counter_mode: bool,
}

/// One slot.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) state: State,
    pub(super) sa: Option<Carried>,
    /// Inbound, when packets are to be known by their first bytes.
    pub(super) opener: Option<Opener>,
    pub(super) flow: Flow,
}

/// All slots.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) list: Vec<Slot>,
    /// Slot of each SA, by the index of its id.
    of_sa: Vec<u8>,
    next: usize,
}

const NONE: u8 = u8::MAX;

impl Slots {
    pub(super) fn new(count: u8) -> Slots {
        Slots {
            list: (0..count).map(|_| Slot::empty()).collect(),
            of_sa: Vec::new(),
            next: 0,
        }
    }

    /// A slot that is free and rested; the next one after the last.
    pub(super) fn find(&self, now: u64) -> Option<u8> {
        let n = self.list.len();
        let rested = |slot: &Slot| match slot.state {
            State::Free(None) => true,
            State::Free(Some(since)) => now.saturating_sub(since) >= REST,
            _ => false,
        };
        (0..n)
            .map(|i| (self.next + i) % n)
            .find(|&i| self.list.get(i).is_some_and(rested))
            .and_then(|i| u8::try_from(i).ok())
    }

    /// Puts an SA into a slot.
    pub(super) fn occupy(&mut self, slot: u8, sa: Carried, opener: Option<Opener>, flow: Flow) {
        let index = sa.id.index as usize;
        if self.of_sa.len() <= index {
            self.of_sa.resize(index + 1, NONE);
        }
        self.of_sa[index] = slot;
        self.next = usize::from(slot) + 1;
        if let Some(place) = self.list.get_mut(usize::from(slot)) {
            *place = Slot {
                state: State::Active,
                sa: Some(sa),
                opener,
                flow,
            };
        }
    }

    /// The slot that carries the SA.
    #[inline]
    pub(super) fn of(&mut self, id: SaId) -> Option<(u8, &mut Slot)> {
        let number = *self.of_sa.get(id.index as usize)?;
        let slot = self.list.get_mut(usize::from(number))?;
        let is = slot.state == State::Active && slot.sa.is_some_and(|s| s.id == id);
        is.then_some((number, slot))
    }

    /// Highest number that the engine gave to a packet of the outbound SA.
    pub(super) fn reached(&self, id: SaId) -> Option<u64> {
        let number = *self.of_sa.get(id.index as usize)?;
        let slot = self.list.get(usize::from(number))?;
        let is = slot
            .sa
            .is_some_and(|s| s.id == id && s.action == Action::Encrypt);
        is.then(|| slot.flow.reached())
    }

    /// The slot, when it has anything to do with an SA.
    pub(super) fn with_sa(&mut self, number: u8) -> Option<(&mut Slot, Carried)> {
        let slot = self.list.get_mut(usize::from(number))?;
        let sa = slot.sa?;
        Some((slot, sa))
    }

    /// The SA has left the slot.
    pub(super) fn vacate(&mut self, number: u8, state: State) -> Option<Carried> {
        let slot = self.list.get_mut(usize::from(number))?;
        let sa = slot.sa.take();
        if let Some(sa) = sa
            && let Some(place) = self.of_sa.get_mut(sa.id.index as usize)
            && *place == number
        {
            *place = NONE;
        }
        *slot = Slot {
            state,
            ..Slot::empty()
        };
        sa
    }

    /// Slots with an SA.
    pub(super) fn used(&self) -> usize {
        self.list.iter().filter(|s| s.sa.is_some()).count()
    }

    /// Takes everything that waits for the engine.
    pub(super) fn take_waiting(&mut self, into: &mut Vec<EspJob>) {
        for slot in &mut self.list {
            into.extend(slot.flow.waiting.drain(..));
        }
    }

    /// Gives up everything in the engine.
    pub(super) fn abandon(&mut self, lost: &mut Vec<Request>) {
        for slot in &mut self.list {
            slot.flow.abandon(lost);
        }
    }
}

impl Slot {
    fn empty() -> Slot {
        let shape = Shape {
            udp: false,
            iv: 0,
            icv: 0,
            align: 1,
            least: false,
        };
        Slot {
            state: State::Free(None),
            sa: None,
            opener: None,
            flow: Flow::new(shape, Action::Decrypt, 1, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sa(index: u32, generation: u32) -> Carried {
        Carried {
            id: SaId { index, generation },
            tunnel: 0,
            action: Action::Encrypt,
            spi: 0x100,
            src: [0; 4],
            dst: [0; 4],
            ports: None,
            shape: Shape {
                udp: false,
                iv: 16,
                icv: 12,
                align: 16,
                least: true,
            },
            counter_mode: false,
        }
    }

    fn put(slots: &mut Slots, index: u32, now: u64) -> Option<u8> {
        let slot = slots.find(now)?;
        slots.occupy(slot, sa(index, 0), None, Slot::empty().flow);
        Some(slot)
    }

    #[test]
    fn slots_are_taken_in_turn_and_rest_before_they_are_used_again() {
        let mut s = Slots::new(3);
        assert_eq!(put(&mut s, 0, 0), Some(0));
        s.vacate(0, State::Free(Some(10)));
        assert_eq!(put(&mut s, 1, 10), Some(1));
        assert_eq!(put(&mut s, 2, 10), Some(2));
        assert_eq!(put(&mut s, 3, 10 + REST - 1), None);
        assert_eq!(put(&mut s, 3, 10 + REST), Some(0));
        s.vacate(1, State::Stuck);
        assert_eq!(s.find(u64::MAX), None);
        assert_eq!(s.used(), 2);
    }

    #[test]
    fn an_sa_is_found_by_its_id_and_generation_only() {
        let mut s = Slots::new(2);
        put(&mut s, 7, 0);
        let id = |index, generation| SaId { index, generation };
        assert_eq!(s.of(id(7, 0)).unwrap().0, 0);
        assert!(s.of(id(7, 1)).is_none() && s.of(id(0, 0)).is_none());
        assert!(s.of(id(u32::MAX, 0)).is_none());
        s.list[0].state = State::Draining;
        assert!(s.of(id(7, 0)).is_none());
        assert!(s.with_sa(0).is_some() && s.with_sa(1).is_none() && s.with_sa(200).is_none());
        // The next SA with this index is in another slot before the first has left.
        s.occupy(1, sa(7, 1), None, Slot::empty().flow);
        s.vacate(0, State::Free(Some(0)));
        assert_eq!(s.of(id(7, 1)).unwrap().0, 1);
    }
}
