//! `[ike]`: SAs and policies that an IKE daemon puts into the kernel.

use std::path::PathBuf;

use control::vici;
use control::xfrm::{Settings, Take};
use nix::net::if_::if_nametoindex;
use sa_store::sa::{IfId, OffloadMode, Vrf};
use schemars::JsonSchema;
use serde::Deserialize;

use super::decode::Decoded;
use super::problem::Problems;

/// An IKE daemon's SAs and policies, taken from the kernel by XFRM netlink.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IkeTable {
    /// Whether the kernel's SAs and policies are taken. strongSwan and libreswan need no change for it.
    pub xfrm: bool,
    /// strongSwan's VICI socket, an absolute path. When given, SAs and tunnels are shown with the names that they have in its configuration.
    /// The gateway's user needs the right to connect.
    pub vici: Option<PathBuf>,
    /// Milliseconds that a packet with an unknown SPI waits for its SA: a peer may use one before this side's daemon has installed it.
    pub hold_ms: u16,
    /// Routing table of their packets.
    pub vrf: u16,
    /// How these SAs are carried: "software", "crypto" or "packet".
    pub offload: String,
    /// Engine for "crypto" and "packet", by name. The best one when not given.
    pub engine: Option<String>,
    /// Bytes that the kernel may queue for the gateway. When they do not suffice everything is read again.
    pub receive_buffer: u32,
    /// What is taken: what one of these fits, or all without a mark when there is none.
    pub take: Vec<TakeTable>,
}

impl Default for IkeTable {
    fn default() -> Self {
        Self {
            xfrm: false,
            vici: None,
            hold_ms: 300,
            vrf: 0,
            offload: "software".into(),
            engine: None,
            receive_buffer: 16 << 20,
            take: Vec::new(),
        }
    }
}

/// A description of SAs and policies; what is absent does not matter, but for marks: without "mark" only those without one fit.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TakeTable {
    /// Mark and mask as `ip xfrm state` shows them: "0x10/0xff".
    pub mark: Option<String>,
    /// Interface id of an xfrm interface.
    pub if_id: Option<u32>,
    /// Request ids: "7" or "1-100".
    pub reqid: Option<String>,
    /// Whether the daemon asked for hardware offload.
    pub offload: Option<bool>,
    /// Interface of that offload.
    pub interface: Option<String>,
}

/// `[ike]`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IkeConfig {
    /// Which SAs are taken, and how they are carried.
    pub mirror: Settings,
    /// How long a packet waits for its SA, milliseconds; 0: not at all.
    pub hold_ms: u16,
    /// Where the tunnels' names are asked for.
    pub vici: Option<vici::Settings>,
}

/// Checks the table; `None` when it is off.
pub(super) fn check(decoded: &Decoded<'_>, problems: &mut Problems) -> Option<IkeConfig> {
    let t = &decoded.file.ike;
    let mut wrong = |path: &[&str], what: String| problems.push(decoded.span(path), what);
    let offload = match t.offload.as_str() {
        "software" => OffloadMode::Software,
        "crypto" => OffloadMode::Crypto,
        "packet" => OffloadMode::Packet,
        other => {
            let what = format!(
                "\"{other}\" is not a way to carry SAs; \"software\", \"crypto\" or \"packet\""
            );
            wrong(&["ike", "offload"], what);
            OffloadMode::Software
        }
    };
    if let Some(name) = &t.engine {
        if offload == OffloadMode::Software {
            let what = "an engine needs offload = \"crypto\" or \"packet\"".into();
            wrong(&["ike", "engine"], what);
        } else if name != "auto" && !decoded.file.engine.iter().any(|e| e.name == *name) {
            wrong(&["ike", "engine"], format!("there is no engine \"{name}\""));
        }
    }
    let mut take = Vec::new();
    for (i, rule) in t.take.iter().enumerate() {
        match checked(rule) {
            Ok(rule) => take.push(rule),
            Err((key, what)) => wrong(&["ike", "take", &i.to_string(), key], what),
        }
    }
    if t.xfrm && decoded.file.test.seed.is_some() {
        let what = "a seed makes nonces repeat, so it is refused together with an IKE daemon's SAs";
        wrong(&["ike", "xfrm"], what.into());
    }
    if !(2048..=1 << 30).contains(&t.receive_buffer) {
        let what = format!(
            "\"receive_buffer\" is {}; it must lie in 2048 to 1073741824",
            t.receive_buffer
        );
        wrong(&["ike", "receive_buffer"], what);
    }
    let vici = t.vici.as_deref().map(vici::Settings::new);
    let vici = vici.and_then(|checked| {
        let problem = match checked {
            Ok(settings) if t.xfrm => return Some(settings),
            Ok(_) => "\"vici\" names SAs that are taken from the kernel: it needs xfrm = true",
            Err(why) => why,
        };
        wrong(&["ike", "vici"], problem.into());
        None
    });
    let delay_ms = decoded.file.test.netlink_delay_ms.into();
    t.xfrm.then(|| IkeConfig {
        mirror: Settings {
            take,
            vrf: Vrf(t.vrf),
            offload,
            engine: t.engine.clone().filter(|e| e != "auto"),
            receive_buffer: usize::try_from(t.receive_buffer).unwrap_or(usize::MAX),
            delay_ms,
        },
        hold_ms: t.hold_ms,
        vici,
    })
}

