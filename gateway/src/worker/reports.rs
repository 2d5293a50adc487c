//! Reports to control: auditable events, limited in rate, and SAs that need a look. Nothing waits, nothing is allocated.

use pmd::Frame;
use rtrb::Producer;
use sa_store::drops::DropReason;
use sa_store::report::{AuditEvent, Report};
use sa_store::sa::SaId;

use super::core::{dst_of, src_of};
use crate::esp::rate::TokenBucket;
use crate::wire::{Family, Parsed};

/// Reports that wait for control, per worker.
pub(crate) const RING: usize = 256;
/// Events that a worker reports; the others are counted in the next one that is.
const PER_SECOND: u32 = 20;
const BURST: u32 = 40;

/// A worker's way to control.
pub(super) struct Reports {
    ring: Producer<Report>,
    limit: TokenBucket,
    unreported: u64,
    last_edge: Option<(SaId, u64)>,
}

impl Reports {
    pub(super) fn new(ring: Producer<Report>) -> Self {
        Self {
            ring,
            limit: TokenBucket::new(PER_SECOND, BURST),
            unreported: 0,
            last_edge: None,
        }
    }

    /// Reports the end of a packet, if it is auditable. `esp`: SPI and sequence number that it came with, when `p` is what
    /// was inside.
    #[cold]
    pub(super) fn audit(
        &mut self,
        now: u64,
        reason: DropReason,
        frame: &Frame,
        p: &Parsed,
        esp: Option<(u32, u32)>,
    ) {
        if !AuditEvent::is_auditable(reason) {
            return;
        }
        if !self.limit.allow(now) {
            self.unreported += 1;
            return;
        }
        // A frame that was cut meanwhile no longer begins with this header.
        let whole = p.family == Family::V6 && frame.len() == usize::from(p.l3_len);
        let first = frame.data().first_chunk().copied().filter(|_| whole);
        let esp = esp.or(p.esp());
        let event = AuditEvent {
            reason,
            spi: esp.map(|(spi, _)| spi),
            seq: esp.map(|(_, seq)| seq),
            src: src_of(p),
            dst: dst_of(p),
            flow_label: first.map(|word| u32::from_be_bytes(word) & 0x000f_ffff),
            proto: p.proto,
            sport: p.sport,
            dport: p.dport,
            unreported: self.unreported,
        };
        match self.ring.push(Report::Audit(event)) {
            Ok(()) => self.unreported = 0,
            Err(_) => self.unreported += 1,
        }
    }

    /// Asks for a look at an SA's edge, once a round.
    #[cold]
    pub(super) fn edge(&mut self, now: u64, sa: SaId) {
        if self.last_edge.replace((sa, now)) != Some((sa, now)) {
            // A full ring: the keeper comes to every SA in turn.
            let _ = self.ring.push(Report::Edge(sa));
        }
    }
}
