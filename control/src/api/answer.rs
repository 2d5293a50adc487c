//! Carries out commands.

use sa_store::file::MIRROR_PREFIX;
use sa_store::runtime::TunnelIdx;
use sa_store::sa::Direction;
use serde::Serialize;
use serde_json::{Value, json};

use super::Command;
use super::report::{PolicyInfo, SaInfo, Stats};
use crate::core::Control;
use crate::explain::State;
use crate::kernel::{NeighbourInfo, Routes};
use crate::xfrm::MirrorReport;

pub(super) fn answer(c: &mut Control, command: Command) -> Result<Value, String> {
    match command {
        Command::SaList { tunnel } => value(&sa_list(c, tunnel.as_deref())?),
        Command::SaShow { name } => {
            let found = sa_infos(c).find(|i| i.name == name);
            value(&found.ok_or_else(|| format!("there is no SA \"{name}\""))?)
        }
        Command::PolicyList => value(&policies(c)),
        Command::Stats => value(&Stats::of(c)),
        Command::Status => value(&json!({
            "ready": c.is_ready(),
            "problem": c.problem(),
            "last_reload": c.last_reload(),
        })),
        Command::Events { after } => value(&c.events.since(after).collect::<Vec<_>>()),
        Command::Follow { .. } | Command::Reload => {
            Err("this is answered by the connection".into())
        }
        Command::Ports => value(&c.plane.ports()),
        Command::Engines => value(&c.plane.engines()),
        Command::Routes(query) => value(&Routes::of(c, &query)),
        Command::Neighbours(query) => value(&NeighbourInfo::of(c, &query)),
        Command::Ike => value(&MirrorReport {
            names: c.names.as_ref().map(|n| n.lock().report().clone()),
            ..c.mirror_state.clone()
        }),
        Command::CaptureStart(request) => {
            c.plane.capture_start(&request)?;
            c.events
                .note("capture", format!("started on port {}", request.port));
            tracing::info!(port = %request.port, file = %request.file.display(), "capture started");
            Ok(Value::Null)
        }
        Command::CaptureStop { port } => {
            let report = c.plane.capture_stop(&port)?;
            tracing::info!(port = %port, packets = report.packets, lost = report.lost, "capture ended");
            value(&report)
        }
        Command::Explain(query) => {
            let snapshot = c.store.current();
            let ports = c.plane.ports();
            let state = State {
                snapshot: &snapshot,
                tunnel_name: &|t: TunnelIdx| {
                    c.store
                        .tunnels()
                        .get(t.0 as usize)
                        .map_or_else(String::new, |t| t.name.clone())
                },
                port_name: &|p| {
                    ports
                        .get(usize::from(p))
                        .map_or_else(|| p.to_string(), |p| p.name.clone())
                },
                route: &|vrf, dst| crate::kernel::origin(c, vrf, dst),
                rekey_state: &|t| c.rekeys.view(t),
                now: c.plane.now(),
            };
            value(&state.explain(&query))
        }
    }
}

pub(super) fn value(v: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(v).map_err(|e| e.to_string())
}

fn sa_list(c: &Control, tunnel: Option<&str>) -> Result<Vec<SaInfo>, String> {
    if let Some(name) = tunnel
        && c.store.find_tunnel(name).is_none()
    {
        return Err(format!("there is no tunnel \"{name}\""));
    }
    let mut list: Vec<SaInfo> = sa_infos(c)
        .filter(|i| tunnel.is_none_or(|t| t == i.tunnel))
        .collect();
    list.sort_by(|a, b| {
        (&a.tunnel, &a.direction, &a.name).cmp(&(&b.tunnel, &b.direction, &b.name))
    });
    Ok(list)
}

fn sa_infos(c: &Control) -> impl Iterator<Item = SaInfo> + use<> {
    let snapshot = c.store.current();
    let now = c.plane.now();
    let names = c.names.as_ref().map(|n| n.lock());
    let list: Vec<SaInfo> = snapshot
        .sas
        .iter()
        .flatten()
        .map(|e| {
            let sending = snapshot.tunnels.at(e.fixed.tunnel.0).out == e.fixed.id.index;
            let mirrored = e.spec.name.starts_with(MIRROR_PREFIX);
            let names = names.as_ref().filter(|_| mirrored);
            let label = names.and_then(|n| n.of_sa(e.spec.dst, e.spec.spi.value()));
            SaInfo {
                names: label.into(),
                ..SaInfo::of(e, sending, now, c.rekeys.view(e.fixed.tunnel).state)
            }
        })
        .collect();
    list.into_iter()
}

fn policies(c: &Control) -> Vec<PolicyInfo> {
    let snapshot = c.store.current();
    let mut all = Vec::new();
    for (direction, spd) in [
        (Direction::Out, &snapshot.spd_out),
        (Direction::In, &snapshot.spd_in),
    ] {
        let mut of_direction: Vec<_> = spd
            .policies()
            .map(|(idx, p)| PolicyInfo::of(p, c.plane.policy_hits(direction, idx)))
            .collect();
        of_direction.sort_by_key(|p| p.priority);
        all.append(&mut of_direction);
    }
    all
}
