//! From TOML tables to typed items that still know their places. Rules that need only one value are
//! checked here; rules between values are in `check`.

use std::net::IpAddr;
use std::path::PathBuf;

use zeroize::Zeroizing;

use crate::policy::Selector;
use crate::sa::{Df, Direction, Dscp, Limits, Mode, OffloadMode, Spi, UdpEncap};
use crate::suite::Suite;

use super::fault::{Fault, Location, Problems};
use super::fields::{At, Fields, Scalar, Text, expected_words, parse};
use super::model::MAX_WINDOW;
use super::selector::{SIDED, SIDED_KEYS, TRAVEL, TRAVEL_KEYS, selector};
use super::value::{
    DFS, DIRECTIONS, MAX_NAME, MAX_SA_NAME, MODES, OFFLOADS, address, bytes, dscp, duration, hex,
    name, suite, word,
};

pub(crate) const FILE_KEYS: &[&str] = &["tunnel", "sa", "policy"];
pub(crate) const TUNNEL_KEYS: &[&str] = &[
    "name",
    "local",
    "remote",
    "mode",
    "vrf",
    "if_id",
    "sa",
    "suite",
    "esn",
    "window",
    "soft",
    "hard",
    "nat_t",
    "dscp",
    "df",
    "ecn",
    "ttl",
    "pmtu",
    "tfc",
    "dummies",
    "mss_clamp",
    "offload",
    "engine",
    "selectors",
    "allow_weak",
];
pub(crate) const SA_KEYS: &[&str] = &[
    "tunnel",
    "name",
    "direction",
    "spi",
    "key",
    "key_file",
    "auth_key",
    "auth_key_file",
    "first_use",
    "suite",
    "esn",
    "window",
    "soft",
    "hard",
    "nat_t",
    "dscp",
    "df",
    "ecn",
    "ttl",
    "pmtu",
    "tfc",
    "dummies",
    "mss_clamp",
    "offload",
    "engine",
    "selectors",
    "allow_weak",
];
pub(crate) const NESTED_SA_KEYS: &[&str] = SA_KEYS.split_at(1).1;
pub(crate) const POLICY_KEYS: &[&str] = &[
    "name",
    "direction",
    "priority",
    "action",
    "tunnel",
    "vrf",
    "if_id",
    "selectors",
    "src",
    "dst",
    "proto",
    "src_port",
    "dst_port",
    "icmp_type",
    "icmp_code",
    "ports",
];
pub(crate) const LIMIT_KEYS: &[&str] = &["packets", "bytes", "time"];
pub(crate) const NAT_T_KEYS: &[&str] = &["local_port", "remote_port"];

/// Key material, or where it lies.
pub(crate) enum KeySource {
    Inline(Zeroizing<Vec<u8>>),
    File(PathBuf),
}

#[derive(Default)]
pub(crate) struct RawSettings {
    pub(crate) suite: Option<At<Suite>>,
    pub(crate) esn: Option<At<bool>>,
    pub(crate) window: Option<At<u32>>,
    pub(crate) soft: Option<At<Limits>>,
    pub(crate) hard: Option<At<Limits>>,
    pub(crate) encap: Option<At<Option<UdpEncap>>>,
    pub(crate) dscp: Option<At<Dscp>>,
    pub(crate) df: Option<At<Df>>,
    pub(crate) ecn: Option<At<bool>>,
    pub(crate) ttl: Option<At<u8>>,
    pub(crate) pmtu: Option<At<Option<u16>>>,
    pub(crate) tfc: Option<At<u16>>,
    pub(crate) dummies: Option<At<u16>>,
    pub(crate) mss_clamp: Option<At<bool>>,
    pub(crate) offload: Option<At<OffloadMode>>,
    pub(crate) engine: Option<At<Option<String>>>,
    pub(crate) selectors: Option<At<Vec<Selector>>>,
    pub(crate) allow_weak: Option<At<bool>>,
}

pub(crate) struct RawTunnel {
    pub(crate) at: Location,
    pub(crate) name: Option<At<String>>,
    pub(crate) local: Option<At<IpAddr>>,
    pub(crate) remote: Option<At<IpAddr>>,
    pub(crate) mode: Option<Mode>,
    pub(crate) vrf: Option<u16>,
    pub(crate) if_id: Option<u32>,
    pub(crate) settings: RawSettings,
}

/// The tunnel of an SA: by nesting (index into the tunnels of the file) or by name.
pub(crate) enum Parent {
    Nested(usize),
    Named(At<String>),
}

