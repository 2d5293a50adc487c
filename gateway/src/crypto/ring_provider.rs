//! The ring provider: AES-128/256-GCM with 16-byte ICV, the matching AES-GMAC, ChaCha20-Poly1305.
//!
//! ring has no AES-192. It does not wipe its keys either, so that is done here.

use ::ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag,
    UnboundKey,
};
use ipsec_mb::wipe::Wiped;
use sa_store::cipher::SaCipher;
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AeadIcv, AesBits, Suite};

use super::aead::{Aead96, AeadPacket, GmacPacket, Raw};
use super::each::Each;
use super::provider::{Provider, ProviderId, RawAead, key_and_salt, suite_code};

/// The provider; it has no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ring;

impl Provider for Ring {
    fn id(&self) -> ProviderId {
        ProviderId::Ring
    }

    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        _direction: Direction,
    ) -> Option<Box<dyn SaCipher>> {
        let lane = self.id().lane(suite_code(suite));
        let (key, salt) = key_and_salt(&keys.enc)?;
        let aead = Key::new(suite, key)?;
        Some(if matches!(suite, Suite::Gmac(_)) {
            let gcm = aead;
            Each::boxed(lane, GmacPacket { gcm, salt, esn })
        } else {
            Each::boxed(lane, AeadPacket { aead, salt, esn })
        })
    }

    fn raw_aead(&self, suite: Suite, key: &[u8]) -> Option<Box<dyn RawAead>> {
        Some(Box::new(Raw(Key::new(suite, key)?)))
    }
}

fn algorithm(suite: Suite) -> Option<&'static Algorithm> {
    match suite {
        Suite::Gcm(AesBits::B128, AeadIcv::L16) | Suite::Gmac(AesBits::B128) => Some(&AES_128_GCM),
        Suite::Gcm(AesBits::B256, AeadIcv::L16) | Suite::Gmac(AesBits::B256) => Some(&AES_256_GCM),
        Suite::ChaCha20Poly1305 => Some(&CHACHA20_POLY1305),
        Suite::Gcm(..) | Suite::Gmac(AesBits::B192) | Suite::CipherHmac(..) => None,
    }
}

struct Key(Wiped<LessSafeKey>);

impl Key {
    fn new(suite: Suite, key: &[u8]) -> Option<Self> {
        let unbound = UnboundKey::new(algorithm(suite)?, key).ok()?;
        Some(Self(Wiped::new(LessSafeKey::new(unbound))))
    }
}

impl Aead96<16> for Key {
    #[inline]
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Option<[u8; 16]> {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce, Aad::from(aad), data);
        tag.ok()?.as_ref().try_into().ok()
    }

    #[inline]
    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; 16]) -> bool {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        self.0
            .open_in_place_separate_tag(nonce, Aad::from(aad), Tag::from(*tag), data, 0..)
            .is_ok()
    }
}
