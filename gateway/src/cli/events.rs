//! `events`: what happened, and what happens.

use std::io::Write;

use clap::Args;
use control::api::Command;
use control::events::{Batch, Edge, Event};
use serde_json::json;

use super::client::{ask, stream};
use super::show::pretty;
use super::table::print;
use super::{ClientArgs, Failure};

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
