//! Reports to control: auditable events, limited in rate, and SAs that need a look. Nothing waits, nothing is allocated.

use std::net::IpAddr;

use pmd::Frame;
use rtrb::Producer;
use sa_store::drops::DropReason;
use sa_store::pmtu::TooBig;
use sa_store::report::{AuditEvent, Flow, Report};
use sa_store::runtime::TunnelIdx;
use sa_store::sa::SaId;

use super::core::{dst_of, src_of};
use crate::esp::rate::TokenBucket;
use crate::wire::{Family, Parsed};

/// Reports that wait for control, per worker.
pub(crate) const RING: usize = 256;
/// Events that a worker reports; the others are counted in the next one that is.
const PER_SECOND: u32 = 20;
const BURST: u32 = 40;
/// Tunnels without an SA are told of this often, nanoseconds.
const ACQUIRE: u64 = 1_000_000_000;
/// Tunnels that are told apart for that; those that share a place are told of less often.
const ACQUIRES: usize = 256;
/// ICMP errors about outer packets: each costs control a look at every SA.
const TOO_BIG_PER_SECOND: u32 = 10;
const TOO_BIG_BURST: u32 = 20;
/// Neighbours that are asked for.
const UNRESOLVED_PER_SECOND: u32 = 200;
const UNRESOLVED_BURST: u32 = 100;

/// A worker's way to control.
pub(super) struct Reports {
    ring: Producer<Report>,
    limit: TokenBucket,
    unreported: u64,
    last_edge: Option<(SaId, u64)>,
    /// By tunnel: when it was told of next.
    acquires: Box<[u64; ACQUIRES]>,
    too_big: TokenBucket,
    unresolved: TokenBucket,
}

impl Reports {
    pub(super) fn new(ring: Producer<Report>) -> Self {
        Self {
            ring,
            limit: TokenBucket::new(PER_SECOND, BURST),
            unreported: 0,
            last_edge: None,
            acquires: Box::new([0; ACQUIRES]),
            too_big: TokenBucket::new(TOO_BIG_PER_SECOND, TOO_BIG_BURST),
            unresolved: TokenBucket::new(UNRESOLVED_PER_SECOND, UNRESOLVED_BURST),
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

    /// Tells of a packet whose tunnel has no SA to send on.
    #[cold]
    pub(super) fn acquire(&mut self, now: u64, tunnel: TunnelIdx, p: &Parsed) {
        let Some(due) = self.acquires.get_mut(tunnel.0 as usize % ACQUIRES) else {
            return;
        };
        if now < *due {
            return;
        }
        let flow = Flow {
            tunnel,
            src: src_of(p),
            dst: dst_of(p),
            proto: p.proto,
            sport: p.sport,
            dport: p.dport,
        };
        // A full ring: the next packet tells.
        if self.ring.push(Report::Acquire(flow)).is_ok() {
            *due = now + ACQUIRE;
        }
    }

    /// Tells of an ICMP error about an outer packet. False when there were too many lately.
    #[cold]
    pub(super) fn too_big(&mut self, now: u64, error: TooBig) -> bool {
        self.too_big.allow(now) && self.ring.push(Report::TooBig(error)).is_ok()
    }

    /// Asks for a neighbour's link address. What is lost is asked again.
    #[cold]
    pub(super) fn unresolved(&mut self, now: u64, port: u16, addr: IpAddr) {
        if self.unresolved.allow(now) {
            let _ = self.ring.push(Report::Unresolved { port, addr });
        }
    }

    /// Tells where a peer's packets come from now.
    #[cold]
    pub(super) fn moved(&mut self, sa: SaId, (src, port): (u128, u16)) {
        // A full ring: it is told again.
        let _ = self.ring.push(Report::Moved { sa, src, port });
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
