//! The EIP-93 as a driver meets it: registers, rings and memory over the socket. The check list of its reference.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use esplanade_model::eip93::{Eip93, Switches};
use esplanade_model::{KnobArgs, Knobs, Running, Server};
use pmd::device::vfio_user::VfioUserDevice;
use pmd::device::{Device, DmaMem, IovaClass, Mmio};
use proptest::prelude::*;

const RING: u32 = 16;
/// In the memory that the driver maps: rings, SA, state, data.
const RDR: usize = 512;
const SA: usize = 1024;
const STATE: usize = 1280;
const DATA: usize = 2048;

/// A driver of a few lines.
struct Client {
    device: VfioUserDevice,
    regs: Mmio,
    memory: DmaMem,
    next: u32,
}

impl Client {
    fn connect(path: &Path) -> Client {
        let device = VfioUserDevice::connect(path).unwrap();
        Client {
            regs: device.region(0).unwrap(),
            memory: device.dma_alloc(8192, 4096, IovaClass::Below4G).unwrap(),
            device,
            next: 0,
        }
    }

    fn at(&self, offset: usize) -> u32 {
        u32::try_from(self.memory.iova()).unwrap() + u32::try_from(offset).unwrap()
    }

    fn start(&self) {
        self.regs.write32(0x100, 0x703);
        self.regs.write32(0x100, 0x700);
        self.regs.write32(0x1e8, 0x17);
        self.regs.write32(0x080, self.at(0));
        self.regs.write32(0x084, self.at(RDR));
        self.regs.write32(0x088, RING - 1);
    }

    /// AES-128-CBC, the IV in the state record.
    fn basic_record(&self) {
        let key = 0x06a9_2140_36b8_a15b_512e_03d5_3412_0006_u128.to_be_bytes();
        let iv = 0x3daf_ba42_9d9e_b430_b422_da80_2c9f_ac41_u128.to_be_bytes();
        self.memory.write32(SA, 0x1200_F3C0);
        self.memory.write32(SA + 4, 0x0200_0100);
        self.memory.write_bytes(SA + 8, &key);
        self.memory.write_bytes(STATE, &iv);
        self.memory.write_bytes(DATA, b"Single block msg");
    }

    /// Writes a command, with these first and last words.
    fn give(&mut self, first: u32, last: u32, source: u32, destination: u32) {
        let at = 32 * usize::try_from(self.next).unwrap();
        self.next = (self.next + 1) % RING;
        self.memory.write32(RDR + at, 0);
        self.memory.write32(RDR + at + 28, 0);
        let words = [
            source,
            destination,
            self.at(SA),
            self.at(STATE),
            0,
            0xabcd,
            last,
        ];
        for (i, w) in words.into_iter().enumerate() {
            self.memory.write32(at + 4 + 4 * i, w);
        }
        self.memory.store_release32(at, first);
    }

    /// Waits for so many results.
    fn wait(&self, n: u32) {
        let begin = Instant::now();
        while self.regs.read32(0x094) != n {
            assert!(begin.elapsed() < Duration::from_secs(10), "no result");
        }
    }

    /// The result at an index: its words.
    fn result(&self, index: usize) -> [u32; 8] {
        std::array::from_fn(|i| self.memory.read32(RDR + 32 * index + 4 * i))
    }

    /// One command: its result.
    fn run(&mut self, first: u32, last: u32) -> [u32; 8] {
        let (index, data) = (self.next, self.at(DATA));
        self.give(first, last, data, data);
        self.regs.write32(0x090, 1);
        self.wait(1);
        self.regs.write32(0x094, 1);
        self.result(usize::try_from(index).unwrap())
    }
}

struct Rig {
    running: Running,
    client: Client,
    _dir: tempfile::TempDir,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let knobs = Knobs::new(&KnobArgs::default());
    let model = Eip93::new(Switches::default(), Arc::clone(&knobs));
    let running = Server::bind(&dir.path().join("eip93"))
        .unwrap()
        .spawn(Box::new(model))
        .unwrap();
    Rig {
        client: Client::connect(running.path()),
        running,
        _dir: dir,
    }
}

fn rules(rig: &Rig) -> Vec<&'static str> {
    rig.running.log().take().iter().map(|b| b.rule).collect()
}

