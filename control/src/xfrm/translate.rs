//! From the kernel's SAs and policies to tunnels, SAs and policies of ours.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use sa_store::file::{
    Config, DEFAULT_TTL, MAX_WINDOW, MIRROR_PREFIX, SaIdentity, Settings as TunnelSettings, Tunnel,
};
use sa_store::policy::{Action, AddrRange, Policy, Ports, Selector};
use sa_store::sa::{Df, Direction, Dscp, IfId, Mode, OffloadMode, Spi, Tfc};

use super::message::{KernelAction, KernelPolicy, KernelSa, PolicyKey, SaKey, Template, Way};
use super::settings::Settings;
use crate::mirrored::Mirrored;

/// Least replay window of an inbound SA that has one, packets: RFC 4303 section 3.4.3 prefers 64 to what daemons ask for.
const LEAST_WINDOW: u32 = 64;

/// What a group comes to.
#[derive(Debug, Default)]
pub(super) struct Translated {
    pub(super) part: Mirrored,
    /// SAs by our name of them.
    pub(super) keys: Vec<(String, SaKey)>,
    /// What stays with the kernel, and why.
    pub(super) left: Vec<(String, String)>,
}

/// Whether an SA may be used: see [`super::seize`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seized {
    /// Ours; the flag says that nobody used its key before.
    Ours { first_use: bool },
    /// Not, and why.
    Not(String),
}

/// What is translated together; see [`super::picture`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Group {
    /// Tunnels that differ in our address alone: it is in their names only if there are several.
    Tunnels {
        reqid: u32,
        if_id: u32,
        transport: bool,
        remote: IpAddr,
    },
    /// An SA of nobody's.
    Sa(SaKey),
    /// A policy that protects nothing.
    Policy(PolicyKey),
}

impl Group {
    pub(super) fn of_sa(sa: &KernelSa, is_local: &dyn Fn(IpAddr) -> bool) -> Self {
        match (direction(sa, is_local), sa.mode) {
            (Some(direction), Some(mode)) => TunnelKey::of_sa(sa, direction, mode).group(),
            _ => Self::Sa(sa.key),
        }
    }

    pub(super) fn of_policy(p: &KernelPolicy) -> Self {
        match &p.action {
            KernelAction::Protect(template) => TunnelKey::of_policy(p, template).group(),
            _ => Self::Policy(p.key.clone()),
        }
    }
}

/// What tells tunnels apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct TunnelKey {
    reqid: u32,
    if_id: u32,
    transport: bool,
    remote: IpAddr,
    local: IpAddr,
}

impl TunnelKey {
    fn of_sa(sa: &KernelSa, direction: Direction, mode: Mode) -> Self {
        let (local, remote) = match direction {
            Direction::Out => (sa.src, sa.key.dst),
            Direction::In => (sa.key.dst, sa.src),
        };
        Self {
            reqid: sa.reqid,
            if_id: sa.if_id.0,
            transport: mode == Mode::Transport,
            remote,
            local,
        }
    }

    fn of_policy(p: &KernelPolicy, t: &Template) -> Self {
        let (mut local, mut remote) = match p.key.way {
            Way::Out => (t.src, t.dst),
            Way::In | Way::Forward => (t.dst, t.src),
        };
        // Templates of transport mode may leave the addresses to the packets.
        let s = &p.key.selector;
        let (near, far) = match p.key.way {
            Way::Out => (s.src, s.dst),
            Way::In | Way::Forward => (s.dst, s.src),
        };
        if local.is_unspecified() && near.first() == near.last() {
            local = near.first();
        }
        if remote.is_unspecified() && far.first() == far.last() {
            remote = far.first();
        }
        let mut key = Self {
            reqid: t.reqid,
            if_id: p.key.if_id.0,
            transport: t.mode == Mode::Transport,
            remote,
            local,
        };
        // The mode is that of the SAs to come.
        key.transport &= !key.is_bare_trap();
        key
    }

