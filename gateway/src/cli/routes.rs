//! `routes` and `neighbours`: what the running gateway looks up, and where it comes from.

use std::net::IpAddr;

use clap::Args;
use control::api::Command;
use control::kernel::{KernelStatus, NeighbourInfo, NeighbourQuery, RouteQuery, Routes};

use super::client::ask;
use super::show::pretty;
use super::table::{number, print};
use super::{ClientArgs, Failure};

/// `routes`
#[derive(Debug, Args)]
pub(super) struct RoutesArgs {
    /// Only those that cover this address; the last one decides.
    address: Option<IpAddr>,
    /// Only those of this VRF.
    #[arg(long)]
    vrf: Option<u16>,
    /// At most so many.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    #[command(flatten)]
    client: ClientArgs,
}

/// `neighbours`
#[derive(Debug, Args)]
pub(super) struct NeighboursArgs {
    /// At most so many.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) fn routes(args: &RoutesArgs) -> Result<(), Failure> {
    let command = Command::Routes(RouteQuery {
        vrf: args.vrf,
        addr: args.address,
        limit: args.limit,
    });
    if args.client.json {
        return pretty(&args.client, &command);
    }
    let answer: Routes = ask(&args.client, &command)?;
    let rows: Vec<_> = answer
        .routes
        .iter()
        .map(|r| {
            vec![
                r.vrf.to_string(),
                r.to.clone(),
                r.path.clone(),
                r.share.to_string(),
                r.from.clone(),
                r.protocol.clone(),
                r.metric.to_string(),
            ]
        })
        .collect();
    print(
        &[
            ">VRF", "to", "path", ">share", "from", "protocol", ">metric",
        ],
        &rows,
    );
    for refused in &answer.refused {
        println!("refused: {refused}");
    }
    if answer.routes.len() == args.limit {
        println!("more than {} paths; see --limit", args.limit);
    }
    if let Some(k) = &answer.kernel {
        status(k);
    }
    Ok(())
}

fn status(k: &KernelStatus) {
    println!(
        "\nkernel: {}, {} routes, {} neighbours, {} addresses; read again {} times for {} overruns and {} messages that were not understood; last read in {} ms, last published in {} us",
        if k.synced { "in step" } else { "not read yet" },
        number(k.routes),
        number(k.neighbours),
        number(k.addresses),
        number(k.resyncs),
        number(k.overruns),
        number(k.not_understood),
        k.last_sync_millis,
        k.last_publish_micros,
    );
}

pub(super) fn neighbours(args: &NeighboursArgs) -> Result<(), Failure> {
    let command = Command::Neighbours(NeighbourQuery { limit: args.limit });
    if args.client.json {
        return pretty(&args.client, &command);
    }
    let list: Vec<NeighbourInfo> = ask(&args.client, &command)?;
    let rows: Vec<_> = list
        .into_iter()
        .map(|n| {
            vec![
                n.port,
                n.addr.to_string(),
                n.mac.unwrap_or_else(|| "not known".into()),
                n.from,
            ]
        })
        .collect();
    print(&["port", "address", "link address", "from"], &rows);
    Ok(())
}
