//! `stats`: totals, and rates as they change.

use std::time::Duration;

use clap::Args;
use control::api::{Command, Stats};

use super::client::ask;
use super::show::{ports_table, pretty};
use super::table::{number, print};
use super::{ClientArgs, Failure};

/// `stats`
#[derive(Debug, Args)]
pub(super) struct StatsArgs {
    /// Show rates, again every this many seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) fn stats(args: &StatsArgs) -> Result<(), Failure> {
    let client = &args.client;
    let Some(seconds) = args.watch else {
        if client.json {
            return pretty(client, &Command::Stats);
        }
        let now: Stats = ask(client, &Command::Stats)?;
        totals(&now);
        return Ok(());
    };
    let mut before: Stats = ask(client, &Command::Stats)?;
    loop {
        std::thread::sleep(Duration::from_secs(seconds.max(1)));
        let now: Stats = ask(client, &Command::Stats)?;
        if client.json {
            println!("{}", serde_json::to_value(&now).unwrap_or_default());
        } else {
            rates(&before, &now);
        }
        before = now;
    }
}

fn totals(s: &Stats) {
    println!("snapshot {}, {} SAs\n", s.epoch, s.sas);
    let workers: Vec<_> = s
        .workers
        .iter()
        .map(|w| {
            let cpu = w.cpu.map_or_else(|| "-".into(), |c| c.to_string());
            let counts = [
                w.received,
                w.sent,
                w.encrypted,
                w.decrypted,
                w.bypassed,
                w.handed_out,
                w.dropped,
                w.shared,
                w.assisted,
                w.shared_waiting,
                w.held_up,
            ];
            [w.worker.to_string(), cpu]
                .into_iter()
                .chain(counts.map(number))
                .collect()
        })
        .collect();
    print(
        &[
            ">worker",
            ">CPU",
            ">received",
            ">sent",
            ">encrypted",
            ">decrypted",
            ">bypassed",
            ">handed over",
            ">dropped",
            ">shared",
            ">assisted",
            ">shared, waiting",
            ">held up",
        ],
        &workers,
    );
    println!();
    ports_table(&s.ports);
    println!();
    let named = s.tunnels.iter().any(|t| t.names.ike.is_some());
    let tunnels: Vec<Vec<_>> = s
        .tunnels
        .iter()
        .map(|t| {
            let counts = [
                t.out_packets,
                t.out_bytes,
                t.in_packets,
                t.in_bytes,
                t.errors,
                t.lost,
                t.rekeys,
            ];
            [t.name.clone()]
                .into_iter()
                .chain(named.then(|| t.names.to_string()))
                .chain(counts.map(number))
                .collect()
        })
        .collect();
    let counts = [
        ">out packets",
        ">out bytes",
        ">in packets",
        ">in bytes",
        ">errors",
        ">lost",
        ">rekeys",
    ];
    let headings = ["tunnel"].into_iter().chain(named.then_some("IKE names"));
    print(&headings.chain(counts).collect::<Vec<_>>(), &tunnels);
    if !s.drops.is_empty() {
        println!();
        let drops: Vec<_> = s
            .drops
            .iter()
            .map(|d| vec![d.reason.clone(), number(d.frames)])
            .collect();
        print(&["drop reason", ">frames"], &drops);
    }
    if !s.consumed.is_empty() {
        println!();
        let consumed: Vec<_> = s
            .consumed
            .iter()
            .map(|c| vec![c.kind.clone(), number(c.frames)])
            .collect();
        print(&["consumed", ">frames"], &consumed);
    }
    if !s.punts.is_empty() {
        println!();
        let punts: Vec<_> = s
            .punts
            .iter()
            .map(|p| vec![p.class.clone(), number(p.given), number(p.turned_away)])
            .collect();
        print(&["for the kernel", ">given", ">turned away"], &punts);
    }
}

#[allow(clippy::cast_precision_loss, reason = "rates for people")]
fn rates(before: &Stats, now: &Stats) {
    let seconds = now.clock.saturating_sub(before.clock) as f64 / 1e9;
    let per_second = |a: u64, b: u64| b.saturating_sub(a) as f64 / seconds.max(1e-9);
    let sum =
        |s: &Stats, f: fn(&control::api::WorkerInfo) -> u64| s.workers.iter().map(f).sum::<u64>();
    let bytes = |s: &Stats| {
        s.tunnels
            .iter()
            .map(|t| (t.out_bytes, t.in_bytes))
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    };
    let mega =
        |f: fn(&control::api::WorkerInfo) -> u64| per_second(sum(before, f), sum(now, f)) / 1e6;
    let (out_before, in_before) = bytes(before);
    let (out_now, in_now) = bytes(now);
    println!(
        "encrypted {:8.3} Mpps {:8.3} Gbit/s   decrypted {:8.3} Mpps {:8.3} Gbit/s   bypassed {:8.3} Mpps   dropped {:8.3} Mpps",
        mega(|w| w.encrypted),
        per_second(out_before, out_now) * 8.0 / 1e9,
        mega(|w| w.decrypted),
        per_second(in_before, in_now) * 8.0 / 1e9,
        mega(|w| w.bypassed),
        mega(|w| w.dropped),
    );
}
