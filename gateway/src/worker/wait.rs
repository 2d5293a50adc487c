//! Packets whose neighbour's link address is not known yet. They wait a second at most while control asks the kernel to
//! find it, and then go out in order.

use std::collections::VecDeque;
use std::net::Ipv6Addr;

use pmd::Frame;
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Hop};
use sa_store::runtime::TunnelIdx;
use sa_store::sa::Vrf;
use sa_store::snapshot::Snapshot;

use super::core::{Shared, dst_of};
use super::lane::Info;
use super::outbound::{Outbound, hash_of};
use crate::esp::icmp::IcmpError;

/// Longest wait, nanoseconds.
const LONGEST: u64 = 1_000_000_000;
/// Between two reports of one neighbour, nanoseconds.
const REPEAT: u64 = 300_000_000;
/// How soon a sleeping worker looks again, nanoseconds.
const LOOK: u64 = 1_000_000;
/// Neighbours that are waited for.
const NEIGHBOURS: usize = 256;
/// Packets that wait for one neighbour, and for all.
const PACKETS_EACH: usize = 32;
const PACKETS: usize = 1024;

/// What a packet goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Its own route.
    Forward,
    /// Protection in this tunnel, whose outer packets are what has no neighbour yet.
    Protect(TunnelIdx),
}

struct Waiting {
    frame: Frame,
    info: Info,
    then: Then,
    until: u64,
}

struct Neighbour {
    port: u16,
    addr: u128,
    packets: VecDeque<Waiting>,
    /// Gateway clock of the next report.
    report: u64,
}

/// Who is waited for.
#[derive(Default)]
pub(super) struct WaitRoom {
    neighbours: Vec<Neighbour>,
    held: usize,
}

impl WaitRoom {
    /// Packets that wait.
    #[inline]
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// When to look again, if anything waits.
    pub(super) fn wake_at(&self, now: u64) -> Option<u64> {
        (self.held != 0).then_some(now + LOOK)
    }

    /// Ends what waits.
    pub(super) fn abandon(&mut self, shared: &mut Shared) {
        for packet in self.neighbours.drain(..).flat_map(|n| n.packets) {
            shared.drop(packet.frame, DropReason::Shutdown);
        }
        self.held = 0;
    }

    fn admit(&mut self, port: u16, addr: u128, packet: Waiting) -> Result<&mut Neighbour, Frame> {
        let at = self
            .neighbours
            .iter()
            .position(|n| (n.port, n.addr) == (port, addr));
        let at = match at {
            Some(at) => at,
            None if self.neighbours.len() < NEIGHBOURS => {
                self.neighbours.push(Neighbour {
                    port,
                    addr,
                    packets: VecDeque::new(),
                    report: 0,
                });
                self.neighbours.len() - 1
            }
            None => return Err(packet.frame),
        };
        let full = self.held >= PACKETS;
        let Some(neighbour) = self.neighbours.get_mut(at) else {
            return Err(packet.frame);
        };
        if full || neighbour.packets.len() >= PACKETS_EACH {
            return Err(packet.frame);
        }
        neighbour.packets.push_back(packet);
        self.held += 1;
        Ok(neighbour)
    }
}

impl Outbound {
    /// Lets a packet wait for its neighbour.
    #[cold]
    #[inline(never)]
    pub(super) fn await_neighbour(
        &mut self,
        shared: &mut Shared,
        snapshot: &Snapshot,
        frame: Frame,
        info: &Info,
        then: Then,
    ) {
        let missing = lookup(snapshot, shared, info, then)
            .and_then(|(vrf, dst, hash)| missing(&snapshot.fib, vrf, dst, hash));
        let Some((port, addr)) = missing else {
            // It was learnt a moment ago; the next packet will go.
            shared.drop(frame, DropReason::NoNeighbour);
            return;
        };
        let now = shared.now;
        let packet = Waiting {
            frame,
            info: *info,
            then,
            until: now + LONGEST,
        };
        match self.waiting.admit(port, addr, packet) {
            Ok(neighbour) => {
                if now >= neighbour.report {
                    neighbour.report = now + REPEAT;
                    let addr = Ipv6Addr::from(addr).to_canonical();
                    shared.reports.unresolved(now, port, addr);
                }
            }
            Err(frame) => shared.drop(frame, DropReason::NoNeighbour),
        }
    }

    /// Sends on the packets whose neighbour was learnt; gives up those that have waited too long.
    #[cold]
    #[inline(never)]
    pub(super) fn end_waits(&mut self, shared: &mut Shared, snapshot: &Snapshot) {
        let mut room = std::mem::take(&mut self.waiting);
        for neighbour in &mut room.neighbours {
            let resolved = neighbour.packets.front().is_some_and(|packet| {
                let key = lookup(snapshot, shared, &packet.info, packet.then);
                key.is_none_or(|(vrf, dst, hash)| {
                    missing(&snapshot.fib, vrf, dst, hash) != Some((neighbour.port, neighbour.addr))
                })
            });
            let now = shared.now;
            let over = |p: &Waiting| resolved || p.until <= now;
            while neighbour.packets.front().is_some_and(over) {
                let Some(packet) = neighbour.packets.pop_front() else {
                    break;
                };
                room.held -= 1;
                match (resolved, packet.then) {
                    (true, Then::Forward) => self.forward.push(packet.frame, packet.info),
                    (true, Then::Protect(tunnel)) => {
                        self.protect.push(packet.frame, (packet.info, tunnel));
                    }
                    (false, then) => {
                        // RFC 1812 section 5.2.7.1, RFC 4443 section 3.1.
                        if then == Then::Forward {
                            let error = IcmpError::HostUnreachable;
                            let (data, info) = (packet.frame.data(), &packet.info);
                            self.answer(shared, snapshot, data, info, error);
                        }
                        shared.drop(packet.frame, DropReason::NoNeighbour);
                    }
                }
            }
            if !neighbour.packets.is_empty() && shared.now >= neighbour.report {
                neighbour.report = shared.now + REPEAT;
                let addr = Ipv6Addr::from(neighbour.addr).to_canonical();
                shared.reports.unresolved(shared.now, neighbour.port, addr);
            }
        }
        room.neighbours.retain(|n| !n.packets.is_empty());
        self.waiting = room;
    }
}

/// What is looked up for a packet: VRF, destination, hash.
fn lookup(
    snapshot: &Snapshot,
    shared: &Shared,
    info: &Info,
    then: Then,
) -> Option<(Vrf, u128, u32)> {
    match then {
        Then::Forward => Some((shared.vrf(info.port), dst_of(&info.p), hash_of(&info.p))),
        Then::Protect(tunnel) => {
            let fixed = &snapshot.outbound(tunnel)?.fixed;
            Some((fixed.vrf, fixed.dst, fixed.spi))
        }
    }
}

/// The neighbour that is not known, if that is what stands in the way.
fn missing(fib: &Fib, vrf: Vrf, dst: u128, hash: u32) -> Option<(u16, u128)> {
    match fib.lookup(vrf, dst, hash) {
        Hop::Neighbour(hop) if fib.mac(hop).is_none() => fib.port(hop).zip(fib.address(hop)),
        Hop::Unresolved { port } => Some((port, dst)),
        _ => None,
    }
}
