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
        let enc = match (alg.text, bits.v) {
            ("rfc4106(gcm(aes))", b) => icv(b).map(Enc::Gcm),
            ("rfc4543(gcm(aes))", 128) => Some(Enc::Gmac),
            ("rfc7539esp(chacha20,poly1305)", 128) => Some(Enc::ChaCha),
            ("rfc4543(gcm(aes))" | "rfc7539esp(chacha20,poly1305)", _) => None,
            (other, _) => return Err((alg.at.clone(), unknown("aead", other, AEADS))),
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
    let enc = match alg.text {
        "cbc(aes)" | "aes" => Enc::Cbc,
        "rfc3686(ctr(aes))" => Enc::Ctr,
        "ecb(cipher_null)" | "cipher_null" => Enc::Null,
        other => return Err((alg.at.clone(), unknown("enc", other, ENCS))),
    };
    let Some((auth_alg, auth_key, bits)) = &s.auth else {
        let text = format!("{} without authentication", shown(alg.text));
        return Err((alg.at.clone(), Fault::NoIntegrity(text)));
    };
    // Without auth-trunc, Linux truncates to 96 bits for SHA-1 and, unlike RFC 4868, SHA-256.
    let (hmac, default) = match auth_alg.text {
        "hmac(sha1)" | "sha1" => (Hmac::Sha1_96, 96),
        "hmac(sha256)" | "sha256" => (Hmac::Sha256_128, 96),
        "hmac(sha384)" => (Hmac::Sha384_192, 192),
        "hmac(sha512)" => (Hmac::Sha512_256, 256),
        other => return Err((auth_alg.at.clone(), unknown("auth", other, AUTHS))),
    };
    let bits = bits.unwrap_or(default);
    if u32::try_from(hmac.icv_len() * 8) != Ok(bits) {
        let text = format!(
            "{} truncated to {bits} bits is not offered; RFC 4868 wants auth-trunc … {}",
            shown(auth_alg.text),
            hmac.icv_len() * 8
        );
        return Err((auth_alg.at.clone(), Fault::Unsupported(text)));
    }
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
