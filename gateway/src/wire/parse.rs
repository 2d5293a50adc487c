//! The one pass over a received packet: lengths and header checksum verified, everything that look-ups and
//! the ESP core need gathered into a small `Copy` value, so that later stages do not touch the headers again.

mod parsed;

use sa_store::drops::DropReason;

use super::checksum::{self, sum20};
use super::esp::UdpPayload;
use super::ethernet::{HEADER_LEN as ETH_LEN, TYPE_IPV4, TYPE_IPV6, TYPE_VLAN, VLAN_LEN};
use super::ipv6::Walk;
use super::{be16, be32, ipv4, ipv6, len16, proto};
use parsed::{DF, ICMP_VISIBLE, L2_GROUP, PORTS_VISIBLE};
pub use parsed::{Family, Frag, Kind, NattPorts, Parsed};

/// Parses an Ethernet frame.
///
/// # Errors
/// `L2Malformed`, `IpMalformed`, `IpChecksum`, `FragmentInvalid`, `EspTooShort`. A packet whose ports the protocol has but the bytes lack is
/// malformed, which also refuses tiny first fragments (RFC 1858, RFC 7112).
#[inline]
pub fn parse(frame: &[u8], natt: NattPorts) -> Result<Parsed, DropReason> {
    let mut p = Parsed::NOTHING;
    parse_into(frame, natt, &mut p)?;
    Ok(p)
}

/// [`parse`] straight into the place where the description will stay: a copy of a value that was just
/// written field by field costs as much as making it.
///
/// # Errors
/// As [`parse`]; `out` is then unchanged.
#[inline]
pub fn parse_into(frame: &[u8], natt: NattPorts, out: &mut Parsed) -> Result<(), DropReason> {
    let Some((eth, l3)) = frame.split_first_chunk::<ETH_LEN>() else {
        return Err(DropReason::L2Malformed);
    };
    let group = (eth[0] & 1) * L2_GROUP;
    // Each arm stores for itself: merging the arms first would send the value through the stack.
    match be16(eth, 12) {
        TYPE_IPV4 => *out = parse_v4(l3, 14, 0, group, natt)?,
        TYPE_IPV6 => *out = parse_v6(l3, 14, 0, group, natt)?,
        TYPE_VLAN => *out = parse_tagged(l3, group, natt)?,
        ethertype => *out = not_ip(ethertype, 14, 0, group),
    }
    Ok(())
}

/// Parses from the IP header on: decrypted packets, TUN. [`Parsed::l2_len`] is 0.
///
/// # Errors
/// As [`parse`].
#[inline]
pub fn parse_ip(packet: &[u8], natt: NattPorts) -> Result<Parsed, DropReason> {
    match packet {
        [v, ..] if v >> 4 == 4 => parse_v4(packet, 0, 0, 0, natt),
        [v, ..] if v >> 4 == 6 => parse_v6(packet, 0, 0, 0, natt),
        _ => Err(DropReason::IpMalformed),
    }
}

/// [`parse_ip`] for a packet whose family is known from elsewhere (an ESP next-header field) and must agree.
///
/// # Errors
/// As [`parse`].
#[inline]
pub fn parse_ip_at(packet: &[u8], family: Family, natt: NattPorts) -> Result<Parsed, DropReason> {
    match family {
        Family::V4 => parse_v4(packet, 0, 0, 0, natt),
        Family::V6 => parse_v6(packet, 0, 0, 0, natt),
    }
}

/// [`parse_ip_at`] straight into the place where the description will stay, see [`parse_into`].
///
/// # Errors
/// As [`parse`]; `out` is then unchanged.
#[inline(always)]
pub fn parse_ip_into(
    packet: &[u8],
    family: Family,
    natt: NattPorts,
    out: &mut Parsed,
) -> Result<(), DropReason> {
    match family {
        Family::V4 => *out = parse_v4(packet, 0, 0, 0, natt)?,
        Family::V6 => *out = parse_v6(packet, 0, 0, 0, natt)?,
    }
    Ok(())
}

/// Takes one from TTL or hop limit of a packet that starts with its IP header, with incremental checksum.
///
/// # Errors
/// `TtlExpired` when it is 0 or 1, the packet unchanged: the caller may answer with an ICMP error.
#[inline]
pub fn decrement_ttl(packet: &mut [u8], p: &Parsed) -> Result<(), DropReason> {
    if p.ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    match p.family {
        Family::V4 => match packet.first_chunk_mut::<20>() {
            Some(h) => ipv4::decrement_ttl(h),
            None => return Err(DropReason::IpMalformed),
        },
        Family::V6 => match packet.get_mut(7) {
            Some(b) => *b = b.wrapping_sub(1),
            None => return Err(DropReason::IpMalformed),
        },
    }
    Ok(())
}

