//! Encapsulation, RFC 4303 section 3.3, up to the point where the packet is ready to be sealed.
//!
//! UDP encapsulation (RFC 3948): the checksum is zero over IPv4, as the RFC asks. Over IPv6 it is computed
//! after sealing ([`finish`]): RFC 6935 would allow zero, but hosts (Linux among them) drop such datagrams
//! unless told otherwise, so the peer's default decides.

use pmd::Frame;
use sa_store::drops::DropReason;
use sa_store::plan::{ESP_HEADER, ESP_TRAILER, IvKind, OutPlan, OuterShape};
use sa_store::sa::Mode;

use super::iv::CbcIvGen;
use crate::wire::ipv6::Ipv6;
use crate::wire::{Family, Frag, Parsed, checksum, decrement_ttl, ipv4, len16, proto};

/// 1, 2, 3, ..: the padding of RFC 4303 section 2.4.
pub(super) const PAD: [u8; 255] = {
    let mut p = [0u8; 255];
    let mut n = 0u8;
    while n < 255 {
        p[n as usize] = n + 1;
        n += 1;
    }
    p
};

/// What a worker keeps between packets for encapsulation.
#[derive(Debug)]
pub struct EncapState {
    ivs: CbcIvGen,
    ip_id: u16,
}

impl EncapState {
    /// `ip_id` is where the IDs of fragmentable outer packets start; different per worker.
    pub fn new(ivs: CbcIvGen, ip_id: u16) -> Self {
        Self { ivs, ip_id }
    }

    #[inline(always)]
    fn next_id(&mut self) -> u16 {
        self.ip_id = self.ip_id.wrapping_add(1);
        self.ip_id
    }
}

/// Whether the gateway forwards the packet (TTL counts down) or is its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// Came in by a port: the inner TTL is decremented, RFC 4301 section 5.1.2.1 note 2.
    Forwarded,
    /// Made here.
    Local,
}

/// What varies from packet to packet.
#[derive(Clone, Copy, Debug)]
pub struct EncapArgs {
    /// Sequence number, never used before under the key.
    pub seq: u64,
    /// Where the packet comes from.
    pub hop: Hop,
    /// Largest inner packet of the path, bytes: TFC padding stops there.
    pub inner_mtu: u16,
}

/// A packet ready to be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncapOk {
    /// Where the ESP header starts in the frame; the cipher job runs from here to the end.
    pub esp_off: u16,
    /// High half of the sequence number, for the cipher job.
    pub seq_hi: u32,
    /// Bytes that count for the SA's lifetime: the payload before encryption, without padding.
    pub payload: u16,
}

/// Builds the outer packet around the IP packet in `frame`, which `p` describes. Behind [`EncapOk::esp_off`]
/// everything but ciphertext and ICV is then in place.
///
/// The caller has checked the size against the path MTU and has answered expired packets.
///
/// # Errors
/// `NoRoom`, `TtlExpired`; in transport mode `FragmentPolicy` for a fragment (RFC 4303 section 3.3.4) and
/// `NotForUs` for IPv6 extension headers before UDP encapsulation. The frame's content is then unspecified.
#[inline]
pub fn encap(
    frame: &mut Frame,
    p: &Parsed,
    plan: &OutPlan,
    args: EncapArgs,
    state: &mut EncapState,
) -> Result<EncapOk, DropReason> {
    debug_assert_eq!(frame.len(), usize::from(p.l3_len));
    if args.hop == Hop::Forwarded {
        decrement_ttl(frame.data_mut(), p)?;
    }
    if plan.plain && usize::from(plan.tfc_to) <= frame.len() {
        return plain(frame, p, plan, args.seq, state);
    }
    match plan.mode {
        Mode::Tunnel => {
            let payload = p.l3_len;
            if usize::from(plan.tfc_to) > frame.len() {
                pad_traffic_flow(frame, plan, args.inner_mtu)?;
            }
            let inner = Inner {
                next_header: match p.family {
                    Family::V4 => proto::IPV4,
                    Family::V6 => proto::IPV6,
                },
                tos: p.tos,
                df: if p.df() { 0x40 } else { 0 },
            };
            tunnel(frame, inner, plan, args.seq, state, payload)
        }
        Mode::Transport => transport(frame, p, plan, args.seq, state),
    }
}

