//! A hostile device, for fuzzing: it writes what it likes into the result ring, and answers what it likes.

use std::sync::Mutex;

use sa_store::cipher::NoCipher;
use sa_store::runtime::Start;
use sa_store::sa::{Direction, OffloadMode, SaKeys, SaSpec, Spi};
use sa_store::store::Store;

use super::*;
use crate::Pool;
use crate::arena::reused;
use crate::device::RegisterSpace;
use crate::device::model::{ModelBus, ModelDevice};
use crate::engine::{EspEngine, EspJob, JobKind, JobStatus};

/// Bytes in front of the ESP header.
pub(super) const OUTER: u16 = 20;
pub(super) const SPI: u32 = 0xc0ff_ee01;
pub(super) const CBC_SHA1: Suite = Suite::CipherHmac(Cipher::Cbc(AesBits::B128), Hmac::Sha1_96);

/// An SA that the engine takes.
pub(super) fn spec(suite: Suite, direction: Direction, offload: OffloadMode) -> SaSpec {
    let bytes = |n: usize, from: u8| (0..n).zip(from..).map(|(_, b)| b).collect::<Vec<u8>>();
    SaSpec {
        tunnel: "t".into(),
        offload,
        ..SaSpec::plain(
            "a",
            direction,
            Spi::new(SPI).unwrap(),
            suite,
            SaKeys {
                enc: bytes(suite.enc_key_len(), 3).into(),
                auth: bytes(suite.auth_key_len(), 101).into(),
            },
        )
    }
}

/// Registers that keep what is written, except some that a test sets.
struct Registers(Mutex<Vec<u32>>);

impl RegisterSpace for Registers {
    fn read(&self, at: usize, _: usize) -> u64 {
        self.0
            .lock()
            .unwrap()
            .get(at / 4)
            .map_or(0, |v| (*v).into())
    }

    fn write(&self, at: usize, _: usize, value: u64) {
        if let Some(place) = self.0.lock().unwrap().get_mut(at / 4)
            && !matches!(
                at,
                regs::CD_COUNT | regs::RD_COUNT | regs::REVISION | regs::OPTION_1
            )
        {
            *place = u32::try_from(value).unwrap();
        }
    }

    fn len(&self) -> usize {
        regs::WINDOW
    }
}

#[derive(Debug, Clone)]
enum Step {
    Submit(u8),
    Poll,
    /// Words 0, 6 and 7 of the result that is next but so many: as they should be, changed by these.
    Result(u8, u32, u32, u32),
    Count(u32),
    Reset,
}

/// Runs the driver against a device that `data` plays.
///
/// # Panics
/// When a frame is lost, a job ends twice or without a status, or the device reaches memory that it may not; that is its
/// purpose.
pub fn fuzz_device(data: &[u8]) {
    let mut data = data.iter().copied();
    let mut steps = Vec::new();
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        steps.push(match what & 7 {
            0 | 1 => Step::Submit(1 + (what >> 3) % 20),
            2..=4 => {
                let how = byte();
                Step::Result(
                    (what >> 3) % 3,
                    twist(&mut byte, how),
                    twist(&mut byte, how >> 2),
                    twist(&mut byte, how >> 4),
                )
            }
            5 => Step::Count(twist(&mut byte, 3)),
            6 if what >> 3 == 0 => Step::Reset,
            _ => Step::Poll,
        });
    }
    play(&steps);
}

/// Nothing, one bit, or anything.
fn twist(byte: &mut impl FnMut() -> u8, how: u8) -> u32 {
    match how & 3 {
        0 | 1 => 0,
        2 => 1 << (byte() & 31),
        _ => u32::from_le_bytes([byte(), byte(), byte(), byte()]),
    }
}

fn play(steps: &[Step]) {
    let bus = ModelBus::new();
    let registers = Arc::new(Registers(Mutex::new(vec![0; regs::WINDOW / 4])));
    registers.0.lock().unwrap()[regs::REVISION / 4] = regs::IDENTITY;
    registers.0.lock().unwrap()[regs::OPTION_1 / 4] = u32::MAX;
    let spaces: [(u32, Arc<dyn RegisterSpace>); 1] = [(0, Arc::clone(&registers) as _)];
    let device: Arc<dyn Device> =
        Arc::new(ModelDevice::new("hostile", &bus, vec![], spaces).unwrap());
    let arena = reused(1024);
    let config = Eip93Config {
        ring: 16,
        slots: 4,
        ..Eip93Config::default()
    };
    let mut engine = Eip93Engine::assemble(device, &arena, config).unwrap();
    engine.health = Health::Good;
    let store = Store::new(1, 16);
    let mut rig = Hostile {
        engine,
        pool: Pool::new(&arena, 16),
        store,
    };
    rig.play(steps, &bus, &registers);
    let Hostile {
        engine,
        pool,
        store: _,
    } = rig;
    drop((engine, pool));
    assert_eq!(arena.outstanding(), 0);
}

