//! `ip xfrm`: what it prints and the commands it takes. Both name their attributes alike.

use std::net::IpAddr;
use std::path::Path;

use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::At;
use crate::file::value::{ICMP, ICMP6, address, has_ports, proto, shown};
use crate::policy::{AddrRange, Ports, Selector};
use crate::sa::{Df, Direction, Dscp, Limits, Mode, SaKeys, UdpEncap};
use crate::suite::Hmac;

use super::algorithms::{Enc, icv, suite, unknown};
use super::draft::{ActionDraft, Draft, Link, PolicyDraft, SaDraft, check_sa};
use super::words::{End, Word, Words, key, number, statements};

type Fail = (Location, Fault);

pub(super) fn read(text: &str, name: &Path, draft: &mut Draft, problems: &mut Problems) {
    for mut w in statements(text, name, End::Indent, problems) {
        let what = match kind(&mut w) {
            Ok(k) => k,
            Err((at, fault)) => {
                problems.push(&at, fault);
                continue;
            }
        };
        let done = match what {
            Kind::State => state(&mut w).map(|sa| {
                check_sa(&sa, problems);
                draft.sas.push(sa);
            }),
            Kind::Policy => policy(&mut w).map(|p| draft.policies.push(p)),
        };
        if let Err((at, fault)) = done {
            problems.push(&at, fault);
        }
    }
}

enum Kind {
    State,
    Policy,
}

fn kind(w: &mut Words<'_>) -> Result<Kind, Fail> {
    let at = w.at.clone();
    let first = w.peek().map_or("", |f| f.text);
    if first == "src" {
        // Policies are printed with prefix lengths, states with plain addresses.
        let mut ahead = w.clone();
        let _ = ahead.next();
        let policy = ahead.next().is_some_and(|a| a.text.contains('/'));
        return Ok(if policy { Kind::Policy } else { Kind::State });
    }
    if first != "ip" && !first.ends_with("/ip") {
        let text = "a line starts with \"ip xfrm …\" or with \"src\", as ip prints it";
        return Err((at, Fault::Syntax(text.into())));
    }
    let _ = w.next();
    while w.peek().is_some_and(|o| o.text.starts_with('-')) {
        let _ = w.next();
    }
    let object = w.value("\"xfrm\"")?;
    if !matches!(object.text, "xfrm" | "x" | "xf" | "xfr") {
        return Err((
            object.at,
            Fault::Syntax("\"ip xfrm\" is understood here".into()),
        ));
    }
    let object = w.value("\"state\" or \"policy\"")?;
    let command = w.value("\"add\"")?;
    if !matches!(command.text, "add" | "a" | "update") {
        return Err((
            command.at,
            Fault::Unsupported(format!(
                "\"{}\" changes a running system; only \"add\" describes what there is to be",
                shown(command.text)
            )),
        ));
    }
    match object.text {
        "state" | "s" | "st" => Ok(Kind::State),
        "policy" | "p" | "pol" => Ok(Kind::Policy),
        _ => Err((
            object.at,
            Fault::Syntax("\"state\" or \"policy\" comes here".into()),
        )),
    }
}

/// A number as ip prints it: with a comma behind, or the same in another base in parentheses.
fn printed<T: TryFrom<u64>>(w: &mut Words<'_>, what: &str) -> Result<At<T>, Fail> {
    w.parsed(what, |what, s| {
        let s = s.split('(').next().unwrap_or(s);
        number(what, s.trim_end_matches(','))
    })
}

fn unsupported(w: &Word<'_>, why: &str) -> Fail {
    let text = format!("\"{}\" cannot be imported: {why}", shown(w.text));
    (w.at.clone(), Fault::Unsupported(text))
}

fn lacking(at: &Location, what: &str) -> Fail {
    (at.clone(), Fault::Syntax(format!("{what} is lacking")))
}

// --- States -----------------------------------------------------------------------------------------

#[derive(Default)]
struct StateWords<'i> {
    src: Option<At<IpAddr>>,
    dst: Option<At<IpAddr>>,
    spi: Option<At<u32>>,
    reqid: u32,
    mode: Option<Mode>,
    enc: Option<(Word<'i>, Word<'i>)>,
    auth: Option<(Word<'i>, Word<'i>, Option<u32>)>,
    aead: Option<(Word<'i>, Word<'i>, At<u32>)>,
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
    soft: Limits,
    hard: Limits,
    sent: Option<At<u64>>,
    is_esp: bool,
}

