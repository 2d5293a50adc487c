//! The exception path: what belongs to the kernel's network stack goes into the TAP of its port, and what the kernel
//! sends comes out of it (see [`super::inject`]).
//!
//! A TAP costs a system call per frame. So each class of frames has a rate of its own, per port and worker; what is within
//! the rate waits here until the end of the round, when a bounded number is written, the most important class first. A
//! flood is turned away at the rate limit and costs little more than being dropped.

use std::os::fd::BorrowedFd;

use pmd::{Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::ledger::{Punt, WorkerCounters};

use super::core::Shared;
use super::lane::Info;
use super::setup::{PipelineConfig, PuntLimits};
use crate::esp::rate::TokenBucket;
use crate::wire::icmp::v6;
use crate::wire::{Family, Kind, Parsed, proto};

/// Frames of one class that may wait for a TAP.
const WAITING: usize = 128;
/// Between two looks into silent TAPs while there is other work, nanoseconds.
const LOOK: u64 = 100_000;
/// Frames taken from a TAP in one round.
const TAKEN: usize = 32;
const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;

/// A worker's queue of a port's TAP.
struct Tap {
    queue: Box<dyn PortQueue>,
    limits: [TokenBucket; Punt::COUNT],
    waiting: [Vec<Frame>; Punt::COUNT],
    /// Address of the port and of the kernel's interface.
    mac: [u8; 6],
}

impl Tap {
    fn new(queue: Box<dyn PortQueue>, mac: [u8; 6], limits: &PuntLimits) -> Self {
        let bucket = |rate: u32| TokenBucket::new(rate, (rate / 10).max(16));
        Self {
            queue,
            limits: limits.rates.map(bucket),
            waiting: std::array::from_fn(|_| Vec::new()),
            mac,
        }
    }
}

/// A worker's TAPs by port number.
pub(super) struct Taps {
    list: Vec<Option<Tap>>,
    /// For each port, the TAP that takes what came through a tunnel: its own, else one of the same VRF.
    inner: Vec<Option<u16>>,
    waiting: usize,
    per_round: usize,
    any: bool,
    /// Gateway clock of the next look into silent TAPs.
    due: u64,
    scratch: Vec<Frame>,
}

impl Taps {
    pub(super) fn new(config: &PipelineConfig, queues: Vec<Option<Box<dyn PortQueue>>>) -> Self {
        let mut queues = queues.into_iter();
        let list: Vec<Option<Tap>> = config
            .ports
            .iter()
            .map(|port| {
                let queue = queues.next().flatten()?;
                Some(Tap::new(queue, port.mac.0, &config.punt))
            })
            .collect();
        let has = |number: usize| matches!(list.get(number), Some(Some(_)));
        let inner = config.ports.iter().enumerate().map(|(number, port)| {
            let mut others =
                (0..list.len()).filter(|other| has(*other) && config.ports[*other].vrf == port.vrf);
            let found = if has(number) {
                Some(number)
            } else {
                others.next()
            };
            found.and_then(|n| u16::try_from(n).ok())
        });
        Self {
            inner: inner.collect(),
            any: list.iter().any(Option::is_some),
            list,
            waiting: 0,
            per_round: usize::from(config.punt.per_round.max(1)),
            due: 0,
            scratch: Vec::new(),
        }
    }

    /// Frames that wait to be written.
    #[inline]
    pub(super) fn held(&self) -> usize {
        self.waiting
    }

    /// Whether it is time to look into the TAPs.
    #[inline]
    pub(super) fn is_due(&self, now: u64) -> bool {
        self.any && now >= self.due
    }

    /// The next look is in the next round.
    pub(super) fn hurry(&mut self) {
        self.due = 0;
    }

    /// Takes what the kernel sends, at most so much a round: (port, frames).
    pub(super) fn receive(
        &mut self,
        now: u64,
        pool: &mut Pool,
        mut take: impl FnMut(u16, &mut Vec<Frame>),
    ) -> usize {
        let mut got = 0;
        for (number, tap) in (0_u16..).zip(&mut self.list) {
            let Some(tap) = tap else { continue };
            let n = tap.queue.rx_burst(pool, &mut self.scratch, TAKEN);
            if n != 0 {
                got += n;
                take(number, &mut self.scratch);
            }
        }
        self.due = if got == 0 { now + LOOK } else { 0 };
        got
    }

    /// Own address of a port with a TAP.
    pub(super) fn mac(&self, port: u16) -> Option<[u8; 6]> {
        let tap = self.list.get(usize::from(port))?.as_ref()?;
        Some(tap.mac)
    }

    /// The port whose TAP takes what has no link header.
    fn for_inner(&self, port: u16) -> Option<u16> {
        self.inner.get(usize::from(port)).copied().flatten()
    }

    /// Takes a complete Ethernet frame for the kernel, if there is a TAP and its class allows one more.
    fn offer(
        &mut self,
        port: u16,
        class: Punt,
        frame: Frame,
        now: u64,
    ) -> Result<(), (Frame, DropReason)> {
        let Some(Some(tap)) = self.list.get_mut(usize::from(port)) else {
            return Err((frame, DropReason::NotForUs));
        };
        let (Some(limit), Some(waiting)) = (
            tap.limits.get_mut(class as usize),
            tap.waiting.get_mut(class as usize),
        ) else {
            return Err((frame, DropReason::NotForUs));
        };
        if waiting.len() >= WAITING {
            return Err((frame, DropReason::PuntFull));
        }
        if !limit.allow(now) {
            return Err((frame, DropReason::PuntLimit));
        }
        waiting.push(frame);
        self.waiting += 1;
        Ok(())
    }

    /// Writes what waits, at most so much a round, class by class. Returns how many were written.
    pub(super) fn flush(&mut self, pool: &mut Pool, counters: &WorkerCounters) -> usize {
        if self.waiting == 0 {
            return 0;
        }
        let mut left = self.per_round;
        let mut written = 0;
        for class in 0..Punt::COUNT {
            for tap in self.list.iter_mut().flatten() {
                let waiting = &mut tap.waiting[class];
                let n = waiting.len().min(left);
                if n == 0 {
                    continue;
                }
                self.scratch.extend(waiting.drain(..n));
                let sent = tap.queue.tx_burst(pool, &mut self.scratch);
                // What the TAP did not take comes first the next time.
                waiting.splice(0..0, self.scratch.drain(..));
                tap.queue.flush(pool);
                counters.punted[class].add(sent as u64);
                self.waiting -= sent;
                written += sent;
                left -= n;
            }
        }
        written
    }

    /// Ends what waits.
    pub(super) fn abandon(&mut self, pool: &mut Pool, counters: &WorkerCounters) {
        for tap in self.list.iter_mut().flatten() {
            for frame in tap.waiting.iter_mut().flat_map(|w| w.drain(..)) {
                counters.drop_frames(DropReason::Shutdown, 1);
                pool.put(frame);
            }
        }
        self.waiting = 0;
    }

    /// Takes all frames back from the TAPs.
    pub(super) fn close(&mut self, pool: &mut Pool) {
        for tap in self.list.iter_mut().flatten() {
            tap.queue.drain(pool);
        }
    }

    /// Whether every TAP can wake a sleeping worker.
    pub(super) fn all_wake(&self) -> bool {
        self.list
            .iter()
            .flatten()
            .all(|tap| tap.queue.wait_fd().is_some())
    }

    /// Asks every TAP for a wake-up.
    pub(super) fn arm(&mut self, pool: &mut Pool) {
        self.due = 0;
        for tap in self.list.iter_mut().flatten() {
            tap.queue.flush(pool);
            tap.queue.arm();
        }
    }

    /// What to wait on.
    pub(super) fn wait_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.list.iter().flatten().filter_map(|t| t.queue.wait_fd())
    }
}

