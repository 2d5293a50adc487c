//! The client against daemons that answer, end, hang and lie.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sa_store::file::{MIRROR_PREFIX, parse};
use sa_store::policy::Action;
use sa_store::sa::{Direction, Spi};

use super::client::Times;
use super::{NamesReport, Running, Settings};
use crate::api::Stats;
use crate::common::{Plane, control, sa_file};
use crate::core::{Control, lock};
use crate::metrics::Exporter;
use crate::mirrored::Mirrored;

const RECORDED: &[u8] = include_bytes!("recorded-5.9.8.bin");
/// What of it answers the four registrations and `list-sas`.
const ANSWERS: usize = 6;

const HASTY: Times = Times {
    answer: Duration::from_millis(300),
    list: Duration::from_millis(900),
    look: Duration::from_millis(20),
    lists: [Duration::from_millis(50), Duration::from_millis(100)],
    retries: [Duration::from_millis(20), Duration::from_millis(50)],
};

proptest! {
    #[test]
    fn fuzz_entry_takes_anything(data in prop::collection::vec(prop_oneof![0_u8..8, any::<u8>()], 0..400)) {
        super::fuzz_stream(&data);
    }
}

/// The recorded packets, with their lengths.
fn packets() -> Vec<&'static [u8]> {
    let (mut list, mut rest) = (Vec::new(), RECORDED);
    while let Some((length, _)) = rest.split_first_chunk() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap();
        let (packet, more) = rest.split_at(4 + length);
        list.push(packet);
        rest = more;
    }
    list
}

/// A control with the tunnel `ike:t0`, which has the SAs that the recorded child `voice` has in the end.
fn with_a_tunnel() -> Arc<Mutex<Control>> {
    let mut config = parse(&sa_file(1, 0, 0), Path::new("mirror.toml")).unwrap();
    let named = |n: &str| format!("{MIRROR_PREFIX}{n}");
    for t in &mut config.tunnels {
        t.name = named(&t.name);
    }
    let mut senders = std::collections::HashMap::new();
    let (us, peer) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    for s in &mut config.sas {
        (s.name, s.tunnel) = (named(&s.name), named(&s.tunnel));
        let out = s.direction == Direction::Out;
        (s.src, s.dst) = if out { (us, peer) } else { (peer, us) };
        s.spi = Spi::new(if out { 0x473e_4b82 } else { 0xa94c_fbd9 }).unwrap();
        if out {
            senders.insert(s.tunnel.clone(), s.name.clone());
        }
    }
    for p in &mut config.policies {
        p.name = named(&p.name);
        if let Action::Protect { tunnel } = &mut p.action {
            *tunnel = named(tunnel);
        }
    }
    let mut control = control(&Arc::new(Plane::default()), Vec::new());
    let outcome = control.mirror(Mirrored {
        config,
        senders,
        places: Vec::new(),
    });
    assert_eq!((outcome.applied.added, outcome.left_out.len()), (2, 0));
    Arc::new(Mutex::new(control))
}

fn follow(socket: &Path, control: &Arc<Mutex<Control>>) -> Running {
    let settings = Settings::new(socket).unwrap();
    Running::start_with(settings, Arc::clone(control), HASTY).unwrap()
}

fn report(control: &Arc<Mutex<Control>>) -> NamesReport {
    let control = lock(control);
    control.names.as_ref().unwrap().lock().report().clone()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Connection and child of the tunnel, as the API and a scrape say them.
fn names_of_tunnel(control: &Arc<Mutex<Control>>) -> Option<(String, String)> {
    let stats = Stats::of(&control.lock().unwrap());
    let names = stats.tunnels[0].names.clone();
    let exporter = Exporter::new(Arc::clone(control)).unwrap();
    let text = String::from_utf8(exporter.scrape().unwrap()).unwrap();
    let samples: Vec<_> = text
        .lines()
        .filter(|l| l.starts_with("esplanade_tunnel_ike_info{"))
        .collect();
    let names = names.ike.zip(names.child)?;
    let (ike, child) = &names;
    let labels = [
        format!("ike=\"{ike}\""),
        format!("child=\"{child}\""),
        "tunnel=\"ike:t0\"".into(),
    ];
    assert_eq!(samples.len(), 1, "{samples:?}");
    assert!(labels.iter().all(|l| samples[0].contains(l)), "{samples:?}");
    Some(names)
}

/// Takes the four registrations and the list's request.
fn hear_requests(stream: &mut UnixStream) {
    let mut asked: Vec<u8> = Vec::new();
    let mut room = [0; 1024];
    loop {
        let n = stream.read(&mut room).unwrap();
        assert_ne!(n, 0, "the client has gone");
        asked.extend(&room[..n]);
        if asked.windows(8).any(|w| w == b"list-sas") {
            return;
        }
        // It waits for each answer.
        stream.write_all(packets()[0]).unwrap();
    }
}

#[test]
fn names_come_late_survive_the_daemon_and_go_with_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vici");
    let control = with_a_tunnel();
    // Nobody is there yet.
    let running = follow(&socket, &control);
    until("a reason", || report(&control).problem.is_some());
    let problem = report(&control).problem.unwrap();
    assert!(
        problem.starts_with("cannot connect: No such file"),
        "{problem}"
    );

    let listener = UnixListener::bind(&socket).unwrap();
    let (mut daemon, _) = listener.accept().unwrap();
    let packets = packets();
    serve_list(&mut daemon, &packets);
    until("connected", || report(&control).connected);
    assert_eq!((report(&control).named, report(&control).unnamed), (0, 2));
    assert_eq!(names_of_tunnel(&control), None);
    // The client lists again, as there are SAs without a name; meanwhile the child is rekeyed.
    daemon.write_all(&packets[ANSWERS..].concat()).unwrap();
    until("named", || report(&control).named == 2);
    let names = Some(("branch-office".to_owned(), "voice".to_owned()));
    assert_eq!(names_of_tunnel(&control), names);

    // The daemon ends; its tunnel may still run.
    drop(daemon);
    until("lost", || !report(&control).connected);
    assert_eq!(names_of_tunnel(&control), names);
    // The next one tells of other SAs alone. What it says of those that run stays; those that end have no name then.
    let gone = control.lock().unwrap().mirror(Mirrored::default());
    assert_eq!(gone.applied.removed, 2);
    let (mut daemon, _) = listener.accept().unwrap();
    serve_list(&mut daemon, &packets);
    until("connected again", || report(&control).connected);
    assert_eq!(names_of_tunnel(&control), None);

    let began = Instant::now();
    drop(running);
    assert!(began.elapsed() < Duration::from_secs(2), "it ends at once");
    assert_eq!(Arc::strong_count(&control), 1);
}