pub(crate) struct RawSa {
    pub(crate) at: Location,
    pub(crate) parent: Option<Parent>,
    pub(crate) name: Option<At<String>>,
    pub(crate) direction: Option<Direction>,
    pub(crate) spi: Option<At<Spi>>,
    pub(crate) key: Option<At<KeySource>>,
    pub(crate) auth_key: Option<At<KeySource>>,
    /// A key was given but could not be read: not also "missing".
    pub(crate) key_given: bool,
    pub(crate) auth_key_given: bool,
    pub(crate) suite_given: bool,
    pub(crate) first_use: bool,
    pub(crate) settings: RawSettings,
}

pub(crate) struct RawPolicy {
    pub(crate) at: Location,
    pub(crate) name: Option<At<String>>,
    pub(crate) direction: Option<Direction>,
    pub(crate) priority: Option<u32>,
    pub(crate) action: Option<At<RawAction>>,
    pub(crate) tunnel: Option<At<String>>,
    pub(crate) selectors: Vec<Selector>,
    pub(crate) vrf: Option<u16>,
    pub(crate) if_id: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawAction {
    Protect,
    Bypass,
    Discard,
}

pub(crate) const ACTIONS: &[(&str, RawAction)] = &[
    ("protect", RawAction::Protect),
    ("bypass", RawAction::Bypass),
    ("discard", RawAction::Discard),
];

#[derive(Default)]
pub(crate) struct RawFile {
    pub(crate) tunnels: Vec<RawTunnel>,
    pub(crate) sas: Vec<RawSa>,
    pub(crate) policies: Vec<RawPolicy>,
    /// Key material stands in the file itself.
    pub(crate) inline_keys: bool,
}

/// Decodes one file. What is wrong goes to `problems`; what is right is returned, for further checks.
pub(crate) fn decode(text: &Text<'_>, problems: &mut Problems) -> RawFile {
    let Some(doc) = parse(text, problems) else {
        return RawFile::default();
    };
    let top = Location {
        file: text.file.clone(),
        line: 1,
        column: 1,
    };
    let f = Fields::open(text, doc.get_ref(), top, "file", FILE_KEYS, problems);
    let mut raw = RawFile::default();
    for t in f.tables("tunnel", "tunnel", TUNNEL_KEYS, problems) {
        let index = raw.tunnels.len();
        for s in t.tables("sa", "tunnel.sa", NESTED_SA_KEYS, problems) {
            let sa = decode_sa(&s, Some(Parent::Nested(index)), problems);
            raw.inline_keys |= s.has("key") || s.has("auth_key");
            raw.sas.push(sa);
        }
        raw.tunnels.push(decode_tunnel(&t, problems));
    }
    for s in f.tables("sa", "sa", SA_KEYS, problems) {
        let parent = s.text("tunnel", problems, |v| name(v, MAX_NAME));
        if !s.has("tunnel") {
            s.missing("tunnel", "tunnel = \"berlin\"", problems);
        }
        let sa = decode_sa(&s, parent.map(Parent::Named), problems);
        raw.inline_keys |= s.has("key") || s.has("auth_key");
        raw.sas.push(sa);
    }
    for p in f.tables("policy", "policy", POLICY_KEYS, problems) {
        raw.policies.push(decode_policy(&p, problems));
    }
    raw
}

fn decode_tunnel(f: &Fields<'_, '_>, problems: &mut Problems) -> RawTunnel {
    for (key, example) in [
        ("name", "name = \"berlin\""),
        ("local", "local = \"192.0.2.1\""),
        ("remote", "remote = \"198.51.100.7\""),
    ] {
        if !f.has(key) {
            f.missing(key, example, problems);
        }
    }
    RawTunnel {
        at: f.at.clone(),
        name: f.text("name", problems, |v| name(v, MAX_NAME)),
        local: f.text("local", problems, |v| end_of_tunnel("local", v)),
        remote: f.text("remote", problems, |v| end_of_tunnel("remote", v)),
        mode: f
            .text("mode", problems, |v| word("mode", v, MODES))
            .map(|a| a.v),
        vrf: f.number("vrf", 0..=u16::MAX, problems).map(|a| a.v),
        if_id: f.number("if_id", 0..=u32::MAX, problems).map(|a| a.v),
        settings: decode_settings(f, problems),
    }
}

fn end_of_tunnel(key: &str, v: &str) -> Result<IpAddr, Fault> {
    let a = address(key, v)?;
    if is_unicast(a) {
        Ok(a)
    } else {
        Err(Fault::NotUnicast(a))
    }
}

/// Whether an SA may end at the address.
pub(crate) fn is_unicast(a: IpAddr) -> bool {
    let broadcast = matches!(a, IpAddr::V4(v4) if v4.is_broadcast());
    !(a.is_unspecified() || a.is_multicast() || broadcast)
}

fn decode_sa(f: &Fields<'_, '_>, parent: Option<Parent>, problems: &mut Problems) -> RawSa {
    for (key, example) in [
        ("direction", "direction = \"out\""),
        ("spi", "spi = 0x1001"),
    ] {
        if !f.has(key) {
            f.missing(key, example, problems);
        }
    }
    RawSa {
        at: f.at.clone(),
        parent,
        name: f.text("name", problems, |v| name(v, MAX_SA_NAME)),
        direction: f
            .text("direction", problems, |v| word("direction", v, DIRECTIONS))
            .map(|a| a.v),
        spi: f.scalar("spi", "a number", problems, spi),
        key: key_source(f, "key", "key_file", problems),
        auth_key: key_source(f, "auth_key", "auth_key_file", problems),
        key_given: f.has("key") || f.has("key_file"),
        auth_key_given: f.has("auth_key") || f.has("auth_key_file"),
        suite_given: f.has("suite"),
        first_use: f.flag("first_use", problems).is_some_and(|a| a.v),
        settings: decode_settings(f, problems),
    }
}

fn spi(v: Scalar<'_>) -> Result<Spi, Fault> {
    let n = match v {
        Scalar::Number(n) => u32::try_from(n).map_err(|_| Fault::OutOfRange {
            key: "spi".into(),
            got: n.to_string(),
            min: 0x100,
            max: u64::from(u32::MAX),
        })?,
        Scalar::Text(s) => parse_spi(s).ok_or_else(|| Fault::BadValue {
            key: "spi".into(),
            got: super::value::shown(s),
            suggestion: None,
            want: "a number such as 0xc0ffee01".into(),
        })?,
    };
    Spi::new(n).ok_or(Fault::ReservedSpi(n))
}

fn parse_spi(s: &str) -> Option<u32> {
    match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        Some(h) => u32::from_str_radix(h, 16).ok(),
        None => s.parse().ok(),
    }
}

