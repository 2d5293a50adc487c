//! A TAP interface: the kernel's network stack on the other side of the port.
//!
//! Every packet costs a system call in each direction, so this port is for management traffic, tests and places where nothing
//! faster can run. The interface goes when its last queue is closed, unless it was made persistent by somebody else.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use crate::arena::Arena;
use crate::frame::Frame;
use crate::netif::{IfName, Interface};
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, PortQueueStats, check_queues};

/// What a TAP port looks like.
#[derive(Debug, Clone, Default)]
pub struct TapConfig {
    /// Name of the interface, made or joined in the network namespace of the thread that opens the port. `%d` in it is
    /// replaced by a free number.
    pub name: String,
    /// Largest IP packet in bytes, 68 to 65521; none: the kernel's choice.
    pub mtu: Option<u32>,
    /// Whether to bring the interface up.
    pub up: bool,
    /// Makes the interface the kernel's side of another port, whose packets are protected elsewhere.
    pub exception: Option<Exception>,
}

/// What makes a TAP the exception path of a port.
#[derive(Debug, Clone, Copy)]
pub struct Exception {
    /// The port's address: what is sent to the port is then for the kernel too.
    pub mac: MacAddr,
    /// Whether the kernel finds neighbours by this interface. Else it sends everything to its own address, and the port's
    /// owner finds them.
    pub neighbours: bool,
}

/// A TAP port; its first queue exists already.
pub struct TapPort {
    name: IfName,
    interface: Interface,
    first: File,
    mac: MacAddr,
    mtu: u32,
}

/// One queue of a TAP interface.
pub struct TapQueue {
    file: File,
    /// Largest frame that the interface gives: header, VLAN tag, MTU.
    largest: usize,
    stats: Arc<PortQueueStats>,
}

/// The kernel's own limit (`MAX_TAP_QUEUES`).
const MAX_QUEUES: usize = 256;
/// Ethernet header and one VLAN tag.
const OVERHEAD: usize = 18;
// From linux/ip.h: IPV4_DEVCONF_NOXFRM and IPV4_DEVCONF_NOPOLICY.
const NOXFRM: u16 = 15;
const NOPOLICY: u16 = 16;

impl TapPort {
    /// Makes the interface (or joins one of this name that allows several queues).
    ///
    /// # Errors
    /// `Name` and `Setting` when the configuration is wrong, `System` when the kernel refuses.
    pub fn open(config: &TapConfig) -> Result<TapPort, PortError> {
        let asked = IfName::parse(&config.name)?;
        if let Some(mtu) = config.mtu
            && !(68..=65521).contains(&mtu)
        {
            return Err(PortError::Setting {
                port: config.name.clone(),
                reason: format!("MTU {mtu} is not between 68 and 65521"),
            });
        }
        let (first, name) = open_queue(&asked)?;
        let interface = Interface::new(name.clone())?;
        if let Some(mtu) = config.mtu {
            interface.set_mtu(mtu)?;
        }
        if let Some(exception) = config.exception {
            interface.set_mac(exception.mac)?;
            if !exception.neighbours {
                interface.set_no_arp()?;
            }
            without_xfrm(&interface, &name)?;
        }
        if config.up {
            interface.set_up()?;
        }
        let (mtu, mac) = (interface.mtu()?, interface.mac()?);
        tracing::info!(port = name.as_str(), mtu, "TAP interface opened");
        Ok(TapPort {
            mac: config
                .exception
                .map_or_else(|| gateway_side(mac), |exception| exception.mac),
            mtu,
            name,
            interface,
            first,
        })
    }

    /// Name of the interface, with the number that the kernel chose.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Ethernet address of the kernel's side.
    ///
    /// # Errors
    /// `System` when the interface is gone.
    pub fn kernel_mac(&self) -> Result<MacAddr, PortError> {
        self.interface.mac()
    }
}

