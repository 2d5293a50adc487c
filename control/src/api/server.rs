//! Listens on the unix socket.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::stat::{Mode, umask};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::answer::value;
use super::{Command, answer_to, line_of, parse};
use crate::core::{Control, lock};

/// Longest request, bytes.
const MAX_LINE: u64 = 64 * 1024;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// Followers of events at a time: others must still find a connection.
const MAX_FOLLOWERS: usize = 8;
/// Events in one line of a stream.
const BATCH: usize = 256;
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
    let followers = Arc::new(Semaphore::new(MAX_FOLLOWERS));
    loop {
        // A closed semaphore cannot be: it lives here.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        match socket.accept().await {
            Ok((stream, _)) => {
                let control = Arc::clone(&control);
                let followers = Arc::clone(&followers);
                tokio::spawn(async move {
                    if let Err(e) = converse(stream, &control, &followers).await {
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

async fn converse(
    stream: UnixStream,
    control: &Arc<Mutex<Control>>,
    followers: &Semaphore,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_LINE);
        let n = tokio::time::timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await??;
        if n == 0 {
            return Ok(());
        }
        if !line.ends_with(b"\n") && n as u64 == MAX_LINE {
            let too_long = format!("a request has at most {MAX_LINE} bytes");
            return send(&mut write, &line_of(Err(too_long))).await;
        }
        let result = match parse(&line) {
            Ok(Command::Follow { since }) => {
                let Ok(_permit) = followers.try_acquire() else {
                    let full = format!("{MAX_FOLLOWERS} clients follow events already");
                    return send(&mut write, &line_of(Err(full))).await;
                };
                return follow(&mut reader, &mut write, control, since).await;
            }
            Ok(command) => answer_to(command, control).await,
            Err(problem) => Err(problem),
        };
        send(&mut write, &line_of(result)).await?;
    }
}

async fn send(write: &mut OwnedWriteHalf, text: &str) -> std::io::Result<()> {
    tokio::time::timeout(PATIENCE, write.write_all(text.as_bytes())).await??;
    Ok(())
}

/// Tells events until the client goes. What it does not take in time stays in the ring of events, and what falls out
/// of that is counted for it.
async fn follow(
    reader: &mut BufReader<OwnedReadHalf>,
    write: &mut OwnedWriteHalf,
    control: &Arc<Mutex<Control>>,
    mut since: Option<u64>,
) -> std::io::Result<()> {
    let (mut news, first) = {
        let control = lock(control);
        (
            control.events.subscribe(),
            control.events.batch(since, BATCH),
        )
    };
    let mut batch = Some(first);
    loop {
        if let Some(b) = batch.take() {
            since = Some(b.last);
            send(write, &line_of(value(&b))).await?;
        }
        let next = lock(control).events.batch(since, BATCH);
        if next.missed > 0 || !next.events.is_empty() {
            batch = Some(next);
            continue;
        }
        let mut closed = [0];
        tokio::select! {
            changed = news.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
            // Nothing more is said on this connection; its end is the client's.
            n = reader.read(&mut closed) => {
                if n? == 0 {
                    return Ok(());
                }
            }
        }
    }
}