fn key_source(
    f: &Fields<'_, '_>,
    key: &'static str,
    file_key: &'static str,
    problems: &mut Problems,
) -> Option<At<KeySource>> {
    if f.has(key) && f.has(file_key) {
        problems.push(&f.place(file_key), Fault::KeyTwice { key });
    }
    if f.has(key) {
        f.secret(key, problems, |v| hex(key, v))
            .map(|a| a.map(KeySource::Inline))
    } else {
        f.text(file_key, problems, |v| Ok(KeySource::File(v.into())))
    }
}

fn decode_settings(f: &Fields<'_, '_>, problems: &mut Problems) -> RawSettings {
    RawSettings {
        suite: f.text("suite", problems, suite),
        esn: f.flag("esn", problems),
        window: f
            .number("window", 0..=MAX_WINDOW, problems)
            .and_then(|w| accept_window(w, problems)),
        soft: limits(f, "soft", problems),
        hard: limits(f, "hard", problems),
        encap: nat_t(f, problems),
        dscp: f.scalar("dscp", "a string or a number", problems, |v| match v {
            Scalar::Text(s) => dscp("dscp", s),
            Scalar::Number(n) => match u8::try_from(n) {
                Ok(n) if n < 64 => Ok(Dscp::Fixed(n)),
                _ => Err(Fault::OutOfRange {
                    key: "dscp".into(),
                    got: n.to_string(),
                    min: 0,
                    max: 63,
                }),
            },
        }),
        df: f.text("df", problems, |v| word("df", v, DFS)),
        ecn: f.flag("ecn", problems),
        ttl: f.number("ttl", 1..=u8::MAX, problems),
        pmtu: f.scalar("pmtu", "a number or \"auto\"", problems, |v| {
            number_or(v, "pmtu", "auto", 576)
        }),
        tfc: f
            .scalar("tfc", "a number or \"off\"", problems, |v| {
                number_or(v, "tfc", "off", 1)
            })
            .map(|a| a.map(|v| v.unwrap_or(0))),
        dummies: f.number("dummies", 0..=10_000, problems),
        mss_clamp: f.flag("mss_clamp", problems),
        offload: f.text("offload", problems, |v| word("offload", v, OFFLOADS)),
        engine: f.text("engine", problems, |v| {
            let n = name(v, MAX_NAME)?;
            Ok((n != "auto").then_some(n))
        }),
        selectors: f.has("selectors").then(|| At {
            at: f.place("selectors"),
            v: f.tables("selectors", SIDED.table, SIDED_KEYS, problems)
                .iter()
                .filter_map(|s| selector(s, &SIDED, problems))
                .collect(),
        }),
        allow_weak: f.flag("allow_weak", problems),
    }
}

fn accept_window(w: At<u32>, problems: &mut Problems) -> Option<At<u32>> {
    if w.v == 0 || (w.v >= 32 && w.v.is_power_of_two()) {
        return Some(w);
    }
    let above = w.v.next_power_of_two().max(32);
    problems.push(
        &w.at,
        Fault::WindowNotPowerOfTwo {
            got: w.v,
            below: (above / 2).max(32),
            above,
        },
    );
    None
}

