//! IPv6 and its extension headers, RFC 8200.

use std::net::Ipv6Addr;

use super::{WireError, be16, be32, proto};

/// Fixed header length, bytes.
pub const HEADER_LEN: usize = 40;
/// Fragment header length, bytes.
pub const FRAGMENT_LEN: usize = 8;
/// Extension headers followed before a packet is refused. RFC 8504 section 5.3 lets a node set such a limit.
pub const MAX_EXT_HEADERS: usize = 8;

/// View of an IPv6 packet, cut to its payload length.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6<'a> {
    header: &'a [u8; HEADER_LEN],
    payload: &'a [u8],
}

impl<'a> Ipv6<'a> {
    /// Checks version and lengths. Jumbograms (RFC 2675) are not supported.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(WireError::Truncated)?;
        if header[0] >> 4 != 6 {
            return Err(WireError::Version);
        }
        let payload = rest
            .get(..usize::from(be16(header, 4)))
            .ok_or(WireError::Truncated)?;
        Ok(Self { header, payload })
    }

    /// Traffic class: DSCP and ECN.
    pub fn tos(&self) -> u8 {
        tos(self.header)
    }

    /// Flow label, 20 bits.
    pub fn flow_label(&self) -> u32 {
        be32(self.header, 0) & 0x000f_ffff
    }

    /// First next-header value.
    pub fn next_header(&self) -> u8 {
        self.header[6]
    }

    /// Hop limit.
    pub fn hop_limit(&self) -> u8 {
        self.header[7]
    }

    /// Source address.
    pub fn src(&self) -> Ipv6Addr {
        address(self.header, 8)
    }

    /// Destination address.
    pub fn dst(&self) -> Ipv6Addr {
        address(self.header, 24)
    }

    /// Extension headers and upper layer.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Length of header and payload, bytes.
    pub fn total_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }

    /// Follows the extension headers.
    pub fn walk(&self) -> Result<Walk, WireError> {
        Walk::new(self.header[6], self.payload)
    }
}

fn address(h: &[u8; HEADER_LEN], at: usize) -> Ipv6Addr {
    let mut a = [0u8; 16];
    if let Some(s) = h.get(at..at + 16) {
        a.copy_from_slice(s);
    }
    a.into()
}

#[inline(always)]
pub(crate) const fn tos(h: &[u8; HEADER_LEN]) -> u8 {
    h[0] << 4 | h[1] >> 4
}

/// Changes DSCP and ECN.
#[inline]
pub fn set_tos(h: &mut [u8; HEADER_LEN], tos: u8) {
    h[0] = h[0] & 0xf0 | tos >> 4;
    h[1] = h[1] & 0x0f | tos << 4;
}

/// The fragment header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentHeader {
    /// Where it starts, bytes from the start of the packet.
    pub at: usize,
    /// Where the next-header byte that names it is.
    pub nh_at: usize,
    /// Offset of the data, bytes.
    pub offset: usize,
    /// More fragments follow.
    pub more: bool,
    /// Identification.
    pub id: u32,
}

impl FragmentHeader {
    /// Not a fragment at all, RFC 6946.
    pub const fn is_atomic(&self) -> bool {
        self.offset == 0 && !self.more
    }
}

/// Result of following the extension headers. Offsets count from the start of the IPv6 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Upper-layer protocol; for a non-initial fragment what its fragment header names.
    pub proto: u8,
    /// Where the upper layer starts.
    pub upper_at: usize,
    /// Where the next-header byte that names the upper layer is.
    pub upper_nh_at: usize,
    /// Where ESP goes in transport mode: behind hop-by-hop, routing and fragment headers (and what
    /// precedes a routing header), before destination options. RFC 4303 section 3.1.1.
    pub esp_at: usize,
    /// Where the next-header byte that will name ESP is.
    pub esp_nh_at: usize,
    /// End of the unfragmentable part, RFC 8200 section 4.5.
    pub unfragmentable: usize,
    /// Where the next-header byte that names what follows the unfragmentable part is.
    pub unfragmentable_nh_at: usize,
    /// Fragment header, if there is one.
    pub fragment: Option<FragmentHeader>,
}

