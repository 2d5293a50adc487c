//! What would happen to a packet, and why: the look-ups of the data path, one by one, in words.

use std::net::IpAddr;

use sa_store::drops::DropReason;
use sa_store::fib::Hop;
use sa_store::flow::{FlowKey, L4};
use sa_store::policy::Policy;
use sa_store::runtime::{SaEntry, TunnelIdx, mapped};
use sa_store::sa::Vrf;
use sa_store::snapshot::Snapshot;
use sa_store::spd::{Action, InboundVerdict, PolicyIdx, Spd};
use serde::{Deserialize, Serialize};

use crate::rekey::terms::View;

/// Where the packet arrives, or what took it from ESP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// In the clear on an inside port.
    #[default]
    Inside,
    /// On an outside port: ESP when `spi` is given, else clear.
    Outside,
}

/// A packet, as far as policy looks at it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// Side on which it arrives.
    #[serde(default)]
    pub arrival: Arrival,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol.
    #[serde(default)]
    pub proto: u8,
    /// Source and destination port.
    #[serde(default)]
    pub ports: Option<(u16, u16)>,
    /// ICMP type and code.
    #[serde(default)]
    pub icmp: Option<(u8, u8)>,
    /// A fragment that shows no ports.
    #[serde(default)]
    pub fragment: bool,
    /// Routing table.
    #[serde(default)]
    pub vrf: u16,
    /// SPI, when the packet is ESP.
    #[serde(default)]
    pub spi: Option<u32>,
}

/// What would happen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// `protect`, `bypass`, `decrypt`, `drop`.
    pub verdict: String,
    /// Drop reason, as in the metrics.
    pub reason: Option<String>,
    /// Policy that decides; absent when none matched.
    pub policy: Option<String>,
    /// Tunnel.
    pub tunnel: Option<String>,
    /// SA.
    pub sa: Option<String>,
    /// SPI of the SA.
    pub spi: Option<String>,
    /// Worker that owns the SA.
    pub worker: Option<u16>,
    /// Steps, in the order of the data path.
    pub why: Vec<String>,
}

/// The state that the packet meets.
pub struct State<'s> {
    /// Snapshot.
    pub snapshot: &'s Snapshot,
    /// Name of a tunnel.
    pub tunnel_name: &'s dyn Fn(TunnelIdx) -> String,
    /// Name of a port.
    pub port_name: &'s dyn Fn(u16) -> String,
    /// The route that decides about a destination, and where it comes from.
    pub route: &'s dyn Fn(Vrf, IpAddr) -> Option<String>,
    /// A tunnel's rekey.
    pub rekey_state: &'s dyn Fn(TunnelIdx) -> View,
    /// Gateway clock, nanoseconds.
    pub now: u64,
}

