//! What answers consist of.

use sa_store::drops::{Consumed, DropReason};
use sa_store::ledger::Punt;
use sa_store::policy::{Action, Policy, Ports, Selector};
use sa_store::runtime::{Gauge, Gauges, SaEntry, TunnelIdx, event};
use sa_store::sa::{Direction, Mode};
use sa_store::store::Totals;
use serde::{Deserialize, Serialize};

use crate::core::Control;
use crate::plane::PortReport;
use crate::vici::Label;

/// An SA, without its keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaInfo {
    /// Name.
    pub name: String,
    /// Tunnel.
    pub tunnel: String,
    /// `in` or `out`.
    pub direction: String,
    /// SPI.
    pub spi: String,
    /// Outer source.
    pub src: String,
    /// Outer destination.
    pub dst: String,
    /// `tunnel` or `transport`.
    pub mode: String,
    /// Suite.
    pub suite: String,
    /// Crypto provider.
    pub provider: String,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Replay window, packets.
    pub window: u32,
    /// UDP encapsulation, source and destination port.
    pub encap: Option<(u16, u16)>,
    /// Routing table of the outer packets.
    pub vrf: u16,
    /// Interface id.
    pub if_id: u32,
    /// Worker that owns it.
    pub worker: u16,
    /// `sending`, `receiving`, `standby`, `disabled`.
    pub state: String,
    /// Outbound: next number. Inbound: highest number authenticated.
    pub sequence: u64,
    /// First number that is not on disk yet.
    pub lease_end: u64,
    /// Seconds since it was installed.
    pub age: u64,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Wrong ICV.
    pub icv_failed: u64,
    /// Replays.
    pub replays: u64,
    /// Malformed.
    pub malformed: u64,
    /// Outside the selectors.
    pub selector: u64,
    /// Refused by limits.
    pub limit: u64,
    /// Engine errors.
    pub engine: u64,
    /// Numbers that never arrived.
    pub lost: u64,
    /// Sticky events.
    pub events: Vec<String>,
    /// State of its tunnel's rekey: `steady`, `expired`, `overdue`, `workers`, `peer`, `switched`, `overlap`.
    #[serde(default)]
    pub rekey: String,
    /// What is left until a successor is wanted.
    #[serde(default)]
    pub until_soft: Left,
    /// What is left until the SA ends.
    #[serde(default)]
    pub until_hard: Left,
    /// Its names in the IKE daemon's configuration, where they are known.
    #[serde(flatten)]
    pub names: IkeNames,
}

/// Names in the IKE daemon's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeNames {
    /// Connection.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ike: Option<String>,
    /// Child SA.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub child: Option<String>,
}

impl From<Option<&Label>> for IkeNames {
    fn from(label: Option<&Label>) -> Self {
        Self {
            ike: label.map(|l| l.ike.clone()),
            child: label.map(|l| l.child.clone()),
        }
    }
}

impl std::fmt::Display for IkeNames {
    /// "connection/child", or nothing.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.ike, &self.child) {
            (Some(ike), Some(child)) => write!(f, "{ike}/{child}"),
            _ => Ok(()),
        }
    }
}

/// What is left until a limit; absent where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Packets, by the limit or the sequence space, whichever ends first.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub packets: Option<u64>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bytes: Option<u64>,
    /// Seconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub seconds: Option<u64>,
}

impl Left {
    fn of(g: &Gauges, limit: fn(&Gauge) -> u64) -> Self {
        let left = |g: &Gauge| (limit(g) != u64::MAX).then(|| limit(g).saturating_sub(g.used));
        // Nobody lives to see the end of 64-bit numbers.
        let numbers = left(&g.sequence).filter(|n| *n <= u64::from(u32::MAX));
        Self {
            packets: left(&g.packets).into_iter().chain(numbers).min(),
            bytes: left(&g.bytes),
            seconds: left(&g.time).map(|ns| ns / 1_000_000_000),
        }
    }
}