impl Walk {
    /// `payload` is what follows the fixed header whose next-header field is `next`.
    pub fn new(mut next: u8, payload: &[u8]) -> Result<Self, WireError> {
        let mut w = Self {
            proto: next,
            upper_at: HEADER_LEN,
            upper_nh_at: 6,
            esp_at: HEADER_LEN,
            esp_nh_at: 6,
            unfragmentable: HEADER_LEN,
            unfragmentable_nh_at: 6,
            fragment: None,
        };
        for n in 0..=MAX_EXT_HEADERS {
            let at = w.upper_at;
            let here = payload.get(at - HEADER_LEN..).ok_or(WireError::Truncated)?;
            let len = match next {
                proto::HOP_BY_HOP if n > 0 => return Err(WireError::HeaderOrder),
                proto::HOP_BY_HOP | proto::ROUTING | proto::DEST_OPTS => {
                    let [_, len, ..] = here else {
                        return Err(WireError::Truncated);
                    };
                    usize::from(*len) * 8 + 8
                }
                proto::AH => {
                    let [_, len, ..] = here else {
                        return Err(WireError::Truncated);
                    };
                    usize::from(*len) * 4 + 8
                }
                proto::FRAGMENT => {
                    if w.fragment.is_some() {
                        return Err(WireError::HeaderOrder);
                    }
                    let h = here
                        .first_chunk::<FRAGMENT_LEN>()
                        .ok_or(WireError::Truncated)?;
                    let field = be16(h, 2);
                    w.fragment = Some(FragmentHeader {
                        at,
                        nh_at: w.upper_nh_at,
                        offset: usize::from(field & 0xfff8),
                        more: field & 1 != 0,
                        id: be32(h, 4),
                    });
                    FRAGMENT_LEN
                }
                _ => {
                    w.proto = next;
                    return Ok(w);
                }
            };
            if n == MAX_EXT_HEADERS {
                break;
            }
            let [following, ..] = *here.get(..len).ok_or(WireError::Truncated)? else {
                return Err(WireError::Truncated);
            };
            w.upper_at = at + len;
            w.upper_nh_at = at;
            if matches!(next, proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT) {
                (w.esp_at, w.esp_nh_at) = (w.upper_at, at);
            }
            if matches!(next, proto::HOP_BY_HOP | proto::ROUTING) {
                (w.unfragmentable, w.unfragmentable_nh_at) = (w.upper_at, at);
            }
            next = following;
            // Behind the header of a non-initial fragment is data, not a header.
            if w.fragment.is_some_and(|f| f.offset != 0) {
                w.proto = next;
                return Ok(w);
            }
        }
        Err(WireError::TooManyHeaders)
    }
}

/// What an IPv6 header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Repr {
    /// Source address.
    pub src: Ipv6Addr,
    /// Destination address.
    pub dst: Ipv6Addr,
    /// Next header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class.
    pub tos: u8,
    /// Flow label; the low 20 bits are used.
    pub flow_label: u32,
    /// Payload length, bytes.
    pub payload_len: u16,
}

