//! What a crypto provider is, and the small things that all of them need.

use std::fmt;
use std::str::FromStr;

use sa_store::cipher::{CipherError, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};

/// The providers that this build may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProviderId {
    /// intel-ipsec-mb, when its library was present at build time.
    IpsecMb,
    /// aws-lc-rs.
    AwsLc,
    /// ring.
    Ring,
    /// RustCrypto crates: portable, offers every suite, the reference for the others.
    RustCrypto,
}

impl ProviderId {
    /// Every provider, fastest first as far as that is known before measuring.
    pub const ALL: [Self; 4] = [Self::IpsecMb, Self::AwsLc, Self::Ring, Self::RustCrypto];

    /// Name in the configuration, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::IpsecMb => "ipsec-mb",
            Self::AwsLc => "aws-lc",
            Self::Ring => "ring",
            Self::RustCrypto => "rustcrypto",
        }
    }

    /// Lane number of one of this provider's context types, see [`SaCipher::lane`].
    pub(super) const fn lane(self, family: u8) -> u16 {
        let provider: u16 = match self {
            Self::IpsecMb => 1,
            Self::AwsLc => 2,
            Self::Ring => 3,
            Self::RustCrypto => 4,
        };
        // Widening; `u16::from` is not const.
        #[allow(clippy::cast_lossless)]
        {
            (provider << 8) | family as u16
        }
    }
}

impl fmt::Display for ProviderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is not the name of a provider.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown crypto provider \"{0}\"; one of ipsec-mb, aws-lc, ring, rustcrypto")]
pub struct UnknownProvider(pub String);

impl FromStr for ProviderId {
    type Err = UnknownProvider;

    fn from_str(s: &str) -> Result<Self, UnknownProvider> {
        Self::ALL
            .into_iter()
            .find(|p| p.name() == s)
            .ok_or_else(|| UnknownProvider(s.to_owned()))
    }
}

/// Makes contexts of the suites that it offers on this CPU.
pub trait Provider: Send + Sync {
    /// Which provider it is.
    fn id(&self) -> ProviderId;

    /// A context for `suite`, or `None` when the provider does not offer it. The key lengths were
    /// checked with [`check_keys`].
    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        direction: Direction,
    ) -> Option<Box<dyn SaCipher>>;

    /// The bare AEAD under a suite, for test vectors whose associated data ESP cannot carry.
    #[doc(hidden)]
    fn raw_aead(&self, suite: Suite, key: &[u8]) -> Option<Box<dyn RawAead>>;
}

/// A bare AEAD with a 96-bit nonce and a detached tag of the suite's ICV length.
#[doc(hidden)]
pub trait RawAead {
    /// Encrypts `data` in place, returns the tag.
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Vec<u8>;
    /// Decrypts `data` in place if `tag` is right.
    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8]) -> bool;
}

/// Refuses key material whose length is not the suite's.
pub(super) fn check_keys(suite: Suite, keys: &SaKeys) -> Result<(), CipherError> {
    let pairs = [
        (suite.enc_key_len(), keys.enc.len()),
        (suite.auth_key_len(), keys.auth.len()),
    ];
    for (want, got) in pairs {
        if want != got {
            return Err(CipherError::KeyLength { suite, want, got });
        }
    }
    Ok(())
}

/// Key and 4-byte salt (or nonce) of the AEAD and CTR suites.
pub(super) fn key_and_salt(material: &[u8]) -> Option<(&[u8], [u8; 4])> {
    let (key, salt) = material.split_last_chunk::<4>()?;
    Some((key, *salt))
}

/// A small number that tells suites apart, for lanes.
pub(super) const fn suite_code(suite: Suite) -> u8 {
    match suite {
        Suite::Gcm(b, i) => {
            bits_code(b) * 4
                + match i {
                    AeadIcv::L8 => 0,
                    AeadIcv::L12 => 1,
                    AeadIcv::L16 => 2,
                }
        }
        Suite::Gmac(b) => 0x20 + bits_code(b),
        Suite::ChaCha20Poly1305 => 0x30,
        Suite::CipherHmac(c, h) => {
            let cipher = match c {
                Cipher::Null => 0,
                Cipher::Cbc(b) => 1 + bits_code(b),
                Cipher::Ctr(b) => 4 + bits_code(b),
            };
            let hmac = match h {
                Hmac::Sha1_96 => 0,
                Hmac::Sha256_128 => 1,
                Hmac::Sha384_192 => 2,
                Hmac::Sha512_256 => 3,
            };
            0x40 + cipher * 4 + hmac
        }
    }
}

const fn bits_code(b: AesBits) -> u8 {
    match b {
        AesBits::B128 => 0,
        AesBits::B192 => 1,
        AesBits::B256 => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn suite_codes_are_distinct() {
        let codes: HashSet<u8> = Suite::all().into_iter().map(suite_code).collect();
        assert_eq!(codes.len(), Suite::all().len());
    }

    #[test]
    fn provider_names_parse_back() {
        for p in ProviderId::ALL {
            assert_eq!(p.name().parse(), Ok(p));
        }
        assert!("openssl".parse::<ProviderId>().is_err());
    }
}
