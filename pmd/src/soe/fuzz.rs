//! A hostile device, for fuzzing: whatever it writes into the receive rings, no panic, no frame lost, no job ended twice, and
//! nothing outbound given on but with the number that it was matched by.

use sa_store::sa::Direction;

use super::rig::{id, inner, rig, sealed};
use super::*;
use crate::engine::JobKind;
use crate::qdma::hub::dummy_header;

#[derive(Debug, Clone)]
enum Step {
    Seal(u8),
    Open(u8),
    /// Ring, slot, flags, packet: a likely result.
    Result(u8, u8, u32, u16, u32),
    /// Any bytes behind the right header.
    Noise(u8, u32, u32, Vec<u8>),
    /// Any descriptor.
    Words(u8, u32, [u32; 3]),
    /// Requests done, or dropped.
    Done(bool),
    Poll,
    Later(u64),
    Remove,
    Registers(u32),
}

/// Runs the driver against a device that `data` plays.
///
/// # Panics
/// When a frame is lost, a job ends twice, or a packet is given on under a number that it does not have; that is its purpose.
pub fn fuzz_device(data: &[u8]) {
    let mut data = data.iter().copied();
    let mut steps = Vec::new();
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        let ring = what >> 6;
        steps.push(match what & 15 {
            0 | 1 => Step::Seal(1 + byte() % 5),
            2 | 3 => Step::Open(1 + byte() % 5),
            4..=6 => Step::Result(
                ring,
                what >> 4 & 3,
                2 + u32::from(byte() % 6),
                20 + u16::from(byte() % 100),
                u32::from(byte()),
            ),
            7 => {
                let len = usize::from(byte() % 96);
                let (a, b) = (u32::from(byte() % 8), u32::from(byte()) << 24);
                Step::Noise(ring, a, b, (0..len).map(|_| byte()).collect())
            }
            8 => {
                let mut word = || u32::from_le_bytes([byte(), byte(), byte(), byte()]);
                Step::Words(ring, word(), [word(), word(), word()])
            }
            9 | 10 => Step::Done(what & 16 != 0),
            11 => Step::Later(u64::from(byte()) * 8_000_000),
            12 => Step::Remove,
            13 => Step::Registers(u32::from_le_bytes([byte(), byte(), byte(), byte()])),
            _ => Step::Poll,
        });
    }
    play(steps);
}

fn play(steps: Vec<Step>) {
    let mut rig = rig(SoeConfig::default());
    rig.install(Direction::Out, 0);
    rig.install(Direction::In, 1);
    let (mut next, mut ended) = (0u64, Vec::new());
    let mut kept = 0;
    for step in steps {
        match step {
            Step::Seal(n) | Step::Open(n) => {
                let (index, kind, packet) = match step {
                    Step::Seal(_) => (0, JobKind::Seal, inner(60)),
                    _ => (1, JobKind::Open, sealed(60, 1)),
                };
                let mut jobs = Vec::new();
                for _ in 0..n {
                    jobs.push(rig.job(index, kind, next, &packet));
                    next += 1;
                }
                rig.engine.submit(&rig.view, &mut jobs, &mut rig.done);
                for job in jobs {
                    kept += 1;
                    rig.pool.put(job.frame);
                }
            }
            Step::Result(ring, slot, flags, len, number) => {
                let packet = if flags == 4 {
                    inner(len)
                } else {
                    sealed(len, number)
                };
                let mut bytes = dummy_header(false).to_vec();
                bytes.extend(packet);
                rig.player
                    .give(ring, &bytes, [flags, 0, u32::from(slot) << 24], 0);
            }
            Step::Noise(ring, a, b, noise) => {
                let mut bytes = dummy_header(a & 1 == 1).to_vec();
                bytes.extend(noise);
                rig.player.give(ring, &bytes, [a, b, b], 0);
            }
            Step::Words(ring, ctrl, msg) => {
                rig.player.give_words(ring, ctrl, msg);
            }
            Step::Done(dropped) => {
                if let Some(g) = rig.player.take(2) {
                    rig.player.done(2, g.slot, dropped);
                }
            }
            Step::Poll => {}
            Step::Later(t) => rig.later(t),
            Step::Remove => rig.engine.remove(id(0)),
            Step::Registers(v) => rig.soe.words.lock().unwrap()[0x24 / 4] = v,
        }
        rig.engine.poll(&mut rig.done);
        for job in rig.done.drain(..) {
            if job.status == JobStatus::Done && job.kind == JobKind::Seal {
                let number =
                    u64::from_be_bytes(job.frame.data()[20..28].try_into().unwrap()) & 0xffff_ffff;
                assert_eq!(job.seq, number);
            }
            ended.push(job.tag);
            rig.pool.put(job.frame);
        }
    }
    let mut last = Vec::new();
    let _ = rig.engine.reset(&mut last);
    for job in last {
        ended.push(job.tag);
        rig.pool.put(job.frame);
    }
    assert_eq!(rig.engine.in_flight(), 0);
    assert_eq!(ended.len() + kept, usize::try_from(next).unwrap());
    ended.sort_unstable();
    ended.dedup();
    assert_eq!(ended.len() + kept, usize::try_from(next).unwrap());
    rig.end();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step() -> impl Strategy<Value = Step> {
        let any32 = any::<u32>;
        prop_oneof![
            4 => (1u8..6).prop_map(Step::Seal),
            4 => (1u8..6).prop_map(Step::Open),
            8 => (0u8..3, 0u8..4, 2u32..8, 20u16..120, 0u32..30)
                .prop_map(|(r, s, f, l, n)| Step::Result(r, s, f, l, n)),
            2 => (0u8..3, any32(), any32(), prop::collection::vec(any::<u8>(), 0..90))
                .prop_map(|(r, a, b, v)| Step::Noise(r, a, b, v)),
            2 => (0u8..3, any32(), any::<[u32; 3]>()).prop_map(|(r, c, m)| Step::Words(r, c, m)),
            4 => any::<bool>().prop_map(Step::Done),
            4 => Just(Step::Poll),
            2 => (0u64..2_000_000_000).prop_map(Step::Later),
            1 => Just(Step::Remove),
            1 => any32().prop_map(Step::Registers),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_device_can_break_the_driver(steps in prop::collection::vec(step(), 1..150)) {
            play(steps);
        }

        #[test]
        fn nor_can_one_that_bytes_play(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_device(&data);
        }
    }
}
