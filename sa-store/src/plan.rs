//! What the data path needs of an SA for every packet, worked out once when the SA is installed.
//!
//! A plan is read by every packet of its SA and never written, so it is kept within two cache lines.

use std::net::IpAddr;

use crate::sa::{Df, Dscp, Mode, SaSpec};
use crate::suite::{Cipher, Suite};

/// Largest outer header: IPv6 and UDP, bytes.
pub const MAX_OUTER: usize = 48;
/// SPI and sequence number, bytes.
pub const ESP_HEADER: usize = 8;
/// Pad length and next header, bytes.
pub const ESP_TRAILER: usize = 2;

/// Address family of the outer header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// How the IV of an outbound packet is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvKind {
    /// The suite has none.
    None,
    /// 8 bytes: the 64-bit sequence number, which a lease makes unique under the key.
    Counter,
    /// 16 unpredictable bytes, RFC 3602 section 3.
    Random,
}

impl IvKind {
    const fn of(suite: Suite) -> Self {
        match suite {
            Suite::CipherHmac(Cipher::Null, _) => Self::None,
            Suite::CipherHmac(Cipher::Cbc(_), _) => Self::Random,
            _ => Self::Counter,
        }
    }

    /// Length on the wire, bytes.
    pub const fn len(self) -> usize {
        match self {
            Self::None => 0,
            Self::Counter => 8,
            Self::Random => 16,
        }
    }

    /// Whether the suite has no IV.
    pub const fn is_empty(self) -> bool {
        matches!(self, Self::None)
    }
}

/// Which fixed-size header stands before ESP in tunnel mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterShape {
    /// IPv4, 20 bytes.
    V4,
    /// IPv4 and UDP, 28 bytes.
    V4Udp,
    /// IPv6, 40 bytes.
    V6,
    /// IPv6 and UDP, 48 bytes.
    V6Udp,
}

impl OuterShape {
    /// Header length, bytes.
    pub const fn len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V4Udp => 28,
            Self::V6 => 40,
            Self::V6Udp => 48,
        }
    }

    /// Never: there is always an IP header.
    pub const fn is_empty(self) -> bool {
        false
    }
}

/// Per-packet data of an outbound SA.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct OutPlan {
    /// SPI, host order.
    pub spi: u32,
    /// One's-complement sum of the IPv4 template, for the checksum.
    pub header_sum: u16,
    /// Inner packets shorter than this are padded to it (tunnel mode); 0 turns it off.
    pub tfc_to: u16,
    /// Configured path MTU of the outer packet, bytes; 0 is "that of the egress port".
    pub pmtu: u16,
    /// Bytes in front of the payload in tunnel mode: outer header, ESP header, IV.
    pub head_len: u8,
    /// Bytes inserted between IP header and payload in transport mode: UDP header, ESP header, IV.
    pub gap_len: u8,
    /// Length of the ICV, bytes.
    pub icv_len: u8,
    /// Payload + padding + 2 is a multiple of this + 1 (3 or 15).
    pub align_mask: u8,
    /// `outer TOS = inner TOS & tos_mask | tos_set`: DSCP copied or fixed, ECN by RFC 6040.
    pub tos_mask: u8,
    /// See `tos_mask`.
    pub tos_set: u8,
    /// Like `tos_mask` for the DF bit, in the high byte of the IPv4 fragment field.
    pub df_mask: u8,
    /// See `df_mask`.
    pub df_set: u8,
    /// IV.
    pub iv: IvKind,
    /// Mode.
    pub mode: Mode,
    /// Shape of `header`.
    pub shape: OuterShape,
    /// Clamp the MSS of TCP SYN segments.
    pub mss_clamp: bool,
    /// IPv4 tunnel without UDP, 8-byte counter IV, no alignment beyond RFC 4303's: what most SAs are.
    pub plain: bool,
    /// Outer IP header and UDP header as they are sent, with length, TOS, ID, DF and checksum zero. In
    /// transport mode only the UDP header, behind the place of the IP header, is used.
    pub header: [u8; MAX_OUTER],
}

// IPv4, also with UDP, is within the first line.
const _: () = assert!(size_of::<OutPlan>() <= 128 && std::mem::offset_of!(OutPlan, header) <= 36);