impl SaInfo {
    /// Of a running SA. `sending`: it is the one on which its tunnel sends.
    pub(super) fn of(e: &SaEntry, sending: bool, now: u64, rekey: &str) -> Self {
        let gauges = e.gauges(now);
        let t = Totals::of(e);
        let s = &e.spec;
        let out = s.direction == Direction::Out;
        let state = match (e.disabled(), out, sending) {
            (true, ..) => "disabled",
            (false, false, _) => "receiving",
            (false, true, true) => "sending",
            (false, true, false) => "standby",
        };
        Self {
            name: s.name.clone(),
            tunnel: s.tunnel.clone(),
            direction: direction_name(s.direction).into(),
            spi: s.spi.to_string(),
            src: s.src.to_string(),
            dst: s.dst.to_string(),
            mode: if s.mode == Mode::Tunnel {
                "tunnel"
            } else {
                "transport"
            }
            .into(),
            suite: s.suite.to_string(),
            provider: e.provider.into(),
            esn: s.esn,
            window: s.replay_window,
            encap: s.encap.map(|u| (u.sport, u.dport)),
            vrf: s.vrf.0,
            if_id: s.if_id.0,
            worker: e.fixed.owner,
            state: state.into(),
            sequence: if out {
                e.next_seq()
            } else {
                e.live.window.top()
            },
            lease_end: e.lease_end(),
            age: now.saturating_sub(e.installed_at) / 1_000_000_000,
            packets: t.packets,
            bytes: t.bytes,
            icv_failed: t.icv_failed,
            replays: t.replays,
            malformed: t.malformed,
            selector: t.selector,
            limit: t.limit,
            engine: t.engine,
            lost: t.lost,
            events: event::names(e.events()).map(Into::into).collect(),
            rekey: rekey.into(),
            until_soft: Left::of(&gauges, |g| g.soft),
            until_hard: Left::of(&gauges, |g| g.hard),
            names: IkeNames::default(),
        }
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// Name.
    pub name: String,
    /// `in` or `out`.
    pub direction: String,
    /// Priority; lower is looked at first.
    pub priority: u32,
    /// `protect`, `bypass`, `discard`.
    pub action: String,
    /// Tunnel, when it protects.
    pub tunnel: Option<String>,
    /// Routing table.
    pub vrf: u16,
    /// Traffic, one text for each selector.
    pub selectors: Vec<String>,
    /// Packets that it decided about.
    #[serde(default)]
    pub hits: Option<u64>,
}

impl PolicyInfo {
    pub(super) fn of(p: &Policy, hits: Option<u64>) -> Self {
        let tunnel = match &p.action {
            Action::Protect { tunnel } => Some(tunnel.clone()),
            Action::Bypass | Action::Discard => None,
        };
        Self {
            name: p.name.clone(),
            direction: direction_name(p.direction).into(),
            priority: p.priority,
            action: action_name(&p.action).into(),
            tunnel,
            vrf: p.vrf.0,
            selectors: p.selectors.iter().map(selector_text).collect(),
            hits,
        }
    }
}

/// A tunnel, over all its SAs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelInfo {
    /// Name.
    pub name: String,
    /// Packets sent.
    pub out_packets: u64,
    /// Bytes sent.
    pub out_bytes: u64,
    /// Packets received.
    pub in_packets: u64,
    /// Bytes received.
    pub in_bytes: u64,
    /// Packets refused, both directions.
    pub errors: u64,
    /// Numbers that never arrived.
    pub lost: u64,
    /// Rekeys.
    pub rekeys: u64,
    /// Its names in the IKE daemon's configuration, where they are known.
    #[serde(flatten)]
    pub names: IkeNames,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Number.
    pub worker: usize,
    /// CPU.
    pub cpu: Option<usize>,
    /// Frames received.
    pub received: u64,
    /// Frames sent.
    pub sent: u64,
    /// Packets encrypted.
    pub encrypted: u64,
    /// Packets decrypted.
    pub decrypted: u64,
    /// Clear packets forwarded.
    pub bypassed: u64,
    /// Frames handed to other workers.
    pub handed_out: u64,
    /// Frames dropped.
    pub dropped: u64,
    /// Packets of its SAs that other workers ciphered.
    pub shared: u64,
    /// Packets of other workers' SAs that it ciphered.
    pub assisted: u64,
    /// Packets of shared SAs that wait for those before them, now.
    pub shared_waiting: u64,
    /// Times that they were found to.
    pub held_up: u64,
    /// Busy poll rounds.
    pub busy_polls: u64,
    /// Idle poll rounds.
    pub idle_polls: u64,
    /// Sleeps.
    pub sleeps: u64,
}

/// Drops for one reason, all workers together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropCount {
    /// Reason.
    pub reason: String,
    /// Frames.
    pub frames: u64,
}

/// Packets that ended inside for one good reason, all workers together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumedCount {
    /// Kind.
    pub kind: String,
    /// Frames.
    pub frames: u64,
}

/// What the exception path gave to the kernel for one class of frames, all workers together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PuntCount {
    /// Class.
    pub class: String,
    /// Frames that the kernel has.
    pub given: u64,
    /// Frames turned away: above the rate, or the kernel did not keep up.
    pub turned_away: u64,
}

/// The gateway at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Gateway clock, nanoseconds: for rates between two answers.
    pub clock: u64,
    /// Snapshot.
    pub epoch: u64,
    /// SAs installed.
    pub sas: usize,
    /// Workers.
    pub workers: Vec<WorkerInfo>,
    /// Ports.
    pub ports: Vec<PortReport>,
    /// Tunnels.
    pub tunnels: Vec<TunnelInfo>,
    /// Reasons that occurred.
    pub drops: Vec<DropCount>,
    /// Kinds of consumption that occurred.
    pub consumed: Vec<ConsumedCount>,
    /// Classes of the exception path that occurred.
    pub punts: Vec<PuntCount>,
}