/// Fills the empty `frame` with a dummy packet of `len` payload bytes, RFC 4303 section 2.6.
///
/// # Errors
/// `NoRoom`.
pub fn dummy(
    frame: &mut Frame,
    len: usize,
    plan: &OutPlan,
    seq: u64,
    state: &mut EncapState,
) -> Result<EncapOk, DropReason> {
    frame.append(len).ok_or(DropReason::NoRoom)?.fill(0);
    let inner = Inner {
        next_header: proto::NO_NEXT,
        tos: 0,
        df: 0x40,
    };
    tunnel(frame, inner, plan, seq, state, len16(frame.len()))
}

/// What is left to do once the packet is sealed where the plan
/// [`needs_udp_checksum`](OutPlan::needs_udp_checksum).
pub fn finish(frame: &mut Frame, esp_off: u16) {
    udp_checksum(frame.data_mut(), usize::from(esp_off));
}

/// [`finish`] for a port that completes checksums: leaves the sum over the packet to it.
pub fn leave(frame: &mut Frame, esp_off: u16) {
    // Where a port expects it, see `pmd::checksum`.
    const ESP_OFF: u16 = pmd::checksum::IPV6_LEN + 8;
    match udp_pseudo_sum(frame.data_mut(), usize::from(esp_off)) {
        Some(_) if esp_off == ESP_OFF => frame.leave_checksum(),
        _ => finish(frame, esp_off),
    }
}

/// The largest inner packet like this one whose outer packet fits `outer_mtu`, exact also in transport mode.
pub fn inner_mtu(plan: &OutPlan, packet: &[u8], p: &Parsed, outer_mtu: u16) -> u16 {
    let header = match (plan.mode, p.family) {
        (Mode::Tunnel, _) => 0,
        (Mode::Transport, Family::V4) => usize::from(p.upper_off),
        (Mode::Transport, Family::V6) => Ipv6::new(packet)
            .and_then(|ip| ip.walk())
            .map_or(usize::from(p.upper_off), |w| w.esp_at),
    };
    plan.inner_mtu(outer_mtu, header)
}

/// What the outer header takes from the inner one.
#[derive(Clone, Copy)]
struct Inner {
    next_header: u8,
    tos: u8,
    df: u8,
}

#[cold]
#[inline(never)]
fn pad_traffic_flow(frame: &mut Frame, plan: &OutPlan, inner_mtu: u16) -> Result<(), DropReason> {
    let want = usize::from(plan.tfc_to.min(inner_mtu));
    if let Some(more) = want.checked_sub(frame.len()) {
        frame.append(more).ok_or(DropReason::NoRoom)?.fill(0);
    }
    Ok(())
}

