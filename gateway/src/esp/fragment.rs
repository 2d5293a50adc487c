//! Fragmentation of outer packets after encryption, RFC 4303 section 3.3.4: IPv4 in flight where DF is
//! clear, IPv6 at its source, which the tunnel entry is.

use pmd::{Frame, Pool};
use sa_store::drops::DropReason;

use crate::wire::ipv4::{self, DF, Ipv4, MF};
use crate::wire::ipv6::{FRAGMENT_LEN, HEADER_LEN as V6_HEADER, Ipv6, MAX_EXT_HEADERS};
use crate::wire::{Family, be16, len16, proto};

/// Longest IPv4 header.
const MAX_V4_HEADER: usize = 60;
/// Longest unfragmentable part of a packet that the gateway fragments.
const MAX_V6_UNFRAGMENTABLE: usize = V6_HEADER + MAX_EXT_HEADERS * 64;

/// Splits the IP packet in `frame` into fragments of at most `mtu` bytes, appended to `out` in order; returns
/// how many. The first one stays in `frame`; the others are copied into frames of `pool`. A packet that
/// fits is passed through. `v6_id` becomes the identification of an IPv6 packet; an IPv4 packet has its own.
///
/// # Errors
/// The frame comes back, its packet unchanged, nothing appended: `TooBig` (DF set, already an IPv6 fragment, or
/// an MTU too small to split for), `PoolExhausted`, `NoRoom`, `IpMalformed`.
pub fn fragment(
    mut frame: Frame,
    mtu: usize,
    v6_id: u32,
    pool: &mut Pool,
    out: &mut Vec<Frame>,
) -> Result<usize, (Frame, DropReason)> {
    if frame.len() <= mtu {
        out.push(frame);
        return Ok(1);
    }
    let plan = match Plan::new(frame.data(), mtu) {
        Ok(plan) => plan,
        Err(e) => return Err((frame, e)),
    };
    if frame.headroom() < plan.inserted() {
        return Err((frame, DropReason::NoRoom));
    }
    // Later fragments first, while the whole packet still lies in `frame`; they end up behind it.
    let start = out.len();
    let mut later = 0;
    let mut at = plan.chunk;
    while at < plan.payload {
        let piece = plan.chunk.min(plan.payload - at);
        match plan.later(frame.data(), at, piece, v6_id, pool) {
            Ok(f) => out.push(f),
            Err(e) => {
                for f in out.drain(start..) {
                    pool.put(f);
                }
                return Err((frame, e));
            }
        }
        at += piece;
        later += 1;
    }
    plan.first(&mut frame, v6_id);
    out.insert(start, frame);
    Ok(later + 1)
}

struct Plan {
    family: Family,
    /// Header of the first fragment, without an IPv6 fragment header.
    header: usize,
    /// What is to be divided.
    payload: usize,
    /// Bytes of payload per fragment but the last, a multiple of 8.
    chunk: usize,
    /// IPv4: flags and offset of the packet itself.
    frag: u16,
    /// IPv6: what the fragment header names, and the byte that will name the fragment header.
    next_header: u8,
    next_header_at: usize,
}

impl Plan {
    fn new(packet: &[u8], mtu: usize) -> Result<Self, DropReason> {
        let plan = match packet {
            [v, ..] if v >> 4 == 4 => {
                let ip = Ipv4::new(packet)?;
                if ip.df() {
                    return Err(DropReason::TooBig);
                }
                Self {
                    family: Family::V4,
                    header: ip.header_len(),
                    payload: ip.payload().len(),
                    chunk: 0,
                    frag: packet.first_chunk::<20>().map_or(0, |h| be16(h, 6)),
                    next_header: 0,
                    next_header_at: 0,
                }
            }
            _ => {
                let ip = Ipv6::new(packet)?;
                let w = ip.walk()?;
                if w.fragment.is_some() || w.unfragmentable > MAX_V6_UNFRAGMENTABLE {
                    return Err(DropReason::TooBig);
                }
                Self {
                    family: Family::V6,
                    header: w.unfragmentable,
                    payload: ip.total_len() - w.unfragmentable,
                    chunk: 0,
                    frag: 0,
                    next_header: packet
                        .get(w.unfragmentable_nh_at)
                        .copied()
                        .ok_or(DropReason::IpMalformed)?,
                    next_header_at: w.unfragmentable_nh_at,
                }
            }
        };
        let chunk = mtu.saturating_sub(plan.header + plan.inserted()) & !7;
        if chunk == 0 {
            return Err(DropReason::TooBig);
        }
        Ok(Self { chunk, ..plan })
    }

    const fn inserted(&self) -> usize {
        match self.family {
            Family::V4 => 0,
            Family::V6 => FRAGMENT_LEN,
        }
    }

