//! `run`: the gateway itself.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use control::run::{Ended, StartError};
use sa_store::ledger::Balance;

use super::Failure;
use crate::app::{Offline, Service, ServiceError};
use crate::config::{self, GatewayConfig, LogFormat, PortKind};

/// `run`
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// End when all capture files are read and nothing is inside: for offline use with pcap ports.
    #[arg(long)]
    exit_when_idle: bool,
    /// Repeat a run exactly, IVs included: a throw-away lease store is used. Refused with af_xdp, vfio and tap ports.
    #[arg(long, value_name = "N")]
    test_seed: Option<u64>,
    /// Print the final counters as JSON.
    #[arg(long, requires = "exit_when_idle")]
    json: bool,
    /// Standard input is the socket of a supervisor, which started this process.
    #[arg(long, hide = true)]
    supervised: bool,
}

pub(super) fn run(args: &RunArgs) -> Result<(), Failure> {
    let mut config = config::load(&args.config).map_err(Failure::refused)?;
    config.test_seed = args.test_seed.or(config.test_seed);
    let live = config.ports.iter().find(|p| p.kind.is_live());
    if let (Some(_), Some(port)) = (config.test_seed, live) {
        return Err(Failure::refused(format!(
            "--test-seed makes nonces repeat, so it is refused with live ports such as \"{}\"",
            port.name
        )));
    }
    super::log::to_stderr(&config.log.level, config.log.format == LogFormat::Json);
    if args.supervised {
        attach_to_supervisor().map_err(Failure::failed)?;
    } else if needs_supervisor(&config) {
        return supervise();
    }
    super::log::write_aside();
    // Release builds abort: no destructor would stop the devices.
    pmd::quiesce::install_panic_hook();
    if args.exit_when_idle {
        offline(&config, args.json)
    } else {
        service(&config)
    }
}

fn service(config: &GatewayConfig) -> Result<(), Failure> {
    let service = Service::start(config).map_err(start_failed)?;
    if let Some(addr) = service.control().metrics_addr() {
        tracing::info!("metrics on http://{addr}/metrics");
    }
    let why = service.wait();
    tracing::info!(?why, "stopping");
    let balance = service.stop().map_err(Failure::failed)?;
    balanced(&balance)?;
    match why {
        Ended::Unhealthy => Err(Failure::failed(
            "a worker or the supervisor has died; see the log",
        )),
        Ended::Asked | Ended::Signal => Ok(()),
    }
}

/// Whether a device may be left running when this process is killed: no IOMMU stands before memory that is freed then.
fn needs_supervisor(config: &GatewayConfig) -> bool {
    let unconfined = |k: &PortKind| match k {
        PortKind::Vfio(nic) => nic.no_iommu,
        PortKind::Airoha(port) => port.at.no_iommu(),
        _ => false,
    };
    config.ports.iter().any(|p| unconfined(&p.kind))
        || config.engines.iter().any(|e| e.at.no_iommu())
}

/// Runs this command again as a child of this process, which holds its devices and memory.
fn supervise() -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(Failure::failed)?;
    let mut gateway = Command::new(program);
    gateway
        .args(std::env::args_os().skip(1))
        .arg("--supervised")
        // The service manager's watchdog is the child's, not this process's.
        .env_remove("WATCHDOG_PID");
    let ended = pmd::supervisor::supervise(gateway, pmd::device::vfio::stop_orphan)
        .map_err(|e| Failure::failed(format!("supervisor: {e}")))?;
    if let Some(signal) = ended.signal() {
        return Err(Failure::failed(format!(
            "the gateway was ended by signal {signal}; its devices are stopped"
        )));
    }
    match ended.code() {
        Some(0) => Ok(()),
        code => Err(Failure {
            code: code.and_then(|c| u8::try_from(c).ok()).unwrap_or(1),
            what: "the gateway ended with an error; its devices are stopped".into(),
        }),
    }
}

fn attach_to_supervisor() -> std::io::Result<()> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    pmd::supervisor::attach(socket)
}

fn offline(config: &GatewayConfig, json: bool) -> Result<(), Failure> {
    if let Some(port) = config.ports.iter().find(|p| p.kind.is_live()) {
        return Err(Failure::refused(format!(
            "--exit-when-idle is for captures; port \"{}\" never ends",
            port.name
        )));
    }
    let mut offline = Offline::open(config).map_err(start_failed)?;
    offline.run();
    let (balance, stats) = offline.finish().map_err(Failure::failed)?;
    if json {
        println!(
            "{:#}",
            serde_json::to_value(&stats).map_err(Failure::failed)?
        );
    }
    balanced(&balance)
}

fn start_failed(e: ServiceError) -> Failure {
    match e {
        ServiceError::Control(StartError::Refused(problems)) => {
            Failure::refused(problems.join("\n"))
        }
        other => Failure::failed(other),
    }
}

/// Every frame that came in must have gone out or been dropped for a reason.
fn balanced(b: &Balance) -> Result<(), Failure> {
    if b.holds() {
        tracing::info!(
            entered = b.entered,
            ended = b.ended,
            inside = b.inside,
            "every frame is accounted for"
        );
        return Ok(());
    }
    Err(Failure::disproved(format!(
        "{} frames entered, {} ended, {} are inside: the account does not balance",
        b.entered, b.ended, b.inside
    )))
}
