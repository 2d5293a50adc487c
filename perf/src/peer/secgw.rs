//! The peer's process: building it, configuring it, asking it for its rate.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sa_store::sa::Direction;
use serde::Serialize;

use super::{capture, way};
use crate::machine;
use crate::measure::Bench;
use crate::scenario::{FIRST_PEER, GATEWAY, Scenario, keys, spi};

/// Huge pages that the peer needs, bytes.
pub const MEMORY: usize = 1 << 30;
/// Frames of the peer besides those that keep the capture: more than it takes by itself.
const FRAMES: usize = 16384;
/// Longest time until its first packet is sent.
const START: Duration = Duration::from_secs(90);
/// Between looks at its statistics.
const LOOK: Duration = Duration::from_millis(1);
/// What the build changes: memory ports offer no checksum offload.
const OFFLOAD: &str = ".offloads = RTE_ETH_RX_OFFLOAD_CHECKSUM";

/// The peer's two drivers of ipsec-mb.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// Direct calls.
    Gcm,
    /// The job interface.
    Mb,
}

impl Driver {
    /// DPDK's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gcm => "aesni_gcm",
            Self::Mb => "aesni_mb",
        }
    }
}

/// The peer, built and ready to run.
#[derive(Debug)]
pub struct Peer {
    program: PathBuf,
    work: PathBuf,
    cpu: usize,
}

impl Peer {
    /// Builds the example from DPDK's sources (`.../examples`, in Debian the package dpdk-doc) in `work`, with the
    /// installed DPDK, for this CPU.
    ///
    /// # Errors
    /// The sources are not there, or do not build; says what to install.
    pub fn build(examples: &Path, work: &Path, cpu: usize) -> Result<Self> {
        let source = examples.join("ipsec-secgw");
        ensure!(
            source.join("Makefile").is_file(),
            "{} is not there: install dpdk-doc, or give --examples",
            source.display()
        );
        fs::create_dir_all(work)?;
        for part in ["ipsec-secgw", "common"] {
            copy(&examples.join(part), &work.join(part))?;
        }
        let dir = work.join("ipsec-secgw");
        let make = Command::new("make")
            .arg("shared")
            .current_dir(&dir)
            .env("CFLAGS", "-march=native")
            .output()
            .context("make")?;
        ensure!(
            make.status.success(),
            "ipsec-secgw does not build (needs libdpdk-dev and pkg-config):\n{}",
            String::from_utf8_lossy(&make.stderr)
        );
        Ok(Self {
            program: dir.join("build/ipsec-secgw"),
            work: work.to_owned(),
            cpu,
        })
    }

    /// Starts it with the scenario's SAs, policies and packets, waits until it sends, and stops it there.
    ///
    /// # Errors
    /// The peer does not run; says what it said.
    pub fn start(&self, bench: &Bench<'_>, scenario: &Scenario, driver: Driver) -> Result<Session> {
        let packets = self.work.join("in.pcap");
        let count = capture::write(&packets, bench, scenario)?;
        let config = self.work.join("secgw.cfg");
        fs::write(&config, configuration(scenario))?;
        let log = self.work.join("secgw.log");
        let output = File::create(&log)?;
        let (unprotected, _) = way(scenario.direction);
        // Line by line, so that its statistics are seen when they are made.
        let mut command = Command::new("stdbuf");
        command
            .arg("-oL")
            .arg(&self.program)
            .args(["--no-pci", "--in-memory", "--single-file-segments"])
            .args(["-l", &self.cpu.to_string()])
            .arg(format!(
                "--vdev=net_pcap0,rx_pcap={},infinite_rx=1",
                packets.display()
            ))
            .arg("--vdev=net_null0,no-rx=1")
            .arg(format!("--vdev=crypto_{}0", driver.name()))
            .args(["--", "-p", "0x3", "-P", "-u", unprotected, "-l", "-t", "1"])
            .args(["-s", &(FRAMES + count).to_string()])
            .arg(format!("--config=(0,0,{0}),(1,0,{0})", self.cpu))
            .arg("-f")
            .arg(config)
            .stdin(Stdio::null())
            .stderr(output.try_clone()?)
            .stdout(output);
        let begin = Instant::now();
        // Its threads but the polling one go where it may run besides that: not on the CPU that is measured.
        let child = machine::unpinned(|| command.spawn()).context("ipsec-secgw")?;
        let mut session = Session {
            child,
            log,
            cpu: self.cpu,
            start_up: Duration::ZERO,
        };
        machine::unpinned(|| session.next(0.0, START))?;
        session.start_up = begin.elapsed();
        session.signal(Signal::SIGSTOP)?;
        Ok(session)
    }
}

/// The peer running a scenario; stopped except while it is measured.
#[derive(Debug)]
pub struct Session {
    child: Child,
    log: PathBuf,
    cpu: usize,
    /// From its start to the first packet sent.
    pub start_up: Duration,
}

impl Session {
    /// Packets sent per microsecond of CPU time, over at least `time`.
    ///
    /// # Errors
    /// It has ended, or sends no more; says what it said.
    pub fn rate(&mut self, time: Duration) -> Result<f64> {
        machine::unpinned(|| self.rate_from_elsewhere(time))
    }

