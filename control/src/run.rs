//! The control thread: one single-threaded runtime for everything that is not a packet.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::api::{self, ApiConfig, ApiError};
use crate::core::{Control, Parts, Reload, lock};
use crate::http;
use crate::kernel;
use crate::metrics::Exporter;
use crate::rekey::hook;
use crate::reload::reload;
use crate::vici;
use crate::watch::Watch;
use crate::xfrm;

/// Leases, retirement and events of busy SAs are looked at this often.
const TICK: Duration = Duration::from_millis(10);

/// What the control thread serves.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Scrape endpoint.
    pub metrics: Option<SocketAddr>,
    /// API socket.
    pub api: Option<ApiConfig>,
    /// Watch the SA files, and reload on SIGHUP.
    pub watch: bool,
    /// SIGTERM and SIGINT end [`Running::wait`]; tell the service manager of state.
    pub service: bool,
    /// Take the SAs that an IKE daemon puts into the kernel.
    pub ike: Option<xfrm::Settings>,
}

/// Why control did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The scrape endpoint cannot be bound.
    #[error("metrics listener {addr}: {source}")]
    Metrics {
        /// Address.
        addr: SocketAddr,
        /// Cause.
        source: std::io::Error,
    },
    /// The API socket cannot be bound.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The system refused a thread, a runtime or a signal handler.
    #[error("control thread: {0}")]
    System(#[from] std::io::Error),
    /// A metric is declared twice: a fault of ours.
    #[error("metrics: {0}")]
    Declared(String),
    /// The kernel's SAs cannot be followed.
    #[error("ike.xfrm: the kernel's SAs cannot be followed: {0}")]
    Xfrm(#[source] std::io::Error),
    /// The first load failed. Nothing was started.
    #[error("{}", .0.join("\n"))]
    Refused(Vec<String>),
}

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// [`Running::stop`] or its [`Stopper`].
    Asked,
    /// SIGTERM or SIGINT.
    Signal,
    /// A worker has died or is stuck; see the log.
    Unhealthy,
}

/// The control thread at work.
pub struct Running {
    control: Arc<Mutex<Control>>,
    kernel: Option<kernel::Running>,
    names: Option<vici::Running>,
    exporter: Arc<Exporter>,
    stop: Stopper,
    ended: watch::Receiver<Option<Ended>>,
    thread: Option<JoinHandle<()>>,
    metrics: Option<SocketAddr>,
}

/// Ends the control thread; can be kept anywhere.
#[derive(Clone, Debug)]
pub struct Stopper(watch::Sender<Option<Ended>>);

impl Stopper {
    /// Asks it to end.
    pub fn stop(&self) {
        self.end(Ended::Asked);
    }

    fn end(&self, why: Ended) {
        self.0.send_if_modified(|e| {
            let first = e.is_none();
            if first {
                *e = Some(why);
            }
            first
        });
    }
}

/// Loads the SA files and starts the thread.
///
/// # Errors
/// See [`StartError`]; in particular every problem of the SA files.
pub fn start(parts: Parts, options: Options) -> Result<Running, StartError> {
    let mut control = Control::new(parts);
    if !control.sa_files.is_empty() || options.ike.is_some() {
        let first = control.reload();
        if !first.ok {
            return Err(StartError::Refused(first.problems.clone()));
        }
    }
    start_loaded(control, options)
}

