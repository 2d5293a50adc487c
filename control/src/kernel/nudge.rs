//! Asking the kernel for neighbours.
//!
//! With `CAP_NET_ADMIN` the kernel is told that an entry is used (`NTF_USE`): it resolves it, or makes sure of a stale one.
//! The kernel looks at the rights of whoever sends the message, not of whoever opened the socket, so a gateway that has
//! become an ordinary user cannot do that. It sends an empty datagram to the discard port over the device instead, which makes
//! the kernel do the same.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use nix::libc::{EPERM, MSG_DONTWAIT};
use nix::sys::socket::{setsockopt, sockopt};

use super::decode::{Message, messages};
use super::request::use_request;

/// The same neighbour is not asked for more often: the kernel repeats its questions every second by itself.
const PAUSE: Duration = Duration::from_secs(1);
/// Most requests a second, so that a scan of a network does not become a storm.
const PER_SECOND: u32 = 500;
/// Discard, RFC 863.
const DISCARD: u16 = 9;
/// `CAP_NET_ADMIN` in `/proc/thread-self/status`.
const NET_ADMIN: u64 = 1 << 12;

/// Asks, within bounds.
#[derive(Debug)]
pub(super) struct Nudger {
    socket: Socket,
    room: Vec<u8>,
    admin: bool,
    asked: HashMap<(u32, IpAddr), Instant>,
    second: Option<(Instant, u32)>,
    sequence: u32,
    /// Requests made.
    pub(super) made: u64,
    /// Requests that failed.
    pub(super) failed: u64,
}

impl Nudger {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            socket,
            room: Vec::with_capacity(1 << 14),
            admin: has_net_admin(),
            asked: HashMap::new(),
            second: None,
            sequence: 0,
            made: 0,
            failed: 0,
        }
    }

    /// Whether the kernel takes requests of ours.
    pub(super) fn is_admin(&self) -> bool {
        self.admin
    }

    /// Asks for a neighbour on a device, unless that was done a moment ago: false then.
    pub(super) fn ask(&mut self, index: u32, device: &str, addr: IpAddr, now: Instant) -> bool {
        let fresh = |at: &Instant| now.saturating_duration_since(*at) < PAUSE;
        if self.asked.get(&(index, addr)).is_some_and(fresh) {
            return false;
        }
        match &mut self.second {
            Some((began, n)) if now.saturating_duration_since(*began) < PAUSE => {
                if *n >= PER_SECOND {
                    return false;
                }
                *n += 1;
            }
            second => {
                *second = Some((now, 1));
                self.asked.retain(|_, at| fresh(at));
            }
        }
        self.asked.insert((index, addr), now);
        self.made += 1;
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let done = if self.admin {
            let request = use_request(index, addr, self.sequence);
            let kernel = NetlinkAddr::new(0, 0);
            self.socket
                .send_to(&request, &kernel, MSG_DONTWAIT)
                .map(drop)
        } else {
            knock(index, device, addr)
        };
        if let Err(e) = done {
            self.failed += 1;
            tracing::debug!(neighbour = %addr, device, error = %e, "the kernel cannot be asked for a neighbour");
        }
        true
    }

    /// The kernel has forgotten the neighbour, and with it what it was asked: it may be asked again at once.
    pub(super) fn forgotten(&mut self, index: u32, addr: IpAddr) {
        self.asked.remove(&(index, addr));
    }

    /// Hears refusals. True when it turns out that the right to ask is missing.
    pub(super) fn hear(&mut self) -> bool {
        let mut lost = false;
        loop {
            self.room.clear();
            match self.socket.recv_from(&mut self.room, MSG_DONTWAIT) {
                Ok((_, from)) if from.port_number() == 0 => {}
                Ok(_) => continue,
                Err(_) => return lost,
            }
            for m in messages(&self.room) {
                let Ok(Message::Error(code)) = m.message else {
                    continue;
                };
                if code == 0 {
                    continue;
                }
                self.failed += 1;
                if code == -EPERM && self.admin {
                    self.admin = false;
                    self.asked.clear();
                    lost = true;
                }
            }
        }
    }
}

/// Makes the kernel send something to a neighbour.
fn knock(index: u32, device: &str, addr: IpAddr) -> io::Result<()> {
    let any: SocketAddr = match addr {
        IpAddr::V4(_) => ([0; 4], 0).into(),
        IpAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(device))?;
    setsockopt(&socket, sockopt::DontRoute, &true)?;
    let to = match addr {
        IpAddr::V4(a) => (a, DISCARD).into(),
        IpAddr::V6(a) => SocketAddr::V6(SocketAddrV6::new(a, DISCARD, 0, index)),
    };
    socket.send_to(&[], to).map(drop)
}

/// Whether this thread may configure the network.
fn has_net_admin() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_some_and(|b| b & NET_ADMIN != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_sys::protocols::NETLINK_ROUTE;

    #[test]
    fn a_neighbour_is_asked_for_once_a_second_or_when_it_was_forgotten_meanwhile() {
        let mut nudger = Nudger::new(Socket::new(NETLINK_ROUTE).unwrap());
        let addr = IpAddr::from([127, 0, 0, 2]);
        let now = Instant::now();
        let ask =
            |n: &mut Nudger, millis| n.ask(1, "lo", addr, now + Duration::from_millis(millis));
        assert!(ask(&mut nudger, 0));
        assert!(!ask(&mut nudger, 100));
        nudger.forgotten(1, addr);
        assert!(ask(&mut nudger, 200));
        assert!(!ask(&mut nudger, 1100));
        assert!(ask(&mut nudger, 1300));
        assert_eq!(nudger.made, 3);
    }
}
