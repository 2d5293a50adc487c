//! Out of the gateway: sealed packets, packets in the clear, fragments, answers.

use pmd::Frame;
use pmd::engine::JobStatus;
use sa_store::drops::DropReason;
use sa_store::ledger::Generated;
use sa_store::sa::OffloadMode;
use sa_store::snapshot::Snapshot;

use super::Outbound;
use super::protect::UDP_CHECKSUM;
use crate::esp::encap;
use crate::esp::fragment::fragment;
use crate::esp::icmp::{self, IcmpError};
use crate::wire;
use crate::worker::core::Shared;
use crate::worker::egress::PortHop;
use crate::worker::lane::Info;
use crate::worker::offload;

impl Outbound {
    /// Sends what came back sealed.
    pub(super) fn finish(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut done = std::mem::take(&mut self.done);
        let mut encrypted = 0;
        for job in done.drain(..) {
            match job.status {
                JobStatus::Done if job.mode != OffloadMode::Packet || offload::is_whole(&job) => {}
                status => {
                    if let Some(entry) = snapshot.sa(job.sa) {
                        entry.live.counters.engine.add(1);
                    }
                    shared.drop(job.frame, offload::reason(status));
                    continue;
                }
            }
            encrypted += 1;
            let mut frame = job.frame;
            let hop = PortHop::from_tag(job.tag);
            #[allow(clippy::cast_possible_truncation, reason = "the low 16 bits")]
            let mtu = job.note as u16;
            if job.note & UDP_CHECKSUM != 0 {
                // The checksum of what goes in fragments is over all of them.
                let whole = frame.len() <= usize::from(mtu);
                if whole && shared.ports.completes_checksums(hop) {
                    encap::leave(&mut frame, job.esp_off);
                } else {
                    encap::finish(&mut frame, job.esp_off);
                }
            }
            self.send(shared, frame, hop, mtu);
        }
        shared.counters.encrypted.add(encrypted);
        self.done = done;
    }

    /// Sends a packet in the clear: hop limit, size, then out.
    pub(super) fn send_clear(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        mut frame: Frame,
        info: &Info,
        hop: PortHop,
    ) {
        if let Err(reason) = wire::decrement_ttl(frame.data_mut(), &info.p) {
            self.answer(
                shared,
                snapshot,
                frame.data(),
                info,
                IcmpError::TimeExceeded,
            );
            shared.drop(frame, reason);
            return;
        }
        let mtu = shared.ports.mtu(hop);
        if info.p.l3_len > mtu && info.p.df() {
            self.answer(
                shared,
                snapshot,
                frame.data(),
                info,
                IcmpError::TooBig { mtu },
            );
            shared.drop(frame, DropReason::TooBig);
            return;
        }
        self.send(shared, frame, hop, mtu);
    }

    /// Gives an IP packet to its port, in fragments when it is larger than `mtu`.
    #[inline(always)]
    fn send(&mut self, shared: &mut Shared, frame: Frame, hop: PortHop, mtu: u16) {
        if frame.len() > usize::from(mtu) {
            self.send_fragments(shared, frame, hop, mtu);
            return;
        }
        if let Err((frame, reason)) = shared.ports.send(frame, hop, &mut shared.handover) {
            shared.drop(frame, reason);
        }
    }

    #[cold]
    fn send_fragments(&mut self, shared: &mut Shared, frame: Frame, hop: PortHop, mtu: u16) {
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let mut pieces = std::mem::take(&mut self.pieces);
        match fragment(
            frame,
            usize::from(mtu),
            self.fragment_id,
            &mut shared.pool,
            &mut pieces,
        ) {
            Ok(count) => {
                // The first fragment is the frame that came in; the others are new.
                for _ in 1..count {
                    shared.counters.generate(Generated::Fragment);
                }
            }
            Err((frame, reason)) => shared.drop(frame, reason),
        }
        for piece in pieces.drain(..) {
            if let Err((frame, reason)) = shared.ports.send(piece, hop, &mut shared.handover) {
                shared.drop(frame, reason);
            }
        }
        self.pieces = pieces;
    }

    /// Answers with an ICMP error where RFC 1812 and RFC 4443 allow one, within the rate limit. The answer goes
    /// out with the next round.
    #[cold]
    pub(in crate::worker) fn answer(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        packet: &[u8],
        info: &Info,
        error: IcmpError,
    ) {
        let v6 = info.p.family == wire::Family::V6;
        // To the kernel no error can come from an address of its own.
        let from = match info.p.own() {
            true => Some(info.p.dst_ip()),
            false => snapshot.locals.any(shared.vrf(info.port), v6),
        };
        let Some(from) = from else { return };
        if !icmp::may_answer(&info.p, error) || !self.errors.allow(shared.now) {
            return;
        }
        let Some(mut frame) = shared.pool.get_spare() else {
            return;
        };
        if !icmp::build(&mut frame, packet, &info.p, error, from) {
            shared.pool.put(frame);
            return;
        }
        shared.counters.generate(Generated::Icmp);
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) => self.forward.push(frame, Info { p, port: info.port }),
            Err(reason) => shared.drop(frame, reason),
        }
    }
}
