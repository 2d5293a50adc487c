//! Makes packets and knows what they must look like when they arrive.

use std::net::IpAddr;

use super::tunnels::{KINDS, Site};
use crate::wire::checksum;
use crate::wire::ipv4::fill_checksum;

/// Sizes of IP packets: the simple IMIX.
const IMIX: [usize; 12] = [64, 64, 576, 64, 64, 576, 64, 1420, 64, 576, 64, 576];
const ETHERNET: usize = 14;
const UDP: usize = 8;
/// Sequence number in front of the contents.
const STAMP: usize = 8;
const TTL: u8 = 64;
/// A gateway on each end lowers it, and so does forwarding.
const MOST_HOPS: u8 = 4;
const SPORT: u16 = 40_000;
const DPORT: u16 = 50_000;

/// Packets of one direction.
pub(super) struct Flows {
    from: Site,
    /// Next number, by tunnel.
    next: [u64; KINDS.len()],
    /// Highest number that arrived, by tunnel.
    seen: [u64; KINDS.len()],
    turn: usize,
    /// Frame that is made, and frame that would be right.
    scratch: Vec<u8>,
}

/// What is wrong with a packet that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Not one of ours.
    Strange,
    /// Not what was sent.
    Changed,
    /// Older than one that came before, or a copy of it.
    Order,
}

impl Flows {
    /// Traffic that `from` sends.
    pub(super) fn new(from: Site) -> Self {
        Self {
            from,
            next: [1; KINDS.len()],
            seen: [0; KINDS.len()],
            turn: 0,
            scratch: Vec::with_capacity(2048),
        }
    }

    /// The next frame: tunnels take turns, sizes follow the mix.
    pub(super) fn make(&mut self) -> &[u8] {
        let tunnel = self.turn;
        self.turn = (self.turn + 1) % KINDS.len();
        let seq = self.next[tunnel];
        self.next[tunnel] += 1;
        // Every tunnel goes through the whole mix, each from another place on.
        let place = usize::try_from(seq % IMIX.len() as u64).unwrap_or(0) + tunnel;
        build(
            &mut self.scratch,
            self.from,
            tunnel,
            seq,
            IMIX[place % IMIX.len()],
        );
        &self.scratch
    }

    /// Checks a frame that came out at the other end. Returns the length of the IP packet.
    pub(super) fn check(&mut self, frame: &[u8]) -> Result<usize, Wrong> {
        let ip = frame.get(ETHERNET..).ok_or(Wrong::Strange)?;
        let v6 = ip.first().is_some_and(|b| b >> 4 == 6);
        let header = if v6 { 40 } else { 20 };
        let stamp_at = header + UDP;
        let stamp = ip.get(stamp_at..stamp_at + STAMP).ok_or(Wrong::Strange)?;
        let seq = u64::from_be_bytes(stamp.try_into().map_err(|_| Wrong::Strange)?);
        let tunnel = tunnel_of(ip, v6)
            .filter(|t| KINDS.get(*t).is_some_and(|k| k.inner_v6 == v6))
            .ok_or(Wrong::Strange)?;
        build(&mut self.scratch, self.from, tunnel, seq, ip.len());
        let want = self.scratch.get(ETHERNET..).ok_or(Wrong::Strange)?;
        if !same(ip, want, v6) {
            return Err(Wrong::Changed);
        }
        if seq <= self.seen[tunnel] || seq >= self.next[tunnel] {
            return Err(Wrong::Order);
        }
        self.seen[tunnel] = seq;
        Ok(ip.len())
    }
}

/// Everything but TTL, and the checksum over it, must be as it was sent; that checksum must be right.
fn same(got: &[u8], want: &[u8], v6: bool) -> bool {
    let ttl_at = if v6 { 7 } else { 8 };
    let Some(ttl) = got.get(ttl_at) else {
        return false;
    };
    if got.len() != want.len() || *ttl > TTL || *ttl < TTL - MOST_HOPS {
        return false;
    }
    let skip = |i: usize| i == ttl_at || (!v6 && (i == 10 || i == 11));
    let (head_got, body_got) = got.split_at(20);
    let (head_want, body_want) = want.split_at(20);
    let heads = head_got
        .iter()
        .zip(head_want)
        .enumerate()
        .all(|(i, (a, b))| skip(i) || a == b);
    heads && body_got == body_want && (v6 || checksum::sum(head_got) == 0xffff)
}

