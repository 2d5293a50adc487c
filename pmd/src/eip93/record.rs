//! SA records and state records: what the engine knows of a key, and of a packet.

use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AesBits, Cipher, Hmac, Suite};
use zeroize::Zeroizing;

use super::regs::{HAS_AES, HAS_AES128, HAS_AES192, HAS_AES256, HAS_SHA1, HAS_SHA256};
use crate::device::DmaMem;

/// Bytes of an SA record.
pub(super) const SA_LEN: usize = 128;
/// Bytes that each state record gets: 56 are used.
pub(super) const STATE_STRIDE: usize = 64;

// CMD0.
const NULL_HASH: u32 = 15 << 12;
const OP_BOTH: u32 = 1;
const OP_PRNG: u32 = 7;
const INBOUND: u32 = 1 << 3;
const PROTOCOL: u32 = 1 << 4;
/// Padding of basic operations, which add none: as proven drivers set it.
const PAD_ZERO: u32 = 3 << 6;
const AES: u32 = 3 << 8;
const SHA1: u32 = 1 << 12;
const SHA256: u32 = 3 << 12;
const SCPAD: u32 = 1 << 17;
const HDR_PROC: u32 = 1 << 19;
const IV_INPUT: u32 = 1 << 24;
const IV_STATE: u32 = 2 << 24;
const IV_PRNG: u32 = 3 << 24;
const SAVE_IV: u32 = 1 << 28;

// CMD1.
const COPY_DIGEST: u32 = 1;
const COPY_HEADER: u32 = 1 << 1;
const COPY_PAD: u32 = 1 << 3;
const CBC: u32 = 1 << 8;
const CTR: u32 = 2 << 8;
const HMAC: u32 = 1 << 12;
const EN_SEQNUM_CHK: u32 = 1 << 29;

// Places in the SA record.
const KEY: usize = 0x08;
const IDIGEST: usize = 0x28;
const ODIGEST: usize = 0x48;
const SPI: usize = 0x68;
const SEQNUM: usize = 0x6c;
const MASK: usize = 0x74;
const NONCE: usize = 0x7c;

/// What the engine offers of a suite's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) counter: bool,
    bits: AesBits,
    hmac: Hmac,
}

impl Parts {
    /// The parts of a suite; `None` for those that the engine does not know.
    pub(super) fn of(suite: Suite) -> Option<Parts> {
        let Suite::CipherHmac(cipher, hmac @ (Hmac::Sha1_96 | Hmac::Sha256_128)) = suite else {
            return None;
        };
        let (counter, bits) = match cipher {
            Cipher::Cbc(bits) => (false, bits),
            Cipher::Ctr(bits) => (true, bits),
            Cipher::Null => return None,
        };
        Some(Parts {
            counter,
            bits,
            hmac,
        })
    }

    /// Whether this chip has them, by its OPTION_1.
    pub(super) fn offered(self, options: u32) -> bool {
        let bits = match self.bits {
            AesBits::B128 => HAS_AES128,
            AesBits::B192 => HAS_AES192,
            AesBits::B256 => HAS_AES256,
        };
        let hash = match self.hmac {
            Hmac::Sha1_96 => HAS_SHA1,
            _ => HAS_SHA256,
        };
        let needed = HAS_AES | bits | hash;
        options & needed == needed
    }

    pub(super) fn iv_len(self) -> usize {
        if self.counter { 8 } else { 16 }
    }

    pub(super) fn icv_len(self) -> usize {
        self.hmac.icv_len()
    }

    /// What the ciphered part is a multiple of.
    pub(super) fn block(self) -> usize {
        if self.counter { 4 } else { 16 }
    }

    fn key_len(self) -> usize {
        self.bits.key_len()
    }

    fn words(self) -> (u32, u32) {
        let hash = match self.hmac {
            Hmac::Sha1_96 => SHA1 | 3 << 20,
            _ => SHA256 | 4 << 20,
        };
        let key = match self.bits {
            AesBits::B128 => 2,
            AesBits::B192 => 3,
            AesBits::B256 => 4,
        };
        let mode = if self.counter { CTR } else { CBC };
        (AES | hash, mode | HMAC | key << 24)
    }

