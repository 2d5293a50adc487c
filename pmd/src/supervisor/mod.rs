//! A small parent process for gateways that own devices without an IOMMU.
//!
//! When a process is killed, the kernel frees its memory first and closes its files later. Behind an IOMMU that is no harm: the
//! memory stays pinned until the device's mappings go. Without one, a NIC goes on receiving into memory that is somebody
//! else's by then. So the gateway runs as the child of a supervisor that holds a duplicate of everything that keeps the
//! memory and the devices: the memory's files, so that no page is freed, and the devices' files, so that it can stop them.
//! After the child has ended, however it did, the supervisor
//!
//! 1. takes the bus-master right from each device, reads back that it is gone, and resets it,
//! 2. only then closes the files, which frees the memory.
//!
//! A device that can neither be stopped nor reset keeps the supervisor, and with it the memory, until it can.
//!
//! The child registers each file **before** the device may transfer for the first time and waits for the answer ([`keep_memory`],
//! [`keep_device`]). It does not go on when its supervisor has gone ([`is_gone`]): the gateway stops in order.
//!
//! What it cannot do: help when both processes are killed at once, the kernel crashes, or a device ignores its bus-master bit.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, send, sendmsg, sockopt,
};

use crate::device::DeviceError;

mod keeper;
mod process;

pub use keeper::{Keeper, StopDevice};
pub use process::supervise;

/// First byte of a message: what the file is.
const MEMORY: u8 = 1;
const DEVICE: u8 = 2;
/// The supervisor's answers.
const KEPT: u8 = 1;
const REFUSED: u8 = 0;
/// Longest name of a device.
const NAME_MAX: usize = 63;
/// Files that one message may carry; one is expected.
const FILES_MAX: usize = 4;

/// The way to the supervisor, if this process has one.
static SUPERVISOR: OnceLock<Mutex<OwnedFd>> = OnceLock::new();

/// Uses `socket`, which a supervisor made, for all devices that this process opens from now on. Lets the signals through that the
/// supervisor blocked for itself, and its child with it: to be called before there are threads.
///
/// # Errors
/// It is not such a socket; there is a supervisor already.
pub fn attach(socket: OwnedFd) -> io::Result<()> {
    let kind = getsockopt(&socket, sockopt::SockType)?;
    if kind != nix::sys::socket::SockType::SeqPacket {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a supervisor's socket",
        ));
    }
    process::signals().thread_unblock()?;
    let taken = |_| {
        io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is a supervisor already",
        )
    };
    SUPERVISOR.set(Mutex::new(socket)).map_err(taken)
}

/// Whether this process has a supervisor.
pub fn is_attached() -> bool {
    SUPERVISOR.get().is_some()
}

/// Whether the supervisor that this process had has ended.
pub fn is_gone() -> bool {
    let Some(socket) = SUPERVISOR.get() else {
        return false;
    };
    let socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    // Hang-up and error are reported without being asked for.
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// Has the supervisor hold memory that a device will reach. Nothing to do without one.
pub(crate) fn keep_memory(file: BorrowedFd<'_>) -> Result<(), DeviceError> {
    ask(MEMORY, "", file)
}

/// Has the supervisor hold a device that is about to be used. Nothing to do without one.
pub(crate) fn keep_device(name: &str, file: BorrowedFd<'_>) -> Result<(), DeviceError> {
    ask(DEVICE, name, file)
}

fn ask(kind: u8, name: &str, file: BorrowedFd<'_>) -> Result<(), DeviceError> {
    let Some(socket) = SUPERVISOR.get() else {
        return Ok(());
    };
    let socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
    exchange(&socket, kind, name, file).map_err(DeviceError::system("have the supervisor hold it"))
}

/// One question and its answer.
fn exchange(socket: &OwnedFd, kind: u8, name: &str, file: BorrowedFd<'_>) -> io::Result<()> {
    if name.len() > NAME_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let message = [&[kind], name.as_bytes()].concat();
    let files = [file.as_raw_fd()];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&message)],
        &[ControlMessage::ScmRights(&files)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    let mut answer = [0; 2];
    match nix::sys::socket::recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())? {
        1 if answer[0] == KEPT => Ok(()),
        0 => Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "the supervisor has ended",
        )),
        _ => Err(io::Error::other("the supervisor refuses")),
    }
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Request {
    Memory,
    Device(String),
}

impl Request {
    fn parse(bytes: &[u8]) -> Option<Request> {
        match bytes {
            [MEMORY] => Some(Request::Memory),
            [DEVICE, name @ ..] if !name.is_empty() && name.len() <= NAME_MAX => {
                Some(Request::Device(String::from_utf8(name.to_vec()).ok()?))
            }
            _ => None,
        }
    }
}

/// Receives one message and its files; `None` at the end of the connection.
fn receive(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = [0; NAME_MAX + 2];
    let mut space = nix::cmsg_space!([RawFd; FILES_MAX]);
    let mut files = Vec::new();
    let n = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let got = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(list) = message {
                // SAFETY: the kernel just made these descriptors for us; nobody else knows them.
                files.extend(
                    list.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        got.bytes
    };
    let bytes = bytes.get(..n).unwrap_or_default().to_vec();
    Ok((n > 0).then_some((bytes, files)))
}

fn answer(socket: &OwnedFd, kept: bool) -> io::Result<()> {
    let byte = [if kept { KEPT } else { REFUSED }];
    send(socket.as_raw_fd(), &byte, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}
