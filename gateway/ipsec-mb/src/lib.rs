//! Safe calls into intel-ipsec-mb, compiled in when its header is found at build time.
//!
//! [`Library::get`] is the door: `None` where the library was not found by the build or does not suit the CPU.
//! [`gcm`] is for AES-GCM and GMAC, [`chain`] for ciphers with HMAC and for ChaCha20-Poly1305. A batch of packets
//! costs one foreign call. The C side keeps no pointer after a call returns.
//!
//! All `unsafe` of the crate is in the private module `ffi`.

#[cfg(have_ipsec_mb)]
mod ffi;
#[cfg(not(have_ipsec_mb))]
#[path = "absent.rs"]
mod ffi;

pub mod chain;
pub mod gcm;

use std::sync::OnceLock;

/// Packets that one batch takes.
pub const MAX_BATCH: usize = 64;

/// AES key length of a context, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyLen {
    /// 16 bytes.
    K16,
    /// 24 bytes.
    K24,
    /// 32 bytes.
    K32,
}

impl KeyLen {
    /// From a length in bytes.
    pub const fn new(bytes: usize) -> Option<Self> {
        match bytes {
            16 => Some(Self::K16),
            24 => Some(Self::K24),
            32 => Some(Self::K32),
            _ => None,
        }
    }

    const fn bytes(self) -> u8 {
        match self {
            Self::K16 => 16,
            Self::K24 => 24,
            Self::K32 => 32,
        }
    }

    const fn index(self) -> u8 {
        match self {
            Self::K16 => 0,
            Self::K24 => 1,
            Self::K32 => 2,
        }
    }
}

/// Why the library cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The header or the library was missing when this was built, or the CPU is not x86-64.
    NotBuilt,
    /// The library found no implementation for this CPU, or no memory.
    Cpu,
    /// The library installed here is older than the header that this was built with.
    Older,
    /// The library's own self-test failed.
    SelfTest,
}

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotBuilt => "not part of this build",
            Self::Cpu => "does not support this CPU",
            Self::Older => "installed library is older than the one at build time",
            Self::SelfTest => "self-test of the library failed",
        })
    }
}

/// Proof that the library is usable, and what it chose.
#[derive(Clone, Copy, Debug)]
pub struct Library {
    version: u32,
    vaes: bool,
}

impl Library {
    /// The library, started on the first call.
    pub fn get() -> Result<&'static Self, Unavailable> {
        static LIBRARY: OnceLock<Result<Library, Unavailable>> = OnceLock::new();
        LIBRARY
            .get_or_init(|| ffi::start().map(|(version, vaes)| Self { version, vaes }))
            .as_ref()
            .map_err(|e| *e)
    }

    /// Version as major, minor, patch.
    pub const fn version(&self) -> (u32, u32, u32) {
        (
            self.version >> 16 & 0xff,
            self.version >> 8 & 0xff,
            self.version & 0xff,
        )
    }

    /// Whether it uses VAES and VPCLMULQDQ on 512-bit registers, its fast GCM.
    pub const fn is_vaes_avx512(&self) -> bool {
        self.vaes
    }
}
