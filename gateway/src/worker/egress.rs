//! The ports of a worker: receiving, routing, link headers, transmission and its backlog.

use std::os::fd::BorrowedFd;

use pmd::{BURST, Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Hop, HopIdx, RouteCache};
use sa_store::ledger::WorkerCounters;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::Vrf;

use super::handover::{Handed, Handover, Task};
use super::setup::{PipelineConfig, Side};

/// Frames that may wait for a full transmit queue, per port.
const BACKLOG: usize = 4 * BURST;
const VLAN_TAG: usize = 4;
const ETHERNET: usize = 14;

struct PortState {
    queues: Vec<Box<dyn PortQueue>>,
    /// Port whose queues it uses: its own number, or that of the port with which it shares an interface.
    carrier: u16,
    /// Ports that share these queues, by VLAN.
    siblings: Vec<(u16, u16)>,
    /// Worker that has a queue when this one has none.
    via: usize,
    tx: Vec<Frame>,
    side: Side,
    mtu: u16,
    source: [u8; 6],
    vlan: Option<u16>,
}

/// Where a packet goes, with all that sending needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Egress {
    /// Out of a port.
    Port(PortHop),
    /// Into a route-based tunnel.
    Tunnel(TunnelIdx),
    /// To the gateway itself.
    Local,
    /// A port, but the neighbour's link address is not known.
    Unresolved,
    /// No route.
    None,
}

/// A port and the link address there, in one word: what is written in pieces cannot be read at once soon after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortHop(u64);

impl PortHop {
    #[inline(always)]
    fn new(port: u16, [a, b, c, d, e, f]: [u8; 6]) -> Self {
        let [p, q] = port.to_be_bytes();
        Self(u64::from_be_bytes([p, q, a, b, c, d, e, f]))
    }

    /// As a job's tag.
    #[inline(always)]
    pub(super) fn to_tag(self) -> u64 {
        self.0
    }

    /// Back from a tag.
    #[inline(always)]
    pub(super) fn from_tag(tag: u64) -> Self {
        Self(tag)
    }

    #[inline(always)]
    fn port(self) -> u16 {
        let [p, q, ..] = self.0.to_be_bytes();
        u16::from_be_bytes([p, q])
    }

    #[inline(always)]
    fn mac(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }
}

/// A worker's ports by number.
pub(super) struct Ports {
    list: Vec<PortState>,
    routes: RouteCache,
}

impl Ports {
    pub(super) fn new(
        config: &PipelineConfig,
        queues: Vec<Vec<Box<dyn PortQueue>>>,
        via: Vec<usize>,
    ) -> Self {
        let numbered = (0_u16..).zip(&config.ports);
        let mut list: Vec<PortState> = numbered
            .clone()
            .zip(queues)
            .zip(via)
            .map(|(((number, setup), queues), via)| PortState {
                queues,
                carrier: setup.shares.unwrap_or(number),
                siblings: Vec::new(),
                via,
                tx: Vec::with_capacity(2 * BACKLOG),
                side: setup.side,
                mtu: setup.mtu,
                source: setup.mac.0,
                vlan: setup.vlan,
            })
            .collect();
        for (number, setup) in numbered {
            if let Some(carrier) = setup.shares.and_then(|c| list.get_mut(usize::from(c))) {
                carrier.siblings.push((setup.vlan.unwrap_or(0), number));
            }
        }
        Self {
            list,
            routes: RouteCache::default(),
        }
    }

    /// The port that a frame with this tag (0: none) belongs to, received on the queues of `port`.
    #[inline]
    pub(super) fn of_tag(&self, port: u16, tag: u16) -> Option<u16> {
        let state = self.list.get(usize::from(port))?;
        if state.vlan.unwrap_or(0) == tag {
            return Some(port);
        }
        state
            .siblings
            .iter()
            .find(|(vlan, _)| *vlan == tag)
            .map(|(_, number)| *number)
    }

