//! A port over AF_XDP: any Linux interface, its frames received straight into the arena and sent straight from it.
//!
//! The arena is registered as the sockets' memory (UMEM), once per queue, so a frame received on one port can be sent on any
//! other. A program of ours ([`steer`]) chooses which packets come here; the rest goes to the kernel as ever. It is held by
//! a link, so it goes with the process, however that ends.
//!
//! # How frames cross
//! Tried in this order, the choice is logged and told in [`PortInfo::mode`]:
//! 1. *zero-copy*: the interface reads and writes the frames itself. Needs support in the interface's driver.
//! 2. *native copy*: the program runs in the driver, the kernel copies.
//! 3. *generic copy*: the program runs after the kernel has built its own buffer; any interface, slowest.
//!
//! veth and the virtual interfaces of test systems refuse zero-copy with EOPNOTSUPP, so that way is negotiated here but was
//! never run by the project's own tests.
//!
//! # What to mind
//! - Every receive queue of the interface needs a worker, or its packets would pass by the gateway into the kernel:
//!   opening fewer is refused. `ethtool -L IF combined N` sets their number.
//! - Frames of 2048 or 4096 bytes are registered as aligned chunks. Other sizes use unaligned chunks (Linux 5.4) of at most
//!   4096 bytes, which in zero-copy mode need huge pages. The kernel keeps 256 bytes in front of a received packet: the
//!   largest is 1792 bytes in frames of 2048, 3840 in larger ones.
//! - Offloads of the sender's side that leave checksums to the hardware (veth: `tx`) or merge packets (GRO, LRO) give packets
//!   with unfinished checksums or beyond the MTU; switch them off on such interfaces.
//! - While no program is attached (before start, after the end) the kernel sees every packet. A host that must never
//!   forward clear text needs forwarding off or a firewall rule besides.
//! - One send call per burst, and only when the kernel asks for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arena::Arena;
use crate::netif::{IfName, Interface};
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, check_queues};

mod asm;
mod bpf;
mod queue;
mod ring;
mod socket;
pub mod steer;

use bpf::{MAP_TYPE_XSKMAP, Map, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE};
pub use queue::AfXdpQueue;
use socket::{Socket, Trial, Umem};
pub use steer::{SteerError, SteerMap, Steering};

/// How long a queue is waited for that another socket is leaving.
const LEAVING: Duration = Duration::from_secs(2);
/// What the kernel keeps in front of a received packet.
const XDP_PACKET_HEADROOM: u32 = 256;
/// Largest and smallest chunk that the kernel takes.
const CHUNK_MAX: u32 = 4096;
const CHUNK_MIN: u32 = 2048;

/// Which ways of crossing may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XdpMode {
    /// The best that the interface allows.
    #[default]
    Auto,
    /// Zero-copy or an error.
    ZeroCopy,
    /// Native copy or an error.
    NativeCopy,
    /// Generic copy.
    Generic,
}

/// What an AF_XDP port looks like.
#[derive(Debug, Clone)]
pub struct AfXdpConfig {
    /// Interface, in the network namespace of the thread that opens the port.
    pub interface: String,
    /// Entries of each of the four rings: a power of two from 64 to 32768. Twice as many frames rest here per queue.
    pub ring: u32,
    /// How frames may cross.
    pub mode: XdpMode,
    /// Which packets are taken.
    pub steering: Steering,
}

impl Default for AfXdpConfig {
    fn default() -> Self {
        AfXdpConfig {
            interface: String::new(),
            ring: 2048,
            mode: XdpMode::Auto,
            steering: Steering::default(),
        }
    }
}

/// An AF_XDP port before its queues are opened.
pub struct AfXdpPort {
    config: AfXdpConfig,
    interface: Interface,
    ifindex: u32,
    mac: MacAddr,
    mtu: u32,
    rx_queues: usize,
    steer: SteerMap,
}

