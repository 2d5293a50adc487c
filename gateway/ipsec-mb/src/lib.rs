//! Safe calls into intel-ipsec-mb, compiled in when its header is found at build time.
//!
//! [`Library::get`] is the door: `None` where the library was not found by the build or does not suit the CPU.
//! [`gcm`] is for AES-GCM and GMAC, [`chain`] for ciphers with HMAC and for ChaCha20-Poly1305. A batch of packets
//! costs one foreign call. The C side keeps no pointer after a call returns.
//!
//! [`wipe`] needs no library: it clears the memory of keys that other libraries leave behind.
//!
//! All `unsafe` of the crate is in `wipe` and in the private module `ffi`.

#[cfg(have_ipsec_mb)]
mod ffi;
#[cfg(not(have_ipsec_mb))]
#[path = "absent.rs"]
mod ffi;

pub mod chain;
pub mod gcm;
pub mod wipe;

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

#[cfg(all(test, have_ipsec_mb))]
mod tests {
    use super::*;

    fn context(kind: gcm::Kind) -> Box<gcm::Context> {
        let lib = Library::get().expect("built with the library, on a CPU that it supports");
        gcm::Context::new(lib, kind, &[1; 16], [2; 4], false).expect("a 16-byte key")
    }

    #[test]
    fn a_context_that_was_not_expanded_refuses_every_packet() {
        let blank = gcm::Context::blank();
        let mut esp = [0; 100];
        let mut batch = gcm::Batch::new();
        assert!(batch.push(&blank, &mut esp, 0));
        assert_eq!(batch.seal(), 0);
        assert!(!gcm::open_one(blank.block(), &mut esp, 0));
        assert_eq!(esp, [0; 100]);

        let blank = chain::Context::blank();
        let mut batch = chain::Batch::new();
        assert!(batch.push(&blank, &mut esp, 0));
        assert_eq!(batch.open(), 0);
    }

    #[test]
    fn bytes_that_are_no_context_refuse_every_packet() {
        let real = context(gcm::Kind::Gmac);
        let mut esp = [7; 100];
        let wrong: [&[u8]; 3] = [&[], &real.block()[1..], &[0xff; 64]];
        for block in wrong {
            assert!(!gcm::seal_one(block, &mut esp, 0));
        }
        // The right size and alignment with any content is refused or makes nonsense of the packet, no worse.
        #[repr(align(64))]
        struct Aligned([u8; 4096]);
        for fill in 0..=255 {
            let bytes = Aligned([fill; 4096]);
            let sealed = gcm::seal_one(&bytes.0[..real.block().len()], &mut esp, 0);
            // Kind and tag length are the same byte here; no value is good for both.
            assert!(!sealed);
        }
    }

    #[test]
    fn a_full_batch_takes_no_more_and_is_empty_after_the_call() {
        let ctx = context(gcm::Kind::Gcm(gcm::TagLen::T8));
        let mut packets = vec![[3u8; 64]; MAX_BATCH + 1];
        let mut batch = gcm::Batch::new();
        let taken: Vec<bool> = packets.iter_mut().map(|p| batch.push(&ctx, p, 0)).collect();
        assert!(taken[..MAX_BATCH].iter().all(|t| *t) && !taken[MAX_BATCH]);
        assert_eq!(batch.seal(), u64::MAX);
        assert_eq!(batch.seal(), 0);
        assert!(packets[..MAX_BATCH].iter().all(|p| *p == packets[0]));
        assert_eq!(packets[MAX_BATCH], [3; 64]);
    }

    #[test]
    fn packets_too_short_or_too_long_are_refused_and_left_alone() {
        let ctx = context(gcm::Kind::Gcm(gcm::TagLen::T16));
        for n in (0..32).chain([65_536, 70_000]) {
            let mut esp = vec![5u8; n];
            assert!(!gcm::seal_one(ctx.block(), &mut esp, 0), "{n}");
            assert!(esp.iter().all(|b| *b == 5));
        }
        assert!(gcm::seal_one(ctx.block(), &mut [5u8; 32], 0));
        assert!(gcm::seal_one(ctx.block(), &mut vec![5u8; 65_535], 0));
    }

    #[test]
    fn every_thread_has_its_own_scheduler() {
        let work = |seed: u8| {
            let lib = Library::get().expect("as above");
            let mut ctx = chain::Context::blank();
            let cipher = chain::Cipher::Cbc(&[9; 16]);
            let mac = chain::Mac::Sha256;
            assert!(ctx.expand_hmac(lib, cipher, mac, &[4; 32], true, chain::Way::Seal));
            let mut packets: Vec<Vec<u8>> = (1..40).map(|n| vec![seed; 40 + 16 * n]).collect();
            let mut batch = chain::Batch::new();
            for p in &mut packets {
                assert!(batch.push(&ctx, p, 1));
            }
            assert_eq!(batch.seal(), (1 << 39) - 1);
            packets
        };
        let alone = work(8);
        std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|_| s.spawn(|| work(8))).collect();
            for t in threads {
                assert_eq!(t.join().expect("no panic"), alone);
            }
        });
    }
}
