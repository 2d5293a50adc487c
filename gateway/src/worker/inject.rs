//! What the kernel sends by a port's TAP, from this host's daemons: it leaves by that port, through the outbound policies
//! like any other traffic.
//!
//! | frame | from the TAP of an outside port | of an inside port |
//! |---|---|---|
//! | not IP, neighbour discovery | leaves as it is | leaves as it is |
//! | IKE and its keep-alives from a port of IKE's, own source address | leaves as it is (RFC 4301 section 4.4.1) | as other IP |
//! | other IP: a policy or a route says protect | into the tunnel | into the tunnel |
//! | bypass | leaves as it is | leaves as it is |
//! | discard, no policy | dropped | leaves as it is: it does not cross the boundary |
//!
//! The kernel has routed what leaves as it is, and has resolved its neighbour. Only where its interface knows no
//! neighbours (it sends to its own address: the TAP beside an AF_XDP port) our routes decide.

use pmd::Frame;
use sa_store::drops::DropReason;
use sa_store::ledger::Generated;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, Verdict};

use super::core::{Core, Shared, dst_of, flow_key, src_of};
use super::egress::Egress;
use super::lane::{Info, cut};
use super::outbound::{Outbound, hash_of};
use super::punt::is_discovery;
use super::setup::{PolicyHits, Side};
use crate::wire::{self, Frag, Kind, Parsed, proto};

impl Core {
    /// Takes what the kernel has sent. Returns how many frames.
    pub(super) fn receive_injected(&mut self, snapshot: &Snapshot) -> usize {
        let Self {
            shared,
            outbound,
            injected,
            ..
        } = self;
        let now = shared.now;
        let got = shared.taps.receive(now, &mut shared.pool, |port, frames| {
            injected.extend(frames.drain(..).map(|frame| (port, frame)));
        });
        for (port, frame) in injected.drain(..) {
            shared.counters.generate(Generated::Injected);
            inject(shared, outbound, snapshot, port, frame);
        }
        got
    }
}

fn inject(
    shared: &mut Shared,
    outbound: &mut Outbound,
    snapshot: &Snapshot,
    port: u16,
    mut frame: Frame,
) {
    let mut p = match wire::parse(frame.data(), shared.natt) {
        Ok(p) => p,
        Err(reason) => return shared.drop(frame, reason),
    };
    // A tag of the kernel's would lead into somebody else's VLAN.
    if p.vlan != 0 {
        return shared.drop(frame, DropReason::NotForUs);
    }
    if p.kind == Kind::NotIp || is_discovery(&p) {
        return shared.send_frame(port, frame);
    }
    let outside = shared.ports.side_of(port) == Side::Outside;
    let vrf = shared.vrf(port);
    if outside && is_ike(&p, frame.data()) && snapshot.locals.contains(vrf, src_of(&p)) {
        return leave(shared, snapshot, port, frame, &p);
    }
    let verdict = match route(shared, snapshot, port, &p) {
        Egress::Tunnel(tunnel) => Verdict {
            action: Action::Protect { tunnel },
            ..Verdict::DEFAULT
        },
        _ => snapshot.spd_out.lookup(&flow_key(&p, vrf)),
    };
    PolicyHits::count(&shared.hits.out)(verdict, 1);
    match verdict.action {
        Action::Protect { tunnel } => {
            cut(&mut frame, &p);
            p.set_own();
            outbound.protect.push(frame, (Info { p, port }, tunnel));
        }
        Action::Bypass => {
            shared.counters.bypassed.add(1);
            leave(shared, snapshot, port, frame, &p);
        }
        _ if !outside => leave(shared, snapshot, port, frame, &p),
        Action::Discard | Action::Local => shared.drop(frame, DropReason::PolicyDiscard),
        Action::FragmentPolicy => {
            shared.refuse(frame, DropReason::FragmentPolicy, &p, None);
        }
    }
}

fn route(shared: &mut Shared, snapshot: &Snapshot, port: u16, p: &Parsed) -> Egress {
    let (vrf, dst) = (shared.vrf(port), dst_of(p));
    shared.ports.route(&snapshot.fib, vrf, dst, hash_of(p))
}

/// IKE, ESP's keep-alives, by their source port: the peer's may be anything behind a NAT.
fn is_ike(p: &Parsed, frame: &[u8]) -> bool {
    if matches!(p.kind, Kind::Ike | Kind::NatKeepalive) {
        return true;
    }
    if p.proto != proto::UDP || p.frag != Frag::No {
        return false;
    }
    let payload = usize::from(p.l2_len) + usize::from(p.upper_off) + 8;
    match p.sport {
        500 => true,
        // The non-ESP marker, or a keep-alive.
        4500 => frame
            .get(payload..)
            .is_some_and(|b| b.starts_with(&[0; 4]) || b.first() == Some(&0xff)),
        _ => false,
    }
}

/// Lets an IP packet of the kernel's out in the clear.
fn leave(shared: &mut Shared, snapshot: &Snapshot, port: u16, mut frame: Frame, p: &Parsed) {
    let unresolved = shared
        .taps
        .mac(port)
        .is_some_and(|mac| frame.data().starts_with(&mac));
    if !unresolved {
        return shared.send_frame(port, frame);
    }
    match route(shared, snapshot, port, p) {
        Egress::Port(hop) if p.l3_len <= shared.ports.mtu(hop) => {
            cut(&mut frame, p);
            if let Err((frame, reason)) = shared.ports.send(frame, hop, &mut shared.handover) {
                shared.drop(frame, reason);
            }
        }
        Egress::Port(_) => shared.drop(frame, DropReason::TooBig),
        Egress::Unresolved => shared.drop(frame, DropReason::NoNeighbour),
        Egress::Tunnel(_) | Egress::Local | Egress::None => {
            shared.drop(frame, DropReason::NoRoute);
        }
    }
}

impl Shared {
    /// Sends a complete, untagged Ethernet frame on a port.
    fn send_frame(&mut self, port: u16, frame: Frame) {
        if let Err((frame, reason)) = self.ports.send_frame(port, frame, &mut self.handover) {
            self.drop(frame, reason);
        }
    }
}