#[cold]
fn not_ip(ethertype: u16, l2_len: u8, vlan: u16, group: u8) -> Parsed {
    Parsed {
        sport: ethertype,
        l2_len,
        vlan,
        flags: group,
        ..Parsed::NOTHING
    }
}

#[inline(never)]
fn parse_tagged(behind_eth: &[u8], group: u8, natt: NattPorts) -> Result<Parsed, DropReason> {
    let Some((tag, l3)) = behind_eth.split_first_chunk::<VLAN_LEN>() else {
        return Err(DropReason::L2Malformed);
    };
    let vlan = be16(tag, 0) & 0x0fff;
    match be16(tag, 2) {
        TYPE_IPV4 => parse_v4(l3, 18, vlan, group, natt),
        TYPE_IPV6 => parse_v6(l3, 18, vlan, group, natt),
        ethertype => Ok(not_ip(ethertype, 18, vlan, group)),
    }
}

#[inline(always)]
fn parse_v4(
    l3: &[u8],
    l2_len: u8,
    vlan: u16,
    group: u8,
    natt: NattPorts,
) -> Result<Parsed, DropReason> {
    let Some(h) = l3.first_chunk::<20>() else {
        return Err(DropReason::IpMalformed);
    };
    let (header_len, sum) = if h[0] == 0x45 {
        (20, sum20(h))
    } else {
        with_options(h, l3)?
    };
    if sum != 0xffff {
        return Err(DropReason::IpChecksum);
    }
    let l3_len = be16(h, 2);
    let Some(upper) = l3.get(header_len..usize::from(l3_len)) else {
        return Err(DropReason::IpMalformed);
    };
    let field = be16(h, 6);
    let frag = if field & (ipv4::MF | 0x1fff) == 0 {
        Frag::No
    } else {
        v4_fragment(field, upper.len())?
    };
    let up = Upper::read(h[9], frag, upper, natt)?;
    // Built once, from values in registers: a copy of what was just written in pieces would stall.
    Ok(Parsed {
        src: u128::from(be32(h, 12)),
        dst: u128::from(be32(h, 16)),
        spi: up.spi,
        seq: up.seq,
        sport: up.sport,
        dport: up.dport,
        vlan,
        l3_len,
        upper_off: len16(header_len),
        l2_len,
        proto: h[9],
        ttl: h[8],
        tos: h[1],
        family: Family::V4,
        frag,
        kind: up.kind,
        flags: up.flags | group | (u8::from(field & ipv4::DF != 0) * DF),
    })
}

/// Header length and sum of a header that is not the usual 20 bytes.
#[cold]
#[inline(never)]
fn with_options(h: &[u8; 20], l3: &[u8]) -> Result<(usize, u16), DropReason> {
    let len = usize::from(h[0] & 15) * 4;
    if h[0] >> 4 != 4 || len < 20 {
        return Err(DropReason::IpMalformed);
    }
    let header = l3.get(..len).ok_or(DropReason::IpMalformed)?;
    Ok((len, checksum::sum(header)))
}

#[cold]
#[inline(never)]
fn v4_fragment(field: u16, payload: usize) -> Result<Frag, DropReason> {
    let offset = usize::from(field & 0x1fff) * 8;
    let more = field & ipv4::MF != 0;
    if payload == 0 || (more && !payload.is_multiple_of(8)) || offset + payload > 65535 - 20 {
        return Err(DropReason::FragmentInvalid);
    }
    Ok(if offset == 0 {
        Frag::First
    } else {
        Frag::Later
    })
}

#[inline(always)]
fn parse_v6(
    l3: &[u8],
    l2_len: u8,
    vlan: u16,
    group: u8,
    natt: NattPorts,
) -> Result<Parsed, DropReason> {
    let Some((h, rest)) = l3.split_first_chunk::<40>() else {
        return Err(DropReason::IpMalformed);
    };
    let len = usize::from(be16(h, 4));
    // Jumbograms and what cannot be counted in 16 bits are not supported.
    if h[0] >> 4 != 6 || len > 65535 - 40 {
        return Err(DropReason::IpMalformed);
    }
    let Some(payload) = rest.get(..len) else {
        return Err(DropReason::IpMalformed);
    };
    let (proto, upper_off, frag, upper) = match h[6] {
        proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | proto::AH | proto::DEST_OPTS => {
            walk(h[6], payload)?
        }
        p => (p, 40, Frag::No, payload),
    };
    let up = Upper::read(proto, frag, upper, natt)?;
    Ok(Parsed {
        src: be128(h, 8),
        dst: be128(h, 24),
        spi: up.spi,
        seq: up.seq,
        sport: up.sport,
        dport: up.dport,
        vlan,
        l3_len: len16(40 + len),
        upper_off,
        l2_len,
        proto,
        ttl: h[7],
        tos: ipv6::tos(h),
        family: Family::V6,
        frag,
        kind: up.kind,
        flags: up.flags | group | DF,
    })
}

