//! TCP header, as far as MSS clamping and checksum repair need it. RFC 9293.

use super::{WireError, be16, be32};

/// Header length without options, bytes.
pub const HEADER_LEN: usize = 20;
/// Offset of the checksum field.
pub const CHECKSUM_AT: usize = 16;
/// SYN flag in byte 13.
pub const SYN: u8 = 0x02;

/// View of a TCP segment.
#[derive(Clone, Copy, Debug)]
pub struct Tcp<'a> {
    header: &'a [u8; HEADER_LEN],
    options: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Tcp<'a> {
    /// Checks the data offset.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(WireError::Truncated)?;
        let len = usize::from(header[12] >> 4) * 4;
        let options = len.checked_sub(HEADER_LEN).ok_or(WireError::HeaderLength)?;
        let (options, payload) = rest.split_at_checked(options).ok_or(WireError::Truncated)?;
        Ok(Self {
            header,
            options,
            payload,
        })
    }

    /// Source port.
    pub fn src(&self) -> u16 {
        be16(self.header, 0)
    }

    /// Destination port.
    pub fn dst(&self) -> u16 {
        be16(self.header, 2)
    }

    /// Sequence number.
    pub fn seq(&self) -> u32 {
        be32(self.header, 4)
    }

    /// Whether SYN is set (also in SYN-ACK).
    pub fn syn(&self) -> bool {
        self.header[13] & SYN != 0
    }

    /// Checksum field.
    pub fn checksum(&self) -> u16 {
        be16(self.header, CHECKSUM_AT)
    }

    /// Payload.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Offset of the MSS value in the segment, and the value. `None` without the option or when the
    /// option list is malformed before it.
    pub fn mss(&self) -> Option<(usize, u16)> {
        let mut at = 0;
        loop {
            match self.options.get(at..)? {
                [0, ..] | [] => return None,
                [1, ..] => at += 1,
                [2, 4, hi, lo, ..] => {
                    return Some((HEADER_LEN + at + 2, u16::from_be_bytes([*hi, *lo])));
                }
                [_, len, ..] if *len >= 2 => at += usize::from(*len),
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(options: &[u8]) -> Vec<u8> {
        let mut b = vec![0; HEADER_LEN];
        b.extend_from_slice(options);
        b[12] = u8::try_from(b.len() / 4).unwrap() << 4;
        b[13] = SYN;
        b
    }

    #[test]
    fn mss_is_found_behind_other_options_and_at_odd_offsets() {
        let b = segment(&[1, 2, 4, 0x05, 0xb4, 0, 0, 0]);
        let tcp = Tcp::new(&b).unwrap();
        assert_eq!(tcp.mss(), Some((23, 1460)));
        assert!(tcp.syn());
        let b = segment(&[3, 3, 7, 2, 4, 0x05, 0xb4, 0]);
        assert_eq!(Tcp::new(&b).unwrap().mss(), Some((25, 1460)));
    }

    #[test]
    fn malformed_option_lists_end_the_search() {
        for bad in [
            [5, 0, 2, 4],
            [5, 1, 2, 4],
            [5, 9, 2, 4],
            [2, 4, 1, 1].map(|b: u8| b / 2),
        ] {
            assert_eq!(Tcp::new(&segment(&bad)).unwrap().mss(), None);
        }
        let mut b = segment(&[2, 4, 5, 0xb4]);
        b[12] = 0x40;
        assert_eq!(Tcp::new(&b).err(), Some(WireError::HeaderLength));
        b[12] = 0x70;
        assert_eq!(Tcp::new(&b).err(), Some(WireError::Truncated));
    }
}
