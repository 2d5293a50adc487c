//! States: one SA each.

use std::net::IpAddr;

use crate::file::fault::{Fault, Location};
use crate::file::fields::At;
use crate::file::value::address;
use crate::import::draft::{Link, SaDraft};
use crate::import::words::{Word, Words, number, udp_port};
use crate::policy::Selector;
use crate::sa::{Df, Direction, Dscp, Limits, Mode, UdpEncap};

use super::algorithm::algorithms;
use super::policy::selector;
use super::{Fail, lacking, printed, unsupported};

/// What was read of a state.
#[derive(Default)]
pub(super) struct StateWords<'i> {
    src: Option<At<IpAddr>>,
    dst: Option<At<IpAddr>>,
    spi: Option<At<u32>>,
    reqid: u32,
    mode: Option<Mode>,
    pub(super) enc: Option<(Word<'i>, Word<'i>)>,
    pub(super) auth: Option<(Word<'i>, Word<'i>, Option<u32>)>,
    pub(super) aead: Option<(Word<'i>, Word<'i>, At<u32>)>,
    window: Option<At<u32>>,
    esn_window: Option<At<u32>>,
    esn: bool,
    noecn: bool,
    clear_df: bool,
    no_dscp: bool,
    encap: Option<UdpEncap>,
    selector: Option<Selector>,
    if_id: u32,
    direction: Option<Direction>,
    pub(super) soft: Limits,
    pub(super) hard: Limits,
    sent: Option<At<u64>>,
    is_esp: bool,
}

pub(super) fn state(w: &mut Words<'_>) -> Result<SaDraft, Fail> {
    let at = w.at.clone();
    let mut s = StateWords::default();
    while let Some(word) = w.next() {
        attribute(&mut s, &word, w)?;
    }
    if !s.is_esp {
        return Err(lacking(&at, "\"proto esp\""));
    }
    let (suite, keys, key_at) = algorithms(&s, &at)?;
    let window = if s.esn {
        s.esn_window.or(s.window)
    } else {
        s.window.filter(|w| w.v > 0).or(s.esn_window)
    };
    Ok(SaDraft {
        spi: s.spi.ok_or_else(|| lacking(&at, "\"spi\""))?,
        src: s.src.ok_or_else(|| lacking(&at, "\"src\""))?,
        dst: s.dst.ok_or_else(|| lacking(&at, "\"dst\""))?,
        direction: s.direction,
        mode: s.mode.unwrap_or(Mode::Transport),
        suite,
        keys,
        key_at,
        link: Link::Reqid(s.reqid),
        window: Some(window.unwrap_or(At {
            v: 0,
            at: at.clone(),
        })),
        esn: s.esn,
        soft: s.soft,
        hard: s.hard,
        encap: s.encap,
        ecn: !s.noecn,
        df: if s.clear_df { Df::Clear } else { Df::Copy },
        dscp: if s.no_dscp {
            Dscp::Fixed(0)
        } else {
            Dscp::Copy
        },
        if_id: s.if_id,
        selectors: s.selector.into_iter().collect(),
        sent: s.sent,
        at,
    })
}

