//! Writes a configuration as a native SA file.

use std::fmt::{self, Write};

use zeroize::Zeroizing;

use crate::policy::{Action, Policy, Ports, Selector};
use crate::sa::{Direction, Dscp, Limits, SaSpec, UdpEncap};

use super::check::weaknesses;
use super::model::{Config, Settings, Tunnel, default_sa_name};
use super::value::{DFS, DIRECTIONS, DSCPS, MODES, OFFLOADS, PROTOS, ShownRange, word_for};

/// The configuration cannot be said in a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The SA's tunnel is not among the tunnels.
    #[error("SA \"{0}\" belongs to a tunnel that the configuration does not have")]
    NoTunnel(String),
    /// Addresses, mode, VRF or interface id of an SA differ from those of its tunnel.
    #[error("SA \"{0}\" differs from its tunnel in addresses, mode, VRF or interface id")]
    NotOfTunnel(String),
}

/// The configuration as TOML, which [`super::parse`] reads back to an equal one. Keys are written inline,
/// so the file must be created with mode 0600. The text is built in one allocation of the exact length
/// and wiped on drop.
///
/// # Errors
/// See [`WriteError`]; a configuration that was read from a file can always be written.
pub fn to_toml(config: &Config) -> Result<Zeroizing<String>, WriteError> {
    check(config)?;
    let mut length = Length(0);
    // Writing to `Length` and `String` cannot fail.
    let _ = emit(config, &mut length);
    let mut text = Zeroizing::new(String::with_capacity(length.0));
    let _ = emit(config, &mut *text);
    Ok(text)
}

/// Counts what would be written.
struct Length(usize);

impl Write for Length {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.0 += s.len();
        Ok(())
    }
}

fn check(config: &Config) -> Result<(), WriteError> {
    let by_name: std::collections::HashMap<&str, &Tunnel> = config
        .tunnels
        .iter()
        .map(|t| (t.name.as_str(), t))
        .collect();
    for sa in &config.sas {
        let t = by_name
            .get(sa.tunnel.as_str())
            .ok_or_else(|| WriteError::NoTunnel(sa.name.clone()))?;
        let (local, remote) = match sa.direction {
            Direction::Out => (sa.src, sa.dst),
            Direction::In => (sa.dst, sa.src),
        };
        if (local, remote, sa.mode, sa.vrf, sa.if_id) != (t.local, t.remote, t.mode, t.vrf, t.if_id)
        {
            return Err(WriteError::NotOfTunnel(sa.name.clone()));
        }
    }
    Ok(())
}

fn emit(config: &Config, w: &mut dyn Write) -> fmt::Result {
    let mut blank = "";
    for t in &config.tunnels {
        w.write_str(blank)?;
        emit_tunnel(t, w)?;
        blank = "\n";
    }
    let tunnels: std::collections::HashMap<&str, &Tunnel> = config
        .tunnels
        .iter()
        .map(|t| (t.name.as_str(), t))
        .collect();
    for sa in &config.sas {
        w.write_str(blank)?;
        if let Some(t) = tunnels.get(sa.tunnel.as_str()) {
            emit_sa(sa, t, w)?;
        }
        blank = "\n";
    }
    for p in &config.policies {
        w.write_str(blank)?;
        emit_policy(p, w)?;
        blank = "\n";
    }
    Ok(())
}

fn emit_tunnel(t: &Tunnel, w: &mut dyn Write) -> fmt::Result {
    writeln!(w, "[[tunnel]]\nname = \"{}\"", t.name)?;
    writeln!(w, "local = \"{}\"\nremote = \"{}\"", t.local, t.remote)?;
    word_line(w, "mode", word_for(t.mode, MODES))?;
    if let Some(s) = t.suite {
        writeln!(w, "suite = \"{s}\"")?;
    }
    if t.vrf.0 != 0 {
        writeln!(w, "vrf = {}", t.vrf.0)?;
    }
    if t.if_id.0 != 0 {
        writeln!(w, "if_id = {}", t.if_id.0)?;
    }
    emit_settings(&t.settings, &Settings::default(), w)
}