    /// Control words for packets that the caller frames: hash over everything, cipher behind header and IV.
    pub(super) fn crypto(self, direction: Direction) -> [u32; 2] {
        let (cmd0, cmd1) = self.words();
        let offset: u32 = if self.counter { 4 } else { 6 };
        let cmd0 = cmd0 | OP_BOTH | PAD_ZERO | IV_STATE | SAVE_IV;
        let cmd1 = cmd1 | COPY_HEADER | offset << 16;
        match direction {
            Direction::Out => [cmd0, cmd1 | COPY_DIGEST | COPY_PAD],
            Direction::In => [cmd0 | INBOUND, cmd1],
        }
    }

    /// Control words for the cipher alone, outbound: known answers.
    pub(super) fn cipher_only(self) -> [u32; 2] {
        let (_, cmd1) = self.words();
        let cmd0 = AES | NULL_HASH | PAD_ZERO | IV_STATE | SAVE_IV;
        [cmd0, cmd1 & !HMAC]
    }

    /// Control words for packets that the engine frames.
    pub(super) fn packet(self, direction: Direction, numbered: bool) -> [u32; 2] {
        let (cmd0, cmd1) = self.words();
        let cmd0 = cmd0 | PROTOCOL | SCPAD | HDR_PROC;
        let cmd1 = if numbered { cmd1 | EN_SEQNUM_CHK } else { cmd1 };
        match direction {
            Direction::Out => [cmd0 | IV_PRNG, cmd1 | COPY_DIGEST],
            Direction::In => [cmd0 | INBOUND | IV_INPUT, cmd1 | COPY_HEADER],
        }
    }
}

/// An SA record in the making. Wiped when dropped.
pub(super) struct Image(Zeroizing<[u8; SA_LEN]>);

impl Image {
    /// The record of `keys`, whose lengths fit the suite (`None` when they do not).
    pub(super) fn new(parts: Parts, commands: [u32; 2], keys: &SaKeys) -> Option<Image> {
        let (key, nonce) = keys.enc.split_at_checked(parts.key_len())?;
        if nonce.len() != if parts.counter { 4 } else { 0 } {
            return None;
        }
        if keys.auth.len() != parts.hmac.key_len() {
            return None;
        }
        let mut image = Image(Zeroizing::new([0; SA_LEN]));
        image.word(0, commands[0]);
        image.word(4, commands[1]);
        image.bytes(KEY, key);
        image.bytes(NONCE, nonce);
        for (at, pad) in [(IDIGEST, 0x36), (ODIGEST, 0x5c)] {
            let chain = chaining_value(parts.hmac, &keys.auth, pad);
            for (i, w) in chain.iter().enumerate() {
                image.word(at + 4 * i, *w);
            }
        }
        Some(image)
    }

    /// Packet mode: identity, last number used or highest accepted, and the replay mask.
    pub(super) fn number(&mut self, spi: u32, last: u32, mask: u64) {
        self.word(SPI, spi);
        self.word(SEQNUM, last);
        self.bytes(MASK, &mask.to_le_bytes());
    }

    /// The record that loads the random number generator with `entropy`.
    pub(super) fn prng(entropy: &[u8; 48]) -> Image {
        let mut image = Image(Zeroizing::new([0; SA_LEN]));
        image.word(0, OP_PRNG | AES | SHA1);
        image.word(4, 2 << 24);
        let (key, rest) = entropy.split_at(16);
        let (seed, date) = rest.split_at(16);
        image.bytes(KEY, key);
        image.bytes(IDIGEST, seed);
        image.bytes(ODIGEST, date);
        image
    }

    /// Puts it where the engine reads it.
    pub(super) fn store(&self, memory: &DmaMem) {
        memory.write_bytes(0, &*self.0);
    }

    /// The words, for direct host mode.
    pub(super) fn words(&self) -> impl Iterator<Item = u32> {
        self.0
            .as_chunks::<4>()
            .0
            .iter()
            .map(|w| u32::from_le_bytes(*w))
    }