fn attribute<'i>(s: &mut StateWords<'i>, word: &Word<'i>, w: &mut Words<'i>) -> Result<(), Fail> {
    match word.text {
        "src" => s.src = Some(w.parsed("src", address)?),
        "dst" => s.dst = Some(w.parsed("dst", address)?),
        "proto" => s.is_esp = esp(w)?,
        "spi" => s.spi = Some(printed(w, "spi")?),
        "reqid" => s.reqid = printed::<u32>(w, "reqid")?.v,
        "mode" => s.mode = Some(mode(w)?),
        "replay-window" => s.window = Some(printed(w, "replay-window")?),
        "replay_window" => s.esn_window = Some(printed(w, "replay_window")?),
        // The kernel's own message number.
        "seq" => {
            let _ = printed::<u32>(w, "seq")?;
        }
        "flag" => flags(s, w)?,
        "extra-flag" => flags(s, w)?,
        "enc" => s.enc = Some((w.value("an algorithm")?, w.value("a key")?)),
        "auth" => s.auth = Some((w.value("an algorithm")?, w.value("a key")?, None)),
        "auth-trunc" => {
            let (a, k) = (w.value("an algorithm")?, w.value("a key")?);
            s.auth = Some((a, k, Some(w.number("auth-trunc")?.v)));
        }
        "aead" => {
            let (a, k) = (w.value("an algorithm")?, w.value("a key")?);
            s.aead = Some((a, k, w.number("ICV bits")?));
        }
        "encap" => s.encap = Some(encap(w)?),
        "sel" => s.selector = selector(w, &word.at)?,
        "if_id" => s.if_id = w.number("if_id")?.v,
        "dir" => {
            let d = w.value("\"in\" or \"out\"")?;
            s.direction = Some(match d.text {
                "in" => Direction::In,
                "out" => Direction::Out,
                _ => return Err(unsupported(&d, "an SA is \"in\" or \"out\"")),
            });
        }
        "limit" => limit(s, w)?,
        "lifetime" => lifetime(s, w)?,
        "anti-replay" => anti_replay(s, w)?,
        "replay-oseq" | "replay-oseq-hi" => sent(s, w)?,
        "replay-seq" | "replay-seq-hi" => {
            let _ = w.number::<u32>(word.text)?;
        }
        "lastused" => {
            let _ = (w.value("a date")?, w.value("a time")?);
        }
        "stats:" => {
            for what in ["replay-window", "replay", "failed"] {
                if w.take(what).is_some() {
                    let _ = printed::<u64>(w, what)?;
                }
            }
        }
        "uid" => {
            let _ = w.number::<u32>("uid")?;
        }
        "offload" | "crypto" => {
            return Err(unsupported(
                word,
                "engines have other names here; remove it and set offload and engine in the SA file",
            ));
        }
        "mark" | "output-mark" => {
            return Err(unsupported(
                word,
                "this gateway has VRFs and interface ids, not marks",
            ));
        }
        "comp" => return Err(unsupported(word, "there is no IPComp here")),
        _ => return Err(unsupported(word, "this attribute is not known here")),
    }
    Ok(())
}

pub(super) fn esp(w: &mut Words<'_>) -> Result<bool, Fail> {
    let p = w.value("a protocol")?;
    match p.text {
        "esp" | "50" => Ok(true),
        _ => Err(unsupported(&p, "only ESP is protected traffic here")),
    }
}

pub(super) fn mode(w: &mut Words<'_>) -> Result<Mode, Fail> {
    let m = w.value("a mode")?;
    match m.text {
        "tunnel" => Ok(Mode::Tunnel),
        "transport" => Ok(Mode::Transport),
        _ => Err(unsupported(&m, "modes are \"tunnel\" and \"transport\"")),
    }
}

fn flags(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
    while let Some(f) = w.peek().cloned() {
        match f.text {
            "esn" => s.esn = true,
            "noecn" => s.noecn = true,
            "nopmtudisc" => s.clear_df = true,
            "dont-encap-dscp" => s.no_dscp = true,
            // Both families may go inside a tunnel here anyway; ICMP is passed by policy alone.
            "af-unspec" | "icmp" => {}
            "decap-dscp" | "wildrecv" | "align4" | "oseq-may-wrap" => {
                return Err(unsupported(&f, "the gateway does not do this"));
            }
            text if text.starts_with("(0x") => {}
            _ => return Ok(()),
        }
        let _ = w.next();
    }
    Ok(())
}

fn encap(w: &mut Words<'_>) -> Result<UdpEncap, Fail> {
    let printed = w.take("type").is_some();
    let kind = w.value("espinudp")?;
    if kind.text != "espinudp" {
        return Err(unsupported(&kind, "only espinudp (RFC 3948) is known"));
    }
    let mut port = |name: &str| {
        if printed {
            let _ = w.take(name);
        }
        w.parsed(name, udp_port)
    };
    let (sport, dport) = (port("sport")?.v, port("dport")?.v);
    if printed {
        let _ = w.take("addr");
    }
    let original = w.value("an address")?;
    match original.text {
        "0.0.0.0" | "::" => Ok(UdpEncap { sport, dport }),
        _ => Err(unsupported(&original, "original addresses are not used")),
    }
}

fn limit(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
    let what = w.value("a limit")?;
    let v = w.number::<u64>(what.text)?;
    if v.v == 0 && !what.text.starts_with("time") {
        return Err(no_traffic(v.at));
    }
    let v = Some(v.v).filter(|v| (1..u64::MAX).contains(v));
    match what.text {
        "time-soft" => s.soft.seconds = v,
        "time-hard" => s.hard.seconds = v,
        "byte-soft" => s.soft.bytes = v,
        "byte-hard" => s.hard.bytes = v,
        "packet-soft" => s.soft.packets = v,
        "packet-hard" => s.hard.packets = v,
        _ => return Err(unsupported(&what, "times count from installation here")),
    }
    Ok(())
}

