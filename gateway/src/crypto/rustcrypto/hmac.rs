//! AES-CBC, AES-CTR or NULL with HMAC: encrypt, then authenticate.

use ::hmac::{EagerHash, Hmac, KeyInit, Mac};
use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{
    BlockCipherDecrypt, BlockModeDecrypt, BlockModeEncrypt, InOutBuf, InnerIvInit, StreamCipherCore,
};
use aes::{Aes128, Aes192, Aes256};
use sa_store::cipher::SaCipher;
use sa_store::sa::SaKeys;
use sa_store::suite::{self, AesBits, Cipher};
use sha1::Sha1;
use sha2::{Sha256, Sha384, Sha512};
use subtle::ConstantTimeEq;

use super::gcm::Aes;
use super::{Each, OnePacket, key_and_salt};
use crate::crypto::packet::split;

/// A context for one cipher-plus-HMAC suite.
pub(super) fn make(
    lane: u16,
    cipher: Cipher,
    mac: suite::Hmac,
    keys: &SaKeys,
    esn: bool,
) -> Option<Box<dyn SaCipher>> {
    let enc: &[u8] = &keys.enc;
    match cipher {
        Cipher::Null => with_mac::<0, _>(lane, Null, mac, keys, esn),
        Cipher::Cbc(AesBits::B128) => {
            with_mac::<16, _>(lane, Cbc::<Aes128>::new(enc)?, mac, keys, esn)
        }
        Cipher::Cbc(AesBits::B192) => {
            with_mac::<16, _>(lane, Cbc::<Aes192>::new(enc)?, mac, keys, esn)
        }
        Cipher::Cbc(AesBits::B256) => {
            with_mac::<16, _>(lane, Cbc::<Aes256>::new(enc)?, mac, keys, esn)
        }
        Cipher::Ctr(AesBits::B128) => {
            with_mac::<8, _>(lane, Ctr::<Aes128>::new(enc)?, mac, keys, esn)
        }
        Cipher::Ctr(AesBits::B192) => {
            with_mac::<8, _>(lane, Ctr::<Aes192>::new(enc)?, mac, keys, esn)
        }
        Cipher::Ctr(AesBits::B256) => {
            with_mac::<8, _>(lane, Ctr::<Aes256>::new(enc)?, mac, keys, esn)
        }
    }
}

fn with_mac<const IV: usize, C: BodyCipher<IV>>(
    lane: u16,
    cipher: C,
    mac: suite::Hmac,
    keys: &SaKeys,
    esn: bool,
) -> Option<Box<dyn SaCipher>> {
    let key: &[u8] = &keys.auth;
    Some(match mac {
        suite::Hmac::Sha1_96 => {
            let mac = Keyed::<Sha1>::new(key)?;
            Each::boxed(lane, Chained::<_, _, IV, 12> { cipher, mac, esn })
        }
        suite::Hmac::Sha256_128 => {
            let mac = Keyed::<Sha256>::new(key)?;
            Each::boxed(lane, Chained::<_, _, IV, 16> { cipher, mac, esn })
        }
        suite::Hmac::Sha384_192 => {
            let mac = Keyed::<Sha384>::new(key)?;
            Each::boxed(lane, Chained::<_, _, IV, 24> { cipher, mac, esn })
        }
        suite::Hmac::Sha512_256 => {
            let mac = Keyed::<Sha512>::new(key)?;
            Each::boxed(lane, Chained::<_, _, IV, 32> { cipher, mac, esn })
        }
    })
}

/// Encrypt-then-MAC over header, IV and ciphertext.
struct Chained<C, D: EagerHash, const IV: usize, const ICV: usize> {
    cipher: C,
    mac: Keyed<D>,
    esn: bool,
}

impl<C, D: EagerHash, const IV: usize, const ICV: usize> Chained<C, D, IV, ICV> {
    /// RFC 4303 section 2.8: the high half of the sequence number follows the packet implicitly.
    fn seq_hi(&self, seq_hi: u32) -> Option<u32> {
        self.esn.then_some(seq_hi)
    }
}

