//! Runs the program that fetches successors: in a process group of its own, for a limited time, with bounded output.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::terms::Reason;

/// Output that goes to the log, bytes of each stream; what follows is read and thrown away.
const SHOWN: usize = 4096;
/// Longest line of the log.
const LINE: usize = 240;
/// How long the output of a program that has ended is waited for: somebody else may hold its end of the pipe.
const LINGER: Duration = Duration::from_millis(200);

/// One attempt to fetch a successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Tunnel.
    pub tunnel: String,
    /// Its index, for the answer.
    pub index: sa_store::runtime::TunnelIdx,
    /// SA that expires.
    pub sa: String,
    /// `in` or `out`.
    pub direction: &'static str,
    /// SPI of that SA.
    pub spi: String,
    /// Why.
    pub reason: Reason,
    /// From 1.
    pub attempt: u32,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended well; the successor comes with the SA files.
    Done,
    /// It ended with this status, or by a signal.
    Failed(String),
    /// It was still running at the limit, and was killed with all its children.
    Killed,
    /// It could not be started.
    NotStarted(String),
}

/// Whether a program may be run: it is a file, may be executed, and nobody but its owner can change it.
///
/// # Errors
/// Why not, for the operator.
pub fn check(program: &Path) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("rekey.hook: {} {what}", program.display()));
    match std::fs::metadata(program) {
        Err(e) => wrong(&format!("cannot be used: {e}")),
        Ok(m) if !m.is_file() => wrong("is not a file"),
        Ok(m) if m.mode() & 0o111 == 0 => wrong("is not executable"),
        Ok(m) if m.mode() & 0o022 != 0 => {
            wrong("can be changed by others than its owner; chmod go-w it")
        }
        Ok(_) => Ok(()),
    }
}

/// Runs the program with the arguments tunnel, SA, direction, reason.
pub async fn run(program: &Path, call: &Call, limit: Duration) -> Outcome {
    let mut command = Command::new(program);
    command
        .args([&call.tunnel, &call.sa])
        .args([call.direction, call.reason.name()])
        // Nothing of our own environment is the program's business.
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("ESPLANADE_TUNNEL", &call.tunnel)
        .env("ESPLANADE_SA", &call.sa)
        .env("ESPLANADE_DIRECTION", call.direction)
        .env("ESPLANADE_SPI", &call.spi)
        .env("ESPLANADE_REASON", call.reason.name())
        .env("ESPLANADE_ATTEMPT", call.attempt.to_string())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return Outcome::NotStarted(format!("{}: {e}", program.display())),
    };
    let mut group = Group::of(child.id());
    let out = drain(child.stdout.take(), &call.tunnel);
    let err = drain(child.stderr.take(), &call.tunnel);
    let work = async {
        let mut output = std::pin::pin!(async { tokio::join!(out, err) });
        tokio::select! {
            status = child.wait() => {
                // The group's number may be another's from here on.
                group.forget();
                let _ = tokio::time::timeout(LINGER, output).await;
                status
            }
            // Both pipes are closed: only the end is waited for.
            _ = &mut output => {
                let status = child.wait().await;
                group.forget();
                status
            }
        }
    };
    match tokio::time::timeout(limit, work).await {
        Ok(Ok(status)) if status.success() => Outcome::Done,
        Ok(Ok(status)) => Outcome::Failed(status.to_string()),
        Ok(Err(e)) => Outcome::Failed(e.to_string()),
        Err(_) => {
            group.kill();
            // It cannot outlive the signal; its entry in the process table is taken away.
            let _ = tokio::time::timeout(LINGER, child.wait()).await;
            Outcome::Killed
        }
    }
}

/// A process group that is killed when it is dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(leader: Option<u32>) -> Self {
        Self(
            leader
                .and_then(|id| i32::try_from(id).ok())
                .map(Pid::from_raw),
        )
    }

    fn forget(&mut self) {
        self.0 = None;
    }

    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // It may have ended in this moment.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads a stream to its end, and writes the beginning of it to the log.
async fn drain(stream: Option<impl AsyncRead + Unpin>, tunnel: &str) {
    let Some(mut stream) = stream else { return };
    let mut shown = Shown::new(tunnel);
    let mut buffer = [0; 1024];
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        shown.take(buffer.get(..n).unwrap_or_default());
    }
}

/// Output on its way to the log. What was read is shown also when reading is given up.
struct Shown<'t> {
    tunnel: &'t str,
    line: Vec<u8>,
    left: usize,
    lost: usize,
}