fn state(w: &mut Words<'_>) -> Result<SaDraft, Fail> {
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

fn esp(w: &mut Words<'_>) -> Result<bool, Fail> {
    let p = w.value("a protocol")?;
    match p.text {
        "esp" | "50" => Ok(true),
        _ => Err(unsupported(&p, "only ESP is protected traffic here")),
    }
}

fn mode(w: &mut Words<'_>) -> Result<Mode, Fail> {
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
        w.number::<u16>("a port")
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
    let v = w.number::<u64>(what.text)?.v;
    let v = (v > 0 && v < u64::MAX).then_some(v);
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

/// `config:` with its limits, or `current:` with what was used.
fn lifetime(s: &mut StateWords<'_>, w: &mut Words<'_>) -> Result<(), Fail> {
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

const ENCS: &str = "cbc(aes), rfc3686(ctr(aes)), ecb(cipher_null)";
const AUTHS: &str = "hmac(sha1), hmac(sha256), hmac(sha384), hmac(sha512)";
const AEADS: &str = "rfc4106(gcm(aes)), rfc4543(gcm(aes)), rfc7539esp(chacha20,poly1305)";

fn algorithms(
    s: &StateWords<'_>,
    at: &Location,
) -> Result<(crate::suite::Suite, SaKeys, Location), Fail> {
    let read_key = |name, w: &Word<'_>| key(name, w).map_err(|f| (w.at.clone(), f));
    if let Some((alg, k, bits)) = &s.aead {
        if let Some((other, ..)) = &s.enc {
            return Err(unsupported(other, "an AEAD takes no further cipher"));
        }
        if let Some((other, ..)) = &s.auth {
            return Err(unsupported(
                other,
                "an AEAD takes no further authentication",
            ));
        }
        let enc = match (alg.text, bits.v) {
            ("rfc4106(gcm(aes))", b) => icv(b).map(Enc::Gcm),
            ("rfc4543(gcm(aes))", 128) => Some(Enc::Gmac),
            ("rfc7539esp(chacha20,poly1305)", 128) => Some(Enc::ChaCha),
            ("rfc4543(gcm(aes))" | "rfc7539esp(chacha20,poly1305)", _) => None,
            (other, _) => return Err((alg.at.clone(), unknown("aead", other, AEADS))),
        };
        let Some(enc) = enc else {
            let text = format!("{} has no ICV of {} bits", shown(alg.text), bits.v);
            return Err((bits.at.clone(), Fault::Unsupported(text)));
        };
        let material = read_key("key", k)?;
        let suite = suite(enc, material.len(), None).map_err(|f| (k.at.clone(), f))?;
        let keys = SaKeys {
            enc: material,
            auth: Default::default(),
        };
        return Ok((suite, keys, k.at.clone()));
    }
    let Some((alg, k)) = &s.enc else {
        return Err(lacking(at, "an algorithm (aead, or enc and auth-trunc)"));
    };
    let enc = match alg.text {
        "cbc(aes)" | "aes" => Enc::Cbc,
        "rfc3686(ctr(aes))" => Enc::Ctr,
        "ecb(cipher_null)" | "cipher_null" => Enc::Null,
        other => return Err((alg.at.clone(), unknown("enc", other, ENCS))),
    };
    let Some((auth_alg, auth_key, bits)) = &s.auth else {
        let text = format!("{} without authentication", shown(alg.text));
        return Err((alg.at.clone(), Fault::NoIntegrity(text)));
    };
    // Without auth-trunc, Linux truncates to 96 bits for SHA-1 and, unlike RFC 4868, SHA-256.
    let (hmac, default) = match auth_alg.text {
        "hmac(sha1)" | "sha1" => (Hmac::Sha1_96, 96),
        "hmac(sha256)" | "sha256" => (Hmac::Sha256_128, 96),
        "hmac(sha384)" => (Hmac::Sha384_192, 192),
        "hmac(sha512)" => (Hmac::Sha512_256, 256),
        other => return Err((auth_alg.at.clone(), unknown("auth", other, AUTHS))),
    };
    let bits = bits.unwrap_or(default);
    if u32::try_from(hmac.icv_len() * 8) != Ok(bits) {
        let text = format!(
            "{} truncated to {bits} bits is not offered; RFC 4868 wants auth-trunc … {}",
            shown(auth_alg.text),
            hmac.icv_len() * 8
        );
        return Err((auth_alg.at.clone(), Fault::Unsupported(text)));
    }
    let material = match enc {
        Enc::Null => Default::default(),
        _ => read_key("key", k)?,
    };
    let suite = suite(enc, material.len(), Some(hmac)).map_err(|f| (k.at.clone(), f))?;
    let keys = SaKeys {
        enc: material,
        auth: read_key("auth_key", auth_key)?,
    };
    Ok((suite, keys, k.at.clone()))
}

// --- Selectors and policies -----------------------------------------------------------------------------

#[derive(Default)]
struct Upper {
    src: Option<At<AddrRange>>,
    dst: Option<At<AddrRange>>,
    proto: Option<u8>,
    sport: Option<At<u16>>,
    dport: Option<At<u16>>,
    kind: Option<At<u8>>,
    code: Option<At<u8>>,
}

impl Upper {
    /// Takes the words of a selector; false when the next word is something else.
    fn take(&mut self, w: &mut Words<'_>) -> Result<bool, Fail> {
        let Some(word) = w.peek().cloned() else {
            return Ok(false);
        };
        if !matches!(
            word.text,
            "src" | "dst" | "proto" | "sport" | "dport" | "type" | "code" | "key" | "dev"
        ) {
            return Ok(false);
        }
        let _ = w.next();
        match word.text {
            "src" => self.src = Some(w.parsed("src", prefix)?),
            "dst" => self.dst = Some(w.parsed("dst", prefix)?),
            "proto" => self.proto = Some(w.parsed("proto", protocol)?.v).filter(|p| *p != 0),
            "sport" => self.sport = Some(w.number("sport")?),
            "dport" => self.dport = Some(w.number("dport")?),
            "type" => self.kind = Some(w.number("type")?),
            "code" => self.code = Some(w.number("code")?),
            "dev" => return Err(unsupported(&word, "use a VRF or an interface id")),
            _ => return Err(unsupported(&word, "GRE keys are no selectors here")),
        }
        Ok(true)
    }

    fn selector(self, at: &Location) -> Result<Selector, Fail> {
        let src = self.src.ok_or_else(|| lacking(at, "\"src\""))?;
        let dst = self.dst.ok_or_else(|| lacking(at, "\"dst\""))?;
        if src.v.first().is_ipv4() != dst.v.first().is_ipv4() {
            let (a, b) = (src.v.first().to_string(), dst.v.first().to_string());
            return Err((dst.at, Fault::FamilyMismatch { a, b }));
        }
        let needs = |at: &Location, key, need| (at.clone(), Fault::Needs { key, need });
        let ports = if let Some(p) = self.sport.as_ref().or(self.dport.as_ref()) {
            if !self.proto.is_some_and(has_ports) {
                return Err(needs(
                    &p.at,
                    "sport",
                    "proto tcp, udp, sctp, dccp or udplite",
                ));
            }
            let range = |p: Option<At<u16>>| p.map_or(0..=u16::MAX, |p| p.v..=p.v);
            Ports::Range {
                src: range(self.sport),
                dst: range(self.dport),
            }
        } else if let Some(p) = self.kind.as_ref().or(self.code.as_ref()) {
            if !matches!(self.proto, Some(ICMP | ICMP6)) {
                return Err(needs(&p.at, "type", "proto icmp or ipv6-icmp"));
            }
            let range = |p: Option<At<u8>>| p.map_or(0..=u8::MAX, |p| p.v..=p.v);
            Ports::Icmp {
                kind: range(self.kind),
                code: range(self.code),
            }
        } else {
            Ports::Any
        };
        Ok(Selector {
            src: src.v,
            dst: dst.v,
            proto: self.proto,
            ports,
        })
    }
}

/// `None` for the selector that lets everything through.
fn selector(w: &mut Words<'_>, at: &Location) -> Result<Option<Selector>, Fail> {
    let mut u = Upper::default();
    while u.take(w)? {}
    let s = u.selector(at)?;
    let any = |a: AddrRange| Some(a) == AddrRange::prefix(a.first(), 0);
    let everything = any(s.src) && any(s.dst) && s.proto.is_none();
    Ok((!everything).then_some(s))
}

/// A prefix; host bits are as good as zero, as for Linux.
fn prefix(what: &str, s: &str) -> Result<AddrRange, Fault> {
    let (addr, len) = s.split_once('/').unwrap_or((s, ""));
    let addr = address(what, addr)?;
    let full = if addr.is_ipv4() { 32 } else { 128 };
    let len = if len.is_empty() {
        full
    } else {
        number::<u8>(what, len)?
    };
    AddrRange::prefix(addr, len).ok_or_else(|| Fault::BadValue {
        key: what.into(),
        got: shown(s),
        suggestion: None,
        want: format!("a prefix length of 0 to {full}"),
    })
}

fn protocol(what: &str, s: &str) -> Result<u8, Fault> {
    match s {
        "ipv6-icmp" => Ok(ICMP6),
        "any" => Ok(0),
        s => proto(what, s),
    }
}

fn policy(w: &mut Words<'_>) -> Result<PolicyDraft, Fail> {
    let at = w.at.clone();
    let mut upper = Upper::default();
    let mut direction = None;
    let mut priority = 0;
    let mut block = false;
    let mut if_id = 0;
    let mut template = None;
    loop {
        if upper.take(w)? {
            continue;
        }
        let Some(word) = w.next() else { break };
        match word.text {
            "dir" => {
                let d = w.value("a direction")?;
                direction = Some(match d.text {
                    "out" => (Direction::Out, false),
                    "in" => (Direction::In, false),
                    "fwd" => (Direction::In, true),
                    _ => return Err(unsupported(&d, "directions are in, out and fwd")),
                });
            }
            "priority" => priority = w.number("priority")?.v,
            "action" => {
                let a = w.value("an action")?;
                block = match a.text {
                    "allow" => false,
                    "block" => true,
                    _ => return Err(unsupported(&a, "actions are allow and block")),
                };
            }
            "ptype" => {
                let t = w.value("a type")?;
                if t.text != "main" {
                    return Err(unsupported(&t, "only main policies are known"));
                }
            }
            "if_id" => if_id = w.number("if_id")?.v,
            "index" | "uid" => {
                let _ = w.number::<u32>(word.text)?;
            }
            "share" => {
                let s = w.value("\"any\"")?;
                if s.text != "any" {
                    return Err(unsupported(&s, "SAs are shared by all who may use them"));
                }
            }
            "flag" => {
                while let Some(f) = w.peek().cloned() {
                    match f.text {
                        "icmp" => {}
                        text if text.starts_with("(0x") => {}
                        "localok" => {
                            return Err(unsupported(&f, "sockets have no policies here"));
                        }
                        _ => break,
                    }
                    let _ = w.next();
                }
            }
            "lifetime" => {
                let mut unused = StateWords::default();
                lifetime(&mut unused, w)?;
                let none = Limits::default();
                if unused.soft != none || unused.hard != none {
                    return Err(unsupported(&word, "policies do not expire here"));
                }
            }
            "tmpl" => {
                if template.is_some() {
                    return Err(unsupported(
                        &word,
                        "one transformation a policy is possible",
                    ));
                }
                template = Some(tmpl(w)?);
            }
            "socket" => {
                let why = "this is a policy of one socket of the kernel; remove it";
                return Err(unsupported(&word, why));
            }
            "mark" => {
                let why = "this gateway has VRFs and interface ids, not marks";
                return Err(unsupported(&word, why));
            }
            _ => return Err(unsupported(&word, "this attribute is not known here")),
        }
    }
    let (direction, forward) = direction.ok_or_else(|| lacking(&at, "\"dir\""))?;
    let action = match (block, template) {
        (true, _) => ActionDraft::Discard,
        (false, None) => ActionDraft::Bypass,
        (false, Some(t)) => t,
    };
    Ok(PolicyDraft {
        direction,
        forward,
        priority,
        selector: upper.selector(&at)?,
        action,
        if_id,
        at,
    })
}

fn tmpl(w: &mut Words<'_>) -> Result<ActionDraft, Fail> {
    let (mut src, mut dst) = (None, None);
    let mut reqid = 0;
    let mut mode_of = Mode::Transport;
    while let Some(word) = w.peek().cloned() {
        match word.text {
            "src" | "dst" => {
                let _ = w.next();
                let a = w.parsed(word.text, address)?.v;
                let slot = if word.text == "src" {
                    &mut src
                } else {
                    &mut dst
                };
                *slot = Some(a).filter(|a| !a.is_unspecified());
            }
            "proto" => {
                let _ = (w.next(), esp(w)?);
            }
            "spi" => {
                let _ = (w.next(), printed::<u32>(w, "spi")?);
            }
            "reqid" => {
                let _ = w.next();
                reqid = printed::<u32>(w, "reqid")?.v;
            }
            "mode" => {
                let _ = w.next();
                mode_of = mode(w)?;
            }
            "level" => {
                let _ = w.next();
                let l = w.value("a level")?;
                if l.text != "required" {
                    return Err(unsupported(&l, "protection is never optional here"));
                }
            }
            "share" | "enc-mask" | "auth-mask" | "comp-mask" => {
                let _ = (w.next(), w.value("a value")?);
            }
            _ => break,
        }
    }
    Ok(ActionDraft::Protect {
        ends: src.zip(dst),
        mode: mode_of,
        link: Link::Reqid(reqid),
    })
}