struct Hostile {
    engine: Eip93Engine,
    pool: Pool,
    store: Store,
}

impl Hostile {
    fn play(&mut self, steps: &[Step], bus: &ModelBus, registers: &Registers) {
        let mut sas = Vec::new();
        let mut draft = self.store.draft();
        for (n, (direction, offload)) in [
            (Direction::Out, OffloadMode::Crypto),
            (Direction::In, OffloadMode::Crypto),
            (Direction::Out, OffloadMode::Packet),
            (Direction::In, OffloadMode::Packet),
        ]
        .into_iter()
        .enumerate()
        {
            let mut spec = spec(CBC_SHA1, direction, offload);
            spec.name = format!("{n}");
            spec.spi = Spi::new(SPI + u32::try_from(n).unwrap()).unwrap();
            let start = Start {
                lease_end: 1 << 40,
                ..Start::default()
            };
            let id = self
                .store
                .add_sa(&mut draft, Arc::new(spec), &NoCipher, start, 0)
                .unwrap();
            sas.push((id, direction));
        }
        self.store.publish(draft);
        let view = self.store.current();
        for (id, _) in &sas {
            self.engine.install(view.sa(*id).unwrap()).unwrap();
        }
        let (mut done, mut next, mut first) = (Vec::new(), 0usize, self.engine.flights.next_id());
        for step in steps {
            match *step {
                Step::Submit(n) => {
                    let mut jobs = Vec::new();
                    for i in 0..usize::from(n) {
                        let (sa, direction) = sas[i % 4];
                        let mut frame = self.pool.get().unwrap();
                        frame.append(20 + 24 + 48 + 12).unwrap().fill(0x33);
                        jobs.push(EspJob {
                            esp_end: u16::try_from(frame.len()).unwrap(),
                            frame,
                            sa,
                            seq: 1,
                            tag: 0,
                            note: 0,
                            esp_off: OUTER,
                            next_header: 4,
                            kind: match direction {
                                Direction::Out => JobKind::Seal,
                                Direction::In => JobKind::Open,
                            },
                            mode: OffloadMode::Crypto,
                            status: JobStatus::Pending,
                        });
                    }
                    self.engine.submit(&view, &mut jobs, &mut done);
                    for job in jobs {
                        self.pool.put(job.frame);
                    }
                }
                Step::Poll => self.engine.poll(&mut done),
                Step::Result(ahead, a, b, c) => {
                    let (cdr, rdr) = self.engine.rings.bases();
                    let at = 32 * ((next + usize::from(ahead)) % 16) as u64;
                    let mut command = [0; 32];
                    bus.read(cdr + at, &mut command).unwrap();
                    let id = u32::from_le_bytes(command[24..28].try_into().unwrap());
                    let mut words = [2 ^ a, 0, 0, 0, 0, 0, id ^ b, (80 | 2 << 22) ^ c];
                    words[1] = a;
                    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                    bus.write(rdr + at, &bytes).unwrap();
                    next = (next + 1) % 16;
                    first = first.max(id);
                }
                Step::Count(n) => {
                    registers.0.lock().unwrap()[regs::RD_COUNT / 4] = n;
                }
                Step::Reset => {
                    // The counter must say that the engine stopped; its answers are then wrong.
                    registers.0.lock().unwrap()[regs::RD_COUNT / 4] = 0;
                    assert!(self.engine.reset(&mut done).is_err());
                    assert_eq!(self.engine.in_flight(), 0);
                    self.engine.health = Health::Good;
                    self.engine.rings.clear(0);
                    next = 0;
                }
            }
            for job in done.drain(..) {
                assert_ne!(job.status, JobStatus::Pending);
                assert!(
                    usize::from(job.esp_end) <= job.frame.len() || job.status != JobStatus::Done
                );
                self.pool.put(job.frame);
            }
        }
        assert_eq!(self.engine.states.faults(), 0);
        registers.0.lock().unwrap()[regs::CD_COUNT / 4] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step() -> impl Strategy<Value = Step> {
        let twist = || prop_oneof![8 => Just(0u32), 1 => any::<u32>(), 1 => (0u32..32).prop_map(|b| 1 << b)];
        prop_oneof![
            3 => (1u8..20).prop_map(Step::Submit),
            3 => Just(Step::Poll),
            6 => (0u8..3, twist(), twist(), twist()).prop_map(|(n, a, b, c)| Step::Result(n, a, b, c)),
            1 => any::<u32>().prop_map(Step::Count),
            1 => Just(Step::Reset),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn no_device_can_break_the_driver(steps in prop::collection::vec(step(), 1..120)) {
            play(&steps);
        }

        #[test]
        fn nor_can_one_that_bytes_play(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_device(&data);
        }
    }
}