impl State<'_> {
    /// Explains.
    pub fn explain(&self, q: &Query) -> Explanation {
        let mut e = Explanation::default();
        match (q.arrival, q.spi) {
            (Arrival::Outside, Some(spi)) => self.esp(q, spi, &mut e),
            (Arrival::Outside, None) => self.clear_from_outside(q, &mut e),
            (Arrival::Inside, _) => self.clear_judge_from_inside(q, &mut e),
        }
        e
    }

    fn clear_judge_from_inside(&self, q: &Query, e: &mut Explanation) {
        let Some(key) = key_of(q) else {
            return families(e);
        };
        if let Hop::Tunnel(tunnel) = self.snapshot.fib.lookup(Vrf(q.vrf), mapped(q.dst), 0) {
            let name = (self.tunnel_name)(tunnel);
            e.why.push(format!(
                "the route to {} leads into tunnel \"{name}\": it comes before the policies",
                q.dst
            ));
            return self.protect(tunnel, &key, e);
        }
        let verdict = self.snapshot.spd_out.lookup(&key);
        self.name_policy(&self.snapshot.spd_out, verdict.policy, "outbound", e);
        match verdict.action {
            Action::Protect { tunnel } => self.protect(tunnel, &key, e),
            Action::Bypass => {
                e.why.push("the policy lets it pass in the clear".into());
                self.route(q.dst, Vrf(q.vrf), e, "bypass");
            }
            Action::Discard => drop_for(DropReason::PolicyDiscard, e),
            Action::FragmentPolicy => {
                e.why.push(
                    "a fragment without ports met policies with ports (RFC 4301 section 7)".into(),
                );
                drop_for(DropReason::FragmentPolicy, e);
            }
            Action::Local => drop_for(DropReason::NotForUs, e),
        }
    }

    fn protect(&self, tunnel: TunnelIdx, key: &FlowKey, e: &mut Explanation) {
        let name = (self.tunnel_name)(tunnel);
        e.tunnel = Some(name.clone());
        let Some(sa) = self.snapshot.outbound(tunnel) else {
            e.why.push(format!("tunnel \"{name}\" has no outbound SA"));
            return drop_for(DropReason::NoOutboundSa, e);
        };
        self.name_sa(sa, e);
        if let Some(reason) = self.spent(sa) {
            return drop_for(reason, e);
        }
        if let Some(selectors) = &sa.fixed.selectors
            && !selectors.matches(key)
        {
            e.why.push(
                "note: the SA's selectors do not cover the packet; the peer will drop it".into(),
            );
        }
        self.route(sa.spec.dst, sa.fixed.vrf, e, "protect");
    }

    fn clear_from_outside(&self, q: &Query, e: &mut Explanation) {
        let Some(key) = key_of(q) else {
            return families(e);
        };
        let verdict = self.snapshot.spd_in.lookup(&key);
        self.name_policy(&self.snapshot.spd_in, verdict.policy, "inbound", e);
        match verdict.inbound(None) {
            InboundVerdict::Accept { .. } => {
                e.why
                    .push("the policy lets it in without protection".into());
                self.route(q.dst, Vrf(q.vrf), e, "bypass");
            }
            InboundVerdict::Drop { reason, .. } => {
                if reason == DropReason::PolicyMustProtect {
                    e.why.push("it arrived in the clear, but the policy says that it must come through a tunnel".into());
                }
                drop_for(reason, e);
            }
        }
    }

    fn esp(&self, q: &Query, spi: u32, e: &mut Explanation) {
        let Some(sa) = self.snapshot.sad.find(spi, mapped(q.dst), Vrf(q.vrf)) else {
            e.why.push(format!(
                "no inbound SA has SPI 0x{spi:08x} at {} in VRF {}",
                q.dst, q.vrf
            ));
            if let Some(other) = self.snapshot.sad.hint(spi) {
                e.why.push(format!(
                    "note: SA \"{}\" has this SPI at {} in VRF {}",
                    other.spec.name, other.spec.dst, other.fixed.vrf.0
                ));
            }
            return drop_for(DropReason::SaNotFound, e);
        };
        e.tunnel = Some(sa.spec.tunnel.clone());
        self.name_sa(sa, e);
        if let Some(reason) = self.spent(sa) {
            return drop_for(reason, e);
        }
        let top = sa.live.window.top();
        e.why.push(format!("its sequence number must be above the window of {} packets that ends at {top}, or new inside it", sa.live.window.size()));
        e.why.push("if its ICV is right, the inner packet must match the SA's selectors or the inbound policies of this tunnel".into());
        e.verdict = "decrypt".into();
    }

    fn route(&self, dst: IpAddr, vrf: Vrf, e: &mut Explanation, verdict: &str) {
        if let Some(route) = (self.route)(vrf, dst) {
            e.why.push(format!("the route to {dst} is {route}"));
        }
        match self.snapshot.fib.lookup(vrf, mapped(dst), 0) {
            Hop::Neighbour(hop) => {
                let port = self
                    .snapshot
                    .fib
                    .port(hop)
                    .map(|p| (self.port_name)(p))
                    .unwrap_or_default();
                if self.snapshot.fib.mac(hop).is_none() {
                    e.why.push(format!(
                        "{dst} is reached by port \"{port}\", but its neighbour has no link address"
                    ));
                    return drop_for(DropReason::NoNeighbour, e);
                }
                e.why.push(format!("{dst} is reached by port \"{port}\""));
                e.verdict = verdict.into();
            }
            Hop::Tunnel(t) => {
                e.why.push(format!(
                    "the route to {dst} leads into tunnel \"{}\"",
                    (self.tunnel_name)(t)
                ));
                if verdict == "protect" {
                    e.why.push(
                        "the outer packets of a tunnel must not be routed into a tunnel".into(),
                    );
                    return drop_for(DropReason::NoRoute, e);
                }
                e.verdict = "protect".into();
            }
            Hop::Local => {
                e.why.push(format!("{dst} is the gateway itself"));
                drop_for(DropReason::NotForUs, e);
            }
            Hop::Unresolved { port } => {
                e.why.push(format!(
                    "{dst} is on the network of port \"{}\", but there is no neighbour entry",
                    (self.port_name)(port)
                ));
                drop_for(DropReason::NoNeighbour, e);
            }
            Hop::None => {
                e.why.push(format!("no route to {dst} in VRF {}", vrf.0));
                drop_for(DropReason::NoRoute, e);
            }
        }
    }

    fn name_policy(&self, spd: &Spd, idx: PolicyIdx, which: &str, e: &mut Explanation) {
        let found: Option<&Policy> = spd.policy(idx);
        e.policy = found.map(|p| p.name.clone());
        e.why.push(match found {
            Some(p) => format!(
                "{which} policy \"{}\" (priority {}) is the first that matches",
                p.name, p.priority
            ),
            None => format!("no {which} policy matches: discarded by default"),
        });
    }

    fn name_sa(&self, sa: &SaEntry, e: &mut Explanation) {
        e.sa = Some(sa.spec.name.clone());
        e.spi = Some(sa.spec.spi.to_string());
        e.worker = Some(sa.fixed.owner);
        e.why.push(format!(
            "SA \"{}\" (SPI {}, {}, {} to {}), owned by worker {}",
            sa.spec.name, sa.spec.spi, sa.spec.suite, sa.spec.src, sa.spec.dst, sa.fixed.owner
        ));
        let view = (self.rekey_state)(sa.fixed.tunnel);
        if view.state != "steady" {
            let why = view.reason.map(|r| format!(" ({})", r.name()));
            e.why.push(format!(
                "the rekey of its tunnel is in state \"{}\"{}",
                view.state,
                why.unwrap_or_default()
            ));
        }
        e.why.extend(limits(sa, self.now));
    }

    /// Why the SA would carry nothing now.
    fn spent(&self, sa: &SaEntry) -> Option<DropReason> {
        let c = &sa.live.counters;
        let hard = &sa.spec.hard;
        let out = sa.fixed.out.is_some();
        let age = self.now.saturating_sub(sa.installed_at) / 1_000_000_000;
        if sa.disabled() {
            Some(DropReason::SaDisabled)
        } else if hard.packets.is_some_and(|n| c.packets.value() >= n) {
            Some(DropReason::HardPackets)
        } else if hard.bytes.is_some_and(|n| c.bytes.value() >= n) {
            Some(DropReason::HardBytes)
        } else if hard.seconds.is_some_and(|n| age >= n) {
            Some(DropReason::HardTime)
        } else if out && sa.next_seq() >= sa.lease_end() {
            let last = if sa.spec.esn {
                u64::MAX - 1
            } else {
                u64::from(u32::MAX)
            };
            Some(if sa.next_seq() > last {
                DropReason::SequenceExhausted
            } else {
                DropReason::LeaseExhausted
            })
        } else {
            None
        }
    }
}

