//! The store on a disk whose power is cut again and again: a simulation.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::test_runner::{TestRng, TestRunner};

use super::retired::Retired;
use super::tests::{DAY, advance, out, sa};
use super::*;
use crate::sa::{Direction, SaSpec};

/// A disk whose power can be cut: what is not synced may be lost, reordered or torn, sector by sector.
#[derive(Clone, Default)]
struct Disk(Rc<RefCell<Platter>>);

#[derive(Default)]
struct Platter {
    durable: Vec<u8>,
    seen: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
    /// Syncs until one fails half-way, as a power cut during it looks to the program.
    cut_in: Option<usize>,
}

const SECTOR: usize = 512;

impl Disk {
    fn cut(&self, rng: &mut TestRng) {
        let p = &mut *self.0.borrow_mut();
        let mut sectors: HashMap<usize, Vec<Vec<u8>>> = HashMap::new();
        for (offset, bytes) in p.pending.drain(..) {
            for (i, s) in bytes.chunks(SECTOR).enumerate() {
                sectors
                    .entry(offset + i * SECTOR)
                    .or_default()
                    .push(s.to_vec());
            }
        }
        for (offset, versions) in sectors {
            let choice = rng.random_range(0..versions.len() + 2);
            if p.durable.len() < offset + SECTOR {
                if choice == versions.len() {
                    continue;
                }
                p.durable.resize(offset + SECTOR, 0);
            }
            let target = &mut p.durable[offset..offset + SECTOR];
            match versions.get(choice) {
                Some(v) => target.copy_from_slice(v),
                None if choice == versions.len() => {}
                None => rng.fill_bytes(target),
            }
        }
        // The file may have become longer than what was written of it.
        p.seen = p.durable.clone();
        p.cut_in = None;
    }
}

impl Media for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.0.borrow().seen.len()).unwrap())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let p = self.0.borrow();
        let from = p.seen.get(at..at + buf.len());
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        let p = &mut *self.0.borrow_mut();
        if p.seen.len() < at + buf.len() {
            p.seen.resize(at + buf.len(), 0);
        }
        p.seen[at..at + buf.len()].copy_from_slice(buf);
        p.pending.push((at, buf.to_vec()));
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let p = &mut *self.0.borrow_mut();
        if let Some(n) = &mut p.cut_in {
            if *n == 0 {
                return Err(io::Error::other("power"));
            }
            *n -= 1;
        }
        for (at, bytes) in p.pending.drain(..) {
            if p.durable.len() < at + bytes.len() {
                p.durable.resize(at + bytes.len(), 0);
            }
            p.durable[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }
}

/// A filter with few pages.
fn filter(disk: &Disk) -> Retired<Disk> {
    Retired::load(disk.clone(), 4, Path::new("sim")).unwrap()
}

/// As the threads do it: while the disk is busy, one lease is given back and its key claimed again, and another goes on.
fn by_stages(
    store: &mut LeaseStore<Disk>,
    disk: (&Disk, &Disk),
    updates: &[Update],
    specs: &[SaSpec],
    live: &mut [(usize, LeaseHandle, u64)],
    used: &[u64],
    rng: &mut TestRng,
) -> Result<(), LeaseError> {
    for u in updates {
        store.take(u)?;
    }
    let stage = store.stage();
    if !live.is_empty() {
        let at = rng.random_range(0..live.len());
        let (i, handle, limit) = &mut live[at];
        let end = match specs[*i].direction {
            Direction::Out => used[*i] + 1,
            Direction::In => used[*i],
        };
        let value = end.min(*limit);
        let given_back = Update::Release {
            handle: *handle,
            value,
        };
        store.take(&given_back)?;
        let again = store.claim(&specs[*i])?;
        assert_eq!(again.value, value, "it goes on where it was");
        (*handle, *limit) = (again.handle, again.value);
        // In memory, and not on disk when the stage is settled.
        store.take(&advance(again.handle, again.value + 1000))?;
    }
    match stage {
        Some(stage) => store.settle(stage.write(&mut disk.0.clone(), &mut disk.1.clone())),
        None => Ok(()),
    }
}