/// Starts the thread with a control that was given its configuration by [`Control::apply`].
///
/// # Errors
/// See [`StartError`].
pub fn start_loaded(control: Control, options: Options) -> Result<Running, StartError> {
    if let Some((program, _)) = control.hook() {
        hook::check(&program).map_err(|e| StartError::Refused(vec![e]))?;
    }
    let http = match options.metrics {
        Some(addr) => {
            Some(http::bind(addr).map_err(|source| StartError::Metrics { addr, source })?)
        }
        None => None,
    };
    let metrics = http.as_ref().and_then(|l| l.local_addr().ok());
    let api = options.api.as_ref().map(api::Listener::bind).transpose()?;
    let mut control = control;
    let plan = control.take_kernel_plan()?;
    let handle = control.kernel.clone();
    let mirror = match &options.ike {
        Some(settings) => Some(xfrm::Mirror::open(settings.clone()).map_err(StartError::Xfrm)?),
        None => None,
    };
    let control = Arc::new(Mutex::new(control));
    let exporter =
        Exporter::new(Arc::clone(&control)).map_err(|e| StartError::Declared(e.to_string()))?;
    let exporter = Arc::new(exporter);
    let (tx, ended) = watch::channel(None);
    let stop = Stopper(tx);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("files")
        .max_blocking_threads(1)
        .build()?;
    let work = Work {
        control: Arc::clone(&control),
        exporter: Arc::clone(&exporter),
        stop: stop.clone(),
        options,
    };
    let thread = std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            runtime.block_on(work.run(http, api, mirror));
            // Who reads files from a disk that hangs is not waited for.
            runtime.shutdown_background();
        })?;
    let kernel = match (plan, handle) {
        (Some(plan), Some(handle)) => {
            Some(kernel::Running::start(plan, &handle, Arc::clone(&control))?)
        }
        _ => None,
    };
    Ok(Running {
        control,
        kernel,
        names: None,
        exporter,
        stop,
        ended,
        thread: Some(thread),
        metrics,
    })
}

impl Running {
    /// Asks an IKE daemon for the names of its tunnels, on a thread with the rights of the one that calls.
    ///
    /// # Errors
    /// The system refused a thread or a runtime. Without a daemon it goes on trying.
    pub fn follow_names(&mut self, settings: vici::Settings) -> std::io::Result<()> {
        let running = vici::Running::start(settings, Arc::clone(&self.control))?;
        self.names = Some(running);
        Ok(())
    }

    /// Address on which metrics are served.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// The state. Hold it briefly: the thread waits for it.
    pub fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// A scrape, without HTTP.
    ///
    /// # Errors
    /// The encoder refused: a fault of ours.
    pub fn scrape(&self) -> Result<Vec<u8>, String> {
        self.exporter.scrape().map_err(|e| e.to_string())
    }

