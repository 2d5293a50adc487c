use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{TestRng, TestRunner};
use zeroize::Zeroizing;

use super::retired::Retired;
use super::*;
use crate::file::{SaIdentity, Settings, Tunnel};
use crate::sa::{Direction, SaKeys, SaSpec, Spi};
use crate::suite::Suite;

fn sa(number: u8, direction: Direction, first_use: bool) -> SaSpec {
    let t = Tunnel::new(
        "t",
        "192.0.2.1".parse().unwrap(),
        "192.0.2.2".parse().unwrap(),
    );
    let id = SaIdentity {
        name: format!("sa-{number}"),
        direction,
        spi: Spi::new(0x1000 + u32::from(number)).unwrap(),
        suite: "aes-128-gcm-16".parse().unwrap(),
        keys: SaKeys {
            enc: Zeroizing::new(vec![number; 20]),
            auth: Zeroizing::default(),
        },
        first_use,
    };
    t.sa(id, &Settings::default())
}

pub(super) fn out(number: u8, first_use: bool) -> SaSpec {
    sa(number, Direction::Out, first_use)
}

fn advance(handle: LeaseHandle, value: u64) -> Update {
    Update::Advance { handle, value }
}

fn release(handle: LeaseHandle, value: u64) -> Update {
    Update::Release { handle, value }
}

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An SA of an IKE daemon's, out.
fn of_daemon(number: u16) -> SaSpec {
    let mut sa = out(0, true);
    sa.name = format!("ike:{number}");
    sa.keys.enc[..2].copy_from_slice(&number.to_be_bytes());
    sa
}

#[test]
fn a_daemons_key_rests_a_day_and_is_refused_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = LeaseStore::open(dir.path()).unwrap();
    let a = s.claim(&of_daemon(1)).unwrap();
    s.commit(&[advance(a.handle, 100)]).unwrap();
    s.commit(&[release(a.handle, 70)]).unwrap();
    // A peer that moves, or a daemon that starts again, has it back in time.
    s.sweep(DAY / 2).unwrap();
    let a = s.claim(&of_daemon(1)).unwrap();
    assert_eq!(a.value, 70);
    // It is in use, however long that takes.
    assert_eq!(s.sweep(3 * DAY).unwrap(), 0);
    s.commit(&[release(a.handle, 70)]).unwrap();
    assert_eq!(s.sweep(3 * DAY + DAY / 2).unwrap(), 0);
    assert_eq!(s.sweep(4 * DAY).unwrap(), 1);
    assert_eq!(s.records(), 0);
    for again in 0..2 {
        let e = s.claim(&of_daemon(1)).unwrap_err();
        assert!(matches!(e, LeaseError::Retired { .. }), "{again}: {e}");
        drop(s);
        s = LeaseStore::open(dir.path()).unwrap();
    }
    // Another key is none of its business, and without its file the store is not opened.
    assert_eq!(s.claim(&of_daemon(2)).unwrap().value, 1);
    drop(s);
    std::fs::remove_file(dir.path().join("retired")).unwrap();
    let e = LeaseStore::open(dir.path()).unwrap_err();
    assert!(e.to_string().contains("retired keys is gone"), "{e}");
}

/// The time of a key that nobody claims counts from the start: the daemon may be slower than the gateway.
#[test]
fn after_a_restart_the_day_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = LeaseStore::open(dir.path()).unwrap();
    for n in 0..2 {
        let a = s.claim(&of_daemon(n)).unwrap();
        s.commit(&[advance(a.handle, 100)]).unwrap();
    }
    drop(s);
    let mut s = LeaseStore::open(dir.path()).unwrap();
    assert_eq!(s.sweep(DAY / 2).unwrap(), 0);
    assert_eq!(s.claim(&of_daemon(0)).unwrap().value, 100);
    assert_eq!(s.sweep(DAY).unwrap(), 1);
    assert!(matches!(
        s.claim(&of_daemon(1)),
        Err(LeaseError::Retired { .. })
    ));
}

#[test]
fn a_key_that_a_file_has_or_takes_over_is_never_retired() {
    let mut s = LeaseStore::throw_away().unwrap();
    let a = s.claim(&out(1, true)).unwrap();
    s.commit(&[release(a.handle, 1)]).unwrap();
    let b = s.claim(&of_daemon(9)).unwrap();
    s.commit(&[release(b.handle, 1)]).unwrap();
    let mut taken = of_daemon(9);
    taken.name = "by-hand".into();
    let b = s.claim(&taken).unwrap();
    s.commit(&[release(b.handle, 1)]).unwrap();
    assert_eq!(s.sweep(100 * DAY).unwrap(), 0);
    assert_eq!(s.records(), 2);
}

