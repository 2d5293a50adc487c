//! Reads everything that is exposed.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::proto::MetricFamily;
use sa_store::counters::Counter;
use sa_store::drops::{Consumed, DropReason};
use sa_store::ledger::{Generated, Punt, WorkerCounters};
use sa_store::runtime::{SaEntry, TunnelIdx};
use sa_store::sa::Direction;
use sa_store::snapshot::{NO_SA, Snapshot};
use sa_store::spd::{PolicyIdx, Spd};
use sa_store::store::Totals;

use super::families::Families;
use super::table::*;
use crate::core::Control;
use crate::kernel::KernelStatus;
use crate::plane::{EngineReport, PortReport};
use crate::rekey::drive::OUTCOMES;
use crate::rekey::terms::STATES as STATES_OF_REKEYS;
use crate::xfrm::MirrorReport;

pub(super) fn all(c: &Control) -> Vec<MetricFamily> {
    let mut f = Families::default();
    let snapshot = c.store.current();
    gateway(c, &snapshot, &mut f);
    for (i, w) in c.plane.workers().iter().enumerate() {
        worker(&i.to_string(), &w.counters, &mut f);
    }
    for p in c.plane.ports() {
        port(&p, &mut f);
    }
    for e in c.plane.engines() {
        engine(&e, &mut f);
    }
    ike(&c.mirror_state, &mut f);
    names(c, &mut f);
    tunnels(c, &snapshot, &mut f);
    sas(c, &snapshot, &mut f);
    policies(c, &snapshot, &mut f);
    for p in c.plane.providers() {
        if p.selected {
            f.add(&CRYPTO, &[&p.suite, &p.provider], 1);
        }
        if let Some(ns) = p.ns_per_packet {
            f.add_f64(&CRYPTO_COST, &[&p.suite, &p.provider], ns / 1e9);
        }
    }
    f.finish()
}

fn ike(m: &MirrorReport, f: &mut Families) {
    f.add(&IKE_SAS, &[], m.sas as u64);
    f.add(&IKE_POLICIES, &[], m.policies as u64);
    f.add(&IKE_LEFT, &[], m.left.len() as u64);
    f.add(&IKE_RESYNCS, &[], m.resyncs);
    f.add(&IKE_KERNEL_SENT, &[], m.kernel_sent);
    f.add(&IKE_REKEYS_ASKED, &[], m.rekeys_asked);
    f.add(&IKE_ACQUIRES, &[], m.acquires);
}

fn names(c: &Control, f: &mut Families) {
    let Some(names) = &c.names else { return };
    let names = names.lock();
    let report = names.report();
    f.add(&IKE_VICI, &[], u64::from(report.connected));
    f.add(&IKE_VICI_FAILURES, &[], report.failures);
    f.add(&IKE_UNNAMED, &[], report.unnamed as u64);
    for (i, tunnel) in c.store.tunnels().iter().enumerate() {
        let idx = TunnelIdx(u32::try_from(i).unwrap_or(u32::MAX));
        if !tunnel.name.is_empty()
            && let Some(label) = names.of_tunnel(idx)
        {
            f.add(&TUNNEL_IKE, &[&tunnel.name, &label.ike, &label.child], 1);
        }
    }
}

fn gateway(c: &Control, snapshot: &Snapshot, f: &mut Families) {
    f.add(&BUILD, &[env!("CARGO_PKG_VERSION")], 1);
    f.add(&START_TIME, &[], c.start_time);
    f.add(&HEALTHY, &[], u64::from(c.problem().is_none()));
    let (free, all) = c.plane.frames();
    f.add(&FRAMES, &[], all);
    f.add(&FRAMES_FREE, &[], free);
    f.add(&LEASES, &[], c.keeper.len() as u64);
    f.add(&LEASES_FAILED, &[], c.keeper.failed() as u64);
    f.add(&EPOCH, &[], snapshot.epoch);
    for (event, n) in c.events.counts() {
        f.add(&SA_EVENTS, &[event], n);
    }
    f.add(&ROUTES, &[], snapshot.fib.routes().len() as u64);
    if let Some(k) = c.kernel_status() {
        kernel(&k, f);
    }
    let holding = c.events.holding();
    for (event, n) in c.events.totals() {
        f.add(&EVENTS, &[event], n);
        f.add(&STATES, &[event], holding.get(event).copied().unwrap_or(0));
    }
    for (result, n) in OUTCOMES.iter().zip(c.rekeys.attempts) {
        f.add(&REKEY_ATTEMPTS, &[result], n);
    }
    f.add(&RELOADS, &["refused"], c.reloads[0]);
    f.add(&RELOADS, &["loaded"], c.reloads[1]);
    let last = c.last_reload.as_ref();
    f.add(&RELOAD_OK, &[], u64::from(last.is_some_and(|r| r.ok)));
    f.add(&RELOAD_TIME, &[], last.map_or(0, |r| r.time));
    #[allow(clippy::cast_precision_loss, reason = "Prometheus samples are doubles")]
    f.add_f64(&RELOAD_TOOK, &[], last.map_or(0, |r| r.millis) as f64 / 1e3);
}

