//! Decapsulation, RFC 4303 section 3.4: what is checked before the ICV, and what after.

use pmd::Frame;
use sa_store::drops::{Consumed, DropReason};
use sa_store::plan::{ESP_HEADER, ESP_TRAILER, InPlan};
use sa_store::sa::Mode;

use super::{ecn, encap};
use crate::wire::tcp;
use crate::wire::{
    Family, Kind, NattPorts, Parsed, checksum, ipv4, ipv6, len16, parse_ip, parse_ip_into, proto,
};

/// An inbound packet that may be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecapPre {
    /// Where the ESP header starts in the frame; the cipher job runs from here to the end.
    pub esp_off: u16,
    /// Low half of the sequence number.
    pub seq: u32,
}

/// What came out of an opened packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decapped {
    /// An inner packet: the frame's data is exactly it.
    Packet,
    /// To be given back and counted.
    Consumed(Consumed),
}

/// Checks what needs no key: encapsulation and lengths. `p` describes the IP packet in the frame; the memory
/// of the frame is not touched.
///
/// # Errors
/// `EncapMismatch`, `EspTooShort`.
#[inline]
pub fn pre(p: &Parsed, plan: &InPlan) -> Result<DecapPre, DropReason> {
    let seq = match (p.kind, plan.udp, p.esp()) {
        (Kind::Esp, false, Some((_, seq))) | (Kind::UdpEsp, true, Some((_, seq))) => seq,
        _ => return Err(DropReason::EncapMismatch),
    };
    let esp_off = p.esp_off();
    let len = usize::from(p.l3_len) - esp_off.min(usize::from(p.l3_len));
    let fixed = ESP_HEADER + usize::from(plan.iv_len) + usize::from(plan.icv_len);
    if len < usize::from(plan.min_len) || (len - fixed) & usize::from(plan.align_mask) != 0 {
        return Err(DropReason::EspTooShort);
    }
    Ok(DecapPre {
        esp_off: len16(esp_off),
        seq,
    })
}

/// Takes the ESP envelope off a packet that was opened successfully, and describes what is left in `inner`. `tos` is
/// the outer packet's, `esp_off` where its ESP header starts. The inner packet's TTL and addresses are as the peer sent
/// them: policy and forwarding come next.
///
/// # Errors
/// `BadPadding`, `BadNextHeader`, `InnerMalformed`, `EcnInvalid`. The frame's content is then unspecified.
#[inline(always)]
pub fn post(
    frame: &mut Frame,
    tos: u8,
    esp_off: u16,
    plan: &InPlan,
    natt: NattPorts,
    inner: &mut Parsed,
) -> Result<Decapped, DropReason> {
    let body = usize::from(esp_off) + ESP_HEADER + usize::from(plan.iv_len);
    let trailer = trailer(frame.data(), body, usize::from(plan.icv_len))?;
    unwrap(frame, tos, body, trailer, plan, natt, inner)
}

/// What an engine has left of a packet that it opened in packet mode.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Where the ESP header starts, which with the outer headers still stands in front; `None`: the inner packet alone.
    pub esp_off: Option<u16>,
    /// What the trailer said.
    pub next_header: u8,
}

/// As [`post`], for a packet whose padding, trailer and ICV an engine has checked and taken off.
///
/// # Errors
/// Those of [`post`].
#[cold]
#[inline(never)]
pub fn bare(
    frame: &mut Frame,
    tos: u8,
    bare: Bare,
    plan: &InPlan,
    natt: NattPorts,
    inner: &mut Parsed,
) -> Result<Decapped, DropReason> {
    let front = |off| usize::from(off) + ESP_HEADER + usize::from(plan.iv_len);
    let body = bare.esp_off.map_or(0, front);
    let payload_end = frame.len();
    if body > payload_end || (body == 0 && plan.mode == Mode::Transport) {
        return Err(DropReason::InnerMalformed);
    }
    let trailer = Trailer {
        next_header: bare.next_header,
        payload_end,
    };
    unwrap(frame, tos, body, trailer, plan, natt, inner)
}

/// Takes off what stands around the payload, which begins at `body`.
#[inline(always)]
fn unwrap(
    frame: &mut Frame,
    tos: u8,
    body: usize,
    trailer: Trailer,
    plan: &InPlan,
    natt: NattPorts,
    inner: &mut Parsed,
) -> Result<Decapped, DropReason> {
    if trailer.next_header == proto::NO_NEXT {
        return Ok(Decapped::Consumed(Consumed::Dummy));
    }
    let behind = frame.len() - trailer.payload_end;
    match plan.mode {
        Mode::Tunnel => {
            let family = match trailer.next_header {
                proto::IPV4 => Family::V4,
                proto::IPV6 => Family::V6,
                _ => return Err(DropReason::BadNextHeader),
            };
            if !frame.trim_back(behind) || !frame.trim_front(body) {
                return Err(DropReason::InnerMalformed);
            }
            describe(frame.data(), family, natt, inner)?;
            // Traffic-flow-confidentiality padding stands behind the inner packet.
            let extra = frame.len() - usize::from(inner.l3_len);
            if extra != 0 {
                frame.trim_back(extra);
            }
            if plan.ecn && tos & 3 != inner.tos & 3 {
                let tos = ecn::combine(inner.tos, tos)?;
                if tos != inner.tos {
                    set_tos(frame.data_mut(), family, tos);
                    inner.tos = tos;
                }
            }
        }
        Mode::Transport => {
            // The outer header is still there, as it came.
            let p = parse_ip(frame.data(), natt)?;
            if !frame.trim_back(behind) {
                return Err(DropReason::InnerMalformed);
            }
            transport(frame, &p, body, trailer.next_header, plan)?;
            describe(frame.data(), p.family, natt, inner)?;
        }
    }
    Ok(Decapped::Packet)
}

