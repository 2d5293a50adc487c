//! What the running gateway tells, as tables or JSON.

use std::path::PathBuf;

use control::api::{Command, Left, PolicyInfo, SaInfo};
use control::core::Reload;
use control::plane::{CaptureReport, CaptureRequest, EngineReport, PortReport};
use control::xfrm::MirrorReport;
use serde_json::Value;

use super::client::{ask, ask_value};
use super::table::{number, print};
use super::{ClientArgs, Failure};

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

pub(super) fn ports_table(list: &[PortReport]) {
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
