//! Listens on the unix socket.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::stat::{Mode, umask};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::answer_line;
use crate::core::Control;

/// Longest request, bytes.
const MAX_LINE: u64 = 64 * 1024;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// A client that says nothing, or takes no answer, for this long is let go.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// Socket.
    pub path: PathBuf,
    /// Group id that may use it besides our own user.
    pub group: Option<u32>,
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Another process answers there.
    #[error("API socket {}: another gateway is using it", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("API socket {}: the path exists and is not a socket", .0.display())]
    Blocked(PathBuf),
    /// The system refused.
    #[error("API socket {}: {source}", .path.display())]
    System {
        /// Socket.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
}

/// The bound socket. Removed when dropped.
#[derive(Debug)]
pub struct Listener {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds the socket with mode 0600, or 0660 for a group. Replaces a socket that nobody answers on.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub fn bind(config: &ApiConfig) -> Result<Self, ApiError> {
        let path = &config.path;
        let system = |source| ApiError::System {
            path: path.clone(),
            source,
        };
        remove_stale(path)?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(system)?;
        }
        // Closed from the first moment; the group is let in below.
        let old = umask(Mode::from_bits_truncate(0o177));
        let bound = std::os::unix::net::UnixListener::bind(path);
        umask(old);
        let listener = bound.map_err(system)?;
        if let Some(gid) = config.group {
            std::os::unix::fs::chown(path, None, Some(gid)).map_err(system)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
                .map_err(system)?;
        }
        listener.set_nonblocking(true).map_err(system)?;
        Ok(Self {
            listener,
            path: path.clone(),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn remove_stale(path: &Path) -> Result<(), ApiError> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(ApiError::Blocked(path.to_owned()));
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ApiError::InUse(path.to_owned()));
    }
    std::fs::remove_file(path).map_err(|source| ApiError::System {
        path: path.to_owned(),
        source,
    })
}

/// Serves until cancelled.
///
/// # Errors
/// The socket cannot be used with the runtime.
pub async fn serve(listener: &Listener, control: Arc<Mutex<Control>>) -> Result<(), ApiError> {
    let system = |source| ApiError::System {
        path: listener.path.clone(),
        source,
    };
    let socket =
        UnixListener::from_std(listener.listener.try_clone().map_err(system)?).map_err(system)?;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // A closed semaphore cannot be: it lives here.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        match socket.accept().await {
            Ok((stream, _)) => {
                let control = Arc::clone(&control);
                tokio::spawn(async move {
                    if let Err(e) = converse(stream, &control).await {
                        tracing::debug!(error = %e, "API connection ended");
                    }
                    drop(permit);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "API connection refused");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, control: &Arc<Mutex<Control>>) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_LINE);
        let n = tokio::time::timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await??;
        if n == 0 {
            return Ok(());
        }
        let whole = line.ends_with(b"\n") || (n as u64) < MAX_LINE;
        let answer = if whole {
            answer_line(&line, control)
        } else {
            serde_json::json!({ "v": super::VERSION, "ok": false, "error": format!("a request has at most {MAX_LINE} bytes") })
        };
        let text = format!("{answer}\n");
        tokio::time::timeout(PATIENCE, write.write_all(text.as_bytes())).await??;
        if !whole {
            return Ok(());
        }
    }
}
