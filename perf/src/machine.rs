//! What the figures depend on: processor, pages, pinning.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

const HUGE_BYTES: usize = 2 << 20;
const NR_HUGE: &str = "/proc/sys/vm/nr_hugepages";
const TUNABLES: &str = "GLIBC_TUNABLES";
const MALLOC_HUGE: &str = "glibc.malloc.hugetlb=1";

/// The machine as the report shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name, and family and model where the name says little.
    pub cpu: String,
    /// CPUs that the process may use.
    pub cpus: usize,
    /// CPU that the measurement is pinned to.
    pub pinned: Option<usize>,
    /// Page size of the frames, bytes.
    pub frame_page: usize,
    /// Whether the C library asks for transparent huge pages for SAs and keys.
    pub heap_huge: bool,
    /// Kernel release.
    pub kernel: String,
}

impl Machine {
    /// Looks around. Pinning and page size are filled in by whoever pins and makes the arena.
    pub fn detect() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            info.lines()
                .find_map(|l| l.strip_prefix(name)?.split_once(':'))
                .map(|(_, v)| v.trim().to_owned())
                .unwrap_or_default()
        };
        let cpu = format!(
            "{} (family {}, model {})",
            field("model name"),
            field("cpu family"),
            field("model\t")
        );
        Self {
            cpu,
            cpus: allowed().len(),
            pinned: None,
            frame_page: 0,
            heap_huge: heap_is_huge(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        }
    }
}

fn heap_is_huge() -> bool {
    let asked = std::env::var(TUNABLES).is_ok_and(|v| v.contains(MALLOC_HUGE));
    let enabled =
        fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    enabled.contains("[always]") || asked && enabled.contains("[madvise]")
}

/// Starts the program anew with the C library told to ask for huge pages for large heaps, as the service unit
/// does for the gateway. Returns when that is so already or cannot be had.
pub fn with_huge_heap() {
    let have = std::env::var(TUNABLES).unwrap_or_default();
    if have.contains("glibc.malloc.hugetlb") || !cfg!(target_env = "gnu") {
        return;
    }
    let Ok(program) = std::env::current_exe() else {
        return;
    };
    let tunables = if have.is_empty() {
        MALLOC_HUGE.to_owned()
    } else {
        format!("{have}:{MALLOC_HUGE}")
    };
    let error = std::os::unix::process::CommandExt::exec(
        std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(TUNABLES, tunables),
    );
    eprintln!("cannot start anew with a heap of huge pages: {error}");
}

/// CPUs that the process was started on, whatever its threads are pinned to since.
pub fn allowed() -> &'static [usize] {
    static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
    ALLOWED.get_or_init(|| {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        (0..CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
            .collect()
    })
}

/// Pins the calling thread; returns the CPU it runs on. Without a wish it is the last one: the first serves most
/// interrupts.
pub fn pin(cpu: Option<usize>) -> Option<usize> {
    let wanted = match cpu {
        Some(cpu) => *allowed().iter().find(|c| **c == cpu)?,
        None => *allowed().last()?,
    };
    let mut set = CpuSet::new();
    set.set(wanted).ok()?;
    sched_setaffinity(Pid::from_raw(0), &set).ok()?;
    Some(wanted)
}

/// CPU that the calling thread is pinned to, if it is one alone.
pub fn pinned() -> Option<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut own = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    own.next().filter(|_| own.next().is_none())
}

/// Calls `f` while the calling thread may run on every CPU that the process was started on: what it starts may so, too.
pub fn unpinned<T>(f: impl FnOnce() -> T) -> T {
    let own = pinned();
    let mut all = CpuSet::new();
    for cpu in allowed() {
        // They came out of such a set.
        let _ = all.set(*cpu);
    }
    let _ = sched_setaffinity(Pid::from_raw(0), &all);
    let value = f();
    if own.is_some() {
        pin(own);
    }
    value
}

/// Huge pages reserved for the life of this value, one process at a time.
#[derive(Debug)]
pub struct HugePages {
    added: usize,
    _lock: File,
}

impl HugePages {
    /// Adds as many 2 MiB pages to the system's pool as `bytes` need. Needs root.
    ///
    /// # Errors
    /// What the system says; or that it found no memory.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(lock_path())?;
        lock.lock()?;
        let before = read()?;
        let added = bytes.div_ceil(HUGE_BYTES);
        fs::write(NR_HUGE, (before + added).to_string())?;
        let added = read()?.saturating_sub(before);
        let pages = Self { added, _lock: lock };
        if added < bytes.div_ceil(HUGE_BYTES) {
            return Err(io::Error::other("no contiguous memory for huge pages"));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Others may have changed the pool meanwhile: take back only what was added.
        let restored =
            read().and_then(|now| fs::write(NR_HUGE, now.saturating_sub(self.added).to_string()));
        if let Err(error) = restored {
            eprintln!("{} huge pages stay reserved: {error}", self.added);
        }
    }
}

fn read() -> io::Result<usize> {
    fs::read_to_string(NR_HUGE)?
        .trim()
        .parse()
        .map_err(io::Error::other)
}

fn lock_path() -> PathBuf {
    let shared = Path::new("/run/lock");
    let dir = if shared.is_dir() {
        shared.to_owned()
    } else {
        std::env::temp_dir()
    };
    dir.join("esplanade-perf-hugepages")
}
/// Time of all CPUs, and the part of it that the host kept, in the kernel's ticks.
#[derive(Clone, Copy, Debug)]
pub struct Stolen {
    all: u64,
    stolen: u64,
}

impl Stolen {
    /// The part that was kept since an earlier look.
    pub fn since(self, before: Stolen) -> f64 {
        let all = self.all.saturating_sub(before.all).max(1);
        self.stolen.saturating_sub(before.stolen) as f64 / all as f64
    }
}

/// As `/proc/stat` tells; `None` where it does not.
pub fn stolen() -> Option<Stolen> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let first = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = first.split_whitespace().flat_map(str::parse).collect();
    // user nice system idle iowait irq softirq steal; guests' time is among the first two.
    Some(Stolen {
        all: ticks.iter().take(8).sum(),
        stolen: *ticks.get(7)?,
    })
}