fn tunnel_of(ip: &[u8], v6: bool) -> Option<usize> {
    // The networks of a tunnel carry its number: see `Site::host`. By chance at the same place in both families.
    // The second byte of an IPv4 source, the sixth of an IPv6 one: by chance the same place in both headers.
    let number = *ip.get(13)?;
    Some(usize::from(if v6 { number } else { number & 0x7f }))
}

fn build(out: &mut Vec<u8>, from: Site, tunnel: usize, seq: u64, size: usize) {
    let v6 = KINDS[tunnel].inner_v6;
    let (src, dst) = (from.host(tunnel, v6), from.other().host(tunnel, v6));
    let header = if v6 { 40 } else { 20 };
    let size = size.max(header + UDP + STAMP);
    out.clear();
    out.resize(ETHERNET + size, 0);
    let (ethernet, ip) = out.split_at_mut(ETHERNET);
    ethernet[..6].copy_from_slice(&[2, 0, 0, 0, 1, from.number()]);
    ethernet[6..12].copy_from_slice(&[2, 0, 0, 0, 2, from.number()]);
    ethernet[12..].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[0x08, 0x00] });
    let (head, udp) = ip.split_at_mut(header);
    let length = u16::try_from(udp.len()).unwrap_or(u16::MAX);
    let pseudo = match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let total = u16::try_from(size).unwrap_or(u16::MAX);
            head[0] = 0x45;
            head[2..4].copy_from_slice(&total.to_be_bytes());
            head[8] = TTL;
            head[9] = 17;
            head[12..16].copy_from_slice(&s.octets());
            head[16..20].copy_from_slice(&d.octets());
            if let Some(h) = head.first_chunk_mut::<20>() {
                fill_checksum(h);
            }
            checksum::pseudo_v4(s, d, 17, length)
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            head[0] = 0x60;
            head[4..6].copy_from_slice(&length.to_be_bytes());
            head[6] = 17;
            head[7] = TTL;
            head[8..24].copy_from_slice(&s.octets());
            head[24..40].copy_from_slice(&d.octets());
            checksum::pseudo_v6(s, d, 17, u32::from(length))
        }
        _ => return,
    };
    udp[..2].copy_from_slice(&SPORT.to_be_bytes());
    udp[2..4].copy_from_slice(&DPORT.to_be_bytes());
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    udp[UDP..UDP + STAMP].copy_from_slice(&seq.to_be_bytes());
    // Contents that depend on every bit of the stamp and differ from word to word.
    let mut x = seq ^ (u64::try_from(tunnel).unwrap_or(0) << 56) ^ 0x9e37_79b9_7f4a_7c15;
    for chunk in udp[UDP + STAMP..].chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let bytes = x.to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
    let sum = match checksum::checksum(pseudo, udp) {
        0 => 0xffff,
        s => s,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_checks_out_and_what_is_changed_does_not() {
        let mut flows = Flows::new(Site::A);
        for _ in 0..200 {
            let mut frame = flows.make().to_vec();
            let at = ETHERNET + 30.min(frame.len() - ETHERNET - 1);
            frame[at] ^= 1;
            assert!(flows.check(&frame).is_err());
            frame[at] ^= 1;
            assert_eq!(flows.check(&frame), Ok(frame.len() - ETHERNET));
            assert_eq!(flows.check(&frame), Err(Wrong::Order), "a copy");
        }
    }

    #[test]
    fn every_tunnel_meets_every_size() {
        let mut flows = Flows::new(Site::B);
        let mut met = std::collections::HashSet::new();
        for _ in 0..KINDS.len() * IMIX.len() * 4 {
            let tunnel = flows.turn;
            met.insert((tunnel, flows.make().len()));
        }
        assert_eq!(met.len(), KINDS.len() * 3);
    }
}
