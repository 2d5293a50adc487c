//! setkey: `add` and `spdadd`, each ended by `;`.

use std::net::IpAddr;
use std::path::Path;

use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::At;
use crate::file::value::{ICMP, ICMP6, address, has_ports, proto, shown};
use crate::policy::{AddrRange, Ports, Selector};
use crate::sa::{Df, Direction, Dscp, Limits, Mode, SaKeys, UdpEncap};
use crate::suite::{AeadIcv, Hmac};

use super::algorithms::{Enc, suite, unknown};
use super::draft::{ActionDraft, Draft, Link, PolicyDraft, SaDraft, check_sa};
use super::words::{End, Word, Words, key, number, statements, udp_port};

type Fail = (Location, Fault);

/// Priority of policies that name none: Linux's default, the middle of the range.
const PRIORITY: u32 = 0x8000_0000;

pub(super) fn read(text: &str, name: &Path, draft: &mut Draft, problems: &mut Problems) {
    for mut w in statements(text, name, End::Semicolon, problems) {
        let Some(command) = w.next() else { continue };
        let done = match command.text {
            "add" => add(&mut w).map(|sa| {
                check_sa(&sa, problems);
                draft.sas.push(sa);
            }),
            "spdadd" => spdadd(&mut w).map(|p| draft.policies.push(p)),
            // What there was before is not imported.
            "flush" | "spdflush" if draft.sas.is_empty() && draft.policies.is_empty() => Ok(()),
            _ => Err(unsupported(
                &command,
                "only add and spdadd describe what there is to be",
            )),
        };
        if let Err((at, fault)) = done {
            problems.push(&at, fault);
        }
    }
}

fn unsupported(w: &Word<'_>, why: &str) -> Fail {
    let text = format!("\"{}\" cannot be imported: {why}", shown(w.text));
    (w.at.clone(), Fault::Unsupported(text))
}

/// `address` or `address[port]`.
fn end<'i>(w: &mut Words<'i>, what: &str) -> Result<(At<IpAddr>, Option<&'i str>), Fail> {
    while w
        .peek()
        .is_some_and(|o| matches!(o.text, "-4" | "-6" | "-n"))
    {
        let _ = w.next();
    }
    let word = w.value(what)?;
    let (addr, port) = match word.text.split_once('[') {
        Some((a, p)) => (a, Some(p.strip_suffix(']').unwrap_or(p))),
        None => (word.text, None),
    };
    match address(what, addr) {
        Ok(v) => Ok((At { v, at: word.at }, port)),
        Err(f) => Err((word.at, f)),
    }
}

fn add(w: &mut Words<'_>) -> Result<SaDraft, Fail> {
    let at = w.at.clone();
    let (src, sport) = end(w, "the source")?;
    let (dst, dport) = end(w, "the destination")?;
    let protocol = w.value("a protocol")?;
    let udp = match protocol.text {
        "esp" => false,
        "esp-udp" => true,
        _ => {
            return Err(unsupported(
                &protocol,
                "only esp and esp-udp are protected here",
            ));
        }
    };
    let spi = w.number::<u32>("the SPI")?;
    let mut mode = None;
    let mut reqid = 0;
    let mut window = None;
    let (mut soft, mut hard) = (Limits::default(), Limits::default());
    let (mut enc, mut auth) = (None, None);
    while let Some(option) = w.next() {
        match option.text {
            "-m" => {
                let m = w.value("a mode")?;
                mode = Some(match m.text {
                    "tunnel" => Mode::Tunnel,
                    "transport" => Mode::Transport,
                    _ => return Err(unsupported(&m, "say tunnel or transport")),
                });
            }
            "-u" => reqid = w.number("-u")?.v,
            "-r" => {
                // Counted in bytes of bitmap.
                let bytes = w.number::<u32>("-r")?;
                window = Some(bytes.map(|b| b.saturating_mul(8)));
            }
            "-ls" => soft.seconds = Some(w.number("-ls")?.v),
            "-lh" => hard.seconds = Some(w.number("-lh")?.v),
            "-bs" => soft.bytes = Some(w.number("-bs")?.v),
            "-bh" => hard.bytes = Some(w.number("-bh")?.v),
            "-E" => enc = Some(cipher(w)?),
            "-A" => auth = Some(authenticator(w)?),
            "-C" => return Err(unsupported(&option, "there is no IPComp here")),
            _ => return Err(unsupported(&option, "this option is not known here")),
        }
    }
    let Some(mode) = mode else {
        let text = "setkey's mode \"any\" cannot be imported: say -m tunnel or -m transport";
        return Err((at, Fault::Unsupported(text.into())));
    };
    let Some((enc, enc_key, key_at)) = enc else {
        return Err((at, Fault::Syntax("-E is lacking".into())));
    };
    let hmac = auth.as_ref().map(|(h, _)| *h);
    let suite = suite(enc, enc_key.len(), hmac).map_err(|f| (key_at.clone(), f))?;
    let port = |p: Option<&str>| match p {
        None => Ok(4500),
        Some(p) => udp_port("port", p).map_err(|f| (at.clone(), f)),
    };
    let encap = if udp {
        Some(UdpEncap {
            sport: port(sport)?,
            dport: port(dport)?,
        })
    } else {
        None
    };
    Ok(SaDraft {
        spi,
        src,
        dst,
        direction: None,
        mode,
        suite,
        keys: SaKeys {
            enc: enc_key,
            auth: auth.map(|(_, k)| k).unwrap_or_default(),
        },
        key_at,
        link: Link::Reqid(reqid),
        window: Some(window.unwrap_or(At {
            v: 0,
            at: at.clone(),
        })),
        esn: false,
        soft: nonzero(soft),
        hard: nonzero(hard),
        encap,
        ecn: true,
        df: Df::Copy,
        dscp: Dscp::Copy,
        if_id: 0,
        selectors: Vec::new(),
        sent: None,
        at,
    })
}