    /// Handle to end it from elsewhere.
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
    }

    /// Reads the SA files again.
    pub fn reload(&self) -> Reload {
        self.control().reload().clone()
    }

    /// Waits until it ends or `longest` has passed; `None` then.
    pub fn wait(&self, longest: Duration) -> Option<Ended> {
        let deadline = std::time::Instant::now() + longest;
        loop {
            let now = *self.ended.borrow();
            if now.is_some() || std::time::Instant::now() >= deadline {
                return now;
            }
            std::thread::sleep(Duration::from_millis(20).min(longest));
        }
    }

    /// Ends the thread and hands the state back, so that leases can be ended once the workers have stopped.
    /// `None` when somebody else still holds the state.
    pub fn stop(mut self) -> Option<Control> {
        self.stop.stop();
        if let Some(t) = self.thread.take() {
            // A panic was reported by the panic hook; the state is still there.
            let _ = t.join();
        }
        // Their threads hold the state, too.
        drop(self.kernel);
        drop(self.names);
        drop(self.exporter);
        let mutex = Arc::try_unwrap(self.control).ok()?;
        Some(mutex.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Work {
    control: Arc<Mutex<Control>>,
    exporter: Arc<Exporter>,
    stop: Stopper,
    options: Options,
}

impl Work {
    async fn run(
        self,
        http: Option<std::net::TcpListener>,
        api: Option<api::Listener>,
        mirror: Option<xfrm::Mirror>,
    ) {
        let mut ended = self.stop.0.subscribe();
        let work = async {
            tokio::join!(
                self.ticks(),
                self.files(),
                self.signals(),
                self.http(http),
                self.api(api.as_ref()),
                self.mirror(mirror)
            );
        };
        tokio::select! {
            () = work => {}
            _ = ended.wait_for(Option::is_some) => {}
        }
        if self.options.service {
            notify(&[NotifyState::Stopping]);
        }
    }

    async fn ticks(&self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watchdog = if self.options.service {
            sd_notify::watchdog_enabled()
        } else {
            None
        };
        let mut told = tokio::time::Instant::now();
        if self.options.service {
            notify(&[NotifyState::Ready]);
        }
        loop {
            tick.tick().await;
            let (problem, calls) = {
                let mut control = lock(&self.control);
                control.tick();
                (control.problem(), control.take_hook_calls())
            };
            for call in calls {
                self.hook(call);
            }
            match (problem, watchdog) {
                // A stuck worker starves the watchdog, so that the service manager restarts the gateway.
                (None, Some(w)) if told.elapsed() >= w / 3 => {
                    told = tokio::time::Instant::now();
                    notify(&[NotifyState::Watchdog]);
                }
                (Some(what), _) if !lock(&self.control).plane.alive() => {
                    tracing::error!("{what}");
                    self.stop.end(Ended::Unhealthy);
                }
                _ => {}
            }
        }
    }

    /// Runs the program that fetches successors, beside everything else. It is killed when the runtime ends.
    fn hook(&self, call: hook::Call) {
        let control = Arc::clone(&self.control);
        let Some((program, limit)) = lock(&control).hook() else {
            return;
        };
        tokio::spawn(async move {
            let outcome = hook::run(&program, &call, limit).await;
            lock(&control).hook_ended(&call, &outcome);
        });
    }

    async fn files(&self) {
        if !self.options.watch {
            return;
        }
        let paths = lock(&self.control).sa_files.clone();
        if paths.is_empty() {
            return;
        }
        let mut watch = match Watch::new(&paths) {
            Ok(w) => w,
            Err(e) => {
                tracing::warn!(error = %e, "SA files cannot be watched; use SIGHUP or `esplanade reload`");
                return;
            }
        };
        loop {
            if let Err(e) = watch.changed().await {
                tracing::warn!(error = %e, "SA files are no longer watched; use SIGHUP or `esplanade reload`");
                return;
            }
            tracing::info!("SA files changed");
            reload(&self.control).await;
        }
    }

    async fn signals(&self) {
        if !self.options.service {
            return;
        }
        let handlers = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::hangup()),
        );
        let (Ok(mut term), Ok(mut int), Ok(mut hup)) = handlers else {
            tracing::error!("signals cannot be handled");
            return;
        };
        loop {
            tokio::select! {
                _ = term.recv() => self.stop.end(Ended::Signal),
                _ = int.recv() => self.stop.end(Ended::Signal),
                _ = hup.recv() => {
                    tracing::info!("SIGHUP");
                    let control = Arc::clone(&self.control);
                    // Meanwhile other signals are heard.
                    tokio::spawn(async move { reload(&control).await });
                }
            }
        }
    }

    async fn mirror(&self, mirror: Option<xfrm::Mirror>) {
        if let Some(mirror) = mirror {
            mirror.run(Arc::clone(&self.control)).await;
        }
    }

    async fn http(&self, listener: Option<std::net::TcpListener>) {
        let Some(listener) = listener else { return };
        match tokio::net::TcpListener::from_std(listener) {
            Ok(l) => http::serve(l, Arc::clone(&self.control), Arc::clone(&self.exporter)).await,
            Err(e) => tracing::error!(error = %e, "metrics are not served"),
        }
    }

    async fn api(&self, listener: Option<&api::Listener>) {
        let Some(listener) = listener else { return };
        if let Err(e) = api::serve(listener, Arc::clone(&self.control)).await {
            tracing::error!(error = %e, "the API is not served");
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // Not started by a service manager: nobody to tell.
    let _ = sd_notify::notify(state);
}
