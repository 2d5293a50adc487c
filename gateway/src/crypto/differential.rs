//! Holds providers against the reference: for property tests and the fuzzer.

use sa_store::cipher::{CipherJob, SaCipher};
use sa_store::sa::{Direction, SaKeys};
use sa_store::suite::Suite;
use zeroize::Zeroizing;

use super::provider::Provider;
use super::rustcrypto::RustCrypto;
use super::select::available;

/// One packet to try.
#[derive(Clone, Debug)]
pub struct Case {
    /// Algorithms.
    pub suite: Suite,
    /// Key material is made from this.
    pub seed: u8,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// High half of the sequence number.
    pub seq_hi: u32,
    /// Bytes of body wanted; rounded up to the suite's alignment.
    pub body: usize,
    /// What to flip before opening: a byte, counted modulo the packet's length, and a mask. Mask 0: nothing.
    pub flip: (usize, u8),
    /// Cut the packet to this length before opening, if shorter.
    pub cut: Option<usize>,
}

/// Key material of the suite's lengths, made from `seed`.
pub fn keys(suite: Suite, seed: u8) -> SaKeys {
    let material = |n: usize, mut x: u8| -> Zeroizing<Vec<u8>> {
        let bytes = (0..n).map(|_| {
            x = x.wrapping_mul(29).wrapping_add(seed | 1);
            x
        });
        Zeroizing::new(bytes.collect())
    };
    SaKeys {
        enc: material(suite.enc_key_len(), seed),
        auth: material(suite.auth_key_len(), !seed),
    }
}

/// A packet for sealing with `body` bytes or a few more, from SPI to where the ICV goes.
pub fn clear_packet(suite: Suite, body: usize, mut x: u8) -> Vec<u8> {
    let body = body.max(2).next_multiple_of(suite.pad_align());
    let n = 8 + suite.iv_len() + body + suite.icv_len();
    let bytes = (0..n).map(|_| {
        x = x.wrapping_mul(13).wrapping_add(101);
        x
    });
    bytes.collect()
}

/// Runs `packets` as one batch on the context of the first; the results in order.
pub fn run(
    contexts: &[&dyn SaCipher],
    packets: &mut [Vec<u8>],
    seq_hi: &[u32],
    direction: Direction,
) -> Vec<bool> {
    let mut jobs: Vec<_> = contexts
        .iter()
        .zip(packets)
        .zip(seq_hi)
        .map(|((ctx, esp), hi)| CipherJob {
            ctx: *ctx,
            esp,
            seq_hi: *hi,
            ok: false,
        })
        .collect();
    if let Some(first) = contexts.first() {
        match direction {
            Direction::Out => first.seal(&mut jobs),
            Direction::In => first.open(&mut jobs),
        }
    }
    jobs.iter().map(|j| j.ok).collect()
}

/// Seals and opens `cases` with every provider, batched by lane, and compares with the reference.
///
/// # Panics
/// When a provider disagrees.
pub fn check(cases: &[Case]) {
    for provider in available() {
        check_provider(&*provider, cases);
    }
}

fn check_provider(provider: &dyn Provider, cases: &[Case]) {
    let mut lanes: Vec<(u16, Vec<Member<'_>>)> = Vec::new();
    for case in cases {
        let Some(member) = Member::new(provider, case) else {
            continue;
        };
        let lane = member.out.lane();
        match lanes.iter_mut().find(|(l, _)| *l == lane) {
            Some((_, members)) => members.push(member),
            None => lanes.push((lane, vec![member])),
        }
    }
    for (_, members) in lanes {
        check_lane(provider, &members);
    }
}

/// A case with its contexts in the provider, and what the reference makes of it.
struct Member<'a> {
    case: &'a Case,
    out: Box<dyn SaCipher>,
    inn: Box<dyn SaCipher>,
    clear: Vec<u8>,
    sealed: Vec<u8>,
    damaged: Vec<u8>,
    opens: bool,
}

impl<'a> Member<'a> {
    fn new(provider: &dyn Provider, case: &'a Case) -> Option<Self> {
        let keys = keys(case.suite, case.seed);
        let make = |p: &dyn Provider, d| p.make(case.suite, &keys, case.esn, d);
        let out = make(provider, Direction::Out)?;
        let inn = make(provider, Direction::In)?;
        let clear = clear_packet(case.suite, case.body, case.seed);

        let seal = make(&RustCrypto, Direction::Out).expect("the reference offers every suite");
        let open = make(&RustCrypto, Direction::In).expect("the reference offers every suite");
        let mut sealed = vec![clear.clone()];
        let ok = run(&[&*seal], &mut sealed, &[case.seq_hi], Direction::Out);
        assert_eq!(ok, [true], "reference seals {case:?}");
        let sealed = sealed.swap_remove(0);

        let mut damaged = sealed.clone();
        damaged.truncate(case.cut.unwrap_or(usize::MAX));
        if !damaged.is_empty() {
            let at = case.flip.0 % damaged.len();
            damaged[at] ^= case.flip.1;
        }
        let mut opened = vec![damaged.clone()];
        let ok = run(&[&*open], &mut opened, &[case.seq_hi], Direction::In);
        assert_eq!(
            ok[0],
            damaged == sealed,
            "reference refuses what was changed: {case:?}"
        );
        if ok[0] {
            let body = clear.len() - case.suite.icv_len();
            assert_eq!(opened[0][..body], clear[..body], "reference opens {case:?}");
        }
        Some(Self {
            case,
            out,
            inn,
            clear,
            sealed,
            damaged,
            opens: ok[0],
        })
    }
}

