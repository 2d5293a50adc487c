//! The engine's ciphers: modes and hash padding of its own, over the block functions of AES and SHA.

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256};

use super::record::Hash;

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

    pub(super) fn encrypt(&self, block: &mut [u8; 16]) {
        let block: &mut Array<u8, _> = block.into();
        match self {
            Aes::K128(a) => a.encrypt_block(block),
            Aes::K192(a) => a.encrypt_block(block),
            Aes::K256(a) => a.encrypt_block(block),
        }
    }

    pub(super) fn decrypt(&self, block: &mut [u8; 16]) {
        let block: &mut Array<u8, _> = block.into();
        match self {
            Aes::K128(a) => a.decrypt_block(block),
            Aes::K192(a) => a.decrypt_block(block),
            Aes::K256(a) => a.decrypt_block(block),
        }
    }

    /// CBC; `iv` ends as the last block of ciphertext. Bytes behind the last whole block stay as they are.
    pub(super) fn cbc_encrypt(&self, iv: &mut [u8; 16], data: &mut [u8]) {
        for block in data.as_chunks_mut::<16>().0 {
            xor(block, iv);
            self.encrypt(block);
            *iv = *block;
        }
    }

    /// CBC, backwards.
    pub(super) fn cbc_decrypt(&self, iv: &mut [u8; 16], data: &mut [u8]) {
        for block in data.as_chunks_mut::<16>().0 {
            let next = *block;
            self.decrypt(block);
            xor(block, iv);
            *iv = next;
        }
    }

    /// Counter mode with a counter of 32 bits that carries nowhere.
    pub(super) fn ctr(&self, counter: &mut [u8; 16], data: &mut [u8]) {
        for part in data.chunks_mut(16) {
            let mut stream = *counter;
            self.encrypt(&mut stream);
            for (byte, s) in part.iter_mut().zip(stream) {
                *byte ^= s;
            }
            let n = u32::from_be_bytes([counter[12], counter[13], counter[14], counter[15]]);
            counter[12..].copy_from_slice(&n.wrapping_add(1).to_be_bytes());
        }
    }
}

impl Hash {
    /// Chaining value at the start.
    pub(super) fn initial(self) -> [u32; 8] {
        match self {
            Hash::Null => [0; 8],
            Hash::Sha1 => [
                0x6745_2301,
                0xefcd_ab89,
                0x98ba_dcfe,
                0x1032_5476,
                0xc3d2_e1f0,
                0,
                0,
                0,
            ],
            Hash::Sha224 => [
                0xc105_9ed8,
                0x367c_d507,
                0x3070_dd17,
                0xf70e_5939,
                0xffc0_0b31,
                0x6858_1511,
                0x64f9_8fa7,
                0xbefa_4fa4,
            ],
            Hash::Sha256 => [
                0x6a09_e667,
                0xbb67_ae85,
                0x3c6e_f372,
                0xa54f_f53a,
                0x510e_527f,
                0x9b05_688c,
                0x1f83_d9ab,
                0x5be0_cd19,
            ],
        }
    }

    /// Bytes of the digest.
    pub(super) fn len(self) -> usize {
        match self {
            Hash::Null => 0,
            Hash::Sha1 => 20,
            Hash::Sha224 => 28,
            Hash::Sha256 => 32,
        }
    }

    pub(super) fn compress(self, state: &mut [u32; 8], blocks: &[[u8; 64]]) {
        match self {
            Hash::Null => {}
            Hash::Sha1 => {
                let [a, b, c, d, e, ..] = *state;
                let mut five = [a, b, c, d, e];
                sha1::block_api::compress(&mut five, blocks);
                state[..5].copy_from_slice(&five);
            }
            Hash::Sha224 | Hash::Sha256 => sha2::block_api::compress256(state, blocks),
        }
    }

    /// Goes on from `state`, which stands for `before` bytes, over `data` to the end. The digest as bytes; those behind
    /// [`Hash::len`] mean nothing.
    pub(super) fn finish(self, mut state: [u32; 8], before: u64, data: &[u8]) -> [u8; 32] {
        let (blocks, rest) = data.as_chunks::<64>();
        self.compress(&mut state, blocks);
        let bits = (before + data.len() as u64) * 8;
        let mut last = [[0; 64]; 2];
        last[0][..rest.len()].copy_from_slice(rest);
        last[0][rest.len()] = 0x80;
        let n = if rest.len() < 56 { 1 } else { 2 };
        last[n - 1][56..].copy_from_slice(&bits.to_be_bytes());
        self.compress(&mut state, &last[..n]);
        let mut digest = [0; 32];
        for (place, w) in digest.as_chunks_mut::<4>().0.iter_mut().zip(state) {
            *place = w.to_be_bytes();
        }
        digest
    }

    /// HMAC from the two chaining values that key and pads give.
    pub(super) fn hmac(self, inner: [u32; 8], outer: [u32; 8], data: &[u8]) -> [u8; 32] {
        let digest = self.finish(inner, 64, data);
        self.finish(outer, 64, &digest[..self.len()])
    }
}

fn xor(block: &mut [u8; 16], with: &[u8; 16]) {
    for (b, w) in block.iter_mut().zip(with) {
        *b ^= w;
    }
}

/// The engine's random numbers: AES-128 in the manner of ANSI X9.31, without any of its own until it is loaded.
#[derive(Default)]
pub(super) struct Prng(Option<Loaded>);

struct Loaded {
    key: Aes,
    value: [u8; 16],
    date: u128,
}

impl Prng {
    pub(super) fn load(&mut self, key: &[u8], seed: [u8; 16], date: [u8; 16]) {
        self.0 = Aes::new(key).map(|key| Loaded {
            key,
            value: seed,
            date: u128::from_be_bytes(date),
        });
    }

    /// Random bytes; `None` before the first load.
    pub(super) fn fill(&mut self, out: &mut [u8]) -> Option<()> {
        let p = self.0.as_mut()?;
        for part in out.chunks_mut(16) {
            let mut date = p.date.to_be_bytes();
            p.key.encrypt(&mut date);
            let mut random = p.value;
            xor(&mut random, &date);
            p.key.encrypt(&mut random);
            p.value = random;
            xor(&mut p.value, &date);
            p.key.encrypt(&mut p.value);
            p.date = p.date.wrapping_add(1);
            part.copy_from_slice(&random[..part.len()]);
        }
        Some(())
    }
}
