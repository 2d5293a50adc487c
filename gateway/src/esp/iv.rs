//! Unpredictable IVs for CBC, RFC 3602 section 3.

use ctr::cipher::{KeyIvInit, StreamCipher};
use zeroize::Zeroizing;

/// Bytes made at once: the next key, then 254 IVs.
const BATCH: usize = 4096;
const KEY: usize = 32;

/// IV generator of one worker: AES-256 in counter mode, whose key is replaced by its own first output at
/// every refill, so that a later look into memory tells nothing of IVs already used.
pub struct CbcIvGen {
    buffer: Box<Zeroizing<[u8; BATCH]>>,
    at: usize,
}

impl CbcIvGen {
    /// Seeded by the operating system.
    ///
    /// # Errors
    /// When the operating system has no randomness to give.
    pub fn from_os() -> Result<Self, getrandom::Error> {
        let mut seed = Zeroizing::new([0u8; KEY]);
        getrandom::fill(seed.as_mut_slice())?;
        Ok(Self::from_seed(&seed))
    }

    /// The same IVs for the same seed: only for tests and reproducible offline runs.
    pub fn from_seed(seed: &[u8; KEY]) -> Self {
        let mut g = Self {
            buffer: Box::new(Zeroizing::new([0; BATCH])),
            at: BATCH,
        };
        g.buffer[..KEY].copy_from_slice(seed);
        g
    }

    /// The next IV.
    #[inline]
    pub fn next_iv(&mut self) -> [u8; 16] {
        if self.at >= BATCH {
            self.refill();
        }
        let mut iv = [0; 16];
        if let Some(next) = self.buffer.get(self.at..self.at + 16) {
            iv.copy_from_slice(next);
        }
        self.at += 16;
        iv
    }

    #[cold]
    fn refill(&mut self) {
        let mut key = Zeroizing::new([0u8; KEY]);
        key.copy_from_slice(&self.buffer[..KEY]);
        self.buffer.fill(0);
        let mut stream = ctr::Ctr128BE::<aes::Aes256>::new((&*key).into(), &[0; 16].into());
        stream.apply_keystream(self.buffer.as_mut_slice());
        self.at = KEY;
    }
}

impl std::fmt::Debug for CbcIvGen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CbcIvGen(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ivs_do_not_repeat_across_refills() {
        let mut g = CbcIvGen::from_os().unwrap();
        let ivs: HashSet<_> = (0..1000).map(|_| g.next_iv()).collect();
        assert_eq!(ivs.len(), 1000);
    }

    #[test]
    fn a_seed_fixes_the_sequence_and_another_seed_changes_it() {
        let run = |seed| {
            let mut g = CbcIvGen::from_seed(&[seed; 32]);
            (0..600).map(move |_| g.next_iv()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1)[0], run(2)[0]);
        assert!(!run(1).contains(&[0; 16]));
    }
}