/// Per-packet data of an inbound SA.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct InPlan {
    /// SPI, host order.
    pub spi: u32,
    /// Least length from SPI to ICV, bytes.
    pub min_len: u16,
    /// Length of the IV, bytes.
    pub iv_len: u8,
    /// Length of the ICV, bytes.
    pub icv_len: u8,
    /// The ciphertext is a multiple of this + 1 (3 or 15).
    pub align_mask: u8,
    /// Mode.
    pub mode: Mode,
    /// Whether the SA's packets travel in UDP.
    pub udp: bool,
    /// Whether the outer ECN field is combined with the inner one (RFC 6040); else the inner is kept.
    pub ecn: bool,
    /// Whether TCP and UDP checksums must be made right again after NAT (RFC 3948 section 3.1.2).
    pub fix_checksums: bool,
    /// Clamp the MSS of TCP SYN segments.
    pub mss_clamp: bool,
    /// Family of the outer addresses.
    pub family: OuterFamily,
}

const _: () = assert!(size_of::<InPlan>() <= 64);

/// Suite lengths always fit a byte: at most 48.
const fn byte(n: usize) -> u8 {
    n.to_le_bytes()[0]
}

fn family(spec: &SaSpec) -> OuterFamily {
    match spec.dst {
        IpAddr::V4(_) => OuterFamily::V4,
        IpAddr::V6(_) => OuterFamily::V6,
    }
}

/// 20 bits out of the SPI. One label per SA keeps its packets on one path (the replay window's friend) and
/// tells nothing of the inner flows.
const fn flow_label(spi: u32) -> u32 {
    spi.wrapping_mul(0x9e37_79b1) >> 12
}

impl OutPlan {
    /// Works out the plan. `spec` holds addresses of one family (the SA file's check).
    pub fn new(spec: &SaSpec) -> Self {
        let iv = IvKind::of(spec.suite);
        let udp_len = if spec.encap.is_some() { 8 } else { 0 };
        let proto = if spec.encap.is_some() { 17 } else { 50 };
        let mut header = [0u8; MAX_OUTER];
        let ip_len = match (spec.src, spec.dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                header[0] = 0x45;
                header[8] = spec.ttl;
                header[9] = proto;
                header[12..16].copy_from_slice(&s.octets());
                header[16..20].copy_from_slice(&d.octets());
                20
            }
            (s, d) => {
                let v6 = |a| match a {
                    IpAddr::V4(a) => a.to_ipv6_mapped(),
                    IpAddr::V6(a) => a,
                };
                let first = 0x6000_0000 | flow_label(spec.spi.value());
                header[..4].copy_from_slice(&first.to_be_bytes());
                header[6] = proto;
                header[7] = spec.ttl;
                header[8..24].copy_from_slice(&v6(s).octets());
                header[24..40].copy_from_slice(&v6(d).octets());
                40
            }
        };
        if let Some(encap) = spec.encap {
            header[ip_len..ip_len + 2].copy_from_slice(&encap.sport.to_be_bytes());
            header[ip_len + 2..ip_len + 4].copy_from_slice(&encap.dport.to_be_bytes());
        }
        let shape = match (ip_len, udp_len) {
            (20, 0) => OuterShape::V4,
            (20, _) => OuterShape::V4Udp,
            (_, 0) => OuterShape::V6,
            _ => OuterShape::V6Udp,
        };
        let (dscp_mask, dscp_set) = match spec.dscp {
            Dscp::Copy => (0xfc, 0),
            Dscp::Fixed(v) => (0, (v & 0x3f) << 2),
        };
        let (df_mask, df_set) = match spec.df {
            Df::Copy => (0x40, 0),
            Df::Set => (0, 0x40),
            Df::Clear => (0, 0),
        };
        let gap = udp_len + ESP_HEADER + iv.len();
        Self {
            header,
            spi: spec.spi.value(),
            header_sum: ones_sum(&header[..20]),
            tfc_to: match spec.mode {
                Mode::Tunnel => spec.tfc.pad_to(),
                Mode::Transport => 0,
            },
            pmtu: spec.pmtu.unwrap_or(0),
            head_len: byte(ip_len + gap),
            gap_len: byte(gap),
            icv_len: byte(spec.suite.icv_len()),
            align_mask: byte(spec.suite.pad_align() - 1),
            tos_mask: dscp_mask | if spec.ecn { 3 } else { 0 },
            tos_set: dscp_set,
            df_mask,
            df_set,
            iv,
            mode: spec.mode,
            shape,
            mss_clamp: spec.mss_clamp,
            plain: spec.mode == Mode::Tunnel
                && shape == OuterShape::V4
                && iv == IvKind::Counter
                && spec.suite.pad_align() == 4,
        }
    }

    /// Padding that a payload of `len` bytes gets, 0 to 15.
    #[inline(always)]
    pub const fn pad_len(&self, len: usize) -> usize {
        (len + ESP_TRAILER).wrapping_neg() & self.align_mask as usize
    }

    /// Length of the UDP header, 0 or 8.
    #[inline(always)]
    pub const fn udp_len(&self) -> usize {
        match self.shape {
            OuterShape::V4Udp | OuterShape::V6Udp => 8,
            _ => 0,
        }
    }

    /// Family of the outer header.
    pub const fn family(&self) -> OuterFamily {
        match self.shape {
            OuterShape::V4 | OuterShape::V4Udp => OuterFamily::V4,
            _ => OuterFamily::V6,
        }
    }

    /// UDP over IPv6 needs its checksum, which covers the sealed packet.
    #[inline(always)]
    pub const fn needs_udp_checksum(&self) -> bool {
        matches!(self.shape, OuterShape::V6Udp)
    }

    /// Most bytes that a packet can grow by, for head- and tail-room: (in front, behind) without TFC.
    pub const fn worst_growth(&self) -> (usize, usize) {
        (
            self.head_len as usize,
            self.align_mask as usize + ESP_TRAILER + self.icv_len as usize,
        )
    }

    /// The MTU of outer packets: the SA's own where it is configured and smaller than the port's.
    #[inline]
    pub const fn outer_mtu(&self, port_mtu: u16) -> u16 {
        if self.pmtu != 0 && self.pmtu < port_mtu {
            self.pmtu
        } else {
            port_mtu
        }
    }

    /// Length of the outer packet that carries an inner packet of `len` bytes. In transport mode
    /// `ip_header` is the length of what stays in front of ESP; tunnel mode ignores it.
    #[inline]
    pub const fn outer_len(&self, len: usize, ip_header: usize) -> usize {
        let (front, payload) = match self.mode {
            Mode::Tunnel => (self.head_len as usize, len),
            Mode::Transport => (
                ip_header + self.gap_len as usize,
                len.saturating_sub(ip_header),
            ),
        };
        front + payload + self.pad_len(payload) + ESP_TRAILER + self.icv_len as usize
    }

    /// The largest inner packet whose outer packet fits `outer_mtu`, exact; 0 when none fits. `ip_header`
    /// as in [`outer_len`](Self::outer_len).
    #[inline]
    pub const fn inner_mtu(&self, outer_mtu: u16, ip_header: usize) -> u16 {
        let front = match self.mode {
            Mode::Tunnel => self.head_len as usize,
            Mode::Transport => ip_header + self.gap_len as usize,
        };
        let Some(room) = (outer_mtu as usize).checked_sub(front + self.icv_len as usize) else {
            return 0;
        };
        let room = room & !(self.align_mask as usize);
        let Some(payload) = room.checked_sub(ESP_TRAILER) else {
            return 0;
        };
        let len = match self.mode {
            Mode::Tunnel => payload,
            Mode::Transport => payload + ip_header,
        };
        // Not more than `outer_mtu`, hence 16 bits.
        let b = len.to_le_bytes();
        u16::from_le_bytes([b[0], b[1]])
    }
}

