//! Follows the daemon: asks for all SAs, is told of new ones, begins again when it ends.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant as StdInstant};

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::Shared;
use super::sas::children;
use super::wire::{self, Framer, Packet, WireError};
use crate::core::{Control, lock};

/// Events that tell of SAs: those of the list, and what changes. A daemon that has not all of the latter is listed more often.
const LISTED: &str = "list-sa";
const CHANGES: [&str; 3] = ["child-updown", "child-rekey", "ike-update"];

/// How patient the client is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Time for the daemon to take or give one packet.
    pub(super) answer: Duration,
    /// Time for all its SAs.
    pub(super) list: Duration,
    /// How often names are compared with what runs.
    pub(super) look: Duration,
    /// Pauses between lists while there are SAs without a name, which may be another daemon's: from the first up to the last.
    pub(super) lists: [Duration; 2],
    /// Likewise between attempts to reach the daemon.
    pub(super) retries: [Duration; 2],
}

const TIMES: Times = Times {
    answer: Duration::from_secs(10),
    list: Duration::from_secs(120),
    look: Duration::from_secs(2),
    lists: [Duration::from_secs(5), Duration::from_secs(300)],
    retries: [Duration::from_secs(1), Duration::from_secs(10)],
};
/// Bytes that are read in a second; ten thousand tunnels are 15 MB.
pub(super) const MOST: usize = 8 << 20;
/// Bytes that are read at once.
const READ: usize = 16 << 10;
/// Longest path of a socket, bytes (`sun_path` and its end).
const LONGEST_PATH: usize = 107;

/// Where the daemon is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Its socket; see [`Settings::new`].
    socket: PathBuf,
}

impl Settings {
    /// Of a socket's path.
    ///
    /// # Errors
    /// The path is relative, or longer than a socket's can be.
    pub fn new(socket: &Path) -> Result<Self, &'static str> {
        let length = socket.as_os_str().len();
        if !socket.is_absolute() {
            return Err("an absolute path is needed");
        }
        if length > LONGEST_PATH {
            return Err("a socket's path has 107 bytes at most");
        }
        Ok(Self {
            socket: socket.to_owned(),
        })
    }
}

/// Why the daemon is not heard.
#[derive(Debug, Error)]
enum ClientError {
    /// Not running, or this user may not connect.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// It ended.
    #[error("the daemon closed the connection")]
    Closed,
    /// It hangs.
    #[error("the daemon does not answer")]
    Silent,
    /// It is no VICI, or not what we speak.
    #[error("the daemon sent {0}")]
    Wire(#[from] WireError),
    /// Another answer than was asked for.
    #[error("the daemon sent an answer to something else")]
    Strange,
    /// It does not know what names are got with.
    #[error("the daemon does not know \"{0}\"")]
    Unknown(&'static str),
}

/// The thread at work. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// No thread.
    pub(crate) fn start(settings: Settings, control: Arc<Mutex<Control>>) -> io::Result<Self> {
        Self::start_with(settings, control, TIMES)
    }

    pub(super) fn start_with(
        settings: Settings,
        control: Arc<Mutex<Control>>,
        times: Times,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let names = Shared::default();
        names.lock().report.socket = settings.socket.display().to_string();
        lock(&control).names = Some(names.clone());
        let client = Client {
            settings,
            control,
            names,
            retry: Pauses::new(times.retries),
            times,
        };
        let (stop, mut stopped) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("vici".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped.wait_for(|s| *s) => {}
                        () = client.follow() => {}
                    }
                });
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

struct Client {
    settings: Settings,
    control: Arc<Mutex<Control>>,
    names: Shared,
    times: Times,
    retry: Pauses,
}

impl Client {
    async fn follow(mut self) {
        loop {
            let Err(why) = self.session().await;
            self.lost(&why);
            sleep(self.retry.next()).await;
        }
    }

    /// One connection, as long as it lasts.
    async fn session(&mut self) -> Result<std::convert::Infallible, ClientError> {
        let mut link = Link::open(&self.settings.socket, self.times.answer).await?;
        if !link.register(LISTED).await? {
            return Err(ClientError::Unknown(LISTED));
        }
        for event in CHANGES {
            link.register(event).await?;
        }
        self.list(&mut link).await?;
        self.look_over(true);
        self.connected();
        let mut look = interval(self.times.look);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pauses = Pauses::new(self.times.lists);
        let mut next_list = Instant::now() + pauses.next();
        let mut unnamed_before = 0;
        loop {
            tokio::select! {
                biased;
                _ = look.tick() => {
                    let unnamed = self.look_over(false);
                    if unnamed == 0 {
                        pauses = Pauses::new(self.times.lists);
                        next_list = next_list.min(Instant::now() + pauses.next());
                    } else if unnamed_before > 0 && Instant::now() >= next_list {
                        self.list(&mut link).await?;
                        next_list = Instant::now() + pauses.next();
                    }
                    unnamed_before = unnamed;
                }
                packet = link.packet() => self.hear(packet?)?,
            }
        }
    }

