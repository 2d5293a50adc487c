//! The supervisor's own process: it starts the gateway, passes signals on, waits for its end, cleans up after it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;

use super::{Keeper, StopDevice};

/// Signals that are meant for the gateway.
const PASSED_ON: [Signal; 5] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Runs `gateway` with a supervisor's socket as its standard input, until it has ended and all that it had registered is
/// stopped and let go. Must be called before this process has threads: it blocks signals.
///
/// # Errors
/// The gateway could not be started; what the system answers.
pub fn supervise(mut gateway: Command, stop: StopDevice) -> io::Result<ExitStatus> {
    let mask = signals();
    mask.thread_block()?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&mask, flags)?;
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    // A group of its own: what a terminal sends to all reaches the gateway once, through us.
    let mut child = gateway
        .stdin(Stdio::from(theirs))
        .process_group(0)
        .spawn()?;
    // Its end of the socket is only the child's now.
    drop(gateway);
    outlive();
    let mut keeper = Keeper::new(stop);
    let mut connected = true;
    let status = loop {
        let quiet = PollFlags::empty();
        let wanted = if connected { PollFlags::POLLIN } else { quiet };
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(ours.as_fd(), wanted),
        ];
        let watched = if connected { 2 } else { 1 };
        match poll(&mut fds[..watched], PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(give_up(child, keeper, e.into())),
        }
        if connected {
            connected = keeper.serve(&ours).unwrap_or(false);
        }
        match ended(&signals, &mut child) {
            Ok(None) => {}
            Ok(Some(status)) => break status,
            Err(e) => return Err(give_up(child, keeper, e)),
        }
    };
    // What it had sent just before its end.
    let _ = keeper.serve(&ours);
    keeper.release();
    Ok(status)
}

/// What the supervisor waits for.
pub(super) fn signals() -> SigSet {
    PASSED_ON.into_iter().chain([Signal::SIGCHLD]).collect()
}

/// Passes signals on; how the gateway ended, if it has.
fn ended(signals: &SignalFd, child: &mut Child) -> io::Result<Option<ExitStatus>> {
    while let Some(info) = signals.read_signal()? {
        let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
        match Signal::try_from(signal) {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            // It may be gone, and not waited for yet: then nobody gets it.
            Ok(signal) => drop(kill(pid_of(child), signal)),
        }
    }
    child.try_wait()
}

/// The supervisor cannot do its task: the gateway must not go on without one.
fn give_up(mut child: Child, keeper: Keeper, why: io::Error) -> io::Error {
    let _ = child.kill();
    let _ = child.wait();
    keeper.release();
    why
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

/// When memory runs out the gateway is to be killed before its supervisor. Needs rights; without them it is a matter of luck.
fn outlive() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!(%error, "the supervisor is not protected when memory runs out");
    }
}
