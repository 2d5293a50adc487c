//! Known-answer tests, run at every start: a provider that fails one does not serve the suite.
//!
//! The answers come from OpenSSL (see `tests/vectors/known_answers.py`), which is none of the providers.

use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::Suite;
use zeroize::Zeroizing;

use super::differential::run;
use super::provider::Provider;

const ANSWERS: &str = include_str!("known_answers.txt");
const SEQ_HI: u32 = 0x0102_0304;

/// What a provider got wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KnownAnswerError {
    /// The table has no answer for the suite.
    #[error("no known answer for {0}")]
    Missing(Suite),
    /// It seals differently.
    #[error("sealing {body} bytes gives a wrong packet ({bits}-bit sequence numbers)")]
    Seal {
        /// Body of the packet, bytes.
        body: usize,
        /// Sequence number length.
        bits: u8,
    },
    /// It does not open what is right.
    #[error("opening {body} bytes fails ({bits}-bit sequence numbers)")]
    Open {
        /// Body of the packet, bytes.
        body: usize,
        /// Sequence number length.
        bits: u8,
    },
    /// It accepts what was changed.
    #[error("a changed packet of {body} bytes is accepted ({bits}-bit sequence numbers)")]
    Forged {
        /// Body of the packet, bytes.
        body: usize,
        /// Sequence number length.
        bits: u8,
    },
}

/// One line of the table.
struct Answer {
    bits: u8,
    body: usize,
    icv: Vec<u8>,
}

/// Tries every known answer of `suite`; `None` when the provider does not offer the suite.
pub fn check(provider: &dyn Provider, suite: Suite) -> Option<Result<(), KnownAnswerError>> {
    let keys = SaKeys {
        enc: Zeroizing::new(pattern(suite.enc_key_len(), 1)),
        auth: Zeroizing::new(pattern(suite.auth_key_len(), 2)),
    };
    let mut tried = 0;
    for answer in answers(suite) {
        let esn = answer.bits == 64;
        let out = provider.make(suite, &keys, esn, Direction::Out)?;
        let inn = provider.make(suite, &keys, esn, Direction::In)?;
        if let Err(e) = try_one(suite, &answer, |packet, direction| {
            let ctx = match direction {
                Direction::Out => &*out,
                Direction::In => &*inn,
            };
            run(&[ctx], std::slice::from_mut(packet), &[SEQ_HI], direction) == [true]
        }) {
            return Some(Err(e));
        }
        tried += 1;
    }
    Some(if tried == 0 {
        Err(KnownAnswerError::Missing(suite))
    } else {
        Ok(())
    })
}

/// `cipher` seals or opens the packet in place and says whether it accepted it.
fn try_one(
    suite: Suite,
    answer: &Answer,
    mut cipher: impl FnMut(&mut Vec<u8>, Direction) -> bool,
) -> Result<(), KnownAnswerError> {
    let Answer { bits, body, .. } = *answer;
    let clear = pattern(8 + suite.iv_len() + body, 3);
    let mut packet = clear.clone();
    packet.resize(clear.len() + suite.icv_len(), 0);
    if !cipher(&mut packet, Direction::Out) || packet[clear.len()..] != answer.icv {
        return Err(KnownAnswerError::Seal { body, bits });
    }
    let sealed = packet.clone();
    if !cipher(&mut packet, Direction::In) || packet[..clear.len()] != clear {
        return Err(KnownAnswerError::Open { body, bits });
    }
    // Header, IV or body, and ICV.
    for at in [1, 12, sealed.len() - 1] {
        let mut forged = sealed.clone();
        forged[at] ^= 0x10;
        if cipher(&mut forged, Direction::In) {
            return Err(KnownAnswerError::Forged { body, bits });
        }
    }
    Ok(())
}

/// The rule that known_answers.py makes keys and packets by.
fn pattern(n: usize, tag: usize) -> Vec<u8> {
    (0..n)
        .map(|i| u8::try_from((i * 31 + i / 256 + tag) % 256).unwrap_or(0))
        .collect()
}

fn answers(suite: Suite) -> impl Iterator<Item = Answer> {
    let name = suite.to_string();
    ANSWERS.lines().filter_map(move |line| {
        let mut words = line.split_ascii_whitespace();
        if words.next()? != name {
            return None;
        }
        let bits = words.next()?.parse().ok()?;
        let body = words.next()?.parse().ok()?;
        let icv = hex(words.next()?)?;
        (icv.len() == suite.icv_len()).then_some(Answer { bits, body, icv })
    })
}

fn hex(text: &str) -> Option<Vec<u8>> {
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::select::available;
    use super::*;

    #[test]
    fn every_suite_has_six_answers() {
        for suite in Suite::all() {
            assert_eq!(answers(suite).count(), 6, "{suite}");
        }
    }

    #[test]
    fn every_provider_gives_the_known_answers() {
        for provider in available() {
            for suite in Suite::all() {
                let result = check(&*provider, suite);
                assert!(
                    matches!(result, None | Some(Ok(()))),
                    "{} {suite}: {result:?}",
                    provider.id()
                );
            }
        }
    }

    #[test]
    fn a_wrong_cipher_is_found_out() {
        let suite: Suite = "aes-128-gcm-16".parse().expect("a suite");
        let answer = answers(suite).next().expect("in the table");
        let right_icv = answer.icv.clone();
        let seal = |packet: &mut Vec<u8>| {
            let at = packet.len() - 16;
            packet[at..].copy_from_slice(&right_icv);
        };
        let (body, bits) = (answer.body, answer.bits);

        let wrong = try_one(suite, &answer, |_, _| true);
        assert_eq!(wrong, Err(KnownAnswerError::Seal { body, bits }));
        let wrong = try_one(suite, &answer, |packet, direction| {
            seal(packet);
            direction == Direction::Out
        });
        assert_eq!(wrong, Err(KnownAnswerError::Open { body, bits }));
        let wrong = try_one(suite, &answer, |packet, direction| {
            if direction == Direction::Out {
                seal(packet);
            }
            true
        });
        assert_eq!(wrong, Err(KnownAnswerError::Forged { body, bits }));
    }
}