impl<C, D, const IV: usize, const ICV: usize> OnePacket for Chained<C, D, IV, ICV>
where
    C: BodyCipher<IV>,
    D: EagerHash + Send + Sync + 'static,
    D::Core: Send + Sync,
{
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<IV, ICV>(esp) else {
            return false;
        };
        if !self.cipher.encrypt(p.iv, p.body) {
            return false;
        }
        let Some((packet, icv)) = esp.split_last_chunk_mut::<ICV>() else {
            return false;
        };
        self.mac.icv(packet, self.seq_hi(seq_hi), icv)
    }

    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some((packet, icv)) = esp.split_last_chunk::<ICV>() else {
            return false;
        };
        let mut want = [0; ICV];
        let right: bool = self.mac.icv(packet, self.seq_hi(seq_hi), &mut want)
            && want.ct_eq(icv.as_slice()).into();
        if !right {
            return false;
        }
        let Some(p) = split::<IV, ICV>(esp) else {
            return false;
        };
        self.cipher.decrypt(p.iv, p.body)
    }
}

/// HMAC whose two key blocks are hashed already.
struct Keyed<D: EagerHash>(Hmac<D>);

impl<D: EagerHash> Keyed<D> {
    fn new(key: &[u8]) -> Option<Self> {
        Hmac::new_from_slice(key).ok().map(Self)
    }

    /// Writes the truncated MAC; false if it is shorter than the ICV.
    fn icv<const ICV: usize>(
        &self,
        packet: &[u8],
        seq_hi: Option<u32>,
        icv: &mut [u8; ICV],
    ) -> bool {
        let mut mac = self.0.clone();
        mac.update(packet);
        if let Some(hi) = seq_hi {
            mac.update(&hi.to_be_bytes());
        }
        match mac.finalize().into_bytes().first_chunk() {
            Some(truncated) => {
                *icv = *truncated;
                true
            }
            None => false,
        }
    }
}

/// A cipher over the body of a packet, with an `IV`-byte IV on the wire.
trait BodyCipher<const IV: usize>: Send + Sync + 'static {
    /// False, and unchanged, when the length does not fit the cipher's block.
    fn encrypt(&self, iv: &[u8; IV], body: &mut [u8]) -> bool;
    /// Likewise.
    fn decrypt(&self, iv: &[u8; IV], body: &mut [u8]) -> bool;
}

/// RFC 2410.
struct Null;

impl BodyCipher<0> for Null {
    fn encrypt(&self, _iv: &[u8; 0], _body: &mut [u8]) -> bool {
        true
    }

    fn decrypt(&self, _iv: &[u8; 0], _body: &mut [u8]) -> bool {
        true
    }
}

/// RFC 3602.
struct Cbc<A>(A);

impl<A: Aes> Cbc<A> {
    fn new(key: &[u8]) -> Option<Self> {
        A::new_from_slice(key).ok().map(Self)
    }
}

/// The body as whole blocks, if it is that.
fn blocks(body: &mut [u8]) -> Option<InOutBuf<'_, '_, Array<u8, U16>>> {
    let (blocks, tail) = InOutBuf::from(body).into_chunks();
    tail.is_empty().then_some(blocks)
}

impl<A: Aes + BlockCipherDecrypt> BodyCipher<16> for Cbc<A> {
    fn encrypt(&self, iv: &[u8; 16], body: &mut [u8]) -> bool {
        let Some(blocks) = blocks(body) else {
            return false;
        };
        cbc::Encryptor::inner_iv_init(&self.0, &Array(*iv)).encrypt_blocks_inout(blocks);
        true
    }

    fn decrypt(&self, iv: &[u8; 16], body: &mut [u8]) -> bool {
        let Some(blocks) = blocks(body) else {
            return false;
        };
        cbc::Decryptor::inner_iv_init(&self.0, &Array(*iv)).decrypt_blocks_inout(blocks);
        true
    }
}

/// RFC 3686.
struct Ctr<A> {
    aes: A,
    nonce: [u8; 4],
}

impl<A: Aes> Ctr<A> {
    fn new(material: &[u8]) -> Option<Self> {
        let (key, nonce) = key_and_salt(material)?;
        let aes = A::new_from_slice(key).ok()?;
        Some(Self { aes, nonce })
    }
}

impl<A: Aes> BodyCipher<8> for Ctr<A> {
    fn encrypt(&self, iv: &[u8; 8], body: &mut [u8]) -> bool {
        let mut block = [0; 16];
        block[..4].copy_from_slice(&self.nonce);
        block[4..12].copy_from_slice(iv);
        block[15] = 1;
        ctr::CtrCore::<_, ctr::flavors::Ctr32BE>::inner_iv_init(&self.aes, &Array(block))
            .apply_keystream_partial(body.into());
        true
    }

    fn decrypt(&self, iv: &[u8; 8], body: &mut [u8]) -> bool {
        self.encrypt(iv, body)
    }
}
