//! Software ciphering of ESP packets: providers behind [`sa_store::cipher::SaCipher`].
//!
//! Every provider puts the same bytes on the wire; [`rustcrypto`] is the one that the others are held against.

mod aead;
pub mod awslc;
pub mod cpu;
#[doc(hidden)]
pub mod differential;
mod each;
pub mod ipsecmb;
pub mod known;
#[doc(hidden)]
pub mod measure;
mod packet;
mod provider;
pub mod ring_provider;
pub mod rustcrypto;
pub mod select;

#[doc(hidden)]
pub use differential::fuzz as fuzz_differential;
pub use provider::{Provider, ProviderId, UnknownProvider};

use sa_store::cipher::{CipherError, CipherFactory, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::Suite;

/// One provider, without choice.
pub struct Fixed<P>(pub P);

impl<P: Provider> CipherFactory for Fixed<P> {
    fn make(
        &self,
        suite: Suite,
        keys: &SaKeys,
        esn: bool,
        direction: Direction,
    ) -> Result<Box<dyn SaCipher>, CipherError> {
        provider::check_keys(suite, keys)?;
        self.0
            .make(suite, keys, esn, direction)
            .ok_or(CipherError::Unsupported(suite))
    }

    fn provider_for(&self, _suite: Suite) -> Option<&'static str> {
        Some(self.0.id().name())
    }
}

#[cfg(test)]
mod tests {
    use sa_store::cipher::CipherJob;

    use super::differential::{clear_packet, keys};
    use super::*;

    fn run_one(ctx: &dyn SaCipher, esp: &mut [u8], seq_hi: u32, seal: bool) -> bool {
        let mut jobs = [CipherJob {
            ctx,
            esp,
            seq_hi,
            ok: false,
        }];
        if seal {
            ctx.seal(&mut jobs);
        } else {
            ctx.open(&mut jobs);
        }
        jobs[0].ok
    }

    #[test]
    fn what_is_sealed_opens_and_nothing_changed_does() {
        let factory = Fixed(rustcrypto::RustCrypto);
        for suite in Suite::all() {
            for esn in [false, true] {
                let out = factory.make(suite, &keys(suite, 3), esn, Direction::Out);
                let inn = factory.make(suite, &keys(suite, 3), esn, Direction::In);
                let (out, inn) = (out.expect("offered"), inn.expect("offered"));
                let clear = clear_packet(suite, 64, 3);
                let mut esp = clear.clone();
                assert!(run_one(&*out, &mut esp, 9, true), "{suite}");
                let icv_at = esp.len() - suite.icv_len();
                for i in 0..esp.len() {
                    let mut bad = esp.clone();
                    bad[i] ^= 0x40;
                    assert!(!run_one(&*inn, &mut bad, 9, false), "{suite} byte {i}");
                }
                let mut other_hi = esp.clone();
                assert_eq!(run_one(&*inn, &mut other_hi, 8, false), !esn, "{suite}");
                assert!(run_one(&*inn, &mut esp, 9, false), "{suite}");
                assert_eq!(esp[..icv_at], clear[..icv_at], "{suite}");
            }
        }
    }

    #[test]
    fn keys_of_a_wrong_length_are_refused() {
        let suite = "aes-128-gcm-16".parse().expect("a suite");
        let mut short = keys(suite, 1);
        short.enc.pop();
        let made = Fixed(rustcrypto::RustCrypto).make(suite, &short, false, Direction::In);
        assert!(matches!(
            made.err(),
            Some(CipherError::KeyLength {
                want: 20,
                got: 19,
                ..
            })
        ));
    }
}
