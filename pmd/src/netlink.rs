//! One rtnetlink request: IPv4 settings of an interface. Unlike files under `/proc/sys` it works in a sandbox that has
//! these read-only.

use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const HEADER: usize = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
// From linux/if_link.h and linux/rtnetlink.h.
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;

/// Sets `IPV4_DEVCONF_*` values of an interface in the thread's network namespace.
///
/// # Errors
/// The kernel's answer.
pub(crate) fn set_inet_conf(index: u32, values: &[(u16, u32)]) -> io::Result<()> {
    let settings: Vec<u8> = values
        .iter()
        .flat_map(|(kind, value)| attribute(*kind, &value.to_ne_bytes()))
        .collect();
    let inet = u16::try_from(libc::AF_INET).unwrap_or(2);
    let spec = attribute(inet, &attribute(IFLA_INET_CONF, &settings));
    let body = [&link(index)[..], &attribute(IFLA_AF_SPEC, &spec)].concat();
    acknowledged(libc::RTM_SETLINK, &body)
}

/// A `struct ifinfomsg` that names an interface and changes nothing.
fn link(index: u32) -> [u8; 16] {
    let mut message = [0; 16];
    message[4..8].copy_from_slice(&index.to_ne_bytes());
    message
}

/// An attribute with its padding.
fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sends a request and waits for the kernel's answer, which comes at once.
fn acknowledged(kind: u16, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(HEADER + body.len()).map_err(Error::other)?;
    let mut request = len.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    // Sequence number 1, no sender.
    request.extend([1_u32.to_ne_bytes(), 0_u32.to_ne_bytes()].concat());
    request.extend(body);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the buffer is valid for its length during the call.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(Error::last_os_error());
    }
    let mut answer = [0_u8; 4096];
    // SAFETY: the buffer is valid for its length during the call.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            answer.as_mut_ptr().cast(),
            answer.len(),
            0,
        )
    };
    let got = usize::try_from(got).map_err(|_| Error::last_os_error())?;
    verdict(answer.get(..got).unwrap_or_default())
}

/// Reads the acknowledgement: an error number, 0 for none.
fn verdict(answer: &[u8]) -> io::Result<()> {
    let Some(([header, number], _)) = answer
        .split_at_checked(HEADER)
        .and_then(|(header, rest)| Some(([header, rest.get(..4)?], rest)))
    else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let kind = header.get(4..6).and_then(|b| b.try_into().ok());
    let number = number.try_into().map_or(0, i32::from_ne_bytes);
    match (kind.map(u16::from_ne_bytes), number) {
        (Some(NLMSG_ERROR), 0) => Ok(()),
        (Some(NLMSG_ERROR), n) => Err(Error::from_raw_os_error(n.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(attribute(1, &[7]), [5, 0, 1, 0, 7, 0, 0, 0]);
        assert_eq!(attribute(2, &[]), [4, 0, 2, 0]);
    }

    #[test]
    fn the_kernels_refusal_is_an_error_of_its_number() {
        // Nobody has this interface; without rights the answer is another, but an error too.
        assert!(set_inet_conf(i32::MAX.unsigned_abs(), &[(15, 1)]).is_err());
        assert!(verdict(&[0; 10]).is_err());
    }
}
