//! Watches SA files: whole directories, so that a file replaced by renaming is seen too.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// Quiet time after a change before files are read: editors and copies make several.
const QUIET: Duration = Duration::from_millis(200);
/// Longest time to wait for quiet.
const PATIENCE: Duration = Duration::from_secs(2);

/// What of a directory matters.
#[derive(Debug, Default)]
struct Interest {
    /// All `*.toml` files.
    all: bool,
    /// These files.
    names: Vec<OsString>,
}

#[derive(Debug)]
struct Fd(Inotify);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches files and directories.
#[derive(Debug)]
pub struct Watch {
    fd: AsyncFd<Fd>,
    interests: HashMap<WatchDescriptor, Interest>,
}

impl Watch {
    /// Begins to watch. Must be called within a runtime.
    ///
    /// # Errors
    /// The system has no inotify left, or a directory does not exist.
    pub fn new(paths: &[PathBuf]) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        let mut interests: HashMap<WatchDescriptor, Interest> = HashMap::new();
        for path in paths {
            let dir = if path.is_dir() {
                path.as_path()
            } else {
                parent(path)
            };
            let interest = interests.entry(inotify.add_watch(dir, flags)?).or_default();
            match path.file_name() {
                Some(name) if !path.is_dir() => interest.names.push(name.to_owned()),
                _ => interest.all = true,
            }
        }
        // `Fd` owns its descriptor and always names the same one, which is what the successor asks for.
        #[allow(
            deprecated,
            reason = "the successor is unsafe to call, and this crate forbids unsafe code"
        )]
        let fd = AsyncFd::new(Fd(inotify))?;
        Ok(Self { fd, interests })
    }

    /// Waits for a change, then for quiet.
    ///
    /// # Errors
    /// inotify failed.
    pub async fn changed(&mut self) -> std::io::Result<()> {
        while !self.relevant().await? {}
        let latest = Instant::now() + PATIENCE;
        loop {
            let until = (Instant::now() + QUIET).min(latest);
            match timeout_at(until, self.relevant()).await {
                Err(_) => return Ok(()),
                Ok(r) => drop(r?),
            }
            if Instant::now() >= latest {
                return Ok(());
            }
        }
    }

    /// Waits for events; whether one of them matters.
    async fn relevant(&self) -> std::io::Result<bool> {
        let mut guard = self.fd.readable().await?;
        match guard.get_inner().0.read_events() {
            Ok(events) => Ok(events.iter().any(|e| {
                // Lost events may have been relevant.
                e.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                    || self
                        .interests
                        .get(&e.wd)
                        .is_some_and(|i| e.name.as_ref().is_some_and(|n| i.matters(n)))
            })),
            Err(Errno::EAGAIN) => {
                guard.clear_ready();
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl Interest {
    fn matters(&self, name: &OsStr) -> bool {
        // Mounted configuration volumes swap a directory named "..data".
        let hidden = name.as_encoded_bytes().starts_with(b".");
        name == "..data"
            || self.names.iter().any(|n| n == name)
            || (self.all && !hidden && Path::new(name).extension().is_some_and(|e| e == "toml"))
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}
