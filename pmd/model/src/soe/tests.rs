//! The reference's checks of a model, at the registers.

use super::esp::Fault;
use super::*;
use crate::log::Log;

fn model(switches: Switches) -> (Soe, Bus, Arc<Log>) {
    let log = Arc::<Log>::default();
    let bus = Bus::new(9, Arc::clone(&log));
    (Soe::new(switches, Arc::default()), bus, log)
}

struct Driver {
    model: Soe,
    bus: Bus,
    log: Arc<Log>,
}

impl Driver {
    fn new(switches: Switches) -> Driver {
        let (model, bus, log) = model(switches);
        Driver { model, bus, log }
    }

    fn read(&mut self, at: usize) -> u32 {
        u32::try_from(self.model.read(&mut self.bus, 3, at, 4)).unwrap()
    }

    fn write(&mut self, at: usize, value: u32) {
        self.model.write(&mut self.bus, 3, at, 4, value.into());
    }

    /// Section 4.3 of the reference.
    fn commit(&mut self, slot: u32, words: &[u32; WORDS]) -> bool {
        for at in BITMAPS {
            self.write(at, 1 << (slot & 31));
        }
        for (i, w) in words.iter().enumerate() {
            self.write(STAGING + 4 * i, *w);
        }
        self.write(SA_DONE, 1);
        self.write(SA_CTRL, slot << 8 | 1);
        let done = (0..1000).any(|_| self.read(SA_DONE) & 1 == 1);
        self.write(SA_CTRL, 0);
        self.write(SA_DONE, 1);
        done
    }

    fn rules(&self) -> Vec<&'static str> {
        self.log.take().into_iter().map(|b| b.rule).collect()
    }
}

fn words(cmd: u32) -> [u32; WORDS] {
    let mut w = [0; WORDS];
    w[0] = cmd;
    w[3] = 0x1000;
    w[40] = u32::MAX;
    w[45] = 0xf000_0000;
    w
}

/// The worked values of section 4.1.
#[test]
fn worked_commands_are_taken_without_complaint() {
    let mut d = Driver::new(Switches::default());
    for (slot, cmd) in [
        (0, 0x9200_0105),
        (1, 0x9200_e004),
        (2, 0x9000_1013),
        (31, 0xb007_2122),
    ] {
        assert!(d.commit(slot, &words(cmd)), "{cmd:#x}");
        let entry = d.model.slots[usize::try_from(slot).unwrap()]
            .as_ref()
            .unwrap();
        assert_eq!(
            (entry.has_suite(), entry.is_outbound()),
            (true, cmd & 1 == 1)
        );
    }
    assert_eq!(d.rules(), [""; 0]);
    // Invalid again: all zero but one register.
    let mut zero = [0; WORDS];
    zero[40] = u32::MAX;
    assert!(d.commit(0, &zero));
    assert!(d.model.slots[0].is_none());
    assert_eq!(d.model.work(0, true, &[0x45; 20]), Err(Fault::Slot));
}

#[test]
fn what_silicon_refuses_is_refused_and_logged() {
    let mut d = Driver::new(Switches::default());
    assert!(!d.commit(32, &words(0x9200_0105)));
    assert_eq!(d.rules(), ["slots 0 to 31"]);
    assert!(d.commit(0, &words(1 << 31)));
    assert_eq!(
        d.rules(),
        ["a valid SA has a cipher and a hash that go together"]
    );
    assert!(d.commit(0, &words(0x9200_0105 | 1 << 9)));
    assert_eq!(d.rules(), ["no command bits that nobody has tried"]);
    d.write(STAGING, 0);
    d.write(SA_CTRL, 1);
    d.write(SA_CTRL, 1);
    assert_eq!(d.rules(), ["SA_CTRL is 0 between commits"]);
    d.read(0x1cc);
    d.write(0x00c, 1);
    d.model.read(&mut d.bus, 3, 0, 8);
    assert_eq!(
        d.rules(),
        [
            "only registers that are known",
            "only registers that are known",
            "registers are words of 32 bits"
        ]
    );
    let mut never = Driver::new(Switches {
        no_commit: true,
        ..Switches::default()
    });
    assert!(!never.commit(0, &words(0x9200_0105)));
}

#[test]
fn status_bits_are_cleared_by_writing_one() {
    let mut d = Driver::new(Switches::default());
    d.commit(3, &words(0xb007_2122));
    for (fault, bit, bitmap) in [
        (Fault::Icv, 13, Some(0x0c0)),
        (Fault::Replay, 14, Some(0x0c8)),
        (Fault::Padding, 15, Some(0x0d0)),
        (Fault::Limit, 11, Some(0x0b0)),
        (Fault::Slot, 6, None),
    ] {
        d.model.note(3, false, fault);
        assert_eq!(d.read(INT_STS), 1 << bit);
        d.write(INT_STS, 1 << bit);
        assert_eq!(d.read(INT_STS), 0);
        if let Some(at) = bitmap {
            assert_eq!(d.read(at), 1 << 3);
            d.write(at, 1 << 3);
            assert_eq!(d.read(at), 0);
        }
    }
    // Without drop bits an error is told by one bit alone.
    d.commit(4, &words(0xb000_2122));
    d.model.note(4, false, Fault::Icv);
    assert_eq!(d.read(INT_STS), 1 << 6);
}

#[test]
fn keys_in_the_staging_window_read_as_zero() {
    let mut d = Driver::new(Switches::default());
    d.write(0x124, 7);
    d.write(0x11c, 9);
    assert_eq!((d.read(0x124), d.read(0x11c)), (0, 9));
    let mut open = Driver::new(Switches {
        staging_readable: true,
        ..Switches::default()
    });
    open.write(0x124, 7);
    assert_eq!(open.read(0x124), 7);
}

#[test]
fn numbers_end_at_the_hard_limit() {
    let mut d = Driver::new(Switches::default());
    let mut w = words(0x9000_0013);
    w[34] = 0xf000_0000 - 1;
    d.commit(0, &w);
    let mut inner = [0; 20];
    inner[0] = 0x45;
    let last = d.model.work(0, true, &inner).unwrap();
    assert_eq!(last[24..28], 0xf000_0000u32.to_be_bytes());
    assert_eq!(d.model.work(0, true, &inner), Err(Fault::Limit));
}