fn kernel(k: &KernelStatus, f: &mut Families) {
    let failed = k.requests_failed.min(k.requests);
    for (metric, labels, value) in [
        (&KERNEL_SYNCED, &[][..], u64::from(k.synced)),
        (&KERNEL_ROUTES, &[], k.routes),
        (&KERNEL_REFUSED, &[], k.refused),
        (&KERNEL_NEIGHBOURS, &[], k.neighbours),
        (&KERNEL_SYNC_TIME, &[], k.last_sync),
        (&KERNEL_RESYNCS, &[], k.resyncs),
        (&KERNEL_OVERRUNS, &[], k.overruns),
        (&KERNEL_STRANGE, &[], k.not_understood),
        (&KERNEL_PUBLISHED, &[], k.publications),
        (&KERNEL_REQUESTS, &["made"], k.requests - failed),
        (&KERNEL_REQUESTS, &["failed"], failed),
    ] {
        f.add(metric, labels, value);
    }
    f.add_f64(&KERNEL_SYNC_TOOK, &[], k.last_sync_millis as f64 / 1e3);
    f.add_f64(
        &KERNEL_PUBLISH_TOOK,
        &[],
        k.last_publish_micros as f64 / 1e6,
    );
}

fn worker(id: &str, w: &WorkerCounters, f: &mut Families) {
    let shared = &w.parallel;
    f.add(&SHARED_GIVEN, &[id, "helper"], shared.given.value());
    f.add(&SHARED_GIVEN, &[id, "owner"], shared.kept.value());
    let plain: [(&Metric, &Counter); 15] = [
        (&RECEIVED, &w.received),
        (&SENT, &w.sent),
        (&HANDED_IN, &w.handed_in),
        (&HANDED_OUT, &w.handed_out),
        (&ENCRYPTED, &w.encrypted),
        (&DECRYPTED, &w.decrypted),
        (&BYPASSED, &w.bypassed),
        (&WAITING, &w.waiting),
        (&IN_FLIGHT, &w.in_flight),
        (&SHARED_RETURNED, &shared.returned),
        (&SHARED_WAITING, &shared.waiting),
        (&SHARED_HELD_UP, &shared.held_up),
        (&SHARED_REFUSED, &shared.refused),
        (&ASSISTED, &shared.assisted),
        (&SLEEPS, &w.sleeps),
    ];
    for (metric, counter) in plain {
        f.add(metric, &[id], counter.value());
    }
    for ((class, punted), unpunted) in Punt::ALL.iter().zip(&w.punted).zip(&w.unpunted) {
        f.add(&PUNTED, &[id, class.name()], punted.value());
        f.add(&UNPUNTED, &[id, class.name()], unpunted.value());
    }
    for (kind, n) in Generated::ALL.iter().zip(&w.generated) {
        f.add(&GENERATED, &[id, kind.name()], n.value());
    }
    for (kind, n) in Consumed::ALL.iter().zip(&w.consumed) {
        f.add(&CONSUMED, &[id, kind.name()], n.value());
    }
    // All reasons, also those at 0: a rate needs the sample before the first drop.
    for (reason, n) in DropReason::ALL.iter().zip(&w.dropped) {
        f.add(&DROPPED, &[id, reason.name()], n.value());
    }
    f.add(&POLLS, &[id, "busy"], w.busy_polls.value());
    f.add(&POLLS, &[id, "idle"], w.idle_polls.value());
    f.add(&FLOWS, &[id, "hit"], w.flow_hits.value());
    f.add(&FLOWS, &[id, "miss"], w.flow_misses.value());
    f.add_histogram(&BURST, &[id], &w.burst_latency);
}

