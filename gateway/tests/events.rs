//! `esplanade events --follow --json` against a running gateway, over its real socket: a reader that stands still, a ring that
//! overflows meanwhile, a reader that goes and comes back. No state is lost on any of them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Events that the gateway keeps.
const KEPT: u64 = 4096;
/// More events than a socket holds for a reader that stands still.
const BUFFERED: u64 = 2000;

fn signal(child: &Child, what: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), what).unwrap();
}

fn until(what: &str, good: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !good() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A gateway over memory ports, with its socket.
struct Gateway {
    dir: tempfile::TempDir,
    child: Child,
    asks: BufReader<UnixStream>,
}

impl Gateway {
    fn start(tunnels: &[(&str, u32, bool)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = "sa_files = [\"sa.toml\"]\nmemory = { frames = 1024, lock = false, huge = \"never\" }\n\
             leases = { path = \"leases\" }\napi = { socket = \"api.sock\" }\nmetrics = { enabled = false }\n\
             rekey = { switch_delay_ms = 0, overlap_ms = 0, quiet_ms = 0, jitter_percent = 0 }\n\
             [[port]]\nname = \"a\"\nkind = \"memory\"\nside = \"inside\"\nmemory = { peer = \"b\" }\n\
             [[port]]\nname = \"b\"\nkind = \"memory\"\nside = \"outside\"\nmemory = { peer = \"a\" }\naddresses = [\"192.0.2.1/24\"]\n";
        std::fs::write(dir.path().join("gateway.toml"), config).unwrap();
        write_sas(dir.path(), tunnels);
        let child = Command::new(env!("CARGO_BIN_EXE_esplanade"))
            .args(["run", "--config"])
            .arg(dir.path().join("gateway.toml"))
            .env("ESPLANADE_LOG", "off")
            .spawn()
            .unwrap();
        let socket = dir.path().join("api.sock");
        until("no answer", || UnixStream::connect(&socket).is_ok());
        let asks = BufReader::new(UnixStream::connect(&socket).unwrap());
        Self { dir, child, asks }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Number of the last event.
    fn last(&mut self) -> u64 {
        let request = b"{\"v\":1,\"cmd\":\"events\"}\n";
        self.asks.get_mut().write_all(request).unwrap();
        let mut answer = String::new();
        self.asks.read_line(&mut answer).unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let last = answer["data"].as_array().unwrap().last().unwrap();
        last["number"].as_u64().unwrap()
    }

    /// Each reload is an event.
    fn reload(&mut self, times: u64) {
        for _ in 0..times {
            let request = b"{\"v\":1,\"cmd\":\"reload\"}\n";
            self.asks.get_mut().write_all(request).unwrap();
            let mut answer = String::new();
            self.asks.read_line(&mut answer).unwrap();
            assert!(answer.contains("\"ok\":true,\"policies\""), "{answer}");
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        signal(&self.child, Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// Tunnels with one SA each, by name and SPI. Those that age want a successor two seconds later.
fn write_sas(dir: &Path, tunnels: &[(&str, u32, bool)]) {
    let mut all = String::new();
    for (name, spi, ages) in tunnels {
        let soft = if *ages { "soft = { time = 1 }\n" } else { "" };
        all += &format!(
            "[[tunnel]]\nname = \"{name}\"\nlocal = \"192.0.2.1\"\nremote = \"198.51.100.7\"\n\
             suite = \"aes-256-cbc+hmac-sha2-256-128\"\n{soft}[[tunnel.sa]]\ndirection = \"out\"\nspi = {spi}\n\
             key = \"{spi:064x}\"\nauth_key = \"{:064x}\"\nfirst_use = true\n",
            spi + 0x10000
        );
    }
    let new = dir.join(".new");
    std::fs::write(&new, all).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(new, dir.join("sa.toml")).unwrap();
}

/// `esplanade events --follow --json`, and what it has printed.
struct Follower {
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
    reader: Option<JoinHandle<()>>,
}

/// What a reader of the stream knows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Known {
    /// Number of the last event.
    last: u64,
    missed: Vec<u64>,
    /// States that hold: kind, tunnel.
    states: BTreeSet<(String, String)>,
}

impl Follower {
    fn start(socket: &Path, since: Option<u64>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_esplanade"));
        command.args(["events", "--follow", "--json", "--socket"]);
        command.arg(socket);
        if let Some(n) = since {
            command.args(["--since", &n.to_string()]);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (out, into) = (child.stdout.take().unwrap(), Arc::clone(&lines));
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                let line = serde_json::from_str(&line.unwrap()).unwrap();
                into.lock().unwrap().push(line);
            }
        });
        Self {
            child,
            lines,
            reader: Some(reader),
        }
    }

    /// Reads all again as a program would that follows from the first: numbers have no gaps but those that are told.
    fn known(&self) -> Known {
        let mut k = Known::default();
        for line in &*self.lines.lock().unwrap() {
            if let Some(n) = line["missed"].as_u64() {
                k.last += n;
                k.missed.push(n);
                // What holds now follows.
                k.states.clear();
            }
            let (event, on) = if line["holds"].is_object() {
                (&line["holds"], true)
            } else {
                (&line["event"], line["event"]["state"] == "on")
            };
            if line["event"].is_object() {
                assert_eq!(event["number"], k.last + 1, "after {}", k.last);
                k.last += 1;
            }
            if event["state"].is_null() {
                continue;
            }
            let text = |what: &str| event[what].as_str().unwrap().to_owned();
            let state = (text("kind"), text("tunnel"));
            if on {
                k.states.insert(state);
            } else {
                assert!(k.states.remove(&state), "{event} ends what never began");
            }
        }
        k
    }

    fn holds(&self, kind: &str, tunnel: &str) -> bool {
        let state = (kind.to_owned(), tunnel.to_owned());
        self.known().states.contains(&state)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        signal(&self.child, Signal::SIGKILL);
        let _ = self.child.wait();
        if let Some(r) = self.reader.take() {
            let _ = r.join();
        }
    }
}

#[test]
fn followers_that_stand_still_or_come_back_learn_every_state_that_holds() {
    let mut gateway = Gateway::start(&[("bonn", 0x1001, true)]);
    let socket = gateway.socket();
    let steady = Follower::start(&socket, Some(0));
    let still = Follower::start(&socket, Some(0));
    for f in [&steady, &still] {
        until("bonn wants a successor", || f.holds("rekey_wanted", "bonn"));
    }

    // One stands still. More is told than the socket takes in for it, and then something that it will never be told.
    signal(&still.child, Signal::SIGSTOP);
    gateway.reload(BUFFERED);
    write_sas(
        gateway.dir.path(),
        &[("bonn", 0x1002, false), ("mainz", 0x1003, true)],
    );
    gateway.reload(1);
    until("mainz wants a successor, bonn does not", || {
        steady.holds("rekey_wanted", "mainz") && !steady.holds("rekey_wanted", "bonn")
    });
    gateway.reload(KEPT + 10);
    signal(&still.child, Signal::SIGCONT);
    let last = gateway.last();
    for f in [&still, &steady] {
        until("to catch up", || f.known().last >= last);
    }
    let (told, all) = (still.known(), steady.known());
    assert_eq!(told.missed.len(), 1, "{told:?}");
    assert!(told.missed[0] > KEPT, "{told:?}");
    assert_eq!((told.last, &told.states), (all.last, &all.states));
    let wanted = ["rekey_wanted", "soft_time"].map(|k| (k.to_owned(), "mainz".to_owned()));
    assert_eq!(all.states, BTreeSet::from(wanted));
    assert!(all.missed.is_empty(), "a reader that reads misses nothing");

    // Somebody new is told the same.
    let new = Follower::start(&socket, None);
    until("what holds", || new.known().states == all.states);
    // As is who asks with a number of an earlier run.
    let stranger = Follower::start(&socket, Some(all.last + 1_000_000));
    until("what holds", || stranger.known().states == all.states);

    // One goes, and comes back where it was: nothing is told twice, nothing left out.
    drop(still);
    gateway.reload(3);
    write_sas(
        gateway.dir.path(),
        &[("bonn", 0x1002, false), ("mainz", 0x1004, false)],
    );
    gateway.reload(1);
    until("nothing is wanted", || steady.known().states.is_empty());
    let back = Follower::start(&socket, Some(told.last));
    let ended = |lines: &[Value]| -> BTreeSet<String> {
        let off = lines.iter().filter(|l| l["event"]["state"] == "off");
        off.map(|l| l["event"]["kind"].as_str().unwrap().to_owned())
            .collect()
    };
    until("the ends of both states", || {
        ended(&back.lines.lock().unwrap()).len() == 2
    });
    let lines = back.lines.lock().unwrap();
    assert_eq!(lines[0]["event"]["number"], told.last + 1);
    assert!(lines.iter().all(|l| l["missed"].is_null()), "{lines:?}");
}
