//! Side by side with DPDK's ipsec-secgw on the same machine: a looped capture in, a null port out.
//!
//! The peer is a process of its own that shares its CPU with whatever else runs, so its rate is packets per second
//! of CPU time that it got: it polls, so it uses all that it gets. Ours is timed in steps that are too short to be
//! interrupted often; the median leaves out those that were.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pmd::{Arena, ArenaConfig, Pool};

use crate::scenario::{Scenario, keys};
use crate::traffic::Generator;

/// Huge pages that the peer needs, bytes.
pub const MEMORY: usize = 640 << 20;
/// SPIs below 256 are reserved; the peer's configuration begins here.
const FIRST_SPI: u32 = 300;
/// Least packets in the looped capture.
const PACKETS: usize = 8192;
/// What the build changes: memory ports offer no checksum offload.
const OFFLOAD: &str = ".offloads = RTE_ETH_RX_OFFLOAD_CHECKSUM";

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
        let main = dir.join("ipsec-secgw.c");
        let text = fs::read_to_string(&main)?;
        ensure!(
            text.contains(OFFLOAD),
            "this version of ipsec-secgw asks for checksum offload in another way"
        );
        fs::write(&main, text.replace(OFFLOAD, ".offloads = 0"))?;
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

    /// Sealed packets per microsecond of CPU time, best of its two ipsec-mb drivers. Outbound only: a looped
    /// capture of sealed packets would be a replay.
    ///
    /// # Errors
    /// The peer does not run; says what it said.
    pub fn measure(&self, scenario: &Scenario, time: Duration) -> Result<f64> {
        let capture = self.work.join("in.pcap");
        write_capture(&capture, scenario)?;
        let config = self.work.join("secgw.cfg");
        fs::write(&config, configuration(scenario))?;
        let mut best = 0.0_f64;
        for driver in ["crypto_aesni_gcm0", "crypto_aesni_mb0"] {
            best = best.max(self.run(driver, &capture, &config, time)?);
        }
        Ok(best)
    }

    fn run(&self, driver: &str, capture: &Path, config: &Path, time: Duration) -> Result<f64> {
        let log = self.work.join("secgw.log");
        let output = File::create(&log)?;
        let mut child = Running(
            // Line by line, so that its statistics are seen when they are made.
            Command::new("stdbuf")
                .arg("-oL")
                .arg(&self.program)
                .args(["--no-pci", "--in-memory", "--single-file-segments"])
                .args(["-l", &self.cpu.to_string()])
                .arg(format!(
                    "--vdev=net_pcap0,rx_pcap={},infinite_rx=1",
                    capture.display()
                ))
                .args(["--vdev=net_null0,no-rx=1", &format!("--vdev={driver}")])
                .args(["--", "-p", "0x3", "-P", "-u", "0x2", "-l", "-t", "1"])
                .arg(format!("--config=(0,0,{0}),(1,0,{0})", self.cpu))
                .arg("-f")
                .arg(config)
                .stdin(Stdio::null())
                .stderr(output.try_clone()?)
                .stdout(output)
                .spawn()
                .context("ipsec-secgw")?,
        );
        // Its statistics come once a second; the first seconds are spent on starting.
        let mut seen: Vec<(f64, f64)> = Vec::new();
        let wanted = time.as_secs().max(2) + 2;
        for _ in 0..(wanted + 60) * 20 {
            std::thread::sleep(Duration::from_millis(50));
            if child.0.try_wait()?.is_some() {
                break;
            }
            let (sent, cpu) = (sent(&log)?, cpu_seconds(child.0.id())?);
            if sent > 0.0 && seen.last().is_none_or(|(last, _)| *last != sent) {
                seen.push((sent, cpu));
            }
            if seen.len() as u64 > wanted {
                break;
            }
        }
        let [_, first, .., last] = seen[..] else {
            bail!(
                "ipsec-secgw sends nothing:\n{}",
                fs::read_to_string(&log).unwrap_or_default()
            );
        };
        Ok((last.0 - first.0) / (last.1 - first.1) / 1e6)
    }
}

/// A child that does not outlive this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // It closes its ports on this signal; one that has ended already is none the worse.
            let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        }
        for _ in 0..100 {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Packets sent so far, from the peer's statistics.
fn sent(log: &Path) -> Result<f64> {
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let total = text.lines().rev().find_map(|line| {
        line.strip_prefix("Total packets sent:")?
            .trim()
            .parse()
            .ok()
    });
    Ok(total.unwrap_or(0.0))
}

/// CPU time that all threads of a process got.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let mut nanos = 0.0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("schedstat"))?;
        let run: f64 = stat.split(' ').next().unwrap_or("0").parse()?;
        nanos += run;
    }
    Ok(nanos / 1e9)
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
    let own = Ipv4Addr::new(192, 0, 2, 1);
    for n in 0..scenario.sas {
        let peer = Ipv4Addr::from_bits(0xc612_0000 + n);
        let to = Ipv4Addr::from_bits(scenario.destination(n));
        sa(
            "out",
            FIRST_SPI + n,
            to,
            (own, peer),
            &keys(scenario.suite, n).enc,
        );
    }
    // It refuses to start without an inbound SA.
    let other = Ipv4Addr::new(198, 51, 100, 1);
    sa(
        "in",
        FIRST_SPI - 1,
        other,
        (other, own),
        &keys(scenario.suite, 0).enc,
    );
    for net in ["198.18.0.0/15", "10.0.0.0/8"] {
        let _ = writeln!(text, "rt ipv4 dst {net} port 1");
    }
    text.push_str("neigh port 1 02:00:00:00:ff:02\n");
    text
}

/// The same packets, in the same order, as our own generator makes.
fn write_capture(path: &Path, scenario: &Scenario) -> Result<()> {
    let flows = (0..scenario.flows)
        .map(|f| scenario.destination(f))
        .collect();
    let mut generator = Generator::new(scenario.mix.clone(), flows, [0x02, 0, 0, 0, 0, 0xb]);
    let arena = Arena::new(ArenaConfig {
        frames: 1,
        lock: false,
        ..ArenaConfig::default()
    })?;
    let mut pool = Pool::new(&arena, 1);
    let mut frame = pool.get().context("a frame")?;
    let mut file = BufWriter::new(File::create(path)?);
    let mut write = || -> Result<()> {
        for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1] {
            file.write_all(&word.to_le_bytes())?;
        }
        for _ in 0..PACKETS.max(2 * generator.flows()) {
            generator.fill(&mut frame);
            let len = u32::try_from(frame.len())?;
            for word in [0, 0, len, len] {
                file.write_all(&word.to_le_bytes())?;
            }
            file.write_all(frame.data())?;
        }
        file.flush()?;
        Ok(())
    };
    let written = write();
    pool.put(frame);
    written
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
