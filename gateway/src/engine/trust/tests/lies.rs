//! Whatever a lying engine returns: no packet leaves under an IV that left before, every frame comes home, packets of an SA
//! stay in order.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// Packets of an outbound and an inbound SA, with what the engine makes of them.
    Traffic(u64, Vec<Fault>),
    /// Time passes, nanoseconds.
    Later(u64),
    /// The engine stands still, or its driver distrusts it.
    Hang,
    Ill,
    /// The next reset fails.
    Stuck,
    /// Room for so many jobs a call.
    Room(usize),
    /// The thread that resets it gets its time.
    Heal,
}

fn step() -> impl Strategy<Value = Step> {
    let fault = prop_oneof![
        6 => Just(Fault::Right),
        1 => proptest::sample::select(Fault::ALL.to_vec()),
    ];
    prop_oneof![
        8 => (1u64..12, proptest::collection::vec(fault, 0..24)).prop_map(|(n, f)| Step::Traffic(n, f)),
        2 => (0u64..3 * SECOND).prop_map(Step::Later),
        1 => Just(Step::Hang),
        1 => Just(Step::Ill),
        1 => Just(Step::Stuck),
        1 => (0usize..20).prop_map(Step::Room),
        3 => Just(Step::Heal),
    ]
}

/// What left so far.
#[derive(Default)]
struct Seen {
    ivs: HashSet<(SaId, Vec<u8>)>,
    last: std::collections::HashMap<SaId, u64>,
    back: usize,
}

impl Seen {
    fn take(&mut self, rig: &mut Rig) {
        rig.poll();
        for job in std::mem::take(&mut rig.done) {
            self.back += 1;
            if job.status == JobStatus::Done {
                let seq = job.tag >> 8;
                let last = self.last.insert(job.sa, seq);
                assert!(last.is_none_or(|l| l < seq), "order: {seq} behind {last:?}");
                let entry = Arc::clone(rig.entry(job.sa));
                if job.kind == JobKind::Seal {
                    let at = usize::from(job.esp_off);
                    let data = job.frame.data();
                    let n = entry.spec.suite.iv_len();
                    let iv = data[at + 8..at + 8 + n].to_vec();
                    assert_eq!(data[at..at + 4], SPI.to_be_bytes());
                    assert!(self.ivs.insert((job.sa, iv)), "an IV left twice");
                    assert!(job.seq <= seq, "a number that nobody gave");
                }
            }
            rig.pool.put(job.frame);
        }
    }
}

fn run(bare: bool, mode: OffloadMode, sample: u32, reopens: bool, steps: Vec<Step>) {
    let config = TrustConfig {
        sample_out: sample,
        sample_in: sample,
        sample_places: 8,
        ..config()
    };
    let mut rig = match reopens {
        true => Rig::reopening(bare, config),
        false => Rig::new(bare, config, Script::default()),
    };
    let out = rig.sa(gcm(), Direction::Out, mode);
    let inb = rig.sa(cbc(), Direction::In, mode);
    let (mut seen, mut given, mut next) = (Seen::default(), 0, 1);
    for step in steps {
        match step {
            Step::Traffic(n, faults) => {
                rig.faults(faults);
                for _ in 0..n {
                    if let Ok(seq) = rig.entry(out).next_out(1, 0) {
                        rig.queue(out, seq);
                        given += 1;
                    }
                    rig.queue(inb, next);
                    given += 1;
                    next += 1;
                }
                rig.submit();
            }
            Step::Later(time) => rig.later(time),
            Step::Hang => rig.script().hangs = true,
            Step::Ill => rig.script().ill = true,
            Step::Stuck => rig.script().bad_resets = 1,
            Step::Room(n) => rig.script().room = Some(n),
            Step::Heal => rig.healed(),
        }
        seen.take(&mut rig);
    }
    {
        let mut script = rig.script();
        script.faults.clear();
        (script.room, script.hangs, script.bad_resets) = (None, false, 0);
    }
    // To the end of every pause, or of the engine.
    for _ in 0..80 {
        rig.healed();
        rig.later(3 * SECOND);
        seen.take(&mut rig);
        if rig.jobs.is_empty() && rig.trusted().in_flight() == 0 {
            break;
        }
    }
    assert_eq!(
        (rig.jobs.len(), seen.back),
        (0, given),
        "every job comes back"
    );
    rig.end();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn nothing_leaves_twice_and_everything_comes_home(
        kind in 0usize..3,
        sample in 0u32..4,
        reopens in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..24),
    ) {
        let (bare, mode) = KINDS[kind];
        run(bare, mode, sample, reopens, steps);
    }
}
