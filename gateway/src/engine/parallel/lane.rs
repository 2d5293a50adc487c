//! The order of one SA's pieces.

use std::collections::VecDeque;
use std::sync::Arc;

use sa_store::runtime::SaEntry;
use sa_store::sa::SaId;

use super::piece::Parcel;

/// Where a piece is.
pub(super) enum Slot {
    /// At a helper.
    Away,
    /// Here, not ciphered yet.
    Waiting(Parcel),
    /// Here, ciphered.
    Ready(Parcel),
}

/// Pieces of one SA in order of submission, from the oldest that has not been given back.
pub(super) struct Lane {
    sa: Option<SaId>,
    entry: Option<Arc<SaEntry>>,
    /// Place of the first of `slots`.
    base: u64,
    slots: VecDeque<Slot>,
    /// How many of them are ciphered. Pieces are pushed waiting.
    ready: usize,
    /// The piece that is being filled.
    pub(super) open: Option<Parcel>,
    /// Jobs in a piece.
    pub(super) length: usize,
}

impl Lane {
    /// An empty one with memory for `pieces`.
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self {
            sa: None,
            entry: None,
            base: 0,
            slots: VecDeque::with_capacity(pieces),
            ready: 0,
            open: None,
            length: 1,
        }
    }

    /// Takes up an SA.
    pub(super) fn begin(&mut self, entry: &Arc<SaEntry>, length: usize) {
        self.sa = Some(entry.fixed.id);
        self.entry = Some(Arc::clone(entry));
        self.length = length;
    }

    /// The SA.
    #[inline(always)]
    pub(super) fn sa(&self) -> Option<SaId> {
        self.sa
    }

    /// Its entry.
    #[inline]
    pub(super) fn entry(&self) -> Option<&Arc<SaEntry>> {
        self.entry.as_ref()
    }

    /// Adds a piece at the end, to be ciphered; returns its place.
    pub(super) fn push(&mut self, parcel: Parcel) -> u64 {
        let order = self.next();
        self.slots.push_back(Slot::Waiting(parcel));
        order
    }

    /// Place of the next piece.
    pub(super) fn next(&self) -> u64 {
        self.base + self.slots.len() as u64
    }

    /// Whether pieces are ready behind an oldest one that a helper still has.
    pub(super) fn is_held_up(&self) -> bool {
        self.ready != 0 && matches!(self.slots.front(), Some(Slot::Away))
    }

    /// Puts a new state in a piece's place and returns the old one.
    pub(super) fn replace(&mut self, order: u64, slot: Slot) -> Option<Slot> {
        let at = usize::try_from(order.checked_sub(self.base)?).ok()?;
        let place = self.slots.get_mut(at)?;
        self.ready += usize::from(matches!(slot, Slot::Ready(_)));
        let before = std::mem::replace(place, slot);
        self.ready -= usize::from(matches!(before, Slot::Ready(_)));
        Some(before)
    }

    /// The oldest piece, if it is ciphered.
    pub(super) fn pop_ready(&mut self) -> Option<Parcel> {
        match self.slots.pop_front()? {
            Slot::Ready(parcel) => {
                self.base += 1;
                self.ready -= 1;
                Some(parcel)
            }
            other => {
                self.slots.push_front(other);
                None
            }
        }
    }

    /// Leaves the SA once nothing of it is inside.
    pub(super) fn end(&mut self) {
        if self.slots.is_empty() && self.open.is_none() {
            self.sa = None;
            self.entry = None;
        }
    }
}
