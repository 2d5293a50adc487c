//! ESP header, RFC 4303 section 2, and the rules of RFC 3948 for what a UDP port carries.

use super::{WireError, be32};

/// SPI and sequence number, bytes.
pub const HEADER_LEN: usize = 8;
/// Pad length and next header, bytes.
pub const TRAILER_LEN: usize = 2;

/// View of an ESP packet.
#[derive(Clone, Copy, Debug)]
pub struct Esp<'a> {
    header: &'a [u8; HEADER_LEN],
    rest: &'a [u8],
}

impl<'a> Esp<'a> {
    /// Needs the fixed header only.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, rest) = bytes.split_first_chunk().ok_or(WireError::Truncated)?;
        Ok(Self { header, rest })
    }

    /// SPI, which may be one of the reserved values.
    pub fn spi(&self) -> u32 {
        be32(self.header, 0)
    }

    /// Low half of the sequence number.
    pub fn seq(&self) -> u32 {
        be32(self.header, 4)
    }

    /// IV, ciphertext and ICV.
    pub fn body(&self) -> &'a [u8] {
        self.rest
    }
}

/// What a datagram on a UDP-encapsulation port is, RFC 3948 section 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpPayload<'a> {
    /// Four zero bytes where an SPI would be: IKE follows.
    Ike(&'a [u8]),
    /// One byte 0xff.
    Keepalive,
    /// ESP packet.
    Esp(&'a [u8]),
    /// None of them (too short for a marker).
    Malformed,
}

impl<'a> UdpPayload<'a> {
    /// Classifies the payload of a UDP datagram.
    pub fn classify(payload: &'a [u8]) -> Self {
        match payload {
            [0xff] => Self::Keepalive,
            [0, 0, 0, 0, ike @ ..] => Self::Ike(ike),
            [_, _, _, _, _, _, _, _, ..] => Self::Esp(payload),
            _ => Self::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_spi_marks_ike_and_a_single_ff_a_keepalive() {
        assert_eq!(UdpPayload::classify(&[0xff]), UdpPayload::Keepalive);
        assert_eq!(
            UdpPayload::classify(&[0, 0, 0, 0, 9]),
            UdpPayload::Ike(&[9])
        );
        let esp = [0, 0, 1, 0, 0, 0, 0, 1];
        assert_eq!(UdpPayload::classify(&esp), UdpPayload::Esp(&esp));
        for short in [&[][..], &[0xff, 0xff], &[0, 0, 1, 0, 0, 0, 0]] {
            assert_eq!(UdpPayload::classify(short), UdpPayload::Malformed);
        }
    }

    #[test]
    fn header_fields_are_read_in_network_order() {
        let esp = Esp::new(&[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        assert_eq!((esp.spi(), esp.seq()), (0x0102_0304, 0x0506_0708));
        assert_eq!(esp.body(), [9]);
        assert!(Esp::new(&[0; 7]).is_err());
    }
}
