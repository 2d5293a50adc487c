//! What the driver lays into memory: SA and state records.

use super::registers::Code;

/// Bytes of an SA record.
pub(super) const SA_LEN: usize = 128;
/// Bytes of a state record.
pub(super) const STATE_LEN: usize = 56;
/// The part of the SA record that the engine writes: sequence number and replay mask.
pub(super) const SA_WRITTEN: std::ops::Range<usize> = 0x6c..0x7c;

/// An SA record.
#[derive(Clone)]
pub(super) struct Sa(pub(super) [u8; SA_LEN]);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cipher {
    Null,
    AesEcb,
    AesCbc,
    AesCtr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hash {
    Null,
    Sha1,
    Sha224,
    Sha256,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    None,
    Input,
    State,
    Prng,
}

impl Sa {
    pub(super) fn word(&self, at: usize) -> u32 {
        word(&self.0, at)
    }

    fn set(&mut self, at: usize, value: u32) {
        set(&mut self.0, at, value);
    }

    fn cmd0(&self) -> u32 {
        self.word(0)
    }

    fn cmd1(&self) -> u32 {
        self.word(4)
    }

    pub(super) fn opcode(&self) -> u32 {
        self.cmd0() & 7
    }

    pub(super) fn inbound(&self) -> bool {
        self.cmd0() >> 3 & 1 == 1
    }

    pub(super) fn group(&self) -> u32 {
        self.cmd0() >> 4 & 3
    }

    pub(super) fn pad_type(&self) -> u32 {
        self.cmd0() >> 6 & 3 | self.cmd0() >> 16 & 4
    }

    pub(super) fn header_processing(&self) -> bool {
        self.cmd0() >> 19 & 1 == 1
    }

    /// Bytes of the integrity check value.
    pub(super) fn icv(&self) -> usize {
        match self.cmd0() >> 20 & 15 {
            0 => 12,
            n => n as usize * 4,
        }
    }

    pub(super) fn iv_source(&self) -> Source {
        match self.cmd0() >> 24 & 3 {
            0 => Source::None,
            1 => Source::Input,
            2 => Source::State,
            _ => Source::Prng,
        }
    }

    /// Where the hash begins: 0 the SA's inner value, 2 the state record, 3 the algorithm's constants.
    pub(super) fn hash_source(&self) -> u32 {
        self.cmd0() >> 26 & 3
    }

    pub(super) fn save_iv(&self) -> bool {
        self.cmd0() >> 28 & 1 == 1
    }

    pub(super) fn save_hash(&self) -> bool {
        self.cmd0() >> 29 & 1 == 1
    }

    pub(super) fn copy_digest(&self) -> bool {
        self.cmd1() & 1 == 1
    }

    pub(super) fn copy_header(&self) -> bool {
        self.cmd1() >> 1 & 1 == 1
    }

    pub(super) fn hmac(&self) -> bool {
        self.cmd1() >> 12 & 1 == 1
    }

    /// Bytes between the start of the hash and the start of the encryption.
    pub(super) fn offset(&self) -> usize {
        let n = (self.cmd1() >> 16 & 0xff) as usize;
        if self.cmd1() >> 13 & 1 == 1 { n } else { n * 4 }
    }

    pub(super) fn checks_sequence(&self) -> bool {
        self.cmd1() >> 29 & 1 == 1
    }

    /// The cipher and its key.
    pub(super) fn cipher(&self) -> Result<(Cipher, &[u8]), Code> {
        match self.cmd0() >> 8 & 15 {
            15 => return Ok((Cipher::Null, &[])),
            3 => {}
            // The model has no DES, 3DES and ARC4.
            _ => return Err(Code::Algorithm),
        }
        if self.cmd1() >> 28 & 1 == 1 {
            // A decryption key: no driver gives one, and the model takes none.
            return Err(Code::Algorithm);
        }
        let cipher = match self.cmd1() >> 8 & 3 {
            0 => Cipher::AesEcb,
            1 => Cipher::AesCbc,
            2 => Cipher::AesCtr,
            _ => return Err(Code::Algorithm),
        };
        let len = match self.cmd1() >> 24 & 7 {
            n @ 2..=4 => n as usize * 8,
            _ => return Err(Code::Algorithm),
        };
        Ok((cipher, &self.0[8..8 + len]))
    }

    pub(super) fn hash(&self) -> Result<Hash, Code> {
        match self.cmd0() >> 12 & 15 {
            1 => Ok(Hash::Sha1),
            2 => Ok(Hash::Sha224),
            3 => Ok(Hash::Sha256),
            15 => Ok(Hash::Null),
            _ => Err(Code::Algorithm),
        }
    }

    pub(super) fn inner(&self) -> [u32; 8] {
        std::array::from_fn(|i| self.word(0x28 + 4 * i))
    }

    pub(super) fn outer(&self) -> [u32; 8] {
        std::array::from_fn(|i| self.word(0x48 + 4 * i))
    }

    pub(super) fn spi(&self) -> u32 {
        self.word(0x68)
    }

    pub(super) fn sequence(&self) -> u32 {
        self.word(0x6c)
    }

    pub(super) fn set_sequence(&mut self, n: u32) {
        self.set(0x6c, n);
    }

    pub(super) fn mask(&self) -> u64 {
        u64::from(self.word(0x74)) | u64::from(self.word(0x78)) << 32
    }

    pub(super) fn set_mask(&mut self, mask: u64) {
        self.0[0x74..0x7c].copy_from_slice(&mask.to_le_bytes());
    }

    pub(super) fn nonce(&self) -> [u8; 4] {
        [self.0[0x7c], self.0[0x7d], self.0[0x7e], self.0[0x7f]]
    }

    /// Whether everything that only the driver writes is the same.
    pub(super) fn same_but_written(&self, other: &Sa) -> bool {
        self.0[..SA_WRITTEN.start] == other.0[..SA_WRITTEN.start]
            && self.0[SA_WRITTEN.end..] == other.0[SA_WRITTEN.end..]
    }
}

/// A state record.
#[derive(Clone)]
pub(super) struct State(pub(super) [u8; STATE_LEN]);

impl State {
    pub(super) fn iv(&self) -> [u8; 16] {
        let mut iv = [0; 16];
        iv.copy_from_slice(&self.0[..16]);
        iv
    }

    pub(super) fn set_iv(&mut self, iv: &[u8; 16]) {
        self.0[..16].copy_from_slice(iv);
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::from(word(&self.0, 0x10)) | u64::from(word(&self.0, 0x14)) << 32
    }

    pub(super) fn set_bytes(&mut self, n: u64) {
        self.0[0x10..0x18].copy_from_slice(&n.to_le_bytes());
    }

    pub(super) fn digest(&self) -> [u32; 8] {
        std::array::from_fn(|i| word(&self.0, 0x18 + 4 * i))
    }

    pub(super) fn set_digest(&mut self, digest: &[u32; 8]) {
        for (i, w) in digest.iter().enumerate() {
            set(&mut self.0, 0x18 + 4 * i, *w);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn set(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