    /// A copy of `payload[at..at + piece]` under a header of its own.
    fn later(
        &self,
        packet: &[u8],
        at: usize,
        piece: usize,
        v6_id: u32,
        pool: &mut Pool,
    ) -> Result<Frame, DropReason> {
        let mut buf = [0u8; MAX_V6_UNFRAGMENTABLE + FRAGMENT_LEN];
        let whole = packet.get(..self.header).ok_or(DropReason::IpMalformed)?;
        let header = match self.family {
            Family::V4 => {
                let mut short = [0u8; MAX_V4_HEADER];
                let n = later_header(whole, &mut short).ok_or(DropReason::IpMalformed)?;
                buf[..MAX_V4_HEADER].copy_from_slice(&short);
                n
            }
            Family::V6 => {
                let head = buf.get_mut(..self.header).ok_or(DropReason::TooBig)?;
                head.copy_from_slice(whole);
                self.header + FRAGMENT_LEN
            }
        };
        let header = buf.get_mut(..header).ok_or(DropReason::TooBig)?;
        let more = at + piece < self.payload;
        self.stamp(header, at, piece, more, v6_id);
        let from = self.header + at;
        let data = packet
            .get(from..from + piece)
            .ok_or(DropReason::IpMalformed)?;
        let mut f = pool.get_spare().ok_or(DropReason::PoolExhausted)?;
        let written = f.append(header.len() + piece).and_then(|b| {
            let (h, d) = b.split_at_mut_checked(header.len())?;
            h.copy_from_slice(header);
            d.copy_from_slice(data);
            Some(())
        });
        if written.is_none() {
            pool.put(f);
            return Err(DropReason::NoRoom);
        }
        Ok(f)
    }

    /// Cuts the packet itself down to the first fragment. Room and lengths were checked.
    fn first(&self, frame: &mut Frame, v6_id: u32) {
        frame.trim_back(self.payload - self.chunk);
        if self.family == Family::V6 && frame.prepend(FRAGMENT_LEN).is_some() {
            frame
                .data_mut()
                .copy_within(FRAGMENT_LEN..FRAGMENT_LEN + self.header, 0);
        }
        let header = self.header + self.inserted();
        if let Some(h) = frame.data_mut().get_mut(..header) {
            self.stamp(h, 0, self.chunk, true, v6_id);
        }
    }

    /// Writes lengths, offset and flags into the header of one fragment.
    fn stamp(&self, header: &mut [u8], at: usize, piece: usize, more: bool, v6_id: u32) {
        let total = header.len() + piece;
        match self.family {
            Family::V4 => {
                // A fragment that is split again keeps its place and its own MF.
                let offset = (self.frag & 0x1fff) + len16(at / 8);
                let mf = if more { MF } else { self.frag & MF };
                if let Some(b) = header.get_mut(6..8) {
                    b.copy_from_slice(&((offset & 0x1fff) | mf | (self.frag & DF)).to_be_bytes());
                }
            }
            Family::V6 => {
                if let Some(b) = header.get_mut(self.next_header_at) {
                    *b = proto::FRAGMENT;
                }
                if let Some(f) = header.last_chunk_mut::<FRAGMENT_LEN>() {
                    let field = len16(at) | u16::from(more);
                    let ([o0, o1], [a, b, c, d]) = (field.to_be_bytes(), v6_id.to_be_bytes());
                    *f = [self.next_header, 0, o0, o1, a, b, c, d];
                }
            }
        }
        super::encap::set_length(header, self.family, total);
    }
}

