//! One connection's state: what was agreed, the peer's memory, its rings. No socket here: a message in, an answer out.
//!
//! A ring works when it has a size, addresses in shared memory, was started (`SET_VRING_KICK`) and enabled. Each change of one
//! of these takes the ring out of its place first, so a worker never uses memory or addresses that the peer has replaced.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::cell::{Live, RingCell, Shared};
use super::memory::{MemoryError, PeerMemory};
use super::message::{self, Message, Request, RingAddr, protocol};
use crate::virtio::feature;
use crate::virtio::ring::{
    Areas, DeviceRing, Format, LayoutError, MAX_RING, RingOptions, area_sizes,
};

/// What we offer as a device.
pub const FEATURES: u64 = feature::VERSION_1
    | feature::RING_PACKED
    | feature::EVENT_IDX
    | feature::INDIRECT_DESC
    | feature::NET_MRG_RXBUF
    | feature::NET_MTU
    | feature::NET_MQ
    | feature::VHOST_PROTOCOL_FEATURES;

/// Why a connection is ended: a fault of the peer.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A feature that was not offered, or `VIRTIO_F_VERSION_1` missing.
    #[error("features {0:#x} were not offered, or lack VERSION_1")]
    Features(u64),
    /// A ring that the port does not have.
    #[error("there is no ring {0}")]
    Ring(u32),
    /// A ring of an impossible size or position.
    #[error("ring {ring}: {source}")]
    Layout {
        /// Ring.
        ring: u32,
        /// Rule broken.
        source: LayoutError,
    },
    /// A ring that is not, or not aligned, in shared memory.
    #[error("ring {0} is not in shared memory, or not aligned")]
    Place(u32),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A kick or call that is not an eventfd: using it might wait for the peer.
    #[error("ring {0}: a notification that is not an eventfd")]
    NotEventFd(u32),
    /// The system refused to watch a notification.
    #[error("ring {ring}: {source}")]
    Watch {
        /// Ring.
        ring: u32,
        /// The system's answer.
        source: nix::Error,
    },
}

/// A ring as far as the peer has described it.
#[derive(Debug, Default)]
struct Ring {
    size: u16,
    addr: Option<RingAddr>,
    base: u32,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    started: bool,
    enabled: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    mtu: u32,
    features: u64,
    protocol: u64,
    status: u64,
    memory: Option<Arc<PeerMemory>>,
    rings: Vec<Ring>,
}

impl Session {
    /// A connection that has just been made. `mtu`: largest IP packet that the port takes.
    pub fn new(shared: Arc<Shared>, mtu: u32) -> Session {
        let rings = (0..2 * shared.pairs.len())
            .map(|_| Ring::default())
            .collect();
        Session {
            shared,
            mtu,
            features: 0,
            protocol: 0,
            status: 0,
            memory: None,
            rings,
        }
    }

