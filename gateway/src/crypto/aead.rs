//! ESP over an AEAD that takes one buffer and a detached tag: what most libraries offer.

use std::cell::RefCell;

use super::each::OnePacket;
use super::packet::{Aad, nonce, split};
use super::provider::RawAead;

/// An AEAD with a 96-bit nonce and an `ICV`-byte tag, keyed.
pub(super) trait Aead96<const ICV: usize>: Send + Sync + 'static {
    /// Encrypts in place and returns the tag.
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Option<[u8; ICV]>;
    /// Compares the tag in constant time and decrypts in place.
    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8; ICV]) -> bool;
}

/// An AEAD as ESP uses it to encrypt (RFC 4106, RFC 7634).
pub(super) struct AeadPacket<A, const ICV: usize> {
    pub(super) aead: A,
    pub(super) salt: [u8; 4],
    pub(super) esn: bool,
}

impl<A: Aead96<ICV>, const ICV: usize> OnePacket for AeadPacket<A, ICV> {
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, ICV>(esp) else {
            return false;
        };
        let aad = Aad::new(p.head, self.esn, seq_hi);
        let sealed = self
            .aead
            .seal(&nonce(self.salt, p.iv), aad.as_slice(), p.body);
        let Some(tag) = sealed else { return false };
        *p.icv = tag;
        true
    }

    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some(p) = split::<8, ICV>(esp) else {
            return false;
        };
        let aad = Aad::new(p.head, self.esn, seq_hi);
        self.aead
            .open(&nonce(self.salt, p.iv), aad.as_slice(), p.body, p.icv)
    }
}

/// AES-GCM as ESP uses it to authenticate only (RFC 4543): all of the packet is associated data.
pub(super) struct GmacPacket<A> {
    pub(super) gcm: A,
    pub(super) salt: [u8; 4],
    pub(super) esn: bool,
}

impl<A: Aead96<16>> GmacPacket<A> {
    /// Calls `f` with the nonce and the associated data.
    fn with_aad<R>(
        &self,
        esp: &[u8],
        seq_hi: u32,
        f: impl FnOnce(&A, &[u8; 12], &[u8]) -> R,
    ) -> Option<R> {
        thread_local! {
            static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let (head, rest) = esp.split_first_chunk::<8>()?;
        let nonce = nonce(self.salt, rest.first_chunk::<8>()?);
        if !self.esn {
            return Some(f(&self.gcm, &nonce, esp));
        }
        // The high half stands amid the packet (RFC 4543 section 3.3), and these libraries want one piece.
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            scratch.extend_from_slice(Aad::new(head, true, seq_hi).as_slice());
            scratch.extend_from_slice(rest);
            Some(f(&self.gcm, &nonce, scratch))
        })
    }
}

impl<A: Aead96<16>> OnePacket for GmacPacket<A> {
    fn seal_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some((packet, icv)) = esp.split_last_chunk_mut::<16>() else {
            return false;
        };
        let tag = self.with_aad(packet, seq_hi, |gcm, nonce, aad| {
            gcm.seal(nonce, aad, &mut [])
        });
        let Some(Some(tag)) = tag else { return false };
        *icv = tag;
        true
    }

    fn open_one(&self, esp: &mut [u8], seq_hi: u32) -> bool {
        let Some((packet, icv)) = esp.split_last_chunk::<16>() else {
            return false;
        };
        self.with_aad(packet, seq_hi, |gcm, nonce, aad| {
            gcm.open(nonce, aad, &mut [], icv)
        })
        .unwrap_or(false)
    }
}

/// [`RawAead`] over an [`Aead96`].
pub(super) struct Raw<A, const ICV: usize>(pub(super) A);

impl<A: Aead96<ICV>, const ICV: usize> RawAead for Raw<A, ICV> {
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Vec<u8> {
        let tag = self.0.seal(nonce, aad, data);
        tag.map_or_else(Vec::new, Vec::from)
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8]) -> bool {
        <&[u8; ICV]>::try_from(tag).is_ok_and(|tag| self.0.open(nonce, aad, data, tag))
    }
}
