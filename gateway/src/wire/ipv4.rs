//! IPv4, RFC 791.

use std::net::Ipv4Addr;

use super::checksum::{self, sum20};
use super::{WireError, be16};

/// Header length without options, bytes.
pub const HEADER_LEN: usize = 20;
/// DF in the 16-bit flags-and-offset field.
pub const DF: u16 = 0x4000;
/// MF in the 16-bit flags-and-offset field.
pub const MF: u16 = 0x2000;

/// View of an IPv4 packet, cut to its total length.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<'a> {
    header: &'a [u8; HEADER_LEN],
    options: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Checks version and lengths, not the checksum. Bytes behind the total length are left out.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let header = bytes
            .first_chunk::<HEADER_LEN>()
            .ok_or(WireError::Truncated)?;
        if header[0] >> 4 != 4 {
            return Err(WireError::Version);
        }
        let header_len = usize::from(header[0] & 15) * 4;
        if header_len < HEADER_LEN {
            return Err(WireError::HeaderLength);
        }
        let total = usize::from(be16(header, 2));
        if total < header_len {
            return Err(WireError::TotalLength);
        }
        let packet = bytes.get(..total).ok_or(WireError::Truncated)?;
        let (head, payload) = packet
            .split_at_checked(header_len)
            .ok_or(WireError::Truncated)?;
        let options = head.get(HEADER_LEN..).ok_or(WireError::HeaderLength)?;
        Ok(Self {
            header,
            options,
            payload,
        })
    }

    /// Whether the header checksum is right.
    pub fn checksum_ok(&self) -> bool {
        checksum::add(sum20(self.header), checksum::sum(self.options)) == 0xffff
    }

    /// Header length with options, bytes.
    pub fn header_len(&self) -> usize {
        HEADER_LEN + self.options.len()
    }

    /// Total length, bytes.
    pub fn total_len(&self) -> usize {
        self.header_len() + self.payload.len()
    }

    /// DSCP and ECN.
    pub fn tos(&self) -> u8 {
        self.header[1]
    }

    /// Identification.
    pub fn id(&self) -> u16 {
        be16(self.header, 4)
    }

    /// Don't fragment.
    pub fn df(&self) -> bool {
        be16(self.header, 6) & DF != 0
    }

    /// More fragments.
    pub fn mf(&self) -> bool {
        be16(self.header, 6) & MF != 0
    }

    /// Fragment offset, bytes.
    pub fn frag_offset(&self) -> usize {
        usize::from(be16(self.header, 6) & 0x1fff) * 8
    }

    /// Time to live.
    pub fn ttl(&self) -> u8 {
        self.header[8]
    }

    /// Protocol.
    pub fn proto(&self) -> u8 {
        self.header[9]
    }

    /// Source address.
    pub fn src(&self) -> Ipv4Addr {
        Ipv4Addr::new(
            self.header[12],
            self.header[13],
            self.header[14],
            self.header[15],
        )
    }

    /// Destination address.
    pub fn dst(&self) -> Ipv4Addr {
        Ipv4Addr::new(
            self.header[16],
            self.header[17],
            self.header[18],
            self.header[19],
        )
    }

    /// Options.
    pub fn options(&self) -> &'a [u8] {
        self.options
    }

    /// Payload.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// What an IPv4 header without options says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Repr {
    /// Source address.
    pub src: Ipv4Addr,
    /// Destination address.
    pub dst: Ipv4Addr,
    /// Protocol.
    pub proto: u8,
    /// Time to live.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset as on the wire ([`DF`], [`MF`], offset in 8-byte units).
    pub frag: u16,
    /// Payload length, bytes; at most 65515.
    pub payload_len: u16,
}

impl Ipv4Repr {
    /// Writes the header with its checksum.
    pub fn emit(&self, out: &mut [u8; HEADER_LEN]) {
        out[0] = 0x45;
        out[1] = self.tos;
        let total = self.payload_len.saturating_add(20);
        out[2..4].copy_from_slice(&total.to_be_bytes());
        out[4..6].copy_from_slice(&self.id.to_be_bytes());
        out[6..8].copy_from_slice(&self.frag.to_be_bytes());
        out[8] = self.ttl;
        out[9] = self.proto;
        out[10..12].fill(0);
        out[12..16].copy_from_slice(&self.src.octets());
        out[16..20].copy_from_slice(&self.dst.octets());
        fill_checksum(out);
    }
}