fn port(p: &PortReport, f: &mut Families) {
    f.add(&PORT_INFO, &[&p.name, &p.kind, &p.side, &p.mode, &p.mac], 1);
    f.add(&PORT_MTU, &[&p.name], u64::from(p.mtu));
    for (i, q) in p.queues.iter().enumerate() {
        let queue = i.to_string();
        for (metric, value) in [
            (&PORT_RX, q.rx_packets),
            (&PORT_RX_BYTES, q.rx_bytes),
            (&PORT_RX_DROPPED, q.rx_dropped),
            (&PORT_RX_ERRORS, q.rx_errors),
            (&PORT_TX, q.tx_packets),
            (&PORT_TX_BYTES, q.tx_bytes),
            (&PORT_TX_ERRORS, q.tx_errors),
        ] {
            f.add(metric, &[&p.name, &queue], value);
        }
    }
    let Some(device) = &p.device else { return };
    f.add(&PORT_LINK, &[&p.name], u64::from(device.link_up));
    if device.mbps > 0 {
        f.add(&PORT_SPEED, &[&p.name], u64::from(device.mbps) * 1_000_000);
    }
    for (metric, counts) in [
        (&PORT_DEVICE, &device.statistics),
        (&PORT_FAULTS, &device.errors),
    ] {
        for (name, n) in counts {
            f.add(metric, &[&p.name, name], *n);
        }
    }
}

fn engine(e: &EngineReport, f: &mut Families) {
    let name = e.name.as_str();
    // All states, also those at 0: an alert needs the sample before it changes.
    for state in ["serving", "quarantined", "recovering", "dead"] {
        f.add(
            &ENGINE_STATE,
            &[name, &e.kind, state],
            u64::from(e.state == state),
        );
    }
    if e.quarantines > 0 {
        f.add(&ENGINE_REASON, &[name, &e.reason], 1);
    }
    for (metric, value) in [
        (&ENGINE_SUBMITTED, e.submitted),
        (&ENGINE_COMPLETED, e.completed),
        (&ENGINE_BYTES, e.bytes),
        (&ENGINE_DOORBELLS, e.doorbells),
        (&ENGINE_BUSY, e.busy),
        (&ENGINE_CANARIES, e.canaries),
        (&ENGINE_CANARIES_FAILED, e.canaries_failed),
        (&ENGINE_SAMPLES, e.samples),
        (&ENGINE_SAMPLES_FAILED, e.samples_failed),
        (&ENGINE_LOST, e.lost),
        (&ENGINE_WRONG, e.wrong),
        (&ENGINE_QUARANTINES, e.quarantines),
        (&ENGINE_FALLBACK, e.fallback),
        (&ENGINE_REFUSED, e.refused),
    ] {
        f.add(metric, &[name], value);
    }
    let ok = e.resets.saturating_sub(e.resets_failed);
    f.add(&ENGINE_RESETS, &[name, "ok"], ok);
    f.add(&ENGINE_RESETS, &[name, "failed"], e.resets_failed);
}

fn errors(t: &Totals) -> [(&'static str, u64); 6] {
    [
        ("icv", t.icv_failed),
        ("replay", t.replays),
        ("malformed", t.malformed),
        ("selector", t.selector),
        ("limit", t.limit),
        ("engine", t.engine),
    ]
}

fn tunnels(c: &Control, snapshot: &Snapshot, f: &mut Families) {
    let tunnels = c.store.tunnels();
    let mut states = STATES_OF_REKEYS.map(|s| (s, 0_u64));
    let all = tunnels.iter().zip(c.store.totals()).enumerate();
    for (i, (tunnel, (out, inbound))) in all.filter(|(_, (t, _))| !t.name.is_empty()) {
        let idx = u32::try_from(i).unwrap_or(u32::MAX);
        let up = snapshot.tunnels.at(TunnelIdx(idx).0).out != NO_SA;
        f.add(&TUNNEL_UP, &[&tunnel.name], u64::from(up));
        f.add(&TUNNEL_REKEYS, &[&tunnel.name], tunnel.rekeys);
        let since_1970 = |t: SystemTime| t.duration_since(UNIX_EPOCH).unwrap_or_default();
        let last = tunnel.last_rekey.map_or(0, |t| since_1970(t).as_secs());
        f.add(&TUNNEL_LAST_REKEY, &[&tunnel.name], last);
        let overdue = c.rekeys.machine.is_overdue(TunnelIdx(idx));
        f.add(&TUNNEL_OVERDUE, &[&tunnel.name], u64::from(overdue));
        let state = c.rekeys.machine.view(TunnelIdx(idx)).state;
        if let Some((_, n)) = states.iter_mut().find(|(s, _)| *s == state) {
            *n += 1;
        }
        f.add(&TUNNEL_LOST, &[&tunnel.name], inbound.lost);
        for (direction, t) in [("out", &out), ("in", &inbound)] {
            f.add(&TUNNEL_PACKETS, &[&tunnel.name, direction], t.packets);
            f.add(&TUNNEL_BYTES, &[&tunnel.name, direction], t.bytes);
            for (kind, n) in errors(t) {
                f.add(&TUNNEL_ERRORS, &[&tunnel.name, direction, kind], n);
            }
        }
    }
    for (state, n) in states {
        f.add(&TUNNEL_REKEY_STATE, &[state], n);
    }
}

/// Name of a direction in labels.
fn name_of(d: Direction) -> &'static str {
    match d {
        Direction::In => "in",
        Direction::Out => "out",
    }
}