    fn group(&self) -> Group {
        Group::Tunnels {
            reqid: self.reqid,
            if_id: self.if_id,
            transport: self.transport,
            // Bare traps of either family have one name.
            remote: match self.is_bare_trap() {
                true => Ipv4Addr::UNSPECIFIED.into(),
                false => self.remote,
            },
        }
    }

    /// libreswan's traps name nothing: the daemon finds its connection by the packet that raises the acquire.
    fn is_bare_trap(&self) -> bool {
        self.reqid == 0 && self.local.is_unspecified() && self.remote.is_unspecified()
    }

    fn name(&self, alone: bool) -> String {
        let mut s = if self.is_bare_trap() {
            format!("{MIRROR_PREFIX}trap")
        } else {
            format!("{MIRROR_PREFIX}{}@{}", self.reqid, self.remote)
        };
        if self.if_id != 0 {
            let _ = write!(s, "-if{}", self.if_id);
        }
        if self.transport {
            s.push_str("-transport");
        }
        if !alone {
            let _ = write!(s, "-from-{}", self.local);
        }
        s
    }
}

/// Direction of an SA: what the kernel says, else where our address stands.
pub(super) fn direction(sa: &KernelSa, is_local: &dyn Fn(IpAddr) -> bool) -> Option<Direction> {
    sa.direction
        .or_else(|| match (is_local(sa.src), is_local(sa.key.dst)) {
            (true, false) => Some(Direction::Out),
            (false, true) => Some(Direction::In),
            _ => None,
        })
}

/// Works out what is wanted of a group, given its SAs, the latest last, and its policies in the order of look-up with their
/// places in it. `seized` says of each SA whether it may be used.
pub(super) fn translate(
    sas: &[&KernelSa],
    policies: &[(u64, &KernelPolicy)],
    settings: &Settings,
    is_local: &dyn Fn(IpAddr) -> bool,
    seized: &dyn Fn(&SaKey) -> Option<Seized>,
) -> Translated {
    let mut t = Translated::default();
    let mut usable = Vec::new();
    for sa in sas {
        match usable_sa(sa, settings, is_local, seized) {
            Ok(found) => usable.push(found),
            Err(why) => t.left.push((sa_label(&sa.key), why)),
        }
    }
    let mut tunnels: BTreeMap<TunnelKey, Tunnel> = BTreeMap::new();
    for u in &usable {
        tunnels
            .entry(u.tunnel)
            .or_insert_with(|| empty_tunnel(&u.tunnel));
    }
    let mut protecting = Vec::new();
    for (_, p) in policies {
        let KernelAction::Protect(template) = &p.action else {
            continue;
        };
        let key = TunnelKey::of_policy(p, template);
        // A trap: SAs are made when the first packet comes.
        let known = is_local(key.local) || key.is_bare_trap();
        let ours = known && settings.takes_policy(&p.key, Some(template.reqid));
        if !ours && !tunnels.contains_key(&key) {
            let why = "no SA of its template is taken".into();
            t.left.push((policy_label(p), why));
            continue;
        }
        tunnels.entry(key).or_insert_with(|| empty_tunnel(&key));
        protecting.push((*p, key));
    }
    name_tunnels(&mut tunnels);
    // What a route leads into a tunnel has no policy here: the SAs know what they may carry.
    let mut routed: HashMap<TunnelKey, Vec<Selector>> = HashMap::new();
    for (p, key) in &protecting {
        if key.if_id != 0 && p.key.way == Way::Out {
            let selectors = routed.entry(*key).or_default();
            selectors.push(p.key.selector.clone());
        }
    }
    for u in &usable {
        let Some(tunnel) = tunnels.get(&u.tunnel) else {
            continue;
        };
        let selectors = routed.get(&u.tunnel).cloned().unwrap_or_default();
        let name = add_sa(&mut t.part.config, tunnel, u, settings, selectors);
        t.keys.push((name.clone(), u.sa.key));
        if u.direction == Direction::Out {
            // The latest: SAs come in their order.
            t.part.senders.insert(tunnel.name.clone(), name);
        }
    }
    add_policies(&mut t, policies, &protecting, &tunnels, settings);
    t.part.config.tunnels = tunnels.into_values().collect();
    t
}