/// [`tunnel`] for what most packets are: AEAD or counter mode in an IPv4 tunnel without UDP, see [`OutPlan::plain`].
/// Everything lies at fixed places and is written in whole words.
#[inline(always)]
fn plain(
    frame: &mut Frame,
    p: &Parsed,
    plan: &OutPlan,
    seq: u64,
    state: &mut EncapState,
) -> Result<EncapOk, DropReason> {
    const OUTER: usize = 20;
    const FRONT: usize = OUTER + ESP_HEADER + 8;
    let payload = frame.len();
    let pad = plan.pad_len(payload) & 3;
    let behind = pad + ESP_TRAILER + usize::from(plan.icv_len);
    if !frame.expand(36, len16(behind)) {
        return Err(DropReason::NoRoom);
    }
    let packet = frame.data_mut();
    let total = len16(packet.len());
    // 1, 2, 3, pad length, next header; what follows is the place of the ICV, which has 8 bytes at least.
    let next_header = match p.family {
        Family::V4 => proto::IPV4,
        Family::V6 => proto::IPV6,
    };
    let end = u64::from(next_header) << 8 | pad as u64;
    let trailer = 0x03_0201 & !(u64::MAX << (8 * pad)) | end << (8 * pad);
    let tail = packet.get_mut(FRONT + payload..);
    let Some(tail) = tail.and_then(|t| t.first_chunk_mut::<8>()) else {
        return Err(DropReason::NoRoom);
    };
    *tail = trailer.to_le_bytes();
    let Some(head) = packet.first_chunk_mut::<FRONT>() else {
        return Err(DropReason::NoRoom);
    };
    let tos = p.tos & plan.tos_mask | plan.tos_set;
    let df = if p.df() { plan.df_mask } else { 0 } | plan.df_set;
    let id = if df != 0 { 0 } else { state.next_id() };
    let sum = u64::from(plan.header_sum)
        + u64::from(tos)
        + u64::from(total)
        + u64::from(id)
        + (u64::from(df) << 8);
    let [t, u] = total.to_be_bytes();
    let [i, d] = id.to_be_bytes();
    let [c, k] = (!checksum::fold(sum)).to_be_bytes();
    let h = &plan.header;
    head[..8].copy_from_slice(&[h[0], tos, t, u, i, d, df, 0]);
    head[8..12].copy_from_slice(&[h[8], h[9], c, k]);
    head[12..20].copy_from_slice(&h[12..20]);
    let esp = u64::from(plan.spi) << 32 | seq & 0xffff_ffff;
    head[OUTER..OUTER + 8].copy_from_slice(&esp.to_be_bytes());
    head[OUTER + 8..].copy_from_slice(&seq.to_be_bytes());
    Ok(EncapOk {
        esp_off: 20,
        seq_hi: high(seq),
        payload: p.l3_len,
    })
}

#[inline(always)]
fn tunnel(
    frame: &mut Frame,
    inner: Inner,
    plan: &OutPlan,
    seq: u64,
    state: &mut EncapState,
    payload: u16,
) -> Result<EncapOk, DropReason> {
    let pad = plan.pad_len(frame.len());
    let behind = pad + ESP_TRAILER + usize::from(plan.icv_len);
    let front = usize::from(plan.head_len);
    if !frame.expand(u16::from(plan.head_len), len16(behind)) {
        return Err(DropReason::NoRoom);
    }
    let packet = frame.data_mut();
    let total = packet.len();
    let tail = packet.get_mut(total - behind..).ok_or(DropReason::NoRoom)?;
    write_trailer(tail, pad, inner.next_header);
    let esp_off = front - ESP_HEADER - plan.iv.len();
    let esp = packet.get_mut(esp_off..front).ok_or(DropReason::NoRoom)?;
    write_esp(esp, plan, seq, state).ok_or(DropReason::NoRoom)?;
    let tos = inner.tos & plan.tos_mask | plan.tos_set;
    write_outer(packet, plan, total, tos, inner.df, state).ok_or(DropReason::NoRoom)?;
    Ok(EncapOk {
        esp_off: len16(esp_off),
        seq_hi: high(seq),
        payload,
    })
}

#[inline(always)]
const fn high(seq: u64) -> u32 {
    (seq >> 32) as u32
}

/// Padding, pad length, next header, and room for the ICV.
#[inline(always)]
fn append_trailer(
    frame: &mut Frame,
    payload: usize,
    next_header: u8,
    plan: &OutPlan,
) -> Result<(), DropReason> {
    let pad = plan.pad_len(payload);
    let tail = frame
        .append(pad + ESP_TRAILER + usize::from(plan.icv_len))
        .ok_or(DropReason::NoRoom)?;
    write_trailer(tail, pad, next_header);
    Ok(())
}