/// 0 means no limit.
fn nonzero(l: Limits) -> Limits {
    Limits {
        packets: l.packets.filter(|v| *v > 0),
        bytes: l.bytes.filter(|v| *v > 0),
        seconds: l.seconds.filter(|v| *v > 0),
    }
}

type Key = zeroize::Zeroizing<Vec<u8>>;

fn cipher(w: &mut Words<'_>) -> Result<(Enc, Key, Location), Fail> {
    let a = w.value("a cipher")?;
    let enc = match a.text {
        "rijndael-cbc" | "aes-cbc" => Enc::Cbc,
        "aes-ctr" => Enc::Ctr,
        "aes-gcm-8" => Enc::Gcm(AeadIcv::L8),
        "aes-gcm-12" => Enc::Gcm(AeadIcv::L12),
        "aes-gcm-16" => Enc::Gcm(AeadIcv::L16),
        "aes-gmac" => Enc::Gmac,
        "chacha20-poly1305" => Enc::ChaCha,
        "null" | "simple" => Enc::Null,
        other => {
            let known = "aes-cbc, rijndael-cbc, aes-ctr, aes-gcm-8, aes-gcm-12, aes-gcm-16, aes-gmac, chacha20-poly1305, null";
            return Err((a.at, unknown("-E", other, known)));
        }
    };
    if enc == Enc::Null && w.peek().is_none_or(|n| n.text.starts_with('-')) {
        return Ok((enc, Key::default(), a.at));
    }
    let k = w.value("a key")?;
    let material = key("key", &k).map_err(|f| (k.at.clone(), f))?;
    let material = if enc == Enc::Null {
        Key::default()
    } else {
        material
    };
    Ok((enc, material, k.at))
}

fn authenticator(w: &mut Words<'_>) -> Result<(Hmac, Key), Fail> {
    let a = w.value("an algorithm")?;
    let hmac = match a.text {
        "hmac-sha1" => Hmac::Sha1_96,
        "hmac-sha256" | "hmac-sha2-256" => Hmac::Sha256_128,
        "hmac-sha384" | "hmac-sha2-384" => Hmac::Sha384_192,
        "hmac-sha512" | "hmac-sha2-512" => Hmac::Sha512_256,
        other => {
            let known = "hmac-sha1, hmac-sha256, hmac-sha384, hmac-sha512";
            return Err((a.at, unknown("-A", other, known)));
        }
    };
    let k = w.value("a key")?;
    let material = key("auth_key", &k).map_err(|f| (k.at.clone(), f))?;
    Ok((hmac, material))
}

fn spdadd(w: &mut Words<'_>) -> Result<PolicyDraft, Fail> {
    let at = w.at.clone();
    let src = range(w, "the source range")?;
    let dst = range(w, "the destination range")?;
    let selector = selector(w, src, dst)?;
    let mut direction = None;
    let mut action = None;
    while let Some(word) = w.next() {
        match word.text {
            "-P" => {
                let d = w.value("a direction")?;
                direction = Some(match d.text {
                    "out" => (Direction::Out, false),
                    "in" => (Direction::In, false),
                    "fwd" => (Direction::In, true),
                    _ => return Err(unsupported(&d, "directions are in, out and fwd")),
                });
            }
            "discard" => action = Some(ActionDraft::Discard),
            "none" => action = Some(ActionDraft::Bypass),
            "ipsec" => {
                let rule = w.value("a rule")?;
                action = Some(protect(&rule)?);
            }
            "prio" | "priority" => {
                return Err(unsupported(
                    &word,
                    "the order of the lines is the priority; remove it",
                ));
            }
            _ => return Err(unsupported(&word, "this is not known here")),
        }
    }
    let lacking = |what: &str| (at.clone(), Fault::Syntax(format!("{what} is lacking")));
    let (direction, forward) = direction.ok_or_else(|| lacking("-P in or out"))?;
    let action = action.ok_or_else(|| lacking("ipsec, none or discard"))?;
    Ok(PolicyDraft {
        direction,
        forward,
        priority: PRIORITY,
        selector,
        action,
        if_id: 0,
        at,
    })
}

