//! Opening files that hold secrets: who owns them, who can read them, and wiping what was read.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use zeroize::{Zeroize, Zeroizing};

use super::fault::Fault;
use super::value::hex;

/// Longest SA file, bytes; a hundred thousand SAs fit several times over.
pub(crate) const MAX_SA_FILE: u64 = 256 << 20;
/// Longest key file, bytes.
const MAX_KEY_FILE: u64 = 4096;

/// An open regular file with what its inode says of owner and mode.
pub(crate) struct Opened {
    file: File,
    name: String,
    mode: u32,
    uid: u32,
    len: u64,
}

impl Opened {
    /// Opens `path` for reading. The checks look at the open file, so that a swap of the path between
    /// check and read cannot matter; `O_NONBLOCK` keeps a FIFO from blocking us.
    pub(crate) fn new(path: &Path) -> Result<Self, Fault> {
        let io = |action| {
            let name = path.display().to_string();
            move |e: std::io::Error| Fault::Io {
                action,
                error: format!("{name}: {e}"),
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_CLOEXEC | nix::libc::O_NOCTTY)
            .open(path)
            .map_err(io("open"))?;
        let meta = file.metadata().map_err(io("look at"))?;
        if !meta.is_file() {
            return Err(Fault::NotRegular(path.display().to_string()));
        }
        Ok(Self {
            file,
            name: path.display().to_string(),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            len: meta.len(),
        })
    }

    /// Refuses a file with keys that others can read or write, or that belongs to another user.
    pub(crate) fn must_be_private(&self) -> Result<(), Fault> {
        let us = nix::unistd::geteuid().as_raw();
        if self.uid != us && self.uid != 0 {
            return Err(Fault::ForeignOwner { uid: self.uid, us });
        }
        self.refuse_bits(0o077, 0o600, "holds keys")
    }

    /// Refuses a file that decides on security and that others can change.
    pub(crate) fn must_not_be_writable(&self) -> Result<(), Fault> {
        self.refuse_bits(0o022, 0o644, "decides what is protected")
    }

    fn refuse_bits(&self, bits: u32, want: u32, holds: &'static str) -> Result<(), Fault> {
        let bad = self.mode & bits;
        if bad == 0 {
            return Ok(());
        }
        Err(Fault::Permissions {
            mode: self.mode,
            want,
            who: if bad & 0o007 != 0 {
                "everybody"
            } else {
                "its group"
            },
            verb: if bad & 0o022 != 0 { "change" } else { "read" },
            holds,
            file: self.name.clone(),
        })
    }

    /// The whole text in a buffer that is allocated once and wiped when dropped.
    pub(crate) fn read(mut self, max: u64) -> Result<Zeroizing<String>, Fault> {
        let too_large = |got| Fault::TooLarge { got, max };
        if self.len > max {
            return Err(too_large(self.len));
        }
        let capacity = usize::try_from(self.len).map_err(|_| too_large(self.len))?;
        // One byte more than the length: a file that grows meanwhile is seen, and never reallocates.
        let mut bytes = Zeroizing::new(vec![0u8; capacity + 1]);
        let mut have = 0;
        loop {
            let free = bytes.get_mut(have..).unwrap_or_default();
            match self.file.read(free) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(Fault::Io {
                        action: "read",
                        error: format!("{}: {e}", self.name),
                    });
                }
            }
        }
        if have > capacity {
            return Err(Fault::Io {
                action: "read",
                error: format!("{} grew while it was read; try again", self.name),
            });
        }
        bytes.truncate(have);
        match String::from_utf8(std::mem::take(&mut *bytes)) {
            Ok(s) => Ok(Zeroizing::new(s)),
            Err(e) => {
                let at = e.utf8_error().valid_up_to();
                e.into_bytes().zeroize();
                Err(Fault::Syntax(format!("not UTF-8 at byte {at}")))
            }
        }
    }
}

/// Key material from a file of hexadecimal digits.
pub(crate) fn read_key(path: &Path, key: &'static str) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let file = Opened::new(path)?;
    file.must_be_private()?;
    hex(key, &file.read(MAX_KEY_FILE)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn key_file(mode: u32, text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn a_key_file_is_read_only_when_nobody_else_can() {
        let (_d, p) = key_file(0o600, "0102\n");
        assert_eq!(read_key(&p, "key").unwrap().as_slice(), [1, 2]);
        for mode in [0o640, 0o604, 0o620, 0o666] {
            let (_d, p) = key_file(mode, "0102\n");
            let e = read_key(&p, "key").unwrap_err();
            assert!(matches!(e, Fault::Permissions { .. }), "{mode:o} {e}");
            assert!(e.to_string().contains("chmod 600"), "{e}");
        }
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read_key(&fifo, "key"), Err(Fault::NotRegular(_))));
        assert!(matches!(
            read_key(dir.path(), "key"),
            Err(Fault::NotRegular(_))
        ));
        let absent = read_key(&dir.path().join("absent"), "key");
        assert!(matches!(absent, Err(Fault::Io { .. })));
    }
}
