//! The vfio-user protocol, version 0.1 (https://qemu.readthedocs.io/en/latest/interop/vfio-user.html): one request, one
//! reply, over a unix stream socket. The server is not believed: sizes, numbers and identities in replies are checked.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::device::DeviceError;

/// Commands, in the order of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    DeviceGetInfo = 4,
    DeviceGetRegionInfo = 5,
    DeviceGetIrqInfo = 7,
    DeviceSetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    DeviceReset = 13,
}

const HEADER: usize = 16;
/// No reply here is longer: regions are read in registers.
const MOST: usize = 64 << 10;
/// Descriptors that a reply may carry.
const MOST_FDS: usize = 8;
/// In the flags: kind of message, and whether it reports an error.
const KIND: u32 = 0xf;
const REPLY: u32 = 1;
const ERROR: u32 = 1 << 5;
/// Ours; of the capabilities only limits matter, and we stay below all defaults.
const VERSION: &[u8] =
    b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0";

/// A reply.
pub(super) struct Reply {
    /// Everything behind the header.
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A connection after its handshake. When a reply breaks the protocol it is over: every later request fails.
pub(super) struct Connection {
    stream: UnixStream,
    next: u16,
    broken: bool,
}

impl Connection {
    /// Shakes hands. No answer may take longer than `patience`.
    pub(super) fn new(stream: UnixStream, patience: Duration) -> Result<Connection, DeviceError> {
        stream
            .set_read_timeout(Some(patience))
            .and_then(|()| stream.set_write_timeout(Some(patience)))
            .map_err(DeviceError::system("vfio-user socket"))?;
        let mut connection = Connection {
            stream,
            next: 0,
            broken: false,
        };
        let reply = connection.ask(Command::Version, VERSION, &[])?;
        let major = reply
            .body
            .get(..2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]));
        if major != Some(0) {
            connection.broken = true;
            return Err(DeviceError::Unsupported("this version of vfio-user"));
        }
        Ok(connection)
    }

    /// Sends a request and waits for its reply.
    pub(super) fn ask(
        &mut self,
        command: Command,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<Reply, DeviceError> {
        if self.broken {
            return Err(DeviceError::Gone);
        }
        let answer = self.exchange(command, body, fds);
        // An error that the server reports leaves the stream in step; anything else does not.
        match answer {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(refused)) => Err(DeviceError::System {
                step: name(command),
                source: refused,
            }),
            Err(e) => {
                self.broken = true;
                Err(e)
            }
        }
    }

    /// Whether the server is lost.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    fn exchange(
        &mut self,
        command: Command,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<io::Result<Reply>, DeviceError> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let size = u32::try_from(HEADER + body.len())
            .map_err(|_| DeviceError::Unsupported("a message of this length"))?;
        let mut head = [0; HEADER];
        head[..2].copy_from_slice(&id.to_ne_bytes());
        head[2..4].copy_from_slice(&(command as u16).to_ne_bytes());
        head[4..8].copy_from_slice(&size.to_ne_bytes());
        self.send(&head, body, fds)
            .map_err(DeviceError::system("send to the vfio-user server"))?;
        let (head, fds) = self
            .receive_head()
            .map_err(DeviceError::system("vfio-user reply"))?;
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let broken = |what: &str| {
            Err(DeviceError::Broken(format!(
                "vfio-user {}: {what}",
                name(command)
            )))
        };
        let flags = word(8);
        if head[..4] != [id.to_ne_bytes(), (command as u16).to_ne_bytes()].concat() {
            return broken("a reply to something else");
        }
        if flags & KIND != REPLY {
            return broken("no reply");
        }
        let size = usize::try_from(word(4)).unwrap_or(usize::MAX);
        if !(HEADER..=MOST).contains(&size) {
            return broken("the length of the reply");
        }
        let mut body = vec![0; size - HEADER];
        self.stream
            .read_exact(&mut body)
            .map_err(DeviceError::system("vfio-user reply"))?;
        if flags & ERROR != 0 {
            let code = i32::try_from(word(12))
                .ok()
                .filter(|c| (1..4096).contains(c));
            return Ok(Err(io::Error::from_raw_os_error(code.unwrap_or(libc::EIO))));
        }
        Ok(Ok(Reply { body, fds }))
    }

    fn send(&mut self, head: &[u8], body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let parts = [IoSlice::new(head), IoSlice::new(body)];
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() {
            &rights[..0]
        } else {
            &rights
        };
        let fd = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
        // The rest, if any, goes without the descriptors.
        let whole = [head, body].concat();
        self.stream.write_all(whole.get(sent..).unwrap_or_default())
    }

    fn receive_head(&mut self) -> io::Result<([u8; HEADER], Vec<OwnedFd>)> {
        let mut head = [0; HEADER];
        let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
        let (n, fds) = {
            let mut parts = [IoSliceMut::new(&mut head)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let got = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
            let mut fds = Vec::new();
            for message in got.cmsgs()? {
                if let ControlMessageOwned::ScmRights(list) = message {
                    // SAFETY: the kernel just made these descriptors for us; nobody else knows them.
                    fds.extend(
                        list.into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
            }
            (got.bytes, fds)
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest = head.get_mut(n..).unwrap_or_default();
        self.stream.read_exact(rest)?;
        Ok((head, fds))
    }
}

fn name(command: Command) -> &'static str {
    match command {
        Command::Version => "handshake",
        Command::DmaMap => "map memory",
        Command::DmaUnmap => "unmap memory",
        Command::DeviceGetInfo => "device information",
        Command::DeviceGetRegionInfo => "region information",
        Command::DeviceGetIrqInfo => "interrupt information",
        Command::DeviceSetIrqs => "connect interrupts",
        Command::RegionRead => "read register",
        Command::RegionWrite => "write register",
        Command::DeviceReset => "reset",
    }
}
