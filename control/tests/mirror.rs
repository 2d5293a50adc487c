//! The IKE mirror beside SA files: one running state, faults of either kept apart.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Plane, control, sa_file, write_private};
use control::core::Control;
use control::mirrored::Mirrored;
use sa_store::file::{Config, MIRROR_PREFIX, parse};
use sa_store::policy::Action;
use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, Spi};

/// `n` tunnels of a daemon, with keys and SPIs that files of [`sa_file`] do not have.
fn mirrored(n: usize, changed: usize, salt: u8) -> Mirrored {
    let text = sa_file(n, changed, salt);
    let mut config = parse(&text, Path::new("mirror.toml")).unwrap();
    rename(&mut config);
    let senders = config
        .sas
        .iter()
        .filter(|s| s.direction == Direction::Out)
        .map(|s| (s.tunnel.clone(), s.name.clone()))
        .collect();
    Mirrored {
        config,
        senders,
        places: Vec::new(),
    }
}

fn rename(config: &mut Config) {
    let named = |n: &str| format!("{MIRROR_PREFIX}{n}");
    for t in &mut config.tunnels {
        t.name = named(&t.name);
    }
    for s in &mut config.sas {
        s.name = named(&s.name);
        s.tunnel = named(&s.tunnel);
        s.spi = Spi::new(s.spi.value() | 0x4000_0000).unwrap();
        s.keys.enc[1] ^= 0x80;
    }
    for p in &mut config.policies {
        p.name = named(&p.name);
        if let Action::Protect { tunnel } = &mut p.action {
            *tunnel = named(tunnel);
        }
    }
}

fn running(c: &Control) -> Vec<String> {
    let snapshot = c.store().current();
    let mut names: Vec<_> = snapshot
        .sas
        .iter()
        .flatten()
        .map(|e| e.spec.name.clone())
        .collect();
    names.sort();
    names
}

fn sender(c: &Control, tunnel: &str) -> Option<Arc<SaEntry>> {
    let idx = c.store().find_tunnel(tunnel)?;
    c.store().current().outbound(idx).cloned()
}

fn loaded(n: usize) -> (Control, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(&path, &sa_file(n, 0, 0));
    let mut c = control(&Arc::new(Plane::default()), vec![path]);
    assert!(c.reload().ok, "{:?}", c.last_reload());
    (c, dir)
}

#[test]
fn both_origins_run_beside_each_other_and_change_apart() {
    let (mut c, dir) = loaded(2);
    let outcome = c.mirror(mirrored(2, 0, 0));
    assert_eq!(outcome.left_out, []);
    assert_eq!((outcome.applied.added, outcome.applied.removed), (4, 0));
    assert_eq!(running(&c).len(), 8);
    let snapshot = c.store().current();
    assert_eq!(snapshot.spd_out.len(), 4, "policies of both");
    let of_file = sender(&c, "t0").unwrap();
    let of_daemon = sender(&c, "ike:t0").unwrap();

    // The files lose a tunnel: the daemon's stay, with their entries.
    write_private(&dir.path().join("sa.toml"), &sa_file(1, 0, 0));
    assert!(c.reload().ok);
    assert_eq!(running(&c).len(), 6);
    assert!(Arc::ptr_eq(&sender(&c, "ike:t0").unwrap(), &of_daemon));

    // The daemon goes: the files' stay.
    let outcome = c.mirror(Mirrored::default());
    assert_eq!((outcome.applied.removed, outcome.left_out.len()), (4, 0));
    assert_eq!(running(&c), ["t0-in-0", "t0-out-0"]);
    assert_eq!(c.store().current().spd_out.len(), 1);
    assert!(Arc::ptr_eq(&sender(&c, "t0").unwrap(), &of_file));
    c.finish(true).unwrap();
}

#[test]
fn what_of_the_mirror_cannot_be_had_is_left_out_alone() {
    let (mut c, _dir) = loaded(1);
    let mut m = mirrored(3, 0, 0);
    let sas = &mut m.config.sas;
    // A key of the wrong length, an SPI and a key that the files have, a foreign name, no tunnel.
    sas[0].keys.enc.truncate(7);
    sas[3].spi = Spi::new(0x1_0001).unwrap();
    sas[3].dst = "192.0.2.1".parse().unwrap();
    sas[4].name = "t2-out".into();
    sas[5].tunnel = "ike:none".into();
    let mut twin = sas[2].clone();
    twin.spi = Spi::new(77_777).unwrap();
    sas.push(twin);
    m.config.policies[0].action = Action::Protect {
        tunnel: "ike:void".into(),
    };
    let outcome = c.mirror(m.clone());
    let why = |name: &str| {
        let found = outcome.left_out.iter().find(|l| l.0 == name);
        found
            .unwrap_or_else(|| panic!("{name}: {:?}", outcome.left_out))
            .1
            .clone()
    };
    assert!(
        why("ike:t0-out-0").contains("key"),
        "{}",
        why("ike:t0-out-0")
    );
    assert!(
        why("ike:t1-in-0").contains("already in use"),
        "{}",
        why("ike:t1-in-0")
    );
    assert!(why("t2-out").contains("begin with"));
    assert!(why("ike:t2-in-0").contains("no tunnel ike:none"));
    assert!(why("ike:t1-out-0").contains("its name"));
    assert!(why("ike:t0").contains("no tunnel ike:void"));
    assert_eq!(outcome.left_out.len(), 6, "{:?}", outcome.left_out);
    assert_eq!(
        running(&c),
        ["ike:t0-in-0", "ike:t1-out-0", "t0-in-0", "t0-out-0"]
    );
    assert!(sender(&c, "ike:t0").is_none(), "its sender was left out");
    // Once they are right they come in, and the others keep their entries.
    let kept = sender(&c, "ike:t1").unwrap();
    let outcome = c.mirror(mirrored(3, 0, 0));
    assert_eq!(outcome.left_out, []);
    assert_eq!((outcome.applied.added, outcome.applied.kept), (4, 2));
    assert!(Arc::ptr_eq(&sender(&c, "ike:t1").unwrap(), &kept));
    c.finish(true).unwrap();
}

