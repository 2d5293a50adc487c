//! The few interface ioctls that the kernel-backed ports need.
//!
//! All of them act in the network namespace of the calling thread.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::port::{MacAddr, PortError};

/// From `linux/ethtool.h`; libc has only the command's number.
#[repr(C)]
#[derive(Default)]
struct EthtoolChannels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// An interface name that the kernel would take: 1 to 15 bytes, no slash, no white space, not `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IfName(String);

impl IfName {
    pub(crate) fn parse(name: &str) -> Result<IfName, PortError> {
        let reason = if name.is_empty() {
            "it is empty"
        } else if name.len() >= libc::IFNAMSIZ {
            "it is longer than 15 bytes"
        } else if name == "." || name == ".." {
            "it is a directory's name"
        } else if name
            .bytes()
            .any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0)
        {
            "it holds a slash, a colon or white space"
        } else {
            return Ok(IfName(name.into()));
        };
        Err(PortError::Name {
            name: name.into(),
            reason,
        })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// An `ifreq` with this name, all else zero.
    pub(crate) fn request(&self) -> libc::ifreq {
        // SAFETY: all-zero bytes are a valid ifreq: it is plain integers, arrays and unions of these.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.0.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request
    }
}

/// A socket to ask the kernel about one interface.
pub(crate) struct Interface {
    name: IfName,
    socket: OwnedFd,
}

impl Interface {
    pub(crate) fn new(name: IfName) -> Result<Interface, PortError> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(system(&name, "control socket", io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Interface { name, socket })
    }

    pub(crate) fn index(&self) -> Result<u32, PortError> {
        let mut request = self.name.request();
        self.call(libc::SIOCGIFINDEX, "interface index", &mut request)?;
        // SAFETY: the call succeeded, so the kernel filled this member of the union.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        u32::try_from(index).map_err(|_| {
            system(
                &self.name,
                "interface index",
                io::ErrorKind::InvalidData.into(),
            )
        })
    }

    pub(crate) fn mac(&self) -> Result<MacAddr, PortError> {
        let mut request = self.name.request();
        self.call(libc::SIOCGIFHWADDR, "hardware address", &mut request)?;
        // SAFETY: the call succeeded, so the kernel filled this member of the union.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let mut mac = MacAddr::default();
        for (to, from) in mac.0.iter_mut().zip(address.sa_data) {
            [*to] = from.to_ne_bytes();
        }
        Ok(mac)
    }

    pub(crate) fn set_mac(&self, mac: MacAddr) -> Result<(), PortError> {
        let mut request = self.name.request();
        // SAFETY: all-zero bytes are a valid sockaddr.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac.0) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.call(
            libc::SIOCSIFHWADDR,
            "set the hardware address",
            &mut request,
        )
    }

    pub(crate) fn mtu(&self) -> Result<u32, PortError> {
        let mut request = self.name.request();
        self.call(libc::SIOCGIFMTU, "read the MTU", &mut request)?;
        // SAFETY: the call succeeded, so the kernel filled this member of the union.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    pub(crate) fn set_mtu(&self, mtu: u32) -> Result<(), PortError> {
        let mut request = self.name.request();
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).unwrap_or(i32::MAX);
        self.call(libc::SIOCSIFMTU, "set the MTU", &mut request)
    }

    pub(crate) fn set_up(&self) -> Result<(), PortError> {
        self.set_flag(libc::IFF_UP, "bring the interface up")
    }

    /// The kernel asks nobody for link addresses here.
    pub(crate) fn set_no_arp(&self) -> Result<(), PortError> {
        self.set_flag(libc::IFF_NOARP, "switch ARP off")
    }

    fn set_flag(&self, flag: libc::c_int, step: &'static str) -> Result<(), PortError> {
        let mut request = self.name.request();
        self.call(libc::SIOCGIFFLAGS, "read the flags", &mut request)?;
        // SAFETY: the call succeeded, so the kernel filled this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | i16::try_from(flag).unwrap_or(0);
        self.call(libc::SIOCSIFFLAGS, step, &mut request)
    }

    /// Receive queues in use; 1 when the driver does not say.
    pub(crate) fn rx_queues(&self) -> usize {
        let mut channels = EthtoolChannels {
            cmd: ETHTOOL_GCHANNELS,
            ..EthtoolChannels::default()
        };
        let mut request = self.name.request();
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        match self.call(libc::SIOCETHTOOL, "number of queues", &mut request) {
            Ok(()) => (channels.rx.saturating_add(channels.combined)).max(1) as usize,
            Err(_) => 1,
        }
    }

    fn call(
        &self,
        number: libc::Ioctl,
        step: &'static str,
        request: &mut libc::ifreq,
    ) -> Result<(), PortError> {
        // SAFETY: every number used here takes a pointer to an ifreq, valid for the call; its `ifru_data`, where used,
        // points to a live EthtoolChannels of the kernel's layout.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), number, request) };
        if result < 0 {
            return Err(system(&self.name, step, io::Error::last_os_error()));
        }
        Ok(())
    }
}

fn system(name: &IfName, step: &'static str, source: io::Error) -> PortError {
    PortError::System {
        port: name.as_str().into(),
        step,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_refuse_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "a:1", "sixteen-bytes-xx"] {
            assert!(IfName::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["eth0", "fifteen-bytes-x", "wg.1"] {
            assert_eq!(IfName::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn the_loopback_interface_answers() {
        let lo = Interface::new(IfName::parse("lo").unwrap()).unwrap();
        assert!(lo.index().unwrap() > 0 && lo.mtu().unwrap() > 0);
        assert_eq!(lo.mac().unwrap(), MacAddr::default());
        assert_eq!(lo.rx_queues(), 1);
        let none = Interface::new(IfName::parse("no-such-if").unwrap()).unwrap();
        assert!(matches!(none.index(), Err(PortError::System { .. })));
    }
}