/// An SA that can be taken.
struct Usable<'k> {
    sa: &'k KernelSa,
    direction: Direction,
    tunnel: TunnelKey,
    first_use: bool,
}

fn usable_sa<'k>(
    sa: &'k KernelSa,
    settings: &Settings,
    is_local: &dyn Fn(IpAddr) -> bool,
    seized: &dyn Fn(&SaKey) -> Option<Seized>,
) -> Result<Usable<'k>, String> {
    if !settings.takes_sa(sa) {
        return Err("the configuration does not take it".into());
    }
    let (direction, mode) = possible(sa, is_local)?;
    let first_use = match seized(&sa.key) {
        Some(Seized::Ours { first_use }) => first_use,
        Some(Seized::Not(why)) => return Err(why),
        None => return Err("it is new".into()),
    };
    Ok(Usable {
        sa,
        direction,
        tunnel: TunnelKey::of_sa(sa, direction, mode),
        first_use,
    })
}

/// Direction and mode of an SA that we can do, or why we cannot.
pub(super) fn possible(
    sa: &KernelSa,
    is_local: &dyn Fn(IpAddr) -> bool,
) -> Result<(Direction, Mode), String> {
    let direction =
        direction(sa, is_local).ok_or("not exactly one of its addresses is the gateway's")?;
    let mode = sa.mode.ok_or("its mode is neither tunnel nor transport")?;
    if sa.odd_encap {
        return Err("its encapsulation is not that of RFC 3948".into());
    }
    if sa.window > MAX_WINDOW {
        return Err(format!("its replay window is larger than {MAX_WINDOW}"));
    }
    match &sa.crypto {
        Ok(_) => Ok((direction, mode)),
        Err(why) => Err(why.clone()),
    }
}

fn empty_tunnel(key: &TunnelKey) -> Tunnel {
    let mut tunnel = Tunnel::new("", key.local, key.remote);
    tunnel.if_id = IfId(key.if_id);
    if key.transport {
        tunnel.mode = Mode::Transport;
    }
    tunnel
}

fn name_tunnels(tunnels: &mut BTreeMap<TunnelKey, Tunnel>) {
    let mut names: HashMap<String, usize> = HashMap::new();
    for key in tunnels.keys() {
        *names.entry(key.name(true)).or_default() += 1;
    }
    for (key, tunnel) in tunnels {
        let short = key.name(true);
        let alone = names.get(&short) == Some(&1);
        tunnel.name = if alone { short } else { key.name(false) };
    }
}

/// Adds an SA and returns its name.
fn add_sa(
    config: &mut Config,
    tunnel: &Tunnel,
    u: &Usable<'_>,
    settings: &Settings,
    mut selectors: Vec<Selector>,
) -> String {
    let sa = u.sa;
    let (Ok((suite, keys)), Some(spi)) = (&sa.crypto, Spi::new(sa.key.spi)) else {
        return String::new();
    };
    let out = u.direction == Direction::Out;
    if let Some(own) = &sa.selector {
        // From our side, as a tunnel's settings are written.
        let own = if out { own.clone() } else { own.reversed() };
        selectors = vec![own];
    }
    let window = match sa.window {
        0 => 0,
        n => n.next_power_of_two().clamp(LEAST_WINDOW, MAX_WINDOW),
    };
    let s = TunnelSettings {
        esn: sa.esn,
        window,
        soft: sa.soft,
        hard: sa.hard,
        encap: sa.encap.map(|e| if out { e } else { e.reversed() }),
        dscp: if sa.copy_dscp {
            Dscp::Copy
        } else {
            Dscp::Fixed(0)
        },
        df: if sa.set_df { Df::Copy } else { Df::Clear },
        ecn: sa.ecn,
        ttl: DEFAULT_TTL,
        pmtu: None,
        tfc: Tfc::of(u16::try_from(sa.tfc).unwrap_or(u16::MAX), 0),
        mss_clamp: false,
        offload: settings.offload,
        engine: settings
            .engine
            .clone()
            .filter(|_| settings.offload != OffloadMode::Software),
        selectors,
    };
    let side = if out { "out" } else { "in" };
    let name = format!("{}-{side}-{:08x}", tunnel.name, sa.key.spi);
    let identity = SaIdentity {
        name: name.clone(),
        direction: u.direction,
        spi,
        suite: *suite,
        keys: keys.clone(),
        first_use: u.first_use,
    };
    let mut spec = tunnel.sa(identity, &s);
    spec.vrf = settings.vrf;
    config.sas.push(spec);
    name
}