struct Trailer {
    next_header: u8,
    payload_end: usize,
}

#[inline(always)]
fn trailer(data: &[u8], body: usize, icv: usize) -> Result<Trailer, DropReason> {
    let end = data
        .len()
        .checked_sub(icv + ESP_TRAILER)
        .ok_or(DropReason::EspTooShort)?;
    let Some([pad_len, next_header]) = data.get(end..end + ESP_TRAILER) else {
        return Err(DropReason::EspTooShort);
    };
    let pad_len = usize::from(*pad_len);
    let payload_end = match end.checked_sub(pad_len) {
        Some(e) if e >= body => e,
        _ => return Err(DropReason::BadPadding),
    };
    // The bytes are authenticated, so the time that the comparison takes betrays nothing.
    let padding = data.get(payload_end..end).ok_or(DropReason::BadPadding)?;
    let right = if pad_len <= 16 {
        padding.iter().zip(1u8..).all(|(b, n)| *b == n)
    } else {
        encap::PAD.get(..pad_len) == Some(padding)
    };
    if !right {
        return Err(DropReason::BadPadding);
    }
    Ok(Trailer {
        next_header: *next_header,
        payload_end,
    })
}

#[inline(always)]
fn describe(
    packet: &[u8],
    family: Family,
    natt: NattPorts,
    inner: &mut Parsed,
) -> Result<(), DropReason> {
    parse_ip_into(packet, family, natt, inner).map_err(|_| DropReason::InnerMalformed)
}

#[inline(never)]
fn set_tos(packet: &mut [u8], family: Family, tos: u8) {
    match family {
        Family::V4 => {
            if let Some(h) = packet.first_chunk_mut() {
                ipv4::set_tos(h, tos);
            }
        }
        Family::V6 => {
            if let Some(h) = packet.first_chunk_mut() {
                ipv6::set_tos(h, tos);
            }
        }
    }
}

/// Closes the gap between IP header and payload and makes the header right again.
#[inline(never)]
fn transport(
    frame: &mut Frame,
    p: &Parsed,
    body: usize,
    next_header: u8,
    plan: &InPlan,
) -> Result<(), DropReason> {
    // Hop-by-hop, routing and fragment headers belong in front of ESP; 255 is reserved.
    if matches!(
        next_header,
        proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | 255
    ) {
        return Err(DropReason::BadNextHeader);
    }
    let head_len = usize::from(p.upper_off);
    let nh_at = match p.family {
        Family::V4 => 9,
        // Cut to the payload, the packet is shorter than its length field says: walk what is there.
        Family::V6 => {
            let (fixed, rest) = frame
                .data()
                .split_first_chunk::<40>()
                .ok_or(DropReason::IpMalformed)?;
            ipv6::Walk::new(fixed[6], rest)?.upper_nh_at
        }
    };
    let shift = body
        .checked_sub(head_len)
        .ok_or(DropReason::InnerMalformed)?;
    if frame.len() < body {
        return Err(DropReason::InnerMalformed);
    }
    frame.data_mut().copy_within(..head_len, shift);
    frame.trim_front(shift);
    let total = frame.len();
    let (head, payload) = frame
        .data_mut()
        .split_at_mut_checked(head_len)
        .ok_or(DropReason::InnerMalformed)?;
    if let Some(b) = head.get_mut(nh_at) {
        *b = next_header;
    }
    encap::set_length(head, p.family, total);
    if plan.fix_checksums {
        fix_checksum(p, next_header, payload);
    }
    Ok(())
}

/// RFC 3948 section 3.1.2: behind NAT the pseudo-header is not the one the sender summed. The payload is
/// authenticated, so its checksum may be made anew. A zero UDP checksum over IPv4 stays.
fn fix_checksum(p: &Parsed, next_header: u8, payload: &mut [u8]) {
    let Ok(len) = u16::try_from(payload.len()) else {
        return;
    };
    let at = match next_header {
        proto::TCP if payload.len() >= tcp::HEADER_LEN => tcp::CHECKSUM_AT,
        proto::UDP if payload.len() >= 8 => 6,
        _ => return,
    };
    let is_udp = next_header == proto::UDP;
    let Some(field) = payload.get_mut(at..at + 2) else {
        return;
    };
    if is_udp && p.family == Family::V4 && field == [0, 0] {
        return;
    }
    field.fill(0);
    let addresses = checksum::add(
        checksum::sum(&p.src.to_be_bytes()),
        checksum::sum(&p.dst.to_be_bytes()),
    );
    let pseudo = checksum::add(checksum::add(addresses, u16::from(next_header)), len);
    let c = match checksum::checksum(pseudo, payload) {
        0 if is_udp => 0xffff,
        c => c,
    };
    if let Some(field) = payload.get_mut(at..at + 2) {
        field.copy_from_slice(&c.to_be_bytes());
    }
}
