//! Published vectors against every crypto provider: NIST CAVP, Wycheproof, and the ESP packets of RFCs.
//!
//! Vectors go through the interface that the data path uses wherever an ESP packet can carry them: associated data
//! of 8 or 12 bytes. Others go to the bare AEAD below it.

use gateway::crypto::select::available;
use gateway::crypto::{Provider, ProviderId};
use sa_store::cipher::{CipherJob, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::Suite;
use wycheproof::TestResult;
use zeroize::Zeroizing;

fn hex(text: &str) -> Vec<u8> {
    if text == "-" {
        return Vec::new();
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).expect("hex"))
        .collect()
}

fn suite(name: &str) -> Suite {
    name.parse().expect("a suite")
}

fn keys(enc: &[u8], auth: &[u8]) -> SaKeys {
    SaKeys {
        enc: Zeroizing::new(enc.to_vec()),
        auth: Zeroizing::new(auth.to_vec()),
    }
}

fn offers_hmac(provider: &dyn Provider) -> bool {
    matches!(provider.id(), ProviderId::IpsecMb | ProviderId::RustCrypto)
}

/// Seals or opens one packet.
fn one(ctx: &dyn SaCipher, esp: &mut [u8], seq_hi: u32, direction: Direction) -> bool {
    let mut jobs = [CipherJob {
        ctx,
        esp,
        seq_hi,
        ok: false,
    }];
    match direction {
        Direction::Out => ctx.seal(&mut jobs),
        Direction::In => ctx.open(&mut jobs),
    }
    jobs[0].ok
}

/// An AEAD vector.
struct Vector {
    key: Vec<u8>,
    nonce: [u8; 12],
    aad: Vec<u8>,
    /// `None`: opening must refuse.
    clear: Option<Vec<u8>>,
    ciphertext: Vec<u8>,
    tag: Vec<u8>,
}

impl Vector {
    /// Tries the bare AEAD; false when the provider does not offer it.
    fn try_raw(&self, provider: &dyn Provider, suite: Suite) -> bool {
        let Some(aead) = provider.raw_aead(suite, &self.key) else {
            return false;
        };
        let id = provider.id();
        let mut data = self.ciphertext.clone();
        let opened = aead.open(&self.nonce, &self.aad, &mut data, &self.tag);
        assert_eq!(opened, self.clear.is_some(), "{id} {suite}");
        if let Some(clear) = &self.clear {
            assert_eq!(data, *clear, "{id} {suite}");
            let tag = aead.seal(&self.nonce, &self.aad, &mut data);
            assert_eq!((data, tag), (self.ciphertext.clone(), self.tag.clone()));
        }
        true
    }

    /// Tries it as an ESP packet; false when none can carry it or the provider does not offer the suite.
    fn try_packet(&self, provider: &dyn Provider, suite: Suite) -> bool {
        let (head, seq_hi, esn) = match *self.aad {
            [a, b, c, d, e, f, g, h] => ([a, b, c, d, e, f, g, h], 0, false),
            [a, b, c, d, e, f, g, h, i, j, k, l] => {
                let hi = u32::from_be_bytes([e, f, g, h]);
                ([a, b, c, d, i, j, k, l], hi, true)
            }
            _ => return false,
        };
        if self.ciphertext.is_empty() {
            return false;
        }
        let keys = keys(&[&self.key, &self.nonce[..4]].concat(), &[]);
        let packet = |body: &[u8], tag: &[u8]| [&head, &self.nonce[4..], body, tag].concat();
        let Some(inn) = provider.make(suite, &keys, esn, Direction::In) else {
            return false;
        };
        let id = provider.id();
        let sealed = packet(&self.ciphertext, &self.tag);
        let mut esp = sealed.clone();
        let opened = one(&*inn, &mut esp, seq_hi, Direction::In);
        assert_eq!(opened, self.clear.is_some(), "{id} {suite}");
        if let Some(clear) = &self.clear {
            let end = 16 + clear.len();
            assert_eq!(esp[16..end], **clear, "{id} {suite}");
            let out = provider.make(suite, &keys, esn, Direction::Out);
            let out = out.expect("offered in the other direction");
            let mut esp = packet(clear, &vec![0; self.tag.len()]);
            assert!(one(&*out, &mut esp, seq_hi, Direction::Out));
            assert_eq!(esp, sealed, "{id} {suite}");
        }
        true
    }
}