    /// Does what the peer asks; the bytes of the answer, if there is one.
    ///
    /// # Errors
    /// [`SessionError`]: the connection is to be ended.
    pub fn handle(&mut self, message: Message) -> Result<Option<Vec<u8>>, SessionError> {
        let number = message.number;
        let word = |value: u64| Some(message::reply(number, &value.to_le_bytes()));
        let mut refused = false;
        match message.request {
            Request::GetFeatures => return Ok(word(FEATURES)),
            Request::GetProtocolFeatures => return Ok(word(protocol::OFFERED)),
            Request::GetQueueNum => return Ok(word(self.shared.pairs.len() as u64)),
            Request::GetStatus => return Ok(word(self.status)),
            Request::GetVringBase { ring } => {
                let base = self.stop(ring)?;
                let answer = (u64::from(base) << 32) | u64::from(ring);
                return Ok(word(answer));
            }
            Request::SetFeatures(bits) => self.set_features(bits)?,
            Request::SetProtocolFeatures(bits) => {
                if bits & !protocol::OFFERED != 0 {
                    return Err(SessionError::Features(bits));
                }
                self.protocol = bits;
            }
            Request::SetMemTable(regions) => {
                self.take_all();
                self.memory = None;
                self.memory = Some(PeerMemory::map(regions)?);
                self.put_all()?;
            }
            Request::SetVringNum { ring, num } => {
                let size = u16::try_from(num)
                    .ok()
                    .filter(|n| (1..=MAX_RING).contains(n));
                let size = size.ok_or(SessionError::Layout {
                    ring,
                    source: LayoutError::Size(num),
                })?;
                self.change(ring, |r| r.size = size)?;
            }
            Request::SetVringAddr(addr) => self.change(addr.ring, |r| r.addr = Some(addr))?,
            Request::SetVringBase { ring, base } => {
                self.take(ring)?;
                self.ring(ring)?.base = base;
                self.put(ring)?;
            }
            Request::SetVringKick { ring, fd } => self.set_kick(ring, fd)?,
            Request::SetVringCall { ring, fd } => {
                check_eventfd(ring, fd.as_ref())?;
                self.ring(ring)?.call = fd;
            }
            Request::SetVringErr { ring, fd } => {
                check_eventfd(ring, fd.as_ref())?;
                self.ring(ring)?;
            }
            Request::SetVringEnable { ring, on } => self.change(ring, |r| r.enabled = on)?,
            Request::NetSetMtu(mtu) => refused = mtu > u64::from(self.mtu),
            Request::SetStatus(status) => {
                self.status = status;
                if status == 0 {
                    self.reset();
                }
            }
            Request::ResetOwner => self.reset(),
            // The link layer learns addresses by itself.
            Request::SetOwner | Request::SendRarp => {}
        }
        let ack = message.need_reply && self.protocol & protocol::REPLY_ACK != 0;
        Ok(ack.then(|| message::reply(number, &u64::from(refused).to_le_bytes())))
    }

    /// Calls the peer for the rings whose workers asked for it, and reports rings that stopped. Writing to an eventfd of the
    /// peer can wait when the peer wants it to: only this connection's thread does it.
    pub fn serve_workers(&mut self) {
        for (number, ring) in self.rings.iter().enumerate() {
            let Some(cell) = cell(&self.shared, number) else {
                continue;
            };
            if cell.take_call()
                && let Some(call) = &ring.call
            {
                let _ = nix::unistd::write(call, &1u64.to_ne_bytes());
            }
            if let Some(error) = cell.take_failure() {
                tracing::warn!(port = %self.shared.name, ring = number, %error, "the peer broke a rule; its ring is stopped");
            }
        }
    }

    /// Whether the peer took memory away.
    pub fn memory_lost(&self) -> bool {
        self.memory.as_ref().is_some_and(|m| m.lost())
    }

