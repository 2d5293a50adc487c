//! The `.cfg` of DPDK's ipsec-secgw: `sp`, `sa`, `rt` and `neigh` lines.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;

use crate::file::DEFAULT_WINDOW;
use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::At;
use crate::file::value::{address, has_ports, hex, shown};
use crate::policy::{AddrRange, Ports, Selector};
use crate::sa::{Df, Direction, Dscp, Limits, Mode, SaKeys, UdpEncap};
use crate::suite::{AeadIcv, Hmac};

use super::Remark;
use super::algorithms::{Enc, suite, unknown};
use super::draft::{ActionDraft, Draft, Link, PolicyDraft, SaDraft, check_sa};
use super::words::{End, Word, Words, number, statements};

type Fail = (Location, Fault);
type Key = zeroize::Zeroizing<Vec<u8>>;

/// Largest priority of DPDK's ACLs. There the highest number wins, here the lowest comes first.
const MAX_PRIORITY: u32 = 0x1fff_ffff;

pub(super) fn read(text: &str, name: &Path, draft: &mut Draft, problems: &mut Problems) {
    let mut policies = Vec::new();
    for mut w in statements(text, name, End::Line, problems) {
        let Some(command) = w.next() else { continue };
        let done = match command.text {
            "sa" => sa(&mut w).map(|sa| {
                check_sa(&sa, problems);
                draft.sas.push(sa);
            }),
            "sp" => sp(&mut w).map(|p| policies.push(p)),
            "rt" | "neigh" => {
                draft.remarks.push(elsewhere(&command, &mut w));
                Ok(())
            }
            _ => Err(unsupported(
                &command,
                "lines start with sp, sa, rt or neigh",
            )),
        };
        if let Err((at, fault)) = done {
            problems.push(&at, fault);
        }
    }
    pair_up(&mut draft.sas);
    let mut tunnels: HashMap<(bool, u32), SaDraft> = HashMap::new();
    for sa in &draft.sas {
        let out = sa.direction == Some(Direction::Out);
        tunnels.entry((out, sa.spi.v)).or_insert_with(|| sa.clone());
    }
    for (mut p, spi) in policies {
        if let Some(spi) = spi {
            let out = p.direction == Direction::Out;
            match tunnels.get(&(out, spi.v)) {
                Some(sa) => {
                    p.action = ActionDraft::Protect {
                        ends: Some((sa.src.v, sa.dst.v)),
                        mode: sa.mode,
                        link: sa.link.clone(),
                    };
                }
                None => {
                    let text = format!("no \"sa\" line of this direction has SPI {}", spi.v);
                    problems.push(&spi.at, Fault::Unsupported(text));
                    continue;
                }
            }
        }
        draft.policies.push(p);
    }
}

/// Gives an inbound SA the tunnel of the first outbound one between the same addresses that has none yet.
fn pair_up(sas: &mut [SaDraft]) {
    let mut waiting: HashMap<(IpAddr, IpAddr, Mode), Vec<Link>> = HashMap::new();
    for sa in sas.iter().rev() {
        if sa.direction == Some(Direction::Out) {
            let key = (sa.src.v, sa.dst.v, sa.mode);
            waiting.entry(key).or_default().push(sa.link.clone());
        }
    }
    for sa in sas.iter_mut() {
        if sa.direction == Some(Direction::In)
            && let Some(links) = waiting.get_mut(&(sa.dst.v, sa.src.v, sa.mode))
            && let Some(link) = links.pop()
        {
            sa.link = link;
        }
    }
}

fn elsewhere(command: &Word<'_>, w: &mut Words<'_>) -> Remark {
    let rest: Vec<&str> = w.rest().iter().map(|w| w.text).collect();
    let what = if command.text == "rt" {
        "routes"
    } else {
        "neighbours"
    };
    Remark {
        at: command.at.clone(),
        text: format!(
            "{what} belong to gateway.toml: {} {}",
            command.text,
            shown(&rest.join(" "))
        ),
    }
}

fn unsupported(w: &Word<'_>, why: &str) -> Fail {
    let text = format!("\"{}\" cannot be imported: {why}", shown(w.text));
    (w.at.clone(), Fault::Unsupported(text))
}