    fn rate_from_elsewhere(&mut self, time: Duration) -> Result<f64> {
        let before = sent(&self.log)?;
        self.signal(Signal::SIGCONT)?;
        // The statistics that are due come at once, with caches that are cold; the next ones a second later.
        let first = self.next(before, START)?;
        let first = self.next(first.0, START)?;
        let begin = Instant::now();
        let mut last = self.next(first.0, START)?;
        while begin.elapsed() < time.saturating_sub(Duration::from_millis(500)) {
            last = self.next(last.0, START)?;
        }
        self.signal(Signal::SIGSTOP)?;
        Ok((last.0 - first.0) / (last.1 - first.1) / 1e6)
    }

    /// The next statistics that differ from `known`: packets sent, CPU time.
    fn next(&mut self, known: f64, patience: Duration) -> Result<(f64, f64)> {
        let end = Instant::now() + patience;
        while Instant::now() < end && self.child.try_wait()?.is_none() {
            let sent = sent(&self.log)?;
            if sent > known {
                return Ok((sent, self.cpu_seconds()?));
            }
            std::thread::sleep(LOOK);
        }
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let end: Vec<&str> = said.lines().rev().take(30).collect();
        bail!(
            "ipsec-secgw on CPU {} sends nothing; its last words, the last first:\n{}",
            self.cpu,
            end.join("\n")
        );
    }

    /// CPU time that all its threads got.
    fn cpu_seconds(&self) -> Result<f64> {
        let mut nanos = 0.0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let stat = fs::read_to_string(thread?.path().join("schedstat"))?;
            let run: f64 = stat.split(' ').next().unwrap_or("0").parse()?;
            nanos += run;
        }
        Ok(nanos / 1e9)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(pid), signal).context("ipsec-secgw")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It closes its ports on this signal; one that has ended already is none the worse.
        let _ = self.signal(Signal::SIGINT);
        let _ = self.signal(Signal::SIGCONT);
        machine::unpinned(|| {
            for _ in 0..100 {
                if matches!(self.child.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        });
    }
}

/// Packets sent so far, from the peer's statistics.
fn sent(log: &Path) -> Result<f64> {
    const TAIL: u64 = 2048;
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    // A line that is not ended yet may be half a number.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let total = whole.lines().rev().find_map(|line| {
        let (_, count) = line.split_once("Total packets sent:")?;
        count.trim().parse().ok()
    });
    Ok(total.unwrap_or(0.0))
}

/// The scenario in the peer's words.
fn configuration(scenario: &Scenario) -> String {
    let mut text = String::new();
    let hex = |bytes: &[u8]| {
        let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
        parts.join(":")
    };
    let mut sa =
        |way: &str, spi: u32, to: Ipv4Addr, (src, dst): (Ipv4Addr, Ipv4Addr), key: &[u8]| {
            let _ = writeln!(
                text,
                "sp ipv4 {way} esp protect {spi} pri 1 dst {to}/32 sport 0:65535 dport 0:65535\n\
             sa {way} {spi} aead_algo aes-128-gcm aead_key {} mode ipv4-tunnel src {src} dst {dst}",
                hex(key)
            );
        };
    for n in 0..scenario.sas {
        let peer = Ipv4Addr::from_bits(FIRST_PEER + n);
        let ends = match scenario.direction {
            Direction::Out => (GATEWAY, peer),
            Direction::In => (peer, GATEWAY),
        };
        sa(
            way(scenario.direction).1,
            spi(n).value(),
            Ipv4Addr::from_bits(scenario.destination(n)),
            ends,
            &keys(scenario.suite, n).enc,
        );
    }
    // It refuses to start without an SA of the other direction.
    let reverse = match scenario.direction {
        Direction::Out => Direction::In,
        Direction::In => Direction::Out,
    };
    let other = Ipv4Addr::new(198, 51, 100, 1);
    let ends = match reverse {
        Direction::Out => (GATEWAY, other),
        Direction::In => (other, GATEWAY),
    };
    sa(
        way(reverse).1,
        UNUSED_SPI,
        other,
        ends,
        &keys(scenario.suite, 0).enc,
    );
    for net in ["198.18.0.0/15", "10.0.0.0/8"] {
        let _ = writeln!(text, "rt ipv4 dst {net} port 1");
    }
    text.push_str("neigh port 1 02:00:00:00:ff:02\n");
    text
}

/// Of the SA that carries nothing; the scenario's are spread over the number space.
const UNUSED_SPI: u32 = 299;

/// Copies sources, with the change that the build needs. Leaves alone what is there already, so that it need not be
/// built again.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
            continue;
        }
        let mut bytes = fs::read(entry.path())?;
        if entry.file_name() == "ipsec-secgw.c" {
            let text = String::from_utf8_lossy(&bytes);
            ensure!(
                text.contains(OFFLOAD),
                "this version of ipsec-secgw asks for checksum offload in another way"
            );
            bytes = text.replace(OFFLOAD, ".offloads = 0").into_bytes();
        }
        if fs::read(&target).ok().as_ref() != Some(&bytes) {
            fs::write(&target, bytes)?;
        }
    }
    Ok(())
}
