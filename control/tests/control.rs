//! The control thread from outside: files in, snapshots, HTTP and API out.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Plane, control, parts, sa_file, write_private};
use control::api::ApiConfig;
use control::run::{Options, Running, StartError, start};
use sa_store::counters::Counter;
use serde_json::{Value, json};

struct Rig {
    running: Running,
    plane: Arc<Plane>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn start(watch: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_private(&dir.path().join("sa.toml"), &sa_file(3, 0, 0));
        let plane = Arc::new(Plane::default());
        let options = Options {
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            api: Some(ApiConfig {
                path: dir.path().join("api.sock"),
                group: None,
            }),
            watch,
            service: false,
            ike: None,
        };
        let running = start(parts(&plane, vec![dir.path().join("sa.toml")]), options)
            .unwrap_or_else(|e| panic!("{e}"));
        Self {
            running,
            plane,
            dir,
        }
    }

    fn http(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.running.metrics_addr().unwrap()).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    fn api(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.dir.path().join("api.sock")).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

fn ids(control: &control::core::Control) -> Vec<(String, sa_store::sa::SaId)> {
    let snapshot = control.store().current();
    let mut all: Vec<_> = snapshot
        .sas
        .iter()
        .flatten()
        .map(|e| (e.spec.name.clone(), e.fixed.id))
        .collect();
    all.sort();
    all
}

#[test]
fn a_scrape_exposes_every_documented_metric() {
    let mut rig = Rig::start(false);
    rig.plane.workers[0].counters.burst_latency.observe(1000);
    let nobody = control::vici::Settings::new(&rig.dir.path().join("vici")).unwrap();
    rig.running.follow_names(nobody).unwrap();
    let (status, body) = rig.http("/metrics");
    assert_eq!(status, 200);
    // A daemon's tunnels have names; those of files have none. The tests of `vici` see that one.
    let exposed = |m: &&control::metrics::Metric| m.name != "esplanade_tunnel_ike_info";
    for m in control::metrics::ALL.iter().filter(exposed) {
        assert!(
            body.contains(&format!("# TYPE {} ", m.name)),
            "{} is not exposed",
            m.name
        );
    }
    let documented = |name: &str| control::metrics::ALL.iter().any(|m| m.name == name);
    for line in body.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        assert!(
            documented(line.split(' ').next().unwrap()),
            "{line} is not documented"
        );
    }
    assert!(body.contains("esplanade_sas_unlisted 4"), "{body}");
    assert!(body.contains("esplanade_tunnel_up{tunnel=\"t0\"} 1"));
    assert!(body.contains("esplanade_port_receive_frames_total{port=\"wan\",queue=\"0\"} 3"));
}