#[test]
fn rekeys_do_not_make_the_store_grow() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = LeaseStore::open(dir.path()).unwrap();
    let mut longest = 0;
    // Thirty days of thousand keys each.
    for day in 0..30_u16 {
        let claim = |n| s.claim(&of_daemon(day * 1000 + n)).unwrap().handle;
        let handles: Vec<_> = (0..1000).map(claim).collect();
        let ends: Vec<_> = handles.iter().map(|h| release(*h, 1)).collect();
        s.commit(&ends).unwrap();
        s.sweep(DAY * u32::from(day + 1)).unwrap();
        longest = longest.max(s.records());
    }
    assert!(longest <= 2000, "{longest}");
    let size = |name| std::fs::metadata(dir.path().join(name)).unwrap().len();
    assert!(size("leases") <= 600_000, "{}", size("leases"));
    assert!(size("retired") <= 64 << 20);
    let again = s.claim(&of_daemon(17)).unwrap_err();
    assert!(matches!(again, LeaseError::Retired { .. }));
}

#[test]
fn a_crash_resumes_at_the_end_of_the_lease_and_a_clean_stop_where_it_stood() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut s = LeaseStore::open(&path).unwrap();
    let (a, b) = (
        s.claim(&out(1, true)).unwrap(),
        s.claim(&sa(2, Direction::In, true)).unwrap(),
    );
    assert_eq!((a.value, b.value), (1, 0));
    s.commit(&[advance(a.handle, 1000), advance(b.handle, 500)])
        .unwrap();
    assert_eq!(s.commits(), 1);
    drop(s);
    let mut s = LeaseStore::open(&path).unwrap();
    let a = s.claim(&out(1, false)).unwrap();
    let b = s.claim(&sa(2, Direction::In, false)).unwrap();
    assert_eq!((a.value, b.value), (1000, 500));
    s.commit(&[advance(a.handle, 2000)]).unwrap();
    let release = Update::Release {
        handle: a.handle,
        value: 1234,
    };
    s.commit(&[release]).unwrap();
    drop(s);
    let mut s = LeaseStore::open(&path).unwrap();
    assert_eq!(s.claim(&out(1, false)).unwrap().value, 1234);
    assert_eq!(s.records(), 2);
}

#[test]
fn a_key_without_a_record_is_refused_unless_it_is_its_first_use() {
    let mut s = LeaseStore::throw_away().unwrap();
    let e = s.claim(&out(1, false)).unwrap_err();
    assert!(
        matches!(&e, LeaseError::NoRecord { sa } if sa == "sa-1"),
        "{e}"
    );
    assert!(e.to_string().contains("first_use = true"));
    s.claim(&out(1, true)).unwrap();
    assert!(matches!(
        s.claim(&out(1, true)),
        Err(LeaseError::InUse { .. })
    ));
}

#[test]
fn first_use_does_not_reset_a_key_that_has_a_record() {
    let mut s = LeaseStore::throw_away().unwrap();
    let a = s.claim(&out(1, true)).unwrap();
    let release = Update::Release {
        handle: a.handle,
        value: 70,
    };
    s.commit(&[advance(a.handle, 100)]).unwrap();
    s.commit(&[release]).unwrap();
    assert_eq!(s.claim(&out(1, true)).unwrap().value, 70);
}

#[test]
fn a_record_belongs_to_the_key_and_not_to_names_or_settings() {
    let s = LeaseStore::throw_away().unwrap();
    let base = out(1, true);
    let mut other = base.clone();
    (other.name, other.esn) = ("renamed".into(), true);
    other.spi = Spi::new(0x9999).unwrap();
    other.suite = "aes-128-gcm-8".parse().unwrap();
    assert_eq!(s.key_id(&base), s.key_id(&other));
    other.suite = "aes-128-ctr+hmac-sha1-96".parse().unwrap();
    other.keys.auth = Zeroizing::new(vec![5; 20]);
    assert_eq!(s.key_id(&base), s.key_id(&other));
    assert_ne!(
        s.key_id(&base),
        s.key_id(&sa(1, Direction::In, true)),
        "directions count apart"
    );
    assert_ne!(s.key_id(&base), s.key_id(&out(2, true)));
    let elsewhere = LeaseStore::throw_away().unwrap();
    assert_ne!(
        s.key_id(&base),
        elsewhere.key_id(&base),
        "the hash is keyed"
    );
}

#[test]
fn one_process_holds_the_store_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let s = LeaseStore::open(dir.path()).unwrap();
    assert!(matches!(
        LeaseStore::open(dir.path()),
        Err(LeaseError::Locked(_))
    ));
    drop(s);
    LeaseStore::open(dir.path()).unwrap();
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(
        LeaseStore::open(dir.path()),
        Err(LeaseError::NotPrivate { .. })
    ));
}

#[test]
fn a_throw_away_store_leaves_nothing_behind() {
    let s = LeaseStore::throw_away().unwrap();
    let text = format!("{s:?}");
    let path = text.split('"').nth(1).unwrap().to_owned();
    assert!(
        !Path::new(&path).exists(),
        "a killed process leaves nothing"
    );
    drop(s);
}

