//! ESP as RFC 4303 has it, over RustCrypto's modes: shares no code with the driver or the model.

use aes::cipher::{Array, BlockModeDecrypt, BlockModeEncrypt, InOutBuf, KeyInit, KeyIvInit};
use aes::{Aes128, Aes192, Aes256};
use aes_gcm::aead::AeadInOut;
use aes_gcm::aead::consts::U12;
use aes_gcm::{AesGcm, Nonce};
use hmac::{Hmac as Mac_, Mac};
use sa_store::sa::{Direction, OffloadMode, SaId, SaKeys, SaSpec, Spi, UdpEncap};
use sa_store::suite::{AeadIcv, AesBits, Cipher, Hmac, Suite};

/// An SA of both sides.
pub(crate) struct Sa {
    pub(crate) spec: SaSpec,
    pub(crate) id: SaId,
}

/// What the engine has: AES-CBC of all lengths with both hashes, AES-GCM of all lengths and tags.
pub(crate) fn every_suite() -> Vec<Suite> {
    let bits = [AesBits::B128, AesBits::B192, AesBits::B256];
    let mut all = Vec::new();
    for b in bits {
        for h in [Hmac::Sha1_96, Hmac::Sha256_128] {
            all.push(Suite::CipherHmac(Cipher::Cbc(b), h));
        }
    }
    for b in bits {
        for i in [AeadIcv::L8, AeadIcv::L12, AeadIcv::L16] {
            all.push(Suite::Gcm(b, i));
        }
    }
    all
}

/// Keys are the bytes 1, 2, 3 and so on.
pub(crate) fn sa(direction: Direction, suite: Suite, encap: Option<UdpEncap>) -> SaSpec {
    let key = |n: usize| (1..=255).take(n).collect::<Vec<u8>>().into();
    SaSpec {
        tunnel: "t".into(),
        dst: "198.51.100.7".parse().unwrap(),
        encap,
        offload: OffloadMode::Packet,
        engine: Some("soe".into()),
        ..SaSpec::plain(
            "sa",
            direction,
            Spi::new(0xabcd_1234).unwrap(),
            suite,
            SaKeys {
                enc: key(suite.enc_key_len()),
                auth: key(suite.auth_key_len()),
            },
        )
    }
}

/// An inner IPv4 packet of `len` bytes, filled with `n`.
pub(crate) fn inner(len: u16, n: u32) -> Vec<u8> {
    let mut p: Vec<u8> = n
        .to_le_bytes()
        .into_iter()
        .cycle()
        .take(len.into())
        .collect();
    p[..20].fill(0);
    p[0] = 0x45;
    p[2..4].copy_from_slice(&len.to_be_bytes());
    p[8] = 64;
    p
}

impl Sa {
    fn esp_off(&self) -> usize {
        if self.spec.encap.is_some() { 28 } else { 20 }
    }

    fn block(&self) -> usize {
        self.spec.suite.pad_align()
    }

    /// The outer packet with number `n`.
    pub(crate) fn seal(&self, inner: &[u8], n: u32) -> Vec<u8> {
        let pad = (self.block() - (inner.len() + 2) % self.block()) % self.block();
        let mut body = inner.to_vec();
        body.extend((1..).take(pad));
        let next = if inner[0] >> 4 == 4 { 4 } else { 41 };
        body.extend([u8::try_from(pad).unwrap(), next]);
        let mut esp = self.spec.spi.value().to_be_bytes().to_vec();
        esp.extend(n.to_be_bytes());
        let iv: Vec<u8> = (0..self.spec.suite.iv_len())
            .map(|i| n.to_le_bytes()[i % 4] ^ u8::try_from(i).unwrap())
            .collect();
        esp.extend(&iv);
        let head = esp.len();
        esp.extend(body);
        let tag = match self.spec.suite {
            Suite::CipherHmac(..) => {
                self.cbc(&iv, &mut esp[head..], true);
                self.hmac(&esp)
            }
            _ => {
                let (aad, rest) = esp.split_at_mut(8);
                let tag = self.gcm(&iv, aad, &mut rest[8..]);
                tag.to_vec()
            }
        };
        esp.extend(&tag[..self.spec.suite.icv_len()]);
        self.outer(&esp)
    }

    fn outer(&self, esp: &[u8]) -> Vec<u8> {
        let off = self.esp_off();
        let mut p = vec![0u8; off];
        p[0] = 0x45;
        let total = u16::try_from(off + esp.len()).unwrap();
        p[2..4].copy_from_slice(&total.to_be_bytes());
        p[8] = 64;
        p[9] = if off == 28 { 17 } else { 50 };
        p[12..16].copy_from_slice(&[192, 0, 2, 1]);
        p[16..20].copy_from_slice(&[198, 51, 100, 7]);
        if let Some(e) = self.spec.encap {
            p[20..22].copy_from_slice(&e.sport.to_be_bytes());
            p[22..24].copy_from_slice(&e.dport.to_be_bytes());
            p[24..26].copy_from_slice(&(total - 20).to_be_bytes());
        }
        p.extend(esp);
        p
    }

