//! A vhost-user port: QEMU guests, containers and other user-space switches attach to a socket of ours, or we to theirs, and
//! exchange frames through memory. We are the device (the protocol's back-end), the peer is the driver.
//!
//! **The peer is not trusted.** It gets no part of the arena: frames are copied into and out of memory of its own. Of what it
//! sends, every length, file, region, address, index and id is checked; notifications must be eventfds and are written by this
//! port's own thread, never by a worker, so that no peer can make a worker wait. It can stop its own rings and nothing else.
//! Memory that is taken away under us is answered as [`guard`] says.
//!
//! **Threads.** One thread for each port speaks the protocol. A worker takes the lock of a ring's place once a burst; the
//! thread takes it when the peer changes a ring. There is no system call per packet, and none at all while the peer polls.
//!
//! A peer that enables fewer queue pairs than there are workers is sent to by all of them, over the pairs that it has.
//!
//! What is not offered: the control queue (QEMU and virtio-user answer it themselves), offloads, logging for live migration,
//! in-flight buffers (after our sudden death the peer gets some packets twice at most), memory slots beyond eight.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::arena::Arena;
use crate::device::DeviceError;
use crate::nic::{Link, NicControl};
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, check_queues};

pub mod cell;
pub mod fuzz;
mod guard;
pub mod memory;
pub mod message;
mod queue;
pub mod session;
mod socket;

pub use queue::VhostQueue;

/// Most queue pairs: a ring's number is 8 bits in some messages.
pub const MAX_PAIRS: usize = 64;
/// Ethernet header and one VLAN tag.
const LINK_OVERHEAD: usize = 18;
/// Longest time that closing a port waits for its thread.
const PATIENCE: Duration = Duration::from_millis(500);

/// Who opens the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// We listen; peers come and go.
    #[default]
    Server,
    /// The peer listens; we connect, again and again.
    Client,
}

/// The socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// Path.
    pub path: PathBuf,
    /// Who opens it.
    pub role: Role,
}

/// What a port looks like.
#[derive(Debug, Clone)]
pub struct VhostConfig {
    /// Name of the port.
    pub name: String,
    /// Its socket.
    pub place: Place,
    /// Access rights of a socket that we make.
    pub mode: u32,
    /// Largest IP packet in bytes.
    pub mtu: u32,
}

/// A vhost-user port whose socket exists.
pub struct VhostPort {
    config: VhostConfig,
    listener: Option<UnixListener>,
    control: Arc<Control>,
}

impl VhostPort {
    /// Makes the socket (as server). A socket that nobody listens on any more is replaced; anything else at its path is not.
    ///
    /// # Errors
    /// `Setting` for an MTU outside 68 to 65 517, `System` when the socket cannot be made.
    pub fn open(config: VhostConfig) -> Result<VhostPort, PortError> {
        if !(68..=65_517).contains(&config.mtu) {
            return Err(PortError::Setting {
                port: config.name.clone(),
                reason: format!("MTU {} is not between 68 and 65517", config.mtu),
            });
        }
        let listener = match config.place.role {
            Role::Client => None,
            Role::Server => Some(listen(&config.place.path, config.mode).map_err(|source| {
                PortError::System {
                    port: config.name.clone(),
                    step: "listen on the vhost-user socket",
                    source,
                }
            })?),
        };
        Ok(VhostPort {
            control: Arc::new(Control::default()),
            config,
            listener,
        })
    }
}

