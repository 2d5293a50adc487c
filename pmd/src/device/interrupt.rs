//! Interrupts as file descriptors.

use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::DeviceError;

/// `n` non-blocking eventfds, and a second handle of each for the side that signals.
pub(crate) fn eventfds(n: usize) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), DeviceError> {
    let system = |e: nix::Error| DeviceError::system("eventfd")(e.into());
    let mut ours = Vec::with_capacity(n);
    let mut theirs = Vec::with_capacity(n);
    for _ in 0..n {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let fd: OwnedFd = EventFd::from_value_and_flags(0, flags)
            .map_err(system)?
            .into();
        theirs.push(fd.try_clone().map_err(DeviceError::system("dup"))?);
        ours.push(fd);
    }
    Ok((ours, theirs))
}