fn emit_sa(sa: &SaSpec, t: &Tunnel, w: &mut dyn Write) -> fmt::Result {
    writeln!(w, "[[sa]]\ntunnel = \"{}\"", sa.tunnel)?;
    if sa.name != default_sa_name(&sa.tunnel, sa.direction, sa.spi) {
        writeln!(w, "name = \"{}\"", sa.name)?;
    }
    word_line(w, "direction", word_for(sa.direction, DIRECTIONS))?;
    writeln!(w, "spi = {}", sa.spi)?;
    if t.suite != Some(sa.suite) {
        writeln!(w, "suite = \"{}\"", sa.suite)?;
    }
    emit_key("key", &sa.keys.enc, w)?;
    emit_key("auth_key", &sa.keys.auth, w)?;
    if sa.first_use {
        writeln!(w, "first_use = true")?;
    }
    if !weaknesses(sa).is_empty() {
        writeln!(w, "allow_weak = true")?;
    }
    emit_settings(&Settings::of(sa), &t.settings, w)
}

fn emit_key(key: &str, bytes: &[u8], w: &mut dyn Write) -> fmt::Result {
    const DIGITS: &str = "0123456789abcdef";
    if bytes.is_empty() {
        return Ok(());
    }
    write!(w, "{key} = \"")?;
    for b in bytes {
        for nibble in [usize::from(b >> 4), usize::from(b & 15)] {
            // Slices of a constant: no digit is copied to a temporary.
            w.write_str(DIGITS.get(nibble..=nibble).unwrap_or_default())?;
        }
    }
    w.write_str("\"\n")
}

/// Only what differs from `base`.
fn emit_settings(s: &Settings, base: &Settings, w: &mut dyn Write) -> fmt::Result {
    if s.esn != base.esn {
        writeln!(w, "esn = {}", s.esn)?;
    }
    if s.window != base.window {
        writeln!(w, "window = {}", s.window)?;
    }
    if s.soft != base.soft {
        emit_limits("soft", &s.soft, w)?;
    }
    if s.hard != base.hard {
        emit_limits("hard", &s.hard, w)?;
    }
    if s.encap != base.encap {
        match s.encap {
            None => writeln!(w, "nat_t = false")?,
            Some(UdpEncap { sport, dport }) => writeln!(
                w,
                "nat_t = {{ local_port = {sport}, remote_port = {dport} }}"
            )?,
        }
    }
    if s.dscp != base.dscp {
        match s.dscp {
            Dscp::Copy => writeln!(w, "dscp = \"copy\"")?,
            Dscp::Fixed(n) => match word_for(n, DSCPS) {
                Some(name) => writeln!(w, "dscp = \"{name}\"")?,
                None => writeln!(w, "dscp = {n}")?,
            },
        }
    }
    if s.df != base.df {
        word_line(w, "df", word_for(s.df, DFS))?;
    }
    if s.ecn != base.ecn {
        writeln!(w, "ecn = {}", s.ecn)?;
    }
    if s.ttl != base.ttl {
        writeln!(w, "ttl = {}", s.ttl)?;
    }
    if s.pmtu != base.pmtu {
        match s.pmtu {
            Some(n) => writeln!(w, "pmtu = {n}")?,
            None => writeln!(w, "pmtu = \"auto\"")?,
        }
    }
    if s.tfc.pad_to() != base.tfc.pad_to() {
        match s.tfc.pad_to() {
            0 => writeln!(w, "tfc = \"off\"")?,
            n => writeln!(w, "tfc = {n}")?,
        }
    }
    if s.tfc.dummies() != base.tfc.dummies() {
        writeln!(w, "dummies = {}", s.tfc.dummies())?;
    }
    if s.mss_clamp != base.mss_clamp {
        writeln!(w, "mss_clamp = {}", s.mss_clamp)?;
    }
    if s.offload != base.offload {
        word_line(w, "offload", word_for(s.offload, OFFLOADS))?;
    }
    if s.engine != base.engine {
        match &s.engine {
            Some(e) => writeln!(w, "engine = \"{e}\"")?,
            None => writeln!(w, "engine = \"auto\"")?,
        }
    }
    if s.selectors != base.selectors {
        writeln!(w, "selectors = [")?;
        for sel in &s.selectors {
            write!(w, "  {{ ")?;
            emit_selector(sel, &SIDED, ", ", w)?;
            writeln!(w, " }},")?;
        }
        writeln!(w, "]")?;
    }
    Ok(())
}

