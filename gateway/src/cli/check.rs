//! `check`: everything that can be known without starting.

use std::path::PathBuf;

use clap::Args;
use sa_store::file::Config;
use sa_store::sa::Direction;
use sa_store::spd::{Spd, TunnelIdx};
use serde_json::json;

use super::Failure;
use super::table::print;
use crate::config::{self, GatewayConfig, NextHop};
use crate::crypto::select::{Choice, Compare, Selection};

/// `check`
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Configuration; its SA files are checked too.
    #[arg(long, value_name = "FILE", required_unless_present = "sa_files")]
    config: Option<PathBuf>,
    /// SA files or directories to check by themselves.
    #[arg(value_name = "SA_FILE", conflicts_with = "config")]
    sa_files: Vec<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let gateway = match &args.config {
        Some(path) => Some(config::load(path).map_err(Failure::refused)?),
        None => None,
    };
    let files = gateway.as_ref().map_or(&args.sa_files, |g| &g.sa_files);
    let loaded = load(files)?;
    if let Some(g) = &gateway {
        tunnels_exist(g, &loaded)?;
        if let Some(hook) = &g.rekey.hook {
            control::rekey::hook::check(hook).map_err(Failure::refused)?;
        }
        let short = control::desired::too_short(&loaded, &g.rekey.config());
        if !short.is_empty() {
            return Err(Failure::refused(short.join("\n")));
        }
    }
    if args.json {
        println!("{:#}", as_json(gateway.as_ref(), &loaded));
    } else {
        if let Some(g) = &gateway {
            show_gateway(g);
        }
        show_sas(&loaded);
    }
    Ok(())
}

/// Reads SA files and makes sure that everything in them can be installed here.
pub(super) fn load(files: &[PathBuf]) -> Result<Config, Failure> {
    let loaded = control::desired::load(files).map_err(Failure::refused)?;
    for direction in [Direction::Out, Direction::In] {
        let tunnel = |name: &str| {
            let at = loaded.tunnels.iter().position(|t| t.name == name)?;
            u32::try_from(at).ok().map(TunnelIdx)
        };
        Spd::build(direction, &loaded.policies, tunnel).map_err(Failure::refused)?;
    }
    let crypto = Selection::new(Choice::Auto, Compare::Features).map_err(Failure::failed)?;
    for (sa, at) in loaded.sas.iter().zip(&loaded.origins.sas) {
        if !crypto.table().iter().any(|r| r.suite == sa.suite) {
            return Err(Failure::refused(format!(
                "{at}: no crypto provider offers {} on this machine",
                sa.suite
            )));
        }
    }
    Ok(loaded)
}

fn tunnels_exist(g: &GatewayConfig, loaded: &Config) -> Result<(), Failure> {
    for r in &g.routes {
        if let NextHop::Tunnel(name) = &r.next
            && loaded.tunnel(name).is_none()
        {
            return Err(Failure::refused(format!(
                "{}: the route to {} leads into tunnel \"{name}\", which is in no SA file",
                g.file.display(),
                r.to
            )));
        }
    }
    Ok(())
}

fn show_gateway(g: &GatewayConfig) {
    println!(
        "{}: {} workers, {} frames of {} bytes",
        g.file.display(),
        g.workers.number(),
        g.memory.frames,
        g.memory.stride
    );
    let rows: Vec<_> = g
        .ports
        .iter()
        .map(|p| {
            let addresses: Vec<_> = p.addresses.iter().map(ToString::to_string).collect();
            vec![
                p.name.clone(),
                format!("{:?}", p.kind.name()),
                format!("{:?}", p.side),
                p.vrf.to_string(),
                addresses.join(", "),
            ]
        })
        .collect();
    println!();
    print(&["port", "kind", "side", ">VRF", "addresses"], &rows);
    println!(
        "\n{} routes, {} neighbours\n",
        g.routes.len(),
        g.neighbours.len()
    );
}

fn show_sas(c: &Config) {
    let rows: Vec<_> = c
        .tunnels
        .iter()
        .map(|t| {
            let of = |d| {
                c.sas
                    .iter()
                    .filter(move |s| s.tunnel == t.name && s.direction == d)
                    .count()
                    .to_string()
            };
            let suites: std::collections::BTreeSet<_> = c
                .sas
                .iter()
                .filter(|s| s.tunnel == t.name)
                .map(|s| s.suite.to_string())
                .collect();
            let suites: Vec<_> = suites.into_iter().collect();
            vec![
                t.name.clone(),
                format!("{} > {}", t.local, t.remote),
                format!("{:?}", t.mode).to_lowercase(),
                of(Direction::Out),
                of(Direction::In),
                suites.join(", "),
            ]
        })
        .collect();
    print(
        &[
            "tunnel",
            "addresses",
            "mode",
            ">SAs out",
            ">SAs in",
            "suites",
        ],
        &rows,
    );
    println!(
        "\n{} tunnels, {} SAs, {} policies: good",
        c.tunnels.len(),
        c.sas.len(),
        c.policies.len()
    );
    if c.policies.is_empty() && c.tunnels.iter().all(|t| t.if_id.0 == 0) {
        println!("note: without policies or routes into tunnels everything is discarded");
    }
}

fn as_json(g: Option<&GatewayConfig>, c: &Config) -> serde_json::Value {
    let sas: Vec<_> = c
        .sas
        .iter()
        .map(|s| json!({ "name": s.name, "tunnel": s.tunnel, "spi": s.spi.to_string(), "suite": s.suite.to_string() }))
        .collect();
    let ports: Vec<_> = g
        .map(|g| g.ports.iter().map(|p| p.name.clone()).collect())
        .unwrap_or_default();
    json!({
        "ok": true,
        "ports": ports,
        "tunnels": c.tunnels.iter().map(|t| t.name.clone()).collect::<Vec<_>>(),
        "sas": sas,
        "policies": c.policies.iter().map(|p| p.name.clone()).collect::<Vec<_>>(),
    })
}