fn direction(w: &mut Words<'_>) -> Result<Direction, Fail> {
    let d = w.value("a direction")?;
    match d.text {
        "in" => Ok(Direction::In),
        "out" => Ok(Direction::Out),
        _ => Err(unsupported(&d, "directions are in and out")),
    }
}

fn sa(w: &mut Words<'_>) -> Result<SaDraft, Fail> {
    let at = w.at.clone();
    let direction = direction(w)?;
    let spi = w.number::<u32>("the SPI")?;
    let (mut cipher, mut cipher_key) = (None, None);
    let (mut auth, mut auth_key) = (None, None);
    let (mut mode, mut src, mut dst) = (None, None, None);
    let mut encap = None;
    while let Some(word) = w.next() {
        match word.text {
            "cipher_algo" | "aead_algo" => cipher = Some(w.value("an algorithm")?),
            "cipher_key" | "aead_key" => cipher_key = Some(secret(w, "key")?),
            "auth_algo" => auth = Some(w.value("an algorithm")?),
            "auth_key" => auth_key = Some(secret(w, "auth_key")?),
            "mode" => mode = Some(w.value("a mode")?),
            "src" => src = Some(w.parsed("src", address)?),
            "dst" => dst = Some(w.parsed("dst", address)?),
            "udp-encap" => {
                encap = Some(UdpEncap {
                    sport: 4500,
                    dport: 4500,
                });
            }
            "type" => {
                let t = w.value("a type")?;
                if t.text != "no-offload" {
                    let why = "engines have other names here; remove it and set offload and engine in the SA file";
                    return Err(unsupported(&t, why));
                }
            }
            _ => return Err(unsupported(&word, "this option is not known here")),
        }
    }
    let lacking = |what: &str| (at.clone(), Fault::Syntax(format!("{what} is lacking")));
    let mode_word = mode.ok_or_else(|| lacking("mode"))?;
    match mode_word.text {
        "ipv4-tunnel" | "ipv6-tunnel" => {}
        "transport" => {
            let why = "transport SAs have no addresses in this format; write them natively";
            return Err(unsupported(&mode_word, why));
        }
        _ => {
            return Err(unsupported(
                &mode_word,
                "modes are ipv4-tunnel and ipv6-tunnel",
            ));
        }
    }
    let cipher = cipher.ok_or_else(|| lacking("cipher_algo or aead_algo"))?;
    let (suite, enc, key_at) = algorithm(&cipher, cipher_key, auth.as_ref(), auth_key.as_ref())?;
    let aead = suite.auth_key_len() == 0;
    let auth_material = match auth_key {
        Some(k) if !aead => k.v,
        _ => Key::default(),
    };
    Ok(SaDraft {
        link: Link::Tunnel(spi.v),
        src: src.ok_or_else(|| lacking("src"))?,
        dst: dst.ok_or_else(|| lacking("dst"))?,
        direction: Some(direction),
        mode: Mode::Tunnel,
        suite,
        keys: SaKeys {
            enc,
            auth: auth_material,
        },
        key_at,
        // The window is an option of the program (-w), not of its file.
        window: Some(At {
            v: DEFAULT_WINDOW,
            at: at.clone(),
        }),
        esn: false,
        soft: Limits::default(),
        hard: Limits::default(),
        encap,
        ecn: true,
        df: Df::Copy,
        dscp: Dscp::Copy,
        if_id: 0,
        selectors: Vec::new(),
        sent: None,
        spi,
        at,
    })
}

/// Bytes in hexadecimal with `:` between them.
fn secret(w: &mut Words<'_>, name: &'static str) -> Result<At<Key>, Fail> {
    let word = w.value("a key")?;
    // Single digits are bytes, too: "0:1:2".
    let mut bytes = Key::new(Vec::with_capacity(64));
    for part in word.text.split(':') {
        match part.len() {
            1 | 2 => match u8::from_str_radix(part, 16) {
                Ok(b) => bytes.push(b),
                Err(_) => return Err((word.at, bad_key(name))),
            },
            _ if bytes.is_empty() && !word.text.contains(':') => {
                return match hex(name, part) {
                    Ok(v) => Ok(At { v, at: word.at }),
                    Err(f) => Err((word.at, f)),
                };
            }
            _ => return Err((word.at, bad_key(name))),
        }
    }
    Ok(At {
        v: bytes,
        at: word.at,
    })
}