    fn word(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    #[cfg(test)]
    pub(super) fn expose(&self) -> &[u8; SA_LEN] {
        &self.0
    }
}

/// The first block that the cipher starts with: the IV, or nonce, IV and a counter of 1.
#[inline]
pub(super) fn first_block(nonce: [u8; 4], iv: &[u8]) -> [u8; 16] {
    let mut block = [0; 16];
    if let Some(iv) = iv.first_chunk::<16>() {
        return *iv;
    }
    if let Some(iv) = iv.first_chunk::<8>() {
        block[..4].copy_from_slice(&nonce);
        block[4..12].copy_from_slice(iv);
        block[15] = 1;
    }
    block
}

/// The chaining value after the padded key, which is all that the engine takes of an HMAC key. Native words.
fn chaining_value(hmac: Hmac, key: &[u8], pad: u8) -> Zeroizing<[u32; 8]> {
    let mut block = Zeroizing::new([[pad; 64]]);
    for (b, k) in block[0].iter_mut().zip(key) {
        *b ^= k;
    }
    let mut chain = Zeroizing::new([0; 8]);
    if hmac == Hmac::Sha1_96 {
        let mut five = Zeroizing::new([
            0x6745_2301,
            0xefcd_ab89,
            0x98ba_dcfe,
            0x1032_5476,
            0xc3d2_e1f0,
        ]);
        sha1::block_api::compress(&mut five, &*block);
        chain[..5].copy_from_slice(&*five);
    } else {
        *chain = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a,
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        sha2::block_api::compress256(&mut chain, &*block);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use sa_store::suite::Cipher;

    fn parts(cipher: Cipher, hmac: Hmac) -> Parts {
        Parts::of(Suite::CipherHmac(cipher, hmac)).unwrap()
    }

    #[test]
    fn control_words_are_those_of_drivers_that_work() {
        let a = parts(Cipher::Cbc(AesBits::B128), Hmac::Sha1_96);
        assert_eq!(a.packet(Direction::Out, true), [0x033A_1310, 0x2200_1101]);
        assert_eq!(a.packet(Direction::In, true), [0x013A_1318, 0x2200_1102]);
        assert_eq!(a.crypto(Direction::Out), [0x1230_13C1, 0x0206_110B]);
        assert_eq!(a.crypto(Direction::In), [0x1230_13C9, 0x0206_1102]);
        assert_eq!(a.cipher_only(), [0x1200_F3C0, 0x0200_0100]);
        let c = parts(Cipher::Cbc(AesBits::B256), Hmac::Sha256_128);
        assert_eq!(c.packet(Direction::Out, true), [0x034A_3310, 0x2400_1101]);
        assert_eq!(c.packet(Direction::In, true), [0x014A_3318, 0x2400_1102]);
    }

    #[test]
    fn the_image_of_vector_a_is_the_known_one() {
        let want = [
            0x033A_1310,
            0x2200_1101,
            0xB482_D390,
            0x7ABA_EE10,
            0x6CC4_38D9,
            0xBF82_1AEC,
            0,
            0,
            0,
            0,
            0x064c_662a,
            0xcc6e_d1b0,
            0x6cfa_9ab0,
            0x042f_137f,
            0xcea5_70eb,
            0,
            0,
            0,
            0xd62a_cccc,
            0x7e6a_98b3,
            0xdf01_5b02,
            0xd885_c3e0,
            0x9bd1_84cb,
            0,
            0,
            0,
            0x4321,
            0,
            0,
            u32::MAX,
            0,
            0,
        ];
        let key = 0x90d3_82b4_10ee_ba7a_d938_c46c_ec1a_82bf_u128;
        let keys = SaKeys {
            enc: key.to_be_bytes().to_vec().into(),
            auth: vec![0x0b; 20].into(),
        };
        let a = parts(Cipher::Cbc(AesBits::B128), Hmac::Sha1_96);
        let mut image = Image::new(a, a.packet(Direction::Out, true), &keys).unwrap();
        image.number(0x4321, 0, 0xffff_ffff);
        assert_eq!(image.words().collect::<Vec<_>>(), want);
        let short = SaKeys {
            enc: vec![0; 15].into(),
            auth: vec![0; 20].into(),
        };
        assert!(Image::new(a, [0; 2], &short).is_none());
    }

    #[test]
    fn the_chaining_values_of_sha256_are_the_known_ones() {
        let key: Vec<u8> = (0x20..0x40).collect();
        let inner = chaining_value(Hmac::Sha256_128, &key, 0x36);
        assert_eq!(inner[..2], [0xac18_63d2, 0x68be_8cca]);
        let outer = chaining_value(Hmac::Sha256_128, &key, 0x5c);
        assert_eq!(outer[..2], [0xcfc3_482a, 0x7fbe_8b65]);
        assert_eq!(inner[7], 0xf48d_22b9);
        assert_eq!(outer[7], 0x4726_7f40);
    }

    #[test]
    fn the_record_that_seeds_is_the_known_one() {
        let image = Image::prng(&[7; 48]);
        let words: Vec<_> = image.words().collect();
        assert_eq!(words[..2], [0x0000_1307, 0x0200_0000]);
        assert_eq!(image.expose()[0x18..0x28], [0; 16]);
    }
}