    /// Side of a port.
    #[inline]
    pub(super) fn side_of(&self, port: u16) -> Side {
        self.list
            .get(usize::from(port))
            .map_or(Side::Outside, |p| p.side)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Receives a burst from a port.
    #[inline]
    pub(super) fn receive(&mut self, port: usize, pool: &mut Pool, out: &mut Vec<Frame>) -> usize {
        let Some(state) = self.list.get_mut(port) else {
            return 0;
        };
        state
            .queues
            .iter_mut()
            .map(|q| q.rx_burst(pool, out, BURST))
            .sum()
    }

    /// Where a packet to `dst` (IPv4 as IPv4-mapped) goes.
    #[inline]
    pub(super) fn route(&mut self, fib: &Fib, vrf: Vrf, dst: u128, hash: u32) -> Egress {
        egress(fib, self.routes.lookup(fib, vrf, dst, hash))
    }

    /// Where the outer packets of an SA go. The SA remembers it, so that thousands of peers cost no look-up.
    #[inline]
    pub(super) fn route_outer(&self, fib: &Fib, entry: &SaEntry) -> Egress {
        let generation = fib.generation();
        if let Some(hop) = entry.hop(generation) {
            return resolve(fib, hop);
        }
        let fixed = &entry.fixed;
        match fib.lookup(fixed.vrf, fixed.dst, fixed.spi) {
            Hop::Neighbour(hop) => {
                entry.remember_hop(generation, hop);
                resolve(fib, hop)
            }
            other => egress(fib, other),
        }
    }

    /// Side of the port that a hop leaves by.
    #[inline]
    pub(super) fn side(&self, hop: PortHop) -> Side {
        self.side_of(hop.port())
    }

    /// Largest IP packet that the port takes.
    #[inline]
    pub(super) fn mtu(&self, hop: PortHop) -> u16 {
        self.list.get(usize::from(hop.port())).map_or(0, |p| p.mtu)
    }

    /// Puts the link header in front of an IP packet and queues the frame; hands it over when another worker
    /// has the port's queue.
    ///
    /// # Errors
    /// The frame and why it cannot be sent.
    #[inline]
    pub(super) fn send(
        &mut self,
        mut frame: Frame,
        hop: PortHop,
        handover: &mut Handover,
    ) -> Result<(), (Frame, DropReason)> {
        let Some(port) = self.list.get(usize::from(hop.port())) else {
            return Err((frame, DropReason::NoRoute));
        };
        let (carrier, via) = (port.carrier, port.via);
        let (source, vlan) = (port.source, port.vlan);
        match self.list.get_mut(usize::from(carrier)) {
            Some(c) if !c.queues.is_empty() => {
                // Moved before it is written to: the handle is read whole, and its parts were written apart.
                c.tx.push(frame);
                let written =
                    c.tx.last_mut()
                        .is_some_and(|frame| write_link(frame, hop, source, vlan));
                match written {
                    true => Ok(()),
                    false => c.tx.pop().map_or(Ok(()), |f| Err((f, DropReason::NoRoom))),
                }
            }
            _ => {
                if !write_link(&mut frame, hop, source, vlan) {
                    return Err((frame, DropReason::NoRoom));
                }
                let task = Task::Send(carrier);
                handover.stage(
                    via,
                    Handed {
                        frame,
                        port: carrier,
                        task,
                    },
                );
                Ok(())
            }
        }
    }

    /// Queues a complete Ethernet frame that another worker built.
    pub(super) fn queue(&mut self, port: u16, frame: Frame) -> Result<(), (Frame, DropReason)> {
        match self.list.get_mut(usize::from(port)) {
            Some(state) if !state.queues.is_empty() => {
                state.tx.push(frame);
                Ok(())
            }
            _ => Err((frame, DropReason::NoRoute)),
        }
    }

    /// Sends what is queued. What a full queue does not take waits, up to a limit; beyond it the newest are
    /// dropped. Returns how many were sent.
    pub(super) fn transmit(&mut self, pool: &mut Pool, counters: &WorkerCounters) -> usize {
        let mut sent = 0;
        for port in &mut self.list {
            let Some((queue, others)) = port.queues.split_first_mut() else {
                continue;
            };
            for other in others {
                other.flush(pool);
            }
            if port.tx.is_empty() {
                queue.flush(pool);
                continue;
            }
            sent += queue.tx_burst(pool, &mut port.tx);
            if port.tx.len() > BACKLOG {
                counters.drop_frames(DropReason::TxFull, (port.tx.len() - BACKLOG) as u64);
                for late in port.tx.drain(BACKLOG..) {
                    pool.put(late);
                }
            }
        }
        if sent != 0 {
            counters.sent.add(sent as u64);
        }
        sent
    }

    /// Frames that wait for transmission.
    pub(super) fn backlog(&self) -> usize {
        self.list.iter().map(|p| p.tx.len()).sum()
    }

    /// Ends what waits for transmission.
    pub(super) fn abandon(&mut self, pool: &mut Pool, counters: &WorkerCounters) {
        for port in &mut self.list {
            counters.drop_frames(DropReason::Shutdown, port.tx.len() as u64);
            for frame in port.tx.drain(..) {
                pool.put(frame);
            }
        }
    }

    /// Takes all frames back from the ports.
    pub(super) fn close(&mut self, pool: &mut Pool) {
        for queue in self.list.iter_mut().flat_map(|p| p.queues.iter_mut()) {
            queue.drain(pool);
        }
    }

    /// Whether no port will ever receive anything again.
    pub(super) fn finished(&self) -> bool {
        self.list
            .iter()
            .flat_map(|p| p.queues.iter())
            .all(|q| q.finished())
    }

    /// Whether every port can wake a sleeping worker.
    pub(super) fn all_wake(&self) -> bool {
        self.list
            .iter()
            .flat_map(|p| p.queues.iter())
            .all(|q| q.wait_fd().is_some())
    }

    /// Asks every port for a wake-up.
    pub(super) fn arm(&mut self, pool: &mut Pool) {
        for queue in self.list.iter_mut().flat_map(|p| p.queues.iter_mut()) {
            queue.flush(pool);
            queue.arm();
        }
    }

    /// What to wait on.
    pub(super) fn wait_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.list
            .iter()
            .flat_map(|p| p.queues.iter())
            .filter_map(|q| q.wait_fd())
    }
}

