//! Messages of the vfio-user protocol, version 0.1, as a server reads and writes them
//! (https://qemu.readthedocs.io/en/latest/interop/vfio-user.html). The client is not believed.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::sys::receive;

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const GET_REGION_INFO: u16 = 5;
pub(crate) const GET_IRQ_INFO: u16 = 7;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const RESET: u16 = 13;

/// What the server says of itself in the handshake.
pub(crate) const CAPABILITIES: &[u8] =
    b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":4096}}\0";

/// Longest message taken.
const MOST: usize = 64 << 10;
const HEADER: usize = 16;
const KIND: u32 = 0xf;
const COMMAND: u32 = 0;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// A request.
pub(crate) struct Request {
    id: u16,
    pub(crate) command: u16,
    wants_reply: bool,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Request {
    /// Waits for the next request; `None` when the client has hung up.
    pub(crate) fn receive(stream: &mut UnixStream) -> io::Result<Option<Request>> {
        let mut head = [0; HEADER];
        let (n, fds) = receive(stream, &mut head)?;
        if n == 0 {
            return Ok(None);
        }
        stream.read_exact(head.get_mut(n..).unwrap_or_default())?;
        let half = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        let word =
            |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let broken = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let size = usize::try_from(word(4)).unwrap_or(usize::MAX);
        if !(HEADER..=MOST).contains(&size) {
            return broken("the length of a message");
        }
        let flags = word(8);
        if flags & KIND != COMMAND {
            return broken("a message that is no command");
        }
        let mut body = vec![0; size - HEADER];
        stream.read_exact(&mut body)?;
        Ok(Some(Request {
            id: half(0),
            command: half(2),
            wants_reply: flags & NO_REPLY == 0,
            body,
            fds,
        }))
    }

    /// Answers with a body, or with an error number.
    pub(crate) fn answer(
        &self,
        stream: &mut UnixStream,
        answer: &Result<Vec<u8>, i32>,
    ) -> io::Result<()> {
        if !self.wants_reply {
            return Ok(());
        }
        let (body, flags, error) = match answer {
            Ok(body) => (body.as_slice(), REPLY, 0),
            Err(code) => (&[][..], REPLY | ERROR, code.unsigned_abs()),
        };
        let size = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(self.id.to_ne_bytes());
        message.extend(self.command.to_ne_bytes());
        message.extend(size.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(error.to_ne_bytes());
        message.extend(body);
        stream.write_all(&message)
    }

    /// The 32-bit number at byte `at` of the body.
    pub(crate) fn word(&self, at: usize) -> Result<u32, i32> {
        let bytes = self.body.get(at..).and_then(|b| b.first_chunk());
        bytes.map(|b| u32::from_ne_bytes(*b)).ok_or(libc::EINVAL)
    }

    /// The 64-bit number at byte `at` of the body.
    pub(crate) fn long(&self, at: usize) -> Result<u64, i32> {
        let bytes = self.body.get(at..).and_then(|b| b.first_chunk());
        bytes.map(|b| u64::from_ne_bytes(*b)).ok_or(libc::EINVAL)
    }
}