impl Shared {
    /// Gives an IP packet to the kernel, by the TAP of the port on which it came. Its frame begins with the IP header;
    /// the link header that it came with still stands before that.
    #[cold]
    #[inline(never)]
    pub(super) fn punt(&mut self, mut frame: Frame, info: &Info) {
        let class = class_of(&info.p);
        let framed = match info.p.l2_len {
            0 => self
                .taps
                .for_inner(info.port)
                .filter(|port| self.frame_for_kernel(&mut frame, *port)),
            l2 => Some(info.port).filter(|_| unwrap(&mut frame, usize::from(l2))),
        };
        match framed {
            Some(port) => self.offer(port, class, frame),
            None => self.drop(frame, DropReason::NotForUs),
        }
    }

    /// Gives what is not IP to the kernel: a whole frame, addressed to the port or to a group.
    #[cold]
    #[inline(never)]
    pub(super) fn punt_foreign(&mut self, mut frame: Frame, p: &Parsed, port: u16) {
        let own = self.taps.mac(port);
        let to_us = own.is_some_and(|mac| frame.data().starts_with(&mac));
        let tagged = usize::from(p.l2_len) > ETHERNET;
        if (to_us || p.l2_group()) && (!tagged || untag(&mut frame)) {
            self.offer(port, class_of(p), frame);
        } else {
            self.drop(frame, DropReason::NotForUs);
        }
    }