fn checked(t: &TakeTable) -> Result<Take, (&'static str, String)> {
    let mark = match &t.mark {
        None => None,
        Some(text) => Some(pair(text, '/').ok_or_else(|| {
            (
                "mark",
                format!("\"{text}\" is not a mark with its mask, such as \"0x10/0xff\""),
            )
        })?),
    };
    let reqid = match &t.reqid {
        None => None,
        Some(text) => {
            let single = || number(text).map(|n| (n, n));
            let range = pair(text, '-').or_else(single).filter(|(a, b)| a <= b);
            Some(range.ok_or_else(|| {
                (
                    "reqid",
                    format!("\"{text}\" is not a request id or a range of them"),
                )
            })?)
        }
    };
    let interface = match &t.interface {
        None => None,
        Some(name) => {
            let index = if_nametoindex(name.as_str()).ok();
            let index = index.and_then(|i| i32::try_from(i).ok());
            Some(index.ok_or_else(|| ("interface", format!("there is no interface \"{name}\"")))?)
        }
    };
    Ok(Take {
        mark,
        if_id: t.if_id.map(IfId),
        reqid,
        offload: t.offload,
        interface,
    })
}

fn pair(text: &str, between: char) -> Option<(u32, u32)> {
    let (a, b) = text.split_once(between)?;
    Some((number(a)?, number(b)?))
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn outcome(ike: &str) -> Result<bool, String> {
        let port = "[[port]]\nname = \"in\"\nkind = \"pcap\"\nside = \"inside\"\naddresses = [\"10.0.0.1/24\"]\n";
        let config = crate::config::parse(&format!("{port}[ike]\n{ike}"), Path::new("g.toml"));
        let config = config.map_err(|p| p.to_string())?;
        Ok(config.ike.is_some_and(|ike| ike.vici.is_some()))
    }

    #[test]
    fn names_are_asked_for_at_a_socket_that_can_be_one() {
        let long = format!("xfrm = true\nvici = \"/{}\"", "x".repeat(107));
        assert_eq!(outcome("xfrm = true"), Ok(false));
        let default = "xfrm = true\nvici = \"/var/run/charon.vici\"";
        assert_eq!(outcome(default), Ok(true));
        for (ike, why) in [
            ("vici = \"/var/run/charon.vici\"", "it needs xfrm = true"),
            ("xfrm = true\nvici = \"charon.vici\"", "an absolute path"),
            ("xfrm = true\nvici = \"unix:///v\"", "an absolute path"),
            (&long, "107 bytes at most"),
        ] {
            let told = outcome(ike).unwrap_err();
            assert!(told.contains("g.toml:") && told.contains(why), "{told}");
        }
    }
}