#[test]
fn a_bad_file_does_not_stop_the_mirror() {
    let (mut c, dir) = loaded(1);
    write_private(&dir.path().join("sa.toml"), "[[tunnel]]\nname = 3\n");
    assert!(!c.reload().ok);
    let outcome = c.mirror(mirrored(1, 0, 0));
    assert_eq!((outcome.applied.added, outcome.left_out.len()), (2, 0));
    assert_eq!(running(&c).len(), 4);
    c.finish(true).unwrap();
}

#[test]
fn files_may_not_use_the_mirrors_names() {
    let (mut c, dir) = loaded(1);
    let text = sa_file(1, 0, 0).replace("\"t0-in-0\"", "\"ike:t0-in-0\"");
    write_private(&dir.path().join("sa.toml"), &text);
    let reload = c.reload();
    assert!(!reload.ok);
    assert!(
        reload.problems[0].contains("belong to the IKE daemon"),
        "{:?}",
        reload.problems
    );
    c.finish(true).unwrap();
}

#[test]
fn the_mirror_says_who_sends() {
    let (mut c, _dir) = loaded(0);
    let mut m = mirrored(1, 0, 0);
    assert_eq!(c.mirror(m.clone()).left_out, []);
    // A successor is installed while the old one sends on, as after a CREATE_CHILD_SA response.
    let successor = mirrored(1, 1, 9);
    m.config.sas.extend(successor.config.sas.iter().cloned());
    assert_eq!(c.mirror(m.clone()).left_out, []);
    assert_eq!(sender(&c, "ike:t0").unwrap().spec.name, "ike:t0-out-0");
    m.senders = successor.senders.clone();
    assert_eq!(c.mirror(m.clone()).applied.added, 0);
    assert_eq!(sender(&c, "ike:t0").unwrap().spec.name, "ike:t0-out-9");
    // A tunnel that is not named goes on.
    m.senders.clear();
    c.mirror(m.clone());
    assert_eq!(sender(&c, "ike:t0").unwrap().spec.name, "ike:t0-out-9");
    m.config.sas.retain(|s| s.name != "ike:t0-out-9");
    c.mirror(m);
    assert!(
        sender(&c, "ike:t0").is_none(),
        "nothing was named in its place"
    );
    c.finish(true).unwrap();
}

#[test]
fn a_thousand_tunnels_rekeyed_one_by_one_beside_ten_thousand_sas() {
    let (mut c, _dir) = loaded(5000);
    let (mut now, next) = (mirrored(1000, 0, 0), mirrored(1000, 1000, 9));
    assert_eq!(c.mirror(now.clone()).applied.added, 2000);
    // Nothing changes: what a pass over unchanged SAs costs.
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(c.mirror(now.clone()).applied.kept, 2000);
    }
    let idle = began.elapsed() / 20;
    let began = Instant::now();
    for i in 0..200 {
        for (old, new) in [2 * i, 2 * i + 1].map(|n| (n, &next.config.sas[n])) {
            now.config.sas[old] = new.clone();
            if new.direction == Direction::Out {
                now.senders.insert(new.tunnel.clone(), new.name.clone());
            }
        }
        let outcome = c.mirror(now.clone());
        assert_eq!((outcome.applied.added, outcome.applied.removed), (2, 2));
        c.tick();
    }
    let each = began.elapsed() / 200;
    eprintln!("a pass over 2 000 mirrored SAs beside 10 000: {idle:?}, a rekey: {each:?}");
    assert!(each < Duration::from_millis(250), "{each:?}");
    c.finish(true).unwrap();
}

/// Peers that move: each place has a tunnel of another name.
#[test]
fn tunnels_that_nobody_names_any_more_are_forgotten_once_they_are_many() {
    let (mut c, _dir) = loaded(2);
    let mut most = 0;
    for place in 0..2500_u32 {
        let mut m = mirrored(2, 0, 1);
        for t in &mut m.config.tunnels {
            t.name += &format!("-{place}");
        }
        for s in &mut m.config.sas {
            s.tunnel += &format!("-{place}");
        }
        for p in &mut m.config.policies {
            if let Action::Protect { tunnel } = &mut p.action {
                *tunnel += &format!("-{place}");
            }
        }
        let senders = m.senders.drain();
        m.senders = senders.map(|(t, s)| (format!("{t}-{place}"), s)).collect();
        let outcome = c.mirror(m);
        assert!(outcome.left_out.is_empty(), "{outcome:?}");
        most = most.max(c.store().named_tunnels());
    }
    assert!((500..=1040).contains(&most), "{most} names");
    let named = c.store().tunnels().iter().filter(|t| !t.name.is_empty());
    assert_eq!(named.count(), c.store().named_tunnels());
    // Those of the files and the present ones are there, and send.
    let names: Vec<_> = running(&c);
    assert_eq!(names.len(), 8, "{names:?}");
    let tunnels = c.store().tunnels().iter().map(|t| t.name.clone());
    let senders = tunnels.filter(|t| !t.is_empty() && sender(&c, t).is_some());
    assert_eq!(senders.count(), 4);
}
