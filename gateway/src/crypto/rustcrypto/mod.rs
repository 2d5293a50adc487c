//! The RustCrypto provider: every suite on every CPU, and the reference that other providers are checked against.

mod gcm;
mod hmac;

use aes::{Aes128, Aes192, Aes256};
use sa_store::cipher::SaCipher;
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AesBits, Suite};

use super::each::{Each, OnePacket};
use super::packet::{Aad, nonce, split};
use super::provider::{Provider, ProviderId, RawAead, key_and_salt, suite_code};

/// The provider; it has no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct RustCrypto;

impl Provider for RustCrypto {
    fn id(&self) -> ProviderId {
        ProviderId::RustCrypto
    }

    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        _direction: Direction,
    ) -> Option<Box<dyn SaCipher>> {
        let lane = ProviderId::RustCrypto.lane(suite_code(suite));
        match suite {
            Suite::Gcm(bits, icv) => {
                let (key, salt) = key_and_salt(&keys.enc)?;
                match bits {
                    AesBits::B128 => gcm::make::<Aes128>(lane, key, salt, icv, esn),
                    AesBits::B192 => gcm::make::<Aes192>(lane, key, salt, icv, esn),
                    AesBits::B256 => gcm::make::<Aes256>(lane, key, salt, icv, esn),
                }
            }
            Suite::Gmac(bits) => {
                let (key, salt) = key_and_salt(&keys.enc)?;
                match bits {
                    AesBits::B128 => gcm::make_gmac::<Aes128>(lane, key, salt, esn),
                    AesBits::B192 => gcm::make_gmac::<Aes192>(lane, key, salt, esn),
                    AesBits::B256 => gcm::make_gmac::<Aes256>(lane, key, salt, esn),
                }
            }
            Suite::ChaCha20Poly1305 => {
                let (key, salt) = key_and_salt(&keys.enc)?;
                let aead = gcm::chacha(key)?;
                Some(Each::boxed(lane, AeadPacket { aead, salt, esn }))
            }
            Suite::CipherHmac(cipher, mac) => hmac::make(lane, cipher, mac, keys, esn),
        }
    }

    fn raw_aead(&self, suite: Suite, key: &[u8]) -> Option<Box<dyn RawAead>> {
        match suite {
            Suite::Gcm(AesBits::B128, icv) => gcm::raw::<Aes128>(key, icv),
            Suite::Gcm(AesBits::B192, icv) => gcm::raw::<Aes192>(key, icv),
            Suite::Gcm(AesBits::B256, icv) => gcm::raw::<Aes256>(key, icv),
            Suite::ChaCha20Poly1305 => Some(Box::new(Raw(gcm::chacha(key)?))),
            Suite::Gmac(_) | Suite::CipherHmac(..) => None,
        }
    }
}

/// An AEAD with a 96-bit nonce and an `ICV`-byte tag, keyed.
trait Aead96<const ICV: usize>: Send + Sync + 'static {
    /// Encrypts in place and returns the tag.
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Option<[u8; ICV]>;
    /// Compares the tag in constant time, then decrypts in place.
    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; ICV]) -> bool;
}

/// An AEAD as ESP uses it (RFC 4106, RFC 7634).
struct AeadPacket<A> {
    aead: A,
    salt: [u8; 4],
    esn: bool,
}

/// Binds the tag length to the AEAD type, so that one packet adapter fits all lengths.
struct Tagged<A, const ICV: usize>(A);

impl<A: Aead96<ICV>, const ICV: usize> OnePacket for AeadPacket<Tagged<A, ICV>> {
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, ICV>(esp) else {
            return false;
        };
        let aad = Aad::new(p.head, self.esn, seq_hi);
        let sealed = self
            .aead
            .0
            .seal(&nonce(self.salt, p.iv), aad.as_slice(), p.body);
        let Some(tag) = sealed else { return false };
        *p.icv = tag;
        true
    }

    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, ICV>(esp) else {
            return false;
        };
        let aad = Aad::new(p.head, self.esn, seq_hi);
        self.aead
            .0
            .open(&nonce(self.salt, p.iv), aad.as_slice(), p.body, p.icv)
    }
}

/// [`RawAead`] over an [`Aead96`].
struct Raw<A>(A);

impl<A: Aead96<ICV>, const ICV: usize> RawAead for Raw<Tagged<A, ICV>> {
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Vec<u8> {
        let tag = self.0.0.seal(nonce, aad, data);
        tag.map_or_else(Vec::new, Vec::from)
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8]) -> bool {
        <&[u8; ICV]>::try_from(tag).is_ok_and(|tag| self.0.0.open(nonce, aad, data, tag))
    }
}
