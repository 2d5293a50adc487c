//! A driver that writes whatever it is told to, for fuzzing.

use std::ffi::CString;
use std::fs::File;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::eip93::{self, Eip93};
use crate::soe::{self, Soe};
use crate::sys::SharedMap;
use crate::{Bus, KnobArgs, Knobs, Log, Model, Turn};

/// Where the driver's memory is, for the device.
const BASE: u32 = 0x10_0000;
const MEMORY: usize = 64 << 10;
/// Turns that follow an access, at most.
const TURNS: usize = 32;

/// An EIP-93 under a driver that `data` plays. Nothing may panic, nor go on for ever.
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_eip93(data: &[u8]) {
    let (knobs, data) = knobs(data);
    // Clock, rings of 16 descriptors at the beginning of memory, ring mode.
    let up = [
        (0x100, 3),
        (0x100, 3 << 8 | 1 << 10),
        (0x1e8, 0xffff_ffff),
        (0x080, BASE),
        (0x084, BASE + 0x400),
        (0x088, 15),
    ];
    // Doorbells, ring registers, configuration, direct host mode's windows.
    let liked = [
        0x090, 0x094, 0x088, 0x080, 0x084, 0x100, 0x104, 0x000, 0x008, 0x010, 0x018, 0x110, 0x114,
        0x400, 0x47c, 0x500, 0x800, 0x208,
    ];
    let model = Eip93::new(eip93::Switches::default(), knobs);
    play(Box::new(model), data, &[&up], &liked.map(|at| (0, at)));
}

/// An SOE with its QDMA, likewise.
///
/// # Panics
/// As said; that is its purpose.
pub fn fuzz_soe(data: &[u8]) {
    let (knobs, data) = knobs(data);
    // One transmit ring and two receive rings, a queue of reports, everything on.
    let qdma = [
        (0x1000, 128),
        (0x010, BASE + 0x4000),
        (0x014, BASE + 0x5000),
        (0x050, BASE + 0x2000),
        (0x054, 64),
        (0x140, BASE),
        (0x144, 16),
        (0x200, BASE + 0x400),
        (0x204, 16),
        (0x220, BASE + 0x800),
        (0x224, 16),
        (0x004, 0x5),
    ];
    let engine = [
        (0x000, 3),
        (0x110, 0x8000_2012),
        (0x11c, 0x1000),
        (0x100, 1),
    ];
    let liked = [
        (1, 0x004),
        (1, 0x058),
        (1, 0x140),
        (1, 0x148),
        (1, 0x14c),
        (1, 0x208),
        (1, 0x228),
        (1, 0x200),
        (1, 0x204),
        (2, 0x004),
        (3, 0x000),
        (3, 0x024),
        (3, 0x100),
        (3, 0x104),
        (3, 0x110),
        (3, 0x11c),
        (3, 0x124),
    ];
    let model = Soe::new(soe::Switches::default(), knobs);
    play(Box::new(model), data, &[&[], &qdma, &[], &engine], &liked);
}

/// Misbehaviour is part of it: it has its own paths.
fn knobs(data: &[u8]) -> (Arc<Knobs>, &[u8]) {
    let Some((&[which, seed], rest)) = data.split_first_chunk::<2>() else {
        return (Arc::default(), &[]);
    };
    let rate = |bit: u8| u32::from(which >> bit & 1) * 300_000;
    let knobs = Knobs::new(&KnobArgs {
        lose: rate(0),
        duplicate: rate(1),
        corrupt: rate(2),
        reorder: rate(3),
        spurious: rate(4),
        garble: rate(5),
        tear: rate(6),
        delay: rate(7),
        late: 1,
        seed: seed.into(),
        ..KnobArgs::default()
    });
    (knobs, rest)
}

fn memory() -> Option<SharedMap> {
    let name = CString::new("fuzz").ok()?;
    let fd = memfd_create(&*name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).ok()?;
    let file = File::from(fd);
    file.set_len(MEMORY as u64).ok()?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).ok()?;
    SharedMap::new(&file, 0, MEMORY).ok()
}

/// `up` are the registers, by region, that bring the device up.
fn play(mut model: Box<dyn Model>, data: &[u8], up: &[&[(usize, u32)]], liked: &[(usize, usize)]) {
    let mut bus = Bus::new(model.interrupts(), Arc::<Log>::default());
    let Some(map) = memory() else { return };
    if bus.map(BASE.into(), map, true, true).is_err() {
        return;
    }
    let regions = model.regions();
    let mut data = data.iter().copied();
    while let Some(what) = data.next() {
        let mut byte = || data.next().unwrap_or(0);
        let mut word = || u32::from_le_bytes([byte(), byte(), byte(), byte()]);
        match what & 7 {
            0 => {
                for (region, list) in up.iter().enumerate() {
                    for (at, value) in *list {
                        model.write(&mut bus, region, *at, 4, (*value).into());
                    }
                }
            }
            // Registers that matter: small values, and addresses in memory.
            1 | 2 => {
                let value = word();
                let Some((region, at)) = liked.get(usize::from(what >> 3) % liked.len()) else {
                    continue;
                };
                let value = match what & 7 {
                    1 => value & 0x3f,
                    _ if value & 1 == 0 => BASE + (value >> 16),
                    _ => value,
                };
                model.write(&mut bus, *region, *at, 4, value.into());
            }
            // Any register in any size, read and written.
            3 => {
                let (place, value) = (word(), word());
                let region = usize::from(what >> 3) % regions.len();
                let size = 1usize << (place >> 30);
                let len = regions.get(region).and_then(|n| usize::try_from(*n).ok());
                let len = len.unwrap_or(0) / size;
                let Some(at) = (place as usize & 0x0fff_ffff).checked_rem(len) else {
                    continue;
                };
                let value = match size {
                    8 => u64::from(value) << 32 | u64::from(place),
                    4 => value.into(),
                    2 => u64::from(value & 0xffff),
                    _ => u64::from(value & 0xff),
                };
                model.write(&mut bus, region, at * size, size, value);
                model.read(&mut bus, region, at * size, size);
            }
            // Memory: a word, or a run of them that begins with an address in memory.
            4 | 5 => {
                let at = u64::from(word() & 0xfffc);
                let _ = bus.write32(u64::from(BASE) + at, word());
                if what & 7 == 5 {
                    for i in 1..u64::from(what >> 3) {
                        let value = match i & 3 {
                            1 => BASE + (word() & 0xffff),
                            _ => word(),
                        };
                        let _ = bus.write32(u64::from(BASE) + at + 4 * i, value);
                    }
                }
            }
            6 => {
                bus.unmap(BASE.into(), MEMORY as u64);
                if what & 8 == 0
                    && let Some(map) = memory()
                {
                    let _ = bus.map(BASE.into(), map, what & 16 == 0, what & 32 == 0);
                }
            }
            _ => model.reset(),
        }
        for _ in 0..TURNS {
            if model.turn(&mut bus) != Turn::Busy {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_driver_can_break_a_model(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            super::fuzz_eip93(&data);
            super::fuzz_soe(&data);
        }
    }
}
