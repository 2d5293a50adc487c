//! What policies and routes say of packets from inside.

use sa_store::drops::DropReason;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, Verdict};

use super::protect::Senders;
use super::{Outbound, hash_of};
use crate::esp::encap::Hop;
use crate::worker::core::{Shared, dst_of, flow_key};
use crate::worker::egress::Egress;
use crate::worker::lane::Info;
use crate::worker::punt::is_link_scope;
use crate::worker::related::tunnel_of_error;
use crate::worker::setup::PolicyHits;
use crate::worker::wait::Then;

impl Outbound {
    /// Looks the policies up for packets from inside, and does as they say.
    pub(super) fn decide(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut packets = self.clear.take();
        self.verdicts(shared, snapshot, packets.infos());
        let verdicts = std::mem::take(&mut self.verdicts);
        let senders = Senders::find(
            snapshot,
            verdicts.iter().map(|v| match v.action {
                Action::Protect { tunnel } => Some(tunnel),
                _ => None,
            }),
        );
        for (i, ((frame, info), verdict)) in packets.drain().zip(&verdicts).enumerate() {
            match verdict.action {
                Action::Protect { tunnel } => {
                    let entry = senders.at(i, snapshot, tunnel);
                    let hop = Hop::Forwarded;
                    self.protect_one(shared, snapshot, entry, frame, info, (tunnel, hop));
                }
                Action::Bypass => {
                    let vrf = shared.vrf(info.port);
                    match shared
                        .ports
                        .route(&snapshot.fib, vrf, dst_of(&info.p), hash_of(&info.p))
                    {
                        Egress::Port(hop) => {
                            shared.counters.bypassed.add(1);
                            self.send_clear(shared, snapshot, frame, info, hop);
                        }
                        Egress::Tunnel(tunnel) => self.protect.push(frame, (*info, tunnel)),
                        Egress::Local => shared.punt(frame, info),
                        Egress::Unresolved => {
                            self.await_neighbour(shared, snapshot, frame, info, Then::Forward);
                        }
                        Egress::None => shared.drop(frame, DropReason::NoRoute),
                    }
                }
                Action::Local => shared.punt(frame, info),
                Action::Discard => {
                    let vrf = shared.vrf(info.port);
                    match tunnel_of_error(snapshot, *verdict, &frame, info, vrf) {
                        Some(tunnel) => self.protect.push(frame, (*info, tunnel)),
                        None => shared.drop(frame, DropReason::PolicyDiscard),
                    }
                }
                Action::FragmentPolicy => {
                    shared.refuse(frame, DropReason::FragmentPolicy, &info.p, None);
                }
            }
        }
        packets.clear();
        self.clear = packets;
        self.verdicts = verdicts;
    }

    /// The policies' answers; a route into a tunnel comes first, for it is the operator's word on this destination.
    #[inline]
    fn verdicts(&mut self, shared: &mut Shared, snapshot: &Snapshot, packets: &[Info]) {
        let keys = packets
            .iter()
            .map(|pkt| flow_key(&pkt.p, shared.vrf(pkt.port)));
        self.keys.clear();
        self.keys.extend(keys);
        self.verdicts.clear();
        self.verdicts.resize(packets.len(), Verdict::DEFAULT);
        let (spd, fib, locals) = (&snapshot.spd_out, &snapshot.fib, &snapshot.locals);
        let mut misses = 0;
        self.flows.resolve(
            &self.keys,
            // Both only ever grow, so the sum changes whenever one of them does.
            |key| spd.generation(key).wrapping_add(fib.generation()),
            |i, key| {
                misses += 1;
                let pkt = &packets[i];
                match shared
                    .ports
                    .route(fib, key.vrf(), dst_of(&pkt.p), hash_of(&pkt.p))
                {
                    Egress::Tunnel(tunnel) => Verdict {
                        action: Action::Protect { tunnel },
                        ..Verdict::DEFAULT
                    },
                    // It does not cross the boundary, RFC 4301 section 3.1. What the kernel would only forward may.
                    Egress::Local if locals.contains(key.vrf(), dst_of(&pkt.p)) => LOCAL,
                    _ if is_link_scope(&pkt.p) => LOCAL,
                    _ => spd.lookup(key),
                }
            },
            PolicyHits::count(&shared.hits.out),
            &mut self.verdicts,
        );
        shared.counters.flow_misses.add(misses);
        let hits = packets.len() as u64 - misses;
        shared.counters.flow_hits.add(hits);
    }
}

/// The answer for what does not cross the boundary.
const LOCAL: Verdict = Verdict {
    action: Action::Local,
    ..Verdict::DEFAULT
};