    fn offer(&mut self, port: u16, class: Punt, frame: Frame) {
        if let Err((frame, reason)) = self.taps.offer(port, class, frame, self.now) {
            if reason != DropReason::NotForUs {
                self.counters.unpunted[class as usize].add(1);
            }
            self.drop(frame, reason);
        }
    }

    /// Puts a link header in front of a packet that came without one: through a tunnel, or in fragments.
    fn frame_for_kernel(&self, frame: &mut Frame, port: u16) -> bool {
        let Some(mac) = self.taps.mac(port) else {
            return false;
        };
        let ethertype: [u8; 2] = match frame.data().first() {
            Some(b) if b >> 4 == 6 => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        let Some(header) = frame.prepend_array::<ETHERNET>() else {
            return false;
        };
        let [a, b, c, d, e, f] = mac;
        header[..6].copy_from_slice(&mac);
        // The other end of the kernel's wire is another station.
        header[6..12].copy_from_slice(&[a | 2, b, c, d, e, f ^ 1]);
        header[12..].copy_from_slice(&ethertype);
        true
    }
}

/// Brings back the link header, without its tag: the kernel's interface is the VLAN's own.
fn unwrap(frame: &mut Frame, l2: usize) -> bool {
    frame.prepend(l2).is_some() && (l2 == ETHERNET || untag(frame))
}

/// Takes the tag out of a frame.
fn untag(frame: &mut Frame) -> bool {
    let Some(header) = frame
        .data_mut()
        .first_chunk_mut::<{ ETHERNET + VLAN_TAG }>()
    else {
        return false;
    };
    header.copy_within(..12, VLAN_TAG);
    frame.trim_front(VLAN_TAG)
}

/// The class of a packet for the kernel.
fn class_of(p: &Parsed) -> Punt {
    /// BGP, LDP.
    const TCP: [u16; 2] = [179, 646];
    /// RIP, RIPng, LDP, BFD (single hop, echo, multihop).
    const UDP: [u16; 6] = [520, 521, 646, 3784, 3785, 4784];
    let has = |list: &[u16]| list.contains(&p.sport) || list.contains(&p.dport);
    match (p.kind, p.proto) {
        (Kind::NotIp, _) => match p.ethertype() {
            Some(0x0806) => Punt::Neighbour,
            // LLC: IS-IS, spanning tree.
            Some(length) if length < 0x0600 => Punt::Routing,
            _ => Punt::Other,
        },
        (Kind::Ike | Kind::NatKeepalive, _) => Punt::Ike,
        // A first fragment, or an answer to a port of the peer's.
        (_, proto::UDP) if has(&[500, 4500]) => Punt::Ike,
        (_, proto::UDP) if has(&UDP) => Punt::Routing,
        (_, proto::TCP) if has(&TCP) => Punt::Routing,
        // IGMP, EIGRP, OSPF, PIM, VRRP.
        (_, 2 | 88 | 89 | 103 | 112) => Punt::Routing,
        (_, proto::ICMPV6) if is_discovery(p) => Punt::Neighbour,
        (_, proto::ICMP | proto::ICMPV6) => Punt::Icmp,
        _ => Punt::Other,
    }
}

/// Whether a packet is neighbour discovery that its receivers believe: nobody beyond the link can have sent it (RFC 4861
/// section 11.2). Like ARP it is the link's business, not the policies'.
pub(super) fn is_discovery(p: &Parsed) -> bool {
    let kind = p.icmp().map(|(kind, _)| kind);
    p.family == Family::V6
        && p.proto == proto::ICMPV6
        && p.ttl == 255
        && kind.is_some_and(|k| (v6::ROUTER_SOLICITATION..=v6::REDIRECT).contains(&k))
}

/// Whether a destination means somebody on the link: such packets are never forwarded.
#[cold]
#[inline(never)]
pub(super) fn is_link_scope(p: &Parsed) -> bool {
    match p.family {
        // 224.0.0.0/24, 255.255.255.255.
        Family::V4 => p.dst >> 8 == 0x00e0_0000 || p.dst == 0xffff_ffff,
        // fe80::/10, ff01::/16, ff02::/16 with any flags.
        Family::V6 => {
            p.dst >> 118 == 0x3fa || (p.dst >> 120 == 0xff && matches!(p.dst >> 112 & 15, 1 | 2))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::esp::testing::{Ip, parsed};

    fn class(proto: u8, upper: &[u8]) -> Punt {
        class_of(&parsed(&Ip::new(Family::V4).packet(proto, upper)))
    }

    #[test]
    fn protocols_are_told_apart() {
        let ports = |s: u16, d: u16| {
            let mut b = [s.to_be_bytes(), d.to_be_bytes(), [0, 8], [0, 0]].concat();
            b.resize(20, 0);
            b[12] = 0x50;
            b
        };
        let udp = |s, d| ports(s, d)[..8].to_vec();
        assert_eq!(class(17, &udp(40_000, 500)), Punt::Ike);
        assert_eq!(class(17, &udp(4500, 1234)), Punt::Ike);
        assert_eq!(class(17, &udp(49_152, 3784)), Punt::Routing);
        assert_eq!(class(6, &ports(179, 40_000)), Punt::Routing);
        assert_eq!(class(6, &ports(40_000, 22)), Punt::Other);
        assert_eq!(class(17, &udp(53, 53)), Punt::Other);
        assert_eq!(class(89, &[0; 24]), Punt::Routing);
        assert_eq!(class(112, &[0; 20]), Punt::Routing);
        assert_eq!(class(1, &[8, 0, 0, 0, 0, 0, 0, 0]), Punt::Icmp);
    }

    #[test]
    fn discovery_is_believed_from_the_link_only() {
        let p = |ttl: u8, kind: u8| {
            let mut ip = Ip::new(Family::V6);
            ip.ttl = ttl;
            parsed(&ip.packet(58, &[kind, 0, 0, 0, 0, 0, 0, 0]))
        };
        assert!(is_discovery(&p(255, 135)) && is_discovery(&p(255, 133)));
        assert!(!is_discovery(&p(254, 135)) && !is_discovery(&p(255, 128)));
        assert_eq!(class_of(&p(255, 136)), Punt::Neighbour);
        assert_eq!(class_of(&p(64, 136)), Punt::Icmp);
    }

    #[test]
    fn link_scope_ends_where_forwarding_begins() {
        let mut p = Parsed::NOTHING;
        let v4 = |a: [u8; 4]| u128::from(u32::from_be_bytes(a));
        for (dst, link) in [
            ([224, 0, 0, 5], true),
            ([224, 0, 1, 5], false),
            ([255, 255, 255, 255], true),
            ([10, 0, 0, 255], false),
        ] {
            p.dst = v4(dst);
            assert_eq!(is_link_scope(&p), link, "{dst:?}");
        }
        p.family = Family::V6;
        for (dst, link) in [
            ("fe80::1", true),
            ("febf::1", true),
            ("fec0::1", false),
            ("ff02::5", true),
            ("ff12::5", true),
            ("ff05::5", false),
            ("2001:db8::1", false),
        ] {
            p.dst = dst.parse::<std::net::Ipv6Addr>().unwrap().into();
            assert_eq!(is_link_scope(&p), link, "{dst}");
        }
    }
}
