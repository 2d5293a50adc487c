//! The kernel's devices, addresses, routes and neighbours, mirrored, so that routing daemons, `ip` and the kernel's own
//! neighbour discovery work on a gateway as on any Linux router.
//!
//! ```text
//!   rtnetlink ─▶ decode ─▶ mirror ─▶ derive ─▶ Fib, Locals ─▶ snapshot      a thread of its own
//!                  ▲                    │
//!                  └─ dumps, nudges ◀───┴─ neighbours ─▶ atomics, no publication
//! ```
//!
//! The mirror is a core without I/O. Routes of the configuration win over the kernel's at equal prefix length.

pub mod decode;
pub mod derive;
pub mod mirror;
pub mod model;
mod nudge;
mod report;
mod request;
mod thread;

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use netlink_sys::constants::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};

pub use derive::{Foreign, Origin, PortLink, Settings};
pub(crate) use report::origin;
pub use report::{KernelStatus, NeighbourInfo, NeighbourQuery, RouteInfo, RouteQuery, Routes};

use crate::core::Control;

/// Bytes of the socket's queue when nothing else is asked for: enough for some ten thousand changes at once.
pub const RECEIVE_BUFFER: usize = 32 << 20;

/// Groups of changes: links, neighbours, IPv4 and IPv6 addresses and routes.
const GROUPS: [u32; 6] = [1, 3, 5, 9, 7, 11];
/// Neighbours that wait to be asked for.
const REQUESTS: usize = 1024;

/// Sockets to the kernel: opened before rights are given up, for a large queue needs them.
#[derive(Debug)]
pub struct Sockets {
    tables: Socket,
    /// Number of that socket.
    port: u32,
    nudge: Socket,
}

impl Sockets {
    /// Opens them and subscribes to changes.
    ///
    /// # Errors
    /// The system's.
    pub fn open(receive_buffer: usize) -> io::Result<Self> {
        let mut tables = Socket::new(NETLINK_ROUTE)?;
        if setsockopt(&tables, sockopt::RcvBufForce, &receive_buffer).is_err() {
            // As much as an ordinary user may have.
            setsockopt(&tables, sockopt::RcvBuf, &receive_buffer)?;
        }
        let port = tables.bind_auto()?.port_number();
        for group in GROUPS {
            tables.add_membership(group)?;
        }
        let mut nudge = Socket::new(NETLINK_ROUTE)?;
        nudge.bind(&SocketAddr::new(0, 0))?;
        Ok(Self {
            tables,
            port,
            nudge,
        })
    }
}

/// What is to be mirrored, and the sockets for it.
#[derive(Debug)]
pub struct Plan {
    /// What.
    pub settings: Settings,
    /// Sockets.
    pub sockets: Sockets,
}

/// What control and the thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    requests: Mutex<Vec<(u16, IpAddr)>>,
    status: Mutex<KernelStatus>,
    published: Mutex<Arc<Published>>,
    settings: Settings,
    wake: EventFd,
    stop: AtomicBool,
}

/// Where the routes of the published table come from, in their order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published {
    pub(crate) origins: Vec<Origin>,
    pub(crate) refused: Vec<String>,
}

impl Shared {
    fn new(settings: &Settings) -> io::Result<Self> {
        Ok(Self {
            requests: Mutex::default(),
            status: Mutex::default(),
            published: Mutex::default(),
            settings: settings.clone(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
        })
    }

    fn requests(&self) -> MutexGuard<'_, Vec<(u16, IpAddr)>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> MutexGuard<'_, KernelStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn origins(&self) -> Arc<Published> {
        Arc::clone(
            &self
                .published
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    fn published(&self, wanted: &derive::Wanted, routes: usize) {
        let new = Arc::new(Published {
            origins: wanted.origins.clone(),
            refused: wanted.refused.clone(),
        });
        *self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = new;
        let mut status = self.status();
        status.routes = routes as u64;
        status.refused = wanted.refusals;
    }
}

/// Control's way to the thread.
#[derive(Clone, Debug)]
pub struct Handle(pub(crate) Arc<Shared>);

impl Handle {
    /// A handle for a thread that is started later.
    ///
    /// # Errors
    /// No event descriptor.
    pub fn new(settings: &Settings) -> io::Result<Self> {
        Shared::new(settings).map(|s| Self(Arc::new(s)))
    }

    /// Packets wait for a neighbour: the kernel is to find it. Never waits; what finds no room is asked for again by the
    /// next packet.
    pub fn resolve(&self, port: u16, addr: IpAddr) {
        if !self.0.settings.neighbours {
            return;
        }
        let mut requests = self.0.requests();
        if requests.len() < REQUESTS && !requests.contains(&(port, addr)) {
            requests.push((port, addr));
            drop(requests);
            // Full or not, the thread wakes.
            let _ = self.0.wake.write(1);
        }
    }

    /// How it stands.
    pub fn status(&self) -> KernelStatus {
        self.0.status().clone()
    }
}

/// The thread at work.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// No thread.
    pub fn start(plan: Plan, handle: &Handle, control: Arc<Mutex<Control>>) -> io::Result<Self> {
        let follower = thread::Follower::new(thread::Seed {
            control,
            shared: Arc::clone(&handle.0),
            settings: plan.settings,
            socket: plan.sockets.tables,
            port: plan.sockets.port,
            nudge: plan.sockets.nudge,
        });
        let thread = std::thread::Builder::new()
            .name("kernel-tables".into())
            .spawn(move || follower.run())?;
        Ok(Self {
            shared: Arc::clone(&handle.0),
            thread: Some(thread),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _ = thread.join();
        }
    }
}