/// Recomputes the checksum field of a header without options.
pub fn fill_checksum(header: &mut [u8; HEADER_LEN]) {
    header[10..12].fill(0);
    let c = !sum20(header);
    header[10..12].copy_from_slice(&c.to_be_bytes());
}

/// Recomputes the checksum field of a whole header with options; nothing for fewer than 20 bytes.
pub fn fill_checksum_options(header: &mut [u8]) {
    if let Some(field) = header.get_mut(10..12) {
        field.fill(0);
        let c = !checksum::sum(header);
        if let Some(field) = header.get_mut(10..12) {
            field.copy_from_slice(&c.to_be_bytes());
        }
    }
}

/// Changes DSCP and ECN, keeping the checksum right.
#[inline]
pub fn set_tos(header: &mut [u8; HEADER_LEN], tos: u8) {
    let old = u16::from(header[1]);
    let c = checksum::update16(be16(header, 10), old, u16::from(tos));
    header[1] = tos;
    header[10..12].copy_from_slice(&c.to_be_bytes());
}

/// Takes one from the TTL, keeping the checksum right. The caller has checked that it is above 1.
#[inline]
pub fn decrement_ttl(header: &mut [u8; HEADER_LEN]) {
    // The TTL is the high byte of its word: the field's complement sum falls by 0x0100.
    let c = checksum::add(be16(header, 10), 0x0100);
    header[8] = header[8].wrapping_sub(1);
    header[10..12].copy_from_slice(&c.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn repr() -> Ipv4Repr {
        Ipv4Repr {
            src: Ipv4Addr::new(192, 0, 2, 1),
            dst: Ipv4Addr::new(198, 51, 100, 7),
            proto: 17,
            ttl: 64,
            tos: 0xb8,
            id: 0x1234,
            frag: DF,
            payload_len: 12,
        }
    }

    #[test]
    fn a_header_reads_back_as_written() {
        let mut b = [0u8; 40];
        repr().emit(b.first_chunk_mut().unwrap());
        let ip = Ipv4::new(&b).unwrap();
        assert!(ip.checksum_ok());
        assert_eq!((ip.src(), ip.dst()), (repr().src, repr().dst));
        assert_eq!((ip.proto(), ip.ttl(), ip.tos()), (17, 64, 0xb8));
        assert_eq!((ip.id(), ip.df(), ip.mf()), (0x1234, true, false));
        assert_eq!((ip.frag_offset(), ip.total_len()), (0, 32));
        assert_eq!(ip.payload().len(), 12);
    }

    #[test]
    fn each_broken_length_is_named() {
        let mut b = [0u8; 32];
        repr().emit(b.first_chunk_mut().unwrap());
        assert_eq!(Ipv4::new(&b[..19]).err(), Some(WireError::Truncated));
        assert_eq!(Ipv4::new(&b[..31]).err(), Some(WireError::Truncated));
        let with = |at: usize, v: u8| {
            let mut c = b;
            c[at] = v;
            Ipv4::new(&c).err()
        };
        assert_eq!(with(0, 0x65), Some(WireError::Version));
        assert_eq!(with(0, 0x44), Some(WireError::HeaderLength));
        assert_eq!(with(0, 0x4f), Some(WireError::TotalLength));
        assert_eq!(with(3, 19), Some(WireError::TotalLength));
    }

    proptest! {
        #[test]
        fn ttl_and_tos_changes_keep_the_checksum_right(tos in any::<u8>(), new in any::<u8>(), ttl in 2u8..,
                                                       id in any::<u16>(), a in any::<u32>(), b in any::<u32>()) {
            let mut h = [0u8; 20];
            Ipv4Repr { tos, ttl, id, src: a.into(), dst: b.into(), ..repr() }.emit(&mut h);
            decrement_ttl(&mut h);
            set_tos(&mut h, new);
            let mut want = [0u8; 20];
            Ipv4Repr { tos: new, ttl: ttl - 1, id, src: a.into(), dst: b.into(), ..repr() }.emit(&mut want);
            prop_assert_eq!(h, want);
        }
    }
}