impl Stats {
    /// Of now.
    pub fn of(c: &Control) -> Self {
        let snapshot = c.store.current();
        let workers = c.plane.workers();
        let names = c.names.as_ref().map(|n| n.lock());
        let drops = DropReason::ALL.iter().map(|r| DropCount {
            reason: r.name().into(),
            frames: workers
                .iter()
                .map(|w| w.counters.dropped[r.index()].value())
                .sum(),
        });
        let consumed = Consumed::ALL.iter().map(|k| ConsumedCount {
            kind: k.name().into(),
            frames: workers
                .iter()
                .map(|w| w.counters.consumed[*k as usize].value())
                .sum(),
        });
        let punts = Punt::ALL.iter().map(|class| {
            let n = *class as usize;
            PuntCount {
                class: class.name().into(),
                given: workers.iter().map(|w| w.counters.punted[n].value()).sum(),
                turned_away: workers.iter().map(|w| w.counters.unpunted[n].value()).sum(),
            }
        });
        Self {
            clock: c.plane.now(),
            epoch: snapshot.epoch,
            sas: snapshot.sas.iter().flatten().count(),
            workers: workers
                .iter()
                .enumerate()
                .map(|(i, w)| worker_info(i, w))
                .collect(),
            ports: c.plane.ports(),
            tunnels: c
                .store
                .tunnels()
                .iter()
                .zip(c.store.totals())
                .zip(0..)
                .filter(|((t, _), _)| !t.name.is_empty())
                .map(|((t, totals), idx)| {
                    let label = names.as_ref().and_then(|n| n.of_tunnel(TunnelIdx(idx)));
                    tunnel_info(&t.name, t.rekeys, &totals, label)
                })
                .collect(),
            drops: drops.filter(|d| d.frames > 0).collect(),
            consumed: consumed.filter(|c| c.frames > 0).collect(),
            punts: punts.filter(|p| p.given + p.turned_away > 0).collect(),
        }
    }
}

fn worker_info(worker: usize, w: &crate::plane::WorkerView) -> WorkerInfo {
    let c = &w.counters;
    WorkerInfo {
        worker,
        cpu: w.cpu,
        received: c.received.value(),
        sent: c.sent.value(),
        encrypted: c.encrypted.value(),
        decrypted: c.decrypted.value(),
        bypassed: c.bypassed.value(),
        handed_out: c.handed_out.value(),
        dropped: c.total_dropped(),
        busy_polls: c.busy_polls.value(),
        idle_polls: c.idle_polls.value(),
        sleeps: c.sleeps.value(),
        shared: c.parallel.returned.value(),
        assisted: c.parallel.assisted.value(),
        shared_waiting: c.parallel.waiting.value(),
        held_up: c.parallel.held_up.value(),
    }
}

fn tunnel_info(
    name: &str,
    rekeys: u64,
    (out, inbound): &(Totals, Totals),
    names: Option<&Label>,
) -> TunnelInfo {
    let errors =
        |t: &Totals| t.icv_failed + t.replays + t.malformed + t.selector + t.limit + t.engine;
    TunnelInfo {
        name: name.into(),
        out_packets: out.packets,
        out_bytes: out.bytes,
        in_packets: inbound.packets,
        in_bytes: inbound.bytes,
        errors: errors(out) + errors(inbound),
        lost: inbound.lost,
        rekeys,
        names: names.into(),
    }
}

pub(super) fn direction_name(d: Direction) -> &'static str {
    match d {
        Direction::In => "in",
        Direction::Out => "out",
    }
}

/// Name of a policy's action.
pub fn action_name(a: &Action) -> &'static str {
    match a {
        Action::Protect { .. } => "protect",
        Action::Bypass => "bypass",
        Action::Discard => "discard",
    }
}

fn selector_text(s: &Selector) -> String {
    let range = |r: &sa_store::policy::AddrRange| {
        if r.first() == r.last() {
            r.first().to_string()
        } else {
            format!("{}-{}", r.first(), r.last())
        }
    };
    let mut text = format!("{} > {}", range(&s.src), range(&s.dst));
    if let Some(p) = s.proto {
        text += &format!(" proto {p}");
    }
    match &s.ports {
        Ports::Any => {}
        Ports::Opaque => text += " fragments",
        Ports::Range { src, dst } => {
            text += &format!(
                " ports {}-{} > {}-{}",
                src.start(),
                src.end(),
                dst.start(),
                dst.end()
            )
        }
        Ports::Icmp { kind, code } => {
            text += &format!(
                " type {}-{} code {}-{}",
                kind.start(),
                kind.end(),
                code.start(),
                code.end()
            );
        }
    }
    text
}
