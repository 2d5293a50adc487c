//! What the running gateway tells, as tables or JSON.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use control::api::{Command, Left, PolicyInfo, SaInfo, Stats};
use control::core::Reload;
use control::events::{Batch, Edge, Event};
use control::plane::{CaptureReport, CaptureRequest, EngineReport, PortReport};
use control::xfrm::MirrorReport;
use serde_json::{Value, json};

use super::client::{ask, ask_value, stream};
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

/// `events`
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Only those after this number.
    #[arg(long, alias = "after", value_name = "NUMBER")]
    since: Option<u64>,
    /// Go on with every event as it happens. Begins with the states that hold, or with what came after --since.
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) fn sa_list(client: &ClientArgs, tunnel: Option<String>) -> Result<(), Failure> {
    let command = Command::SaList { tunnel };
    if client.json {
        return pretty(client, &command);
    }
    let list: Vec<SaInfo> = ask(client, &command)?;
    // Only who asks an IKE daemon for names has any.
    let named = list.iter().any(|s| s.names.ike.is_some());
    let mut rows: Vec<_> = list
        .iter()
        .map(|s| {
            vec![
                s.tunnel.clone(),
                s.name.clone(),
                s.direction.clone(),
                s.spi.clone(),
                s.suite.clone(),
                s.mode.clone(),
                format!("{} > {}", s.src, s.dst),
                s.worker.to_string(),
                s.state.clone(),
                number(s.packets),
                number(s.bytes),
                s.rekey.clone(),
                left(&s.until_soft),
                left(&s.until_hard),
            ]
        })
        .collect();
    let mut headings = vec![
        "tunnel",
        "SA",
        "dir",
        "SPI",
        "suite",
        "mode",
        "outer addresses",
        ">worker",
        "state",
        ">packets",
        ">bytes",
        "rekey",
        "until soft",
        "until hard",
    ];
    if named {
        headings.insert(1, "IKE names");
        for (row, s) in rows.iter_mut().zip(&list) {
            row.insert(1, s.names.to_string());
        }
    }
    print(&headings, &rows);
    Ok(())
}

/// What is left until a limit: "12 s, 3 400 packets".
fn left(l: &Left) -> String {
    let parts = [(l.seconds, "s"), (l.packets, "packets"), (l.bytes, "bytes")];
    let parts = parts
        .into_iter()
        .filter_map(|(n, unit)| Some(format!("{} {unit}", number(n?))));
    parts.collect::<Vec<_>>().join(", ")
}

pub(super) fn sa_show(client: &ClientArgs, name: String) -> Result<(), Failure> {
    pretty(client, &Command::SaShow { name })
}

