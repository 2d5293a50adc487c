//! The socket: whole messages with their files, and the thread that serves them.

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::cell::Shared;
use super::message::{HEADER, Header, MAX_FDS, Message, MessageError};
use super::session::{Session, SessionError};
use super::{Place, Role};

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(500);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the peer closed it")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("files that could not be taken over")]
    Files,
    #[error("the peer took shared memory away")]
    MemoryLost,
    #[error("the port was closed")]
    Stopped,
}

/// A message that is on its way in.
#[derive(Default)]
struct Incoming {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Incoming {
    /// Reads on; a whole message when there is one, `None` when the socket has no more for now.
    fn next(&mut self, socket: &UnixStream) -> Result<Option<Message>, Ended> {
        loop {
            let header = match self.bytes.first_chunk::<HEADER>() {
                Some(bytes) => Some(Header::parse(*bytes)?),
                None => None,
            };
            // Never past the end of this message, so that files stay with the message that brought them.
            let whole = HEADER + header.map_or(0, |h| h.size);
            if let Some(header) = header
                && self.bytes.len() >= whole
            {
                let bytes = std::mem::take(&mut self.bytes);
                let fds = std::mem::take(&mut self.fds);
                let payload = bytes.get(HEADER..).unwrap_or_default();
                return Ok(Some(Message::parse(header, payload, fds)?));
            }
            let mut buffer = vec![0; whole - self.bytes.len()];
            match receive(socket, &mut buffer, &mut self.fds) {
                Ok(0) => return Err(Ended::Closed),
                Ok(n) => self.bytes.extend(buffer.get(..n).unwrap_or_default()),
                Err(Ended::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(Ended::Io(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.fds.len() > MAX_FDS {
                return Err(Ended::Files);
            }
        }
    }
}

/// Reads bytes and the files that come with them.
fn receive(socket: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Ended> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let got = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)
        .map_err(io::Error::from)?;
    let truncated = got.flags.contains(MsgFlags::MSG_CTRUNC);
    for message in got.cmsgs().map_err(io::Error::from)? {
        if let ControlMessageOwned::ScmRights(list) = message {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
            fds.extend(
                list.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    if truncated {
        return Err(Ended::Files);
    }
    Ok(got.bytes)
}

/// Serves one peer after the other until the port is closed.
pub(super) fn run(shared: &Arc<Shared>, place: &Place, listener: Option<UnixListener>, mtu: u32) {
    while !shared.stop.load(Acquire) {
        let Some(socket) = next_peer(shared, place, listener.as_ref()) else {
            continue;
        };
        shared.counts.connections.fetch_add(1, Relaxed);
        shared.connected.store(true, Release);
        tracing::info!(port = %shared.name, "vhost-user peer connected");
        let ended = serve(shared, &socket, listener.as_ref(), mtu);
        shared.connected.store(false, Release);
        match ended {
            Ended::Closed | Ended::Stopped => {
                tracing::info!(port = %shared.name, reason = %ended, "vhost-user connection ended");
            }
            _ => {
                shared.counts.protocol_errors.fetch_add(1, Relaxed);
                tracing::warn!(port = %shared.name, reason = %ended, "vhost-user connection ended");
                // A peer that does so again and again gets no more of the machine than this.
                wait(shared, None, Duration::from_millis(100));
            }
        }
    }
    if listener.is_some() {
        // Gone already, or not ours to remove any more after privileges were dropped.
        let _ = std::fs::remove_file(&place.path);
    }
    shared.ended.store(true, Release);
}

/// Waits for a peer, or connects to it; `None` when there is none yet.
fn next_peer(
    shared: &Shared,
    place: &Place,
    listener: Option<&UnixListener>,
) -> Option<UnixStream> {
    let socket = match (place.role, listener) {
        (Role::Server, Some(listener)) => {
            wait(shared, Some(listener.as_fd()), Duration::from_secs(3600));
            listener.accept().ok()?.0
        }
        _ => match UnixStream::connect(&place.path) {
            Ok(socket) => socket,
            Err(_) => {
                wait(shared, None, RETRY);
                return None;
            }
        },
    };
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

/// Sleeps until the doorbell rings or `fd` is readable; true when `fd` is. The doorbell is silent afterwards.
fn wait(shared: &Shared, fd: Option<std::os::fd::BorrowedFd<'_>>, longest: Duration) -> bool {
    let mut fds = vec![PollFd::new(shared.doorbell.as_fd(), PollFlags::POLLIN)];
    fds.extend(fd.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
    let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
    let _ = nix::poll::poll(&mut fds, timeout);
    let ready = fds.get(1).and_then(PollFd::any).unwrap_or(false);
    // Not readable means that nobody rang.
    let _ = shared.doorbell.read();
    ready
}

fn serve(
    shared: &Arc<Shared>,
    socket: &UnixStream,
    listener: Option<&UnixListener>,
    mtu: u32,
) -> Ended {
    let mut session = Session::new(Arc::clone(shared), mtu);
    let mut incoming = Incoming::default();
    loop {
        if shared.stop.load(Acquire) {
            return Ended::Stopped;
        }
        if session.memory_lost() {
            return Ended::MemoryLost;
        }
        let ready = wait(shared, Some(socket.as_fd()), Duration::from_secs(1));
        session.serve_workers();
        // One peer at a time: whoever else comes is sent away, so that it can try elsewhere or again.
        while let Some(Ok((other, _))) = listener.map(UnixListener::accept) {
            drop(other);
        }
        if !ready {
            continue;
        }
        loop {
            let message = match incoming.next(socket) {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(e) => return e,
            };
            tracing::debug!(port = %shared.name, ?message, "vhost-user");
            match session.handle(message) {
                Ok(None) => {}
                // A peer that does not read its answers is not waited for.
                Ok(Some(answer)) => match (&*socket).write(&answer) {
                    Ok(n) if n == answer.len() => {}
                    Ok(_) => return Ended::Closed,
                    Err(e) => return e.into(),
                },
                Err(e) => return e.into(),
            }
        }
    }
}
