//! What comes from the unprotected side and is not ESP: clear text, fragments, IKE, keep-alives.

use pmd::Frame;
use sa_store::drops::{Consumed, DropReason};
use sa_store::flow::FlowKey;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{InboundVerdict, Verdict};

use super::Inbound;
use crate::wire::{self, Frag, Kind, proto};
use crate::worker::core::{Shared, flow_key};
use crate::worker::lane::Info;
use crate::worker::outbound::Outbound;
use crate::worker::punt::{is_discovery, is_link_scope};
use crate::worker::setup::{PolicyHits, Side};

impl Inbound {
    /// Fragments, IKE, keep-alives, clear text.
    pub(super) fn sort_other(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
    ) {
        let mut packets = self.other.take();
        for (frame, info) in packets.drain() {
            let local = shared.is_local(snapshot, &info.p, shared.vrf(info.port));
            match info.p.kind {
                Kind::NatKeepalive if local => shared.consume(frame, Consumed::NatKeepalive),
                // RFC 4301 section 4.4.1: no policy is asked about IKE itself.
                Kind::Ike if local => shared.punt(frame, info),
                Kind::Ip if is_discovery(&info.p) => shared.punt(frame, info),
                Kind::Ip if local && matches!(info.p.proto, proto::ICMP | proto::ICMPV6) => {
                    if let Some(frame) = shared.outer_too_big(snapshot, frame, info) {
                        self.clear_text(shared, snapshot, out, frame, info);
                    }
                }
                Kind::Ip
                    if local
                        && info.p.frag != Frag::No
                        && matches!(info.p.proto, proto::ESP | proto::UDP) =>
                {
                    self.reassemble(shared, snapshot, out, frame, info);
                }
                _ => self.clear_text(shared, snapshot, out, frame, info),
            }
        }
        packets.clear();
        self.other = packets;
    }

    /// Clear text from the unprotected side, RFC 4301 section 5.2: allowed only by a bypass policy.
    pub(super) fn clear_text(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
        frame: Frame,
        info: &Info,
    ) {
        let inside = shared
            .config
            .ports
            .get(usize::from(info.port))
            .is_some_and(|p| p.side == Side::Inside);
        if inside {
            out.clear.push(frame, *info);
            return;
        }
        let vrf = shared.vrf(info.port);
        let key = flow_key(&info.p, vrf);
        match self.verdict(shared, snapshot, &key).inbound(None) {
            InboundVerdict::Accept { .. } => {
                if shared.is_local(snapshot, &info.p, vrf) || is_link_scope(&info.p) {
                    shared.punt(frame, info);
                } else {
                    shared.counters.bypassed.add(1);
                    out.forward.push(frame, *info);
                }
            }
            InboundVerdict::Drop { reason, .. } => {
                shared.refuse(frame, reason, &info.p, None);
            }
        }
    }

    #[inline]
    fn verdict(&mut self, shared: &Shared, snapshot: &Snapshot, key: &FlowKey) -> Verdict {
        let spd = &snapshot.spd_in;
        let mut misses = 0;
        let verdict = self.flows.resolve_one(
            key,
            spd.generation(key),
            |key| {
                misses = 1;
                spd.lookup(key)
            },
            PolicyHits::count(&shared.hits.inbound),
        );
        shared.counters.flow_misses.add(misses);
        shared.counters.flow_hits.add(1 - misses);
        verdict
    }

    /// Adds a fragment; a packet that it completes goes on as if it had come whole.
    fn reassemble(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        out: &mut Outbound,
        frame: Frame,
        info: &Info,
    ) {
        let Some(reassembly) = &mut self.reassembly else {
            shared.refuse(frame, DropReason::FragmentOff, &info.p, None);
            return;
        };
        let whole = reassembly.push(frame, &info.p, shared.now, &mut self.ended);
        self.settle(shared);
        let Some(frame) = whole else { return };
        match wire::parse_ip(frame.data(), shared.natt) {
            Ok(p) => {
                let info = Info { p, port: info.port };
                match p.kind {
                    Kind::Esp | Kind::UdpEsp => self.esp.push(frame, info),
                    Kind::Ike => shared.punt(frame, &info),
                    _ => self.clear_text(shared, snapshot, out, frame, &info),
                }
            }
            Err(reason) => shared.drop(frame, reason),
        }
    }
}