/// To the kernel 0 seconds are no limit; 0 packets or bytes are one.
fn no_traffic(at: Location) -> Fail {
    let why = "a limit of 0 ends the SA with its first packet";
    (at, Fault::Unsupported(why.into()))
}

/// `config:` with its limits, or `current:` with what was used.
pub(super) fn lifetime(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
    let which = w.value("\"config:\" or \"current:\"")?;
    if which.text == "current:" {
        let _ = amount(w)?;
        let packets = amount(w)?;
        if packets.v.is_some_and(|p| p > 0) {
            s.sent = packets.v.map(|v| At { v, at: packets.at });
        }
        // `add 2026-01-02 03:04:05 use -`
        for what in ["add", "use"] {
            if w.take(what).is_some() && w.value("a date")?.text != "-" {
                let _ = w.value("a time")?;
            }
        }
        return Ok(());
    }
    loop {
        let (soft, hard);
        if w.take("limit:").is_some() {
            (soft, hard) = pair(w)?;
            for a in [&soft, &hard] {
                if a.v == Some(0) {
                    return Err(no_traffic(a.at.clone()));
                }
            }
            match soft.unit {
                "bytes" => (s.soft.bytes, s.hard.bytes) = (soft.v, hard.v),
                "packets" => (s.soft.packets, s.hard.packets) = (soft.v, hard.v),
                _ => {
                    return Err((
                        soft.at,
                        Fault::Syntax("bytes or packets are limited".into()),
                    ));
                }
            }
        } else if let Some(at) = w.take("expire") {
            let which = w.value("\"add:\" or \"use:\"")?;
            (soft, hard) = pair(w)?;
            let time = |a: &Amount| a.v.filter(|v| *v > 0);
            if which.text == "add:" {
                (s.soft.seconds, s.hard.seconds) = (time(&soft), time(&hard));
            } else if time(&soft).is_some() || time(&hard).is_some() {
                let why = "times count from installation here, not from first use";
                return Err((at, Fault::Unsupported(why.into())));
            }
        } else {
            return Ok(());
        }
    }
}

struct Amount {
    v: Option<u64>,
    unit: &'static str,
    at: Location,
}

fn pair(w: &mut Words<'_>) -> Result<(Amount, Amount), Fail> {
    let mut one = |name: &str| {
        if w.take(name).is_none() {
            return Err(lacking(&w.at, name));
        }
        amount(w)
    };
    Ok((one("soft")?, one("hard")?))
}

/// `(INF)(bytes),` or `123(packets)`.
fn amount(w: &mut Words<'_>) -> Result<Amount, Fail> {
    let word = w.value("an amount")?;
    let text = word.text.trim_end_matches(',');
    let unit = ["bytes", "packets", "sec"]
        .into_iter()
        .find(|u| text.strip_suffix(')').is_some_and(|t| t.ends_with(u)));
    let v = text.split('(').next().unwrap_or("");
    let v = match (v, text.starts_with("(INF)")) {
        ("", true) => Ok(None),
        _ => number::<u64>("amount", v).map(Some),
    };
    match (v, unit) {
        (Ok(v), Some(unit)) => Ok(Amount {
            v,
            unit,
            at: word.at,
        }),
        _ => Err((word.at, Fault::Syntax("this is no amount".into()))),
    }
}

/// `context: seq 0x0, oseq 0x0, bitmap 0x0` or `esn context: seq-hi … bitmap-length 4` and the bitmap.
fn anti_replay(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
    let _ = w.take("esn");
    if w.take("context:").is_none() {
        return Err(lacking(&w.at, "\"context:\""));
    }
    while let Some(word) = w.peek().cloned() {
        match word.text {
            "seq" | "seq-hi" | "bitmap" => {
                let _ = (w.next(), printed::<u32>(w, word.text)?);
            }
            "oseq" | "oseq-hi" => {
                let _ = w.next();
                sent(s, w)?;
            }
            "replay_window" => {
                let _ = w.next();
                s.esn_window = Some(printed(w, "replay_window")?);
            }
            "bitmap-length" => {
                let _ = w.next();
                let words = printed::<u32>(w, "bitmap-length")?.v;
                for _ in 0..words {
                    let _ = w.value("the bitmap")?;
                }
            }
            _ => break,
        }
    }
    Ok(())
}

fn sent(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
    let n = printed::<u64>(w, "oseq")?;
    if n.v > 0 {
        s.sent = Some(n);
    }
    Ok(())
}
