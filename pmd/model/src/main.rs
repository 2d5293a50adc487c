//! `esplanade-model`: a packet engine in software behind a vfio-user socket.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use esplanade_model::eip93::{Eip93, Switches};
use esplanade_model::soe::Soe;
use esplanade_model::{KnobArgs, Knobs, Model, Server};

#[derive(Parser)]
#[command(
    version,
    about = "Models of packet engines behind vfio-user sockets, to try and test drivers without the hardware"
)]
struct Args {
    #[command(subcommand)]
    model: Which,
}

#[derive(Subcommand)]
enum Which {
    /// The EIP-93 look-aside engine of MT7621 and EN7581
    Eip93 {
        /// Socket to listen on
        #[arg(long)]
        socket: PathBuf,
        #[command(flatten)]
        switches: Switches,
        #[command(flatten)]
        knobs: KnobArgs,
    },
    /// The secure offload engine of EN7581, with its Ethernet rings
    Soe {
        /// Socket to listen on
        #[arg(long)]
        socket: PathBuf,
        #[command(flatten)]
        switches: esplanade_model::soe::Switches,
        #[command(flatten)]
        knobs: KnobArgs,
    },
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    let (socket, mut model): (_, Box<dyn Model>) = match Args::parse().model {
        Which::Eip93 {
            socket,
            switches,
            knobs,
        } => (socket, Box::new(Eip93::new(switches, Knobs::new(&knobs)))),
        Which::Soe {
            socket,
            switches,
            knobs,
        } => (socket, Box::new(Soe::new(switches, Knobs::new(&knobs)))),
    };
    let server = Server::bind(&socket).with_context(|| format!("{}", socket.display()))?;
    tracing::info!(model = model.name(), socket = %socket.display(), "listening");
    server.run(&mut *model)?;
    Ok(())
}