/// `esp/tunnel/192.0.2.1-198.51.100.7/unique:7` or `esp/transport//require`.
fn protect(rule: &Word<'_>) -> Result<ActionDraft, Fail> {
    let parts: Vec<&str> = rule.text.split('/').collect();
    let [protocol, mode, ends, level] = parts.as_slice() else {
        let text = "a rule is esp/mode/source-destination/level";
        return Err((rule.at.clone(), Fault::Syntax(text.into())));
    };
    if *protocol != "esp" {
        return Err(unsupported(rule, "only ESP protects here"));
    }
    let mode = match *mode {
        "tunnel" => Mode::Tunnel,
        "transport" => Mode::Transport,
        _ => return Err(unsupported(rule, "modes are tunnel and transport")),
    };
    let parse = |s: &str| {
        let (a, _port) = s.split_once('[').unwrap_or((s, ""));
        address("ipsec", a).map_err(|f| (rule.at.clone(), f))
    };
    let ends = match ends.split_once('-') {
        Some((a, b)) => Some((parse(a)?, parse(b)?)),
        None if ends.is_empty() && mode == Mode::Transport => None,
        None => return Err(unsupported(rule, "a tunnel has two ends")),
    };
    let reqid = match level.split_once(':') {
        None if *level == "require" => 0,
        Some(("unique", n)) => number("unique", n).map_err(|f| (rule.at.clone(), f))?,
        _ => return Err(unsupported(rule, "the level must be require or unique:N")),
    };
    Ok(ActionDraft::Protect {
        ends,
        mode,
        link: Link::Reqid(reqid),
    })
}

struct Range<'i> {
    addr: At<AddrRange>,
    port: Option<&'i str>,
}

/// `10.0.0.0/8[80]`; `any` as port is any.
fn range<'i>(w: &mut Words<'i>, what: &str) -> Result<Range<'i>, Fail> {
    while w
        .peek()
        .is_some_and(|o| matches!(o.text, "-4" | "-6" | "-n"))
    {
        let _ = w.next();
    }
    let word = w.value(what)?;
    let bad = |f| (word.at.clone(), f);
    let (text, port) = match word.text.split_once('[') {
        Some((a, p)) => (a, Some(p.strip_suffix(']').unwrap_or(p))),
        None => (word.text, None),
    };
    let (addr, len) = text.split_once('/').unwrap_or((text, ""));
    let addr = address(what, addr).map_err(bad)?;
    let full = if addr.is_ipv4() { 32 } else { 128 };
    let len = match len {
        "" => full,
        len => number::<u8>(what, len).map_err(bad)?,
    };
    let range = AddrRange::prefix(addr, len)
        .ok_or_else(|| bad(Fault::Syntax(format!("a prefix has 0 to {full} bits"))))?;
    Ok(Range {
        addr: At {
            v: range,
            at: word.at,
        },
        port: port.filter(|p| *p != "any"),
    })
}

fn selector(w: &mut Words<'_>, src: Range<'_>, dst: Range<'_>) -> Result<Selector, Fail> {
    let upper = w.value("the upper protocol")?;
    let bad = |f| (upper.at.clone(), f);
    let number_of = match upper.text {
        "any" => None,
        "icmp6" | "ipv6-icmp" => Some(ICMP6),
        "ip4" => Some(4),
        name => Some(proto("upper protocol", name).map_err(bad)?),
    };
    if src.addr.v.first().is_ipv4() != dst.addr.v.first().is_ipv4() {
        let (a, b) = (src.addr.v.first(), dst.addr.v.first());
        return Err((
            dst.addr.at,
            Fault::FamilyMismatch {
                a: a.to_string(),
                b: b.to_string(),
            },
        ));
    }
    let port = |p: Option<&str>| match p {
        None => Ok(0..=u16::MAX),
        Some(p) => number::<u16>("port", p).map(|p| p..=p),
    };
    let icmp = matches!(number_of, Some(ICMP | ICMP6));
    let ports = if src.port.is_some() || dst.port.is_some() {
        if !number_of.is_some_and(has_ports) {
            let need = "tcp, udp, sctp, dccp or udplite";
            return Err(bad(Fault::Needs { key: "port", need }));
        }
        Ports::Range {
            src: port(src.port).map_err(bad)?,
            dst: port(dst.port).map_err(bad)?,
        }
    } else if icmp && w.peek().is_some_and(|n| !n.text.starts_with('-')) {
        // `type` or `type,code`
        let word = w.value("an ICMP type")?;
        let (kind, code) = word.text.split_once(',').unwrap_or((word.text, ""));
        let bad = |f| (word.at.clone(), f);
        let kind = number::<u8>("ICMP type", kind).map_err(bad)?;
        let code = match code {
            "" => 0..=u8::MAX,
            c => number::<u8>("ICMP code", c).map(|c| c..=c).map_err(bad)?,
        };
        Ports::Icmp {
            kind: kind..=kind,
            code,
        }
    } else {
        Ports::Any
    };
    Ok(Selector {
        src: src.addr.v,
        dst: dst.addr.v,
        proto: number_of,
        ports,
    })
}
