//! The thread that follows the kernel: reads its socket, keeps the mirror, builds tables, publishes them.
//!
//! It is a thread of its own because a full table of the internet takes seconds to read and to build, and nothing else
//! of control may wait for that. It takes control's lock only to publish what is ready.

mod publish;
mod refresh;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use netlink_sys::{Socket, SocketAddr};
use nix::libc::{EAFNOSUPPORT, EBUSY, ENOBUFS, EOPNOTSUPP, MSG_DONTWAIT, MSG_TRUNC};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sa_store::fib::Fib;
use sa_store::local::Locals;
use sa_store::runtime::TunnelIdx;

use super::Shared;
use super::decode::{Message, Received, messages};
use super::derive::Settings;
use super::mirror::Mirror;
use super::model::{Class, Mac, Update};
use super::nudge::Nudger;
use super::request::dump_request;
use crate::core::{Control, lock};

/// Changes are gathered for this long before they are published together.
const BATCH: Duration = Duration::from_millis(10);
/// Longest time for which messages are read before something is done with them.
const SLICE: Duration = Duration::from_millis(20);
/// A dump of which nothing is heard for this long is begun anew.
const SILENCE: Duration = Duration::from_secs(5);
/// Pauses between losses: the first resync is at once, the others back off up to this.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// After so long without a loss the next one is a first again.
const CALM: Duration = Duration::from_secs(60);
/// Least pause between two dumps of one thing.
const DUMP_PAUSE: Duration = Duration::from_millis(50);
/// Largest datagram.
const ROOM: usize = 1 << 18;

pub(super) struct Follower {
    control: Arc<Mutex<Control>>,
    shared: Arc<Shared>,
    settings: Settings,
    socket: Socket,
    port: u32,
    room: Vec<u8>,
    nudger: Nudger,
    mirror: Mirror,
    /// Number of the dump that runs.
    sequence: u32,
    interrupted: bool,
    dump_began: Instant,
    heard: Instant,
    /// No dump is begun before.
    dump_at: Instant,
    round_began: Option<Instant>,
    last_loss: Option<Instant>,
    backoff: Duration,
    fib: Arc<Fib>,
    locals: Arc<Locals>,
    tunnels: HashMap<u32, TunnelIdx>,
    epoch: u64,
    known: BTreeMap<(u16, IpAddr), Mac>,
    routers: HashSet<(u16, IpAddr)>,
    refreshed: HashMap<(u16, IpAddr), Instant>,
    routes_dirty: bool,
    neighbours_dirty: bool,
    dirty_since: Option<Instant>,
    publish_at: Instant,
    refresh_at: Instant,
    ports: HashMap<u16, (bool, u32)>,
    notes: Vec<(&'static str, String)>,
}

/// Where the thread's parts come from.
pub(super) struct Seed {
    pub(super) control: Arc<Mutex<Control>>,
    pub(super) shared: Arc<Shared>,
    pub(super) settings: Settings,
    pub(super) socket: Socket,
    pub(super) port: u32,
    pub(super) nudge: Socket,
}

impl Follower {
    pub(super) fn new(seed: Seed) -> Self {
        let now = Instant::now();
        let snapshot = lock(&seed.control).store().current();
        Self {
            control: seed.control,
            shared: seed.shared,
            settings: seed.settings,
            socket: seed.socket,
            port: seed.port,
            room: Vec::with_capacity(ROOM),
            nudger: Nudger::new(seed.nudge),
            mirror: Mirror::default(),
            sequence: 0,
            interrupted: false,
            dump_began: now,
            heard: now,
            dump_at: now,
            round_began: None,
            last_loss: None,
            backoff: Duration::ZERO,
            fib: Arc::clone(&snapshot.fib),
            locals: Arc::clone(&snapshot.locals),
            tunnels: HashMap::new(),
            epoch: 0,
            known: BTreeMap::new(),
            routers: HashSet::new(),
            refreshed: HashMap::new(),
            routes_dirty: false,
            neighbours_dirty: false,
            dirty_since: None,
            publish_at: now,
            refresh_at: now,
            ports: HashMap::new(),
            notes: Vec::new(),
        }
    }

