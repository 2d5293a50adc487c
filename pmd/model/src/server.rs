//! A model behind a unix socket, for one driver at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::bus::Bus;
use crate::log::Log;
use crate::protocol::{self, Request};
use crate::sys::SharedMap;
use crate::{Model, Turn};

/// How long a client may take to send the rest of a message.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a server without work looks whether it shall end.
const NAP: Duration = Duration::from_millis(50);

const FLAG_RESET: u32 = 1;
const FLAG_PLATFORM: u32 = 1 << 2;
const REGION_READ_WRITE: u32 = 3;
const IRQ_EVENTFD: u32 = 1;
const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_TRIGGER: u32 = 1 << 5;

/// A socket on which a model waits for drivers.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    log: Arc<Log>,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// Listens at `path`, for this user only. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// What the system answers; `AddrInUse` when somebody serves it, or when it is no socket.
    pub fn bind(path: &Path) -> io::Result<Server> {
        if let Ok(meta) = std::fs::symlink_metadata(path) {
            if !meta.file_type().is_socket() || UnixStream::connect(path).is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Server {
            listener,
            path: path.to_owned(),
            log: Arc::default(),
            stop: Arc::default(),
        })
    }

    /// The rules that drivers broke.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Set it, and [`Server::run`] returns soon.
    pub fn stop(&self) -> &Arc<AtomicBool> {
        &self.stop
    }

    /// Serves one driver after the other until it is told to stop.
    ///
    /// # Errors
    /// When the socket cannot be listened on any more. A driver that breaks the protocol is sent away.
    pub fn run(&self, model: &mut dyn Model) -> io::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            if !readable(self.listener.as_fd(), &[], NAP)?.0 {
                continue;
            }
            let (stream, _) = self.listener.accept()?;
            tracing::info!(model = model.name(), "a driver connected");
            let mut session = Session::new(model, &self.log);
            let end = session.run(stream, &self.stop);
            match end {
                Ok(()) => tracing::info!(model = model.name(), "the driver left"),
                Err(error) => {
                    tracing::warn!(model = model.name(), %error, "the driver was sent away");
                }
            }
            model.reset();
        }
        Ok(())
    }

    /// Serves on a thread of its own.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn spawn(self, mut model: Box<dyn Model>) -> io::Result<Running> {
        let (log, stop) = (Arc::clone(&self.log), Arc::clone(&self.stop));
        let path = self.path.clone();
        let thread = std::thread::Builder::new()
            .name(format!("model-{}", model.name()))
            .spawn(move || {
                if let Err(error) = self.run(&mut *model) {
                    tracing::error!(%error, "model");
                }
            })?;
        Ok(Running {
            log,
            path,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody can connect to it any more; when it is gone already all is well.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A server on a thread; it ends with this.
pub struct Running {
    log: Arc<Log>,
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// The rules that drivers broke.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the model was reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// One driver's time with the model.
struct Session<'a> {
    model: &'a mut dyn Model,
    regions: Vec<u64>,
    interrupts: u32,
    bus: Bus,
    agreed: bool,
}

impl<'a> Session<'a> {
    fn new(model: &'a mut dyn Model, log: &Arc<Log>) -> Session<'a> {
        let interrupts = model.interrupts();
        Session {
            regions: model.regions(),
            interrupts,
            bus: Bus::new(interrupts, Arc::clone(log)),
            model,
            agreed: false,
        }
    }

    fn run(&mut self, mut stream: UnixStream, stop: &AtomicBool) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut turn = Turn::Idle;
        while !stop.load(Ordering::Relaxed) {
            let wait = match turn {
                Turn::Busy => Duration::ZERO,
                Turn::At(when) => when.saturating_duration_since(Instant::now()).min(NAP),
                Turn::Idle => NAP,
            };
            let others = self.model.wakes();
            let (asked, woken) = readable(stream.as_fd(), &others, wait)?;
            if asked {
                let Some(request) = Request::receive(&mut stream)? else {
                    return Ok(());
                };
                let answer = self.serve(&request);
                request.answer(&mut stream, &answer)?;
                turn = Turn::Busy;
                continue;
            }
            let due = match turn {
                Turn::Busy => true,
                Turn::At(when) => when <= Instant::now(),
                Turn::Idle => false,
            };
            if due || woken {
                turn = self.model.turn(&mut self.bus);
            }
        }
        Ok(())
    }

    fn serve(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        if !self.agreed && request.command != protocol::VERSION {
            return Err(libc::EPROTO);
        }
        match request.command {
            protocol::VERSION => {
                let major = request.word(0)? & 0xffff;
                if major != 0 {
                    return Err(libc::ENOTSUP);
                }
                self.agreed = true;
                Ok(protocol::CAPABILITIES.to_vec())
            }
            protocol::GET_INFO => {
                let regions = u32::try_from(self.regions.len()).map_err(|_| libc::EINVAL)?;
                Ok(words(&[16, FLAG_RESET | FLAG_PLATFORM, regions, 1]))
            }
            protocol::GET_REGION_INFO => {
                let index = request.word(8)?;
                let size = usize::try_from(index)
                    .ok()
                    .and_then(|i| self.regions.get(i))
                    .ok_or(libc::EINVAL)?;
                let mut body = words(&[32, REGION_READ_WRITE, index, 0]);
                body.extend(size.to_ne_bytes());
                body.extend(0u64.to_ne_bytes());
                Ok(body)
            }
            protocol::GET_IRQ_INFO => {
                let index = request.word(8)?;
                let count = if index == 0 { self.interrupts } else { 0 };
                Ok(words(&[16, IRQ_EVENTFD, index, count]))
            }
            protocol::SET_IRQS => self.set_irqs(request),
            protocol::DMA_MAP => self.map(request),
            protocol::DMA_UNMAP => {
                let (address, size) = (request.long(8)?, request.long(16)?);
                if !self.bus.unmap(address, size) {
                    return Err(libc::EINVAL);
                }
                Ok(request.body.clone())
            }
            protocol::REGION_READ => {
                let (region, offset, size) = self.access(request)?;
                let value = self.model.read(&mut self.bus, region, offset, size);
                let mut body = request.body.get(..16).unwrap_or_default().to_vec();
                body.extend(value.to_le_bytes().get(..size).unwrap_or_default());
                Ok(body)
            }
            protocol::REGION_WRITE => {
                let (region, offset, size) = self.access(request)?;
                let data = request.body.get(16..).filter(|d| d.len() == size);
                let mut value = [0; 8];
                value[..size].copy_from_slice(data.ok_or(libc::EINVAL)?);
                let value = u64::from_le_bytes(value);
                self.model.write(&mut self.bus, region, offset, size, value);
                Ok(request.body.get(..16).unwrap_or_default().to_vec())
            }
            protocol::RESET => {
                self.bus.disconnect_all();
                self.model.reset();
                Ok(Vec::new())
            }
            _ => Err(libc::ENOTSUP),
        }
    }

    /// Region, offset and size of an access of registers.
    fn access(&self, request: &Request) -> Result<(usize, usize, usize), i32> {
        let (offset, region, size) = (request.long(0)?, request.word(8)?, request.word(12)?);
        let region = usize::try_from(region).map_err(|_| libc::EINVAL)?;
        let len = *self.regions.get(region).ok_or(libc::EINVAL)?;
        let inside = offset
            .checked_add(u64::from(size))
            .is_some_and(|end| end <= len);
        if !matches!(size, 1 | 2 | 4 | 8) || !offset.is_multiple_of(u64::from(size)) || !inside {
            self.bus.broke(
                "registers are accessed in aligned words inside their region",
                format!("{size} bytes at {offset:#x} of region {region}"),
            );
            return Err(libc::EINVAL);
        }
        let offset = usize::try_from(offset).map_err(|_| libc::EINVAL)?;
        let size = usize::try_from(size).map_err(|_| libc::EINVAL)?;
        Ok((region, offset, size))
    }

    fn map(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let flags = request.word(4)?;
        let (offset, address, size) = (request.long(8)?, request.long(16)?, request.long(24)?);
        let len = usize::try_from(size).map_err(|_| libc::EINVAL)?;
        let [fd] = request.fds.as_slice() else {
            // Memory without a file would have to be copied by messages.
            return Err(libc::ENOTSUP);
        };
        let file = File::from(fd.try_clone().map_err(|_| libc::EMFILE)?);
        let memory = SharedMap::new(&file, offset, len).map_err(|e| number(&e))?;
        self.bus
            .map(address, memory, flags & 1 != 0, flags & 2 != 0)
            .map_err(|e| number(&e))?;
        Ok(Vec::new())
    }

    fn set_irqs(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let (flags, index) = (request.word(4)?, request.word(8)?);
        let (start, count) = (request.word(12)?, request.word(16)?);
        if index != 0 || start.checked_add(count).is_none_or(|n| n > self.interrupts) {
            return Err(libc::EINVAL);
        }
        if flags & IRQ_TRIGGER == 0 {
            // Masking: an interrupt here is an edge.
            return Ok(Vec::new());
        }
        if flags & IRQ_DATA_NONE != 0 {
            if count == 0 {
                self.bus.disconnect_all();
            }
            return Ok(Vec::new());
        }
        if flags & IRQ_DATA_EVENTFD == 0 {
            return Err(libc::ENOTSUP);
        }
        for i in 0..count {
            let vector = usize::try_from(start + i).map_err(|_| libc::EINVAL)?;
            let place = usize::try_from(i).map_err(|_| libc::EINVAL)?;
            let file = match request.fds.get(place) {
                Some(fd) => Some(File::from(fd.try_clone().map_err(|_| libc::EMFILE)?)),
                None => None,
            };
            self.bus.connect(vector, file);
        }
        Ok(Vec::new())
    }
}

/// Whether `fd` is readable, and whether any of the others is.
fn readable(
    fd: BorrowedFd<'_>,
    others: &[BorrowedFd<'_>],
    wait: Duration,
) -> io::Result<(bool, bool)> {
    let all = std::iter::once(&fd).chain(others);
    let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    // Milliseconds: a model that wants to be called sooner than that stays busy.
    let timeout = if wait < Duration::from_millis(1) {
        PollTimeout::ZERO
    } else {
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    };
    match poll(&mut fds, timeout) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => Ok((false, false)),
        Ok(_) => {
            let has = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
            let (first, rest) = fds.split_at(1);
            Ok((first.iter().any(has), rest.iter().any(has)))
        }
        Err(e) => Err(e.into()),
    }
}

fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EINVAL)
}

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|w| w.to_ne_bytes()).collect()
}
