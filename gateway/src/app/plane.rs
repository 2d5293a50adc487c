//! The running data path as control sees it.

use std::fs::File;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use control::plane::{
    CaptureReport, CaptureRequest, DataPlane, DeviceReport, EngineReport, Installed, PortReport,
    ProviderReport, QueueCounters, WorkerView,
};
use pmd::capture::{Capture, CaptureOptions};
use pmd::nic::NicControl;
use pmd::{Arena, PortQueueStats};
use quanta::Clock;
use rtrb::Consumer;
use sa_store::ledger::WorkerCounters;
use sa_store::policy::{Action, AddrRange, Policy};
use sa_store::report::Report;
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};
use sa_store::spd::PolicyIdx;

use super::open::PortView;
use crate::crypto::select::Selection;
use crate::engine::Park;
use crate::engine::trust::EngineWatch;
use crate::worker::{Mtus, PolicyHits, Side, gateway_now};

/// Rounds with packets for each empty one from which on workers count as saturated.
const SATURATED: u64 = 9;
/// Most prefixes that one range of addresses is cut into for an interface's filter.
const MOST_PREFIXES: usize = 256;

/// What control asks of the gateway.
pub struct Plane {
    workers: Vec<WorkerView>,
    hits: Vec<Arc<PolicyHits>>,
    ports: Vec<PortView>,
    mtus: Mtus,
    stats: Vec<Vec<Arc<PortQueueStats>>>,
    capture: Capture,
    captured: Mutex<Option<CaptureRequest>>,
    arena: Arc<Arena>,
    clock: Clock,
    crypto: Arc<Selection>,
    polls: Mutex<[u64; 2]>,
    engines: Park,
    watches: Vec<EngineWatch>,
    reports: Mutex<Vec<Consumer<Report>>>,
    alive: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Parts of a [`Plane`].
pub struct PlaneParts {
    /// Workers.
    pub workers: Vec<WorkerView>,
    /// Policy hits by worker.
    pub hits: Vec<Arc<PolicyHits>>,
    /// Ports.
    pub ports: Vec<PortView>,
    /// Their largest packets.
    pub mtus: Mtus,
    /// Counters of each port's queues.
    pub stats: Vec<Vec<Arc<PortQueueStats>>>,
    /// Switch of all capture points.
    pub capture: Capture,
    /// Packet memory.
    pub arena: Arc<Arena>,
    /// The workers' clock.
    pub clock: Clock,
    /// Crypto providers.
    pub crypto: Arc<Selection>,
    /// Look-aside engines.
    pub engines: Park,
    /// What is told of each engine.
    pub watches: Vec<EngineWatch>,
    /// What workers tell.
    pub reports: Vec<Consumer<Report>>,
    /// Whether all workers' threads run.
    pub alive: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Plane {
    /// Puts it together.
    pub fn new(parts: PlaneParts) -> Self {
        let PlaneParts {
            workers,
            hits,
            ports,
            mtus,
            stats,
            capture,
            arena,
            clock,
            crypto,
            engines,
            watches,
            reports,
            alive,
        } = parts;
        Self {
            workers,
            hits,
            ports,
            mtus,
            stats,
            capture,
            captured: Mutex::default(),
            arena,
            clock,
            crypto,
            polls: Mutex::default(),
            engines,
            watches,
            reports: Mutex::new(reports),
            alive,
        }
    }
}

impl Plane {
    /// Whether workers had no time left since this was last asked.
    fn saturated(&self) -> bool {
        let sum = |of: fn(&WorkerCounters) -> u64| -> u64 {
            self.workers.iter().map(|w| of(&w.counters)).sum()
        };
        let now = [sum(|c| c.busy_polls.value()), sum(|c| c.idle_polls.value())];
        let mut last = self.polls.lock().unwrap_or_else(PoisonError::into_inner);
        let [busy, idle] = [0, 1].map(|i| now[i].wrapping_sub(last[i]));
        *last = now;
        busy > idle.saturating_mul(SATURATED)
    }
}

impl DataPlane for Plane {
    fn workers(&self) -> &[WorkerView] {
        &self.workers
    }

