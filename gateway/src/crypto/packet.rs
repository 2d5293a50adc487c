//! Where the parts of an ESP packet are, and what its AEAD authenticates besides the ciphertext.

/// An ESP packet cut at the suite's IV and ICV lengths.
pub(super) struct Parts<'a, const IV: usize, const ICV: usize> {
    /// SPI and sequence number.
    pub(super) head: &'a [u8; 8],
    /// The explicit IV.
    pub(super) iv: &'a [u8; IV],
    /// Payload, padding, pad length and next header.
    pub(super) body: &'a mut [u8],
    /// The integrity check value.
    pub(super) icv: &'a mut [u8; ICV],
}

/// Cuts `esp`; `None` when it is too short to hold header, IV and ICV.
#[inline]
pub(super) fn split<const IV: usize, const ICV: usize>(
    esp: &mut [u8],
) -> Option<Parts<'_, IV, ICV>> {
    let (head, rest) = esp.split_first_chunk_mut::<8>()?;
    let (iv, rest) = rest.split_first_chunk_mut::<IV>()?;
    let (body, icv) = rest.split_last_chunk_mut::<ICV>()?;
    Some(Parts {
        head,
        iv,
        body,
        icv,
    })
}

/// Additional authenticated data of an AEAD (RFC 4106 section 5): SPI and sequence number, 32 or 64 bits.
pub(super) struct Aad {
    bytes: [u8; 12],
    len: usize,
}

impl Aad {
    #[inline]
    pub(super) fn new(head: &[u8; 8], esn: bool, seq_hi: u32) -> Self {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&head[..4]);
        if esn {
            bytes[4..8].copy_from_slice(&seq_hi.to_be_bytes());
            bytes[8..].copy_from_slice(&head[4..]);
            Self { bytes, len: 12 }
        } else {
            bytes[4..8].copy_from_slice(&head[4..]);
            Self { bytes, len: 8 }
        }
    }

    #[inline]
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The 96-bit nonce of the AEAD suites: salt from the key material, IV from the packet.
#[inline]
pub(super) fn nonce(salt: [u8; 4], iv: &[u8; 8]) -> [u8; 12] {
    let mut n = [0; 12];
    n[..4].copy_from_slice(&salt);
    n[4..].copy_from_slice(iv);
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_refuses_what_cannot_hold_the_fixed_parts() {
        let mut buf = [0u8; 32];
        for n in 0..32 {
            assert!(split::<8, 16>(&mut buf[..n]).is_none());
        }
        let parts = split::<8, 16>(&mut buf).expect("exactly the fixed parts");
        assert!(parts.body.is_empty());
    }

    #[test]
    fn esn_puts_the_high_half_between_spi_and_low_half() {
        let head = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(Aad::new(&head, false, 0xa0b0_c0d0).as_slice(), &head);
        assert_eq!(
            Aad::new(&head, true, 0xa0b0_c0d0).as_slice(),
            &[1, 2, 3, 4, 0xa0, 0xb0, 0xc0, 0xd0, 5, 6, 7, 8]
        );
    }
}