#[test]
fn after_power_on_it_reads_as_silicon_does() {
    let rig = rig();
    let r = &rig.client.regs;
    for (at, want) in [
        (0x000, 2),
        (0x104, 0x0004_0402),
        (0x090, 0),
        (0x094, 0),
        (0x098, 0),
        (0x1fc, 0x0341_a25d),
        (0x1f4, 0xf08f_e007),
    ] {
        assert_eq!(r.read32(at), want, "{at:#x}");
    }
    assert!(rules(&rig).is_empty());
    assert_eq!(r.read16(0x1fc), u16::MAX);
    assert_eq!(r.read32(0xffc), 0);
    assert_eq!(
        rules(&rig),
        ["registers are words of 32 bits", "a register that exists"]
    );
}

#[test]
fn a_command_has_its_result_at_the_same_index_in_this_order() {
    let mut rig = rig();
    let c = &mut rig.client;
    c.start();
    c.basic_record();
    let words = c.run(0x11, 1 << 22 | 16);
    assert_eq!(words[0], 2);
    assert_eq!((words[6], words[7]), (0xabcd, 2 << 22 | 16));
    let mut answer = [0; 16];
    c.memory.read_bytes(DATA, &mut answer);
    assert_eq!(
        answer,
        0xe353_779c_1079_aeb8_2708_942d_be77_181a_u128.to_be_bytes()
    );
    // The state record took the last block, the command's place went back to the host.
    c.memory.read_bytes(STATE, &mut answer);
    assert_eq!(
        answer,
        0xe353_779c_1079_aeb8_2708_942d_be77_181a_u128.to_be_bytes()
    );
    assert_eq!(c.memory.read32(0) & 3, 2);
    assert_eq!(
        (c.regs.read32(0x090), c.regs.read32(0x098)),
        (0, 0x0001_0001)
    );
    // Behind the 16 bytes nothing was touched.
    assert_eq!(c.memory.read32(DATA + 16), 0);
    assert!(rules(&rig).is_empty());
}

#[test]
fn nothing_runs_before_all_is_set_up() {
    for missing in 0..5 {
        let mut rig = rig();
        let c = &mut rig.client;
        c.basic_record();
        c.start();
        match missing {
            0 => c.regs.write32(0x1e8, 0),
            1 => c.regs.write32(0x080, 0),
            2 => c.regs.write32(0x088, 0),
            3 => c.regs.write32(0x100, 0x701),
            _ => c.regs.write32(0x100, 0x702),
        }
        let data = c.at(DATA);
        c.give(0x11, 1 << 22 | 16, data, data);
        c.regs.write32(0x090, 1);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!((c.regs.read32(0x094), c.result(0)[0]), (0, 0), "{missing}");
    }
}

#[test]
fn the_ring_reset_is_bit_1_and_pointers_survive_everything_else() {
    let mut rig = rig();
    let c = &mut rig.client;
    c.start();
    c.basic_record();
    c.run(0x11, 1 << 22 | 16);
    // Bit 2 is not it; neither are new bases.
    c.regs.write32(0x100, 0x705);
    c.regs.write32(0x080, c.at(0));
    assert_eq!(c.regs.read32(0x098), 0x0001_0001);
    c.regs.write32(0x100, 0x702);
    assert_eq!(c.regs.read32(0x098), 0);
}

#[test]
fn doorbells_are_counted_and_what_is_too_much_is_told() {
    let mut rig = rig();
    let c = &mut rig.client;
    c.start();
    c.regs.write32(0x094, 1);
    assert_eq!(c.regs.read32(0x09c), 2);
    c.regs.write32(0x100, 0x701);
    c.regs.write32(0x090, RING + 1);
    assert_eq!((c.regs.read32(0x090), c.regs.read32(0x09c)), (0, 3));
    assert_eq!(c.regs.read32(0x200) & 1 << 16, 1 << 16);
    c.regs.write32(0x090, 256);
    assert_eq!(c.regs.read32(0x090), 0);
    assert_eq!(rules(&rig).len(), 3);
}

#[test]
fn commands_that_silicon_refuses_have_their_code() {
    let mut rig = rig();
    let c = &mut rig.client;
    c.start();
    c.basic_record();
    let code = |words: [u32; 8]| words[0] >> 19 & 0x1f;
    // Not handed over in both words.
    assert_eq!(code(c.run(0x11, 16)), 1 << 1 | 1);
    assert_eq!(code(c.run(0x10, 1 << 22 | 16)), 1 << 1 | 1);
    // Zero length, and no whole block.
    assert_eq!(code(c.run(0x11, 1 << 22)), 5 << 1 | 1);
    assert_eq!(code(c.run(0x11, 1 << 22 | 15)), 7 << 1 | 1);
    // Memory that nobody mapped.
    let data = c.at(DATA);
    c.give(0x11, 1 << 22 | 16, 0x10, data);
    c.regs.write32(0x090, 1);
    c.wait(1);
    assert_eq!(code(c.result(4)), 1);
    assert_eq!(c.regs.read32(0x200) & 1 << 18, 1 << 18);
    let broken = rules(&rig);
    assert!(broken.contains(&"an address that is mapped for the access"));
    assert!(broken.contains(&"a command is handed over by both its ownership words"));
}

