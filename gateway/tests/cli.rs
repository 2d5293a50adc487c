//! The program from outside: exit codes, offline runs that repeat, explain, demo.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pmd::capture_file::CaptureFile;

fn esplanade(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_esplanade"))
        .args(args)
        .env("ESPLANADE_LOG", "warn")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn private(path: &Path, contents: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, contents).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

const SA: &str = r#"
[[tunnel]]
name = "berlin"
local = "192.0.2.1"
remote = "198.51.100.7"
suite = "aes-256-cbc+hmac-sha2-256-128"

[[tunnel.sa]]
name = "berlin-out"
direction = "out"
spi = 0x1001
key = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
auth_key = "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"
first_use = true

[[policy]]
name = "to-berlin"
direction = "out"
priority = 10
action = "protect"
tunnel = "berlin"
src = "10.1.0.0/16"
dst = "10.2.0.0/16"
"#;

/// A directory with SA file, capture and configuration.
struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        private(&dir.path().join("sa.toml"), SA);
        std::fs::write(dir.path().join("in.pcap"), capture(200, 64)).unwrap();
        let config = r#"
sa_files = ["sa.toml"]
memory = { frames = 1024, lock = false, huge = "never" }
api = { enabled = false }
metrics = { enabled = false }

[[port]]
name = "lan"
kind = "pcap"
side = "inside"
pcap = { read = "in.pcap" }

[[port]]
name = "wan"
kind = "pcap"
side = "outside"
addresses = ["192.0.2.1/24"]
pcap = { write = "out.pcap" }

[[route]]
to = "0.0.0.0/0"
via = "192.0.2.254"

[[neighbour]]
ip = "192.0.2.254"
mac = "02:00:00:00:00:fe"
port = "wan"
"#;
        std::fs::write(dir.path().join("gateway.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn run(&self, seed: &str) -> Vec<u8> {
        let out = esplanade(&[
            "run",
            "--config",
            &self.arg("gateway.toml"),
            "--exit-when-idle",
            "--test-seed",
            seed,
        ]);
        assert!(out.status.success(), "{}", text(&out.stderr));
        std::fs::read(self.path("out.pcap")).unwrap()
    }
}

/// A capture of UDP packets from 10.1.0.1 to 10.2.0.1, of different lengths.
fn capture(packets: u16, ttl: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0002_0004, 0, 0, 65_535, 1] {
        bytes.extend(word.to_be_bytes());
    }
    for n in 0..packets {
        let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 1, 0, 1], [10, 2, 0, 1], ttl)
            .udp(1000, 2000);
        let payload = vec![0xab; 18 + usize::from(n % 50) * 20];
        let mut frame = Vec::new();
        builder.write(&mut frame, &payload).unwrap();
        let len = u32::try_from(frame.len()).unwrap();
        for word in [0, u32::from(n), len, len] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(frame);
    }
    bytes
}

#[test]
fn a_reader_that_goes_away_ends_the_program_without_a_word() {
    let site = Site::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let done = Command::new(env!("CARGO_BIN_EXE_esplanade"))
        .args(["check", "--config"])
        .arg(site.dir.path().join("gateway.toml"))
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(text(&done.stderr), "");
    assert_eq!(done.status.code(), Some(141));
}

#[test]
fn an_offline_run_repeats_exactly_under_a_seed_and_differs_under_another() {
    let site = Site::new();
    let first = site.run("7");
    assert_eq!(site.run("7"), first);
    assert_ne!(site.run("8"), first, "the IVs depend on the seed");
    let sent = CaptureFile::parse(first).unwrap();
    assert_eq!(sent.len(), 200);
    for (n, frame) in (1_u32..).zip(sent.iter()) {
        assert_eq!(frame[23], 50, "ESP");
        assert_eq!(
            frame[34..42],
            [[0, 0, 0x10, 1], n.to_be_bytes()].concat(),
            "SPI and sequence number"
        );
    }
}

