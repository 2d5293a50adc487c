//! The `bpf(2)` calls: make and change maps, load a program, attach it to an interface.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::asm::Insn;

/// Map types and flags of `linux/bpf.h`.
pub(super) const MAP_TYPE_LPM_TRIE: u32 = 11;
pub(super) const MAP_TYPE_XSKMAP: u32 = 17;
pub(super) const MAP_NO_PREALLOC: u32 = 1;

/// Attach modes of `linux/if_link.h`.
pub(super) const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
pub(super) const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

const CMD_MAP_CREATE: libc::c_long = 0;
const CMD_MAP_UPDATE: libc::c_long = 2;
const CMD_MAP_DELETE: libc::c_long = 3;
const CMD_PROG_LOAD: libc::c_long = 5;
const CMD_LINK_CREATE: libc::c_long = 28;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const LICENSE: &CStr = c"Apache-2.0 OR MIT";

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// A map of the kernel, gone when the last descriptor and the last program that uses it are gone.
#[derive(Debug)]
pub(super) struct Map {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

impl Map {
    pub(super) fn new(
        name: &str,
        map_type: u32,
        key: u32,
        value: u32,
        entries: u32,
        flags: u32,
    ) -> io::Result<Map> {
        let attr = MapCreate {
            map_type,
            key_size: key,
            value_size: value,
            max_entries: entries,
            map_flags: flags,
            map_name: object_name(name),
            ..MapCreate::default()
        };
        Ok(Map {
            fd: call_for_fd(CMD_MAP_CREATE, &attr)?,
            key: key as usize,
            value: value as usize,
        })
    }

    pub(super) fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if key.len() != self.key || value.len() != self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.element(
            CMD_MAP_UPDATE,
            key,
            value.as_ptr().expose_provenance() as u64,
        )
    }

    pub(super) fn remove(&self, key: &[u8]) -> io::Result<()> {
        if key.len() != self.key {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.element(CMD_MAP_DELETE, key, 0)
    }

    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn element(&self, command: libc::c_long, key: &[u8], value: u64) -> io::Result<()> {
        call(
            command,
            &MapElement {
                map_fd: number(self.raw()),
                pad: 0,
                key: key.as_ptr().expose_provenance() as u64,
                value,
                flags: 0,
            },
        )
        .map(drop)
    }
}

/// Loads an XDP program. On refusal the error holds the end of the verifier's log.
pub(super) fn load_program(name: &str, code: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type: PROG_TYPE_XDP,
        insn_cnt: u32::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        insns: code.as_ptr().expose_provenance() as u64,
        license: LICENSE.as_ptr().expose_provenance() as u64,
        prog_name: object_name(name),
        expected_attach_type: ATTACH_XDP,
        ..ProgLoad::default()
    };
    let first = match call_for_fd(CMD_PROG_LOAD, &attr) {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    // Once more to learn why.
    let mut log = vec![0u8; 1 << 18];
    attr.log_level = 1;
    attr.log_size = 1 << 18;
    attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    if let Ok(fd) = call_for_fd(CMD_PROG_LOAD, &attr) {
        return Ok(fd);
    }
    let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(log.get(..end).unwrap_or_default());
    let tail: Vec<&str> = text.lines().rev().take(6).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    Err(io::Error::new(
        first.kind(),
        format!("{first}; verifier: {}", tail.join(" | ")),
    ))
}

/// Attaches a program to an interface. Closing the descriptor, also by the death of the process, detaches it.
pub(super) fn attach(program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> io::Result<OwnedFd> {
    call_for_fd(
        CMD_LINK_CREATE,
        &LinkCreate {
            prog_fd: number(program.as_raw_fd()),
            target_ifindex: ifindex,
            attach_type: ATTACH_XDP,
            flags,
        },
    )
}

fn call<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` begins as the union member that `command` reads, `size_of::<T>()` bytes of it; the kernel takes what
    // lies behind as zero. Addresses in it point to memory that the caller borrows for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn call_for_fd<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(call(command, attr)?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: this command's result is a descriptor made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    for (to, from) in out.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    out
}

fn number(fd: RawFd) -> u32 {
    u32::try_from(fd).unwrap_or(u32::MAX)
}
