//! The packet that an ICMP error quotes: cut anywhere behind its IP header, so no length in it can be held against what
//! is there. Reads what look-ups need, as far as it is there.

use sa_store::flow::L4;

use super::icmp::{self, v4, v6};
use super::{Family, Frag, Parsed, be16, be32, checksum, proto};

/// IPv6 extension headers that are followed.
const MOST_HEADERS: usize = 8;

/// What is known of a quoted packet. Addresses as in [`Parsed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Address family.
    pub family: Family,
    /// Source.
    pub src: u128,
    /// Destination.
    pub dst: u128,
    /// Upper-layer protocol.
    pub proto: u8,
    /// Upper-layer selectors of the packet as it was.
    pub l4: L4,
    /// SPI and low half of the sequence number, plain or in UDP.
    pub esp: Option<(u32, u32)>,
}

/// An ICMP error with what it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotingError {
    /// The quoted packet.
    pub quoted: Quoted,
    /// Of "fragmentation needed" and "packet too big": the largest packet that fits, bytes; 0 when its sender does not say.
    pub too_big: Option<u16>,
}

impl QuotingError {
    /// Reads an ICMP error that is whole; `p` describes `packet`, which begins with its IP header.
    pub fn read(packet: &[u8], p: &Parsed) -> Option<Self> {
        let (kind, code) = p.icmp().filter(|_| p.frag == Frag::No)?;
        let message = packet.get(usize::from(p.upper_off)..usize::from(p.l3_len))?;
        let (head, quoted) = message.split_first_chunk::<{ icmp::HEADER_LEN }>()?;
        let too_big = match (p.family, p.proto) {
            (Family::V4, proto::ICMP) if v4::is_error(kind) => {
                ((kind, code) == (v4::UNREACHABLE, v4::FRAG_NEEDED)).then(|| be16(head, 6))
            }
            (Family::V6, proto::ICMPV6) if kind < 128 => {
                (kind == v6::TOO_BIG).then(|| u16::try_from(be32(head, 4)).unwrap_or(u16::MAX))
            }
            _ => return None,
        };
        let quoted = Quoted::read(quoted).filter(|q| q.family == p.family)?;
        Some(Self { quoted, too_big })
    }

    /// Whether the message's checksum is right.
    pub fn checksum_ok(packet: &[u8], p: &Parsed) -> bool {
        let message = packet.get(usize::from(p.upper_off)..usize::from(p.l3_len));
        let Some(message) = message else { return false };
        let pseudo = match p.family {
            Family::V4 => 0,
            Family::V6 => {
                let len = u32::from(p.l3_len - p.upper_off);
                checksum::pseudo_v6(p.src.into(), p.dst.into(), proto::ICMPV6, len)
            }
        };
        checksum::checksum(pseudo, message) == 0
    }
}

impl Quoted {
    fn read(packet: &[u8]) -> Option<Self> {
        let (mut quoted, upper) = match packet.first()? >> 4 {
            4 => Self::read_v4(packet)?,
            6 => Self::read_v6(packet)?,
            _ => return None,
        };
        if quoted.l4 == L4::Fragment {
            return Some(quoted);
        }
        let word = upper.first_chunk::<4>();
        match quoted.proto {
            proto::ICMP | proto::ICMPV6 => {
                let [kind, code, ..] = *word?;
                quoted.l4 = L4::Icmp { kind, code };
            }
            proto::ESP => quoted.esp = esp(upper),
            other if proto::has_ports(other) => {
                let word = word?;
                let (src, dst) = (be16(word, 0), be16(word, 2));
                quoted.l4 = L4::Ports { src, dst };
                if other == proto::UDP {
                    quoted.esp = upper.get(8..).and_then(esp).filter(|(spi, _)| *spi != 0);
                }
            }
            _ => {}
        }
        Some(quoted)
    }

    fn read_v4(packet: &[u8]) -> Option<(Self, &[u8])> {
        let h = packet.first_chunk::<20>()?;
        let len = usize::from(h[0] & 15) * 4;
        let upper = packet.get(len.max(20)..)?;
        let later = be16(h, 6) & 0x1fff != 0;
        Some((
            Self {
                family: Family::V4,
                src: u128::from(be32(h, 12)),
                dst: u128::from(be32(h, 16)),
                proto: h[9],
                l4: if later { L4::Fragment } else { L4::None },
                esp: None,
            },
            upper,
        ))
    }