fn bad_key(name: &str) -> Fault {
    Fault::Syntax(format!(
        "{name} is not bytes in hexadecimal with ':' between them"
    ))
}

fn algorithm(
    cipher: &Word<'_>,
    cipher_key: Option<At<Key>>,
    auth: Option<&Word<'_>>,
    auth_key: Option<&At<Key>>,
) -> Result<(crate::suite::Suite, Key, Location), Fail> {
    let gmac = auth.is_some_and(|a| a.text == "aes-gmac");
    let (enc, len) = match cipher.text {
        "null" if gmac => (Enc::Gmac, auth_key.map_or(0, |k| k.v.len())),
        "null" => (Enc::Null, 0),
        "aes-128-cbc" => (Enc::Cbc, 16),
        "aes-192-cbc" => (Enc::Cbc, 24),
        "aes-256-cbc" => (Enc::Cbc, 32),
        "aes-128-ctr" => (Enc::Ctr, 20),
        "aes-192-ctr" => (Enc::Ctr, 28),
        "aes-256-ctr" => (Enc::Ctr, 36),
        "aes-128-gcm" => (Enc::Gcm(AeadIcv::L16), 20),
        "aes-192-gcm" => (Enc::Gcm(AeadIcv::L16), 28),
        "aes-256-gcm" => (Enc::Gcm(AeadIcv::L16), 36),
        "chacha20-poly1305" => (Enc::ChaCha, 36),
        other => {
            let known = "null, aes-128-cbc, aes-192-cbc, aes-256-cbc, aes-128-ctr, aes-192-ctr, aes-256-ctr, aes-128-gcm, aes-192-gcm, aes-256-gcm, chacha20-poly1305";
            return Err((cipher.at.clone(), unknown("algorithm", other, known)));
        }
    };
    let hmac = match auth.map(|a| (a.text, a)) {
        None | Some(("aes-gmac", _)) => None,
        Some(("sha1-hmac", _)) => Some(Hmac::Sha1_96),
        Some(("sha256-hmac", _)) => Some(Hmac::Sha256_128),
        Some(("sha384-hmac", _)) => Some(Hmac::Sha384_192),
        Some(("sha512-hmac", _)) => Some(Hmac::Sha512_256),
        Some(("null", a)) if enc == Enc::Null || matches!(enc, Enc::Cbc | Enc::Ctr) => {
            let text = format!("{} without authentication", cipher.text);
            return Err((a.at.clone(), Fault::NoIntegrity(text)));
        }
        Some(("null", _)) => None,
        Some((other, a)) => {
            let known = "sha1-hmac, sha256-hmac, sha384-hmac, sha512-hmac, aes-gmac, null";
            return Err((a.at.clone(), unknown("auth_algo", other, known)));
        }
    };
    let suite = suite(enc, len, hmac).map_err(|f| (cipher.at.clone(), f))?;
    if enc == Enc::Gmac
        && let Some(k) = auth_key
    {
        return Ok((suite, k.v.clone(), k.at.clone()));
    }
    match (enc, cipher_key) {
        (Enc::Null, k) => Ok((
            suite,
            Key::default(),
            k.map_or_else(|| cipher.at.clone(), |k| k.at),
        )),
        (_, Some(k)) => Ok((suite, k.v, k.at)),
        (_, None) => Err((cipher.at.clone(), Fault::Syntax("a key is lacking".into()))),
    }
}

type Policy = (PolicyDraft, Option<At<u32>>);