fn add_policies(
    t: &mut Translated,
    policies: &[(u64, &KernelPolicy)],
    protecting: &[(&KernelPolicy, TunnelKey)],
    tunnels: &BTreeMap<TunnelKey, Tunnel>,
    settings: &Settings,
) {
    let tunnel_of: HashMap<&PolicyKey, &TunnelKey> =
        protecting.iter().map(|(p, key)| (&p.key, key)).collect();
    for (place, p) in policies {
        let action = match &p.action {
            KernelAction::Protect(_) => match tunnel_of.get(&p.key).and_then(|k| tunnels.get(k)) {
                // A route leads into the tunnel; the SA's selectors are these.
                Some(tunnel) if tunnel.if_id.0 != 0 => continue,
                Some(tunnel) => Action::Protect {
                    tunnel: tunnel.name.clone(),
                },
                None => continue,
            },
            _ if !settings.takes_policy(&p.key, None) => continue,
            KernelAction::Allow => Action::Bypass,
            KernelAction::Block => Action::Discard,
            KernelAction::Other(why) => {
                t.left.push((policy_label(p), (*why).into()));
                continue;
            }
        };
        t.part.places.push(*place);
        t.part.config.policies.push(Policy {
            name: policy_label(p),
            direction: match p.key.way {
                Way::Out => Direction::Out,
                Way::In | Way::Forward => Direction::In,
            },
            priority: p.priority,
            selectors: vec![p.key.selector.clone()],
            action,
            vrf: settings.vrf,
            if_id: p.key.if_id,
        });
    }
}

/// An SA of the kernel's, for people.
pub(super) fn sa_label(key: &SaKey) -> String {
    let mut s = format!("SA 0x{:08x} to {}", key.spi, key.dst);
    if key.mark != (0, 0) {
        let _ = write!(s, " mark 0x{:x}/0x{:x}", key.mark.0, key.mark.1);
    }
    s
}

/// A policy of the kernel's, for people and as our name of it: no two have the same.
fn policy_label(p: &KernelPolicy) -> String {
    let way = match p.key.way {
        Way::In => "in",
        Way::Out => "out",
        Way::Forward => "fwd",
    };
    let s = &p.key.selector;
    let mut text = format!("{MIRROR_PREFIX}{way} {}>{}", range(s.src), range(s.dst));
    if let Some(proto) = s.proto {
        let _ = write!(text, " proto {proto}");
    }
    match &s.ports {
        Ports::Any => {}
        Ports::Opaque => text.push_str(" opaque"),
        Ports::Range { src, dst } => {
            let _ = write!(
                text,
                " ports {}-{}>{}-{}",
                src.start(),
                src.end(),
                dst.start(),
                dst.end()
            );
        }
        Ports::Icmp { kind, code } => {
            let one = |r: &RangeInclusive<u8>| match r.start() == r.end() {
                true => r.start().to_string(),
                false => "*".into(),
            };
            let _ = write!(text, " icmp {}/{}", one(kind), one(code));
        }
    }
    if p.key.interface != 0 {
        let _ = write!(text, " dev{}", p.key.interface);
    }
    if p.key.mark != (0, 0) {
        let _ = write!(text, " mark 0x{:x}/0x{:x}", p.key.mark.0, p.key.mark.1);
    }
    if p.key.if_id.0 != 0 {
        let _ = write!(text, " if{}", p.key.if_id.0);
    }
    text
}

/// Ranges of the kernel's are prefixes.
fn range(r: AddrRange) -> String {
    if r.first() == r.last() {
        return r.first().to_string();
    }
    let bits = match (r.first(), r.last()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
        _ => 0,
    };
    format!("{}/{bits}", r.first())
}