fn number_or(v: Scalar<'_>, key: &str, none: &str, min: u16) -> Result<Option<u16>, Fault> {
    match v {
        Scalar::Text(s) if s == none => Ok(None),
        Scalar::Text(s) => Err(expected_words(key, s, &[none])),
        Scalar::Number(n) => match u16::try_from(n) {
            Ok(n) if n >= min => Ok(Some(n)),
            _ => Err(Fault::OutOfRange {
                key: key.into(),
                got: n.to_string(),
                min: u64::from(min),
                max: u64::from(u16::MAX),
            }),
        },
    }
}

fn limits(f: &Fields<'_, '_>, key: &'static str, problems: &mut Problems) -> Option<At<Limits>> {
    let t = f.table(key, key, LIMIT_KEYS, problems)?;
    let amount = |key: &'static str, v: Scalar<'_>, read: fn(&str, &str) -> Result<u64, Fault>| {
        let n = match v {
            Scalar::Number(n) => n,
            Scalar::Text(s) => read(key, s)?,
        };
        if n == 0 {
            return Err(Fault::OutOfRange {
                key: key.into(),
                got: "0".into(),
                min: 1,
                max: u64::MAX,
            });
        }
        Ok(n)
    };
    let packets = t.scalar("packets", "a number", problems, |v| match v {
        Scalar::Text(s) => Err(Fault::BadValue {
            key: "packets".into(),
            got: super::value::shown(s),
            suggestion: None,
            want: "a number, for example 1_000_000_000".into(),
        }),
        v => amount("packets", v, bytes),
    });
    let want = "a number or a string with a unit";
    let bytes = t.scalar("bytes", want, problems, |v| amount("bytes", v, bytes));
    let seconds = t.scalar("time", want, problems, |v| amount("time", v, duration));
    Some(At {
        at: t.at.clone(),
        v: Limits {
            packets: packets.map(|a| a.v),
            bytes: bytes.map(|a| a.v),
            seconds: seconds.map(|a| a.v),
        },
    })
}

fn nat_t(f: &Fields<'_, '_>, problems: &mut Problems) -> Option<At<Option<UdpEncap>>> {
    const PORT: u16 = 4500;
    if !f.is_table("nat_t") {
        return f.flag("nat_t", problems).map(|a| {
            a.map(|on| {
                on.then_some(UdpEncap {
                    sport: PORT,
                    dport: PORT,
                })
            })
        });
    }
    let t = f.table("nat_t", "nat_t", NAT_T_KEYS, problems)?;
    let sport = t.number("local_port", 1..=u16::MAX, problems);
    let dport = t.number("remote_port", 1..=u16::MAX, problems);
    Some(At {
        at: t.at.clone(),
        v: Some(UdpEncap {
            sport: sport.map_or(PORT, |a| a.v),
            dport: dport.map_or(PORT, |a| a.v),
        }),
    })
}

fn decode_policy(f: &Fields<'_, '_>, problems: &mut Problems) -> RawPolicy {
    for (key, example) in [
        ("name", "name = \"to-berlin\""),
        ("direction", "direction = \"out\""),
        ("priority", "priority = 100 (lower is looked at first)"),
        ("action", "action = \"protect\", \"bypass\" or \"discard\""),
    ] {
        if !f.has(key) {
            f.missing(key, example, problems);
        }
    }
    let flat = TRAVEL_KEYS.iter().any(|k| f.has(k));
    let selectors = if f.has("selectors") {
        if flat {
            problems.push(
                &f.place("selectors"),
                Fault::Conflict {
                    a: "selectors",
                    b: "src, dst, proto and ports of the policy itself",
                },
            );
        }
        let tables = f.tables("selectors", TRAVEL.table, TRAVEL_KEYS, problems);
        if tables.is_empty() {
            let need = "at least one selector";
            let key = "selectors";
            problems.push(&f.place(key), Fault::Needs { key, need });
        }
        tables
            .iter()
            .filter_map(|s| selector(s, &TRAVEL, problems))
            .collect()
    } else {
        selector(f, &TRAVEL, problems).into_iter().collect()
    };
    RawPolicy {
        at: f.at.clone(),
        name: f.text("name", problems, |v| name(v, MAX_NAME)),
        direction: f
            .text("direction", problems, |v| word("direction", v, DIRECTIONS))
            .map(|a| a.v),
        priority: f.number("priority", 0..=u32::MAX, problems).map(|a| a.v),
        action: f.text("action", problems, |v| word("action", v, ACTIONS)),
        tunnel: f.text("tunnel", problems, |v| name(v, MAX_NAME)),
        selectors,
        vrf: f.number("vrf", 0..=u16::MAX, problems).map(|a| a.v),
        if_id: f.number("if_id", 0..=u32::MAX, problems).map(|a| a.v),
    }
}