/// Answers up to the end of the list.
fn serve_list(daemon: &mut UnixStream, packets: &[&[u8]]) {
    hear_requests(daemon);
    daemon.write_all(&packets[4..ANSWERS].concat()).unwrap();
}

/// Of no SA, without its length.
const EVENT: &[u8] = b"\x07\x07list-sa";

#[test]
fn a_list_without_end_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vici");
    let listener = UnixListener::bind(&socket).unwrap();
    let control = with_a_tunnel();
    let running = follow(&socket, &control);
    let (mut daemon, _) = listener.accept().unwrap();
    hear_requests(&mut daemon);
    let flood = [&9_u32.to_be_bytes()[..], EVENT].concat().repeat(1000);
    let mut sent = 0;
    // Until the client closes the connection.
    while daemon.write_all(&flood).is_ok() {
        sent += flood.len();
        let _free = control.lock().unwrap();
    }
    assert!(
        sent < 3 * super::client::MOST,
        "{sent} bytes were read in a second"
    );
    until("given up", || report(&control).problem.is_some());
    let problem = report(&control).problem;
    assert_eq!(problem.as_deref(), Some("the daemon does not answer"));
    drop(running);
}

#[test]
fn daemons_that_hang_or_lie_cost_names_alone() {
    let event = |n: u32| [&n.to_be_bytes()[..], EVENT].concat();
    let registered = packets()[..4].concat();
    for (sent, ends, why) in [
        (Vec::new(), false, "the daemon does not answer"),
        (Vec::new(), true, "the daemon closed the connection"),
        (
            b"HTTP/1.1 400".to_vec(),
            false,
            "the daemon sent a packet of 1213486160 bytes",
        ),
        (vec![0; 4], false, "the daemon sent a packet of 0 bytes"),
        (
            b"\0\0\0\x01\x06".to_vec(),
            false,
            "the daemon does not know \"list-sa\"",
        ),
        (
            b"\0\0\0\x01\x01".to_vec(),
            false,
            "the daemon sent an answer to something else",
        ),
        (
            b"\0\0\0\x01\x00".to_vec(),
            false,
            "the daemon sent a packet of type 0",
        ),
        // Half a packet, and no more.
        (
            b"\0\0\x10\0\x07".to_vec(),
            false,
            "the daemon does not answer",
        ),
        (
            [&registered[..], b"\0\0\0\x01\x02"].concat(),
            false,
            "the daemon does not know \"list-sas\"",
        ),
        (
            [&registered[..], &event(10), b"\x02"].concat(),
            false,
            "the daemon sent a message whose sections do not close each other",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vici");
        let listener = UnixListener::bind(&socket).unwrap();
        let control = with_a_tunnel();
        let running = follow(&socket, &control);
        let (mut daemon, _) = listener.accept().unwrap();
        // The client may leave before it has read all.
        let written = daemon.write_all(&sent);
        if ends {
            daemon.shutdown(std::net::Shutdown::Write).unwrap();
        }
        until(why, || report(&control).problem.is_some());
        assert_eq!(
            report(&control).problem.as_deref(),
            Some(why),
            "{written:?}"
        );
        assert!(!report(&control).connected);
        let stats = Stats::of(&control.lock().unwrap());
        assert_eq!((stats.sas, names_of_tunnel(&control)), (2, None));
        // It tries again.
        let (_daemon, _) = listener.accept().unwrap();
        drop(running);
    }
}