    fn ports(&self) -> Vec<PortReport> {
        let reports = self
            .ports
            .iter()
            .zip(&self.stats)
            .enumerate()
            .map(|(i, (p, queues))| PortReport {
                name: p.name.clone(),
                kind: p.info.kind.into(),
                side: match p.side {
                    Side::Inside => "inside",
                    Side::Outside => "outside",
                }
                .into(),
                mode: p.info.mode.clone(),
                mac: p.info.mac.to_string(),
                mtu: p.info.mtu.min(u32::from(self.mtus.get(i))),
                queues: queues.iter().map(|q| counters(q)).collect(),
                device: p.control.as_deref().map(device),
            });
        reports.collect()
    }

    fn providers(&self) -> Vec<ProviderReport> {
        let rows = self.crypto.table().iter().map(|r| ProviderReport {
            suite: r.suite.to_string(),
            provider: r.provider.name().into(),
            selected: true,
            ns_per_packet: r.cost.map(|c| c.ns_1420),
        });
        rows.collect()
    }

    fn engines(&self) -> Vec<EngineReport> {
        let workers = self.engines.desks().iter().map(|d| d.worker());
        let pairs = self.watches.iter().zip(workers);
        pairs.map(|(w, worker)| w.report(worker)).collect()
    }

    fn policy_hits(&self, direction: Direction, policy: PolicyIdx) -> Option<u64> {
        let of = |h: &Arc<PolicyHits>| {
            let list = match direction {
                Direction::Out => &h.out,
                Direction::In => &h.inbound,
            };
            // The last place is shared by all policies beyond the table.
            let own = list.len().saturating_sub(1);
            list.get(policy.index())
                .filter(|_| policy.index() < own)
                .map(|c| c.value())
        };
        self.hits.iter().map(of).sum()
    }

    fn reports(&self, take: &mut dyn FnMut(Report)) {
        let mut rings = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        for ring in rings.iter_mut() {
            while let Ok(report) = ring.pop() {
                take(report);
            }
        }
    }

    fn now(&self) -> u64 {
        gateway_now(&self.clock)
    }

    fn alive(&self) -> bool {
        (self.alive)()
    }

    fn frames(&self) -> (u64, u64) {
        (
            u64::from(self.arena.depot_level()),
            u64::from(self.arena.frames()),
        )
    }