    fn read_v6(packet: &[u8]) -> Option<(Self, &[u8])> {
        let (h, mut rest) = packet.split_first_chunk::<40>()?;
        let address = |at: usize| h.get(at..at + 16)?.try_into().ok().map(u128::from_be_bytes);
        let mut quoted = Self {
            family: Family::V6,
            src: address(8)?,
            dst: address(24)?,
            proto: h[6],
            l4: L4::None,
            esp: None,
        };
        for _ in 0..MOST_HEADERS {
            let len = match quoted.proto {
                proto::HOP_BY_HOP | proto::ROUTING | proto::DEST_OPTS => {
                    8 * (usize::from(*rest.get(1)?) + 1)
                }
                proto::FRAGMENT => {
                    if be16(rest.first_chunk::<4>()?, 2) & 0xfff8 != 0 {
                        quoted.l4 = L4::Fragment;
                    }
                    8
                }
                _ => return Some((quoted, rest)),
            };
            quoted.proto = *rest.first()?;
            rest = rest.get(len..)?;
            if quoted.l4 == L4::Fragment {
                return Some((quoted, rest));
            }
        }
        None
    }

    /// Selectors of the packets that answer it.
    pub fn answered(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            l4: match self.l4 {
                L4::Ports { src, dst } => L4::Ports { src: dst, dst: src },
                L4::Icmp { kind, code } => L4::Icmp {
                    kind: echo(self.family, kind),
                    code,
                },
                other => other,
            },
            ..*self
        }
    }
}

/// The type of ICMP that answers a type: replies answer requests, and requests cause replies.
fn echo(family: Family, kind: u8) -> u8 {
    match (family, kind) {
        (Family::V4, v4::ECHO) => v4::ECHO_REPLY,
        (Family::V4, v4::ECHO_REPLY) => v4::ECHO,
        (Family::V6, 128 | 129) => kind ^ 1,
        (_, other) => other,
    }
}

fn esp(bytes: &[u8]) -> Option<(u32, u32)> {
    let h = bytes.first_chunk::<8>()?;
    Some((be32(h, 0), be32(h, 4)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::esp::testing::{Ip, parsed};

    fn error_v4(quoted: &[u8], code: u8, mtu: u16) -> Vec<u8> {
        let mut message = vec![3, code, 0, 0, 0, 0];
        message.extend(mtu.to_be_bytes());
        message.extend(quoted);
        let sum = checksum::checksum(0, &message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        Ip::new(Family::V4).packet(proto::ICMP, &message)
    }

    #[test]
    fn an_esp_packet_is_known_by_its_first_eight_bytes() {
        let esp = Ip::new(Family::V4).packet(proto::ESP, &[0, 0, 0x10, 1, 0, 0, 0, 7, 1, 2, 3]);
        let packet = error_v4(&esp[..28], 4, 1400);
        let p = parsed(&packet);
        let e = QuotingError::read(&packet, &p).unwrap();
        assert_eq!((e.too_big, e.quoted.esp), (Some(1400), Some((0x1001, 7))));
        assert!(QuotingError::checksum_ok(&packet, &p));
        let mut wrong = packet.clone();
        wrong[30] ^= 1;
        assert!(!QuotingError::checksum_ok(&wrong, &p));
        let packet = error_v4(&esp[..27], 4, 1400);
        let e = QuotingError::read(&packet, &parsed(&packet)).unwrap();
        assert_eq!(e.quoted.esp, None);
    }

    #[test]
    fn what_answers_a_quoted_packet_has_its_selectors_swapped() {
        let packet = error_v4(&Ip::new(Family::V4).udp(20)[..28], 1, 0);
        let e = QuotingError::read(&packet, &parsed(&packet)).unwrap();
        assert_eq!(e.too_big, None);
        let (q, a) = (e.quoted, e.quoted.answered());
        assert_eq!((q.src, q.dst), (a.dst, a.src));
        let (L4::Ports { src, dst }, L4::Ports { src: s, dst: d }) = (q.l4, a.l4) else {
            panic!("{q:?}");
        };
        assert_eq!((src, dst), (d, s));
        assert_eq!(a.answered(), q);
        assert_eq!(echo(Family::V6, 129), 128);
        assert_eq!(echo(Family::V4, 8), 0);
    }

    #[test]
    fn extension_headers_are_followed_and_fragments_show_no_ports() {
        let mut inner = Ip::new(Family::V6).udp(20);
        // A fragment header in front of UDP, offset 8.
        inner[6] = proto::FRAGMENT;
        let udp = inner.split_off(40);
        inner.extend([proto::UDP, 0, 0, 8, 0, 0, 0, 1]);
        inner.extend(&udp);
        let q = Quoted::read(&inner).unwrap();
        assert_eq!((q.proto, q.l4), (proto::UDP, L4::Fragment));
        inner[43] = 1;
        assert!(matches!(Quoted::read(&inner).unwrap().l4, L4::Ports { .. }));
        assert_eq!(Quoted::read(&inner[..43]), None);
    }

    #[test]
    fn other_icmp_is_not_an_error() {
        let packet = Ip::new(Family::V4).packet(proto::ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(QuotingError::read(&packet, &parsed(&packet)), None);
    }
}