#[inline(always)]
fn write_trailer(tail: &mut [u8], pad: usize, next_header: u8) {
    let mut at = 0;
    if let Some(four) = tail.first_chunk_mut::<4>() {
        // Up to three bytes are all that most suites need: no loop. The rest is overwritten below.
        *four = [1, 2, 3, 4];
        at = 4;
    }
    while at < pad {
        if let (Some(b), Some(v)) = (tail.get_mut(at), PAD.get(at)) {
            *b = *v;
        }
        at += 1;
    }
    if let Some([len, nh]) = tail.get_mut(pad..pad + ESP_TRAILER) {
        *len = pad.to_le_bytes()[0];
        *nh = next_header;
    }
}

/// SPI, sequence number, IV.
#[inline(always)]
fn write_esp(esp: &mut [u8], plan: &OutPlan, seq: u64, state: &mut EncapState) -> Option<()> {
    let (header, iv) = esp.split_first_chunk_mut::<ESP_HEADER>()?;
    *header = (u64::from(plan.spi) << 32 | seq & 0xffff_ffff).to_be_bytes();
    match plan.iv {
        IvKind::Counter => *iv.first_chunk_mut::<8>()? = seq.to_be_bytes(),
        IvKind::Random => *iv.first_chunk_mut::<16>()? = state.ivs.next_iv(),
        IvKind::None => {}
    }
    Some(())
}

#[inline(always)]
fn write_outer(
    packet: &mut [u8],
    plan: &OutPlan,
    total: usize,
    tos: u8,
    inner_df: u8,
    state: &mut EncapState,
) -> Option<()> {
    match plan.shape {
        OuterShape::V4 | OuterShape::V4Udp => {
            let h = packet.first_chunk_mut::<20>()?;
            *h = *plan.header.first_chunk::<20>()?;
            let df = inner_df & plan.df_mask | plan.df_set;
            // With DF the ID means nothing (RFC 6864 section 4.1).
            let id = if df != 0 { 0 } else { state.next_id() };
            let len = len16(total);
            let sum = u64::from(plan.header_sum)
                + u64::from(tos)
                + u64::from(len)
                + u64::from(id)
                + (u64::from(df) << 8);
            h[1] = tos;
            h[2..4].copy_from_slice(&len.to_be_bytes());
            h[4..6].copy_from_slice(&id.to_be_bytes());
            h[6] = df;
            h[10..12].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
            if plan.shape == OuterShape::V4Udp {
                write_udp(
                    packet.get_mut(20..28)?,
                    plan.header.get(20..28)?,
                    total - 20,
                )?;
            }
        }
        OuterShape::V6 | OuterShape::V6Udp => {
            let h = packet.first_chunk_mut::<40>()?;
            *h = *plan.header.first_chunk::<40>()?;
            h[0] |= tos >> 4;
            h[1] |= tos << 4;
            h[4..6].copy_from_slice(&len16(total - 40).to_be_bytes());
            if plan.shape == OuterShape::V6Udp {
                write_udp(
                    packet.get_mut(40..48)?,
                    plan.header.get(40..48)?,
                    total - 40,
                )?;
            }
        }
    }
    Some(())
}

#[inline(always)]
fn write_udp(udp: &mut [u8], template: &[u8], len: usize) -> Option<()> {
    let udp = udp.first_chunk_mut::<8>()?;
    *udp = *template.first_chunk::<8>()?;
    udp[4..6].copy_from_slice(&len16(len).to_be_bytes());
    Some(())
}