    fn published(&self, policies: &[&Policy]) {
        if !self.ports.iter().any(|p| p.steer_follows_policies) {
            return;
        }
        let mut wanted: Vec<(IpAddr, u8)> = Vec::new();
        for p in policies.iter().filter(|p| p.direction == Direction::Out) {
            if matches!(p.action, Action::Protect { .. }) {
                for s in &p.selectors {
                    prefixes(s.dst, &mut wanted);
                }
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        for port in self.ports.iter().filter(|p| p.steer_follows_policies) {
            let Some(map) = &port.steer else { continue };
            if let Err(e) = map.replace(&wanted) {
                tracing::error!(port = %port.name, error = %e, "destinations of the policies are not all taken from the interface");
            }
        }
    }

    fn place(&self, spec: &SaSpec, before: Option<&SaEntry>) -> Result<Place, String> {
        if spec.offload == OffloadMode::Software {
            return Ok(Place::CPU);
        }
        self.engines.place(spec, before, self.saturated())
    }

    fn install(&self, sa: &Arc<SaEntry>) -> Result<Installed, String> {
        self.engines.install(sa)
    }

    fn remove(&self, sa: SaId) {
        self.engines.remove(sa);
    }

    fn set_mtu(&self, port: u16, mtu: u32) {
        self.mtus.set(port, mtu);
    }

    fn capture_start(&self, request: &CaptureRequest) -> Result<(), String> {
        let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        if captured.is_some() && self.capture.is_running() {
            return Err("a capture is running already".into());
        }
        if captured.take().is_some() {
            // It ended by itself; its file is complete.
            self.capture.stop().map_err(|e| e.to_string())?;
        }
        if !self.ports.iter().any(|p| p.name == request.port) {
            return Err(format!("there is no port \"{}\"", request.port));
        }
        // Never over an existing file: the gateway may have more rights than whoever asks.
        let file = File::create_new(&request.file)
            .map_err(|e| format!("{}: {e}", request.file.display()))?;
        let options = CaptureOptions {
            ports: vec![request.port.clone()],
            snap_len: request.snap.unwrap_or(65_535),
            packets: request.packets,
        };
        self.capture
            .start(file, &options)
            .map_err(|e| e.to_string())?;
        *captured = Some(request.clone());
        Ok(())
    }

    fn capture_stop(&self, port: &str) -> Result<CaptureReport, String> {
        let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        let request = captured.take_if(|r| r.port == port);
        let request = request.ok_or_else(|| format!("no capture runs on port \"{port}\""))?;
        let summary = self.capture.stop().map_err(|e| e.to_string())?;
        Ok(CaptureReport {
            port: request.port,
            file: request.file,
            packets: summary.written,
            lost: summary.missed,
        })
    }
}

fn device(control: &dyn NicControl) -> DeviceReport {
    let link = control.link();
    let named = |counts: Vec<(&'static str, u64)>| {
        let owned = counts.into_iter().map(|(name, n)| (name.to_owned(), n));
        owned.collect()
    };
    DeviceReport {
        link_up: link.up,
        mbps: link.mbps,
        statistics: named(control.statistics()),
        errors: named(control.device_errors()),
    }
}

fn counters(q: &PortQueueStats) -> QueueCounters {
    QueueCounters {
        rx_packets: q.rx_packets.value(),
        rx_bytes: q.rx_bytes.value(),
        rx_dropped: q.rx_dropped.value(),
        rx_errors: q.rx_errors.value(),
        tx_packets: q.tx_packets.value(),
        tx_bytes: q.tx_bytes.value(),
        tx_errors: q.tx_errors.value(),
    }
}

/// Cuts a range into networks.
fn prefixes(range: AddrRange, out: &mut Vec<(IpAddr, u8)>) {
    let (mut at, last, width) = match (range.first(), range.last()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(u32::from(a)), u128::from(u32::from(b)), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a), u128::from(b), 128_u32),
        _ => return,
    };
    for _ in 0..MOST_PREFIXES {
        let aligned = at.trailing_zeros().min(width);
        let left = last - at;
        // The largest block that begins here and does not go beyond the end.
        let fits = left.checked_add(1).map_or(128, u128::ilog2);
        let bits = aligned.min(fits);
        let addr = match width {
            32 => IpAddr::V4(u32::try_from(at).unwrap_or(u32::MAX).into()),
            _ => IpAddr::V6(at.into()),
        };
        out.push((addr, u8::try_from(width - bits).unwrap_or(0)));
        let size = 1_u128.checked_shl(bits).unwrap_or(0);
        match at.checked_add(size) {
            Some(next) if size != 0 && next <= last => at = next,
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(first: &str, last: &str) -> Vec<String> {
        let range = AddrRange::new(first.parse().unwrap(), last.parse().unwrap()).unwrap();
        let mut out = Vec::new();
        prefixes(range, &mut out);
        out.iter().map(|(a, l)| format!("{a}/{l}")).collect()
    }

    #[test]
    fn ranges_are_cut_into_exactly_their_networks() {
        assert_eq!(cut("10.0.0.0", "10.0.255.255"), ["10.0.0.0/16"]);
        assert_eq!(
            cut("10.0.0.1", "10.0.0.6"),
            ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"]
        );
        assert_eq!(cut("0.0.0.0", "255.255.255.255"), ["0.0.0.0/0"]);
        assert_eq!(
            cut("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ["::/0"]
        );
        assert_eq!(
            cut("2001:db8::ff", "2001:db8::100"),
            ["2001:db8::ff/128", "2001:db8::100/128"]
        );
        assert_eq!(
            cut("255.255.255.255", "255.255.255.255"),
            ["255.255.255.255/32"]
        );
    }
}
