//! The first bytes of what lies inside an inbound packet, deciphered by the driver before the engine gets the packet.
//!
//! A result names its slot and no packet. These bytes do: without them a result that comes twice would be taken for the next
//! packet's, and one that is lost would shift all that follow. They reach over the transport header, so that packets which
//! look alike there are alike. Nothing else is done with them: whether a packet is authentic is the engine's to say.

use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128Dec, Aes128Enc, Aes192Dec, Aes192Enc, Aes256Dec, Aes256Enc};
use sa_store::sa::SaSpec;
use sa_store::suite::{Cipher, Suite};

const BLOCK: usize = 16;
const BLOCKS: usize = 4;
/// Bytes that are looked at.
pub(super) const FIRST: usize = BLOCK * BLOCKS;
const ESP_HEADER: usize = 8;

type Block = Array<u8, U16>;

/// Up to [`FIRST`] bytes of an inner packet, less what an engine may change of them.
#[derive(Clone, Copy)]
pub(super) struct First {
    bytes: [u8; FIRST],
    len: u8,
}

impl First {
    /// Of a packet that lies open.
    pub(super) fn of(inner: &[u8]) -> First {
        let mut first = First {
            bytes: [0; FIRST],
            len: 0,
        };
        for (to, from) in first.bytes.iter_mut().zip(inner) {
            *to = *from;
            first.len += 1;
        }
        first.forget_ecn();
        first
    }

    /// Congestion marks are copied inwards (RFC 6040), and with them IPv4's checksum changes.
    fn forget_ecn(&mut self) {
        let b = &mut self.bytes;
        if b[0] >> 4 == 4 {
            b[1] = 0;
            b[10..12].fill(0);
        } else {
            b[0] &= 0xf0;
            b[1] &= 0x0f;
        }
    }

    /// Whether an open packet, of which these are the first bytes, can be the one that `self` was deciphered from.
    pub(super) fn is(&self, open: &First) -> bool {
        let n = usize::from(open.len);
        open.len <= self.len && self.bytes.get(..n) == open.bytes.get(..n)
    }
}

/// No content in logs.
impl std::fmt::Debug for First {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "First({} bytes)", self.len)
    }
}

impl PartialEq for First {
    fn eq(&self, other: &First) -> bool {
        self.len == other.len && self.bytes == other.bytes
    }
}

impl Eq for First {}

/// Deciphers first bytes. Wiped when it is dropped, as the key schedules are.
pub(super) enum Opener {
    Cbc128(Aes128Dec),
    Cbc192(Aes192Dec),
    Cbc256(Aes256Dec),
    Gcm128(Aes128Enc, [u8; 4]),
    Gcm192(Aes192Enc, [u8; 4]),
    Gcm256(Aes256Enc, [u8; 4]),
}

impl Opener {
    /// For the SA; `None` when the suite is none of the engine's.
    pub(super) fn of(spec: &SaSpec) -> Option<Opener> {
        let key = &spec.keys.enc[..];
        match spec.suite {
            Suite::CipherHmac(Cipher::Cbc(_), _) => Some(match key.len() {
                16 => Opener::Cbc128(Aes128Dec::new_from_slice(key).ok()?),
                24 => Opener::Cbc192(Aes192Dec::new_from_slice(key).ok()?),
                _ => Opener::Cbc256(Aes256Dec::new_from_slice(key).ok()?),
            }),
            Suite::Gcm(..) => {
                let (key, salt) = key.split_last_chunk::<4>()?;
                Some(match key.len() {
                    16 => Opener::Gcm128(Aes128Enc::new_from_slice(key).ok()?, *salt),
                    24 => Opener::Gcm192(Aes192Enc::new_from_slice(key).ok()?, *salt),
                    _ => Opener::Gcm256(Aes256Enc::new_from_slice(key).ok()?, *salt),
                })
            }
            _ => None,
        }
    }

