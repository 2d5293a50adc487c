//! The way to the kernel: one socket that follows, one that asks.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_xfrm::XfrmMessage;
use netlink_packet_xfrm::constants::{
    XFRM_MSG_MIGRATE, XFRMNLGRP_EXPIRE, XFRMNLGRP_MIGRATE, XFRMNLGRP_POLICY, XFRMNLGRP_SA,
};
use netlink_sys::protocols::NETLINK_XFRM;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use zeroize::Zeroizing;

use super::message::is_whole;

/// Largest datagram of the kernel's: a dump's page.
const DATAGRAM: usize = 64 * 1024;
/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Something that the kernel sent.
pub(super) enum Heard {
    /// A message.
    Message(Box<XfrmMessage>),
    /// What follows from here on may be wrong: messages were lost, or one was not understood.
    Lost(&'static str),
}

/// Follows what changes.
#[derive(Debug)]
pub(super) struct Follower {
    socket: Socket,
    buffer: Zeroizing<Vec<u8>>,
}

impl AsRawFd for Follower {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Follower {
    /// `receive_buffer`: bytes that the kernel may be ahead of us. Needs CAP_NET_ADMIN.
    pub(super) fn open(receive_buffer: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM)?;
        socket.bind_auto()?;
        // Beyond the system's limit where we may.
        if setsockopt(&socket, sockopt::RcvBufForce, &receive_buffer).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &receive_buffer)?;
        }
        for group in [
            XFRMNLGRP_EXPIRE,
            XFRMNLGRP_SA,
            XFRMNLGRP_POLICY,
            XFRMNLGRP_MIGRATE,
        ] {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self {
            socket,
            buffer: Zeroizing::new(vec![0; DATAGRAM]),
        })
    }

    /// Takes what is there, one datagram. `WouldBlock` when there is none.
    pub(super) fn take(&mut self, heard: &mut Vec<Heard>) -> io::Result<()> {
        match receive(&self.socket, &mut self.buffer) {
            Ok(datagram) => {
                decode(datagram, &mut |m| match m {
                    Decoded::Message(m) => heard.push(Heard::Message(m)),
                    Decoded::Migrated => heard.push(Heard::Lost("SAs have migrated")),
                    Decoded::Nonsense => heard.push(Heard::Lost("a message was not understood")),
                    Decoded::Done | Decoded::Error(_) => {}
                });
                Ok(())
            }
            Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                heard.push(Heard::Lost(
                    "the kernel was faster than its socket's buffer",
                ));
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}

/// Asks, and waits for the answer: some ten microseconds each.
#[derive(Debug)]
pub(super) struct Asker {
    socket: Socket,
    buffer: Zeroizing<Vec<u8>>,
    sequence: u32,
}

impl Asker {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let micros = i64::try_from(PATIENCE.as_micros()).unwrap_or(i64::MAX);
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::microseconds(micros),
        )?;
        Ok(Self {
            socket,
            buffer: Zeroizing::new(vec![0; DATAGRAM]),
            sequence: 0,
        })
    }

    /// Begins to ask for everything of a kind; [`hear`](Self::hear) gives the pages.
    pub(super) fn begin_dump(&mut self, what: XfrmMessage) -> io::Result<()> {
        self.send(what, NLM_F_DUMP)
    }

    /// Everything of a kind.
    pub(super) fn dump(&mut self, what: XfrmMessage) -> io::Result<Vec<XfrmMessage>> {
        self.begin_dump(what)?;
        let mut all = Vec::new();
        loop {
            let (found, ended) = self.hear()?;
            all.extend(found);
            if ended {
                return Ok(all);
            }
        }
    }

    /// One thing.
    pub(super) fn get(&mut self, what: XfrmMessage) -> io::Result<Option<XfrmMessage>> {
        self.send(what, 0)?;
        let (found, _) = self.hear()?;
        Ok(found.into_iter().next())
    }

    /// A change; an error is the kernel's answer. `replace`: for what must exist already.
    pub(super) fn tell(&mut self, what: XfrmMessage, replace: bool) -> io::Result<()> {
        self.send(what, NLM_F_ACK | if replace { NLM_F_REPLACE } else { 0 })?;
        while !self.hear()?.1 {}
        Ok(())
    }

    fn send(&mut self, what: XfrmMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(what));
        message.finalize();
        let mut bytes = Zeroizing::new(vec![0; message.buffer_len()]);
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// One datagram of answers: messages, and whether it was the last.
    pub(super) fn hear(&mut self) -> io::Result<(Vec<XfrmMessage>, bool)> {
        loop {
            let wanted = self.sequence;
            let datagram = receive(&self.socket, &mut self.buffer)?;
            // An answer to a question that was given up.
            if sequence_of(datagram) != Some(wanted) {
                continue;
            }
            let (mut found, mut ended, mut error) = (Vec::new(), false, None);
            decode(datagram, &mut |m| match m {
                Decoded::Message(m) => found.push(*m),
                Decoded::Migrated => {}
                Decoded::Done => ended = true,
                Decoded::Error(e) => {
                    ended = true;
                    error = e;
                }
                Decoded::Nonsense => {
                    error = Some(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the kernel's answer was not understood",
                    ));
                }
            });
            return match error {
                Some(e) => Err(e),
                None => Ok((found, ended)),
            };
        }
    }
}