    /// Has all SAs told.
    async fn list(&self, link: &mut Link) -> Result<(), ClientError> {
        // SAs that another thread of the daemon's works on are left out, instead of waiting for it.
        link.send(&wire::command("list-sas", &[("noblock", "yes")]))
            .await?;
        let end = Instant::now() + self.times.list;
        while Instant::now() < end {
            match link.answer().await? {
                Packet::Done => return Ok(()),
                Packet::UnknownCommand => return Err(ClientError::Unknown("list-sas")),
                other => self.hear(other)?,
            }
        }
        Err(ClientError::Silent)
    }

    fn hear(&self, packet: Packet<'_>) -> Result<(), ClientError> {
        let Packet::Event { message, .. } = packet else {
            return Err(ClientError::Strange);
        };
        let children = children(message)?;
        let now = StdInstant::now();
        let mut names = self.names.lock();
        for child in children {
            names.learn(&child, now);
        }
        Ok(())
    }

    /// Compares names with what runs. Returns how many SAs have none.
    fn look_over(&self, anew: bool) -> usize {
        let runs = lock(&self.control).mirrored_runs();
        let mut names = self.names.lock();
        names.look_over(&runs, anew, StdInstant::now());
        names.report.unnamed
    }

    fn connected(&mut self) {
        self.retry = Pauses::new(self.times.retries);
        let mut names = self.names.lock();
        names.report.connected = true;
        names.report.problem = None;
        let (named, unnamed) = (names.report.named, names.report.unnamed);
        drop(names);
        let socket = self.settings.socket.display();
        tracing::info!(%socket, named, unnamed, "the IKE daemon names its tunnels");
        let text = format!("{named} SAs have names, {unnamed} have none");
        lock(&self.control).events().note("vici_connected", text);
    }

    fn lost(&self, why: &ClientError) {
        let text = why.to_string();
        let mut names = self.names.lock();
        let report = &mut names.report;
        report.failures += 1;
        // Attempts that fail alike are told once.
        let news = report.connected || report.problem.as_ref() != Some(&text);
        report.connected = false;
        report.problem = Some(text.clone());
        drop(names);
        if news {
            let socket = self.settings.socket.display();
            tracing::warn!(%socket, why = text, "the IKE daemon does not name its tunnels; trying again");
            lock(&self.control).events().note("vici_lost", text);
        }
    }
}

/// A connection.
struct Link {
    stream: UnixStream,
    /// Time for the daemon to take or give one packet.
    answer: Duration,
    framer: Framer,
    room: Box<[u8]>,
    /// Bytes read since then.
    read: usize,
    since: Instant,
}

impl Link {
    async fn open(socket: &Path, answer: Duration) -> Result<Self, ClientError> {
        let stream = timeout(answer, UnixStream::connect(socket)).await;
        let stream = stream.map_err(|_| ClientError::Silent)?;
        Ok(Self {
            stream: stream.map_err(ClientError::Connect)?,
            answer,
            framer: Framer::default(),
            room: vec![0; READ].into(),
            read: 0,
            since: Instant::now(),
        })
    }

    /// Whether the daemon has such events. None can come before the first answer but for those registered earlier.
    async fn register(&mut self, event: &'static str) -> Result<bool, ClientError> {
        self.send(&wire::register(event)).await?;
        let end = Instant::now() + self.answer;
        while Instant::now() < end {
            match self.answer().await? {
                Packet::Registered => return Ok(true),
                Packet::UnknownEvent => return Ok(false),
                // The list that follows tells it, too.
                Packet::Event { .. } => {}
                _ => return Err(ClientError::Strange),
            }
        }
        Err(ClientError::Silent)
    }

    async fn send(&mut self, packet: &[u8]) -> Result<(), ClientError> {
        let sent = timeout(self.answer, self.stream.write_all(packet)).await;
        Ok(sent.map_err(|_| ClientError::Silent)??)
    }

    /// The next packet, which must come soon.
    async fn answer(&mut self) -> Result<Packet<'_>, ClientError> {
        let packet = timeout(self.answer, self.packet()).await;
        packet.map_err(|_| ClientError::Silent)?
    }

    /// The next packet. Nothing is lost when it is given up.
    async fn packet(&mut self) -> Result<Packet<'_>, ClientError> {
        while !self.framer.is_ready()? {
            if self.read >= MOST {
                sleep_until(self.since + Duration::from_secs(1)).await;
            }
            if self.since.elapsed() >= Duration::from_secs(1) {
                (self.read, self.since) = (0, Instant::now());
            }
            let n = self.stream.read(&mut self.room).await?;
            let heard = self.room.get(..n).unwrap_or_default();
            if heard.is_empty() {
                return Err(ClientError::Closed);
            }
            self.read += n;
            self.framer.push(heard);
        }
        self.framer.next()?.ok_or(ClientError::Strange)
    }
}

/// Each twice the one before, within bounds.
#[derive(Debug)]
struct Pauses {
    next: Duration,
    last: Duration,
}

impl Pauses {
    fn new([first, last]: [Duration; 2]) -> Self {
        Self { next: first, last }
    }

    fn next(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(self.last);
        now
    }
}
