//! What is behind the block's MACs: where frames for a port of the packet switch go to, and where its frames come from.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::sys;

/// Longest frame that a wire carries.
const LONGEST: usize = 16_384;
/// A MAC fills shorter frames up.
const SHORTEST: usize = 60;

/// A cable of whole Ethernet frames, without their check sequence.
pub trait Wire: Send {
    /// Sends a frame, or loses it: nobody waits.
    fn send(&mut self, frame: &[u8]);

    /// The next frame, where there is one.
    fn receive(&mut self) -> Option<Vec<u8>>;

    /// Becomes readable with a frame.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// A TAP interface of the network namespace that it is opened in.
pub struct Tap(File);

impl Tap {
    /// Makes the interface, or joins one that was made persistent. It goes with the last handle then.
    ///
    /// # Errors
    /// What the system answers: a name that it does not take, no rights.
    pub fn open(name: &str) -> io::Result<Tap> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        sys::become_tap(&file, name)?;
        Ok(Tap(file))
    }
}

impl Wire for Tap {
    fn send(&mut self, frame: &[u8]) {
        // An interface that is down takes nothing; a cable that is out does not either.
        let _ = self.0.write(frame);
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        frame_of(|room| self.0.read(room))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One end of a cable whose other end is in this process.
pub struct Line {
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
    /// A byte for the other end's poll, and those for this one's.
    ring: UnixStream,
    bell: UnixStream,
}

impl Line {
    /// Both ends.
    ///
    /// # Errors
    /// What the system answers.
    pub fn pair() -> io::Result<(Line, Line)> {
        let ((to_b, from_a), (to_a, from_b)) = (channel(), channel());
        let ((ring_b, bell_b), (ring_a, bell_a)) = (UnixStream::pair()?, UnixStream::pair()?);
        for end in [&ring_a, &ring_b, &bell_a, &bell_b] {
            end.set_nonblocking(true)?;
        }
        let end = |to, from, ring, bell| Line {
            to,
            from,
            ring,
            bell,
        };
        Ok((
            end(to_b, from_b, ring_b, bell_a),
            end(to_a, from_a, ring_a, bell_b),
        ))
    }
}

impl Wire for Line {
    fn send(&mut self, frame: &[u8]) {
        if self.to.send(frame.to_vec()).is_ok() {
            // A bell that is full rings already.
            let _ = self.ring.write(&[1]);
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        if let Ok(frame) = self.from.try_recv() {
            return Some(frame);
        }
        while matches!(self.bell.read(&mut [0; 256]), Ok(256)) {}
        // One that came meanwhile has rung.
        self.from.try_recv().ok()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A frame of as many bytes as a MAC sends at least.
fn frame_of(read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> Option<Vec<u8>> {
    let mut frame = vec![0; LONGEST];
    let len = read(&mut frame).ok().filter(|&n| n >= 14)?;
    frame.truncate(len);
    frame.resize(len.max(SHORTEST), 0);
    Some(frame)
}