impl<'t> Shown<'t> {
    fn new(tunnel: &'t str) -> Self {
        Self {
            tunnel,
            line: Vec::new(),
            left: SHOWN,
            lost: 0,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        let known = bytes.len().min(self.left);
        self.left -= known;
        self.lost += bytes.len() - known;
        for &b in bytes.get(..known).unwrap_or_default() {
            if b == b'\n' {
                self.flush();
            } else if self.line.len() < LINE {
                self.line.push(b);
            } else {
                self.lost += 1;
            }
        }
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            let text = String::from_utf8_lossy(&self.line);
            let text: String = text.chars().flat_map(char::escape_debug).collect();
            tracing::info!(tunnel = self.tunnel, "rekey hook: {text}");
            self.line.clear();
        }
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.flush();
        if self.lost > 0 {
            tracing::info!(
                tunnel = self.tunnel,
                bytes = self.lost,
                "rekey hook: more output is not shown"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use sa_store::runtime::TunnelIdx;

    use super::*;

    fn call() -> Call {
        Call {
            tunnel: "berlin".into(),
            index: TunnelIdx(0),
            sa: "berlin-out".into(),
            direction: "out",
            spi: "0x00001001".into(),
            reason: Reason::Bytes,
            attempt: 3,
        }
    }

    fn script(dir: &Path, body: &str) -> std::path::PathBuf {
        let path = dir.join("hook");
        // Written under another name: a file that is open for writing cannot be run.
        std::fs::write(dir.join("new"), format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(dir.join("new"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(dir.join("new"), &path).unwrap();
        path
    }

    fn ran(body: &str, limit: Duration) -> (Outcome, Duration, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let body = body.replace("DIR", &dir.path().display().to_string());
        let path = script(dir.path(), &body);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let began = Instant::now();
        let outcome = runtime.block_on(run(&path, &call(), limit));
        (outcome, began.elapsed(), dir)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn it_is_told_what_expires_and_sees_nothing_else_of_us() {
        let (outcome, _, dir) = ran("echo \"$@\" > DIR/a; env > DIR/e", LONG);
        assert_eq!(outcome, Outcome::Done);
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("a"), "berlin berlin-out out bytes\n");
        let env = read("e");
        for line in [
            "ESPLANADE_TUNNEL=berlin",
            "ESPLANADE_SA=berlin-out",
            "ESPLANADE_DIRECTION=out",
            "ESPLANADE_SPI=0x00001001",
            "ESPLANADE_REASON=bytes",
            "ESPLANADE_ATTEMPT=3",
        ] {
            assert!(env.lines().any(|l| l == line), "{line} in {env}");
        }
        assert!(!env.contains("CARGO"), "{env}");
    }

    #[test]
    fn only_a_program_that_others_cannot_change_may_be_the_hook() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "true");
        assert_eq!(check(&path), Ok(()));
        for (mode, why) in [
            (0o775, "changed by others"),
            (0o757, "changed by others"),
            (0o644, "not executable"),
        ] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let refused = check(&path).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        assert!(check(dir.path()).unwrap_err().contains("not a file"));
        assert!(
            check(Path::new("/nonexistent"))
                .unwrap_err()
                .contains("cannot be used")
        );
    }

    #[test]
    fn failures_are_told() {
        let (outcome, ..) = ran("exit 3", LONG);
        assert!(
            matches!(&outcome, Outcome::Failed(s) if s.contains('3')),
            "{outcome:?}"
        );
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let outcome = runtime.block_on(run(&dir.path().join("none"), &call(), LONG));
        assert!(matches!(outcome, Outcome::NotStarted(_)), "{outcome:?}");
    }

    #[test]
    fn at_the_limit_it_is_killed_with_its_children() {
        let (outcome, took, dir) = ran(
            "sleep 300 & echo $! > DIR/child\nsleep 300",
            Duration::from_millis(700),
        );
        assert_eq!(outcome, Outcome::Killed);
        assert!(took < Duration::from_secs(20), "{took:?}");
        let child = std::fs::read_to_string(dir.path().join("child")).unwrap();
        let stat = format!("/proc/{}/stat", child.trim());
        let deadline = Instant::now() + Duration::from_secs(10);
        // Gone, or dead and not yet taken away by whoever adopted it.
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
            assert!(Instant::now() < deadline, "the child lives on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn much_output_neither_blocks_it_nor_fills_the_log() {
        let (outcome, ..) = ran(
            "head -c 3000000 /dev/zero; head -c 300000 /dev/zero >&2",
            LONG,
        );
        assert_eq!(outcome, Outcome::Done);
        let mut shown = Shown::new("t");
        for _ in 0..100 {
            shown.take(&[b'x'; 1024]);
        }
        assert_eq!((shown.left, shown.line.len()), (0, LINE));
        assert_eq!(shown.lost, 100 * 1024 - LINE);
    }

    #[test]
    fn a_child_that_keeps_the_pipe_does_not_keep_us() {
        let (outcome, took, dir) = ran("sleep 30 & echo $! > DIR/child", LONG);
        assert_eq!(outcome, Outcome::Done);
        assert!(took < Duration::from_secs(20), "{took:?}");
        let child = std::fs::read_to_string(dir.path().join("child")).unwrap();
        let child = Pid::from_raw(child.trim().parse().unwrap());
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
    }
}
