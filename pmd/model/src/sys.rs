//! Shared memory, passed descriptors, TAP interfaces: all `unsafe` of this crate.

#![allow(
    unsafe_code,
    reason = "memory that another process writes at the same time, and descriptors that arrive as numbers"
)]

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Descriptors that one message may carry.
pub(crate) const MOST_FDS: usize = 8;

/// A part of a file that the driver shares. The driver may change it at any time, so it is only ever read and written by
/// volatile accesses of aligned words and bytes, never behind a reference.
pub(crate) struct SharedMap {
    map: MmapRaw,
}

impl SharedMap {
    /// Maps `len` bytes at `offset`. The file must be sealed against shrinking: an access behind its end would end this process.
    pub(crate) fn new(file: &File, offset: u64, len: usize) -> io::Result<SharedMap> {
        let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return refuse("memory whose file can shrink");
        }
        let size = file.metadata()?.len();
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= size);
        if len == 0 || !inside || !offset.is_multiple_of(4096) {
            return refuse("memory that is not in its file, in whole pages");
        }
        let map = MmapOptions::new().offset(offset).len(len).map_raw(file)?;
        Ok(SharedMap { map })
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Copies out; false, with nothing copied, when the bytes are not all inside.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        if !self.holds(offset, out.len()) {
            return false;
        }
        let from = self.map.as_mut_ptr().wrapping_add(offset).cast_const();
        let head = from.align_offset(8).min(out.len());
        let (first, rest) = out.split_at_mut(head);
        let (words, last) = rest.as_chunks_mut::<8>();
        for (i, byte) in first.iter_mut().enumerate() {
            // SAFETY: `holds` found the whole range inside the mapping, which lives as long as `self`.
            *byte = unsafe { from.add(i).read_volatile() };
        }
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: as above; `from + head` is a multiple of 8 when there are whole words behind it.
            let value = unsafe { from.add(head + 8 * i).cast::<u64>().read_volatile() };
            *word = value.to_ne_bytes();
        }
        let at = head + 8 * words.len();
        for (i, byte) in last.iter_mut().enumerate() {
            // SAFETY: as above.
            *byte = unsafe { from.add(at + i).read_volatile() };
        }
        true
    }

    /// Copies in; false, with nothing copied, when the bytes do not all fit.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if !self.holds(offset, bytes.len()) {
            return false;
        }
        let to = self.map.as_mut_ptr().wrapping_add(offset);
        let head = to.align_offset(8).min(bytes.len());
        let (first, rest) = bytes.split_at(head);
        let (words, last) = rest.as_chunks::<8>();
        for (i, byte) in first.iter().enumerate() {
            // SAFETY: `holds` found the whole range inside the mapping, which lives as long as `self`.
            unsafe { to.add(i).write_volatile(*byte) };
        }
        for (i, word) in words.iter().enumerate() {
            // SAFETY: as above; `to + head` is a multiple of 8 when there are whole words behind it.
            unsafe {
                to.add(head + 8 * i)
                    .cast::<u64>()
                    .write_volatile(u64::from_ne_bytes(*word));
            }
        }
        let at = head + 8 * words.len();
        for (i, byte) in last.iter().enumerate() {
            // SAFETY: as above.
            unsafe { to.add(at + i).write_volatile(*byte) };
        }
        true
    }

    /// Reads one word at a multiple of 4, in one access.
    pub(crate) fn read32(&self, offset: usize) -> Option<u32> {
        if !self.holds(offset, 4) || !offset.is_multiple_of(4) {
            return None;
        }
        let from = self.map.as_mut_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: inside the mapping, which begins at a page, and so aligned.
        Some(u32::from_le(unsafe { from.read_volatile() }))
    }

    /// Writes one word at a multiple of 4, in one access.
    pub(crate) fn write32(&self, offset: usize, value: u32) -> Option<()> {
        if !self.holds(offset, 4) || !offset.is_multiple_of(4) {
            return None;
        }
        let to = self.map.as_mut_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: as in `read32`.
        unsafe { to.write_volatile(value.to_le()) };
        Some(())
    }

    fn holds(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }
}

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);

/// Makes an open `/dev/net/tun` the TAP interface `name`.
pub(crate) fn become_tap(file: &File, name: &str) -> io::Result<()> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains('\0');
    if !fits {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no name of an interface",
        ));
    }
    let flags = libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI)
        .map_err(|_| io::ErrorKind::Unsupported)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the request is a whole ifreq and lives as long as the call, which reads name and flags of it.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Reads up to `out.len()` bytes and the descriptors that come with them.
pub(crate) fn receive(stream: &UnixStream, out: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let mut parts = [IoSliceMut::new(out)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
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
    Ok((got.bytes, fds))
}