fn receive<'b>(socket: &Socket, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let mut room = &mut buffer[..];
    let n = socket.recv(&mut room, 0)?;
    Ok(buffer.get(..n).unwrap_or_default())
}

fn sequence_of(datagram: &[u8]) -> Option<u32> {
    NetlinkBuffer::new_checked(&datagram)
        .ok()
        .map(|b| b.sequence_number())
}

/// One message of a datagram.
pub(super) enum Decoded {
    Message(Box<XfrmMessage>),
    /// SAs were given other addresses; only a dump tells which.
    Migrated,
    /// A dump's end.
    Done,
    /// An answer's end, good or bad.
    Error(Option<io::Error>),
    Nonsense,
}

/// Cuts a datagram into messages.
pub(super) fn decode(mut datagram: &[u8], each: &mut dyn FnMut(Decoded)) {
    const HEADER: usize = 16;
    const FIRST_OF_XFRM: u16 = 0x10;
    while !datagram.is_empty() {
        let Ok(header) = NetlinkBuffer::new_checked(&datagram) else {
            each(Decoded::Nonsense);
            return;
        };
        let length = usize::try_from(header.length()).unwrap_or(usize::MAX);
        let (kind, body) = (header.message_type(), datagram.get(HEADER..length));
        let Some(body) = body else {
            each(Decoded::Nonsense);
            return;
        };
        if kind == XFRM_MSG_MIGRATE {
            each(Decoded::Migrated);
        } else if kind < FIRST_OF_XFRM || is_whole(kind, body) {
            let whole = datagram.get(..length).unwrap_or_default();
            each(match NetlinkMessage::<XfrmMessage>::deserialize(whole) {
                Ok(m) => match m.payload {
                    NetlinkPayload::InnerMessage(m) => Decoded::Message(Box::new(m)),
                    NetlinkPayload::Done(_) => Decoded::Done,
                    NetlinkPayload::Error(e) => {
                        Decoded::Error((e.raw_code() != 0).then(|| e.to_io()))
                    }
                    NetlinkPayload::Overrun(_) => Decoded::Nonsense,
                    _ => {
                        datagram = rest(datagram, length);
                        continue;
                    }
                },
                Err(_) => Decoded::Nonsense,
            });
        }
        datagram = rest(datagram, length);
    }
}

/// What follows a message: they are aligned to four bytes.
fn rest(datagram: &[u8], length: usize) -> &[u8] {
    datagram
        .get(length.next_multiple_of(4)..)
        .unwrap_or_default()
}