fn check_lane(provider: &dyn Provider, members: &[Member<'_>]) {
    let id = provider.id();
    let hi: Vec<u32> = members.iter().map(|m| m.case.seq_hi).collect();

    let contexts: Vec<&dyn SaCipher> = members.iter().map(|m| &*m.out).collect();
    let mut packets: Vec<_> = members.iter().map(|m| m.clear.clone()).collect();
    let ok = run(&contexts, &mut packets, &hi, Direction::Out);
    for ((member, packet), ok) in members.iter().zip(&packets).zip(ok) {
        assert!(ok, "{id} seals {:?}", member.case);
        assert_eq!(*packet, member.sealed, "{id} seals {:?}", member.case);
    }

    let contexts: Vec<&dyn SaCipher> = members.iter().map(|m| &*m.inn).collect();
    let mut packets: Vec<_> = members.iter().map(|m| m.damaged.clone()).collect();
    let ok = run(&contexts, &mut packets, &hi, Direction::In);
    for ((member, packet), ok) in members.iter().zip(&packets).zip(ok) {
        assert_eq!(ok, member.opens, "{id} opens {:?}", member.case);
        if ok {
            let body = packet.len() - member.case.suite.icv_len();
            assert_eq!(
                packet[..body],
                member.clear[..body],
                "{id} opens {:?}",
                member.case
            );
        }
    }
}

/// Entry of the fuzzer: each 12 bytes of `data` make a case.
pub fn fuzz(data: &[u8]) {
    let suites = Suite::all();
    let cases: Vec<Case> = data
        .chunks_exact(12)
        .take(80)
        .map(|c| {
            let word = |i: usize| usize::from(c[i]) << 8 | usize::from(c[i + 1]);
            Case {
                suite: suites[usize::from(c[0]) % suites.len()],
                seed: c[1],
                esn: c[2] & 1 == 1,
                seq_hi: u32::from(c[2]) << 24 | u32::from(c[3]),
                body: word(4) % 9001,
                flip: (word(6), c[8]),
                cut: (c[9] & 3 == 3).then(|| word(10)),
            }
        })
        .collect();
    check(&cases);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_case() -> impl Strategy<Value = Case> {
        let body = prop_oneof![0..300usize, 0..2000usize, 0..9000usize];
        let flip = prop_oneof![
            3 => Just((0, 0)),
            2 => (any::<usize>(), 1..=255u8),
        ];
        let cut = prop_oneof![
            5 => Just(None),
            1 => (0..200usize).prop_map(Some),
        ];
        (
            proptest::sample::select(Suite::all()),
            any::<u8>(),
            any::<bool>(),
            any::<u32>(),
            body,
            flip,
            cut,
        )
            .prop_map(|(suite, seed, esn, seq_hi, body, flip, cut)| Case {
                suite,
                seed,
                esn,
                seq_hi,
                body,
                flip,
                cut,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn every_provider_does_what_the_reference_does(
            cases in proptest::collection::vec(any_case(), 1..100)
        ) {
            check(&cases);
        }
    }

    #[test]
    fn every_provider_agrees_at_every_short_length() {
        for suite in Suite::all() {
            for esn in [false, true] {
                let cases: Vec<Case> = (0..300)
                    .step_by(suite.pad_align())
                    .map(|body| Case {
                        suite,
                        seed: u8::try_from(body % 256).unwrap_or(0),
                        esn,
                        seq_hi: 0x8000_0001,
                        body,
                        flip: (0, 0),
                        cut: None,
                    })
                    .collect();
                check(&cases);
            }
        }
    }

    #[test]
    fn no_provider_accepts_or_panics_on_a_cut_packet() {
        for suite in Suite::all() {
            let cases: Vec<Case> = (0..80)
                .map(|cut| Case {
                    suite,
                    seed: 7,
                    esn: cut % 2 == 0,
                    seq_hi: 1,
                    body: 64,
                    flip: (0, 0),
                    cut: Some(cut),
                })
                .collect();
            check(&cases);
        }
    }

    #[test]
    fn no_provider_accepts_a_flipped_bit_anywhere() {
        for suite in Suite::all() {
            let cases: Vec<Case> = (0..100)
                .map(|at| Case {
                    suite,
                    seed: 9,
                    esn: at % 2 == 0,
                    seq_hi: 5,
                    body: 32,
                    flip: (at, 1 << (at % 8)),
                    cut: None,
                })
                .collect();
            check(&cases);
        }
    }

    #[test]
    fn fuzz_entry_takes_anything() {
        let data: Vec<u8> = (0..997)
            .map(|i| u8::try_from(i * 89 % 256).unwrap_or(0))
            .collect();
        fuzz(&data);
        fuzz(&[]);
    }
}