fn gcm_suite(key_len: usize, tag_len: usize) -> Suite {
    suite(&format!("aes-{}-gcm-{tag_len}", key_len * 8))
}

#[test]
fn nist_cavp_gcm() {
    for provider in available() {
        let (mut raw, mut packets) = (0, 0);
        let lines = include_str!("vectors/cavp_gcm.txt").lines();
        for line in lines.filter(|l| !l.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [key, nonce, aad, clear, ciphertext, tag] = *fields else {
                panic!("six fields: {line}")
            };
            let vector = Vector {
                key: hex(key),
                nonce: hex(nonce).try_into().expect("96 bits"),
                aad: hex(aad),
                clear: (clear != "FAIL").then(|| hex(clear)),
                ciphertext: hex(ciphertext),
                tag: hex(tag),
            };
            let suite = gcm_suite(vector.key.len(), vector.tag.len());
            raw += usize::from(vector.try_raw(&*provider, suite));
            packets += usize::from(vector.try_packet(&*provider, suite));
        }
        println!("{}: {raw} raw, {packets} as packets", provider.id());
        assert!(raw >= 300, "{}: {raw}", provider.id());
    }
}

fn wycheproof_aead(name: wycheproof::aead::TestName, of: impl Fn(usize) -> Suite) {
    let set = wycheproof::aead::TestSet::load(name).expect("the crate's own file");
    for provider in available() {
        let (mut raw, mut packets) = (0, 0);
        for group in &set.test_groups {
            if group.nonce_size != 96 || group.tag_size != 128 {
                continue;
            }
            for test in &group.tests {
                let Ok(nonce) = <[u8; 12]>::try_from(&test.nonce[..]) else {
                    continue;
                };
                let vector = Vector {
                    key: test.key.to_vec(),
                    nonce,
                    aad: test.aad.to_vec(),
                    clear: (test.result == TestResult::Valid).then(|| test.pt.to_vec()),
                    ciphertext: test.ct.to_vec(),
                    tag: test.tag.to_vec(),
                };
                let suite = of(vector.key.len());
                raw += usize::from(vector.try_raw(&*provider, suite));
                packets += usize::from(vector.try_packet(&*provider, suite));
            }
        }
        println!("{}: {raw} raw, {packets} as packets", provider.id());
        assert!(raw + packets > 0, "{} ran none", provider.id());
    }
}

#[test]
fn wycheproof_aes_gcm() {
    wycheproof_aead(wycheproof::aead::TestName::AesGcm, |key_len| {
        gcm_suite(key_len, 16)
    });
}

#[test]
fn wycheproof_chacha20_poly1305() {
    let chacha = suite("chacha20-poly1305");
    wycheproof_aead(wycheproof::aead::TestName::ChaCha20Poly1305, |_| chacha);
}

#[test]
fn wycheproof_aes_cbc() {
    let name = wycheproof::cipher::TestName::AesCbcPkcs5;
    let set = wycheproof::cipher::TestSet::load(name).expect("the crate's own file");
    for provider in available() {
        let mut ran = 0;
        for test in set.test_groups.iter().flat_map(|g| &g.tests) {
            // Padding errors are not ours to find: ESP has its own padding.
            if test.result != TestResult::Valid {
                continue;
            }
            let suite = suite(&format!("aes-{}-cbc+hmac-sha1-96", test.key.len() * 8));
            let keys = keys(&test.key, &[7; 20]);
            let Some(out) = provider.make(suite, &keys, false, Direction::Out) else {
                continue;
            };
            let pad = 16 - test.pt.len() % 16;
            let pad = vec![u8::try_from(pad).expect("at most 16"); pad];
            let mut esp = [&[9; 8], &test.nonce[..], &test.pt, &pad, &[0; 12]].concat();
            assert!(one(&*out, &mut esp, 0, Direction::Out));
            let end = esp.len() - 12;
            assert_eq!(esp[24..end], *test.ct, "{} {suite}", provider.id());
            ran += 1;
        }
        println!("{}: {ran}", provider.id());
        assert_eq!(ran > 0, offers_hmac(&*provider));
    }
}

