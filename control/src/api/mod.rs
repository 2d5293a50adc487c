//! The unix-socket API: one JSON object a line in each direction.
//!
//! ```text
//!   {"v":1,"cmd":"sa_show","name":"berlin-out"}
//!   {"v":1,"ok":true,"data":{...}}
//!   {"v":1,"ok":false,"error":"there is no SA \"berlin-out\""}
//! ```
//!
//! Key material is no part of any answer.

mod answer;
mod report;
mod server;

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use report::{
    ConsumedCount, DropCount, IkeNames, Left, PolicyInfo, PuntCount, SaInfo, Stats, TunnelInfo,
    WorkerInfo, action_name,
};
pub use server::{ApiConfig, ApiError, Listener, serve};

use crate::core::{Control, lock};
use crate::explain::Query;
use crate::kernel::{NeighbourQuery, RouteQuery};
use crate::plane::CaptureRequest;
use crate::reload::reload;

/// Version of the protocol.
pub const VERSION: u64 = 1;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// SAs, optionally of one tunnel.
    SaList {
        /// Tunnel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tunnel: Option<String>,
    },
    /// One SA.
    SaShow {
        /// Name.
        name: String,
    },
    /// Policies in the order of look-up.
    PolicyList,
    /// Totals of workers, tunnels and ports.
    Stats,
    /// Read the SA files again.
    Reload,
    /// Outcome of the latest reload, readiness.
    Status,
    /// Events after a number.
    Events {
        /// Number of the last event that the caller has seen.
        #[serde(default)]
        after: u64,
    },
    /// Events as they happen: this connection becomes a stream of [`Batch`](crate::events::Batch)es, one a line.
    Follow {
        /// Number of the last event that the caller has seen. From now on, with the states that hold, when not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<u64>,
    },
    /// Ports with their counters.
    Ports,
    /// Look-aside engines, and how far they are trusted.
    Engines,
    /// Routes, and where they come from.
    Routes(RouteQuery),
    /// Neighbours with their link addresses.
    Neighbours(NeighbourQuery),
    /// How the mirror of an IKE daemon's SAs is doing.
    Ike,
    /// Start a capture.
    CaptureStart(CaptureRequest),
    /// End a capture.
    CaptureStop {
        /// Port.
        port: String,
    },
    /// What would happen to a packet.
    Explain(Query),
}

/// Carries out a command.
async fn answer_to(command: Command, control: &Arc<Mutex<Control>>) -> Result<Value, String> {
    match command {
        Command::Reload => answer::value(&reload(control).await),
        other => answer::answer(&mut lock(control), other),
    }
}

/// Writes an answer line.
fn line_of(result: Result<Value, String>) -> String {
    let value = match result {
        Ok(data) => json!({ "v": VERSION, "ok": true, "data": data }),
        Err(error) => json!({ "v": VERSION, "ok": false, "error": error }),
    };
    format!("{value}\n")
}

/// Reads a request.
fn parse(line: &[u8]) -> Result<Command, String> {
    let mut value: Value =
        serde_json::from_slice(line).map_err(|e| format!("not a JSON request: {e}"))?;
    let fields = value.as_object_mut().ok_or("a request is a JSON object")?;
    match fields.remove("v").and_then(|v| v.as_u64()) {
        Some(VERSION) => {}
        Some(other) => return Err(format!("version {other} is not spoken here; use {VERSION}")),
        None => return Err(format!("\"v\": {VERSION} is missing")),
    }
    serde_json::from_value(value).map_err(|e| e.to_string())
}

/// Writes a request line.
pub fn request_line(command: &Command) -> String {
    let mut value = serde_json::to_value(command).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.insert("v".into(), VERSION.into());
    }
    format!("{value}\n")
}

/// Entry for fuzzers: a request is understood and written back the same, or refused with a text.
#[doc(hidden)]
pub fn fuzz_request(data: &[u8]) {
    match parse(data) {
        Ok(command) => assert_eq!(parse(request_line(&command).as_bytes()), Ok(command)),
        Err(text) => assert!(!text.is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood_and_strangers_refused() {
        assert_eq!(parse(br#"{"v":1,"cmd":"stats"}"#), Ok(Command::Stats));
        assert_eq!(
            parse(br#"{"cmd":"sa_show","name":"a","v":1}"#),
            Ok(Command::SaShow { name: "a".into() })
        );
        for bad in [
            &br#"{"cmd":"stats"}"#[..],
            br#"{"v":2,"cmd":"stats"}"#,
            br#"{"v":1,"cmd":"rm"}"#,
            br#"{"v":1,"cmd":"sa_show"}"#,
            br#"{"v":1,"cmd":"sa_show","name":"a","also":1}"#,
            b"[]",
            b"\xff",
            b"",
        ] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn fuzz_entry_takes_anything() {
        for seed in [
            &b"{}"[..],
            b"\xff",
            br#"{"v":1,"cmd":"explain","src":"10.0.0.1","dst":"10.0.0.2"}"#,
            br#"{"v":1,"cmd":"capture_start","port":"a","file":"b"}"#,
        ] {
            fuzz_request(seed);
        }
    }
}
