//! The ports of a worker: receiving, routing, link headers, transmission and its backlog.

use std::os::fd::BorrowedFd;

use pmd::{BURST, Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::fib::{Fib, Hop, HopIdx, RouteCache};
use sa_store::ledger::WorkerCounters;
use sa_store::runtime::TunnelIdx;
use sa_store::sa::Vrf;

use super::handover::{Handed, Handover, Task};
use super::setup::{PipelineConfig, Side};

/// Frames that may wait for a full transmit queue, per port.
const BACKLOG: usize = 4 * BURST;
const VLAN_TAG: usize = 4;
const ETHERNET: usize = 14;

struct PortState {
    queue: Option<Box<dyn PortQueue>>,
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

/// A port and the link address there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PortHop {
    port: u16,
    mac: [u8; 6],
}

impl PortHop {
    /// As a job's tag.
    #[inline(always)]
    pub(super) fn to_tag(self) -> u64 {
        let [a, b, c, d, e, f] = self.mac;
        let [p, q] = self.port.to_be_bytes();
        u64::from_be_bytes([p, q, a, b, c, d, e, f])
    }

    /// Back from a tag.
    #[inline(always)]
    pub(super) fn from_tag(tag: u64) -> Self {
        let [p, q, a, b, c, d, e, f] = tag.to_be_bytes();
        Self {
            port: u16::from_be_bytes([p, q]),
            mac: [a, b, c, d, e, f],
        }
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
        queues: Vec<Option<Box<dyn PortQueue>>>,
        via: Vec<usize>,
    ) -> Self {
        let list = config
            .ports
            .iter()
            .zip(queues)
            .zip(via)
            .map(|((setup, queue), via)| PortState {
                queue,
                via,
                tx: Vec::with_capacity(2 * BACKLOG),
                side: setup.side,
                mtu: setup.mtu,
                source: setup.mac.0,
                vlan: setup.vlan,
            })
            .collect();
        Self {
            list,
            routes: RouteCache::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Receives a burst from a port.
    #[inline]
    pub(super) fn receive(&mut self, port: usize, pool: &mut Pool, out: &mut Vec<Frame>) -> usize {
        match self.list.get_mut(port).and_then(|p| p.queue.as_mut()) {
            Some(queue) => queue.rx_burst(pool, out, BURST),
            None => 0,
        }
    }

    /// Where a packet to `dst` (IPv4 as IPv4-mapped) goes.
    #[inline]
    pub(super) fn route(&mut self, fib: &Fib, vrf: Vrf, dst: u128, hash: u32) -> Egress {
        match self.routes.lookup(fib, vrf, dst, hash) {
            Hop::Neighbour(hop) => resolve(fib, hop),
            Hop::Tunnel(t) => Egress::Tunnel(t),
            Hop::Local => Egress::Local,
            Hop::Unresolved { .. } => Egress::Unresolved,
            Hop::None => Egress::None,
        }
    }

    /// Side of the port that a hop leaves by.
    #[inline]
    pub(super) fn side(&self, hop: PortHop) -> Side {
        self.list
            .get(usize::from(hop.port))
            .map_or(Side::Outside, |p| p.side)
    }

    /// Largest IP packet that the port takes.
    #[inline]
    pub(super) fn mtu(&self, hop: PortHop) -> u16 {
        self.list.get(usize::from(hop.port)).map_or(0, |p| p.mtu)
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
        let Some(port) = self.list.get_mut(usize::from(hop.port)) else {
            return Err((frame, DropReason::NoRoute));
        };
        let v6 = frame.data().first().is_some_and(|b| b >> 4 == 6);
        let ethertype: [u8; 2] = if v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
        let room = match port.vlan {
            None => frame.prepend(ETHERNET),
            Some(_) => frame.prepend(ETHERNET + VLAN_TAG),
        };
        let Some(header) = room else {
            return Err((frame, DropReason::NoRoom));
        };
        header[..6].copy_from_slice(&hop.mac);
        header[6..12].copy_from_slice(&port.source);
        match port.vlan {
            None => header[12..14].copy_from_slice(&ethertype),
            Some(vlan) => {
                header[12..14].copy_from_slice(&[0x81, 0x00]);
                header[14..16].copy_from_slice(&vlan.to_be_bytes());
                header[16..18].copy_from_slice(&ethertype);
            }
        }
        if port.queue.is_some() {
            port.tx.push(frame);
        } else {
            handover.stage(
                port.via,
                Handed {
                    frame,
                    port: hop.port,
                    task: Task::Send(hop.port),
                },
            );
        }
        Ok(())
    }

    /// Queues a complete Ethernet frame that another worker built.
    pub(super) fn queue(&mut self, port: u16, frame: Frame) -> Result<(), (Frame, DropReason)> {
        match self.list.get_mut(usize::from(port)) {
            Some(state) if state.queue.is_some() => {
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
            let Some(queue) = &mut port.queue else {
                continue;
            };
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
        for queue in self.list.iter_mut().filter_map(|p| p.queue.as_mut()) {
            queue.drain(pool);
        }
    }

    /// Whether no port will ever receive anything again.
    pub(super) fn finished(&self) -> bool {
        self.list
            .iter()
            .filter_map(|p| p.queue.as_ref())
            .all(|q| q.finished())
    }

    /// Whether every port can wake a sleeping worker.
    pub(super) fn all_wake(&self) -> bool {
        self.list
            .iter()
            .filter_map(|p| p.queue.as_ref())
            .all(|q| q.wait_fd().is_some())
    }

    /// Asks every port for a wake-up.
    pub(super) fn arm(&mut self, pool: &mut Pool) {
        for queue in self.list.iter_mut().filter_map(|p| p.queue.as_mut()) {
            queue.flush(pool);
            queue.arm();
        }
    }

    /// What to wait on.
    pub(super) fn wait_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.list.iter().filter_map(|p| p.queue.as_ref()?.wait_fd())
    }
}

#[inline(always)]
fn resolve(fib: &Fib, hop: HopIdx) -> Egress {
    match (fib.port(hop), fib.mac(hop)) {
        (Some(port), Some(mac)) => Egress::Port(PortHop { port, mac }),
        _ => Egress::Unresolved,
    }
}