#[inline(always)]
fn egress(fib: &Fib, hop: Hop) -> Egress {
    match hop {
        Hop::Neighbour(hop) => resolve(fib, hop),
        Hop::Tunnel(t) => Egress::Tunnel(t),
        Hop::Local => Egress::Local,
        Hop::Unresolved { .. } => Egress::Unresolved,
        Hop::None => Egress::None,
    }
}

#[inline(always)]
fn resolve(fib: &Fib, hop: HopIdx) -> Egress {
    match (fib.port(hop), fib.mac(hop)) {
        (Some(port), Some(mac)) => Egress::Port(PortHop::new(port, mac)),
        _ => Egress::Unresolved,
    }
}

/// Puts the link header in front of an IP packet; false when there is no room.
#[inline(always)]
fn write_link(frame: &mut Frame, hop: PortHop, source: [u8; 6], vlan: Option<u16>) -> bool {
    let v6 = frame.data().first().is_some_and(|b| b >> 4 == 6);
    let ethertype: [u8; 2] = if v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
    let len = ETHERNET + if vlan.is_some() { VLAN_TAG } else { 0 };
    let Some(header) = frame.prepend(len) else {
        return false;
    };
    header[..6].copy_from_slice(&hop.mac());
    header[6..12].copy_from_slice(&source);
    match vlan {
        None => header[12..14].copy_from_slice(&ethertype),
        Some(vlan) => {
            header[12..14].copy_from_slice(&[0x81, 0x00]);
            header[14..16].copy_from_slice(&vlan.to_be_bytes());
            header[16..18].copy_from_slice(&ethertype);
        }
    }
    true
}
