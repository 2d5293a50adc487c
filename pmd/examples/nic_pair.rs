//! Holds two NICs that are joined by a cable against what a driver must do: `VFIO_DEVICES="ADDRESS ADDRESS" nic_pair [--mtu N]
//! [--frames N] [--flap] [--no-reset]`. `gateway/tests/beds/nics/run` runs it in QEMU.
//!
//! Both are bound to vfio-pci. Frames of 60 bytes up to the MTU, filled with a pattern, pass both ways and are compared byte by
//! byte; interrupts, filters, resets under load and (with `--flap`, asked for on standard output) link changes are tried. At
//! the end all frames must be back. The first failure ends the program with status 1.

use std::error::Error;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::nic::{self, NicControl, NicOptions};
use pmd::port::MacAddr;
use pmd::{Arena, ArenaConfig, Frame, Pool, PortQueue};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Frames on their way at once: fewer than any ring holds.
const WINDOW: u32 = 32;
const HEADER: usize = 14;
/// An experimental ethertype (IEEE 802): models look into the headers of others.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

struct End {
    control: Arc<dyn NicControl>,
    queue: Box<dyn PortQueue>,
    mac: MacAddr,
    name: String,
}

struct Bed {
    a: End,
    b: End,
    pool: Pool,
    mtu: usize,
    number: u32,
    /// Sizes sent and not seen since the last check.
    missing: Vec<usize>,
}

fn main() {
    if let Err(error) = run() {
        println!("nic_pair: FAILED: {error}");
        std::process::exit(1);
    }
    println!("nic_pair: all passed");
}

fn run() -> Outcome {
    let rest: Vec<String> = std::env::args().skip(1).collect();
    let devices = std::env::var("VFIO_DEVICES")?;
    let addresses: Vec<&str> = devices.split_whitespace().collect();
    let [first, second] = addresses[..] else {
        return Err("VFIO_DEVICES must hold two PCI addresses".into());
    };
    let value = |name: &str, default: u32| -> Outcome<u32> {
        match rest.iter().position(|a| a == name) {
            Some(at) => Ok(rest.get(at + 1).ok_or("a value")?.parse()?),
            None => Ok(default),
        }
    };
    let flag = |name: &str| rest.iter().any(|a| a == name);
    let mtu = value("--mtu", 9000)?;
    let frames = value("--frames", 2000)?;
    let arena = Arena::new(ArenaConfig {
        frames: 8192,
        stride: if mtu > 1500 { 10_240 } else { 4096 },
        ..ArenaConfig::default()
    })?;
    let open = |address: &str| -> Outcome<End> {
        let device = Arc::new(VfioDevice::pci(address, Protection::Iommu)?);
        let options = NicOptions {
            name: address.into(),
            mtu,
            ..NicOptions::default()
        };
        let port = nic::open(device, &options)?;
        let info = port.info();
        let control = port.control().ok_or("no control")?;
        let queue = port
            .queues(1, &arena)?
            .into_iter()
            .next()
            .ok_or("no queue")?;
        println!("{}: {} {} mtu {}", info.name, info.kind, info.mac, info.mtu);
        Ok(End {
            control,
            queue,
            mac: info.mac,
            name: address.into(),
        })
    };
    let mut bed = Bed {
        a: open(first)?,
        b: open(second)?,
        pool: Pool::new(&arena, 512),
        mtu: mtu as usize,
        number: 0,
        missing: Vec::new(),
    };
    bed.link_up()?;
    bed.sizes(frames)?;
    bed.interrupts()?;
    bed.filters()?;
    if !flag("--no-reset") {
        bed.resets(frames)?;
    }
    if flag("--flap") {
        bed.flaps()?;
    }
    bed.end(&arena)
}

impl Bed {
    /// Waits for both links, and then for frames to pass.
    fn link_up(&mut self) -> Outcome {
        let start = Instant::now();
        loop {
            self.poll();
            if self.a.control.link().up && self.b.control.link().up && self.ping(100)? {
                break;
            }
            if start.elapsed() > Duration::from_secs(20) {
                return Err("the links do not come up".into());
            }
        }
        let link = self.a.control.link();
        println!(
            "ok: links up and frames pass after {} ms, {} Mbit/s",
            start.elapsed().as_millis(),
            link.mbps
        );
        Ok(())
    }