/// What is left of an SA, in words; nothing for one without limits.
fn limits(sa: &SaEntry, now: u64) -> Option<String> {
    let g = sa.gauges(now);
    let mut parts = Vec::new();
    for (what, gauge, unit) in [
        ("packets", g.packets, 1),
        ("bytes", g.bytes, 1),
        ("seconds", g.time, 1_000_000_000),
    ] {
        for (limit, name) in [(gauge.soft, "soft"), (gauge.hard, "hard")] {
            if limit != u64::MAX {
                let left = limit.saturating_sub(gauge.used) / unit;
                parts.push(format!("{left} {what} to its {name} limit"));
            }
        }
    }
    (!parts.is_empty()).then(|| format!("it has {}", parts.join(", ")))
}

fn drop_for(reason: DropReason, e: &mut Explanation) {
    e.verdict = "drop".into();
    e.reason = Some(reason.name().into());
}

fn families(e: &mut Explanation) {
    e.why
        .push("source and destination are of different address families".into());
    drop_for(DropReason::IpMalformed, e);
}

fn key_of(q: &Query) -> Option<FlowKey> {
    let l4 = match (q.fragment, q.ports, q.icmp) {
        (true, ..) => L4::Fragment,
        (false, Some((src, dst)), _) => L4::Ports { src, dst },
        (false, None, Some((kind, code))) => L4::Icmp { kind, code },
        (false, None, None) => L4::None,
    };
    FlowKey::new(q.src, q.dst, q.proto, l4).map(|k| k.with_vrf(Vrf(q.vrf)))
}