/// The header of an IPv4 packet as later fragments carry it: only options with the copy flag, RFC 791
/// section 3.1. Returns its length.
fn later_header(whole: &[u8], out: &mut [u8; MAX_V4_HEADER]) -> Option<usize> {
    let (fixed, mut options) = whole.split_at_checked(ipv4::HEADER_LEN)?;
    out[..ipv4::HEADER_LEN].copy_from_slice(fixed);
    let mut n = ipv4::HEADER_LEN;
    while let [kind, rest @ ..] = options {
        let len = match (kind, rest) {
            (0, _) => break,
            (1, _) => 1,
            (_, [len, ..]) if *len >= 2 => usize::from(*len),
            _ => return None,
        };
        let (option, behind) = options.split_at_checked(len)?;
        if kind & 0x80 != 0 {
            out.get_mut(n..n + len)?.copy_from_slice(option);
            n += len;
        }
        options = behind;
    }
    let n = n.next_multiple_of(4);
    out[0] = 0x40 | (n / 4).to_le_bytes()[0];
    Some(n)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ip, frame, parsed, pool};
    use super::*;
    use crate::wire::Frag;

    fn split(packet: &[u8], mtu: usize) -> Result<Vec<Vec<u8>>, DropReason> {
        let (arena, mut pool) = pool(64, 10240);
        let f = frame(&mut pool, packet);
        let mut out = Vec::new();
        let r = fragment(f, mtu, 0xfeed_beef, &mut pool, &mut out);
        let bytes = out.iter().map(|f| f.data().to_vec()).collect::<Vec<_>>();
        out.drain(..).for_each(|f| pool.put(f));
        let r = match r {
            Ok(n) => {
                assert_eq!(n, bytes.len());
                Ok(bytes)
            }
            Err((f, e)) => {
                assert_eq!(f.data(), packet, "unchanged");
                pool.put(f);
                Err(e)
            }
        };
        drop(pool);
        assert_eq!(arena.outstanding(), 0);
        r
    }

    #[test]
    fn fragments_fit_the_mtu_and_carry_everything_in_order() {
        for family in [Family::V4, Family::V6] {
            let header = if family == Family::V4 { 20 } else { 40 };
            let packet = Ip::new(family).udp(4000);
            for mtu in [600, 1280, 1400, 1500, 4000] {
                let parts = split(&packet, mtu).unwrap();
                let mut payload = Vec::new();
                for (i, b) in parts.iter().enumerate() {
                    assert!(b.len() <= mtu);
                    let p = parsed(b);
                    let first = i == 0;
                    assert_eq!(p.frag, if first { Frag::First } else { Frag::Later });
                    assert_eq!(usize::from(p.l3_len), b.len());
                    payload.extend_from_slice(&b[usize::from(p.upper_off)..]);
                    if family == Family::V6 {
                        let f = Ipv6::new(b).unwrap().walk().unwrap().fragment.unwrap();
                        assert_eq!((f.id, f.more), (0xfeed_beef, i + 1 < parts.len()));
                    }
                }
                assert_eq!(payload, packet[header..]);
            }
            assert_eq!(split(&packet, packet.len()).unwrap(), [packet.as_slice()]);
        }
    }

    #[test]
    fn df_and_hopeless_mtus_are_too_big() {
        let mut ip = Ip::new(Family::V4);
        assert_eq!(split(&ip.udp(100), 27), Err(DropReason::TooBig));
        assert!(split(&ip.udp(100), 28).is_ok());
        ip.frag = DF;
        assert_eq!(split(&ip.udp(100), 60), Err(DropReason::TooBig));
        let v6 = Ip::new(Family::V6);
        assert_eq!(split(&v6.udp(100), 55), Err(DropReason::TooBig));
        let atomic = v6.packet(44, &[&[17, 0, 0, 0, 0, 0, 0, 1][..], &[0; 100]].concat());
        assert_eq!(split(&atomic, 100), Err(DropReason::TooBig));
    }

    #[test]
    fn a_fragment_split_again_keeps_its_place() {
        let mut ip = Ip::new(Family::V4);
        ip.frag = MF | 10;
        let parts = split(&ip.udp(200), 100).unwrap();
        let views: Vec<_> = parts.iter().map(|b| Ipv4::new(b).unwrap()).collect();
        assert!(views.iter().all(|v| v.mf() && v.checksum_ok()));
        assert_eq!(views[0].frag_offset(), 80);
        assert_eq!(views[1].frag_offset(), 160);
    }

    #[test]
    fn only_options_with_the_copy_flag_reach_later_fragments() {
        // Record route (7, not copied), then router alert (148, copied).
        let options = [7, 3, 4, 1, 148, 4, 0, 0];
        let mut b = Ip::new(Family::V4).packet(17, &[&options[..], &[0; 200]].concat());
        b[0] = 0x47;
        ipv4::fill_checksum_options(&mut b[..28]);
        let parts = split(&b, 100).unwrap();
        let first = Ipv4::new(&parts[0]).unwrap();
        let later = Ipv4::new(&parts[1]).unwrap();
        assert_eq!(first.options(), options);
        assert_eq!(later.options(), [148, 4, 0, 0]);
        assert!(first.checksum_ok() && later.checksum_ok());
    }

    #[test]
    fn an_empty_pool_leaves_the_packet_whole_and_loses_no_frame() {
        let (_arena, mut pool) = pool(3, 10240);
        let packet = Ip::new(Family::V4).udp(9000);
        let f = frame(&mut pool, &packet);
        let mut out = Vec::new();
        let (f, e) = fragment(f, 1500, 0, &mut pool, &mut out).unwrap_err();
        assert_eq!(e, DropReason::PoolExhausted);
        assert_eq!(f.data(), packet);
        assert!(out.is_empty());
        pool.put(f);
    }
}
