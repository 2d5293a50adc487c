//! An SA of the kernel's that was looked at: whether it is ours, where it runs, and what the kernel was told of it.

use std::time::{SystemTime, UNIX_EPOCH};

use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, SaId, SaKeys};
use sa_store::suite::Suite;

use super::message::{Carried, KernelSa};
use super::translate::Seized;

/// What is known of the SA.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) direction: Direction,
    pub(super) seized: Seized,
    /// As it was then: another one may come to have its SPI.
    crypto: Result<(Suite, SaKeys), String>,
    /// Where it runs.
    pub(super) id: Option<SaId>,
    /// What it had carried before it ran here.
    before: Carried,
    /// What the kernel was told last.
    pub(super) reported: Carried,
    /// A successor was asked for; the end was told.
    pub(super) asked: bool,
    pub(super) ended: bool,
}

impl Held {
    pub(super) fn new(sa: &KernelSa, direction: Direction, seized: Seized) -> Self {
        Self {
            direction,
            seized,
            crypto: sa.crypto.clone(),
            id: None,
            before: sa.carried,
            reported: sa.carried,
            asked: false,
            ended: false,
        }
    }

    /// Whether it is about this SA, and not another one that has its place.
    pub(super) fn is_about(&self, sa: &KernelSa) -> bool {
        self.crypto == sa.crypto
    }

    /// Where it runs now. An entry that goes on (its SA was made anew with the same key, as for another address) has counted what
    /// the kernel knows.
    pub(super) fn runs_as(&mut self, entry: Option<&SaEntry>) {
        let id = entry.map(|e| e.fixed.id);
        if self.id == id {
            return;
        }
        self.id = id;
        if let Some(entry) = entry {
            let c = &entry.live.counters;
            let known = self.reported;
            self.before.packets = known.packets.saturating_sub(c.packets.value());
            self.before.bytes = known.bytes.saturating_sub(c.bytes.value());
        }
    }

    /// What the kernel is to count.
    pub(super) fn carried(&self, entry: &SaEntry, add_time: u64) -> Carried {
        let c = &entry.live.counters;
        let packets = self.before.packets + c.packets.value();
        let moved = packets != self.reported.packets;
        Carried {
            packets,
            bytes: self.before.bytes + c.bytes.value(),
            add_time,
            use_time: if self.reported.use_time == 0 && moved {
                unix_time()
            } else {
                self.reported.use_time
            },
        }
    }
}

/// Seconds since 1970.
pub(super) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