#[test]
fn what_drivers_do_wrong_is_told() {
    let mut rig = rig();
    let c = &mut rig.client;
    c.start();
    // ESP outbound, with a PRNG that was never loaded, the output over the input, at an odd place.
    c.memory.write32(SA, 0x033A_1310);
    c.memory.write32(SA + 4, 0x2200_1101);
    let data = c.at(DATA);
    c.give(0x0200_0111, 1 << 22 | 64, data + 1, data + 1);
    c.regs.write32(0x090, 1);
    c.wait(1);
    assert_eq!(c.result(0)[0] >> 20 & 15, 8);
    // The same entropy twice, which is also none.
    c.memory.write32(SA, 0x1307);
    c.memory.write32(SA + 4, 0x0200_0000);
    c.regs.write32(0x094, 1);
    c.run(0x41, 1 << 22 | 64);
    let broken = rules(&rig);
    for rule in [
        "random IVs need a loaded PRNG",
        "sources and destinations lie at multiples of 4",
        "the PRNG is loaded with fresh entropy",
    ] {
        assert!(broken.contains(&rule), "{rule}: {broken:?}");
    }
    let c = &mut rig.client;
    c.memory.write32(SA, 0x033A_1310);
    c.memory.write32(SA + 4, 0x2200_1101);
    c.run(0x0200_0111, 1 << 22 | 64);
    assert_eq!(rules(&rig), ["the output does not run ahead of the input"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn no_driver_can_stop_the_model(
        writes in prop::collection::vec((
            prop_oneof![
                4 => prop::sample::select(vec![0x80usize, 0x84, 0x88, 0x90, 0x94, 0x100, 0x1e8, 0x110, 0x114, 0x47c, 0, 0x1c]),
                1 => (0usize..0x400).prop_map(|n| 4 * n),
            ],
            prop_oneof![any::<u32>(), 0u32..0x800, Just(0x700u32)],
        ), 1..60),
        memory in prop::collection::vec(any::<u32>(), 512),
        commands in prop::collection::vec((any::<u32>(), 0u32..4096, any::<bool>(), 0usize..8), 1..15),
    ) {
        let mut rig = rig();
        let c = &mut rig.client;
        for (i, w) in memory.iter().enumerate() {
            c.memory.write32(4 * i, *w);
        }
        c.start();
        for (first, length, whole, group) in commands {
            let sa = [0x033A_1310, 0x013A_1318, 0x1230_13C1, 0x1230_13C9, 0x1200_F3C0, 0x1307, 0x2200_1003, first][group];
            c.memory.write32(SA, sa);
            c.memory.write32(SA + 4, if whole { 0x2206_1103 } else { first });
            let data = c.at(DATA);
            c.give(first & !3 | 1, 1 << 22 | length, data, data);
            c.regs.write32(0x090, 1);
        }
        for (at, value) in writes {
            c.regs.write32(at, value);
        }
        // It still answers, and works after a reset.
        c.device.reset().unwrap();
        c.next = 0;
        c.memory.zero();
        c.start();
        c.basic_record();
        prop_assert_eq!(c.run(0x11, 1 << 22 | 16)[0], 2);
    }
}

/// The program, killed at the end.
struct Program(Child);

impl Program {
    fn start(path: &Path, more: &[&str]) -> Program {
        let child = Command::new(env!("CARGO_BIN_EXE_esplanade-model"))
            .args(["eip93", "--socket"])
            .arg(path)
            .args(more)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(path).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10), "no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        Program(child)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_program_serves_is_killed_and_comes_back_at_the_same_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("eip93");
    let program = Program::start(&path, &["--latency", "1000000"]);
    let mut c = Client::connect(&path);
    c.start();
    c.basic_record();
    let data = c.at(DATA);
    c.give(0x11, 1 << 22 | 16, data, data);
    c.regs.write32(0x090, 1);
    assert_eq!(c.regs.read32(0x090), 1);
    drop(program);
    assert_eq!(c.regs.read32(0x090), u32::MAX);
    drop(c);
    let _program = Program::start(&path, &["--revision", "50438749"]);
    let mut c = Client::connect(&path);
    assert_eq!(c.regs.read32(0x1fc), 0x0301_a25d);
    c.start();
    c.basic_record();
    assert_eq!(c.run(0x11, 1 << 22 | 16)[0], 2);
}
