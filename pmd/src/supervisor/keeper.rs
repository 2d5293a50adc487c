//! What the supervisor holds, and the order in which it lets go.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::stat::fstat;

use super::{Request, answer, receive};
use crate::device::DeviceError;

/// Most files that one gateway may have held. Beyond that something is wrong with it.
const MOST: usize = 1024;
/// Between two attempts to stop a device that does not stop.
const RETRY: Duration = Duration::from_secs(1);

/// Stops a device by its file: no transfer begins or goes on afterwards.
pub type StopDevice = fn(&File) -> Result<(), DeviceError>;

/// Files of a gateway that must outlive it.
pub struct Keeper {
    stop: StopDevice,
    devices: Vec<(String, File)>,
    /// With inode and device number: the same memory is given once for each device that reaches it.
    memory: Vec<((u64, u64), OwnedFd)>,
}

impl Keeper {
    /// Holds nothing yet. `stop` is how devices are stopped.
    pub fn new(stop: StopDevice) -> Keeper {
        Keeper {
            stop,
            devices: Vec::new(),
            memory: Vec::new(),
        }
    }

    /// Devices and pieces of memory held.
    pub fn held(&self) -> (usize, usize) {
        (self.devices.len(), self.memory.len())
    }

    /// Takes over what the gateway sends, until there is no more for now. False when the gateway has closed the socket.
    ///
    /// # Errors
    /// What the system answers.
    pub fn serve(&mut self, socket: &OwnedFd) -> io::Result<bool> {
        loop {
            match receive(socket) {
                Ok(None) => return Ok(false),
                Ok(Some((message, files))) => {
                    let kept = self.keep(&message, files);
                    // Who does not wait for the answer gets none.
                    let _ = answer(socket, kept);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }

    fn keep(&mut self, message: &[u8], files: Vec<OwnedFd>) -> bool {
        let Ok([file]) = <[OwnedFd; 1]>::try_from(files) else {
            return false;
        };
        match Request::parse(message) {
            Some(Request::Memory) => {
                let Ok(is) = fstat(&file) else { return false };
                let key = (is.st_dev, is.st_ino);
                if self.memory.iter().all(|(known, _)| *known != key) {
                    if self.memory.len() >= MOST {
                        return false;
                    }
                    self.memory.push((key, file));
                }
                true
            }
            Some(Request::Device(name)) if self.devices.len() < MOST => {
                tracing::info!(device = %name, "held by the supervisor");
                self.devices.push((name, file.into()));
                true
            }
            _ => false,
        }
    }

    /// Stops all devices, then lets the memory go. Comes back only when every device has been stopped.
    pub fn release(mut self) {
        let all = self.devices.len();
        while !self.stop_devices() {
            std::thread::sleep(RETRY);
        }
        if all > 0 {
            tracing::info!(
                devices = all,
                memory = self.memory.len(),
                "all devices are stopped: the memory is freed"
            );
        }
    }

    /// Tries to stop the devices that still run. True when none does.
    fn stop_devices(&mut self) -> bool {
        let stop = self.stop;
        self.devices.retain(|(device, file)| match stop(file) {
            Ok(()) => {
                tracing::warn!(%device, "stopped by the supervisor: bus-master off, reset");
                false
            }
            Err(DeviceError::Gone) => {
                tracing::warn!(%device, "the device is gone");
                false
            }
            Err(error) => {
                tracing::error!(%device, %error, "the device does not stop: its memory stays held");
                true
            }
        });
        self.devices.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::thread;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::super::{DEVICE, MEMORY, exchange};
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let family = AddressFamily::Unix;
        socketpair(family, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// Serves until the other end is closed.
    fn serve_all(keeper: &mut Keeper, socket: &OwnedFd) {
        while keeper.serve(socket).unwrap() {
            thread::yield_now();
        }
    }

    #[test]
    fn what_is_given_is_held_once_and_stopped_before_it_is_let_go() {
        static STOPS: AtomicU32 = AtomicU32::new(0);
        // Refuses twice. The pipe shows that the memory is still held: its writing end is "memory".
        fn stop(file: &File) -> Result<(), DeviceError> {
            let mut byte = [0];
            let held = nix::unistd::read(file, &mut byte);
            assert_eq!(held, Err(nix::errno::Errno::EAGAIN), "memory was let go");
            match STOPS.fetch_add(1, SeqCst) {
                0 => Err(DeviceError::Timeout("on purpose")),
                _ => Ok(()),
            }
        }
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (ours, theirs) = pair();
        let gateway = thread::spawn(move || {
            exchange(&theirs, DEVICE, "0000:01:00.0", reader.as_fd()).unwrap();
            for _ in 0..3 {
                exchange(&theirs, MEMORY, "", writer.as_fd()).unwrap();
            }
            // As if killed: its own files go first.
            reader
        });
        let mut keeper = Keeper::new(stop);
        serve_all(&mut keeper, &ours);
        let reader = gateway.join().unwrap();
        assert_eq!(keeper.held(), (1, 1));
        keeper.release();
        assert_eq!(STOPS.load(SeqCst), 2);
        // Now it has gone: end of file.
        assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0));
    }

    #[test]
    fn nonsense_is_refused_and_costs_nothing() {
        fn stop(_: &File) -> Result<(), DeviceError> {
            Ok(())
        }
        let (ours, theirs) = pair();
        let gateway = thread::spawn(move || {
            let file = File::open("/dev/null").unwrap();
            for (kind, name) in [(0, ""), (9, "x"), (MEMORY, "x"), (DEVICE, "")] {
                assert!(exchange(&theirs, kind, name, file.as_fd()).is_err());
            }
            let long = "x".repeat(100);
            assert!(exchange(&theirs, DEVICE, &long, file.as_fd()).is_err());
            exchange(&theirs, DEVICE, "d", file.as_fd()).unwrap();
            nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&theirs),
                &[DEVICE, b'x'],
                nix::sys::socket::MsgFlags::empty(),
            )
            .unwrap();
        });
        let mut keeper = Keeper::new(stop);
        serve_all(&mut keeper, &ours);
        gateway.join().unwrap();
        assert_eq!(keeper.held(), (1, 0));
        keeper.release();
    }
}