#[test]
fn wycheproof_hmac() {
    use wycheproof::mac::TestName;
    for (name, mac) in [
        (TestName::HmacSha1, "null+hmac-sha1-96"),
        (TestName::HmacSha256, "null+hmac-sha2-256-128"),
        (TestName::HmacSha384, "null+hmac-sha2-384-192"),
        (TestName::HmacSha512, "null+hmac-sha2-512-256"),
    ] {
        let suite = suite(mac);
        let set = wycheproof::mac::TestSet::load(name).expect("the crate's own file");
        for provider in available() {
            let mut ran = 0;
            for group in &set.test_groups {
                // Tags shorter than the ICV say nothing about it.
                if group.key_size != suite.auth_key_len() * 8
                    || group.tag_size < suite.icv_len() * 8
                {
                    continue;
                }
                for test in &group.tests {
                    let icv = &test.tag[..suite.icv_len()];
                    // A change behind the part that ESP sends is no change.
                    let truncated = icv.len() < test.tag.len();
                    if test.msg.len() < 10 || (truncated && test.result != TestResult::Valid) {
                        continue;
                    }
                    let keys = keys(&[], &test.key);
                    let Some(inn) = provider.make(suite, &keys, false, Direction::In) else {
                        continue;
                    };
                    let mut esp = [&test.msg[..], icv].concat();
                    let ok = one(&*inn, &mut esp, 0, Direction::In);
                    let valid = test.result == TestResult::Valid;
                    assert_eq!(ok, valid, "{} {suite} {}", provider.id(), test.tc_id);
                    ran += 1;
                }
            }
            println!("{} {mac}: {ran}", provider.id());
            assert_eq!(ran > 0, offers_hmac(&*provider));
        }
    }
}

#[test]
fn esp_packets_of_the_rfcs() {
    for provider in available() {
        let mut ran = 0;
        let lines = include_str!("vectors/esp.txt").lines();
        for line in lines.filter(|l| !l.starts_with('#')) {
            let fields: Vec<&str> = line.split(' ').collect();
            let [source, name, enc, seq_hi, clear, sealed] = *fields else {
                panic!("six fields: {line}")
            };
            let suite = suite(name);
            let esn = seq_hi != "-";
            let seq_hi = u32::from_str_radix(seq_hi, 16).unwrap_or(0);
            let keys = keys(&hex(enc), &vec![3; suite.auth_key_len()]);
            let make = |direction| provider.make(suite, &keys, esn, direction);
            let Some(out) = make(Direction::Out) else {
                continue;
            };
            let what = format!("{} {source} {suite}", provider.id());
            let (clear, sealed) = (hex(clear), hex(sealed));
            let mut esp = clear.clone();
            esp.resize(clear.len() + suite.icv_len(), 0);
            assert!(one(&*out, &mut esp, seq_hi, Direction::Out), "{what}");
            // RFCs 3602 and 3686 give no ICV.
            assert_eq!(esp[..sealed.len()], sealed, "{what}");

            let inn = make(Direction::In).expect("offered in the other direction");
            assert!(one(&*inn, &mut esp, seq_hi, Direction::In), "{what}");
            assert_eq!(esp[..clear.len()], clear, "{what}");
            ran += 1;
        }
        println!("{}: {ran}", provider.id());
        assert!(ran >= 9, "{}: {ran}", provider.id());
    }
}
