//! The C side. Every `unsafe` of the crate is here.
//!
//! Rules that the functions rely on:
//! - a context of the scheduler was filled by its `expand`, which writes inside it only, or is all zeros; a context
//!   for GCM may hold any bytes: the shim checks the three that steer it, the rest is data to the library;
//! - a job borrows its context shared and its packet uniquely until the call returns;
//! - `esp_mb_start` has run: a context can be expanded only with a `Library`, and the shim refuses one that is all
//!   zeros, or any GCM context before the start, before it calls the library.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use zeroize::Zeroize;

use crate::{MAX_BATCH, Unavailable};

/// Lines that the build's probe found sufficient for the installed header.
const GCM_LINES: usize = parse(env!("ESPLANADE_CONTEXT_LINES"));
/// Checked against the C structure by a static assertion in shim.h.
const CHAIN_BYTES: usize = 384;

const fn parse(s: &str) -> usize {
    match usize::from_str_radix(s, 10) {
        Ok(n) => n,
        Err(_) => panic!("the build script gives a number"),
    }
}

#[repr(C)]
struct Manager {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn esp_mb_start(features: *mut u64, arch: *mut u32, version: *mut u32) -> i32;
    fn esp_mb_feature_vaes() -> u64;
    fn esp_mb_manager() -> *mut Manager;
    fn esp_mb_manager_free(m: *mut Manager);
    fn esp_mb_gcm_expand(
        ctx: *mut GcmContext,
        key: *const u8,
        salt: *const u8,
        kind: u8,
        tag_len: u8,
        esn: u8,
    );
    fn esp_mb_gcm_seal(jobs: *const Job, n: u32) -> u64;
    fn esp_mb_gcm_open(jobs: *const Job, n: u32) -> u64;
    fn esp_mb_gcm_one(ctx: *const u8, esp: *mut u8, len: u32, seq_hi: u32, seal: i32) -> u64;
    fn esp_mb_gcm_tag_len(ctx: *const GcmContext) -> u8;
    fn esp_mb_gcm_raw(
        ctx: *const GcmContext,
        iv: *const u8,
        aad: *const u8,
        aad_len: usize,
        data: *mut u8,
        len: usize,
        tag: *mut u8,
        seal: i32,
    );
    fn esp_mb_chain_expand(
        m: *mut Manager,
        ctx: *mut ChainContext,
        shape: *const Shape,
        enc: *const u8,
        auth: *const u8,
        auth_len: usize,
    );
    fn esp_mb_chain_run(m: *mut Manager, jobs: *const Job, n: u32, seal: i32) -> u64;
}

/// Starts the library: its version, and whether it runs VAES on 512-bit registers.
pub(crate) fn start() -> Result<(u32, bool), Unavailable> {
    let (mut features, mut arch, mut version) = (0, 0, 0);
    // SAFETY: the three pointers are to live integers of the declared types. `Library::get` calls this once.
    let rc = unsafe { esp_mb_start(&raw mut features, &raw mut arch, &raw mut version) };
    match rc {
        0 => {
            // SAFETY: takes nothing, returns a constant.
            let vaes = unsafe { esp_mb_feature_vaes() };
            Ok((version, features & vaes == vaes))
        }
        2 => Err(Unavailable::Older),
        3 => Err(Unavailable::SelfTest),
        _ => Err(Unavailable::Cpu),
    }
}