#[inline(always)]
fn be128(h: &[u8; 40], at: usize) -> u128 {
    let half = |i: usize| u128::from(be32(h, i)) << 32 | u128::from(be32(h, i + 4));
    half(at) << 64 | half(at + 8)
}

#[cold]
#[inline(never)]
fn walk(next: u8, payload: &[u8]) -> Result<(u8, u16, Frag, &[u8]), DropReason> {
    let w = Walk::new(next, payload)?;
    let upper = payload
        .get(w.upper_at - ipv6::HEADER_LEN..)
        .ok_or(DropReason::IpMalformed)?;
    let frag = match w.fragment {
        None => Frag::No,
        Some(f) if f.is_atomic() => Frag::No,
        Some(f) => {
            let behind = payload.len() + ipv6::HEADER_LEN - f.at - ipv6::FRAGMENT_LEN;
            if behind == 0 || (f.more && !behind.is_multiple_of(8)) || f.offset + behind > 65535 {
                return Err(DropReason::FragmentInvalid);
            }
            if f.offset == 0 {
                Frag::First
            } else {
                Frag::Later
            }
        }
    };
    Ok((w.proto, len16(w.upper_at), frag, upper))
}

/// What depends on the upper layer.
#[derive(Clone, Copy)]
struct Upper {
    kind: Kind,
    spi: u32,
    seq: u32,
    sport: u16,
    dport: u16,
    flags: u8,
}

impl Upper {
    const OPAQUE: Self = Self {
        kind: Kind::Ip,
        spi: 0,
        seq: 0,
        sport: 0,
        dport: 0,
        flags: 0,
    };

    #[inline(always)]
    fn read(proto: u8, frag: Frag, upper: &[u8], natt: NattPorts) -> Result<Self, DropReason> {
        if frag == Frag::Later {
            return Ok(Self::OPAQUE);
        }
        let Some(u) = upper.first_chunk::<8>() else {
            return Self::read_short(proto, upper);
        };
        let ports = Self {
            sport: be16(u, 0),
            dport: be16(u, 2),
            flags: PORTS_VISIBLE,
            ..Self::OPAQUE
        };
        Ok(match proto {
            proto::ESP if frag == Frag::No => Self {
                kind: Kind::Esp,
                spi: be32(u, 0),
                seq: be32(u, 4),
                ..Self::OPAQUE
            },
            proto::UDP => {
                let special = natt.contains(ports.dport) || ports.dport == 500;
                if special && frag == Frag::No {
                    let (kind, spi, seq) = udp_kind(ports.dport, upper);
                    Self {
                        kind,
                        spi,
                        seq,
                        ..ports
                    }
                } else {
                    ports
                }
            }
            proto::ICMP | proto::ICMPV6 => Self {
                sport: u16::from(u[0]),
                dport: u16::from(u[1]),
                flags: ICMP_VISIBLE,
                ..Self::OPAQUE
            },
            other if proto::has_ports(other) => ports,
            _ => Self::OPAQUE,
        })
    }

    #[cold]
    #[inline(never)]
    fn read_short(proto: u8, upper: &[u8]) -> Result<Self, DropReason> {
        match proto {
            // Eight bytes are the whole header of UDP and the least an ICMP or ESP packet can be.
            proto::ESP => Err(DropReason::EspTooShort),
            proto::UDP | proto::ICMP | proto::ICMPV6 => Err(DropReason::IpMalformed),
            other if proto::has_ports(other) => {
                let b = upper.first_chunk::<4>().ok_or(DropReason::IpMalformed)?;
                Ok(Self {
                    sport: be16(b, 0),
                    dport: be16(b, 2),
                    flags: PORTS_VISIBLE,
                    ..Self::OPAQUE
                })
            }
            _ => Ok(Self::OPAQUE),
        }
    }
}

/// Kind, SPI and sequence number. A datagram whose UDP length disagrees with IP is left to the policy: only
/// its receiver may judge it.
#[inline(always)]
fn udp_kind(dport: u16, upper: &[u8]) -> (Kind, u32, u32) {
    let ip = (Kind::Ip, 0, 0);
    let Some((udp, payload)) = upper.split_first_chunk::<8>() else {
        return ip;
    };
    if usize::from(be16(udp, 4)) != upper.len() {
        return ip;
    }
    if dport == 500 {
        return (Kind::Ike, 0, 0);
    }
    match UdpPayload::classify(payload) {
        UdpPayload::Keepalive => (Kind::NatKeepalive, 0, 0),
        UdpPayload::Ike(_) => (Kind::Ike, 0, 0),
        UdpPayload::Esp(esp) => match esp.first_chunk::<8>() {
            Some(h) => (Kind::UdpEsp, be32(h, 0), be32(h, 4)),
            None => ip,
        },
        UdpPayload::Malformed => ip,
    }
}

#[cfg(test)]
mod tests;