    /// Runs until asked to end.
    pub(super) fn run(mut self) {
        if !self.nudger.is_admin() && self.settings.neighbours {
            self.note(
                "kernel_unprivileged",
                "without CAP_NET_ADMIN neighbours are resolved by an empty datagram to their discard port",
            );
        }
        self.mirror.lose();
        while !self.shared.stop.load(Acquire) {
            self.wait();
            self.receive();
            if self.nudger.hear() {
                self.note(
                    "kernel_unprivileged",
                    "the kernel refuses to be asked for neighbours: they are resolved by an empty datagram to their discard port",
                );
            }
            let now = Instant::now();
            self.requests(now);
            self.dump(now);
            self.publish(now);
            self.refresh(now);
            self.report();
        }
    }

    fn note(&mut self, kind: &'static str, text: impl Into<String>) {
        let text = text.into();
        tracing::warn!(event = kind, "{text}");
        self.notes.push((kind, text));
    }

    fn wait(&self) {
        let now = Instant::now();
        let mut until = self.refresh_at;
        if let Some(since) = self.dirty_since.filter(|_| self.mirror.is_complete()) {
            until = until.min((since + BATCH).max(self.publish_at));
        }
        if self.mirror.dumping().is_some() {
            until = until.min(self.heard + SILENCE);
        } else if self.mirror.wanted().is_some() {
            until = until.min(self.dump_at);
        }
        let millis = until
            .saturating_duration_since(now)
            .as_micros()
            .div_ceil(1000);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::from(1000_u16));
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        // Interrupted or not: whatever is due is looked at.
        let _ = poll(&mut fds, timeout);
        let _ = self.shared.wake.read();
    }