#[test]
fn an_ended_handle_changes_nothing_also_when_its_slot_is_used_again() {
    let mut s = LeaseStore::throw_away().unwrap();
    let mut of_daemon = out(1, true);
    of_daemon.name = "ike:1".into();
    let a = s.claim(&of_daemon).unwrap();
    s.commit(&[advance(a.handle, 10)]).unwrap();
    s.commit(&[release(a.handle, 10)]).unwrap();
    assert_eq!(s.sweep(2 * DAY).unwrap(), 1);
    let b = s.claim(&out(2, true)).unwrap();
    assert!(matches!(
        s.commit(&[advance(a.handle, 99)]),
        Err(LeaseError::Ended)
    ));
    let over = Update::Release {
        handle: b.handle,
        value: 5,
    };
    assert!(matches!(s.commit(&[over]), Err(LeaseError::Overrun)));
}

#[test]
fn thousands_of_keys_go_to_disk_with_one_sync() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = LeaseStore::open(dir.path()).unwrap();
    let many: Vec<SaSpec> = (0..5000u16)
        .map(|i| {
            let mut sa = out(0, true);
            sa.keys.enc[..2].copy_from_slice(&i.to_be_bytes());
            sa
        })
        .collect();
    let handles: Vec<_> = many.iter().map(|m| s.claim(m).unwrap().handle).collect();
    let updates: Vec<_> = handles.iter().map(|h| advance(*h, 77)).collect();
    s.commit(&updates).unwrap();
    assert_eq!(s.commits(), 1);
    drop(s);
    let mut s = LeaseStore::open(dir.path()).unwrap();
    for m in &many {
        assert_eq!(s.claim(m).unwrap().value, 77);
    }
}

#[test]
fn a_foreign_or_damaged_file_is_not_taken_for_a_store() {
    let dir = tempfile::tempdir().unwrap();
    drop(LeaseStore::open(dir.path()).unwrap());
    let file = dir.path().join("leases");
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    bad[20] ^= 1;
    for content in [b"hello".to_vec(), bad, vec![0; 4096]] {
        std::fs::write(&file, content).unwrap();
        assert!(matches!(
            LeaseStore::open(dir.path()),
            Err(LeaseError::Damaged { .. })
        ));
    }
}

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
fn the_thread_commits_what_piled_up_with_one_sync_and_publishes_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = LeaseStore::open(dir.path()).unwrap();
    let w = LeaseWriter::start(store, Box::new(|e| panic!("{e}"))).unwrap();
    let specs: Vec<_> = (0..200).map(|n| out(n, true)).collect();
    let leases: Vec<Arc<Lease>> = w.claim(specs).into_iter().map(Result::unwrap).collect();
    for l in &leases {
        assert_eq!((l.resume(), l.limit()), (1, 1));
        w.advance(l, 100).unwrap();
        w.advance(l, 50).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while leases.iter().any(|l| l.limit() < 100) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(leases.iter().all(|l| l.limit() == 100));
    w.release(&leases[0], Release::At(60)).unwrap();
    assert!(matches!(
        w.release(&leases[0], Release::At(60)),
        Err(LeaseError::Ended)
    ));
    let ends = leases[1..].iter().map(|l| (l.clone(), Release::Unknown));
    w.release_many(ends.collect()).unwrap();
    let mut store = w.stop().unwrap();
    assert!(store.commits() < 150, "{} syncs", store.commits());
    assert_eq!(store.claim(&out(0, false)).unwrap().value, 60);
    assert_eq!(store.claim(&out(1, false)).unwrap().value, 100);
}

#[test]
fn claims_of_a_batch_fail_one_by_one() {
    let w = LeaseWriter::start(LeaseStore::throw_away().unwrap(), Box::new(|_| ())).unwrap();
    let answers = w.claim(vec![out(1, true), out(2, false), out(1, true)]);
    assert!(answers[0].is_ok());
    assert!(matches!(answers[1], Err(LeaseError::NoRecord { .. })));
    assert!(matches!(answers[2], Err(LeaseError::InUse { .. })));
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

#[test]
fn every_suite_can_be_claimed_in_both_directions() {
    let mut s = LeaseStore::throw_away().unwrap();
    for (n, suite) in (0u8..).zip(Suite::all()) {
        for direction in [Direction::In, Direction::Out] {
            let mut spec = sa(n, direction, true);
            spec.suite = suite;
            spec.keys.enc = Zeroizing::new(vec![n; suite.enc_key_len()]);
            spec.keys.auth = Zeroizing::new(vec![n; suite.auth_key_len()]);
            s.claim(&spec).unwrap_or_else(|e| panic!("{suite}: {e}"));
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_may_lie_where_a_store_is_looked_for(
        cut in 0usize..300_000,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..20),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut s = LeaseStore::open(dir.path()).unwrap();
        let a = s.claim(&out(1, true)).unwrap();
        s.commit(&[advance(a.handle, 5)]).unwrap();
        drop(s);
        let mut bytes = std::fs::read(dir.path().join("leases")).unwrap();
        bytes.truncate(cut);
        for (at, x) in flips {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= x;
            }
        }
        fuzz_store(&bytes);
    }
}