impl Port for VhostPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.config.name.clone(),
            kind: "vhost-user",
            mac: own_mac(&self.config.place.path),
            mtu: self.config.mtu,
            max_queues: MAX_PAIRS,
            mode: "copy".into(),
        }
    }

    fn control(&self) -> Option<Arc<dyn NicControl>> {
        Some(Arc::clone(&self.control) as Arc<dyn NicControl>)
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let VhostPort {
            config,
            listener,
            control,
        } = *self;
        check_queues(&config.name, n, MAX_PAIRS)?;
        let needed = config.mtu as usize + LINK_OVERHEAD;
        let room = arena.largest_packet(0);
        if room < needed {
            return Err(PortError::FrameTooSmall {
                port: config.name,
                needed,
                room,
            });
        }
        let system = |step, source: io::Error| PortError::System {
            port: config.name.clone(),
            step,
            source,
        };
        let shared = new_shared(&config.name, n).map_err(|e| system("make descriptors", e))?;
        let (place, mtu, for_thread) = (config.place.clone(), config.mtu, Arc::clone(&shared));
        std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || socket::run(&for_thread, &place, listener, mtu))
            .map_err(|e| system("start the thread of the socket", e))?;
        // Only one port opens its queues, once.
        let _ = control.shared.set(Arc::clone(&shared));
        let handle = Arc::new(Handle(Arc::clone(&shared)));
        Ok((0..n)
            .map(|pair| {
                let (shared, handle) = (Arc::clone(&shared), Arc::clone(&handle));
                Box::new(VhostQueue::new(shared, handle, pair, config.mtu)) as Box<dyn PortQueue>
            })
            .collect())
    }
}

/// Places for `n` queue pairs, for a session without a socket.
///
/// # Errors
/// The system has no more descriptors.
pub fn new_shared(name: &str, n: usize) -> io::Result<Arc<cell::Shared>> {
    let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
    let pair = || -> io::Result<cell::Pair> {
        let wake = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let started = eventfd()?;
        wake.add(
            &started,
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0),
        )?;
        Ok(cell::Pair {
            rx: cell::RingCell::default(),
            tx: cell::RingCell::default(),
            wake,
            started,
        })
    };
    Ok(Arc::new(cell::Shared {
        name: name.into(),
        pairs: (0..n).map(|_| pair()).collect::<io::Result<_>>()?,
        doorbell: eventfd()?,
        connected: AtomicBool::new(false),
        stop: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        counts: cell::Counts::default(),
    }))
}

/// Ends the session's thread when the last queue goes.
struct Handle(Arc<cell::Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.stop.store(true, Release);
        self.0.ring_doorbell();
        // Usually at once; but a peer that does not read its eventfd can hold the thread for ever.
        let mut left = PATIENCE;
        let step = Duration::from_millis(1);
        while !self.0.ended.load(Acquire) && !left.is_zero() {
            std::thread::sleep(step);
            left = left.saturating_sub(step);
        }
    }
}

/// What control may ask of the port.
#[derive(Default)]
struct Control {
    shared: std::sync::OnceLock<Arc<cell::Shared>>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl NicControl for Control {
    fn link(&self) -> Link {
        let up = self
            .shared
            .get()
            .is_some_and(|s| s.connected.load(Relaxed) && s.pairs.iter().any(|p| p.tx.running()));
        Link {
            up,
            mbps: 0,
            full_duplex: true,
        }
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let Some(s) = self.shared.get() else {
            return Vec::new();
        };
        vec![("connections", s.counts.connections.load(Relaxed))]
    }

    fn device_errors(&self) -> Vec<(&'static str, u64)> {
        let Some(s) = self.shared.get() else {
            return Vec::new();
        };
        let c = &s.counts;
        vec![
            ("protocol", c.protocol_errors.load(Relaxed)),
            ("ring", c.ring_errors.load(Relaxed)),
            ("memory_lost", c.memory_lost.load(Relaxed)),
            ("offload_refused", c.offload_refused.load(Relaxed)),
        ]
    }

    fn set_promiscuous(&self, _on: bool) -> Result<(), DeviceError> {
        // Whatever the peer sends is received.
        Ok(())
    }

    fn request_reset(&self) {}

    /// Nothing of ours is the peer's to write.
    fn quiesce(&self) {}
}

/// Listens at `path`, in place of a socket that nobody listens on any more.
fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            let dead = matches!(UnixStream::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused);
            if !(is_socket && dead) {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode & 0o777))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// An own address that stays the same over restarts: locally administered, from the socket's path (FNV-1a).
fn own_mac(path: &Path) -> MacAddr {
    let hash = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    MacAddr([0x02, a, b, c, d, e])
}
