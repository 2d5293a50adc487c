//! AES-GCM (RFC 4106) and AES-GMAC (RFC 4543) on ESP packets, by direct calls.

use crate::ffi::{self, Run};
use crate::{KeyLen, Library};

/// What a context does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Encrypts and authenticates; 8-, 12- or 16-byte ICV.
    Gcm(TagLen),
    /// Authenticates; 16-byte ICV.
    Gmac,
}

/// ICV length of a GCM context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagLen {
    /// 8 bytes.
    T8,
    /// 12 bytes.
    T12,
    /// 16 bytes.
    T16,
}

impl Kind {
    const fn tag_len(self) -> u8 {
        match self {
            Self::Gcm(TagLen::T8) => 8,
            Self::Gcm(TagLen::T12) => 12,
            Self::Gcm(TagLen::T16) | Self::Gmac => 16,
        }
    }
}

/// Expanded key of one SA. Aligned to cache lines, wiped on drop, never shown.
pub struct Context(ffi::GcmContext);

impl Context {
    /// Expands `key`. `None` when it is not 16, 24 or 32 bytes.
    pub fn new(
        lib: &'static Library,
        kind: Kind,
        key: &[u8],
        salt: [u8; 4],
        esn: bool,
    ) -> Option<Box<Self>> {
        let mut boxed = Box::new(Self(ffi::GcmContext::zeroed()));
        boxed.expand(lib, kind, key, salt, esn).then_some(boxed)
    }

    /// An empty context in the caller's storage, to be filled by [`expand`](Self::expand): large values
    /// are best expanded where they stay, so that no copy of the key is left behind. Until then it
    /// refuses every packet.
    pub const fn blank() -> Self {
        Self(ffi::GcmContext::zeroed())
    }

    /// Expands `key` in place. False, and unchanged, when it is not 16, 24 or 32 bytes.
    pub fn expand(
        &mut self,
        _lib: &'static Library,
        kind: Kind,
        key: &[u8],
        salt: [u8; 4],
        esn: bool,
    ) -> bool {
        let Some(bits) = KeyLen::new(key.len()) else {
            return false;
        };
        let code = match kind {
            Kind::Gcm(_) => bits.index(),
            Kind::Gmac => 3 + bits.index(),
        };
        self.0.expand(key, salt, code, kind.tag_len(), esn);
        true
    }

    /// Asks for the cache lines that a packet of about 64 bytes needs.
    #[inline]
    pub fn prefetch(&self) {
        self.0.prefetch();
    }

    /// The context as bytes, for [`Batch::push_block`]. They are key material.
    #[inline]
    pub const fn block(&self) -> &[u8] {
        self.0.bytes()
    }

    /// The bare AEAD in place, with the context's tag length: returns the tag over any associated data.
    /// For test vectors; packets go through [`Batch`].
    #[doc(hidden)]
    pub fn raw(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], seal: bool) -> Vec<u8> {
        self.0.raw(nonce, aad, data, seal)
    }
}

/// Up to [`MAX_BATCH`](crate::MAX_BATCH) packets of any mix of contexts for one call, which empties the batch.
pub struct Batch<'a>(Run<'a, ffi::GcmContext>);

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

    /// Adds a packet with the context that [`Context::block`] gave. Bytes of another size or alignment, or
    /// that no context has, make the packet refused. False when the batch is full.
    #[inline]
    pub fn push_block(&mut self, block: &'a [u8], esp: &'a mut [u8], seq_hi: u32) -> bool {
        self.0.push_block(block, esp, seq_hi)
    }

    /// Encrypts and authenticates; bit `i` is set if packet `i` was long enough.
    #[inline]
    pub fn seal(&mut self) -> u64 {
        self.0.gcm_seal()
    }

    /// Decrypts; bit `i` is set if the ICV of packet `i` is right. Other payloads must not be used.
    #[inline]
    pub fn open(&mut self) -> u64 {
        self.0.gcm_open()
    }
}

impl Default for Batch<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// Seals one packet as [`Batch::push_block`] and [`Batch::seal`] would, with less ado.
#[inline]
pub fn seal_one(block: &[u8], esp: &mut [u8], seq_hi: u32) -> bool {
    ffi::gcm_one(block, esp, seq_hi, true)
}

/// Opens one packet as [`Batch::push_block`] and [`Batch::open`] would, with less ado.
#[inline]
pub fn open_one(block: &[u8], esp: &mut [u8], seq_hi: u32) -> bool {
    ffi::gcm_one(block, esp, seq_hi, false)
}
