//! Forwards between two NICs that are joined by a cable, so that frames go round for ever, and says how many a second:
//! `VFIO_DEVICES="ADDRESS ADDRESS" nic_forward [--seconds N] [--frames N] [--size BYTES] [--ring N]`.
//!
//! What testpmd does with `--forward-mode=io --tx-first` on one core; `perf/beds/nics` compares the two. One thread, pinned to
//! the last CPU, calls the drivers as a worker of the gateway does.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use pmd::device::vfio::{Protection, VfioDevice};
use pmd::nic::{self, NicControl, NicOptions};
use pmd::{Arena, ArenaConfig, BURST, Frame, Pool, PortQueue};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

struct End {
    control: Arc<dyn NicControl>,
    queue: Box<dyn PortQueue>,
    /// Received here, to be sent there.
    backlog: Vec<Frame>,
}

fn main() -> Outcome {
    let rest: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: u32| -> Outcome<u32> {
        match rest.iter().position(|a| a == name) {
            Some(at) => Ok(rest.get(at + 1).ok_or("a value")?.parse()?),
            None => Ok(default),
        }
    };
    let seconds = value("--seconds", 4)?;
    let frames = value("--frames", 64)?;
    let size = value("--size", 64)?;
    let ring = value("--ring", 1024)?;
    let devices = std::env::var("VFIO_DEVICES")?;
    let addresses: Vec<&str> = devices.split_whitespace().collect();
    let [first, second] = addresses[..] else {
        return Err("VFIO_DEVICES must hold two PCI addresses".into());
    };
    pin()?;
    let arena = Arena::new(ArenaConfig {
        frames: 16_384,
        // Intel's controllers want buffers of 2048 bytes behind the head-room.
        stride: 4096,
        ..ArenaConfig::default()
    })?;
    let open = |address: &str| -> Outcome<End> {
        let device = Arc::new(VfioDevice::pci(address, Protection::Iommu)?);
        let options = NicOptions {
            name: address.into(),
            promiscuous: true,
            rx_ring: Some(ring),
            tx_ring: Some(ring),
            ..NicOptions::default()
        };
        let port = nic::open(device, &options)?;
        let control = port.control().ok_or("no control")?;
        let queue = port.queues(1, &arena)?.pop().ok_or("no queue")?;
        Ok(End {
            control,
            queue,
            backlog: Vec::with_capacity(2 * BURST),
        })
    };
    let (mut a, mut b) = (open(first)?, open(second)?);
    let mut pool = Pool::new(&arena, 512);
    let start = Instant::now();
    while !(a.control.link().up && b.control.link().up) {
        if start.elapsed() > Duration::from_secs(20) {
            return Err("the links do not come up".into());
        }
        a.queue.flush(&mut pool);
        b.queue.flush(&mut pool);
    }
    for end in [&mut a, &mut b] {
        let mut burst = Vec::new();
        for _ in 0..frames {
            let mut frame = pool.get().ok_or("no frame")?;
            frame.set_data(&packet(size as usize));
            burst.push(frame);
        }
        end.queue.tx_burst(&mut pool, &mut burst);
        pool.put_bulk(&mut burst);
        end.queue.flush(&mut pool);
    }
    run(&mut a, &mut b, &mut pool, Duration::from_secs(1));
    let (start, before) = (Instant::now(), received(&a) + received(&b));
    run(
        &mut a,
        &mut b,
        &mut pool,
        Duration::from_secs(seconds.into()),
    );
    let rate = (received(&a) + received(&b) - before) as f64 / start.elapsed().as_secs_f64();
    println!("nic_forward: {rate:.0} frames a second, both ports");
    for end in [&mut a, &mut b] {
        pool.put_bulk(&mut end.backlog);
        end.queue.drain(&mut pool);
    }
    Ok(())
}

fn run(a: &mut End, b: &mut End, pool: &mut Pool, time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        for _ in 0..64 {
            a.queue.rx_burst(pool, &mut a.backlog, BURST);
            send(&mut b.queue, &mut a.backlog, pool);
            b.queue.rx_burst(pool, &mut b.backlog, BURST);
            send(&mut a.queue, &mut b.backlog, pool);
        }
    }
}

fn send(queue: &mut Box<dyn PortQueue>, frames: &mut Vec<Frame>, pool: &mut Pool) {
    if frames.is_empty() {
        queue.flush(pool);
    } else {
        queue.tx_burst(pool, frames);
    }
}

fn received(end: &End) -> u64 {
    end.queue.stats().rx_packets.value()
}

fn pin() -> Outcome {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count()).rfind(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let mut set = CpuSet::new();
    set.set(last.ok_or("no CPU")?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// An Ethernet frame of `size` bytes with an IPv4 header whose checksum is right: some models look.
fn packet(size: usize) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00];
    let [high, low] = u16::try_from(size - 14).unwrap_or(0).to_be_bytes();
    frame.extend([0x45, 0, high, low, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([198, 18, 0, 1, 198, 18, 0, 2]);
    let words = frame[14..34].chunks(2);
    let sum: u32 = words.map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded & 0xffff).unwrap_or(0);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    // UDP, discard, no checksum.
    let [high, low] = u16::try_from(size - 34).unwrap_or(0).to_be_bytes();
    frame.extend([0, 9, 0, 9, high, low, 0, 0]);
    frame.resize(size, 0);
    frame
}
