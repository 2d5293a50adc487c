//! Cipher suites of ESP: what each algorithm needs on the wire and as key material.
//!
//! A [`Suite`] can only hold a combination that RFC 4303 and its algorithm RFCs allow, so that code
//! below it never meets "NULL cipher without authentication".

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest IV of any suite, bytes.
pub const MAX_IV: usize = 16;
/// Longest ICV of any suite, bytes (HMAC-SHA2-512-256).
pub const MAX_ICV: usize = 32;
/// Longest padding RFC 4303 section 2.4 allows, bytes.
pub const MAX_PAD: usize = 255;

/// AES key length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AesBits {
    /// 128-bit key.
    B128,
    /// 192-bit key.
    B192,
    /// 256-bit key.
    B256,
}

impl AesBits {
    /// Key length in bytes.
    pub const fn key_len(self) -> usize {
        match self {
            Self::B128 => 16,
            Self::B192 => 24,
            Self::B256 => 32,
        }
    }

    /// Key length in bits, for names.
    pub const fn bits(self) -> u16 {
        match self {
            Self::B128 => 128,
            Self::B192 => 192,
            Self::B256 => 256,
        }
    }
}

/// Truncated ICV length of an AEAD, RFC 4106 section 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AeadIcv {
    /// 8 bytes.
    L8,
    /// 12 bytes.
    L12,
    /// 16 bytes.
    L16,
}

impl AeadIcv {
    /// ICV length in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::L8 => 8,
            Self::L12 => 12,
            Self::L16 => 16,
        }
    }
}

/// Cipher of a cipher-plus-HMAC suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Cipher {
    /// RFC 2410.
    Null,
    /// AES-CBC, RFC 3602.
    Cbc(AesBits),
    /// AES-CTR, RFC 3686 (key material ends with a 4-byte nonce).
    Ctr(AesBits),
}

/// Integrity algorithm of a cipher-plus-HMAC suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Hmac {
    /// HMAC-SHA1-96, RFC 2404.
    Sha1_96,
    /// HMAC-SHA2-256-128, RFC 4868.
    Sha256_128,
    /// HMAC-SHA2-384-192, RFC 4868.
    Sha384_192,
    /// HMAC-SHA2-512-256, RFC 4868.
    Sha512_256,
}

impl Hmac {
    /// Key length that RFC 4868 (RFC 2404 for SHA-1) fixes, bytes.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Sha1_96 => 20,
            Self::Sha256_128 => 32,
            Self::Sha384_192 => 48,
            Self::Sha512_256 => 64,
        }
    }

    /// ICV length in bytes.
    pub const fn icv_len(self) -> usize {
        match self {
            Self::Sha1_96 => 12,
            Self::Sha256_128 => 16,
            Self::Sha384_192 => 24,
            Self::Sha512_256 => 32,
        }
    }
}

/// One valid combination of algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Suite {
    /// AES-GCM, RFC 4106: key material is key then 4-byte salt.
    Gcm(AesBits, AeadIcv),
    /// AES-GMAC, RFC 4543: integrity only, 16-byte ICV, 8-byte IV; key then 4-byte salt.
    Gmac(AesBits),
    /// ChaCha20-Poly1305, RFC 7634: 32-byte key then 4-byte salt, 16-byte ICV.
    ChaCha20Poly1305,
    /// Cipher and HMAC. NULL is allowed here because an HMAC is always present.
    CipherHmac(Cipher, Hmac),
}

impl Suite {
    /// Length of the encryption key material including salt or nonce, bytes. 0 for NULL.
    pub const fn enc_key_len(self) -> usize {
        match self {
            Self::Gcm(b, _) | Self::Gmac(b) => b.key_len() + 4,
            Self::ChaCha20Poly1305 => 36,
            Self::CipherHmac(Cipher::Null, _) => 0,
            Self::CipherHmac(Cipher::Cbc(b), _) => b.key_len(),
            Self::CipherHmac(Cipher::Ctr(b), _) => b.key_len() + 4,
        }
    }

    /// Length of the separate integrity key, bytes. 0 for AEADs.
    pub const fn auth_key_len(self) -> usize {
        match self {
            Self::CipherHmac(_, h) => h.key_len(),
            _ => 0,
        }
    }

