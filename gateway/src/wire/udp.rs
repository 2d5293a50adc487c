//! UDP, RFC 768.

use super::{WireError, be16};

/// Header length, bytes.
pub const HEADER_LEN: usize = 8;

/// View of a UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    header: &'a [u8; HEADER_LEN],
    payload: &'a [u8],
}

impl<'a> Udp<'a> {
    /// Checks the length field against `bytes`; bytes behind the datagram are left out.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = bytes
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(WireError::Truncated)?;
        let len = usize::from(be16(header, 4));
        let body = len.checked_sub(HEADER_LEN).ok_or(WireError::TotalLength)?;
        let payload = rest.get(..body).ok_or(WireError::Truncated)?;
        Ok(Self { header, payload })
    }

    /// Source port.
    pub fn src(&self) -> u16 {
        be16(self.header, 0)
    }

    /// Destination port.
    pub fn dst(&self) -> u16 {
        be16(self.header, 2)
    }

    /// Checksum field; 0 is "none" with IPv4.
    pub fn checksum(&self) -> u16 {
        be16(self.header, 6)
    }

    /// Payload.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// What a UDP header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpRepr {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Payload length, bytes.
    pub payload_len: u16,
}

impl UdpRepr {
    /// Writes the header with a zero checksum.
    pub fn emit(&self, out: &mut [u8; HEADER_LEN]) {
        out[..2].copy_from_slice(&self.src.to_be_bytes());
        out[2..4].copy_from_slice(&self.dst.to_be_bytes());
        out[4..6].copy_from_slice(&self.payload_len.saturating_add(8).to_be_bytes());
        out[6..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_field_bounds_the_payload() {
        let mut b = [0u8; 16];
        let repr = UdpRepr {
            src: 500,
            dst: 4500,
            payload_len: 3,
        };
        repr.emit(b.first_chunk_mut().unwrap());
        let udp = Udp::new(&b).unwrap();
        assert_eq!((udp.src(), udp.dst(), udp.checksum()), (500, 4500, 0));
        assert_eq!(udp.payload().len(), 3);
        b[5] = 7;
        assert_eq!(Udp::new(&b).err(), Some(WireError::TotalLength));
        b[5] = 17;
        assert_eq!(Udp::new(&b).err(), Some(WireError::Truncated));
    }
}
