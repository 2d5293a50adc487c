//! A device that writes what it likes into the result ring, and answers what it likes.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::device::model::{ModelBus, ModelDevice};
use crate::device::{Device, RegisterSpace};

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

fn step() -> impl Strategy<Value = Step> {
    let twist =
        || prop_oneof![8 => Just(0u32), 1 => any::<u32>(), 1 => (0u32..32).prop_map(|b| 1 << b)];
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
        let bus = ModelBus::new();
        let registers = Arc::new(Registers(Mutex::new(vec![0; regs::WINDOW / 4])));
        registers.0.lock().unwrap()[regs::REVISION / 4] = regs::IDENTITY;
        registers.0.lock().unwrap()[regs::OPTION_1 / 4] = u32::MAX;
        let spaces: [(u32, Arc<dyn RegisterSpace>); 1] = [(0, Arc::clone(&registers) as _)];
        let device: Arc<dyn Device> =
            Arc::new(ModelDevice::new("hostile", &bus, vec![], spaces).unwrap());
        let arena = arena();
        let config = Eip93Config { ring: 16, slots: 4, ..Eip93Config::default() };
        let mut engine = Eip93Engine::assemble(device, &arena, config).unwrap();
        engine.health = Health::Good;
        let store = Store::new(1, 16);
        let mut rig = Hostile { engine, pool: Pool::new(&arena, 16), store };
        rig.play(&steps, &bus, &registers);
        let Hostile { engine, pool, store: _ } = rig;
        drop((engine, pool));
        prop_assert_eq!(arena.outstanding(), 0);
    }
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
                .add_sa(&mut draft, Arc::new(spec), &NoFactory, start, 0)
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