impl Ipv6Repr {
    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; HEADER_LEN]) {
        let first = 0x6000_0000 | u32::from(self.tos) << 20 | self.flow_label & 0x000f_ffff;
        out[..4].copy_from_slice(&first.to_be_bytes());
        out[4..6].copy_from_slice(&self.payload_len.to_be_bytes());
        out[6] = self.next_header;
        out[7] = self.hop_limit;
        out[8..24].copy_from_slice(&self.src.octets());
        out[24..40].copy_from_slice(&self.dst.octets());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext(next: u8, len8: u8) -> Vec<u8> {
        let mut v = vec![0; 8 + usize::from(len8) * 8];
        v[0] = next;
        v[1] = len8;
        v
    }

    #[test]
    fn a_header_reads_back_as_written() {
        let repr = Ipv6Repr {
            src: "2001:db8::1".parse().unwrap(),
            dst: "2001:db8::2".parse().unwrap(),
            next_header: 50,
            hop_limit: 3,
            tos: 0xb9,
            flow_label: 0xabcde,
            payload_len: 4,
        };
        let mut b = [0u8; 50];
        repr.emit(b.first_chunk_mut().unwrap());
        let ip = Ipv6::new(&b).unwrap();
        assert_eq!((ip.src(), ip.dst()), (repr.src, repr.dst));
        assert_eq!((ip.tos(), ip.flow_label()), (0xb9, 0xabcde));
        assert_eq!((ip.next_header(), ip.hop_limit()), (50, 3));
        assert_eq!((ip.payload().len(), ip.total_len()), (4, 44));
        set_tos(b.first_chunk_mut().unwrap(), 0x46);
        let ip = Ipv6::new(&b).unwrap();
        assert_eq!((ip.tos(), ip.flow_label()), (0x46, 0xabcde));
        assert_eq!(Ipv6::new(&b[..43]).err(), Some(WireError::Truncated));
    }

    #[test]
    fn esp_goes_behind_routing_and_before_the_last_destination_options() {
        let mut p = ext(proto::DEST_OPTS, 0); // hop-by-hop
        p.extend(ext(proto::ROUTING, 0)); // destination options for the first hops
        p.extend(ext(proto::DEST_OPTS, 1)); // routing, 16 bytes
        p.extend(ext(proto::TCP, 0)); // destination options for the last hop
        p.extend([0; 20]);
        let w = Walk::new(proto::HOP_BY_HOP, &p).unwrap();
        assert_eq!((w.proto, w.upper_at, w.upper_nh_at), (6, 80, 72));
        assert_eq!((w.esp_at, w.esp_nh_at), (72, 56));
        assert_eq!((w.unfragmentable, w.unfragmentable_nh_at), (72, 56));
    }

    #[test]
    fn nothing_behind_a_later_fragment_is_read_as_a_header() {
        let mut p = vec![proto::DEST_OPTS, 0, 0, 8, 1, 2, 3, 4];
        p.extend([0xff; 9]);
        let w = Walk::new(proto::FRAGMENT, &p).unwrap();
        assert_eq!((w.proto, w.upper_at), (proto::DEST_OPTS, 48));
        let f = w.fragment.unwrap();
        assert_eq!((f.at, f.offset, f.more, f.id), (40, 8, false, 0x0102_0304));
        assert!(!f.is_atomic());
    }

    #[test]
    fn chains_that_are_too_long_cut_short_or_out_of_order_are_refused() {
        let chain = |n: usize| {
            let mut p = Vec::new();
            for i in 0..n {
                p.extend(ext(if i + 1 == n { 6 } else { 60 }, 0));
            }
            Walk::new(60, &p)
        };
        assert!(chain(MAX_EXT_HEADERS).is_ok());
        assert_eq!(chain(MAX_EXT_HEADERS + 1), Err(WireError::TooManyHeaders));
        assert_eq!(Walk::new(60, &[6]), Err(WireError::Truncated));
        assert_eq!(
            Walk::new(60, &[6, 1, 0, 0, 0, 0, 0, 0]),
            Err(WireError::Truncated)
        );
        assert_eq!(
            Walk::new(44, &[6, 0, 0, 0, 0, 0, 0]),
            Err(WireError::Truncated)
        );
        assert_eq!(Walk::new(60, &ext(0, 0)), Err(WireError::HeaderOrder));
        let mut two = vec![44, 0, 0, 1, 0, 0, 0, 0];
        two.extend([6, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(Walk::new(44, &two), Err(WireError::HeaderOrder));
    }
}
