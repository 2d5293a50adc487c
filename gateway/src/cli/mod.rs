//! The command line.
//!
//! Tables are for people, `--json` is for programs. Keys are never printed, except by `import`, whose purpose
//! is to write an SA file.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed; the reason is on standard error |
//! | 2 | the command line is wrong |
//! | 3 | a configuration or SA file is refused; every problem is on standard error |
//! | 4 | no gateway answers on the API socket |
//! | 5 | `demo` saw a packet that was not what was sent, or lost one without a reason; `run` ended with an account that does not balance |

mod check;
mod client;
mod devices;
mod events;
mod explain;
mod import;
pub(crate) mod log;
mod routes;
mod run;
mod show;
mod stats;
pub(crate) mod table;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use control::api::Command as Api;

/// Userspace poll-mode IPsec gateway.
///
/// Exit codes: 0 done; 1 failed; 2 wrong command line; 3 configuration or SA file refused; 4 no gateway answers
/// on the API socket; 5 demo or run found a wrong packet or an account that does not balance.
#[derive(Debug, Parser)]
#[command(name = "esplanade", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway.
    Run(run::RunArgs),
    /// Check the configuration and SA files; print what would be loaded.
    Check(check::CheckArgs),
    /// Run two gateways against each other in this process and verify every packet. Needs no rights, NIC or files.
    Demo(crate::demo::DemoArgs),
    /// Read another program's SAs and policies and print them as a native SA file, keys included.
    Import(import::ImportArgs),
    /// Security associations of the running gateway.
    Sa {
        #[command(subcommand)]
        command: SaCommand,
    },
    /// Policies of the running gateway.
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Counters of the running gateway.
    Stats(stats::StatsArgs),
    /// Let the running gateway read its SA files again.
    Reload(ClientArgs),
    /// Readiness of the running gateway and the outcome of its latest reload.
    Status(ClientArgs),
    /// Recent events of the running gateway.
    Events(events::EventsArgs),
    /// Ports of the running gateway.
    Ports(ClientArgs),
    /// Look-aside engines of the running gateway, and how far they are trusted.
    Engines(ClientArgs),
    /// Routes of the running gateway, and where they come from.
    Routes(routes::RoutesArgs),
    /// Neighbours of the running gateway with their link addresses.
    Neighbours(routes::NeighboursArgs),
    /// SAs that the running gateway takes from an IKE daemon, and what it leaves to the kernel.
    Ike(ClientArgs),
    /// Capture what passes a port of the running gateway into a pcapng file.
    Capture {
        #[command(subcommand)]
        command: CaptureCommand,
    },
    /// Tell what would happen to a packet, and why.
    Explain(explain::ExplainArgs),
    /// Network devices of this machine, and whether a port of kind vfio can own them.
    Devices(devices::DevicesArgs),
    /// Take a network device from the kernel, for a port of kind vfio.
    Bind(devices::BindArgs),
    /// Give a network device back to the kernel.
    Unbind(devices::UnbindArgs),
}

#[derive(Debug, Subcommand)]
enum SaCommand {
    /// All SAs.
    List {
        /// Only those of this tunnel.
        #[arg(long)]
        tunnel: Option<String>,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// One SA with all counters.
    Show {
        /// Name.
        name: String,
        #[command(flatten)]
        client: ClientArgs,
    },
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// All policies in the order of look-up, with their hits.
    List(ClientArgs),
}

#[derive(Debug, Subcommand)]
enum CaptureCommand {
    /// Start.
    Start {
        /// Port.
        port: String,
        /// File to make, on the gateway's machine.
        file: PathBuf,
        /// Stop after this many packets.
        #[arg(long)]
        packets: Option<u64>,
        /// Bytes kept of each packet.
        #[arg(long)]
        snap: Option<u32>,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Stop.
    Stop {
        /// Port.
        port: String,
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// How the running gateway is reached and its answer shown.
#[derive(Clone, Debug, Args)]
struct ClientArgs {
    /// API socket.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/esplanade/api.sock",
        env = "ESPLANADE_SOCKET"
    )]
    socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How a command ended badly.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    what: String,
}

impl Failure {
    /// Something went wrong.
    pub(crate) fn failed(what: impl Display) -> Self {
        Self {
            code: 1,
            what: what.to_string(),
        }
    }

    /// Files are refused.
    pub(crate) fn refused(what: impl Display) -> Self {
        Self {
            code: 3,
            what: what.to_string(),
        }
    }

    /// No gateway answers.
    pub(crate) fn unreachable(what: impl Display) -> Self {
        Self {
            code: 4,
            what: what.to_string(),
        }
    }

    /// A proof failed.
    pub(crate) fn disproved(what: impl Display) -> Self {
        Self {
            code: 5,
            what: what.to_string(),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    end_with_the_reader();
    let done = dispatch(cli.command);
    log::flush();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(f) => {
            eprintln!("{}", f.what);
            ExitCode::from(f.code)
        }
    }
}

/// `esplanade sa list | head` ends as other tools do, with the code of SIGPIPE: Rust ignores that signal and panics when it prints.
fn end_with_the_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<String>();
        if message.is_some_and(|m| m.contains("stdout") && m.contains("Broken pipe")) {
            std::process::exit(141);
        }
        usual(info);
        // Release builds abort next.
        log::flush();
    }));
}

fn dispatch(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Demo(args) => crate::demo::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Sa {
            command: SaCommand::List { tunnel, client },
        } => show::sa_list(&client, tunnel),
        Command::Sa {
            command: SaCommand::Show { name, client },
        } => show::sa_show(&client, name),
        Command::Policy {
            command: PolicyCommand::List(client),
        } => show::policy_list(&client),
        Command::Stats(args) => stats::stats(&args),
        Command::Reload(client) => show::reload(&client),
        Command::Status(client) => show::pretty(&client, &Api::Status),
        Command::Events(args) => events::events(&args),
        Command::Ports(client) => show::ports(&client),
        Command::Engines(client) => show::engines(&client),
        Command::Routes(args) => routes::routes(&args),
        Command::Neighbours(args) => routes::neighbours(&args),
        Command::Ike(client) => show::ike(&client),
        Command::Capture {
            command:
                CaptureCommand::Start {
                    port,
                    file,
                    packets,
                    snap,
                    client,
                },
        } => show::capture_start(&client, port, file, packets, snap),
        Command::Capture {
            command: CaptureCommand::Stop { port, client },
        } => show::capture_stop(&client, port),
        Command::Explain(args) => explain::run(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Bind(args) => devices::bind(&args),
        Command::Unbind(args) => devices::unbind(&args),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
