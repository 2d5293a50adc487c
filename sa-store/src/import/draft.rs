//! SAs and policies as importers find them, and how they become tunnels.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::file::check::Assembler;
use crate::file::decode::{
    KeySource, Parent, RawAction, RawFile, RawPolicy, RawSa, RawSettings, RawTunnel, is_unicast,
};
use crate::file::fault::{Fault, Location, Problems};
use crate::file::fields::At;
use crate::file::{Config, default_sa_name};
use crate::policy::Selector;
use crate::sa::{Df, Direction, Dscp, Limits, Mode, SaKeys, Spi, UdpEncap};
use crate::suite::Suite;

use super::{Options, Remark};

/// What links an SA to policies besides its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::import) enum Link {
    /// `reqid` of Linux and setkey; 0 is none.
    Reqid(u32),
    /// Number that the text itself gives to the tunnel.
    Tunnel(u32),
}

#[derive(Clone, Debug)]
pub(in crate::import) struct SaDraft {
    pub(in crate::import) at: Location,
    pub(in crate::import) spi: At<u32>,
    pub(in crate::import) src: At<IpAddr>,
    pub(in crate::import) dst: At<IpAddr>,
    pub(in crate::import) direction: Option<Direction>,
    pub(in crate::import) mode: Mode,
    pub(in crate::import) suite: Suite,
    pub(in crate::import) keys: SaKeys,
    pub(in crate::import) key_at: Location,
    pub(in crate::import) link: Link,
    pub(in crate::import) window: Option<At<u32>>,
    pub(in crate::import) esn: bool,
    pub(in crate::import) soft: Limits,
    pub(in crate::import) hard: Limits,
    /// In the SA's direction.
    pub(in crate::import) encap: Option<UdpEncap>,
    pub(in crate::import) ecn: bool,
    pub(in crate::import) df: Df,
    pub(in crate::import) dscp: Dscp,
    pub(in crate::import) if_id: u32,
    /// In the SA's direction.
    pub(in crate::import) selectors: Vec<Selector>,
    /// Packets already sent with the key.
    pub(in crate::import) sent: Option<At<u64>>,
}

#[derive(Clone, Debug)]
pub(in crate::import) enum ActionDraft {
    Bypass,
    Discard,
    /// Outer addresses in the direction of travel, where the text gives them.
    Protect {
        ends: Option<(IpAddr, IpAddr)>,
        mode: Mode,
        link: Link,
    },
}

#[derive(Clone, Debug)]
pub(in crate::import) struct PolicyDraft {
    pub(in crate::import) at: Location,
    pub(in crate::import) direction: Direction,
    /// A `fwd` policy of Linux: inbound for us, and often the same as an `in` one.
    pub(in crate::import) forward: bool,
    pub(in crate::import) priority: u32,
    pub(in crate::import) selector: Selector,
    pub(in crate::import) action: ActionDraft,
    pub(in crate::import) if_id: u32,
}

#[derive(Debug, Default)]
pub(in crate::import) struct Draft {
    pub(in crate::import) sas: Vec<SaDraft>,
    pub(in crate::import) policies: Vec<PolicyDraft>,
    pub(in crate::import) remarks: Vec<Remark>,
}

/// What SAs must have in common to belong to one tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TunnelKey {
    local: IpAddr,
    remote: IpAddr,
    mode: Mode,
    link: Link,
    if_id: u32,
}

#[derive(Default)]
struct Tunnels {
    keys: Vec<(TunnelKey, Location)>,
    index: HashMap<TunnelKey, usize>,
}

impl Tunnels {
    fn of(&mut self, key: TunnelKey, at: &Location) -> usize {
        let next = self.keys.len();
        let index = *self.index.entry(key.clone()).or_insert(next);
        if index == next {
            self.keys.push((key, at.clone()));
        }
        index
    }

    /// The tunnel of a policy: by its outer addresses, or by its link where there is but one.
    fn find(
        &self,
        ends: Option<(IpAddr, IpAddr)>,
        mode: Mode,
        link: &Link,
        if_id: u32,
    ) -> Option<usize> {
        let fits = |k: &TunnelKey| {
            k.mode == mode
                && k.link == *link
                && (if_id == 0 || k.if_id == if_id)
                && ends.is_none_or(|(l, r)| (k.local, k.remote) == (l, r))
        };
        let mut all = (0..).zip(&self.keys).filter(|(_, (k, _))| fits(k));
        let first = all.next()?;
        all.next().is_none().then_some(first.0)
    }

    /// A name for each, unique and short where it can be.
    fn names(&self) -> Vec<String> {
        let mut used: HashMap<String, usize> = HashMap::new();
        let mut out = Vec::with_capacity(self.keys.len());
        for (k, _) in &self.keys {
            let base = match k.link {
                Link::Reqid(0) => format!("peer-{}", k.remote),
                Link::Reqid(n) => format!("reqid-{n}"),
                Link::Tunnel(n) => format!("tunnel-{n}"),
            };
            let n = used.entry(base.clone()).or_insert(0);
            *n += 1;
            out.push(if *n == 1 { base } else { format!("{base}-{n}") });
        }
        out
    }
}

