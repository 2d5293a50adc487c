//! Cipher with HMAC, and ChaCha20-Poly1305, on ESP packets, through the multi-buffer scheduler.
//!
//! The scheduler works on packets of several SAs at once; a batch of one gains nothing from it.

use crate::ffi::{self, Run};
use crate::{KeyLen, Library};

/// Cipher of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher<'k> {
    /// RFC 2410.
    Null,
    /// RFC 3602; key of 16, 24 or 32 bytes.
    Cbc(&'k [u8]),
    /// RFC 3686; key of 16, 24 or 32 bytes, and the nonce.
    Ctr(&'k [u8], [u8; 4]),
}

/// Integrity algorithm of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mac {
    /// HMAC-SHA1-96.
    Sha1,
    /// HMAC-SHA2-256-128.
    Sha256,
    /// HMAC-SHA2-384-192.
    Sha384,
    /// HMAC-SHA2-512-256.
    Sha512,
}

impl Mac {
    const fn code(self) -> u8 {
        match self {
            Self::Sha1 => 0,
            Self::Sha256 => 1,
            Self::Sha384 => 2,
            Self::Sha512 => 3,
        }
    }

    const fn icv_len(self) -> u8 {
        match self {
            Self::Sha1 => 12,
            Self::Sha256 => 16,
            Self::Sha384 => 24,
            Self::Sha512 => 32,
        }
    }
}

/// Which way packets go: a context holds the key schedule of one direction and refuses the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Seals.
    Seal,
    /// Opens.
    Open,
}

/// Expanded keys of one SA. Aligned to cache lines, wiped on drop, never shown.
pub struct Context(ffi::ChainContext);

impl Context {
    /// An empty context in the caller's storage; until expanded it refuses every packet.
    pub const fn blank() -> Self {
        Self(ffi::ChainContext::zeroed())
    }

    /// Expands the keys of a cipher with HMAC. False when a key has a wrong length (an HMAC key of more
    /// than 64 bytes) or the scheduler could not be set up.
    pub fn expand_hmac(
        &mut self,
        _lib: &'static Library,
        cipher: Cipher<'_>,
        mac: Mac,
        auth: &[u8],
        esn: bool,
        way: Way,
    ) -> bool {
        let (code, key, salt, iv_len): (u8, &[u8], _, _) = match cipher {
            Cipher::Null => (0, &[], [0; 4], 0),
            Cipher::Cbc(key) => (1, key, [0; 4], 16),
            Cipher::Ctr(key, nonce) => (2, key, nonce, 8),
        };
        let key_len = match KeyLen::new(key.len()) {
            Some(len) => len.bytes(),
            None if key.is_empty() && code == 0 => 0,
            None => return false,
        };
        if auth.len() > 64 {
            return false;
        }
        let shape = ffi::Shape {
            salt,
            cipher: code,
            key_len,
            mac: mac.code(),
            iv_len,
            icv_len: mac.icv_len(),
            esn: u8::from(esn),
            outbound: u8::from(way == Way::Seal),
        };
        self.0.expand(shape, key, auth)
    }

    /// Takes the key of ChaCha20-Poly1305 (RFC 7634). False when the scheduler could not be set up.
    pub fn expand_chacha(
        &mut self,
        _lib: &'static Library,
        key: &[u8; 32],
        salt: [u8; 4],
        esn: bool,
        way: Way,
    ) -> bool {
        let shape = ffi::Shape {
            salt,
            cipher: 3,
            key_len: 32,
            mac: 4,
            iv_len: 8,
            icv_len: 16,
            esn: u8::from(esn),
            outbound: u8::from(way == Way::Seal),
        };
        self.0.expand(shape, key, &[])
    }

    /// Asks for the cache lines of the context.
    #[inline]
    pub fn prefetch(&self) {
        self.0.prefetch();
    }
}

/// Up to [`MAX_BATCH`](crate::MAX_BATCH) packets of any mix of contexts for one call, which empties the batch.
pub struct Batch<'a>(Run<'a, ffi::ChainContext>);

impl<'a> Batch<'a> {
    /// Empty.
    #[inline]
    pub fn new() -> Self {
        Self(Run::new())
    }

    /// Adds a packet that runs from SPI to ICV; one longer than 65535 bytes will be refused. False when
    /// the batch is full.
    #[inline]
    pub fn push(&mut self, ctx: &'a Context, esp: &'a mut [u8], seq_hi: u32) -> bool {
        self.0.push(&ctx.0, esp, seq_hi)
    }

    /// Encrypts, then authenticates. Bit `i` is clear if packet `i` is too short, not of whole blocks, or
    /// its context is for opening.
    pub fn seal(&mut self) -> u64 {
        self.0.chain(true)
    }

    /// Authenticates and decrypts. Bit `i` is set if the ICV of packet `i` is right. Other payloads must
    /// not be used.
    pub fn open(&mut self) -> u64 {
        self.0.chain(false)
    }
}

impl Default for Batch<'_> {
    fn default() -> Self {
        Self::new()
    }
}
