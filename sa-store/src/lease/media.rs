//! What the lease store needs of a disk, and the disk.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::error::LeaseError;

/// A file of the lease store. Writes may be reordered, torn or lost until [`sync`](Self::sync) returns.
pub trait Media {
    /// Length, bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether it holds nothing yet.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`.
    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes everything written so far durable. After an error nothing may be assumed of it.
    fn sync(&mut self) -> io::Result<()>;
}

/// Memory, for tests and fuzzing: everything is durable at once.
impl Media for Vec<u8> {
    fn len(&self) -> io::Result<u64> {
        u64::try_from(Vec::len(self)).map_err(io::Error::other)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.saturating_add(buf.len());
        buf.copy_from_slice(self.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.saturating_add(buf.len());
        if Vec::len(self) < end {
            self.resize(end, 0);
        }
        if let Some(place) = self.get_mut(at..end) {
            place.copy_from_slice(buf);
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file of a directory that one process holds locked.
#[derive(Debug)]
pub struct DiskMedia {
    file: File,
    /// Held until drop by the file of the records; the lock is on the directory, so that it is there before the file.
    _lock: Option<Flock<File>>,
}

const FILE: &str = "leases";
const NEW_FILE: &str = "leases.new";
const RETIRED: &str = "retired";

impl DiskMedia {
    /// Opens or creates the store in `dir`; `first` is what a new file begins with.
    pub(super) fn open(dir: &Path, first: &[u8]) -> Result<Self, LeaseError> {
        if !dir.exists() {
            create_dir(dir)?;
        }
        let handle = File::open(dir).map_err(io_error("open", dir))?;
        let meta = handle.metadata().map_err(io_error("look at", dir))?;
        let us = nix::unistd::geteuid().as_raw();
        if !meta.is_dir() || meta.mode() & 0o022 != 0 || (meta.uid() != us && meta.uid() != 0) {
            return Err(LeaseError::NotPrivate {
                path: dir.to_owned(),
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
            });
        }
        let lock = Flock::lock(handle, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
            if e == nix::errno::Errno::EWOULDBLOCK {
                LeaseError::Locked(dir.to_owned())
            } else {
                io_error("lock", dir)(e.into())
            }
        })?;
        let path = dir.join(FILE);
        if !path.exists() {
            create_file(dir, first)?;
        }
        let file = open_private(&path, false)?;
        Ok(Self {
            file,
            _lock: Some(lock),
        })
    }

    /// The same file once more, for the thread that writes and syncs. The lock stays with `self`.
    pub(super) fn again(&self) -> io::Result<Self> {
        let file = self.file.try_clone()?;
        Ok(Self { file, _lock: None })
    }

    /// Opens or creates the file of retired keys in `dir`, whose lock the caller has.
    pub(super) fn open_retired(dir: &Path) -> Result<Self, LeaseError> {
        let path = dir.join(RETIRED);
        let is_new = !path.exists();
        let file = open_private(&path, true)?;
        if is_new {
            sync_dir(dir)?;
        }
        Ok(Self { file, _lock: None })
    }
}

impl Media for DiskMedia {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn open_private(path: &Path, create: bool) -> Result<File, LeaseError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC)
        .open(path)
        .map_err(io_error("open", path))
}

/// `io::Error` with what was tried on what.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LeaseError {
    let path: PathBuf = path.to_owned();
    move |source| LeaseError::Io {
        action,
        path,
        source,
    }
}

fn create_dir(dir: &Path) -> Result<(), LeaseError> {
    let made = DirBuilder::new().mode(0o700).create(dir);
    match made {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io_error("create", dir)(e)),
        _ => sync_dir(parent(dir)),
    }
}

/// The file appears under its name only when its beginning is durable.
fn create_file(dir: &Path, first: &[u8]) -> Result<(), LeaseError> {
    let new = dir.join(NEW_FILE);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC)
        .open(&new)
        .map_err(io_error("create", &new))?;
    file.write_all_at(first, 0)
        .map_err(io_error("write", &new))?;
    file.sync_all().map_err(io_error("sync", &new))?;
    std::fs::rename(&new, dir.join(FILE)).map_err(io_error("rename", &new))?;
    sync_dir(dir)
}

fn parent(dir: &Path) -> &Path {
    match dir.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<(), LeaseError> {
    let d = File::open(dir).map_err(io_error("open", dir))?;
    d.sync_all().map_err(io_error("sync", dir))
}