fn sp(w: &mut Words<'_>) -> Result<Policy, Fail> {
    let at = w.at.clone();
    let family = w.value("ipv4 or ipv6")?;
    let v4 = match family.text {
        "ipv4" => true,
        "ipv6" => false,
        _ => return Err(unsupported(&family, "families are ipv4 and ipv6")),
    };
    let direction = direction(w)?;
    let esp = w.value("\"esp\"")?;
    if esp.text != "esp" {
        return Err(unsupported(&esp, "only ESP protects here"));
    }
    let action = w.value("an action")?;
    let mut spi = None;
    let action = match action.text {
        "protect" => {
            spi = Some(w.number::<u32>("the SPI")?);
            ActionDraft::Discard
        }
        "bypass" => ActionDraft::Bypass,
        "discard" => ActionDraft::Discard,
        _ => {
            return Err(unsupported(
                &action,
                "actions are protect, bypass and discard",
            ));
        }
    };
    let any = if v4 { "0.0.0.0/0" } else { "::/0" };
    let any = range("any", any).map_err(|f| (at.clone(), f))?;
    let (mut src, mut dst) = (any, any);
    let mut proto: Option<At<RangeInclusive<u8>>> = None;
    let (mut sport, mut dport) = (0..=u16::MAX, 0..=u16::MAX);
    let mut priority = 0u32;
    while let Some(word) = w.next() {
        match word.text {
            "pri" => {
                let p = w.number::<u32>("pri")?;
                if p.v > MAX_PRIORITY {
                    let text = format!("priorities end at {MAX_PRIORITY}");
                    return Err((p.at, Fault::Unsupported(text)));
                }
                priority = p.v;
            }
            "src" => src = w.parsed("src", range)?.v,
            "dst" => dst = w.parsed("dst", range)?.v,
            "proto" => proto = Some(w.parsed("proto", proto_range)?),
            "sport" => sport = w.parsed("sport", span)?.v,
            "dport" => dport = w.parsed("dport", span)?.v,
            _ => return Err(unsupported(&word, "this option is not known here")),
        }
    }
    for r in [src, dst] {
        if r.first().is_ipv4() != v4 {
            let (a, b) = (family.text.to_owned(), r.first().to_string());
            return Err((at, Fault::FamilyMismatch { a, b }));
        }
    }
    let number = match &proto {
        None => None,
        Some(p) if (*p.v.start(), *p.v.end()) == (0, 255) => None,
        Some(p) if p.v.start() == p.v.end() => Some(*p.v.start()),
        Some(p) => {
            let text = "a selector has one protocol or all: split this line";
            return Err((p.at.clone(), Fault::Unsupported(text.into())));
        }
    };
    let every = sport == (0..=u16::MAX) && dport == (0..=u16::MAX);
    let ports = match number {
        _ if every => Ports::Any,
        Some(p) if has_ports(p) => Ports::Range {
            src: sport,
            dst: dport,
        },
        _ => {
            let need = "proto 6, 17, 33, 132 or 136";
            return Err((at, Fault::Needs { key: "sport", need }));
        }
    };
    let p = PolicyDraft {
        direction,
        forward: false,
        priority: MAX_PRIORITY - priority,
        selector: Selector {
            src,
            dst,
            proto: number,
            ports,
        },
        action,
        if_id: 0,
        at,
    };
    Ok((p, spi))
}

fn range(what: &str, s: &str) -> Result<AddrRange, Fault> {
    let (addr, len) = s.split_once('/').unwrap_or((s, ""));
    let addr = address(what, addr)?;
    let full = if addr.is_ipv4() { 32 } else { 128 };
    let len = match len {
        "" => full,
        len => number::<u8>(what, len)?,
    };
    AddrRange::prefix(addr, len)
        .ok_or_else(|| Fault::Syntax(format!("a prefix has 0 to {full} bits")))
}

/// `0:65535`
fn span(what: &str, s: &str) -> Result<RangeInclusive<u16>, Fault> {
    let (a, b) = s.split_once(':').unwrap_or((s, s));
    let (a, b) = (number(what, a)?, number(what, b)?);
    if a > b {
        return Err(Fault::Syntax(format!("{what} is a range from low to high")));
    }
    Ok(a..=b)
}

/// `6` is written `6/0xff`, any is `0/0`; a plain range `0:255` is read, too.
fn proto_range(what: &str, s: &str) -> Result<RangeInclusive<u8>, Fault> {
    if let Some((v, mask)) = s.split_once('/') {
        return match number::<u8>(what, mask)? {
            0 => Ok(0..=255),
            0xff => number(what, v).map(|v| v..=v),
            _ => Err(Fault::Unsupported(
                "a selector has one protocol or all: the mask must be 0 or 0xff".into(),
            )),
        };
    }
    let (a, b) = s.split_once(':').unwrap_or((s, s));
    Ok(number(what, a)?..=number(what, b)?)
}
