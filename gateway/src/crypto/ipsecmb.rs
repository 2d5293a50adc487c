//! The intel-ipsec-mb provider: every suite, by direct calls for AES-GCM and GMAC and through the multi-buffer
//! scheduler for the rest. Present where the library was found at build time.
//!
//! All GCM and GMAC contexts share one lane, all others a second one, so that packets of many SAs form one run.

use std::any::Any;

use ipsec_mb::{Library, MAX_BATCH, Unavailable, chain, gcm};
use sa_store::cipher::{CipherJob, KeyBlock, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::{AeadIcv, Cipher, Hmac, Suite};
use subtle::ConstantTimeEq;

use super::provider::{Provider, ProviderId, RawAead, key_and_salt};

const GCM_LANE: u16 = ProviderId::IpsecMb.lane(0);
const CHAIN_LANE: u16 = ProviderId::IpsecMb.lane(1);

/// The provider.
#[derive(Clone, Copy, Debug)]
pub struct IpsecMb(&'static Library);

impl IpsecMb {
    /// Starts the library.
    pub fn new() -> Result<Self, Unavailable> {
        Library::get().map(Self)
    }

    /// What the library is and does, for the start log.
    pub fn describe(&self) -> String {
        let (major, minor, patch) = self.0.version();
        let how = if self.0.is_vaes_avx512() {
            "VAES, AVX-512"
        } else {
            "without VAES on 512-bit registers"
        };
        format!("{major}.{minor}.{patch}, {how}")
    }
}

impl Provider for IpsecMb {
    fn id(&self) -> ProviderId {
        ProviderId::IpsecMb
    }

    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        direction: Direction,
    ) -> Option<Box<dyn SaCipher>> {
        let way = match direction {
            Direction::Out => chain::Way::Seal,
            Direction::In => chain::Way::Open,
        };
        match suite {
            Suite::Gcm(..) | Suite::Gmac(_) => {
                let (key, salt) = key_and_salt(&keys.enc)?;
                let mut sa = Box::new(GcmSa(gcm::Context::blank()));
                if !sa.0.expand(self.0, gcm_kind(suite)?, key, salt, esn) {
                    return None;
                }
                Some(sa)
            }
            Suite::ChaCha20Poly1305 => {
                let (key, salt) = key_and_salt(&keys.enc)?;
                let mut sa = Box::new(ChainSa(chain::Context::blank()));
                if !sa
                    .0
                    .expand_chacha(self.0, key.try_into().ok()?, salt, esn, way)
                {
                    return None;
                }
                Some(sa)
            }
            Suite::CipherHmac(cipher, mac) => {
                let cipher = match cipher {
                    Cipher::Null => chain::Cipher::Null,
                    Cipher::Cbc(_) => chain::Cipher::Cbc(&keys.enc),
                    Cipher::Ctr(_) => {
                        let (key, nonce) = key_and_salt(&keys.enc)?;
                        chain::Cipher::Ctr(key, nonce)
                    }
                };
                let mut sa = Box::new(ChainSa(chain::Context::blank()));
                let mac = chain_mac(mac);
                if !sa.0.expand_hmac(self.0, cipher, mac, &keys.auth, esn, way) {
                    return None;
                }
                Some(sa)
            }
        }
    }

    fn raw_aead(&self, suite: Suite, key: &[u8]) -> Option<Box<dyn RawAead>> {
        if !matches!(suite, Suite::Gcm(..)) {
            return None;
        }
        let context = gcm::Context::new(self.0, gcm_kind(suite)?, key, [0; 4], false)?;
        Some(Box::new(RawGcm(context)))
    }
}

const fn gcm_kind(suite: Suite) -> Option<gcm::Kind> {
    match suite {
        Suite::Gcm(_, AeadIcv::L8) => Some(gcm::Kind::Gcm(gcm::TagLen::T8)),
        Suite::Gcm(_, AeadIcv::L12) => Some(gcm::Kind::Gcm(gcm::TagLen::T12)),
        Suite::Gcm(_, AeadIcv::L16) => Some(gcm::Kind::Gcm(gcm::TagLen::T16)),
        Suite::Gmac(_) => Some(gcm::Kind::Gmac),
        Suite::ChaCha20Poly1305 | Suite::CipherHmac(..) => None,
    }
}

const fn chain_mac(mac: Hmac) -> chain::Mac {
    match mac {
        Hmac::Sha1_96 => chain::Mac::Sha1,
        Hmac::Sha256_128 => chain::Mac::Sha256,
        Hmac::Sha384_192 => chain::Mac::Sha384,
        Hmac::Sha512_256 => chain::Mac::Sha512,
    }
}

/// AES-GCM or AES-GMAC.
struct GcmSa(gcm::Context);

impl GcmSa {
    /// The batch takes contexts as key blocks: for a small packet, comparing types costs as much as a third
    /// of the ciphering.
    #[inline]
    fn run(jobs: &mut [CipherJob<'_>], call: impl Fn(&mut gcm::Batch<'_>) -> u64) {
        for part in jobs.chunks_mut(MAX_BATCH) {
            let mut batch = gcm::Batch::new();
            for job in part.iter_mut() {
                // A context of another kind breaks the lane rule; the batch refuses its block.
                batch.push_block(job.ctx.key_block().expose(), job.esp, job.seq_hi);
            }
            let ok = call(&mut batch);
            finish(part, ok);
        }
    }
}

impl SaCipher for GcmSa {
    fn lane(&self) -> u16 {
        GCM_LANE
    }

    fn prefetch(&self) {
        self.0.prefetch();
    }

    fn seal(&self, jobs: &mut [CipherJob<'_>]) {
        if let [job] = jobs {
            job.ok = gcm::seal_one(job.ctx.key_block().expose(), job.esp, job.seq_hi);
        } else {
            Self::run(jobs, |batch| batch.seal());
        }
    }

    fn open(&self, jobs: &mut [CipherJob<'_>]) {
        if let [job] = jobs {
            job.ok = gcm::open_one(job.ctx.key_block().expose(), job.esp, job.seq_hi);
        } else {
            Self::run(jobs, |batch| batch.open());
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn key_block(&self) -> KeyBlock<'_> {
        KeyBlock::new(self.0.block())
    }
}

/// Cipher with HMAC, or ChaCha20-Poly1305.
struct ChainSa(chain::Context);

impl ChainSa {
    fn run(&self, jobs: &mut [CipherJob<'_>], call: impl Fn(&mut chain::Batch<'_>) -> u64) {
        for part in jobs.chunks_mut(MAX_BATCH) {
            let mut batch = chain::Batch::new();
            for job in part.iter_mut() {
                match job.ctx.as_any().downcast_ref::<Self>() {
                    Some(sa) => batch.push(&sa.0, job.esp, job.seq_hi),
                    // Breaks the lane rule: an empty packet keeps the place and is refused.
                    None => batch.push(&self.0, &mut [], 0),
                };
            }
            let ok = call(&mut batch);
            finish(part, ok);
        }
    }
}

impl SaCipher for ChainSa {
    fn lane(&self) -> u16 {
        CHAIN_LANE
    }

    fn prefetch(&self) {
        self.0.prefetch();
    }

    fn seal(&self, jobs: &mut [CipherJob<'_>]) {
        self.run(jobs, |batch| batch.seal());
    }

    fn open(&self, jobs: &mut [CipherJob<'_>]) {
        self.run(jobs, |batch| batch.open());
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Hands the batch's result bits to its jobs.
#[inline]
fn finish(jobs: &mut [CipherJob<'_>], mut ok: u64) {
    for job in jobs {
        job.ok = ok & 1 == 1;
        ok >>= 1;
    }
}

/// The bare GCM, for vectors.
struct RawGcm(Box<gcm::Context>);

impl RawAead for RawGcm {
    fn seal(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8]) -> Vec<u8> {
        self.0.raw(nonce, aad, data, true)
    }

    fn open(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], tag: &[u8]) -> bool {
        let want = self.0.raw(nonce, aad, data, false);
        !tag.is_empty() && want.ct_eq(tag).into()
    }
}
