//! The ports of a worker: receiving, routing, link headers, transmission and its backlog.

use std::os::fd::BorrowedFd;

use pmd::{BURST, Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Hop, HopIdx, RouteCache};
use sa_store::ledger::WorkerCounters;
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::Vrf;

use super::handover::{Handed, Handover, Task};
use super::setup::{Mtus, PipelineConfig, Side};
use crate::wire::{Frag, Kind, Parsed};

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
    link: Link,
    /// Its frames go to its own queues, untagged: the usual case, decided once.
    plain: bool,
    /// Such frames may go with their UDP checksum left to the port.
    completes_checksums: bool,
}

/// What the link headers of a port have in common.
#[derive(Clone, Copy)]
struct Link {
    /// Source address in the low 48 bits, first byte lowest.
    source: u64,
    vlan: Option<u16>,
}

/// What the packets of a port usually are, so that most bursts need no sorting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usual {
    pub(super) side: Side,
    tag: u16,
}

impl Usual {
    /// Whole packets from inside; ESP from outside; with the port's own tag.
    #[inline(always)]
    pub(super) fn fits(self, p: &Parsed) -> bool {
        p.vlan == self.tag
            && match self.side {
                Side::Inside => p.kind == Kind::Ip && p.frag == Frag::No,
                Side::Outside => matches!(p.kind, Kind::Esp | Kind::UdpEsp),
            }
    }
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

/// A port and the link address there, in one word: what is written in pieces cannot be read at once soon after. The
/// address is in the low 48 bits, first byte lowest, as a little-endian store puts it on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortHop(u64);

/// The bits of a [`PortHop`] that hold the link address.
const MAC: u64 = (1 << 48) - 1;

impl PortHop {
    #[inline(always)]
    fn new(port: u16, mac: [u8; 6]) -> Self {
        Self(low48(mac) | u64::from(port) << 48)
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
    fn port(self) -> usize {
        // 16 bits.
        (self.0 >> 48) as usize
    }
}

#[inline(always)]
fn low48([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// A worker's ports by number.
pub(super) struct Ports {
    list: Vec<PortState>,
    mtus: Mtus,
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
                link: Link {
                    source: low48(setup.mac.0),
                    vlan: setup.vlan,
                },
                plain: false,
                completes_checksums: false,
            })
            .collect();
        for (number, port) in (0_u16..).zip(&mut list) {
            port.plain =
                port.carrier == number && !port.queues.is_empty() && port.link.vlan.is_none();
            // Frames leave by the first queue.
            let queue = port.queues.first().filter(|_| port.plain);
            port.completes_checksums = queue.is_some_and(|q| q.completes_checksums());
        }
        for (number, setup) in numbered {
            if let Some(carrier) = setup.shares.and_then(|c| list.get_mut(usize::from(c))) {
                carrier.siblings.push((setup.vlan.unwrap_or(0), number));
            }
        }
        Self {
            list,
            mtus: config.mtus.clone(),
            routes: RouteCache::default(),
        }
    }

