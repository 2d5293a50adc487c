//! The other sides of the measured ports, and how both are made.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use pmd::af_xdp::{AfXdpConfig, AfXdpPort, Steering};
use pmd::intel::{self, model::Family};
use pmd::memory::{PairConfig, pair};
use pmd::nic::{self, NicOptions};
use pmd::pcap::{PcapConfig, PcapPort, Repeat};
use pmd::port::MacAddr;
use pmd::tap::{TapConfig, TapPort};
use pmd::virtio::net::model as virtio;
use pmd::vmxnet3::model::Model;
use pmd::vmxnet3::{Vmxnet3Config, Vmxnet3Port};
use pmd::{Arena, Frame, Pool, Port, PortQueue};

use super::{Subject, Wire};

type Make = fn(&Arc<Arena>, usize) -> Result<Subject>;

/// Ports that need nothing of the system.
pub(super) const IN_PROCESS: &[(&str, Make)] = &[
    ("memory", memory),
    ("virtio-net split", |arena, size| {
        virtio_net("virtio-net split", false, arena, size)
    }),
    ("virtio-net packed", |arena, size| {
        virtio_net("virtio-net packed", true, arena, size)
    }),
    ("vmxnet3", vmxnet3),
    ("e1000e", |arena, size| {
        intel("e1000e", Family::E1000e, arena, size)
    }),
    ("igb", |arena, size| intel("igb", Family::Igb, arena, size)),
    ("ixgbe", |arena, size| {
        intel("ixgbe", Family::Ixgbe, arena, size)
    }),
    ("pcap", pcap),
];

/// Ports of interfaces that the calling thread's network namespace gets.
pub(super) const IN_NAMESPACE: &[(&str, Make)] = &[("af_xdp", af_xdp), ("tap", tap)];

const MAC: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x0b]);

/// Leaves the calling thread alone in a network namespace of its own.
pub(super) fn enter_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
    Ok(())
}

fn memory(arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let (a, b) = pair("near", "far", &PairConfig::default());
    Ok(Subject {
        port: "memory",
        other_side: "memory",
        queue: first(Box::new(a), arena)?,
        wire: PortWire::over(Box::new(b), arena, size)?,
    })
}

fn virtio_net(
    name: &'static str,
    packed: bool,
    arena: &Arc<Arena>,
    size: usize,
) -> Result<Subject> {
    let model = virtio::Model::new(virtio::Features {
        packed,
        ..virtio::Features::default()
    });
    let port = nic::open(Arc::new(model.device(8)?), &NicOptions::default())?;
    Ok(Subject {
        port: name,
        other_side: "model",
        queue: first(port, arena)?,
        wire: Box::new(VirtioWire {
            model,
            frame: packet(size),
        }),
    })
}

fn vmxnet3(arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let model = Model::new(1, MAC.0);
    let port = Vmxnet3Port::open(Arc::new(model.device(8)?), Vmxnet3Config::default())?;
    Ok(Subject {
        port: "vmxnet3",
        other_side: "model",
        queue: first(Box::new(port), arena)?,
        wire: Box::new(Vmxnet3Wire {
            model,
            frame: packet(size),
        }),
    })
}

fn intel(name: &'static str, family: Family, arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let model = intel::model::Model::new(family);
    let options = NicOptions {
        experimental: true,
        ..NicOptions::default()
    };
    let port = nic::open(Arc::new(model.device(8)?), &options)?;
    Ok(Subject {
        port: name,
        other_side: "model",
        queue: first(port, arena)?,
        wire: Box::new(IntelWire {
            model,
            frame: packet(size),
        }),
    })
}

