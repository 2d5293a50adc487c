//! Algorithms by the names of the kernel's crypto API.

use crate::file::fault::{Fault, Location};
use crate::file::value::shown;
use crate::import::algorithms::{Enc, icv, suite, unknown};
use crate::import::words::{Word, key};
use crate::sa::SaKeys;
use crate::suite::{Hmac, Suite};

use super::state::StateWords;
use super::{Fail, lacking, unsupported};

const ENCS: &str = "cbc(aes), rfc3686(ctr(aes)), ecb(cipher_null)";
const AUTHS: &str = "hmac(sha1), hmac(sha256), hmac(sha384), hmac(sha512)";
const AEADS: &str = "rfc4106(gcm(aes)), rfc4543(gcm(aes)), rfc7539esp(chacha20,poly1305)";

/// What an AEAD of the kernel's is; `None` for a name that we do not know, `Some(None)` for an ICV that it does not have.
fn aead(name: &str, icv_bits: u32) -> Option<Option<Enc>> {
    Some(match (name, icv_bits) {
        ("rfc4106(gcm(aes))", b) => icv(b).map(Enc::Gcm),
        ("rfc4543(gcm(aes))", 128) => Some(Enc::Gmac),
        ("rfc7539esp(chacha20,poly1305)", 128) => Some(Enc::ChaCha),
        ("rfc4543(gcm(aes))" | "rfc7539esp(chacha20,poly1305)", _) => None,
        _ => return None,
    })
}

/// A cipher without integrity of its own.
fn cipher(name: &str) -> Option<Enc> {
    match name {
        "cbc(aes)" | "aes" => Some(Enc::Cbc),
        "rfc3686(ctr(aes))" => Some(Enc::Ctr),
        "ecb(cipher_null)" | "cipher_null" => Some(Enc::Null),
        _ => None,
    }
}

/// An authenticator, and the bits that Linux truncates it to unless told: for SHA-256 they are not RFC 4868's.
fn authenticator(name: &str) -> Option<(Hmac, u32)> {
    match name {
        "hmac(sha1)" | "sha1" => Some((Hmac::Sha1_96, 96)),
        "hmac(sha256)" | "sha256" => Some((Hmac::Sha256_128, 96)),
        "hmac(sha384)" => Some((Hmac::Sha384_192, 192)),
        "hmac(sha512)" => Some((Hmac::Sha512_256, 256)),
        _ => None,
    }
}

fn truncated(name: &str, hmac: Hmac, bits: u32) -> Result<(), String> {
    let ours = hmac.icv_len() * 8;
    if u32::try_from(ours) == Ok(bits) {
        return Ok(());
    }
    Err(format!(
        "{} truncated to {bits} bits is not offered; RFC 4868 wants auth-trunc … {ours}",
        shown(name)
    ))
}

/// Algorithms of an SA as the kernel's crypto API names them.
#[derive(Clone, Copy, Debug)]
pub enum KernelAlgorithms<'n> {
    /// Name, ICV in bits.
    Aead(&'n str, u32),
    /// Names of cipher and authenticator, ICV in bits.
    Pair(&'n str, &'n str, u32),
}

/// The suite of an SA in the kernel. `key_len`: of the cipher's key with its salt, bytes.
///
/// # Errors
/// What we do not have, in words.
pub fn kernel_suite(algorithms: KernelAlgorithms<'_>, key_len: usize) -> Result<Suite, String> {
    let unknown = |name| format!("{} is not offered", shown(name));
    let (enc, hmac) = match algorithms {
        KernelAlgorithms::Aead(name, bits) => {
            let enc = aead(name, bits).ok_or_else(|| unknown(name))?;
            let no_icv = || format!("{} has no ICV of {bits} bits", shown(name));
            (enc.ok_or_else(no_icv)?, None)
        }
        KernelAlgorithms::Pair(name, auth, bits) => {
            let enc = cipher(name).ok_or_else(|| unknown(name))?;
            let (hmac, _) = authenticator(auth).ok_or_else(|| unknown(auth))?;
            truncated(auth, hmac, bits)?;
            (enc, Some(hmac))
        }
    };
    suite(enc, key_len, hmac).map_err(|f| f.to_string())
}

/// Suite, keys and the place of the key.
pub(super) fn algorithms(
    s: &StateWords<'_>,
    at: &Location,
) -> Result<(Suite, SaKeys, Location), Fail> {
    let read_key = |name, w: &Word<'_>| key(name, w).map_err(|f| (w.at.clone(), f));
    if let Some((alg, k, bits)) = &s.aead {
        if let Some((other, ..)) = &s.enc {
            return Err(unsupported(other, "an AEAD takes no further cipher"));
        }
        if let Some((other, ..)) = &s.auth {
            return Err(unsupported(
                other,
                "an AEAD takes no further authentication",
            ));
        }
        let Some(enc) = aead(alg.text, bits.v) else {
            return Err((alg.at.clone(), unknown("aead", alg.text, AEADS)));
        };
        let Some(enc) = enc else {
            let text = format!("{} has no ICV of {} bits", shown(alg.text), bits.v);
            return Err((bits.at.clone(), Fault::Unsupported(text)));
        };
        let material = read_key("key", k)?;
        let suite = suite(enc, material.len(), None).map_err(|f| (k.at.clone(), f))?;
        let keys = SaKeys {
            enc: material,
            auth: Default::default(),
        };
        return Ok((suite, keys, k.at.clone()));
    }
    let Some((alg, k)) = &s.enc else {
        return Err(lacking(at, "an algorithm (aead, or enc and auth-trunc)"));
    };
    let Some(enc) = cipher(alg.text) else {
        return Err((alg.at.clone(), unknown("enc", alg.text, ENCS)));
    };
    let Some((auth_alg, auth_key, bits)) = &s.auth else {
        let text = format!("{} without authentication", shown(alg.text));
        return Err((alg.at.clone(), Fault::NoIntegrity(text)));
    };
    let Some((hmac, default)) = authenticator(auth_alg.text) else {
        return Err((auth_alg.at.clone(), unknown("auth", auth_alg.text, AUTHS)));
    };
    truncated(auth_alg.text, hmac, bits.unwrap_or(default))
        .map_err(|text| (auth_alg.at.clone(), Fault::Unsupported(text)))?;
    let material = match enc {
        Enc::Null => Default::default(),
        _ => read_key("key", k)?,
    };
    let suite = suite(enc, material.len(), Some(hmac)).map_err(|f| (k.at.clone(), f))?;
    let keys = SaKeys {
        enc: material,
        auth: read_key("auth_key", auth_key)?,
    };
    Ok((suite, keys, k.at.clone()))
}
