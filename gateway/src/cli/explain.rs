//! `explain`: what would happen to a packet, asked of the running gateway or of a configuration.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use control::api::Command;
use control::explain::{Arrival, Explanation, Query, State};
use control::rekey::terms::View;
use pmd::capture_file::CaptureFile;
use sa_store::runtime::{Start, TunnelIdx, mapped};
use sa_store::sa::{Direction, SaId};
use sa_store::spd::Spd;
use sa_store::store::Store;

use super::client::ask;
use super::{ClientArgs, Failure};
use crate::config;
use crate::crypto::select::{Choice, Compare, Selection};
use crate::wire::{self, Family, Frag, Kind, NattPorts, Parsed};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Side {
    Inside,
    Outside,
}

/// `explain`
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Side on which the packet arrives.
    #[arg(long, value_enum, default_value = "inside")]
    side: Side,
    /// Source address.
    #[arg(long, required_unless_present = "pcap")]
    src: Option<IpAddr>,
    /// Destination address.
    #[arg(long, required_unless_present = "pcap")]
    dst: Option<IpAddr>,
    /// Protocol: a number, or tcp, udp, icmp, icmpv6, sctp, esp.
    #[arg(long, default_value = "0", value_parser = protocol)]
    proto: u8,
    /// Source port.
    #[arg(long, requires = "dport")]
    sport: Option<u16>,
    /// Destination port.
    #[arg(long, requires = "sport")]
    dport: Option<u16>,
    /// SPI, for ESP that arrives outside.
    #[arg(long, value_parser = spi)]
    spi: Option<u32>,
    /// A fragment that shows no ports.
    #[arg(long)]
    fragment: bool,
    /// Take the packet from this capture instead.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["src", "dst", "sport", "dport", "spi", "fragment"])]
    pcap: Option<PathBuf>,
    /// Which packet of the capture, from 1.
    #[arg(long, default_value_t = 1, requires = "pcap")]
    packet: usize,
    /// Routing table.
    #[arg(long, default_value_t = 0)]
    vrf: u16,
    /// Ask this configuration instead of the running gateway.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    client: ClientArgs,
}

fn protocol(s: &str) -> Result<u8, String> {
    use wire::proto;
    Ok(match s {
        "tcp" => proto::TCP,
        "udp" => proto::UDP,
        "icmp" => proto::ICMP,
        "icmpv6" => proto::ICMPV6,
        "sctp" => proto::SCTP,
        "esp" => proto::ESP,
        n => n.parse().map_err(|_| format!("\"{n}\" is no protocol"))?,
    })
}

fn spi(s: &str) -> Result<u32, String> {
    let parsed = match s.strip_prefix("0x") {
        Some(h) => u32::from_str_radix(h, 16),
        None => s.parse(),
    };
    parsed.map_err(|_| format!("\"{s}\" is no SPI"))
}

pub(super) fn run(args: &ExplainArgs) -> Result<(), Failure> {
    let query = query(args)?;
    let explanation = match &args.config {
        Some(path) => offline(path, &query)?,
        None => ask(&args.client, &Command::Explain(query))?,
    };
    if args.client.json {
        println!(
            "{:#}",
            serde_json::to_value(&explanation).map_err(Failure::failed)?
        );
    } else {
        show(&explanation);
    }
    Ok(())
}

fn query(args: &ExplainArgs) -> Result<Query, Failure> {
    let arrival = match args.side {
        Side::Inside => Arrival::Inside,
        Side::Outside => Arrival::Outside,
    };
    if let Some(file) = &args.pcap {
        let capture = CaptureFile::open(file).map_err(Failure::failed)?;
        let frame = args.packet.checked_sub(1).and_then(|i| capture.packet(i));
        let frame = frame.ok_or_else(|| {
            Failure::failed(format!("{} has no packet {}", file.display(), args.packet))
        })?;
        let parsed = wire::parse(frame, NattPorts([4500, 4500]));
        let parsed = parsed.map_err(|r| {
            Failure::failed(format!("the packet would be dropped at once: {}", r.name()))
        })?;
        return Ok(of_packet(&parsed, arrival, args.vrf));
    }
    let (Some(src), Some(dst)) = (args.src, args.dst) else {
        return Err(Failure::failed("--src and --dst, or --pcap"));
    };
    Ok(Query {
        arrival,
        src,
        dst,
        proto: args.proto,
        ports: args.sport.zip(args.dport),
        icmp: None,
        fragment: args.fragment,
        vrf: args.vrf,
        spi: args.spi,
    })
}

