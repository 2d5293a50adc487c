//! Policies and selectors.

use crate::file::fault::{Fault, Location};
use crate::file::fields::At;
use crate::file::value::{ICMP, ICMP6, address, has_ports, proto, shown};
use crate::import::draft::{ActionDraft, Link, PolicyDraft};
use crate::import::words::{Words, number};
use crate::policy::{AddrRange, Ports, Selector};
use crate::sa::{Direction, Limits, Mode};

use super::state::{StateWords, esp, lifetime, mode};
use super::{Fail, lacking, printed, unsupported};

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
pub(super) fn selector(w: &mut Words<'_>, at: &Location) -> Result<Option<Selector>, Fail> {
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

pub(super) fn policy(w: &mut Words<'_>) -> Result<PolicyDraft, Fail> {
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