impl AfXdpPort {
    /// Looks at the interface and makes the map of prefixes. Nothing is attached yet.
    ///
    /// # Errors
    /// `Name`, `Setting` when the configuration is wrong; `System` when the interface does not exist or BPF is not allowed.
    pub fn open(config: AfXdpConfig) -> Result<AfXdpPort, PortError> {
        let name = IfName::parse(&config.interface)?;
        let setting = |reason: &str| PortError::Setting {
            port: config.interface.clone(),
            reason: reason.into(),
        };
        if !config.ring.is_power_of_two() || !(64..=32768).contains(&config.ring) {
            return Err(setting("ring sizes are powers of two from 64 to 32768"));
        }
        if let Steering::Ipsec { udp_ports } = &config.steering
            && (udp_ports.is_empty() || udp_ports.len() > 8)
        {
            return Err(setting("1 to 8 NAT-traversal ports"));
        }
        let interface = Interface::new(name)?;
        let ifindex = interface.index()?;
        let steer = SteerMap::new()
            .map_err(|e| system(&config.interface, "map of prefixes (needs CAP_BPF)", e))?;
        Ok(AfXdpPort {
            mac: interface.mac()?,
            mtu: interface.mtu()?,
            rx_queues: interface.rx_queues(),
            interface,
            ifindex,
            steer,
            config,
        })
    }

    /// The prefixes of traffic to protect, to be changed at any time, also after the port is opened.
    pub fn steer_map(&self) -> SteerMap {
        self.steer.clone()
    }

    fn umem(&self, arena: &Arena) -> Result<Umem, PortError> {
        let stride = arena.stride();
        let chunk = stride.min(CHUNK_MAX);
        let unaligned = !matches!(stride, CHUNK_MIN | CHUNK_MAX);
        let room = chunk.saturating_sub(XDP_PACKET_HEADROOM) as usize;
        // Ethernet header and two VLAN tags.
        let needed = self.mtu as usize + 22;
        if chunk < CHUNK_MIN || room < needed {
            return Err(PortError::FrameTooSmall {
                port: self.config.interface.clone(),
                needed,
                room,
            });
        }
        let len = if unaligned {
            arena.len() as u64
        } else {
            u64::from(arena.end_of_indexes()) * u64::from(stride)
        };
        Ok(Umem {
            base: arena.base(),
            len,
            chunk,
            unaligned,
        })
    }

    /// Attaches the program, in the driver if that is wanted and can be.
    fn attach(&self, program: &OwnedFd) -> Result<(OwnedFd, bool), PortError> {
        let name = &self.config.interface;
        let attach = |flags| bpf::attach(program.as_fd(), self.ifindex, flags);
        if self.config.mode != XdpMode::Generic {
            match attach(XDP_FLAGS_DRV_MODE) {
                Ok(link) => return Ok((link, true)),
                Err(e) if self.config.mode != XdpMode::Auto => {
                    return Err(system(name, "attach the program in the driver", e));
                }
                Err(e) => tracing::info!(port = %name, error = %e, "no XDP in the driver"),
            }
        }
        attach(XDP_FLAGS_SKB_MODE)
            .map(|link| (link, false))
            .map_err(|e| system(name, "attach the program (is another attached?)", e))
    }

    /// Binds one socket, zero-copy if that is wanted and can be.
    fn bind(&self, umem: Umem, queue: u32, native: bool) -> Result<Socket, PortError> {
        let error = |(step, e)| system(&self.config.interface, step, e);
        let try_bind = |flags| {
            // SAFETY: the caller's queue holds an Arc of the arena until the socket is closed and released, and only frames
            // taken apart by `into_raw` or `into_index` are put into the rings.
            let socket = unsafe { Socket::new(umem, self.config.ring) }?;
            let flags = flags | libc::XDP_USE_NEED_WAKEUP;
            let deadline = Instant::now() + LEAVING;
            loop {
                match socket.bind(self.ifindex, queue, flags) {
                    Ok(()) => return Ok(socket),
                    // The kernel takes the socket of a gateway that was killed off the queue a moment later.
                    Err(e)
                        if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
                    {
                        std::thread::sleep(LEAVING / 200);
                    }
                    Err(e) => return Err(("bind", e)),
                }
            }
        };
        if native && matches!(self.config.mode, XdpMode::Auto | XdpMode::ZeroCopy) {
            match try_bind(libc::XDP_ZEROCOPY) {
                Ok(socket) => return Ok(socket),
                Err(e) if self.config.mode == XdpMode::ZeroCopy => return Err(error(e)),
                Err((step, e)) => {
                    tracing::info!(port = %self.config.interface, queue, step, error = %e, "no zero-copy");
                }
            }
        }
        try_bind(libc::XDP_COPY).map_err(error)
    }