impl Draft {
    /// Joins SAs into tunnels, names everything and checks it all as an SA file is checked.
    pub(in crate::import) fn finish(self, options: &Options, problems: &mut Problems) -> Config {
        let local = self.local_addresses(options);
        let mut tunnels = Tunnels::default();
        let mut raw = RawFile::default();
        for sa in self.sas {
            let Some(direction) = sa.direction.or_else(|| direction_of(&sa, &local)) else {
                problems.push(
                    &sa.at,
                    Fault::Unsupported(format!(
                        "nothing tells whether we send to {} or receive there: add the policies or \"dir in|out\", or name our own address",
                        sa.dst.v
                    )),
                );
                continue;
            };
            if let Some(s) = &sa.sent
                && direction == Direction::Out
                && s.v > 0
            {
                problems.push(
                    &s.at,
                    Fault::Unsupported(format!(
                        "{} packets were sent with this key already; sending on from another counter would repeat nonces: give the SA a new key",
                        s.v
                    )),
                );
            }
            raw.sas.push(raw_sa(sa, direction, options, &mut tunnels));
        }
        let mut policies = Vec::new();
        for p in self.policies {
            if let Some(r) = raw_policy(p, &mut tunnels, problems) {
                policies.push(r);
            }
        }
        let names = tunnels.names();
        for ((key, at), name) in tunnels.keys.iter().zip(&names) {
            raw.tunnels.push(raw_tunnel(key, at, name));
        }
        for sa in &mut raw.sas {
            if let (Some(Parent::Nested(t)), Some(spi), Some(d)) =
                (&sa.parent, &sa.spi, sa.direction)
            {
                let tunnel = names.get(*t).map_or("", String::as_str);
                sa.name = Some(at(default_sa_name(tunnel, d, spi.v), &sa.at));
            }
        }
        name_policies(policies, &names, &mut raw);
        let mut assembler = Assembler::default();
        assembler.add(raw, problems);
        assembler.finish(problems)
    }

    /// Addresses that are ours: those that were given, and those that policies or SAs show to be.
    fn local_addresses(&self, options: &Options) -> Vec<IpAddr> {
        let mut local = options.local.clone();
        for sa in &self.sas {
            match sa.direction {
                Some(Direction::Out) => local.push(sa.src.v),
                Some(Direction::In) => local.push(sa.dst.v),
                None => {}
            }
        }
        for p in &self.policies {
            if let ActionDraft::Protect {
                ends: Some((src, dst)),
                ..
            } = &p.action
            {
                local.push(match p.direction {
                    Direction::Out => *src,
                    Direction::In => *dst,
                });
            }
        }
        local
    }
}

fn direction_of(sa: &SaDraft, local: &[IpAddr]) -> Option<Direction> {
    match (local.contains(&sa.src.v), local.contains(&sa.dst.v)) {
        (true, false) => Some(Direction::Out),
        (false, true) => Some(Direction::In),
        _ => None,
    }
}

fn at<T>(v: T, at: &Location) -> At<T> {
    At { v, at: at.clone() }
}

fn raw_sa(sa: SaDraft, direction: Direction, options: &Options, tunnels: &mut Tunnels) -> RawSa {
    let out = direction == Direction::Out;
    let (local, remote) = if out {
        (sa.src.v, sa.dst.v)
    } else {
        (sa.dst.v, sa.src.v)
    };
    let key = TunnelKey {
        local,
        remote,
        mode: sa.mode,
        link: sa.link,
        if_id: sa.if_id,
    };
    let tunnel = tunnels.of(key, &sa.at);
    let turn = |s: Selector| if out { s } else { s.reversed() };
    let settings = RawSettings {
        suite: Some(at(sa.suite, &sa.at)),
        esn: Some(at(sa.esn, &sa.at)),
        // An outbound SA has no window; other programs write 0 there.
        window: sa.window.filter(|_| !out),
        soft: Some(at(sa.soft, &sa.at)),
        hard: Some(at(sa.hard, &sa.at)),
        encap: sa
            .encap
            .map(|e| at(Some(if out { e } else { e.reversed() }), &sa.at)),
        ecn: Some(at(sa.ecn, &sa.at)),
        df: Some(at(sa.df, &sa.at)),
        dscp: Some(at(sa.dscp, &sa.at)),
        selectors: Some(at(sa.selectors.into_iter().map(turn).collect(), &sa.at)),
        allow_weak: Some(at(options.allow_weak, &sa.at)),
        ..RawSettings::default()
    };
    let given = |k: zeroize::Zeroizing<Vec<u8>>| {
        (!k.is_empty()).then(|| at(KeySource::Inline(k), &sa.key_at))
    };
    let spi = Spi::new(sa.spi.v);
    RawSa {
        at: sa.at.clone(),
        parent: Some(Parent::Nested(tunnel)),
        name: None,
        direction: Some(direction),
        spi: spi.map(|s| at(s, &sa.spi.at)),
        key: given(sa.keys.enc),
        auth_key: given(sa.keys.auth),
        key_given: false,
        auth_key_given: false,
        suite_given: true,
        first_use: options.first_use,
        settings,
    }
}

