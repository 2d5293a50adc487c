//! The RustCrypto provider: every suite on every CPU, and the reference that other providers are checked against.

mod gcm;
mod hmac;

use aes::{Aes128, Aes192, Aes256};
use sa_store::cipher::SaCipher;
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AesBits, Suite};

use super::aead::{AeadPacket, Raw};
use super::each::{Each, OnePacket};
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
                Some(Each::boxed(lane, AeadPacket::<_, 16> { aead, salt, esn }))
            }
            Suite::CipherHmac(cipher, mac) => hmac::make(lane, cipher, mac, keys, esn),
        }
    }

    fn raw_aead(&self, suite: Suite, key: &[u8]) -> Option<Box<dyn RawAead>> {
        match suite {
            Suite::Gcm(AesBits::B128, icv) => gcm::raw::<Aes128>(key, icv),
            Suite::Gcm(AesBits::B192, icv) => gcm::raw::<Aes192>(key, icv),
            Suite::Gcm(AesBits::B256, icv) => gcm::raw::<Aes256>(key, icv),
            Suite::ChaCha20Poly1305 => Some(Box::new(Raw::<_, 16>(gcm::chacha(key)?))),
            Suite::Gmac(_) | Suite::CipherHmac(..) => None,
        }
    }
}