pub(super) fn policy_list(client: &ClientArgs) -> Result<(), Failure> {
    if client.json {
        return pretty(client, &Command::PolicyList);
    }
    let list: Vec<PolicyInfo> = ask(client, &Command::PolicyList)?;
    let rows: Vec<_> = list
        .iter()
        .map(|p| {
            let action = match &p.tunnel {
                Some(t) => format!("{} {t}", p.action),
                None => p.action.clone(),
            };
            vec![
                p.direction.clone(),
                p.priority.to_string(),
                p.name.clone(),
                action,
                p.selectors.join(", "),
                p.hits.map_or_else(|| "not counted".into(), number),
            ]
        })
        .collect();
    print(
        &["dir", ">priority", "policy", "action", "traffic", ">hits"],
        &rows,
    );
    Ok(())
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

pub(super) fn reload(client: &ClientArgs) -> Result<(), Failure> {
    let value = ask_value(client, &Command::Reload)?;
    if client.json {
        println!("{value:#}");
    }
    let outcome: Reload = serde_json::from_value(value).map_err(Failure::failed)?;
    if !outcome.ok {
        return Err(Failure::refused(format!(
            "{}\nrefused; what ran before runs on",
            outcome.problems.join("\n")
        )));
    }
    if !client.json {
        println!(
            "{} SAs added or changed, {} removed or changed, {} left alone, {} policies; snapshot {}, {} ms",
            outcome.added,
            outcome.removed,
            outcome.kept,
            outcome.policies,
            outcome.epoch,
            outcome.millis
        );
    }
    Ok(())
}

pub(super) fn events(args: &EventsArgs) -> Result<(), Failure> {
    if args.follow {
        return follow(args);
    }
    let after = args.since.unwrap_or(0);
    let command = Command::Events { after };
    if args.client.json {
        return pretty(&args.client, &command);
    }
    let list: Vec<Event> = ask(&args.client, &command)?;
    let rows: Vec<_> = list
        .into_iter()
        .map(|e| {
            vec![
                e.number.to_string(),
                e.time.to_string(),
                kind(&e),
                e.tunnel.unwrap_or_default(),
                e.sa.unwrap_or_default(),
                e.text.unwrap_or_default(),
            ]
        })
        .collect();
    print(
        &[">number", ">unix time", "event", "tunnel", "SA", ""],
        &rows,
    );
    Ok(())
}

/// Prints events until the gateway or the reader of the output goes.
fn follow(args: &EventsArgs) -> Result<(), Failure> {
    let command = Command::Follow { since: args.since };
    let mut out = std::io::stdout().lock();
    stream(&args.client, &command, &mut |value| {
        let batch: Batch = serde_json::from_value(value)
            .map_err(|e| Failure::failed(format!("the gateway's answer is not understood: {e}")))?;
        let lines = if args.client.json {
            json_lines(&batch)
        } else {
            text_lines(&batch)
        };
        // Whoever read the output has gone.
        let written = lines.iter().try_for_each(|l| writeln!(out, "{l}"));
        Ok(written.and_then(|()| out.flush()).is_ok())
    })
}

/// One object a line: `{"missed":n}`, `{"holds":event}` for each state that holds, `{"event":event}`.
fn json_lines(batch: &Batch) -> Vec<String> {
    let missed = (batch.missed > 0).then(|| json!({ "missed": batch.missed }));
    let holds = batch.states.iter().flatten().map(|e| json!({ "holds": e }));
    let events = batch.events.iter().map(|e| json!({ "event": e }));
    let all = missed.into_iter().chain(holds).chain(events);
    all.map(|v| v.to_string()).collect()
}

fn text_lines(batch: &Batch) -> Vec<String> {
    let line = |mark: &str, e: &Event| {
        let about = [&e.tunnel, &e.sa].into_iter().flatten();
        let about: Vec<&str> = about.map(String::as_str).collect();
        let text = e.text.as_deref().unwrap_or_default();
        let all = format!(
            "{:>8} {} {mark}{} {} {text}",
            e.number,
            e.time,
            kind(e),
            about.join(" ")
        );
        all.trim_end().to_owned()
    };
    let missed = (batch.missed > 0).then(|| {
        format!(
            "         {} events were missed; what holds now follows",
            batch.missed
        )
    });
    let holds = batch.states.iter().flatten().map(|e| line("holds: ", e));
    let events = batch.events.iter().map(|e| line("", e));
    missed.into_iter().chain(holds).chain(events).collect()
}

/// Kind of an event; states say whether they begin or end.
fn kind(e: &Event) -> String {
    match e.state {
        Some(Edge::Off) => format!("{} (over)", e.kind),
        Some(Edge::On) | None => e.kind.clone(),
    }
}

pub(super) fn ports(client: &ClientArgs) -> Result<(), Failure> {
    if client.json {
        return pretty(client, &Command::Ports);
    }
    ports_table(&ask::<Vec<PortReport>>(client, &Command::Ports)?);
    Ok(())
}

pub(super) fn ike(client: &ClientArgs) -> Result<(), Failure> {
    if client.json {
        return pretty(client, &Command::Ike);
    }
    let r: MirrorReport = ask(client, &Command::Ike)?;
    if !r.following {
        println!("the kernel's SAs are not taken: set ike.xfrm = true in the configuration");
        return Ok(());
    }
    println!(
        "{} SAs and {} policies taken; {} rekeys and {} SAs for waiting packets asked for; read anew {} times",
        number(r.sas as u64),
        number(r.policies as u64),
        number(r.rekeys_asked),
        number(r.acquires),
        number(r.resyncs)
    );
    if r.kernel_sent != 0 {
        println!(
            "ALARM: the kernel has sent with {} SAs of the gateway's",
            r.kernel_sent
        );
    }
    if let Some(n) = &r.names {
        let unnamed = number(n.unnamed as u64);
        match &n.problem {
            None => println!(
                "{} SAs have names of {}, {unnamed} have none",
                number(n.named as u64),
                n.socket
            ),
            Some(why) => println!("names are not told by {}: {why}", n.socket),
        }
    }
    let rows: Vec<_> = r
        .left
        .into_iter()
        .map(|(what, why)| vec![what, why])
        .collect();
    if !rows.is_empty() {
        print(&["left to the kernel", "why"], &rows);
    }
    Ok(())
}

pub(super) fn engines(client: &ClientArgs) -> Result<(), Failure> {
    if client.json {
        return pretty(client, &Command::Engines);
    }
    let list: Vec<EngineReport> = ask(client, &Command::Engines)?;
    let rows: Vec<_> = list
        .iter()
        .map(|e| {
            let state = match e.quarantines {
                0 => e.state.clone(),
                n => format!("{} ({n}x {})", e.state, e.reason),
            };
            vec![
                e.name.clone(),
                e.kind.clone(),
                e.worker.to_string(),
                state,
                number(e.submitted),
                number(e.lost),
                number(e.wrong),
                format!("{}/{}", number(e.canaries_failed), number(e.canaries)),
                format!("{}/{}", number(e.samples_failed), number(e.samples)),
                number(e.fallback),
                number(e.refused),
            ]
        })
        .collect();
    print(
        &[
            "engine",
            "kind",
            ">worker",
            "state",
            ">packets",
            ">lost",
            ">wrong",
            ">bad canaries",
            ">bad samples",
            ">by CPU",
            ">refused",
        ],
        &rows,
    );
    Ok(())
}

fn ports_table(list: &[PortReport]) {
    let rows: Vec<_> = list
        .iter()
        .map(|p| {
            let sum =
                |f: fn(&control::plane::QueueCounters) -> u64| number(p.queues.iter().map(f).sum());
            vec![
                p.name.clone(),
                p.kind.clone(),
                p.side.clone(),
                p.mode.clone(),
                p.queues.len().to_string(),
                p.mtu.to_string(),
                match &p.device {
                    None => "-".into(),
                    Some(d) if !d.link_up => "down".into(),
                    Some(d) if d.mbps == 0 => "up".into(),
                    Some(d) => format!("{} Mbit/s", d.mbps),
                },
                sum(|q| q.rx_packets),
                sum(|q| q.tx_packets),
                sum(|q| q.rx_dropped + q.rx_errors),
                sum(|q| q.tx_errors),
            ]
        })
        .collect();
    let headings = [
        "port",
        "kind",
        "side",
        "mode",
        ">queues",
        ">MTU",
        "link",
        ">received",
        ">sent",
        ">receive errors",
        ">send errors",
    ];
    print(&headings, &rows);
}

pub(super) fn capture_start(
    client: &ClientArgs,
    port: String,
    file: PathBuf,
    packets: Option<u64>,
    snap: Option<u32>,
) -> Result<(), Failure> {
    // The gateway's working directory is not ours.
    let file = std::path::absolute(file).map_err(Failure::failed)?;
    let command = Command::CaptureStart(CaptureRequest {
        port,
        file,
        packets,
        snap,
    });
    ask_value(client, &command).map(drop)
}

pub(super) fn capture_stop(client: &ClientArgs, port: String) -> Result<(), Failure> {
    let command = Command::CaptureStop { port };
    if client.json {
        return pretty(client, &command);
    }
    let r: CaptureReport = ask(client, &command)?;
    println!(
        "{}: {} packets, {} lost",
        r.file.display(),
        number(r.packets),
        number(r.lost)
    );
    Ok(())
}

/// Prints an answer as it is: JSON, or one line for each field.
pub(super) fn pretty(client: &ClientArgs, command: &Command) -> Result<(), Failure> {
    let value = ask_value(client, command)?;
    match (&value, client.json) {
        (Value::Object(fields), false) => {
            let width = fields.keys().map(String::len).max().unwrap_or(0);
            for (key, v) in fields {
                let text = v.as_str().map_or_else(|| v.to_string(), ToOwned::to_owned);
                println!("{key:width$}  {text}");
            }
        }
        _ => println!("{value:#}"),
    }
    Ok(())
}
