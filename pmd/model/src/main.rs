//! `esplanade-model`: a packet engine in software behind a vfio-user socket.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use esplanade_model::eip93::{Eip93, Switches};
use esplanade_model::soe::{Soe, Tap};
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
        /// TAP interface behind one of the block's MACs, 1 to 4: `1=lan0`. One for each MAC that is to carry frames
        #[arg(long, value_name = "GDM=INTERFACE", value_parser = gdm_and_tap)]
        tap: Vec<(u8, String)>,
        #[command(flatten)]
        switches: esplanade_model::soe::Switches,
        #[command(flatten)]
        knobs: KnobArgs,
    },
}

fn gdm_and_tap(text: &str) -> Result<(u8, String), String> {
    let parts = text.split_once('=');
    let (gdm, name) = parts.ok_or("a MAC and an interface: 1=lan0")?;
    let gdm = gdm.parse().ok().filter(|n| (1..=4).contains(n));
    Ok((gdm.ok_or("MACs are 1 to 4")?, name.to_owned()))
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
            tap,
            switches,
            knobs,
        } => {
            let mut model = Soe::new(switches, Knobs::new(&knobs));
            for (gdm, name) in tap {
                let wire = Tap::open(&name).with_context(|| format!("TAP interface {name}"))?;
                anyhow::ensure!(model.plug(gdm, Box::new(wire)), "there is no MAC {gdm}");
            }
            (socket, Box::new(model))
        }
    };
    let server = Server::bind(&socket).with_context(|| format!("{}", socket.display()))?;
    tracing::info!(model = model.name(), socket = %socket.display(), "listening");
    server.run(&mut *model)?;
    Ok(())
}