    /// As [`Port::queues`], with the queues' own type. To be called in the interface's network namespace.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open_queues(&self, n: usize, arena: &Arc<Arena>) -> Result<Vec<AfXdpQueue>, PortError> {
        let name = &self.config.interface;
        check_queues(name, n, self.rx_queues)?;
        if n < self.rx_queues {
            return Err(PortError::Setting {
                port: name.clone(),
                reason: format!(
                    "it has {} receive queues and {n} workers: packets of the others would pass by the gateway; \
                     use as many workers, or `ethtool -L {name} combined {n}`",
                    self.rx_queues
                ),
            });
        }
        let umem = self.umem(arena)?;
        let entries = u32::try_from(self.rx_queues).unwrap_or(u32::MAX);
        let sockets = Map::new("sockets", MAP_TYPE_XSKMAP, 4, 4, entries, 0)
            .map_err(|e| system(name, "map of sockets", e))?;
        let code = steer::program(&self.config.steering, sockets.raw(), self.steer.maps())
            .map_err(|e| system(name, "assemble the program", io::Error::other(e)))?;
        let program = bpf::load_program("esplanade_steer", &code)
            .map_err(|e| system(name, "load the program", e))?;
        let (link, native) = self.attach(&program)?;
        let link = Arc::new(link);
        let mut queues = Vec::with_capacity(n);
        let mut pool = Pool::new(arena, self.config.ring as usize);
        for queue in 0..entries {
            let trial = Trial::new().map_err(|(step, e)| system(name, step, e))?;
            let socket = self.bind(umem, queue, native)?;
            let mode = match (socket.zero_copy(), native) {
                (true, _) => "zero-copy",
                (false, true) => "native copy",
                (false, false) => "generic copy",
            };
            tracing::info!(port = %name, queue, mode, unaligned = umem.unaligned, "AF_XDP queue opened");
            let link = Arc::clone(&link);
            let mut opened = AfXdpQueue::new(socket, trial, arena, self.ifindex, queue, mode, link);
            // Frames first, then packets.
            opened.refill(&mut pool);
            if let Some(fd) = opened.socket_fd() {
                sockets
                    .insert(&queue.to_ne_bytes(), &fd.to_ne_bytes())
                    .map_err(|e| system(name, "enter the socket into its map", e))?;
            }
            queues.push(opened);
        }
        Ok(queues)
    }
}

impl Port for AfXdpPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.config.interface.clone(),
            kind: "af_xdp",
            mac: self.mac,
            mtu: self.interface.mtu().unwrap_or(self.mtu),
            max_queues: self.rx_queues,
            mode: match self.config.mode {
                XdpMode::Auto => "best of zero-copy, native copy, generic copy",
                XdpMode::ZeroCopy => "zero-copy",
                XdpMode::NativeCopy => "native copy",
                XdpMode::Generic => "generic copy",
            }
            .into(),
        }
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let queues = self.open_queues(n, arena)?;
        Ok(queues
            .into_iter()
            .map(|q| Box::new(q) as Box<dyn PortQueue>)
            .collect())
    }
}

fn system(port: &str, step: &'static str, source: io::Error) -> PortError {
    PortError::System {
        port: port.into(),
        step,
        source,
    }
}