    /// Every size both ways; nothing may be lost or changed.
    fn sizes(&mut self, frames: u32) -> Outcome {
        let start = Instant::now();
        let longest = self.mtu + HEADER;
        let (mut done, mut bytes) = (0u32, 0usize);
        while done < frames {
            let sizes: Vec<usize> = (0..WINDOW)
                .map(|n| match (done + n) as usize {
                    0 => 60,
                    1 => longest,
                    // Coprime with the number of sizes: all come in turn.
                    n => 60 + n * 6151 % (longest - 59),
                })
                .collect();
            self.missing.clear();
            if self.exchange(&sizes)? != 2 * sizes.len() {
                for end in [&self.a, &self.b] {
                    println!("{}: {:?}", end.name, end.control.statistics());
                }
                return Err(format!("frames of these sizes were lost: {:?}", self.missing).into());
            }
            bytes += 2 * sizes.iter().sum::<usize>();
            done += WINDOW;
        }
        println!(
            "ok: {} frames of 60 to {longest} bytes both ways, {bytes} bytes compared, none lost, {:.1} s",
            2 * done,
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// A waiting thread is woken by a frame, and by nothing else.
    fn interrupts(&mut self) -> Outcome {
        if self.b.queue.wait_fd().is_none() {
            return Err("no interrupts".into());
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            // What fired before, and the stale one that this arming lets through.
            while {
                self.b.queue.arm();
                self.poll();
                ready(self.b.queue.wait_fd(), 20)?
            } {}
            self.send_one(60)?;
            let sent = Instant::now();
            if !ready(self.b.queue.wait_fd(), 2000)? {
                return Err("no interrupt for a frame".into());
            }
            slowest = slowest.max(sent.elapsed());
            if self.receive_all(1, Duration::from_secs(2))? != 1 {
                return Err("an interrupt without its frame".into());
            }
        }
        println!(
            "ok: 20 frames woke a sleeper, the slowest after {} us; quiet otherwise",
            slowest.as_micros()
        );
        Ok(())
    }

    /// Frames for other addresses only in promiscuous mode.
    fn filters(&mut self) -> Outcome {
        let own = self.b.mac;
        for (mac, promiscuous, wanted) in [
            (MacAddr([0x02, 9, 9, 9, 9, 9]), false, false),
            (MacAddr([0x02, 9, 9, 9, 9, 9]), true, true),
            (MacAddr([0xff; 6]), false, true),
            (MacAddr([0x33, 0x33, 0, 0, 0, 5]), false, true),
            (own, false, true),
        ] {
            self.b.control.set_promiscuous(promiscuous)?;
            self.b.mac = mac;
            self.send_one(100)?;
            let came = self.receive_all(1, Duration::from_millis(300))? == 1;
            if came != wanted {
                return Err(format!("frame to {mac}, promiscuous {promiscuous}: {came}").into());
            }
        }
        println!("ok: unicast, broadcast, multicast and promiscuous filters");
        Ok(())
    }

    /// Frames may be lost while a NIC restarts, but none may be changed, and all buffers come back.
    fn resets(&mut self, frames: u32) -> Outcome {
        let (mut sent, mut came, mut slowest) = (0, 0, Duration::ZERO);
        for round in 0..10 {
            for burst in 0..frames / 10 / WINDOW + 1 {
                let sizes = vec![60 + (burst * 37) as usize % (self.mtu - 60); WINDOW as usize];
                sent += 2 * sizes.len();
                if burst == 1 {
                    // On their way when the reset comes.
                    self.send(&sizes)?;
                    let end = if round % 2 == 0 { &self.a } else { &self.b };
                    end.control.request_reset();
                    let start = Instant::now();
                    while !self.ping(20)? {
                        if start.elapsed() > Duration::from_secs(20) {
                            return Err("no frame passes after a reset".into());
                        }
                    }
                    slowest = slowest.max(start.elapsed());
                    came += self.exchange(&sizes)?;
                } else {
                    came += self.exchange(&sizes)?;
                }
            }
        }
        if came * 2 < sent {
            return Err(format!("{came} of {sent} frames").into());
        }
        println!(
            "ok: 10 resets under load, {came} of {sent} frames, frames pass again after {} ms at most",
            slowest.as_millis()
        );
        Ok(())
    }

    /// The cable is pulled and plugged in again: by `guest.py`, as the line asks QEMU's monitor, or by hand.
    fn flaps(&mut self) -> Outcome {
        for _ in 0..3 {
            for up in [false, true] {
                let state = if up { "on" } else { "off" };
                println!("BED: monitor set_link dev2 {state}");
                std::io::stdout().flush()?;
                let start = Instant::now();
                while self.b.control.link().up != up {
                    self.poll();
                    if start.elapsed() > Duration::from_secs(20) {
                        return Err("the link change is not seen".into());
                    }
                }
            }
            let start = Instant::now();
            while !self.ping(50)? {
                if start.elapsed() > Duration::from_secs(20) {
                    return Err("no frame passes after a link change".into());
                }
            }
        }
        println!("ok: 3 link flaps seen, frames pass after each");
        Ok(())
    }

    fn end(mut self, arena: &Arc<Arena>) -> Outcome {
        for end in [&mut self.a, &mut self.b] {
            println!("{}: {:?}", end.name, end.control.statistics());
            println!("{}: {:?}", end.name, end.control.device_errors());
            end.queue.drain(&mut self.pool);
        }
        drop((self.a, self.b, self.pool));
        match arena.outstanding() {
            0 => println!("ok: all frames are back"),
            n => return Err(format!("{n} frames are missing").into()),
        }
        Ok(())
    }

    /// Sends frames of these sizes both ways and compares what arrives; how many did.
    fn exchange(&mut self, sizes: &[usize]) -> Outcome<usize> {
        for swap in [false, true] {
            if swap {
                std::mem::swap(&mut self.a, &mut self.b);
            }
            self.send(sizes)?;
            if swap {
                std::mem::swap(&mut self.a, &mut self.b);
            }
        }
        let there = self.receive_all(sizes.len(), Duration::from_millis(500))?;
        std::mem::swap(&mut self.a, &mut self.b);
        let back = self.receive_all(sizes.len(), Duration::from_millis(500));
        std::mem::swap(&mut self.a, &mut self.b);
        Ok(there + back?)
    }

    /// Sends frames of these sizes from the first to the second.
    fn send(&mut self, sizes: &[usize]) -> Outcome {
        let mut burst = Vec::new();
        for &size in sizes {
            burst.push(self.frame(size)?);
        }
        let until = Instant::now() + Duration::from_millis(500);
        while !burst.is_empty() && Instant::now() < until {
            self.a.queue.tx_burst(&mut self.pool, &mut burst);
        }
        self.pool.put_bulk(&mut burst);
        self.a.queue.flush(&mut self.pool);
        Ok(())
    }

    /// Whether one frame gets from the first to the second in so many milliseconds.
    fn ping(&mut self, wait: u64) -> Outcome<bool> {
        self.send_one(60)?;
        Ok(self.receive_all(1, Duration::from_millis(wait))? > 0)
    }

    fn send_one(&mut self, size: usize) -> Outcome {
        let mut burst = vec![self.frame(size)?];
        self.a.queue.tx_burst(&mut self.pool, &mut burst);
        self.pool.put_bulk(&mut burst);
        self.a.queue.flush(&mut self.pool);
        Ok(())
    }

    fn frame(&mut self, size: usize) -> Outcome<Frame> {
        self.number += 1;
        self.missing.push(size);
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(&self.b.mac.0);
        bytes.extend_from_slice(&self.a.mac.0);
        bytes.extend_from_slice(&ETHERTYPE);
        bytes.extend_from_slice(&self.number.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(size)?.to_be_bytes());
        bytes.extend((bytes.len()..size).map(|i| pattern(self.number, i)));
        let mut frame = self.pool.get().ok_or("no frame")?;
        if !frame.set_data(&bytes) {
            return Err("the frame does not fit".into());
        }
        Ok(frame)
    }

    /// Receives at the second end until `wanted` frames have come or the time is over; each is compared.
    fn receive_all(&mut self, wanted: usize, wait: Duration) -> Outcome<usize> {
        let until = Instant::now() + wait;
        let (mut came, mut wrong) = (0, None);
        let mut out = Vec::new();
        while came < wanted && Instant::now() < until && wrong.is_none() {
            self.b.queue.rx_burst(&mut self.pool, &mut out, 64);
            // A reset needs both ends to come by.
            self.a.queue.flush(&mut self.pool);
            self.b.queue.flush(&mut self.pool);
            for frame in &out {
                match compare(frame.data()) {
                    Ok(true) => {
                        came += 1;
                        let size = frame.len();
                        if let Some(at) = self.missing.iter().position(|&s| s == size) {
                            self.missing.swap_remove(at);
                        }
                    }
                    Ok(false) => {}
                    Err(e) => wrong = Some(e),
                }
            }
            self.pool.put_bulk(&mut out);
        }
        match wrong {
            Some(e) => Err(e.into()),
            None => Ok(came),
        }
    }

    /// Lets both ends look at what happened; what is received is given back.
    fn poll(&mut self) {
        let mut out = Vec::new();
        for end in [&mut self.a, &mut self.b] {
            end.queue.rx_burst(&mut self.pool, &mut out, 64);
            end.queue.flush(&mut self.pool);
        }
        self.pool.put_bulk(&mut out);
    }
}

/// True for one of ours that is whole, false for a stranger's.
fn compare(frame: &[u8]) -> Result<bool, String> {
    let (Some(kind), Some(number), Some(size)) =
        (frame.get(12..14), word(frame, 14), word(frame, 18))
    else {
        return Err(format!("a frame of {} bytes", frame.len()));
    };
    if kind != ETHERTYPE {
        return Ok(false);
    }
    if frame.len() != size as usize {
        return Err(format!(
            "frame {number} has {} bytes instead of {size}",
            frame.len()
        ));
    }
    match (22..frame.len()).find(|&i| frame.get(i) != Some(&pattern(number, i))) {
        Some(i) => Err(format!(
            "frame {number} of {size} bytes differs at byte {i}"
        )),
        None => Ok(true),
    }
}

fn word(frame: &[u8], at: usize) -> Option<u32> {
    let bytes = frame.get(at..at + 4)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Depends on the frame and on the place, and does not repeat within a page.
fn pattern(number: u32, at: usize) -> u8 {
    let mixed = (number as usize)
        .wrapping_mul(0x9e37)
        .wrapping_add(at.wrapping_mul(0x61c9))
        .wrapping_add(at >> 8);
    mixed.to_le_bytes()[1]
}

fn ready(fd: Option<BorrowedFd<'_>>, milliseconds: u16) -> Outcome<bool> {
    let fd = fd.ok_or("no interrupt")?;
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::from(milliseconds))? > 0)
}
