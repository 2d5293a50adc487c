//! Suites from a cipher's and an authenticator's names.

use crate::file::fault::Fault;
use crate::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};

/// AES with a key of so many bytes.
pub(in crate::import) fn aes(bytes: usize) -> Option<AesBits> {
    [AesBits::B128, AesBits::B192, AesBits::B256]
        .into_iter()
        .find(|b| b.key_len() == bytes)
}

/// What is ciphered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::import) enum Enc {
    Null,
    Cbc,
    Ctr,
    Gcm(AeadIcv),
    Gmac,
    ChaCha,
}

/// The suite of a cipher, its key length in bytes (salt included) and an authenticator.
pub(in crate::import) fn suite(
    enc: Enc,
    key_len: usize,
    auth: Option<Hmac>,
) -> Result<Suite, Fault> {
    let salted = || aes(key_len.saturating_sub(4)).ok_or_else(|| no_such_key(key_len, 4));
    match (enc, auth) {
        (Enc::Gcm(icv), None) => Ok(Suite::Gcm(salted()?, icv)),
        (Enc::Gmac, None) => Ok(Suite::Gmac(salted()?)),
        (Enc::ChaCha, None) => Ok(Suite::ChaCha20Poly1305),
        (Enc::Gcm(_) | Enc::Gmac | Enc::ChaCha, Some(_)) => Err(Fault::Unsupported(
            "an AEAD has its own integrity: remove the authentication algorithm".into(),
        )),
        (_, None) => Err(Fault::NoIntegrity("a cipher without authentication".into())),
        (Enc::Null, Some(h)) => Ok(Suite::CipherHmac(Cipher::Null, h)),
        (Enc::Cbc, Some(h)) => {
            let bits = aes(key_len).ok_or_else(|| no_such_key(key_len, 0))?;
            Ok(Suite::CipherHmac(Cipher::Cbc(bits), h))
        }
        (Enc::Ctr, Some(h)) => Ok(Suite::CipherHmac(Cipher::Ctr(salted()?), h)),
    }
}

/// The GCM ICV of so many bits.
pub(in crate::import) fn icv(bits: u32) -> Option<AeadIcv> {
    [AeadIcv::L8, AeadIcv::L12, AeadIcv::L16]
        .into_iter()
        .find(|i| u32::try_from(i.bytes() * 8) == Ok(bits))
}

/// An algorithm that we do not have.
pub(in crate::import) fn unknown(what: &str, got: &str, known: &str) -> Fault {
    Fault::BadValue {
        key: what.into(),
        got: crate::file::value::shown(got),
        suggestion: crate::file::fault::nearest(got, known.split(", ")),
        want: format!("one of {known}"),
    }
}

fn no_such_key(len: usize, salt: usize) -> Fault {
    Fault::Unsupported(format!(
        "AES has keys of 16, 24 and 32 bytes{}; here are {len}",
        if salt > 0 {
            ", here with 4 bytes of salt behind"
        } else {
            ""
        }
    ))
}