fn of_packet(p: &Parsed, arrival: Arrival, vrf: u16) -> Query {
    let address = |a: u128| match p.family {
        Family::V4 => IpAddr::V4(u32::try_from(a & 0xffff_ffff).unwrap_or(0).into()),
        Family::V6 => IpAddr::V6(a.into()),
    };
    let esp = matches!(p.kind, Kind::Esp | Kind::UdpEsp);
    Query {
        arrival,
        src: address(p.src),
        dst: address(p.dst),
        proto: p.proto,
        ports: p.ports(),
        icmp: p.icmp(),
        fragment: p.frag == Frag::Later,
        vrf,
        spi: p
            .esp()
            .filter(|_| esp && arrival == Arrival::Outside)
            .map(|(spi, _)| spi),
    }
}

/// Builds the state that the configuration describes, as a gateway that has just started would have it.
fn offline(path: &Path, query: &Query) -> Result<Explanation, Failure> {
    let config = config::load(path).map_err(Failure::refused)?;
    let loaded = super::check::load(&config.sa_files)?;
    let crypto = Selection::new(Choice::Auto, Compare::Features).map_err(Failure::failed)?;
    let mut store = Store::new(config.workers.number(), config.sas.max);
    let fib = crate::app::routes(&config, &mut store).map_err(Failure::refused)?;
    let mut draft = store.draft();
    for t in &loaded.tunnels {
        store.tunnel(&t.name);
    }
    let start = Start {
        lease_end: u64::MAX,
        ..Start::default()
    };
    for sa in &loaded.sas {
        let _: SaId = store
            .add_sa(&mut draft, Arc::new(sa.clone()), &crypto, start, 0)
            .map_err(Failure::refused)?;
    }
    let spd = |direction| {
        Spd::build(direction, &loaded.policies, |n| store.find_tunnel(n))
            .map(Arc::new)
            .map_err(Failure::refused)
    };
    let (out, inbound) = (spd(Direction::Out)?, spd(Direction::In)?);
    draft.set_spd(out, inbound);
    draft.set_fib(Arc::new(fib));
    store.publish(draft);
    let snapshot = store.current();
    let state = State {
        snapshot: &snapshot,
        tunnel_name: &|t: TunnelIdx| {
            store
                .tunnels()
                .get(t.0 as usize)
                .map_or_else(String::new, |t| t.name.clone())
        },
        port_name: &|p| {
            config
                .ports
                .get(usize::from(p))
                .map_or_else(|| p.to_string(), |p| p.name.clone())
        },
        route: &|vrf, dst| {
            let (addr, len) = snapshot.fib.prefix(vrf, mapped(dst))?;
            Some(format!("{addr}/{len}, of the configuration"))
        },
        rekey_state: &|_| View::STEADY,
        now: 0,
    };
    Ok(state.explain(query))
}

fn show(e: &Explanation) {
    match &e.reason {
        Some(reason) => println!("{}: {reason}", e.verdict),
        None => println!("{}", e.verdict),
    }
    let worker = e.worker.map(|w| w.to_string());
    for (name, value) in [
        ("policy", &e.policy),
        ("tunnel", &e.tunnel),
        ("SA", &e.sa),
        ("SPI", &e.spi),
        ("worker", &worker),
    ] {
        if let Some(v) = value {
            println!("  {name:8}{v}");
        }
    }
    for (i, step) in e.why.iter().enumerate() {
        println!("  {}. {step}", i + 1);
    }
}