#[inline(never)]
fn transport(
    frame: &mut Frame,
    p: &Parsed,
    plan: &OutPlan,
    seq: u64,
    state: &mut EncapState,
) -> Result<EncapOk, DropReason> {
    if p.frag != Frag::No {
        return Err(DropReason::FragmentPolicy);
    }
    // Where ESP goes, and where the byte is that names what is there now.
    let (at, nh_at) = match p.family {
        Family::V4 => (usize::from(p.upper_off), 9),
        Family::V6 => {
            let w = Ipv6::new(frame.data())?.walk()?;
            (w.esp_at, w.esp_nh_at)
        }
    };
    let udp_len = plan.udp_len();
    if udp_len != 0 && p.family == Family::V6 && at != 40 {
        return Err(DropReason::NotForUs);
    }
    let payload = frame.len().checked_sub(at).ok_or(DropReason::IpMalformed)?;
    let next_header = *frame.data().get(nh_at).ok_or(DropReason::IpMalformed)?;
    append_trailer(frame, payload, next_header, plan)?;
    let gap = usize::from(plan.gap_len);
    frame.prepend(gap).ok_or(DropReason::NoRoom)?;
    let total = frame.len();
    let packet = frame.data_mut();
    packet.copy_within(gap..gap + at, 0);
    let (head, rest) = packet.split_at_mut_checked(at).ok_or(DropReason::NoRoom)?;
    let inserted = rest.get_mut(..gap).ok_or(DropReason::NoRoom)?;
    let (udp, esp) = inserted
        .split_at_mut_checked(udp_len)
        .ok_or(DropReason::NoRoom)?;
    write_esp(esp, plan, seq, state).ok_or(DropReason::NoRoom)?;
    if udp_len != 0 {
        let template_at = plan.shape.len() - 8;
        let template = plan.header.get(template_at..).ok_or(DropReason::NoRoom)?;
        write_udp(udp, template, total - at).ok_or(DropReason::NoRoom)?;
    }
    if let Some(b) = head.get_mut(nh_at) {
        *b = if udp_len == 0 { proto::ESP } else { proto::UDP };
    }
    set_length(head, p.family, total);
    Ok(EncapOk {
        esp_off: len16(at + udp_len),
        seq_hi: high(seq),
        payload: len16(payload),
    })
}

/// Sets the length field of a changed IP header and, for IPv4, its checksum.
pub(super) fn set_length(head: &mut [u8], family: Family, total: usize) {
    match family {
        Family::V4 => {
            if let Some(f) = head.get_mut(2..4) {
                f.copy_from_slice(&len16(total).to_be_bytes());
            }
            ipv4::fill_checksum_options(head);
        }
        Family::V6 => {
            if let Some(f) = head.get_mut(4..6) {
                f.copy_from_slice(&len16(total.saturating_sub(40)).to_be_bytes());
            }
        }
    }
}

#[inline(never)]
fn udp_checksum(packet: &mut [u8], esp_off: usize) {
    if udp_pseudo_sum(packet, esp_off).is_none() {
        return;
    }
    let Some(udp) = packet.get_mut(esp_off - 8..) else {
        return;
    };
    // The field holds the sum of the pseudo-header and is part of what is summed.
    let c = match checksum::checksum(0, udp) {
        0 => 0xffff,
        c => c,
    };
    if let Some(field) = udp.get_mut(6..8) {
        field.copy_from_slice(&c.to_be_bytes());
    }
}

/// Puts the sum of the pseudo-header (RFC 8200 section 8.1) into the checksum field of the UDP header in front of ESP; `None` when
/// there is no such packet.
#[inline]
fn udp_pseudo_sum(packet: &mut [u8], esp_off: usize) -> Option<()> {
    let (head, udp) = packet.split_at_mut_checked(esp_off.checked_sub(8)?)?;
    let len = u16::try_from(udp.len()).ok()?;
    // Source and destination are the last 32 bytes of the fixed header.
    let addresses = head.get(8..40)?;
    let pseudo = checksum::add(checksum::sum(addresses), u16::from(proto::UDP));
    let pseudo = checksum::add(pseudo, len);
    udp.get_mut(6..8)?.copy_from_slice(&pseudo.to_be_bytes());
    Some(())
}