    /// The first bytes inside an ESP packet that ends with an ICV of `icv` bytes. Of a packet that is too short, none.
    pub(super) fn first(&self, esp: &[u8], icv: u16) -> First {
        let end = esp.len().saturating_sub(usize::from(icv));
        let body = esp.get(ESP_HEADER..end).unwrap_or_default();
        let (plain, len) = match self {
            Opener::Cbc128(aes) => cbc(aes, body),
            Opener::Cbc192(aes) => cbc(aes, body),
            Opener::Cbc256(aes) => cbc(aes, body),
            Opener::Gcm128(aes, salt) => gcm(aes, *salt, body),
            Opener::Gcm192(aes, salt) => gcm(aes, *salt, body),
            Opener::Gcm256(aes, salt) => gcm(aes, *salt, body),
        };
        First::of(plain.as_flattened().get(..len).unwrap_or_default())
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

/// Behind the IV; each block is masked with the ciphertext before it.
fn cbc(
    aes: &impl BlockCipherDecrypt<BlockSize = U16>,
    body: &[u8],
) -> ([[u8; BLOCK]; BLOCKS], usize) {
    let mut plain = [[0; BLOCK]; BLOCKS];
    let (chunks, _) = body.as_chunks::<BLOCK>();
    let blocks = chunks.len().saturating_sub(1).min(BLOCKS);
    for (to, from) in plain.iter_mut().zip(chunks.iter().skip(1)) {
        *to = *from;
    }
    if let Some(used) = plain.get_mut(..blocks) {
        aes.decrypt_blocks(Block::cast_slice_from_core_mut(used));
    }
    for (to, mask) in plain.iter_mut().zip(chunks).take(blocks) {
        for (a, b) in to.iter_mut().zip(mask) {
            *a ^= b;
        }
    }
    (plain, blocks * BLOCK)
}

/// RFC 4106: the nonce is salt and IV, and ciphering begins with block 2.
fn gcm(
    aes: &impl BlockCipherEncrypt<BlockSize = U16>,
    salt: [u8; 4],
    body: &[u8],
) -> ([[u8; BLOCK]; BLOCKS], usize) {
    let mut plain = [[0; BLOCK]; BLOCKS];
    let Some((iv, data)) = body.split_first_chunk::<8>() else {
        return (plain, 0);
    };
    for (block, number) in plain.iter_mut().zip(2u32..) {
        let (nonce, counter) = block.split_at_mut(12);
        nonce[..4].copy_from_slice(&salt);
        nonce[4..].copy_from_slice(iv);
        counter.copy_from_slice(&number.to_be_bytes());
    }
    aes.encrypt_blocks(Block::cast_slice_from_core_mut(&mut plain));
    let bytes = plain.as_flattened_mut().iter_mut().zip(data);
    let len = bytes.map(|(a, b)| *a ^= b).count();
    (plain, len)
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;
    use aes::cipher::{BlockModeEncrypt, KeyIvInit};
    use sa_store::sa::Direction;
    use sa_store::suite::{AeadIcv, AesBits, Hmac};

    fn packet(len: usize) -> Vec<u8> {
        let mut p: Vec<u8> = (0..=255).cycle().take(len).collect();
        p[0] = 0x45;
        p
    }

    #[test]
    fn what_was_sealed_is_known_by_its_first_bytes() {
        for bits in [AesBits::B128, AesBits::B192, AesBits::B256] {
            let suite = Suite::CipherHmac(Cipher::Cbc(bits), Hmac::Sha1_96);
            let spec = spec(Direction::In, suite);
            let opener = Opener::of(&spec).unwrap();
            for len in [30, 62, 1406] {
                let mut esp = vec![7; 24];
                let (key, iv) = (&spec.keys.enc[..], [7; 16]);
                let plain = packet(len);
                esp.extend(&match bits {
                    AesBits::B128 => seal::<aes::Aes128Enc>(key, iv, &plain),
                    AesBits::B192 => seal::<aes::Aes192Enc>(key, iv, &plain),
                    AesBits::B256 => seal::<aes::Aes256Enc>(key, iv, &plain),
                });
                esp.extend([0; 12]);
                let first = opener.first(&esp, 12);
                assert!(first.is(&First::of(&plain)), "{len}");
                let mut other = plain.clone();
                other[len.min(FIRST) - 1] ^= 1;
                assert!(!first.is(&First::of(&other)), "{len}");
                // Congestion marks are no difference.
                other = plain;
                other[1] |= 3;
                other[10] ^= 9;
                assert!(first.is(&First::of(&other)), "{len}");
            }
        }
    }

    fn seal<A>(key: &[u8], iv: [u8; 16], plain: &[u8]) -> Vec<u8>
    where
        A: BlockCipherEncrypt<BlockSize = U16> + KeyInit,
    {
        let mut data = plain.to_vec();
        data.resize((plain.len() + 2).next_multiple_of(16), 0);
        let (blocks, _) = data.as_chunks_mut::<16>();
        let mut cbc = cbc::Encryptor::<A>::new_from_slices(key, &iv).unwrap();
        cbc.encrypt_blocks(Block::cast_slice_from_core_mut(blocks));
        data
    }

    #[test]
    fn counter_mode_begins_with_the_second_block() {
        let suite = Suite::Gcm(AesBits::B128, AeadIcv::L16);
        let spec = spec(Direction::In, suite);
        let opener = Opener::of(&spec).unwrap();
        let plain = packet(100);
        let mut nonce = [1; 16];
        nonce[4..12].fill(9);
        nonce[12..].copy_from_slice(&2u32.to_be_bytes());
        let mut data = plain.clone();
        let key = &spec.keys.enc[..16];
        let mut ctr = ctr::Ctr32BE::<aes::Aes128>::new_from_slices(key, &nonce).unwrap();
        aes::cipher::StreamCipher::apply_keystream(&mut ctr, &mut data);
        let esp = [&[0; 8][..], &[9; 8], &data, &[0; 16]].concat();
        assert!(opener.first(&esp, 16).is(&First::of(&plain)));
    }

    #[test]
    fn packets_that_are_too_short_have_no_first_bytes() {
        let opener = Opener::of(&spec(Direction::In, super::super::tests::CBC)).unwrap();
        for len in 0..52 {
            let first = opener.first(&vec![0; len], 12);
            assert_eq!(first.len, 0, "{len}");
        }
    }
}
