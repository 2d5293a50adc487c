use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;
use crate::file::{SaIdentity, Settings, Tunnel};
use crate::sa::{Direction, SaKeys, SaSpec, Spi};
use crate::suite::Suite;

pub(super) fn sa(number: u8, direction: Direction, first_use: bool) -> SaSpec {
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

pub(super) fn advance(handle: LeaseHandle, value: u64) -> Update {
    Update::Advance { handle, value }
}

fn release(handle: LeaseHandle, value: u64) -> Update {
    Update::Release { handle, value }
}

pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

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
