//! The log. Whoever says something does not wait for the disk, pipe or terminal behind standard error: a thread of its own
//! writes, and what comes too fast for it is counted.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;

/// Lines that wait, at most.
const LINES: usize = 4096;
/// How long the end of the program waits for lines that are left.
const LAST: Duration = Duration::from_secs(1);

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Sets logging up; `ESPLANADE_LOG` wins over `level`. Until [`write_aside`] lines are written where they are said.
pub(crate) fn to_stderr(level: &str, json: bool) {
    let level = std::env::var("ESPLANADE_LOG").unwrap_or_else(|_| level.to_owned());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_ansi(colour())
        .with_writer(|| Line(QUEUE.get()));
    // Already set by somebody who embeds us: theirs stays.
    let _ = if json {
        builder.json().try_init()
    } else {
        builder.with_target(false).try_init()
    };
}

/// From now on a thread writes. Not for a supervisor, whose signals would find the thread.
pub(crate) fn write_aside() {
    let (queue, lines) = queue();
    let lost = Arc::clone(&queue.lost);
    let started = std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write_all(&lines, &lost, &mut io::stderr()));
    match started {
        // Only the first one's lines are written by its thread.
        Ok(_) => drop(QUEUE.set(queue)),
        Err(e) => tracing::warn!(error = %e, "no thread for the log: a slow one holds others up"),
    }
}

/// Waits until what was said is written, but not for ever.
pub(crate) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(Instant::now() + LAST);
    }
}

enum Entry {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

struct Queue {
    entries: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

fn queue() -> (Queue, Receiver<Entry>) {
    let (entries, lines) = sync_channel(LINES);
    let lost = Arc::default();
    (Queue { entries, lost }, lines)
}

impl Queue {
    fn say(&self, line: &[u8]) {
        if self.entries.try_send(Entry::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self, until: Instant) {
        let (done, written) = sync_channel(1);
        let mut entry = Entry::Flush(done);
        while let Err(e) = self.entries.try_send(entry) {
            let TrySendError::Full(again) = e else { return };
            if Instant::now() >= until {
                return;
            }
            entry = again;
            std::thread::sleep(Duration::from_millis(1));
        }
        // Whoever waited long enough goes without.
        let _ = written.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

fn write_all(entries: &Receiver<Entry>, lost: &AtomicU64, to: &mut impl Write) {
    for entry in entries {
        match entry {
            // There is nowhere to complain of a log that cannot be written.
            Entry::Line(line) => drop(to.write_all(&line)),
            // It may have gone on without.
            Entry::Flush(done) => drop(done.try_send(())),
        }
        let lines = lost.swap(0, Ordering::Relaxed);
        if lines > 0 {
            tracing::warn!(
                lines,
                "lines of the log were lost: it is written too slowly"
            );
        }
    }
}

/// What one line is written to.
struct Line(Option<&'static Queue>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0 {
            Some(queue) => queue.say(line),
            None => io::stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether messages may be coloured: on a terminal, unless <https://no-color.org> is asked for.
fn colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    io::stderr().is_terminal() && !refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_log_that_stands_still_and_what_is_lost_is_counted() {
        let (queue, lines) = queue();
        for n in 0..LINES + 3 {
            queue.say(format!("{n}\n").as_bytes());
        }
        assert_eq!(queue.lost.load(Ordering::Relaxed), 3);
        queue.flush(Instant::now());
        let mut written = Vec::new();
        let lost = Arc::clone(&queue.lost);
        drop(queue);
        write_all(&lines, &lost, &mut written);
        let text = String::from_utf8(written).unwrap();
        assert_eq!(text.lines().count(), LINES);
        assert!(text.starts_with("0\n1\n") && text.ends_with(&format!("{}\n", LINES - 1)));
        assert_eq!(lost.load(Ordering::Relaxed), 0, "they were told");
    }

    #[test]
    fn a_flush_comes_back_when_all_is_written() {
        let (queue, lines) = queue();
        let writer = std::thread::spawn(move || {
            let mut written = Vec::new();
            write_all(&lines, &AtomicU64::new(0), &mut written);
            written
        });
        queue.say(b"one\n");
        let began = Instant::now();
        queue.flush(began + Duration::from_secs(60));
        assert!(began.elapsed() < Duration::from_secs(60));
        drop(queue);
        assert_eq!(writer.join().unwrap(), b"one\n");
    }
}