fn raw_tunnel(key: &TunnelKey, place: &Location, name: &str) -> RawTunnel {
    RawTunnel {
        at: place.clone(),
        name: Some(at(name.to_owned(), place)),
        local: Some(at(key.local, place)),
        remote: Some(at(key.remote, place)),
        mode: Some(key.mode),
        vrf: None,
        if_id: Some(key.if_id),
        settings: RawSettings::default(),
    }
}

/// A policy whose tunnel is an index until the tunnels have names.
struct Unnamed {
    draft: PolicyDraft,
    tunnel: Option<usize>,
}

fn raw_policy(p: PolicyDraft, tunnels: &mut Tunnels, problems: &mut Problems) -> Option<Unnamed> {
    let ActionDraft::Protect { ends, mode, link } = &p.action else {
        return Some(Unnamed {
            draft: p,
            tunnel: None,
        });
    };
    let sided = ends.map(|(src, dst)| match p.direction {
        Direction::Out => (src, dst),
        Direction::In => (dst, src),
    });
    let mut found = tunnels.find(sided, *mode, link, p.if_id);
    if found.is_none()
        && let Some((local, remote)) = sided
    {
        // A tunnel whose SAs are still to come.
        let key = TunnelKey {
            local,
            remote,
            mode: *mode,
            link: link.clone(),
            if_id: p.if_id,
        };
        found = Some(tunnels.of(key, &p.at));
    }
    if found.is_none() {
        problems.push(
            &p.at,
            Fault::Unsupported(
                "no SA, or more than one tunnel, fits this policy: import the SAs with it".into(),
            ),
        );
    }
    Some(Unnamed {
        tunnel: Some(found?),
        draft: p,
    })
}

fn name_policies(policies: Vec<Unnamed>, tunnels: &[String], raw: &mut RawFile) {
    let mut used: HashMap<String, usize> = HashMap::new();
    let essence = |p: &Unnamed| {
        let d = &p.draft;
        let bypass = matches!(d.action, ActionDraft::Bypass);
        (p.tunnel, bypass, d.selector.clone(), d.priority, d.if_id)
    };
    let inbound: HashSet<_> = policies
        .iter()
        .filter(|p| p.draft.direction == Direction::In && !p.draft.forward)
        .map(essence)
        .collect();
    for p in &policies {
        // Linux checks traffic to itself with `in` and traffic it forwards with `fwd`; for a gateway both
        // are the check after decryption.
        if p.draft.forward && inbound.contains(&essence(p)) {
            continue;
        }
        let (action, subject) = match p.draft.action {
            ActionDraft::Bypass => (RawAction::Bypass, "bypass"),
            ActionDraft::Discard => (RawAction::Discard, "discard"),
            ActionDraft::Protect { .. } => {
                let name = p.tunnel.and_then(|t| tunnels.get(t));
                (RawAction::Protect, name.map_or("", String::as_str))
            }
        };
        let direction = match p.draft.direction {
            Direction::In => "in",
            Direction::Out => "out",
        };
        let base = format!("{subject}-{direction}");
        let n = used.entry(base.clone()).or_insert(0);
        *n += 1;
        let name = if *n == 1 { base } else { format!("{base}-{n}") };
        let place = &p.draft.at;
        raw.policies.push(RawPolicy {
            at: place.clone(),
            name: Some(at(name, place)),
            direction: Some(p.draft.direction),
            priority: Some(p.draft.priority),
            action: Some(at(action, place)),
            tunnel: p
                .tunnel
                .and_then(|t| tunnels.get(t))
                .map(|t| at(t.clone(), place)),
            selectors: vec![p.draft.selector.clone()],
            vrf: None,
            if_id: Some(p.draft.if_id),
        });
    }
}

/// Reports what an SA's numbers and addresses already show to be wrong.
pub(in crate::import) fn check_sa(sa: &SaDraft, problems: &mut Problems) {
    if Spi::new(sa.spi.v).is_none() {
        problems.push(&sa.spi.at, Fault::ReservedSpi(sa.spi.v));
    }
    for a in [&sa.src, &sa.dst] {
        if !is_unicast(a.v) {
            problems.push(&a.at, Fault::NotUnicast(a.v));
        }
    }
    if let Some(w) = &sa.window
        && w.v != 0
        && !(w.v >= 32 && w.v.is_power_of_two())
    {
        let above = w.v.min(1 << 30).next_power_of_two().max(32);
        problems.push(
            &w.at,
            Fault::WindowNotPowerOfTwo {
                got: w.v,
                below: (above / 2).max(32),
                above,
            },
        );
    }
}
