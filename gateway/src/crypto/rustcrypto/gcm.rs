//! AES-GCM, AES-GMAC and ChaCha20-Poly1305.
//!
//! 16-byte tags use the `aes-gcm` crate. It has no 8-byte tags, so short tags are composed here from AES-CTR
//! and GHASH; a test holds the composition against the crate.

use aes::cipher::array::Array;
use aes::cipher::consts::{U12, U16};
use aes::cipher::{
    BlockCipherEncrypt, BlockSizeUser, InOutBuf, InnerIvInit, KeyInit, StreamCipherCore,
};
use aes_gcm::AesGcm;
use aes_gcm::aead::AeadInOut;
use chacha20poly1305::ChaCha20Poly1305;
use ghash::GHash;
use ghash::universal_hash::UniversalHash;
use sa_store::cipher::SaCipher;
use sa_store::suite::AeadIcv;
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use super::{Each, OnePacket, RawAead};
use crate::crypto::aead::{Aead96, AeadPacket, Raw};
use crate::crypto::packet::{nonce, split};

/// What is asked of an AES implementation here.
pub(super) trait Aes:
    BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync + 'static
{
}

impl<A> Aes for A where
    A: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync + 'static
{
}

/// A GCM context for packets.
pub(super) fn make<A: Aes>(
    lane: u16,
    key: &[u8],
    salt: [u8; 4],
    icv: AeadIcv,
    esn: bool,
) -> Option<Box<dyn SaCipher>> {
    Some(match icv {
        AeadIcv::L8 => {
            let aead = Composed::<A>::new(key)?;
            Each::boxed(lane, AeadPacket::<_, 8> { aead, salt, esn })
        }
        AeadIcv::L12 => {
            let aead = Composed::<A>::new(key)?;
            Each::boxed(lane, AeadPacket::<_, 12> { aead, salt, esn })
        }
        AeadIcv::L16 => {
            let aead = Full::<AesGcm<A, U12>>::new(key)?;
            Each::boxed(lane, AeadPacket::<_, 16> { aead, salt, esn })
        }
    })
}

/// A GMAC context for packets.
pub(super) fn make_gmac<A: Aes>(
    lane: u16,
    key: &[u8],
    salt: [u8; 4],
    esn: bool,
) -> Option<Box<dyn SaCipher>> {
    let gcm = Composed::<A>::new(key)?;
    Some(Each::boxed(lane, Gmac { gcm, salt, esn }))
}

/// A bare GCM for vectors.
pub(super) fn raw<A: Aes>(key: &[u8], icv: AeadIcv) -> Option<Box<dyn RawAead>> {
    Some(match icv {
        AeadIcv::L8 => Box::new(Raw::<_, 8>(Composed::<A>::new(key)?)),
        AeadIcv::L12 => Box::new(Raw::<_, 12>(Composed::<A>::new(key)?)),
        AeadIcv::L16 => Box::new(Raw::<_, 16>(Full::<AesGcm<A, U12>>::new(key)?)),
    })
}

/// ChaCha20-Poly1305.
pub(super) fn chacha(key: &[u8]) -> Option<Full<ChaCha20Poly1305>> {
    Full::new(key)
}

/// An AEAD of the crates, with its full tag.
pub(super) struct Full<T>(T);

impl<T: KeyInit> Full<T> {
    fn new(key: &[u8]) -> Option<Self> {
        T::new_from_slice(key).ok().map(Self)
    }
}

impl<T> Aead96<16> for Full<T>
where
    T: AeadInOut<NonceSize = U12, TagSize = U16> + Send + Sync + 'static,
{
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Option<[u8; 16]> {
        let sealed = self
            .0
            .encrypt_inout_detached(&Array(*nonce), aad, data.into());
        sealed.ok().map(|tag| tag.0)
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; 16]) -> bool {
        self.0
            .decrypt_inout_detached(&Array(*nonce), aad, data.into(), &Array(*tag))
            .is_ok()
    }
}

/// GCM (NIST SP 800-38D) put together from AES and GHASH, for any tag length.
pub(super) struct Composed<A> {
    aes: A,
    ghash: GHash,
}