/// Asks for the cache lines under `bytes`.
#[inline]
fn prefetch(bytes: &[u8]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in bytes.chunks(64) {
        // SAFETY: prefetching reads nothing; the pointer is into `bytes`.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// `struct esp_gcm`.
#[repr(C, align(64))]
pub(crate) struct GcmContext([u8; 64 * GCM_LINES]);

impl GcmContext {
    pub(crate) const fn zeroed() -> Self {
        Self([0; 64 * GCM_LINES])
    }

    #[inline]
    pub(crate) const fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// `key` is 16, 24 or 32 bytes, as `kind` says.
    pub(crate) fn expand(&mut self, key: &[u8], salt: [u8; 4], kind: u8, tag_len: u8, esn: bool) {
        assert_eq!(key.len(), 16 + 8 * usize::from(kind % 3));
        // SAFETY: `self` is as large and aligned as the C structure (static assertions in shim.h); the
        // key has the length that the kind makes the library read, the salt 4 bytes.
        unsafe {
            esp_mb_gcm_expand(
                self,
                key.as_ptr(),
                salt.as_ptr(),
                kind,
                tag_len,
                u8::from(esn),
            );
        }
    }

    #[inline]
    pub(crate) fn prefetch(&self) {
        // Round keys are in front; the first powers of the hash key come last in version 1.3.
        let (front, rest) = self.0.split_at(4 * 64);
        prefetch(front);
        prefetch(&rest[rest.len() - 2 * 64..]);
    }

    pub(crate) fn raw(&self, nonce: &[u8; 12], aad: &[u8], data: &mut [u8], seal: bool) -> Vec<u8> {
        let mut tag = [0; 16];
        // SAFETY: reads one byte of a live context.
        let tag_len = usize::from(unsafe { esp_mb_gcm_tag_len(self) });
        if tag_len == 0 || tag_len > tag.len() {
            return Vec::new();
        }
        // SAFETY: every pointer comes from a slice whose length goes with it; the context was expanded
        // (its tag length is not 0), and the tag has room for the longest one.
        unsafe {
            esp_mb_gcm_raw(
                self,
                nonce.as_ptr(),
                aad.as_ptr(),
                aad.len(),
                data.as_mut_ptr(),
                data.len(),
                tag.as_mut_ptr(),
                i32::from(seal),
            );
        }
        tag[..tag_len].to_vec()
    }
}

impl Drop for GcmContext {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Any bytes as a context: those of the wrong size or alignment are replaced by one that refuses, and the shim
/// checks the fields that steer it.
#[inline]
fn context(block: &[u8]) -> *const u8 {
    static REFUSES: GcmContext = GcmContext::zeroed();
    let aligned = block
        .as_ptr()
        .addr()
        .is_multiple_of(align_of::<GcmContext>());
    if aligned && block.len() == size_of::<GcmContext>() {
        block.as_ptr()
    } else {
        REFUSES.0.as_ptr()
    }
}

/// One packet, without a run.
#[inline]
pub(crate) fn gcm_one(block: &[u8], esp: &mut [u8], seq_hi: u32, seal: bool) -> bool {
    let ctx = context(block);
    let len = u16::try_from(esp.len()).map_or(0, u32::from);
    // SAFETY: as for a run: a live context of any bytes, a packet borrowed uniquely, a length within it.
    unsafe { esp_mb_gcm_one(ctx, esp.as_mut_ptr(), len, seq_hi, i32::from(seal)) == 1 }
}

/// The small fields of `struct esp_chain`, in its order.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) salt: [u8; 4],
    pub(crate) cipher: u8,
    pub(crate) key_len: u8,
    pub(crate) mac: u8,
    pub(crate) iv_len: u8,
    pub(crate) icv_len: u8,
    pub(crate) esn: u8,
    pub(crate) outbound: u8,
}

/// `struct esp_chain`.
#[repr(C, align(64))]
pub(crate) struct ChainContext([u8; CHAIN_BYTES]);

impl ChainContext {
    pub(crate) const fn zeroed() -> Self {
        Self([0; CHAIN_BYTES])
    }

    /// False when the thread's scheduler could not be made. Key lengths are as `shape` says; `auth` is at
    /// most 64 bytes.
    pub(crate) fn expand(&mut self, shape: Shape, enc: &[u8], auth: &[u8]) -> bool {
        assert!(enc.len() == usize::from(shape.key_len) && auth.len() <= 64);
        with_scheduler(|m| {
            // SAFETY: `m` is this thread's live scheduler; `self` is as large and aligned as the C structure;
            // `enc` has `key_len` bytes and `auth` its length.
            unsafe {
                esp_mb_chain_expand(
                    m,
                    self,
                    &raw const shape,
                    enc.as_ptr(),
                    auth.as_ptr(),
                    auth.len(),
                );
            }
        })
        .is_some()
    }

    #[inline]
    pub(crate) fn prefetch(&self) {
        prefetch(&self.0);
    }
}

impl Drop for ChainContext {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// `struct esp_job`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Job {
    ctx: *const u8,
    esp: *mut u8,
    len: u32,
    seq_hi: u32,
}

/// Jobs for one call; borrows their contexts and packets.
pub(crate) struct Run<'a, C> {
    jobs: [MaybeUninit<Job>; MAX_BATCH],
    n: usize,
    borrows: PhantomData<(&'a C, &'a mut [u8])>,
}

impl<'a, C> Run<'a, C> {
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            jobs: [const { MaybeUninit::uninit() }; MAX_BATCH],
            n: 0,
            borrows: PhantomData,
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, ctx: &'a C, esp: &'a mut [u8], seq_hi: u32) -> bool {
        let ctx = std::ptr::from_ref(ctx).cast();
        // The shim refuses length 0.
        let len = u16::try_from(esp.len()).map_or(0, u32::from);
        self.add(ctx, esp, len, seq_hi)
    }

    /// `ctx` is to a live context.
    #[inline]
    fn add(&mut self, ctx: *const u8, esp: &'a mut [u8], len: u32, seq_hi: u32) -> bool {
        let Some(slot) = self.jobs.get_mut(self.n) else {
            return false;
        };
        slot.write(Job {
            ctx,
            esp: esp.as_mut_ptr(),
            len,
            seq_hi,
        });
        self.n += 1;
        true
    }

    /// The jobs so far, which are initialized; the run is empty afterwards.
    #[inline]
    fn take(&mut self) -> (*const Job, u32) {
        let n = std::mem::take(&mut self.n);
        (self.jobs.as_ptr().cast(), u32::try_from(n).unwrap_or(0))
    }
}