fn emit_limits(key: &str, l: &Limits, w: &mut dyn Write) -> fmt::Result {
    write!(w, "{key} = {{")?;
    let mut sep = " ";
    for (name, v) in [
        ("packets", l.packets),
        ("bytes", l.bytes),
        ("time", l.seconds),
    ] {
        if let Some(v) = v {
            write!(w, "{sep}{name} = {v}")?;
            sep = ", ";
        }
    }
    writeln!(w, " }}")
}

struct Names {
    src: &'static str,
    dst: &'static str,
    src_port: &'static str,
    dst_port: &'static str,
}

const SIDED: Names = Names {
    src: "local",
    dst: "remote",
    src_port: "local_port",
    dst_port: "remote_port",
};
const TRAVEL: Names = Names {
    src: "src",
    dst: "dst",
    src_port: "src_port",
    dst_port: "dst_port",
};

fn emit_selector(s: &Selector, n: &Names, sep: &str, w: &mut dyn Write) -> fmt::Result {
    write!(
        w,
        "{} = \"{}\"{sep}{} = \"{}\"",
        n.src,
        ShownRange(s.src),
        n.dst,
        ShownRange(s.dst)
    )?;
    if let Some(p) = s.proto {
        match word_for(p, PROTOS) {
            Some(name) => write!(w, "{sep}proto = \"{name}\"")?,
            None => write!(w, "{sep}proto = {p}")?,
        }
    }
    match &s.ports {
        Ports::Any => Ok(()),
        Ports::Opaque => write!(w, "{sep}ports = \"opaque\""),
        Ports::Range { src, dst } => write!(
            w,
            "{sep}{} = \"{}-{}\"{sep}{} = \"{}-{}\"",
            n.src_port,
            src.start(),
            src.end(),
            n.dst_port,
            dst.start(),
            dst.end()
        ),
        Ports::Icmp { kind, code } => write!(
            w,
            "{sep}icmp_type = \"{}-{}\"{sep}icmp_code = \"{}-{}\"",
            kind.start(),
            kind.end(),
            code.start(),
            code.end()
        ),
    }
}

fn emit_policy(p: &Policy, w: &mut dyn Write) -> fmt::Result {
    writeln!(w, "[[policy]]\nname = \"{}\"", p.name)?;
    word_line(w, "direction", word_for(p.direction, DIRECTIONS))?;
    writeln!(w, "priority = {}", p.priority)?;
    match &p.action {
        Action::Protect { tunnel } => {
            writeln!(w, "action = \"protect\"\ntunnel = \"{tunnel}\"")?;
        }
        Action::Bypass => writeln!(w, "action = \"bypass\"")?,
        Action::Discard => writeln!(w, "action = \"discard\"")?,
    }
    if p.vrf.0 != 0 {
        writeln!(w, "vrf = {}", p.vrf.0)?;
    }
    if p.if_id.0 != 0 {
        writeln!(w, "if_id = {}", p.if_id.0)?;
    }
    if let [only] = p.selectors.as_slice() {
        emit_selector(only, &TRAVEL, "\n", w)?;
        return w.write_str("\n");
    }
    writeln!(w, "selectors = [")?;
    for s in &p.selectors {
        write!(w, "  {{ ")?;
        emit_selector(s, &TRAVEL, ", ", w)?;
        writeln!(w, " }},")?;
    }
    writeln!(w, "]")
}

fn word_line(w: &mut dyn Write, key: &str, word: Option<&'static str>) -> fmt::Result {
    match word {
        Some(word) => writeln!(w, "{key} = \"{word}\""),
        None => Ok(()),
    }
}