    /// The port that a frame with this tag (0: none) belongs to, received on the queues of `port`.
    #[inline]
    pub(super) fn of_tag(&self, port: u16, tag: u16) -> Option<u16> {
        let state = self.list.get(usize::from(port))?;
        if state.link.vlan.unwrap_or(0) == tag {
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

    /// What is to be expected from a port.
    #[inline]
    pub(super) fn usual(&self, port: u16) -> Usual {
        self.list.get(usize::from(port)).map_or(
            Usual {
                side: Side::Outside,
                tag: 0,
            },
            |p| Usual {
                side: p.side,
                tag: p.link.vlan.unwrap_or(0),
            },
        )
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
        self.list.get(hop.port()).map_or(Side::Outside, |p| p.side)
    }

    /// Largest IP packet that the port takes.
    #[inline]
    pub(super) fn mtu(&self, hop: PortHop) -> u16 {
        self.mtus.get(hop.port())
    }

    /// Whether packets that go there may have their UDP checksum left to the port.
    #[inline]
    pub(super) fn completes_checksums(&self, hop: PortHop) -> bool {
        self.list
            .get(hop.port())
            .is_some_and(|p| p.completes_checksums)
    }

    /// Puts the link header in front of an IP packet and queues the frame; hands it over when another worker
    /// has the port's queue.
    ///
    /// # Errors
    /// The frame and why it cannot be sent.
    #[inline(always)]
    pub(super) fn send(
        &mut self,
        frame: Frame,
        hop: PortHop,
        handover: &mut Handover,
    ) -> Result<(), (Frame, DropReason)> {
        let Some(port) = self.list.get_mut(hop.port()) else {
            return Err((frame, DropReason::NoRoute));
        };
        if !port.plain {
            return self.send_through(frame, hop, handover);
        }
        // Moved before it is written to: the handle is read whole, and its parts were written apart.
        let link = port.link;
        port.tx.push(frame);
        if port
            .tx
            .last_mut()
            .is_some_and(|frame| write_link(frame, hop, link))
        {
            return Ok(());
        }
        port.tx
            .pop()
            .map_or(Ok(()), |f| Err((f, DropReason::NoRoom)))
    }

    /// [`send`](Self::send) where the port shares another's queues, has tags, or has no queue here.
    #[inline(never)]
    fn send_through(
        &mut self,
        mut frame: Frame,
        hop: PortHop,
        handover: &mut Handover,
    ) -> Result<(), (Frame, DropReason)> {
        let Some(port) = self.list.get(hop.port()) else {
            return Err((frame, DropReason::NoRoute));
        };
        let (carrier, via) = (port.carrier, port.via);
        let written = match port.link.vlan {
            None => write_link(&mut frame, hop, port.link),
            Some(vlan) => write_tagged(&mut frame, hop, port.link, vlan),
        };
        if !written {
            return Err((frame, DropReason::NoRoom));
        }
        self.pass_on(frame, carrier, via, handover);
        Ok(())
    }

    /// Queues a complete Ethernet frame without a tag; the port's own is put in.
    ///
    /// # Errors
    /// The frame and why it cannot be sent.
    pub(super) fn send_frame(
        &mut self,
        number: u16,
        mut frame: Frame,
        handover: &mut Handover,
    ) -> Result<(), (Frame, DropReason)> {
        let Some(port) = self.list.get(usize::from(number)) else {
            return Err((frame, DropReason::NoRoute));
        };
        let (carrier, via) = (port.carrier, port.via);
        if let Some(vlan) = port.link.vlan
            && !insert_tag(&mut frame, vlan)
        {
            return Err((frame, DropReason::NoRoom));
        }
        self.pass_on(frame, carrier, via, handover);
        Ok(())
    }

    /// Queues a frame on the port that carries it, or with the worker that has that port's queues.
    #[inline(always)]
    fn pass_on(&mut self, frame: Frame, carrier: u16, via: usize, handover: &mut Handover) {
        match self.list.get_mut(usize::from(carrier)) {
            Some(c) if !c.queues.is_empty() => c.tx.push(frame),
            _ => handover.stage(
                via,
                Handed {
                    frame,
                    port: carrier,
                    task: Task::Send(carrier),
                },
            ),
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

/// Ethertype of an IP packet as it stands on the wire, in the low 16 bits, first byte lowest.
#[inline(always)]
fn ethertype(frame: &Frame) -> u64 {
    match frame.data().first() {
        Some(b) if b >> 4 == 6 => 0xdd86,
        _ => 0x0008,
    }
}

/// Puts an untagged link header in front of an IP packet; false when there is no room.
#[inline(always)]
fn write_link(frame: &mut Frame, hop: PortHop, link: Link) -> bool {
    let ethertype = ethertype(frame);
    let Some(header) = frame.prepend_array::<ETHERNET>() else {
        return false;
    };
    // Two stores that overlap: destination and the start of the source, then source and ethertype.
    header[..8].copy_from_slice(&(hop.0 & MAC | link.source << 48).to_le_bytes());
    header[6..].copy_from_slice(&(link.source | ethertype << 48).to_le_bytes());
    true
}

/// Puts a tag into a complete Ethernet frame.
fn insert_tag(frame: &mut Frame, vlan: u16) -> bool {
    if frame.len() < ETHERNET || frame.prepend(VLAN_TAG).is_none() {
        return false;
    }
    let Some(header) = frame
        .data_mut()
        .first_chunk_mut::<{ ETHERNET + VLAN_TAG }>()
    else {
        return false;
    };
    header.copy_within(VLAN_TAG..ETHERNET + 2, 0);
    let [v, w] = vlan.to_be_bytes();
    header[12..16].copy_from_slice(&[0x81, 0, v, w]);
    true
}

/// The same with an IEEE 802.1Q tag.
fn write_tagged(frame: &mut Frame, hop: PortHop, link: Link, vlan: u16) -> bool {
    let ethertype = ethertype(frame);
    let Some(header) = frame.prepend_array::<{ ETHERNET + VLAN_TAG }>() else {
        return false;
    };
    let [p, q, ..] = ethertype.to_le_bytes();
    let [v, w] = vlan.to_be_bytes();
    header[..8].copy_from_slice(&(hop.0 & MAC | link.source << 48).to_le_bytes());
    header[6..14].copy_from_slice(&(link.source | 0x0081 << 48).to_le_bytes());
    header[14..].copy_from_slice(&[v, w, p, q]);
    true
}