impl<'a> Run<'a, GcmContext> {
    /// Takes any bytes, see [`context`].
    #[inline]
    pub(crate) fn push_block(&mut self, block: &'a [u8], esp: &'a mut [u8], seq_hi: u32) -> bool {
        let len = u16::try_from(esp.len()).map_or(0, u32::from);
        self.add(context(block), esp, len, seq_hi)
    }

    #[inline]
    pub(crate) fn gcm_seal(&mut self) -> u64 {
        let (jobs, n) = self.take();
        // SAFETY: `n` initialized jobs over live contexts and packets that nobody else touches until the
        // call returns; the module's rules hold for the contexts.
        unsafe { esp_mb_gcm_seal(jobs, n) }
    }

    #[inline]
    pub(crate) fn gcm_open(&mut self) -> u64 {
        let (jobs, n) = self.take();
        // SAFETY: as in `gcm_seal`.
        unsafe { esp_mb_gcm_open(jobs, n) }
    }
}

impl Run<'_, ChainContext> {
    pub(crate) fn chain(&mut self, seal: bool) -> u64 {
        let (jobs, n) = self.take();
        // SAFETY: as in `gcm_seal`; the scheduler is this thread's and is empty again on return.
        with_scheduler(|m| unsafe { esp_mb_chain_run(m, jobs, n, i32::from(seal)) }).unwrap_or(0)
    }
}

/// The library's per-thread state.
struct Scheduler(NonNull<Manager>);

impl Drop for Scheduler {
    fn drop(&mut self) {
        // SAFETY: made by esp_mb_manager, freed once, holds no job between calls.
        unsafe { esp_mb_manager_free(self.0.as_ptr()) };
    }
}

/// Runs `f` with the thread's scheduler, made on first use. `None` when that failed.
fn with_scheduler<R>(f: impl FnOnce(*mut Manager) -> R) -> Option<R> {
    thread_local! {
        static SCHEDULER: RefCell<Option<Scheduler>> = const { RefCell::new(None) };
    }
    SCHEDULER.with_borrow_mut(|slot| {
        if slot.is_none() {
            // SAFETY: allocates; takes nothing.
            *slot = NonNull::new(unsafe { esp_mb_manager() }).map(Scheduler);
        }
        slot.as_ref().map(|s| f(s.0.as_ptr()))
    })
}