    /// Length of the IV on the wire, bytes.
    pub const fn iv_len(self) -> usize {
        match self {
            Self::Gcm(..) | Self::Gmac(_) | Self::ChaCha20Poly1305 => 8,
            Self::CipherHmac(Cipher::Null, _) => 0,
            Self::CipherHmac(Cipher::Cbc(_), _) => 16,
            Self::CipherHmac(Cipher::Ctr(_), _) => 8,
        }
    }

    /// Length of the ICV on the wire, bytes.
    pub const fn icv_len(self) -> usize {
        match self {
            Self::Gcm(_, i) => i.bytes(),
            Self::Gmac(_) | Self::ChaCha20Poly1305 => 16,
            Self::CipherHmac(_, h) => h.icv_len(),
        }
    }

    /// Alignment that payload + padding + 2 must have: the cipher's block, at least 4 (RFC 4303 2.4).
    pub const fn pad_align(self) -> usize {
        match self {
            Self::CipherHmac(Cipher::Cbc(_), _) => 16,
            _ => 4,
        }
    }

    /// Whether a repeated IV under one key breaks the suite, so that a sequence lease is required.
    pub const fn is_counter_mode(self) -> bool {
        !matches!(self, Self::CipherHmac(Cipher::Null | Cipher::Cbc(_), _))
    }

    /// Every suite, for tests and tables.
    pub fn all() -> Vec<Suite> {
        let bits = [AesBits::B128, AesBits::B192, AesBits::B256];
        let mut v = Vec::new();
        for b in bits {
            for i in [AeadIcv::L8, AeadIcv::L12, AeadIcv::L16] {
                v.push(Self::Gcm(b, i));
            }
        }
        v.extend(bits.map(Self::Gmac));
        v.push(Self::ChaCha20Poly1305);
        let ciphers = [Cipher::Null]
            .into_iter()
            .chain(bits.map(Cipher::Cbc))
            .chain(bits.map(Cipher::Ctr));
        for c in ciphers {
            for h in [
                Hmac::Sha1_96,
                Hmac::Sha256_128,
                Hmac::Sha384_192,
                Hmac::Sha512_256,
            ] {
                v.push(Self::CipherHmac(c, h));
            }
        }
        v
    }
}

impl fmt::Display for Suite {
    /// The name used in SA files, for example `aes-128-gcm-16`, `aes-256-cbc+hmac-sha2-256-128`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gcm(b, i) => write!(f, "aes-{}-gcm-{}", b.bits(), i.bytes()),
            Self::Gmac(b) => write!(f, "aes-{}-gmac", b.bits()),
            Self::ChaCha20Poly1305 => f.write_str("chacha20-poly1305"),
            Self::CipherHmac(c, h) => {
                match c {
                    Cipher::Null => f.write_str("null")?,
                    Cipher::Cbc(b) => write!(f, "aes-{}-cbc", b.bits())?,
                    Cipher::Ctr(b) => write!(f, "aes-{}-ctr", b.bits())?,
                }
                f.write_str(match h {
                    Hmac::Sha1_96 => "+hmac-sha1-96",
                    Hmac::Sha256_128 => "+hmac-sha2-256-128",
                    Hmac::Sha384_192 => "+hmac-sha2-384-192",
                    Hmac::Sha512_256 => "+hmac-sha2-512-256",
                })
            }
        }
    }
}

/// The text is not the name of a suite.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "unknown suite \"{0}\"; one of aes-{{128,192,256}}-gcm-{{8,12,16}}, aes-{{128,192,256}}-gmac, chacha20-poly1305, {{null,aes-N-cbc,aes-N-ctr}}+hmac-{{sha1-96,sha2-256-128,sha2-384-192,sha2-512-256}}"
)]
pub struct UnknownSuite(pub String);

impl std::str::FromStr for Suite {
    type Err = UnknownSuite;

    fn from_str(s: &str) -> Result<Self, UnknownSuite> {
        Self::all()
            .into_iter()
            .find(|suite| suite.to_string() == s)
            .ok_or_else(|| UnknownSuite(s.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_name_parses_back() {
        for s in Suite::all() {
            assert_eq!(s.to_string().parse(), Ok(s));
        }
    }

    #[test]
    fn null_without_integrity_cannot_be_named() {
        assert!("null".parse::<Suite>().is_err());
    }
}