#[test]
fn time_goes_on_with_the_rounds_under_a_seed_so_icmp_errors_repeat() {
    let site = Site::new();
    // More packets whose TTL ends here than may be answered at once: how many are depends on the time that passes.
    std::fs::write(site.path("in.pcap"), capture(600, 1)).unwrap();
    let config = std::fs::read_to_string(site.path("gateway.toml")).unwrap();
    let config = config.replace(
        "side = \"inside\"\npcap = { read = \"in.pcap\" }",
        "side = \"inside\"\naddresses = [\"10.1.0.254/16\"]\npcap = { read = \"in.pcap\", write = \"back.pcap\" }",
    ) + "[[neighbour]]\nip = \"10.1.0.1\"\nmac = \"02:00:00:00:00:09\"\nport = \"lan\"\n";
    std::fs::write(site.path("gateway.toml"), config).unwrap();
    let run = || {
        site.run("7");
        std::fs::read(site.path("back.pcap")).unwrap().len()
    };
    let first = run();
    assert!(first > 24, "errors are sent");
    assert!(first < 600 * 70, "the limiter is at work");
    for _ in 0..4 {
        assert_eq!(run(), first);
    }
}

#[test]
fn a_seed_with_live_ports_is_refused() {
    let site = Site::new();
    let config = std::fs::read_to_string(site.path("gateway.toml")).unwrap();
    let tap = config.replace(
        "kind = \"pcap\"\nside = \"inside\"\npcap = { read = \"in.pcap\" }",
        "kind = \"tap\"\nside = \"inside\"",
    );
    std::fs::write(site.path("tap.toml"), tap).unwrap();
    let out = esplanade(&["run", "--config", &site.arg("tap.toml"), "--test-seed", "1"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("live ports"));
}

#[test]
fn check_tells_what_would_be_loaded_or_what_is_wrong() {
    let site = Site::new();
    let out = esplanade(&["check", "--config", &site.arg("gateway.toml")]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("1 tunnels, 1 SAs, 1 policies: good"));
    let out = esplanade(&["check", "--json", &site.arg("sa.toml")]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["tunnels"][0], "berlin");
    assert!(!text(&out.stdout).contains("000102"), "a key was printed");
    private(
        &site.path("sa.toml"),
        &SA.replace("spi = 0x1001", "spi = 12"),
    );
    let out = esplanade(&["check", "--config", &site.arg("gateway.toml")]);
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("sa.toml:11:"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn lifetimes_that_end_before_a_successor_may_send_are_refused_with_their_line() {
    let site = Site::new();
    let path = site.path("gateway.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let rekey =
        "[rekey]\nswitch_delay_ms = 9000\njitter_percent = 20\n[leases]\npath = \"leases\"\n";
    std::fs::write(&path, format!("{config}{rekey}")).unwrap();
    for (limit, good) in [
        ("soft = { time = 12 }", true),
        ("soft = { time = 11 }", false),
        ("hard = { time = 9 }", false),
        ("soft = { packets = 1 }", true),
    ] {
        let sa = SA.replace(
            "first_use = true\n",
            &format!("first_use = true\n{limit}\n"),
        );
        private(&site.path("sa.toml"), &sa);
        let out = esplanade(&["check", "--config", &site.arg("gateway.toml")]);
        let said = text(&out.stderr);
        assert_eq!(out.status.success(), good, "{limit}: {said}");
        if !good {
            assert_eq!(out.status.code(), Some(3));
            assert!(said.contains("sa.toml:8:"), "{said}");
            assert!(said.contains("rekey.switch_delay_ms is 9000"), "{said}");
            // And so when it starts.
            let out = esplanade(&[
                "run",
                "--exit-when-idle",
                "--config",
                path.to_str().unwrap(),
            ]);
            assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
            assert!(text(&out.stderr).contains("sa.toml:8:"));
        }
    }
}

#[test]
fn explain_works_from_the_configuration_and_from_a_capture() {
    let site = Site::new();
    let config = site.arg("gateway.toml");
    let ask = |args: &[&str]| {
        let out = esplanade(&[&["explain", "--config", &config, "--json"], args].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()
    };
    let flags = ask(&[
        "--src", "10.1.0.1", "--dst", "10.2.0.1", "--proto", "udp", "--sport", "1000", "--dport",
        "2000",
    ]);
    assert_eq!(
        (&flags["verdict"], &flags["sa"]),
        (&"protect".into(), &"berlin-out".into()),
        "{flags}"
    );
    let captured = ask(&["--pcap", &site.arg("in.pcap"), "--packet", "3"]);
    assert_eq!(captured, flags);
    let other = ask(&["--src", "10.1.0.1", "--dst", "8.8.8.8"]);
    assert_eq!(
        (&other["verdict"], &other["reason"]),
        (&"drop".into(), &"policy_discard".into()),
        "{other}"
    );
    let esp = ask(&[
        "--side",
        "outside",
        "--src",
        "198.51.100.7",
        "--dst",
        "192.0.2.1",
        "--spi",
        "0x9999",
    ]);
    assert_eq!(esp["reason"], "sa_not_found", "{esp}");
}

#[test]
fn without_a_gateway_the_views_say_so_with_their_own_exit_code() {
    let out = esplanade(&["sa", "list", "--socket", "/nonexistent/api.sock"]);
    assert_eq!(out.status.code(), Some(4));
    assert_eq!(esplanade(&["sa", "lost"]).status.code(), Some(2));
}

#[test]
fn the_demo_verifies_every_packet_with_rekeys_in_between() {
    let out = esplanade(&["demo", "--seconds", "4", "--json"]);
    assert!(
        out.status.success(),
        "{}{}",
        text(&out.stdout),
        text(&out.stderr)
    );
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["sent"], json["verified"], "{json}");
    assert_eq!(json["lost"], 0);
    assert_eq!(json["balanced"], true);
    assert!(json["rekeys"].as_u64().unwrap() > 0, "{json}");
    assert!(json["verified"].as_u64().unwrap() > 1000, "{json}");
}

/// A gateway over memory ports, asked through its socket, reloaded by SIGHUP, stopped by SIGTERM.
#[test]
fn a_running_gateway_answers_reloads_and_stops_in_order() {
    let site = Site::new();
    let config = "sa_files = [\"sa.toml\"]\nmemory = { frames = 1024, lock = false, huge = \"never\" }\n\
         leases = { path = \"leases\" }\napi = { socket = \"api.sock\" }\nmetrics = { listen = \"127.0.0.1:0\" }\n\
         [[port]]\nname = \"a\"\nkind = \"memory\"\nside = \"inside\"\nmemory = { peer = \"b\" }\n\
         [[port]]\nname = \"b\"\nkind = \"memory\"\nside = \"outside\"\nmemory = { peer = \"a\" }\naddresses = [\"192.0.2.1/24\"]\n";
    std::fs::write(site.path("live.toml"), config).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_esplanade"))
        .args(["run", "--config", &site.arg("live.toml")])
        .env("ESPLANADE_LOG", "info")
        .stderr(std::fs::File::create(site.path("log")).unwrap())
        .spawn()
        .unwrap();
    let socket = site.arg("api.sock");
    let log = || std::fs::read_to_string(site.path("log")).unwrap_or_default();
    let until = |what: &str, good: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !good() {
            assert!(std::time::Instant::now() < deadline, "{what}: {}", log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    };
    let sas = || text(&esplanade(&["sa", "list", "--socket", &socket]).stdout);
    until("no answer", &|| sas().contains("berlin-out"));
    let stats = esplanade(&["stats", "--socket", &socket, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&stats.stdout).unwrap();
    assert_eq!(json["ports"].as_array().unwrap().len(), 2);
    assert!(
        text(&esplanade(&["policy", "list", "--socket", &socket]).stdout).contains("to-berlin")
    );

    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    private(
        &site.path("sa.toml"),
        &SA.replace("spi = 0x1001", "spi = 0x2002"),
    );
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    until("no reload", &|| sas().contains("0x00002002"));
    private(&site.path("sa.toml"), "nonsense");
    let refused = esplanade(&["reload", "--socket", &socket]);
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused.stdout));
    assert!(
        text(&refused.stderr).contains("sa.toml:1:"),
        "{}",
        text(&refused.stderr)
    );
    assert!(sas().contains("0x00002002"), "what ran runs on");

    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{}", log());
    assert!(log().contains("every frame is accounted for"), "{}", log());
    assert!(!site.path("api.sock").exists());
}