    /// The inner packet; panics with what is wrong.
    pub(crate) fn open(&self, outer: &[u8], number: u32) -> Vec<u8> {
        let off = self.esp_off();
        let be16 = |at: usize| usize::from(u16::from_be_bytes([outer[at], outer[at + 1]]));
        assert_eq!((outer[0], be16(2)), (0x45, outer.len()));
        assert_eq!(outer[9], if off == 28 { 17 } else { 50 });
        assert_eq!(outer[12..20], [192, 0, 2, 1, 198, 51, 100, 7]);
        let sum: usize = (0..20).step_by(2).map(be16).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "header checksum");
        if let Some(e) = self.spec.encap {
            assert_eq!((be16(20), be16(22)), (e.sport.into(), e.dport.into()));
            assert_eq!((be16(24), be16(26)), (outer.len() - 20, 0));
        }
        let esp = &outer[off..];
        assert_eq!(esp[..4], self.spec.spi.value().to_be_bytes());
        assert_eq!(esp[4..8], number.to_be_bytes());
        let icv = self.spec.suite.icv_len();
        let (head, end) = (8 + self.spec.suite.iv_len(), esp.len() - icv);
        let iv = &esp[8..head];
        let mut body = esp[head..end].to_vec();
        let tag = match self.spec.suite {
            Suite::CipherHmac(..) => {
                self.cbc(iv, &mut body, false);
                self.hmac(&esp[..end])
            }
            _ => {
                // Encrypting the ciphertext gives the plaintext; encrypting that gives the tag.
                self.gcm(iv, &esp[..8], &mut body);
                self.gcm(iv, &esp[..8], &mut body.clone())
            }
        };
        assert_eq!(tag[..icv], esp[end..], "ICV");
        let next = if body[0] >> 4 == 4 { 4 } else { 41 };
        assert_eq!(body.pop(), Some(next), "next header");
        let pad = body.pop().unwrap();
        let inner = body.len() - usize::from(pad);
        assert!(body[inner..].iter().copied().eq(1..=pad), "padding");
        body.truncate(inner);
        body
    }

    fn hmac(&self, data: &[u8]) -> Vec<u8> {
        fn mac<M: Mac + KeyInit>(key: &[u8], data: &[u8]) -> Vec<u8> {
            let mut m = <M as KeyInit>::new_from_slice(key).unwrap();
            m.update(data);
            m.finalize().into_bytes().to_vec()
        }
        match self.spec.suite {
            Suite::CipherHmac(_, Hmac::Sha1_96) => {
                mac::<Mac_<sha1::Sha1>>(&self.spec.keys.auth, data)
            }
            _ => mac::<Mac_<sha2::Sha256>>(&self.spec.keys.auth, data),
        }
    }

    fn cbc(&self, iv: &[u8], data: &mut [u8], encrypt: bool) {
        let key = &self.spec.keys.enc;
        macro_rules! run {
            ($aes:ty) => {{
                let blocks = InOutBuf::from(data).into_chunks().0;
                if encrypt {
                    let mut c = cbc::Encryptor::<$aes>::new_from_slices(key, iv).unwrap();
                    c.encrypt_blocks_inout(blocks);
                } else {
                    let mut c = cbc::Decryptor::<$aes>::new_from_slices(key, iv).unwrap();
                    c.decrypt_blocks_inout(blocks);
                }
            }};
        }
        match key.len() {
            16 => run!(Aes128),
            24 => run!(Aes192),
            _ => run!(Aes256),
        }
    }

    fn gcm(&self, iv: &[u8], aad: &[u8], data: &mut [u8]) -> Vec<u8> {
        let (key, salt) = self.spec.keys.enc.split_at(self.spec.keys.enc.len() - 4);
        let mut nonce = [0u8; 12];
        nonce[..4].copy_from_slice(salt);
        nonce[4..].copy_from_slice(iv);
        let nonce: Nonce<U12> = Array(nonce);
        macro_rules! run {
            ($aes:ty) => {{
                let c = AesGcm::<$aes, U12>::new_from_slice(key).unwrap();
                let tag = c.encrypt_inout_detached(&nonce, aad, data.into()).unwrap();
                tag.to_vec()
            }};
        }
        match key.len() {
            16 => run!(Aes128),
            24 => run!(Aes192),
            _ => run!(Aes256),
        }
    }
}