impl<A: Aes> Composed<A> {
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        let aes = A::new_from_slice(key).ok()?;
        let mut h = Array::default();
        aes.encrypt_block(&mut h);
        let ghash = GHash::new(&h);
        h.zeroize();
        Some(Self { aes, ghash })
    }

    /// The key stream after its first block, and that block: it masks the tag.
    fn counter(
        &self,
        nonce: &[u8; 12],
    ) -> (ctr::CtrCore<&A, ctr::flavors::Ctr32BE>, Array<u8, U16>) {
        let mut j0 = [0; 16];
        j0[..12].copy_from_slice(nonce);
        j0[15] = 1;
        let mut stream = ctr::CtrCore::inner_iv_init(&self.aes, &Array(j0));
        let mut mask = Array::default();
        stream.write_keystream_block(&mut mask);
        (stream, mask)
    }

    /// The tag over associated data given in pieces, and ciphertext.
    fn tag(&self, mask: &Array<u8, U16>, aad: &[&[u8]], ciphertext: &[u8]) -> [u8; 16] {
        let mut hash = Blocks::new(self.ghash.clone());
        let mut aad_len = 0;
        for piece in aad {
            hash.update(piece);
            aad_len += piece.len();
        }
        hash.pad();
        hash.ghash.update_padded(ciphertext);
        let mut lengths = [0; 16];
        lengths[..8].copy_from_slice(&bits(aad_len));
        lengths[8..].copy_from_slice(&bits(ciphertext.len()));
        hash.ghash.update(&[Array(lengths)]);
        let mut tag = hash.ghash.finalize();
        for (t, m) in tag.iter_mut().zip(mask) {
            *t ^= m;
        }
        tag.0
    }
}

impl<A: Aes, const ICV: usize> Aead96<ICV> for Composed<A> {
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Option<[u8; ICV]> {
        let (stream, mask) = self.counter(nonce);
        stream.apply_keystream_partial(InOutBuf::from(&mut *data));
        let tag = self.tag(&mask, &[aad], data);
        tag.first_chunk().copied()
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; ICV]) -> bool {
        let (stream, mask) = self.counter(nonce);
        let want = self.tag(&mask, &[aad], data);
        let right = want
            .get(..ICV)
            .is_some_and(|want| want.ct_eq(tag.as_slice()).into());
        if right {
            stream.apply_keystream_partial(data.into());
        }
        right
    }
}

/// GMAC as ESP uses it: RFC 4543 section 3.3 puts the IV into the authenticated data.
struct Gmac<A> {
    gcm: Composed<A>,
    salt: [u8; 4],
    esn: bool,
}

impl<A: Aes> Gmac<A> {
    fn icv(&self, head: &[u8; 8], iv: &[u8; 8], body: &[u8], seq_hi: u32) -> [u8; 16] {
        let (_, mask) = self.gcm.counter(&nonce(self.salt, iv));
        let (spi, seq) = head.split_at(4);
        let hi = seq_hi.to_be_bytes();
        let hi: &[u8] = if self.esn { &hi } else { &[] };
        self.gcm.tag(&mask, &[spi, hi, seq, iv, body], &[])
    }
}

impl<A: Aes> OnePacket for Gmac<A> {
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, 16>(esp) else {
            return false;
        };
        *p.icv = self.icv(p.head, p.iv, p.body, seq_hi);
        true
    }

    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, 16>(esp) else {
            return false;
        };
        let want = self.icv(p.head, p.iv, p.body, seq_hi);
        want.ct_eq(p.icv.as_slice()).into()
    }
}

/// GHASH over data that comes in pieces of any length.
struct Blocks {
    ghash: GHash,
    partial: [u8; 16],
    used: usize,
}

impl Blocks {
    fn new(ghash: GHash) -> Self {
        Self {
            ghash,
            partial: [0; 16],
            used: 0,
        }
    }

    fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let n = data.len().min(16 - self.used);
            let (now, later) = data.split_at(n);
            self.partial[self.used..self.used + n].copy_from_slice(now);
            self.used += n;
            data = later;
            if self.used == 16 {
                self.pad();
            }
        }
    }

    /// Hashes the partial block, filled up with zeros.
    fn pad(&mut self) {
        if self.used > 0 {
            self.partial[self.used..].fill(0);
            self.ghash.update(&[Array(self.partial)]);
            self.used = 0;
        }
    }
}

/// A length in bits as GHASH takes it.
fn bits(bytes: usize) -> [u8; 8] {
    // A slice is at most isize::MAX bytes; packets are under 64 KiB.
    u64::try_from(bytes)
        .map_or(u64::MAX, |n| n << 3)
        .to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn composed_gcm_is_the_crates_gcm(
            key in any::<[u8; 24]>(),
            nonce in any::<[u8; 12]>(),
            aad in proptest::collection::vec(any::<u8>(), 0..40),
            data in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            let composed = Composed::<aes::Aes192>::new(&key).expect("24 bytes");
            let crates = Full::<AesGcm<aes::Aes192, U12>>::new(&key).expect("24 bytes");
            let (mut ours, mut theirs) = (data.clone(), data.clone());
            let tag: Option<[u8; 16]> = composed.seal(&nonce, &aad, &mut ours);
            prop_assert_eq!(tag, crates.seal(&nonce, &aad, &mut theirs));
            prop_assert_eq!(&ours, &theirs);
            let tag = tag.expect("sealed");
            let short: [u8; 8] = *tag.first_chunk().expect("8 of 16");
            prop_assert!(composed.open(&nonce, &aad, &mut theirs, &short));
            prop_assert_eq!(theirs, data);
        }
    }
}