#[test]
fn health_follows_the_workers_and_strange_paths_are_refused() {
    let rig = Rig::start(false);
    assert_eq!(rig.http("/healthz").0, 200);
    assert_eq!(rig.http("/readyz").0, 200);
    assert_eq!(rig.http("/nothing").0, 404);
    // The worker of this test makes no poll rounds: after a while that is noticed.
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.http("/healthz").0 == 200 {
        assert!(Instant::now() < deadline, "a stuck worker was not noticed");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (status, body) = rig.http("/healthz");
    assert_eq!((status, body.contains("worker 0")), (503, true), "{body}");
    rig.plane.workers[0].counters.idle_polls.add(1);
    let deadline = Instant::now() + Duration::from_secs(5);
    while rig.http("/healthz").0 != 200 {
        assert!(Instant::now() < deadline, "recovery was not noticed");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn slow_clients_do_not_keep_others_out() {
    let rig = Rig::start(false);
    let addr = rig.running.metrics_addr().unwrap();
    let mut slow = Vec::new();
    for _ in 0..40 {
        let mut s = TcpStream::connect(addr).unwrap();
        s.write_all(b"GET /metr").unwrap();
        slow.push(s);
    }
    assert_eq!(rig.http("/metrics").0, 200);
    // The head must come in time, or the connection ends.
    let mut first = slow.remove(0);
    first
        .set_read_timeout(Some(Duration::from_secs(8)))
        .unwrap();
    let mut rest = Vec::new();
    let ended = first.read_to_end(&mut rest);
    assert!(ended.is_ok(), "still open: {ended:?}");
}

#[test]
fn a_bad_file_is_refused_with_its_line_and_what_ran_runs_on() {
    let rig = Rig::start(false);
    let before = ids(&rig.running.control());
    let path = rig.dir.path().join("sa.toml");
    write_private(
        &path,
        &sa_file(3, 3, 1).replace("[[policy]]\nname = \"t1\"", "[[policy]]\nnmae = \"t1\""),
    );
    let answer = rig.api(&json!({ "v": 1, "cmd": "reload" }));
    assert_eq!(answer["data"]["ok"], false);
    let problems = answer["data"]["problems"].as_array().unwrap();
    let of_line = |p: &Value| {
        p.as_str()
            .is_some_and(|p| p.starts_with(&format!("{}:", path.display())))
    };
    assert!(problems.iter().all(of_line), "{problems:?}");
    assert!(
        problems.iter().any(|p| p.to_string().contains("nmae")),
        "{problems:?}"
    );
    assert_eq!(ids(&rig.running.control()), before);
    assert!(
        rig.http("/metrics")
            .1
            .contains("esplanade_config_last_reload_successful 0")
    );
    let (status, body) = rig.http("/readyz");
    assert_eq!(status, 200, "it still works");
    assert!(body.contains("nmae"), "{body}");
    let events = rig.api(&json!({ "v": 1, "cmd": "events" }));
    assert!(
        events["data"]
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["kind"] == "reload_refused")
    );
}

#[test]
fn a_replaced_file_and_one_written_in_place_are_loaded_by_themselves() {
    let rig = Rig::start(true);
    let path = rig.dir.path().join("sa.toml");
    let wait_for = |n: usize| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while rig
            .running
            .control()
            .store()
            .current()
            .sas
            .iter()
            .flatten()
            .count()
            != n
        {
            assert!(Instant::now() < deadline, "the change was not seen");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_for(6);
    // The thread sets its watch up after it has started.
    std::thread::sleep(Duration::from_millis(200));
    write_private(&path, &sa_file(5, 0, 0));
    wait_for(10);
    std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap()
        .write_all(sa_file(2, 0, 0).as_bytes())
        .unwrap();
    wait_for(4);
}

#[test]
fn the_api_answers_and_shows_no_key() {
    let rig = Rig::start(false);
    let mode = std::fs::metadata(rig.dir.path().join("api.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut all = String::new();
    for request in [
        json!({ "v": 1, "cmd": "sa_list" }),
        json!({ "v": 1, "cmd": "sa_show", "name": "t1-out-0" }),
        json!({ "v": 1, "cmd": "policy_list" }),
        json!({ "v": 1, "cmd": "stats" }),
        json!({ "v": 1, "cmd": "status" }),
        json!({ "v": 1, "cmd": "ports" }),
        json!({ "v": 1, "cmd": "engines" }),
        json!({ "v": 1, "cmd": "events", "after": 0 }),
        json!({ "v": 1, "cmd": "explain", "src": "10.0.0.1", "dst": "172.16.1.5", "proto": 6, "ports": [1, 2] }),
        json!({ "v": 1, "cmd": "capture_start", "port": "wan", "file": "/x" }),
    ] {
        let answer = rig.api(&request);
        assert_eq!(answer["ok"], true, "{request}: {answer}");
        assert_eq!(answer["v"], 1);
        all += &answer.to_string();
    }
    // Key of t1, outbound.
    assert!(!all.contains(&format!("{:036x}", 1)), "a key was shown");
    assert!(all.contains("\"t1-out-0\""));
    for bad in [
        json!({ "v": 1, "cmd": "sa_show", "name": "no" }),
        json!({ "v": 9 }),
        json!({ "v": 1, "cmd": "capture_stop", "port": "wan" }),
    ] {
        assert_eq!(rig.api(&bad)["ok"], false, "{bad}");
    }
}

#[test]
fn explain_names_policy_tunnel_sa_and_worker() {
    let rig = Rig::start(false);
    let ask = |dst: &str| {
        rig.api(&json!({ "v": 1, "cmd": "explain", "src": "10.0.0.1", "dst": dst, "proto": 17 }))["data"].clone()
    };
    let e = ask("172.16.2.9");
    assert_eq!(
        (&e["policy"], &e["tunnel"], &e["sa"], &e["worker"]),
        (&json!("t2"), &json!("t2"), &json!("t2-out-0"), &json!(0)),
        "{e}"
    );
    // This gateway has no routes: the outer packet has nowhere to go.
    assert_eq!(e["reason"], "no_route");
    let e = ask("8.8.8.8");
    assert_eq!(
        (&e["verdict"], &e["reason"]),
        (&json!("drop"), &json!("policy_discard")),
        "{e}"
    );
}

#[test]
fn two_gateways_do_not_share_an_api_socket_and_a_stale_one_is_replaced() {
    let rig = Rig::start(false);
    let path = rig.dir.path().join("api.sock");
    let options = Options {
        api: Some(ApiConfig {
            path: path.clone(),
            group: None,
        }),
        ..Options::default()
    };
    let second = start(
        parts(&Arc::new(Plane::default()), Vec::new()),
        options.clone(),
    );
    assert!(matches!(second.err(), Some(StartError::Api(_))));
    let stale = rig.dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let options = Options {
        api: Some(ApiConfig {
            path: stale,
            group: None,
        }),
        ..options
    };
    assert!(start(parts(&Arc::new(Plane::default()), Vec::new()), options).is_ok());
}

#[test]
fn unchanged_sas_keep_their_entry_and_counters_over_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(&path, &sa_file(4, 0, 0));
    let mut c = control(&Arc::new(Plane::default()), vec![path.clone()]);
    assert!(c.reload().ok);
    let before = ids(&c);
    let find = |c: &control::core::Control, name: &str| {
        c.store()
            .current()
            .sas
            .iter()
            .flatten()
            .find(|e| e.spec.name == name)
            .cloned()
    };
    let packets: fn(&sa_store::runtime::SaEntry) -> &Counter = |e| &e.live.counters.packets;
    packets(&find(&c, "t3-out-0").unwrap()).add(42);
    write_private(&path, &sa_file(4, 1, 7));
    let outcome = c.reload().clone();
    assert_eq!(
        (outcome.ok, outcome.added, outcome.removed, outcome.kept),
        (true, 2, 2, 6),
        "{:?}",
        outcome.problems
    );
    assert_eq!(packets(&find(&c, "t3-out-0").unwrap()).value(), 42);
    let after = ids(&c);
    assert_eq!(before.iter().filter(|p| after.contains(p)).count(), 6);
    // The tunnel sends on the new SA.
    let snapshot = c.store().current();
    let t0 = c.store().find_tunnel("t0").unwrap();
    assert_eq!(snapshot.outbound(t0).unwrap().spec.name, "t0-out-7");
}

#[test]
fn an_sa_that_changes_but_keeps_its_key_never_uses_a_number_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(&path, &sa_file(1, 0, 0));
    let mut c = control(&Arc::new(Plane::default()), vec![path.clone()]);
    assert!(c.reload().ok);
    let sa = |c: &control::core::Control, out: bool| {
        let snapshot = c.store().current();
        let mut all = snapshot.sas.iter().flatten().cloned();
        all.find(|e| e.fixed.out.is_some() == out).unwrap()
    };
    let old = sa(&c, true);
    let mut used = Vec::new();
    for _ in 0..1000 {
        used.push(old.next_out(64, 1).unwrap());
    }
    // The same keys, another lifetime.
    let changed = sa_file(1, 0, 0).replace("suite =", "soft = { packets = 5_000_000 }\nsuite =");
    write_private(&path, &changed);
    let outcome = c.reload().clone();
    assert!(outcome.ok, "{:?}", outcome.problems);
    assert_eq!(outcome.kept, 0);
    let new = sa(&c, true);
    assert_ne!(new.fixed.id, old.fixed.id);
    // A worker that still holds the old snapshot sends on: its numbers stay apart from the new ones for ever.
    let old_last = std::iter::from_fn(|| old.next_out(64, 1).ok())
        .last()
        .unwrap();
    let new_first = new.next_out(64, 1).unwrap();
    assert!(new_first > old_last, "{new_first} {old_last}");
    for _ in 0..20 {
        c.tick();
        assert!(
            old.next_out(64, 1).is_err(),
            "the lease of a replaced SA grew"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!sa(&c, false).disabled());
}

#[test]
fn leases_grow_while_numbers_are_used_and_a_removed_sa_resumes_where_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(&path, &sa_file(2, 0, 0));
    let plane = Arc::new(Plane::default());
    let mut c = control(&plane, vec![path.clone()]);
    assert!(c.reload().ok);
    let out = |c: &control::core::Control, name: &str| {
        c.store()
            .current()
            .sas
            .iter()
            .flatten()
            .find(|e| e.spec.name == name)
            .cloned()
    };
    let entry = out(&c, "t1-out-0").unwrap();
    let mut last = 0;
    for _ in 0..200 {
        for _ in 0..20_000 {
            last = entry.next_out(64, 1).expect("the lease stays ahead");
        }
        plane.workers[0].counters.encrypted.add(20_000);
        c.tick();
        c.settle_leases();
    }
    assert_eq!(last, 4_000_000);
    drop(entry);
    write_private(&path, &sa_file(1, 0, 0));
    assert!(c.reload().ok);
    c.tick();
    assert!(out(&c, "t1-out-0").is_none());
    write_private(&path, &sa_file(2, 0, 0));
    assert!(c.reload().ok);
    assert_eq!(out(&c, "t1-out-0").unwrap().next_seq(), last + 1);
    c.finish(true).unwrap();
}

#[test]
fn the_difference_of_ten_thousand_sas_is_found_and_published_quickly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(&path, &sa_file(10_000, 0, 0));
    let mut c = control(&Arc::new(Plane::default()), vec![path.clone()]);
    assert!(c.reload().ok, "{:?}", c.last_reload());
    write_private(&path, &sa_file(10_000, 5000, 3));
    let began = Instant::now();
    let outcome = c.reload().clone();
    assert!(outcome.ok, "{:?}", outcome.problems);
    assert_eq!(
        (outcome.added, outcome.removed, outcome.kept),
        (10_000, 10_000, 10_000)
    );
    let took = began.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    eprintln!("10 000 of 20 000 SAs changed in {took:?}");
}

#[test]
fn soft_limits_are_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sa.toml");
    write_private(
        &path,
        &sa_file(1, 0, 0).replace("suite =", "soft = { packets = 10 }\nsuite ="),
    );
    let plane = Arc::new(Plane::default());
    let running =
        start(parts(&plane, vec![path]), Options::default()).unwrap_or_else(|e| panic!("{e}"));
    let entry = running
        .control()
        .store()
        .current()
        .sas
        .iter()
        .flatten()
        .find(|e| e.fixed.out.is_some())
        .cloned()
        .unwrap();
    for _ in 0..5 {
        for _ in 0..10 {
            entry.next_out(64, 1).unwrap();
        }
        plane.workers[0].counters.encrypted.add(10);
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(1200));
    let text = String::from_utf8(running.scrape().unwrap()).unwrap();
    assert!(
        text.contains("esplanade_sa_events_total{event=\"soft_packets\"} 1"),
        "{text}"
    );
}

#[test]
fn a_start_with_bad_files_says_what_is_wrong() {
    let missing = vec![Path::new("/nonexistent/sa.toml").to_owned()];
    let Err(StartError::Refused(problems)) = start(
        parts(&Arc::new(Plane::default()), missing),
        Options::default(),
    ) else {
        panic!("started");
    };
    assert!(problems[0].contains("/nonexistent/sa.toml"), "{problems:?}");
}