impl InPlan {
    /// Works out the plan.
    pub fn new(spec: &SaSpec) -> Self {
        let iv_len = spec.suite.iv_len();
        let icv_len = spec.suite.icv_len();
        let align = spec.suite.pad_align();
        Self {
            spi: spec.spi.value(),
            // The ciphertext holds the trailer at least, so one aligned unit.
            min_len: u16::from(byte(ESP_HEADER + iv_len + align + icv_len)),
            iv_len: byte(iv_len),
            icv_len: byte(icv_len),
            align_mask: byte(align - 1),
            mode: spec.mode,
            udp: spec.encap.is_some(),
            ecn: spec.ecn,
            fix_checksums: spec.encap.is_some() && spec.mode == Mode::Transport,
            mss_clamp: spec.mss_clamp,
            family: family(spec),
        }
    }
}

/// One's-complement sum of big-endian words of an even number of bytes.
fn ones_sum(bytes: &[u8]) -> u16 {
    bytes
        .chunks_exact(2)
        .map(|w| u16::from_be_bytes([w[0], w[1]]))
        .fold(0u16, |a, w| {
            let (s, carry) = a.overflowing_add(w);
            s + u16::from(carry)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sa::*;

    fn spec(suite: Suite, mode: Mode, v6: bool, udp: bool) -> SaSpec {
        let (src, dst) = if v6 {
            ("2001:db8::1", "2001:db8::2")
        } else {
            ("192.0.2.1", "192.0.2.2")
        };
        SaSpec {
            tunnel: "t".into(),
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            mode,
            encap: udp.then_some(UdpEncap {
                sport: 4500,
                dport: 4501,
            }),
            ..SaSpec::plain(
                "s",
                Direction::Out,
                Spi::new(0x1234_5678).unwrap(),
                suite,
                SaKeys {
                    enc: vec![0; suite.enc_key_len()].into(),
                    auth: vec![0; suite.auth_key_len()].into(),
                },
            )
        }
    }

    #[test]
    fn inner_mtu_is_exact_for_every_suite_mode_and_family() {
        for suite in Suite::all() {
            for mode in [Mode::Tunnel, Mode::Transport] {
                for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
                    let plan = OutPlan::new(&spec(suite, mode, v6, udp));
                    let ip = if v6 { 40 } else { 20 };
                    for mtu in [576u16, 1280, 1400, 1401, 1499, 1500, 9000, 65535] {
                        let inner = usize::from(plan.inner_mtu(mtu, ip));
                        assert!(inner > 400, "{suite} {mode:?} {mtu}");
                        assert!(plan.outer_len(inner, ip) <= usize::from(mtu));
                        assert!(plan.outer_len(inner + 1, ip) > usize::from(mtu));
                    }
                }
            }
        }
    }

    #[test]
    fn gcm_in_a_v4_tunnel_of_1500_carries_1446() {
        let suite = "aes-128-gcm-16".parse().unwrap();
        let plan = OutPlan::new(&spec(suite, Mode::Tunnel, false, false));
        // 1500 - 20 - 8 - 8 - 16 = 1448, already a multiple of 4, less the two trailer bytes.
        assert_eq!(plan.inner_mtu(1500, 20), 1446);
        assert_eq!(plan.inner_mtu(40, 20), 0);
        assert_eq!(plan.worst_growth(), (36, 21));
        assert_eq!(plan.outer_mtu(1500), 1500);
    }

    #[test]
    fn the_configured_path_mtu_can_only_lower_the_ports() {
        let mut s = spec(Suite::ChaCha20Poly1305, Mode::Tunnel, false, false);
        s.pmtu = Some(1400);
        let plan = OutPlan::new(&s);
        assert_eq!(plan.outer_mtu(1500), 1400);
        assert_eq!(plan.outer_mtu(1300), 1300);
    }

    #[test]
    fn templates_hold_addresses_ports_and_protocol() {
        let s = spec(Suite::ChaCha20Poly1305, Mode::Tunnel, false, true);
        let plan = OutPlan::new(&s);
        assert_eq!(plan.shape, OuterShape::V4Udp);
        assert_eq!(plan.header[9], 17);
        assert_eq!(plan.header[12..20], [192, 0, 2, 1, 192, 0, 2, 2]);
        assert_eq!(plan.header[20..24], [0x11, 0x94, 0x11, 0x95]);
        assert_eq!((plan.head_len, plan.gap_len), (44, 24));
        let s = spec(Suite::ChaCha20Poly1305, Mode::Tunnel, true, false);
        let plan = OutPlan::new(&s);
        assert_eq!(
            (plan.header[0], plan.header[6], plan.header[7]),
            (0x60, 50, 64)
        );
        assert_eq!(plan.header[23], 1);
        assert_eq!(plan.header[39], 2);
        assert_ne!(plan.header[1..4], [0, 0, 0], "flow label");
    }

    #[test]
    fn tos_and_df_rules_become_masks() {
        let mut s = spec(Suite::ChaCha20Poly1305, Mode::Tunnel, false, false);
        let plan = OutPlan::new(&s);
        assert_eq!((plan.tos_mask, plan.tos_set), (0xff, 0));
        assert_eq!((plan.df_mask, plan.df_set), (0x40, 0));
        s.dscp = Dscp::Fixed(46);
        s.ecn = false;
        s.df = Df::Set;
        let plan = OutPlan::new(&s);
        assert_eq!((plan.tos_mask, plan.tos_set), (0, 0xb8));
        assert_eq!((plan.df_mask, plan.df_set), (0, 0x40));
        s.df = Df::Clear;
        let plan = OutPlan::new(&s);
        assert_eq!((plan.df_mask, plan.df_set), (0, 0));
    }

    #[test]
    fn only_natt_transport_inbound_repairs_checksums() {
        let s = spec(Suite::ChaCha20Poly1305, Mode::Transport, false, true);
        assert!(InPlan::new(&s).fix_checksums);
        let s = spec(Suite::ChaCha20Poly1305, Mode::Tunnel, false, true);
        let plan = InPlan::new(&s);
        assert!(!plan.fix_checksums && plan.udp);
        assert_eq!((plan.min_len, plan.iv_len, plan.icv_len), (36, 8, 16));
    }
}