fn sas(c: &Control, snapshot: &Snapshot, f: &mut Families) {
    let mut by_direction = [("in", 0), ("out", 0)];
    let mut by_suite: BTreeMap<(String, &str), u64> = BTreeMap::new();
    let mut listed = 0;
    let mut total = 0;
    let now = c.plane.now();
    for e in snapshot.sas.iter().flatten() {
        total += 1;
        by_direction[usize::from(e.fixed.direction == Direction::Out)].1 += 1;
        *by_suite
            .entry((e.spec.suite.to_string(), e.provider))
            .or_default() += 1;
        if listed < c.metrics_max_sas {
            listed += 1;
            sa(e, now, f);
        }
    }
    for (direction, n) in by_direction {
        f.add(&SAS, &[direction], n);
    }
    for ((suite, provider), n) in by_suite {
        f.add(&SAS_SUITE, &[&suite, provider], n);
    }
    f.add(&SAS_RETIRING, &[], c.store.retiring() as u64);
    f.add(&SAS_UNLISTED, &[], (total - listed) as u64);
}

fn sa(e: &SaEntry, now: u64, f: &mut Families) {
    let t = Totals::of(e);
    let spi = e.spec.spi.to_string();
    let labels = [
        e.spec.name.as_str(),
        &e.spec.tunnel,
        name_of(e.fixed.direction),
        &spi,
    ];
    f.add(&SA_PACKETS, &labels, t.packets);
    f.add(&SA_BYTES, &labels, t.bytes);
    for (kind, n) in errors(&t) {
        let [sa, tunnel, direction, spi] = labels;
        f.add(&SA_ERRORS, &[sa, tunnel, direction, spi, kind], n);
    }
    let (sequence, next) = match e.fixed.direction {
        Direction::Out => (e.next_seq(), e.next_seq()),
        Direction::In => (e.live.window.top(), e.live.window.top().saturating_add(1)),
    };
    f.add(&SA_SEQUENCE, &labels, sequence);
    f.add(&SA_LEASE, &labels, e.lease_end().saturating_sub(next));
    f.add(
        &SA_AGE,
        &labels,
        now.saturating_sub(e.installed_at) / 1_000_000_000,
    );
}

fn policies(c: &Control, snapshot: &Snapshot, f: &mut Families) {
    for (direction, spd) in [
        (Direction::Out, &snapshot.spd_out),
        (Direction::In, &snapshot.spd_in),
    ] {
        let name = name_of(direction);
        f.add(&POLICIES, &[name], spd.len() as u64);
        hits(c, direction, spd, f);
        if let Some(hits) = c.plane.policy_hits(direction, PolicyIdx::DEFAULT) {
            f.add(&POLICY_HITS, &["(default)", name, "discard"], hits);
        }
    }
}

fn hits(c: &Control, direction: Direction, spd: &Spd, f: &mut Families) {
    for (idx, policy) in spd.policies().take(c.metrics_max_sas) {
        let action = crate::api::action_name(&policy.action);
        // Policies beyond the workers' counters have no number: absent says so, 0 would not.
        if let Some(hits) = c.plane.policy_hits(direction, idx) {
            f.add(
                &POLICY_HITS,
                &[&policy.name, name_of(direction), action],
                hits,
            );
        }
    }
}