    fn set_features(&mut self, bits: u64) -> Result<(), SessionError> {
        if bits & !FEATURES != 0 || bits & feature::VERSION_1 == 0 {
            return Err(SessionError::Features(bits));
        }
        if bits == self.features {
            return Ok(());
        }
        self.take_all();
        self.features = bits;
        // Without protocol features there is no message to enable a ring.
        if bits & feature::VHOST_PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|r| r.enabled = true);
        }
        self.put_all()
    }

    fn set_kick(&mut self, ring: u32, fd: Option<OwnedFd>) -> Result<(), SessionError> {
        check_eventfd(ring, fd.as_ref())?;
        self.take(ring)?;
        self.unwatch(ring);
        if let Some(fd) = &fd
            && let Some(pair) = watched(&self.shared, ring)
        {
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1);
            pair.wake
                .add(fd, event)
                .map_err(|source| SessionError::Watch { ring, source })?;
        }
        let r = self.ring(ring)?;
        r.kick = fd;
        r.started = true;
        self.put(ring)
    }

    /// Takes the ring out of use; where it stands.
    fn stop(&mut self, ring: u32) -> Result<u32, SessionError> {
        self.take(ring)?;
        self.unwatch(ring);
        let r = self.ring(ring)?;
        r.started = false;
        r.kick = None;
        r.call = None;
        Ok(r.base)
    }

    fn reset(&mut self) {
        for ring in 0..u32::try_from(self.rings.len()).unwrap_or(0) {
            // The ring exists, which is all that can fail.
            let _ = self.stop(ring);
            if let Ok(r) = self.ring(ring) {
                *r = Ring::default();
            }
        }
    }

    fn change(&mut self, ring: u32, f: impl FnOnce(&mut Ring)) -> Result<(), SessionError> {
        self.take(ring)?;
        f(self.ring(ring)?);
        self.put(ring)
    }

    fn ring(&mut self, ring: u32) -> Result<&mut Ring, SessionError> {
        self.rings
            .get_mut(ring as usize)
            .ok_or(SessionError::Ring(ring))
    }

    fn unwatch(&mut self, ring: u32) {
        let shared = Arc::clone(&self.shared);
        if let Ok(r) = self.ring(ring)
            && let (Some(fd), Some(pair)) = (&r.kick, watched(&shared, ring))
        {
            let _ = pair.wake.delete(fd.as_fd());
        }
    }

    /// Takes a ring out of its place and remembers where it stands.
    fn take(&mut self, ring: u32) -> Result<(), SessionError> {
        let shared = Arc::clone(&self.shared);
        let r = self.ring(ring)?;
        if let Some(live) = cell(&shared, ring as usize).and_then(|c| c.put(None)) {
            r.base = live.ring.base();
        }
        Ok(())
    }

    /// Puts a ring into its place if it has everything.
    fn put(&mut self, ring: u32) -> Result<(), SessionError> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let r = self
            .rings
            .get(ring as usize)
            .ok_or(SessionError::Ring(ring))?;
        let Some(addr) = r.addr else { return Ok(()) };
        if !(r.started && r.enabled) || r.size == 0 {
            return Ok(());
        }
        let has = |bit| self.features & bit != 0;
        let format = if has(feature::RING_PACKED) {
            Format::Packed
        } else {
            Format::Split
        };
        let [d, a, u] = area_sizes(format, r.size);
        let area = |at, len, align| {
            memory
                .ring_area(at, len, align)
                .ok_or(SessionError::Place(ring))
        };
        let areas = Areas {
            descriptors: area(addr.descriptors, d, 16)?,
            driver: area(addr.driver, a, 2)?,
            device: area(addr.device, u, 4)?,
        };
        let options = RingOptions {
            format,
            event_idx: has(feature::EVENT_IDX),
            indirect: has(feature::INDIRECT_DESC),
        };
        let mut device = DeviceRing::new(options, areas, r.size, r.base)
            .map_err(|source| SessionError::Layout { ring, source })?;
        device.disarm();
        let live = Live {
            ring: device,
            memory: Arc::clone(memory),
            mergeable: has(feature::NET_MRG_RXBUF),
            armed: false,
        };
        if let Some(cell) = cell(&self.shared, ring as usize) {
            cell.put(Some(live));
        }
        if let Some(pair) = watched(&self.shared, ring) {
            let _ = pair.started.write(1);
        }
        Ok(())
    }

    fn take_all(&mut self) {
        for ring in 0..u32::try_from(self.rings.len()).unwrap_or(0) {
            let _ = self.take(ring);
        }
    }

    fn put_all(&mut self) -> Result<(), SessionError> {
        for ring in 0..u32::try_from(self.rings.len()).unwrap_or(0) {
            self.put(ring)?;
        }
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reset();
        if self.memory_lost() {
            self.shared.counts.memory_lost.fetch_add(1, Relaxed);
            tracing::warn!(port = %self.shared.name, "the peer took shared memory away");
        }
    }
}

/// The place of ring `number`: even ones are the peer's receive queues.
fn cell(shared: &Shared, number: usize) -> Option<&RingCell> {
    let pair = shared.pairs.get(number / 2)?;
    Some(if number.is_multiple_of(2) {
        &pair.tx
    } else {
        &pair.rx
    })
}

/// The pair whose sleeping worker the ring's kicks wake.
fn watched(shared: &Shared, ring: u32) -> Option<&super::cell::Pair> {
    shared
        .pairs
        .get(ring as usize / 2)
        .filter(|_| ring % 2 == 1)
}

/// Refuses anything but an eventfd: polling or writing another kind of file can wait for whoever serves it.
fn check_eventfd(ring: u32, fd: Option<&OwnedFd>) -> Result<(), SessionError> {
    let Some(fd) = fd else { return Ok(()) };
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(link) if link.as_os_str() == "anon_inode:[eventfd]" => Ok(()),
        _ => Err(SessionError::NotEventFd(ring)),
    }
}