/// Random use of a dozen keys over 40 power cuts on one disk. `used` is what left the machine.
fn live_through_power_cuts(rng: &mut TestRng) {
    let (disk, retired) = (Disk::default(), Disk::default());
    let header = LeaseStore::<Disk>::new_header().unwrap();
    disk.0.borrow_mut().durable.clone_from(&header);
    disk.0.borrow_mut().seen = header;
    let specs: Vec<SaSpec> = (1..=12u8)
        .map(|n| {
            let direction = if n % 3 == 0 {
                Direction::In
            } else {
                Direction::Out
            };
            let mut sa = sa(n, direction, true);
            if n % 4 == 0 {
                sa.name = format!("ike:{n}");
            }
            sa
        })
        .collect();
    // Highest number used, 0 for none.
    let mut used = vec![0u64; specs.len()];
    let mut exact = vec![false; specs.len()];
    for _ in 0..40 {
        let mut store = LeaseStore::load(disk.clone(), filter(&retired), Path::new("sim")).unwrap();
        let cut_in = rng.random_range(0..12usize);
        disk.0.borrow_mut().cut_in = rng.random_bool(0.7).then_some(cut_in);
        retired.0.borrow_mut().cut_in = rng.random_bool(0.5).then_some(0);
        if rng.random_bool(0.1) && store.sweep(2 * DAY).is_err() {
            disk.cut(rng);
            retired.cut(rng);
            continue;
        }
        if rng.random_bool(0.1) {
            // To disk with what comes next.
            store.retire_due(2 * DAY).unwrap();
        }
        if rng.random_bool(0.003) {
            // More keys than an extent has room for.
            let mut other = out(0, true);
            for n in 0..2100u16 {
                other.keys.enc[..2].copy_from_slice(&n.to_be_bytes());
                other.keys.enc[2..4].copy_from_slice(&rng.random::<u16>().to_be_bytes());
                store.claim(&other).unwrap();
            }
        }
        let mut live: Vec<(usize, LeaseHandle, u64)> = Vec::new();
        for (i, s) in specs.iter().enumerate() {
            let r = match store.claim(s) {
                Ok(r) => r,
                Err(LeaseError::Retired { .. }) => continue,
                Err(_) => break,
            };
            let last = match s.direction {
                Direction::Out => r.value - 1,
                Direction::In => r.value,
            };
            assert!(
                last >= used[i],
                "sa {i}: resumes at {last}, used {}",
                used[i]
            );
            if exact[i] {
                assert_eq!(last, used[i], "sa {i} lost numbers in a clean stop");
            }
            exact[i] = false;
            live.push((i, r.handle, r.value));
        }
        for _ in 0..rng.random_range(1..10usize) {
            let mut updates = Vec::new();
            for (_, handle, limit) in &live {
                if rng.random_bool(0.5) {
                    updates.push(advance(*handle, limit + rng.random_range(0..50u64)));
                }
            }
            let committed = if rng.random_bool(0.5) {
                store.commit(&updates)
            } else {
                let disk = (&disk, &retired);
                by_stages(&mut store, disk, &updates, &specs, &mut live, &used, rng)
            };
            if committed.is_err() {
                break;
            }
            for u in &updates {
                if let Update::Advance { handle, value } = u
                    && let Some(l) = live.iter_mut().find(|l| l.1 == *handle)
                {
                    l.2 = *value;
                    let last = match specs[l.0].direction {
                        Direction::Out => value.saturating_sub(1),
                        Direction::In => *value,
                    };
                    used[l.0] = rng.random_range(used[l.0]..=last.max(used[l.0]));
                }
            }
        }
        if rng.random_bool(0.3) {
            let ends: Vec<_> = live
                .iter()
                .map(|(i, handle, limit)| Update::Release {
                    handle: *handle,
                    value: match specs[*i].direction {
                        Direction::Out => (used[*i] + 1).min(*limit),
                        Direction::In => used[*i].min(*limit),
                    },
                })
                .collect();
            if store.commit(&ends).is_ok() {
                for (i, ..) in &live {
                    exact[*i] = true;
                }
            }
        }
        drop(store);
        disk.cut(rng);
        retired.cut(rng);
    }
}

#[test]
fn no_number_comes_twice_over_forty_thousand_simulated_power_cuts() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..1000 {
        live_through_power_cuts(&mut runner.new_rng());
    }
}

#[test]
fn after_a_failed_sync_nothing_is_committed_any_more() {
    let disk = Disk::default();
    let header = LeaseStore::<Disk>::new_header().unwrap();
    disk.0.borrow_mut().seen = header;
    let mut s = LeaseStore::load(disk.clone(), filter(&Disk::default()), Path::new("sim")).unwrap();
    let a = s.claim(&out(1, true)).unwrap();
    s.commit(&[advance(a.handle, 10)]).unwrap();
    disk.0.borrow_mut().cut_in = Some(0);
    let failed = s.commit(&[advance(a.handle, 20)]);
    assert!(matches!(failed, Err(LeaseError::Io { .. })));
    disk.0.borrow_mut().cut_in = None;
    let later = s.commit(&[advance(a.handle, 30)]);
    assert!(matches!(later, Err(LeaseError::Failed)));
    assert!(matches!(s.claim(&out(2, true)), Err(LeaseError::Failed)));
}
