//! The engine's ciphers: modes, HMAC and GHASH of its own, over the block functions of AES and the hashes.

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// An expanded AES key.
pub(super) enum Aes {
    K128(Aes128),
    K192(Aes192),
    K256(Aes256),
}

impl Aes {
    /// `None` for a length that is no AES key's.
    pub(super) fn new(key: &[u8]) -> Option<Aes> {
        Some(match key.len() {
            16 => Aes::K128(Aes128::new_from_slice(key).ok()?),
            24 => Aes::K192(Aes192::new_from_slice(key).ok()?),
            32 => Aes::K256(Aes256::new_from_slice(key).ok()?),
            _ => return None,
        })
    }

    fn encrypt(&self, block: &mut [u8; 16]) {
        let block: &mut Array<u8, _> = block.into();
        match self {
            Aes::K128(a) => a.encrypt_block(block),
            Aes::K192(a) => a.encrypt_block(block),
            Aes::K256(a) => a.encrypt_block(block),
        }
    }

    fn decrypt(&self, block: &mut [u8; 16]) {
        let block: &mut Array<u8, _> = block.into();
        match self {
            Aes::K128(a) => a.decrypt_block(block),
            Aes::K192(a) => a.decrypt_block(block),
            Aes::K256(a) => a.decrypt_block(block),
        }
    }

    /// SP 800-38A, 6.2; whole blocks.
    pub(super) fn cbc_encrypt(&self, iv: [u8; 16], data: &mut [u8]) {
        let mut last = iv;
        for block in data.as_chunks_mut::<16>().0 {
            xor(block, &last);
            self.encrypt(block);
            last = *block;
        }
    }

    /// SP 800-38A, 6.2, backwards.
    pub(super) fn cbc_decrypt(&self, iv: [u8; 16], data: &mut [u8]) {
        let mut last = iv;
        for block in data.as_chunks_mut::<16>().0 {
            let next = *block;
            self.decrypt(block);
            xor(block, &last);
            last = next;
        }
    }

    /// SP 800-38D: counter mode from 2 on, over a nonce of 12 bytes.
    pub(super) fn gcm_crypt(&self, nonce: &[u8; 12], data: &mut [u8]) {
        for (n, part) in (2u32..).zip(data.chunks_mut(16)) {
            let mut stream = counter(nonce, n);
            self.encrypt(&mut stream);
            for (byte, s) in part.iter_mut().zip(stream) {
                *byte ^= s;
            }
        }
    }

    /// SP 800-38D: the tag over associated data and ciphertext.
    pub(super) fn gcm_tag(&self, nonce: &[u8; 12], aad: &[u8], cipher: &[u8]) -> [u8; 16] {
        let mut h = [0; 16];
        self.encrypt(&mut h);
        let h = u128::from_be_bytes(h);
        let mut y = 0;
        for part in aad.chunks(16).chain(cipher.chunks(16)) {
            let mut block = [0; 16];
            block[..part.len()].copy_from_slice(part);
            y = multiply(y ^ u128::from_be_bytes(block), h);
        }
        let lengths = (aad.len() as u128 * 8) << 64 | (cipher.len() as u128 * 8);
        y = multiply(y ^ lengths, h);
        let mut tag = counter(nonce, 1);
        self.encrypt(&mut tag);
        xor(&mut tag, &y.to_be_bytes());
        tag
    }
}

fn counter(nonce: &[u8; 12], n: u32) -> [u8; 16] {
    let mut c = [0; 16];
    c[..12].copy_from_slice(nonce);
    c[12..].copy_from_slice(&n.to_be_bytes());
    c
}

/// SP 800-38D, 6.3: product in the field, bit by bit.
fn multiply(x: u128, y: u128) -> u128 {
    let (mut z, mut v) = (0, y);
    for i in (0..128).rev() {
        if x >> i & 1 == 1 {
            z ^= v;
        }
        v = if v & 1 == 1 {
            v >> 1 ^ 0xe1 << 120
        } else {
            v >> 1
        };
    }
    z
}

/// Hashes of HMAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha256,
}

impl Hash {
    fn digest(self, parts: [&[u8]; 2]) -> Vec<u8> {
        match self {
            Hash::Sha1 => Sha1::new()
                .chain_update(parts[0])
                .chain_update(parts[1])
                .finalize()
                .to_vec(),
            Hash::Sha256 => Sha256::new()
                .chain_update(parts[0])
                .chain_update(parts[1])
                .finalize()
                .to_vec(),
        }
    }

    /// RFC 2104, for keys up to one block.
    pub(super) fn hmac(self, key: &[u8], data: &[u8]) -> Vec<u8> {
        let pad = |with: u8| {
            let mut block = [with; 64];
            for (b, k) in block.iter_mut().zip(key) {
                *b ^= k;
            }
            block
        };
        let inner = self.digest([&pad(0x36), data]);
        self.digest([&pad(0x5c), &inner])
    }
}

fn xor(a: &mut [u8; 16], b: &[u8; 16]) {
    for (x, y) in a.iter_mut().zip(b) {
        *x ^= y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(s: &str) -> Vec<u8> {
        let digits: Vec<u32> = s.chars().filter_map(|c| c.to_digit(16)).collect();
        digits
            .chunks(2)
            .map(|d| u8::try_from(d[0] * 16 + d[1]).unwrap())
            .collect()
    }

    /// RFC 3602, section 4, case 2.
    #[test]
    fn cbc_gives_the_published_blocks() {
        let aes = Aes::new(&hex("c286696d887c9aa0611bbb3e2025a45a")).unwrap();
        let iv: [u8; 16] = hex("562e17996d093d28ddb3ba695a2e6f58").try_into().unwrap();
        let mut data: Vec<u8> = (0..32).collect();
        aes.cbc_encrypt(iv, &mut data);
        let expected = "d296cd94c2cccf8a3a863028b5e1dc0a 7586602d253cfff91b8266bea6d61ab1";
        assert_eq!(data, hex(expected));
        aes.cbc_decrypt(iv, &mut data);
        assert_eq!(data, (0..32).collect::<Vec<u8>>());
    }

    /// The GCM specification's test case 4: 20 bytes of associated data, a part of a block at the end.
    #[test]
    fn gcm_gives_the_published_tag() {
        let aes = Aes::new(&hex("feffe9928665731c6d6a8f9467308308")).unwrap();
        let nonce: [u8; 12] = hex("cafebabefacedbaddecaf888").try_into().unwrap();
        let mut data = hex(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72\
             1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let aad = hex("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        aes.gcm_crypt(&nonce, &mut data);
        let tag = aes.gcm_tag(&nonce, &aad, &data);
        assert_eq!(data[..4], hex("42831ec2"));
        assert_eq!(tag.to_vec(), hex("5bc94fbc3221a5db94fae95ae7121a47"));
    }

    /// RFC 2202 and RFC 4231, test case 2.
    #[test]
    fn hmac_gives_the_published_digests() {
        let data = b"what do ya want for nothing?";
        assert_eq!(
            Hash::Sha1.hmac(b"Jefe", data),
            hex("effcdf6ae5eb2fa2d27416d5f184df9c259a7c79")
        );
        assert_eq!(
            Hash::Sha256.hmac(b"Jefe", data),
            hex("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843")
        );
    }
}
