//! Dummy packets of SAs that hide when they are silent, RFC 4303 section 2.6.

use sa_store::sa::SaId;
use sa_store::snapshot::Snapshot;

/// Payload of a dummy where inner packets are not padded to a size of their own, bytes.
pub(super) const DUMMY_LEN: u16 = 128;

#[derive(Debug)]
struct Sender {
    sa: SaId,
    interval: u64,
    due: u64,
}

/// Which SAs of this worker are to send a dummy, and when.
#[derive(Debug, Default)]
pub(super) struct Cover {
    epoch: u64,
    senders: Vec<Sender>,
}

impl Cover {
    /// Takes over what a new snapshot says. Costs one comparison while the snapshot stays the same.
    #[inline]
    pub(super) fn follow(&mut self, snapshot: &Snapshot, worker: usize, now: u64) {
        if self.epoch != snapshot.epoch {
            self.epoch = snapshot.epoch;
            self.rebuild(snapshot, worker, now);
        }
    }

    /// The next SA whose dummy is due; its next one is put off by its interval.
    #[inline]
    pub(super) fn next_due(&mut self, now: u64) -> Option<SaId> {
        let sender = self.senders.iter_mut().find(|s| s.due <= now)?;
        sender.due = now + sender.interval;
        Some(sender.sa)
    }

    /// When the next dummy is due, gateway clock.
    pub(super) fn wake_at(&self) -> Option<u64> {
        self.senders.iter().map(|s| s.due).min()
    }

    fn rebuild(&mut self, snapshot: &Snapshot, worker: usize, now: u64) {
        let old = std::mem::take(&mut self.senders);
        for id in snapshot.dummies.iter() {
            let Some(entry) = snapshot.sa(*id) else {
                continue;
            };
            // Only the SA on which its tunnel sends now.
            let sends = snapshot
                .outbound(entry.fixed.tunnel)
                .is_some_and(|e| e.fixed.id == *id);
            if usize::from(entry.fixed.owner) != worker || !sends {
                continue;
            }
            let interval = 1_000_000_000 / u64::from(entry.spec.tfc.dummies().max(1));
            let due = old
                .iter()
                .find(|s| s.sa == *id)
                .map_or(now + interval, |s| s.due);
            self.senders.push(Sender {
                sa: *id,
                interval,
                due,
            });
        }
    }
}
