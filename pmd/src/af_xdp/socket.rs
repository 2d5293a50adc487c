//! The system calls of an AF_XDP socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::ring::{Consume, Produce, Ring};

/// A socket with its memory registered and its rings mapped.
pub(super) struct Socket {
    pub(super) fill: Ring<u64, Produce>,
    pub(super) completion: Ring<u64, Consume>,
    pub(super) rx: Ring<libc::xdp_desc, Consume>,
    pub(super) tx: Ring<libc::xdp_desc, Produce>,
    pub(super) fd: OwnedFd,
}

/// The memory that frames lie in, as the kernel wants it described.
#[derive(Debug, Clone, Copy)]
pub(super) struct Umem {
    pub(super) base: *mut u8,
    pub(super) len: u64,
    pub(super) chunk: u32,
    pub(super) unaligned: bool,
}

/// Not in libc yet: how many packets one send call may push in copy mode (Linux 6.18).
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

impl Socket {
    /// Makes a socket in the network namespace of the calling thread.
    ///
    /// # Safety
    /// The memory of `umem` stays mapped until the kernel has let go of the socket (see [`Trial`]), and no Rust reference to a
    /// frame exists while its address is in the fill or send ring.
    pub(super) unsafe fn new(umem: Umem, ring: u32) -> Result<Socket, (&'static str, io::Error)> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(("AF_XDP socket", io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let register = libc::xdp_umem_reg {
            addr: umem.base.expose_provenance() as u64,
            len: umem.len,
            chunk_size: umem.chunk,
            headroom: 0,
            flags: if umem.unaligned {
                libc::XDP_UMEM_UNALIGNED_CHUNK_FLAG
            } else {
                0
            },
            tx_metadata_len: 0,
        };
        let set = |option, step| set_option(&fd, option, &ring).map_err(|e| (step, e));
        set_option(&fd, libc::XDP_UMEM_REG, &register)
            .map_err(|e| ("register the packet memory", e))?;
        set(libc::XDP_UMEM_FILL_RING, "fill ring")?;
        set(libc::XDP_UMEM_COMPLETION_RING, "completion ring")?;
        set(libc::XDP_RX_RING, "receive ring")?;
        set(libc::XDP_TX_RING, "send ring")?;
        let offsets = mmap_offsets(&fd).map_err(|e| ("ring offsets", e))?;
        let map = |e| ("map a ring", e);
        let page_offset = |n: libc::off_t| u64::try_from(n).unwrap_or(0);
        let fill = Ring::map(&fd, libc::XDP_UMEM_PGOFF_FILL_RING, offsets.fr, ring).map_err(map)?;
        let completion =
            Ring::map(&fd, libc::XDP_UMEM_PGOFF_COMPLETION_RING, offsets.cr, ring).map_err(map)?;
        let rx =
            Ring::map(&fd, page_offset(libc::XDP_PGOFF_RX_RING), offsets.rx, ring).map_err(map)?;
        let tx =
            Ring::map(&fd, page_offset(libc::XDP_PGOFF_TX_RING), offsets.tx, ring).map_err(map)?;
        // Older kernels know no such option and send 32 packets a call.
        let _ = set_option(&fd, XDP_MAX_TX_SKB_BUDGET, &ring.min(512));
        Ok(Socket {
            fill,
            completion,
            rx,
            tx,
            fd,
        })
    }

    /// Joins the socket to a queue of an interface; `flags` choose copy or zero-copy. May be tried again when refused.
    pub(super) fn bind(&self, ifindex: u32, queue: u32, flags: u16) -> io::Result<()> {
        let address = libc::sockaddr_xdp {
            sxdp_family: u16::try_from(libc::AF_XDP).unwrap_or(0),
            sxdp_flags: flags,
            sxdp_ifindex: ifindex,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        // SAFETY: the address and its length describe a live sockaddr_xdp.
        let result = unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                u32::try_from(size_of_val(&address)).unwrap_or(0),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Makes the kernel send; an error means that it wants to be asked again.
    pub(super) fn kick_tx(&self) -> io::Result<()> {
        // SAFETY: nothing is passed but a null buffer of length 0.
        let result = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Makes the driver look at the fill ring.
    pub(super) fn kick_rx(&self) {
        // SAFETY: nothing is passed but a null buffer of length 0.
        unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
        }
    }

    /// What the kernel counted.
    pub(super) fn statistics(&self) -> io::Result<libc::xdp_statistics> {
        // SAFETY: all-zero is a valid xdp_statistics: it is plain integers.
        let mut statistics: libc::xdp_statistics = unsafe { std::mem::zeroed() };
        read_option(&self.fd, libc::XDP_STATISTICS, &mut statistics)?;
        Ok(statistics)
    }

    /// Whether the kernel uses the frames without a copy.
    pub(super) fn zero_copy(&self) -> bool {
        let mut options = libc::xdp_options { flags: 0 };
        read_option(&self.fd, libc::XDP_OPTIONS, &mut options).is_ok()
            && options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0
    }
}

/// Finds out when the kernel has let go of a closed socket's memory.
///
/// A driver may write into zero-copy frames until the kernel's deferred clean-up has stopped its queue. Until then the queue
/// counts as taken, so a trial socket with memory of its own cannot be bound to it. It is made beforehand, so that neither
/// the namespace nor the privileges of the thread that ends the queue matter.
pub(super) struct Trial {
    socket: Socket,
    _memory: memmap2::MmapMut,
}

impl Trial {
    pub(super) fn new() -> Result<Trial, (&'static str, io::Error)> {
        let mut memory = memmap2::MmapOptions::new()
            .len(8192)
            .map_anon()
            .map_err(|e| ("trial memory", e))?;
        let umem = Umem {
            base: memory.as_mut_ptr(),
            len: 8192,
            chunk: 4096,
            unaligned: false,
        };
        // SAFETY: nothing is ever put into this socket's fill or send ring, so the kernel never touches the memory, whose
        // pages it keeps by itself.
        let socket = unsafe { Socket::new(umem, 2) }?;
        Ok(Trial {
            socket,
            _memory: memory,
        })
    }

    /// Waits, at most `limit`; false when the kernel still holds the queue.
    pub(super) fn wait(self, ifindex: u32, queue: u32, limit: Duration) -> bool {
        let start = Instant::now();
        loop {
            match self.socket.bind(ifindex, queue, libc::XDP_COPY) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                // Bound, or refused for a reason that the kernel looks for later, or the interface is gone.
                _ => return true,
            }
            if start.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn set_option<T>(fd: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: pointer and length describe the live `value`, of the type that the option takes.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            u32::try_from(size_of::<T>()).unwrap_or(0),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Reads an option that is a struct of integers; an older kernel may fill only its beginning.
fn read_option<T>(fd: &OwnedFd, option: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut len = u32::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: pointer and length describe the live `value`, of which the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_mut(value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn mmap_offsets(fd: &OwnedFd) -> io::Result<libc::xdp_mmap_offsets> {
    // SAFETY: all-zero is a valid xdp_mmap_offsets: it is plain integers.
    let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
    read_option(fd, libc::XDP_MMAP_OFFSETS, &mut offsets)?;
    Ok(offsets)
}