impl Port for TapPort {
    fn info(&self) -> PortInfo {
        PortInfo {
            name: self.name.as_str().into(),
            kind: "tap",
            mac: self.mac,
            mtu: self.mtu,
            max_queues: MAX_QUEUES,
            mode: "copy".into(),
        }
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        check_queues(self.name.as_str(), n, MAX_QUEUES)?;
        let largest = self.mtu as usize + OVERHEAD;
        let room = arena.largest_packet(0);
        if room < largest {
            return Err(PortError::FrameTooSmall {
                port: self.name.as_str().into(),
                needed: largest,
                room,
            });
        }
        let mut files = vec![self.first];
        for _ in 1..n {
            files.push(open_queue(&self.name)?.0);
        }
        Ok(files
            .into_iter()
            .map(|file| {
                Box::new(TapQueue {
                    file,
                    largest,
                    stats: Arc::default(),
                }) as Box<dyn PortQueue>
            })
            .collect())
    }
}

impl PortQueue for TapQueue {
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let (mut count, mut bytes) = (0, 0);
        while count < max {
            let Some(mut frame) = pool.get() else {
                break;
            };
            // One byte more than the largest frame, so that a longer one is seen as such and not as cut.
            let room = frame.tailroom().min(self.largest + 1);
            let result = match frame.append(room) {
                Some(buffer) => self.file.read(buffer),
                None => Ok(0),
            };
            match result {
                Ok(n) if n > 0 && n <= self.largest => {
                    frame.trim_back(room - n);
                    count += 1;
                    bytes += n;
                    out.push(frame);
                }
                Ok(0) => {
                    pool.put(frame);
                    break;
                }
                Ok(_) => {
                    self.stats.rx_errors.add(1);
                    pool.put(frame);
                }
                // Nothing there, or the interface is down.
                Err(_) => {
                    pool.put(frame);
                    break;
                }
            }
        }
        self.stats.note_rx(count, bytes);
        count
    }

    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        let (mut sent, mut bytes, mut failed) = (0, 0, 0u64);
        for frame in &*frames {
            match self.file.write(frame.data()) {
                Ok(_) => {
                    sent += 1;
                    bytes += frame.len();
                }
                // The interface's queue is full: the rest stays with the caller.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                // Not a frame that the kernel takes, or the interface is down.
                Err(_) => failed += 1,
            }
        }
        self.stats.note_tx(sent, bytes);
        self.stats.tx_errors.add(failed);
        let taken = sent + usize::try_from(failed).unwrap_or(0);
        for frame in frames.drain(..taken) {
            pool.put(frame);
        }
        taken
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    /// Nothing to give back: the kernel copies.
    fn drain(&mut self, _pool: &mut Pool) {}
}

/// One more queue of the interface `name`, and its full name.
fn open_queue(name: &IfName) -> Result<(File, IfName), PortError> {
    let error = |step, source| PortError::System {
        port: name.as_str().into(),
        step,
        source,
    };
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|e| error("open /dev/net/tun", e))?;
    let mut request = name.request();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or(0);
    // SAFETY: TUNSETIFF takes a pointer to an ifreq, valid for the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(error(
            "make the TAP interface",
            std::io::Error::last_os_error(),
        ));
    }
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|c| c.to_ne_bytes()[0])
        .take_while(|&b| b != 0)
        .collect();
    Ok((file, IfName::parse(&String::from_utf8_lossy(&bytes))?))
}

/// The kernel hands this host's packets over in the clear and takes decrypted ones without asking its own policies.
fn without_xfrm(interface: &Interface, name: &IfName) -> Result<(), PortError> {
    let index = interface.index()?;
    crate::netlink::set_inet_conf(index, &[(NOXFRM, 1), (NOPOLICY, 1)]).map_err(|source| {
        PortError::System {
            port: name.as_str().into(),
            step: "set disable_xfrm and disable_policy",
            source,
        }
    })?;
    // IPv6 has no such message, and no disable_xfrm. In a sandbox the file may be out of reach.
    let file = format!("/proc/sys/net/ipv6/conf/{}/disable_policy", name.as_str());
    if let Err(error) = std::fs::write(&file, "1") {
        tracing::warn!(%file, %error, "not set: the kernel's own IPv6 policies apply to what it is given");
    }
    Ok(())
}

/// The port's own address: the kernel's with one bit changed, since the two ends of the wire are two stations.
fn gateway_side(kernel: MacAddr) -> MacAddr {
    let MacAddr([a, b, c, d, e, f]) = kernel;
    MacAddr([a, b, c, d, e, f ^ 1])
}
