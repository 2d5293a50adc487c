//! Surviving a peer that takes its memory away.
//!
//! A peer may shorten the file that it shares with us at any time, or punch holes into it when no more huge pages are free; the
//! next access is then answered with SIGBUS. Seals would forbid the first only, and most peers do not seal. So the answer is
//! here: the ranges of peer memory are registered, and a SIGBUS in one of them puts zero pages of our own in its place and
//! marks the range as lost. The access goes on, reads zeros, and the session ends at the next look at [`Guard::lost`]. A SIGBUS
//! anywhere else goes to whoever handled it before.

use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Mutex, Once, PoisonError};

/// Most ranges registered at a time, over all peers.
const MOST: usize = 1024;

struct Range {
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

static RANGES: [Range; MOST] = [const {
    Range {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MOST];
static TAKEN: Mutex<[bool; MOST]> = Mutex::new([false; MOST]);
static INSTALL: Once = Once::new();
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// The handler before ours.
static BEFORE: AtomicUsize = AtomicUsize::new(0);
static BEFORE_TAKES_INFO: AtomicBool = AtomicBool::new(false);

type InfoHandler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
type PlainHandler = extern "C" fn(libc::c_int);

/// A registered range; ends on drop, which must be before the range is unmapped.
#[derive(Debug)]
pub(super) struct Guard(usize);

impl Guard {
    /// Registers `len` bytes at `start`, a mapping with pages of `page` bytes. `None` when too many are registered or the
    /// system refuses the handler.
    ///
    /// # Safety
    /// The range is a whole mapping that holds peer memory only, so that zero pages may be put in its place at any time; it
    /// stays mapped until the guard is dropped.
    pub(super) unsafe fn new(start: usize, len: usize, page: usize) -> Option<Guard> {
        INSTALL.call_once(install);
        if !INSTALLED.load(Acquire) {
            return None;
        }
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let index = taken.iter().position(|t| !t)?;
        let range = &RANGES[index];
        range.lost.store(false, Relaxed);
        range.page.store(page.max(4096), Relaxed);
        range.len.store(len, Relaxed);
        range.start.store(start, Release);
        taken[index] = true;
        Some(Guard(index))
    }

    /// Whether the peer took memory of the range away.
    #[inline(always)]
    pub(super) fn lost(&self) -> bool {
        RANGES[self.0].lost.load(Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RANGES[self.0].start.store(0, Release);
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner)[self.0] = false;
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid one; the handler has the signature that SA_SIGINFO asks for and does only what
    // a signal handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut before: libc::sigaction = std::mem::zeroed();
        let handler: InfoHandler = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) != 0 {
            return;
        }
        BEFORE.store(before.sa_sigaction, Relaxed);
        BEFORE_TAKES_INFO.store(before.sa_flags & libc::SA_SIGINFO != 0, Relaxed);
        let done = libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) == 0;
        INSTALLED.store(done, Release);
    }
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a valid siginfo to a handler with SA_SIGINFO; errno is this thread's own; what was stored in
    // BEFORE is the address of a handler of the kind that BEFORE_TAKES_INFO says.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let mended = mend((*info).si_addr().addr());
        *errno = saved;
        if mended {
            return;
        }
        let before = BEFORE.load(Relaxed);
        if before == libc::SIG_DFL || before == libc::SIG_IGN {
            // The access is tried again and ends the process as if we were not here.
            libc::signal(signal, libc::SIG_DFL);
        } else if BEFORE_TAKES_INFO.load(Relaxed) {
            std::mem::transmute::<usize, InfoHandler>(before)(signal, info, context);
        } else {
            std::mem::transmute::<usize, PlainHandler>(before)(signal);
        }
    }
}

/// Puts zero pages where peer memory was; false when the address is in no range or the system has no memory.
fn mend(address: usize) -> bool {
    for range in &RANGES {
        let start = range.start.load(Acquire);
        let len = range.len.load(Relaxed);
        if start == 0 || address < start || address - start >= len {
            continue;
        }
        range.lost.store(true, Relaxed);
        let page = range.page.load(Relaxed);
        let first = address - (address - start) % page;
        // All of it at once; where the system is strict about memory, what was touched.
        return zero_pages(start, len) || zero_pages(first, page.min(start + len - first));
    }
    false
}

fn zero_pages(start: usize, len: usize) -> bool {
    // SAFETY: `Guard::new`'s caller says that the range is peer memory of a mapping that stays; new pages there change only
    // what is read, as a write of the peer would.
    let got = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    got.addr() == start
}