    fn receive(&mut self) {
        let began = Instant::now();
        let mut room = std::mem::take(&mut self.room);
        while began.elapsed() < SLICE {
            room.clear();
            match self.socket.recv_from(&mut room, MSG_DONTWAIT | MSG_TRUNC) {
                // Only the kernel is believed.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok((length, _)) if length > room.len() => {
                    self.lost("a message of the kernel is larger than any is to be");
                }
                Ok(_) => {
                    for m in messages(&room) {
                        self.take(m);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(ENOBUFS) => {
                    self.shared.status().overruns += 1;
                    self.lost("the kernel's messages came faster than they were read");
                }
                Err(e) => {
                    self.lost(&format!("the kernel cannot be heard: {e}"));
                    break;
                }
            }
        }
        self.room = room;
        let changed = self.mirror.take_changed();
        self.routes_dirty |= changed.routes;
        self.neighbours_dirty |= changed.neighbours;
        if (changed.routes || changed.neighbours) && self.dirty_since.is_none() {
            self.dirty_since = Some(began);
        }
    }

    fn take(&mut self, received: Received) {
        // Changes carry the number of whoever made them: only what is addressed to this socket was asked for here.
        let asked = received.port == self.port;
        let ours = asked && received.sequence == self.sequence && self.mirror.dumping().is_some();
        if ours {
            self.heard = Instant::now();
            self.interrupted |= received.interrupted;
        }
        match received.message {
            Ok(Message::Update(u)) if ours => self.mirror.dumped(u),
            // A dump that was given up.
            Ok(Message::Update(_)) if asked => {}
            Ok(Message::Update(u)) => {
                if let Update::Neighbour(index, addr, None) | Update::NeighbourGone(index, addr) = u
                {
                    self.nudger.forgotten(index, addr);
                }
                self.mirror.event(u);
            }
            Ok(Message::Done(code)) if ours => self.dumped(code),
            Ok(Message::Error(code)) if ours && code != 0 => self.dumped(code),
            Ok(Message::Overrun) => {
                self.shared.status().overruns += 1;
                self.lost("the kernel has lost messages");
            }
            Ok(_) => {}
            Err(e) => {
                self.shared.status().not_understood += 1;
                tracing::debug!(error = %e, "a message of the kernel is not understood");
                // In a dump it is left out; a change may have been about anything.
                if !asked {
                    self.lost("a message of the kernel is not understood");
                }
            }
        }
    }

    /// A dump has ended, well or with an error.
    fn dumped(&mut self, code: i32) {
        let Some(class) = self.mirror.dumping() else {
            return;
        };
        let now = Instant::now();
        let took = now.saturating_duration_since(self.dump_began);
        match -code {
            0 => self.mirror.end(self.interrupted),
            // A kernel without the family has none of its routes.
            EOPNOTSUPP | EAFNOSUPPORT => self.mirror.end(false),
            EBUSY => {
                // An earlier dump that was given up is still running out.
                self.mirror.abort();
                self.dump_at = now + Duration::from_millis(20);
                return;
            }
            error => {
                self.mirror.abort();
                let e = io::Error::from_raw_os_error(error);
                self.note(
                    "kernel_dump_failed",
                    format!("the kernel does not show its {class:?}: {e}"),
                );
                self.dump_at = now + SILENCE;
                return;
            }
        }
        if self.mirror.wants(class) {
            // Something changed under it; not at once again, for that may go on.
            self.dump_at = now + DUMP_PAUSE.max(4 * took);
        }
        if self.mirror.wanted().is_none() {
            let round = self.round_began.take().unwrap_or(self.dump_began);
            let took = now.saturating_duration_since(round);
            self.dump_at = now + DUMP_PAUSE.max(2 * took);
            let mut status = self.shared.status();
            status.synced = true;
            status.syncs += 1;
            status.last_sync = seconds_now();
            status.last_sync_millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        }
    }

    /// Something was missed: everything is asked for again, the first time at once, then with growing pauses.
    fn lost(&mut self, why: &str) {
        let now = Instant::now();
        let first = Class::ALL[0];
        let waits =
            self.mirror.wants(first) && self.mirror.dumping().is_none() && self.dump_at > now;
        self.mirror.lose();
        let before = self.last_loss.replace(now);
        // Losses while everything is about to be read again are the same loss.
        if before.is_some() && waits {
            return;
        }
        self.shared.status().resyncs += 1;
        self.backoff = match before {
            Some(at) if now.saturating_duration_since(at) <= CALM => {
                (2 * self.backoff).clamp(2 * DUMP_PAUSE, MAX_BACKOFF)
            }
            _ => Duration::ZERO,
        };
        self.dump_at = now + self.backoff;
        self.note("kernel_resync", format!("{why}: everything is read again"));
    }

    fn dump(&mut self, now: Instant) {
        if self.mirror.dumping().is_some() {
            if now.saturating_duration_since(self.heard) < SILENCE {
                return;
            }
            self.mirror.abort();
            self.note(
                "kernel_resync",
                "the kernel does not go on with a dump: it is begun anew",
            );
        }
        let Some(class) = self.mirror.wanted().filter(|_| now >= self.dump_at) else {
            return;
        };
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let request = dump_request(class, self.sequence);
        match self
            .socket
            .send_to(&request, &SocketAddr::new(0, 0), MSG_DONTWAIT)
        {
            Ok(_) => {
                self.mirror.begin(class);
                self.interrupted = false;
                (self.dump_began, self.heard) = (now, now);
                self.round_began.get_or_insert(now);
            }
            Err(e) => {
                tracing::debug!(error = %e, "the kernel cannot be asked for a dump");
                self.dump_at = now + Duration::from_millis(100);
            }
        }
    }

    fn report(&mut self) {
        {
            let mut status = self.shared.status();
            (status.requests, status.requests_failed) = (self.nudger.made, self.nudger.failed);
            status.addresses = self.mirror.tables().addresses.len() as u64;
        }
        if self.notes.is_empty() {
            return;
        }
        let mut control = lock(&self.control);
        for (kind, text) in self.notes.drain(..) {
            control.events.note(kind, text);
        }
    }
}

fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