fn pcap(arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let directory = std::env::temp_dir().join(format!("perf-ports-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let guard = Directory(directory.clone());
    let (input, read) = (directory.join("out.pcap"), directory.join("in.pcap"));
    // The capture is made by the port itself.
    let port = PcapPort::open(PcapConfig {
        write: Some(read.clone()),
        ..PcapConfig::default()
    })?;
    let (mut writer, mut pool) = (first(Box::new(port), arena)?, Pool::new(arena, 256));
    let mut frames = make(&mut pool, &packet(size), 1024)?;
    writer.tx_burst(&mut pool, &mut frames);
    pool.put_bulk(&mut frames);
    writer.drain(&mut pool);
    drop(writer);
    let port = PcapPort::open(PcapConfig {
        read: Some(read),
        write: Some(input.clone()),
        repeat: Repeat::Forever,
        ..PcapConfig::default()
    })?;
    Ok(Subject {
        port: "pcap",
        other_side: "files",
        queue: first(Box::new(port), arena)?,
        wire: Box::new(FileWire {
            output: input,
            _directory: guard,
        }),
    })
}

fn af_xdp(arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let (near, far) = (format!("near{size}"), format!("far{size}"));
    ip(&format!("link add {near} type veth peer name {far}"))?;
    let open = |name: &str| -> Result<AfXdpPort> {
        ip(&format!("link set {name} up"))?;
        xdp(name)
    };
    let (a, b) = (open(&near)?, open(&far)?);
    Ok(Subject {
        port: "af_xdp",
        other_side: "veth",
        wire: PortWire::over(Box::new(b), arena, size)?,
        queue: first(Box::new(a), arena)?,
    })
}

fn tap(arena: &Arc<Arena>, size: usize) -> Result<Subject> {
    let name = format!("tap{size}");
    let port = TapPort::open(&TapConfig {
        name: name.clone(),
        mtu: None,
        up: true,
        exception: None,
    })?;
    // The kernel's side: AF_XDP on the interface itself.
    Ok(Subject {
        port: "tap",
        other_side: "kernel",
        queue: first(Box::new(port), arena)?,
        wire: PortWire::over(Box::new(xdp(&name)?), arena, size)?,
    })
}

fn xdp(interface: &str) -> Result<AfXdpPort> {
    Ok(AfXdpPort::open(AfXdpConfig {
        interface: interface.into(),
        steering: Steering::All,
        ..AfXdpConfig::default()
    })?)
}

/// A port as the other side.
struct PortWire {
    queue: Box<dyn PortQueue>,
    pool: Pool,
    frame: Vec<u8>,
    frames: Vec<Frame>,
}

impl PortWire {
    fn over(port: Box<dyn Port>, arena: &Arc<Arena>, size: usize) -> Result<Box<dyn Wire>> {
        Ok(Box::new(PortWire {
            queue: first(port, arena)?,
            pool: Pool::new(arena, 512),
            frame: packet(size),
            frames: Vec::new(),
        }))
    }
}

impl Wire for PortWire {
    fn give(&mut self, n: usize) -> Result<()> {
        let missing = n.saturating_sub(self.frames.len());
        self.frames
            .append(&mut make(&mut self.pool, &self.frame, missing)?);
        self.queue.tx_burst(&mut self.pool, &mut self.frames);
        self.queue.flush(&mut self.pool);
        Ok(())
    }

    fn take(&mut self) -> usize {
        let mut out = Vec::new();
        let mut taken = 0;
        while self.queue.rx_burst(&mut self.pool, &mut out, 256) > 0 {
            taken += out.len();
            self.pool.put_bulk(&mut out);
        }
        taken
    }
}

impl Drop for PortWire {
    fn drop(&mut self) {
        self.pool.put_bulk(&mut self.frames);
        self.queue.drain(&mut self.pool);
    }
}

struct Vmxnet3Wire {
    model: Arc<Model>,
    frame: Vec<u8>,
}

impl Wire for Vmxnet3Wire {
    fn give(&mut self, n: usize) -> Result<()> {
        for _ in 0..n {
            self.model.receive(0, &self.frame);
        }
        Ok(())
    }

    fn take(&mut self) -> usize {
        self.model.transmitted(0, usize::MAX, |_| ())
    }
}

struct VirtioWire {
    model: Arc<virtio::Model>,
    frame: Vec<u8>,
}

impl Wire for VirtioWire {
    fn give(&mut self, n: usize) -> Result<()> {
        for _ in 0..n {
            self.model.receive(0, &self.frame);
        }
        Ok(())
    }

    fn take(&mut self) -> usize {
        self.model.transmit(0, usize::MAX).len()
    }
}

struct IntelWire {
    model: Arc<intel::model::Model>,
    frame: Vec<u8>,
}

impl Wire for IntelWire {
    fn give(&mut self, n: usize) -> Result<()> {
        for _ in 0..n {
            self.model.receive(0, &self.frame, 2048);
        }
        Ok(())
    }

    fn take(&mut self) -> usize {
        self.model.transmit(0, usize::MAX).len()
    }
}

/// Capture files: the input is repeated, the output is cut when it has grown.
struct FileWire {
    output: std::path::PathBuf,
    _directory: Directory,
}

impl Wire for FileWire {
    fn give(&mut self, _n: usize) -> Result<()> {
        const MOST: u64 = 256 << 20;
        if std::fs::metadata(&self.output)?.len() > MOST {
            std::fs::File::options()
                .write(true)
                .open(&self.output)?
                .set_len(0)?;
        }
        Ok(())
    }

    fn take(&mut self) -> usize {
        // What the port has written is not read again.
        usize::MAX
    }
}

/// Removed with its content.
struct Directory(std::path::PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

fn first(port: Box<dyn Port>, arena: &Arc<Arena>) -> Result<Box<dyn PortQueue>> {
    let mut queues = port.queues(1, arena)?;
    queues.pop().context("a port without queues")
}

pub(super) fn make(pool: &mut Pool, bytes: &[u8], n: usize) -> Result<Vec<Frame>> {
    let mut frames = Vec::with_capacity(n);
    for _ in 0..n {
        let Some(mut frame) = pool.get() else { break };
        let fits = frame.set_data(bytes);
        frames.push(frame);
        if !fits {
            pool.put_bulk(&mut frames);
            bail!("frames of the arena are too small");
        }
    }
    Ok(frames)
}

/// An Ethernet frame with an IPv4 packet of `size` bytes for [`MAC`].
pub(super) fn packet(size: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + size);
    frame.extend(MAC.0);
    frame.extend([0x02, 0, 0, 0, 0, 0x0a, 0x08, 0x00]);
    let len = u16::try_from(size).unwrap_or(u16::MAX).to_be_bytes();
    frame.extend([0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([192, 0, 2, 1, 192, 0, 2, 2]);
    let words = frame[14..34].chunks(2);
    let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded & 0xffff).unwrap_or(0);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.resize(14 + size, 0x5a);
    frame
}

fn ip(arguments: &str) -> Result<()> {
    let done = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("ip")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("ip {arguments}: {}", said.trim());
    }
    Ok(())
}
