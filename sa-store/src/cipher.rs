//! The interface behind which a software crypto provider does the ciphering of ESP packets.
//!
//! It lives here, below the providers, because a published SA carries its expanded key context.

use std::any::Any;

use crate::sa::{Direction, SaKeys};
use crate::suite::Suite;

/// One ESP packet for a provider.
///
/// `esp` runs from the SPI to the end of the ICV: `SPI(4) | seq(4) | IV | payload .. pad, pad length, next
/// header | ICV`. For sealing, everything but the ciphertext and the ICV is already in place. Its length
/// was checked by the caller: header, IV, two trailer bytes and ICV fit, the ciphered part is a multiple of
/// the suite's alignment for CBC.
pub struct CipherJob<'a> {
    /// The SA's context.
    pub ctx: &'a dyn SaCipher,
    /// The packet from SPI to ICV.
    pub esp: &'a mut [u8],
    /// High half of the sequence number; authenticated when the context was made with ESN.
    pub seq_hi: u32,
    /// Out: the ICV was right (open), or the packet is sealed (seal).
    pub ok: bool,
}

/// Expanded keys of one SA in one provider. Key material is wiped on drop.
///
/// Jobs of several SAs may be handed over in one call when their contexts report the same [`lane`]
/// (same provider, same algorithm family): a multi-buffer provider fills its lanes with them.
///
/// [`lane`]: SaCipher::lane
pub trait SaCipher: Send + Sync + 'static {
    /// Jobs whose contexts have equal lanes may be mixed in one call, on the context of any of them.
    fn lane(&self) -> u16;
    /// Asks the CPU to fetch what the next call will touch. Must not block or fail.
    fn prefetch(&self);
    /// Encrypts and authenticates every job in place and sets `ok`.
    fn seal(&self, jobs: &mut [CipherJob<'_>]);
    /// Authenticates every job in constant time, decrypts those that are right, sets `ok`. The
    /// payload of a job that fails is unspecified; the caller drops it.
    fn open(&self, jobs: &mut [CipherJob<'_>]);
    /// For providers that need the concrete context of a mixed batch.
    fn as_any(&self) -> &dyn Any;
    /// The same for providers whose context is one block of bytes: cheaper than [`as_any`](Self::as_any),
    /// as no type is compared. Empty for all others.
    fn key_block(&self) -> KeyBlock<'_> {
        KeyBlock::default()
    }
}

/// The bytes of an expanded key. It has no `Debug`, like everything that holds keys.
#[derive(Clone, Copy, Default)]
pub struct KeyBlock<'a>(&'a [u8]);

impl<'a> KeyBlock<'a> {
    /// Wraps `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the provider that made them.
    pub const fn expose(self) -> &'a [u8] {
        self.0
    }
}

/// Why a provider did not make a context.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CipherError {
    /// No provider of this build and CPU offers the suite.
    #[error("no crypto provider offers {0} on this machine")]
    Unsupported(Suite),
    /// Key material of the wrong length reached the provider: the SA file check failed to refuse it.
    #[error("{suite} takes {want} bytes of key material, {got} given")]
    KeyLength {
        /// The suite.
        suite: Suite,
        /// What it takes, bytes.
        want: usize,
        /// What came, bytes.
        got: usize,
    },
}

/// Makes contexts; the binary supplies it to whoever builds snapshots.
pub trait CipherFactory: Send + Sync {
    /// Expands `keys` for one SA. `esn` fixes whether the high half is authenticated.
    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        direction: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError>;
    /// Name of the provider that [`make`](Self::make) would use, for `sa show` and metrics.
    fn provider_for(&self, suite: Suite) -> Option<&'static str>;
}
/// The context of an SA whose keys an engine has: software does nothing, so no packet is ever right. For tests and trials of
/// engines by themselves.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCipher;

impl SaCipher for NoCipher {
    fn lane(&self) -> u16 {
        0
    }
    fn prefetch(&self) {}
    fn seal(&self, _: &mut [CipherJob<'_>]) {}
    fn open(&self, _: &mut [CipherJob<'_>]) {}
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl CipherFactory for NoCipher {
    fn make(
        &self,
        _: Suite,
        _: &SaKeys,
        _: bool,
        _: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError> {
        Ok(Box::new(NoCipher))
    }
    fn provider_for(&self, _: Suite) -> Option<&'static str> {
        None
    }
}
