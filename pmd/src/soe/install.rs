//! SAs come and go.

use std::net::IpAddr;

use sa_store::runtime::SaEntry;
use sa_store::sa::{Direction, SaId, SaSpec};
use zeroize::Zeroizing;

use super::assumptions::Assumptions;
use super::first::Opener;
use super::flow::Flow;
use super::record::{self, Shape};
use super::slots::{Carried, State};
use super::window::RECORD;
use super::{Health, NAME, SoeEngine};
use crate::engine::{JobStatus, Refusal};
use crate::qdma::hop::Action;

impl SoeEngine {
    pub(super) fn install_sa(&mut self, entry: &SaEntry) -> Result<(), Refusal> {
        let spec = &entry.spec;
        let unsupported = |reason: String| Refusal::Unsupported {
            engine: NAME,
            sa: spec.name.clone(),
            reason,
        };
        if self.health != Health::Good {
            return Err(unsupported(format!("not trusted: {:?}", self.health)));
        }
        if self.slots.of(entry.fixed.id).is_some() {
            return Ok(());
        }
        let words = record::record(spec, &self.config.assume).map_err(unsupported)?;
        fresh(entry).map_err(unsupported)?;
        let tunnel = entry.fixed.tunnel.0;
        if !self.demand.deserves(tunnel, self.config.assume.slots) {
            return Err(unsupported("its slots are for busier tunnels".into()));
        }
        let slot = self.slots.find(self.clock.now());
        let Some(slot) = slot else {
            return Err(Refusal::NoSlot {
                engine: NAME,
                sa: spec.name.clone(),
            });
        };
        self.commit(slot, &words).map_err(unsupported)?;
        let carried = carried(entry, &self.config.assume);
        let flow = Flow::new(
            carried.shape,
            carried.action,
            self.config.assume.first_number,
            spec.hard
                .packets
                .filter(|_| carried.action == Action::Encrypt),
        );
        let is_known_by_content =
            carried.action == Action::Decrypt && self.config.assume.knows_by_content;
        let opener = is_known_by_content.then(|| Opener::of(spec)).flatten();
        self.slots.occupy(slot, carried, opener, flow);
        self.demand.got(tunnel);
        tracing::info!(engine = NAME, sa = %spec.name, slot, "SA installed");
        Ok(())
    }

    /// Marks the SA as going; [`SoeEngine::vacate_drained`] does the rest.
    pub(super) fn remove_sa(&mut self, id: SaId) {
        let Some((_, slot)) = self.slots.of(id) else {
            return;
        };
        slot.state = State::Draining;
        for job in &mut slot.flow.waiting {
            job.status = JobStatus::SaGone;
        }
        self.refused.extend(slot.flow.waiting.drain(..));
        self.vacate_drained();
    }

    /// Invalidates the slots of SAs that are gone and have nothing in the engine.
    pub(super) fn vacate_drained(&mut self) {
        for number in 0..self.config.assume.slots {
            let ready = self.slots.with_sa(number).is_some_and(|(slot, _)| {
                slot.state == State::Draining && slot.flow.under_way() == 0
            });
            if !ready {
                continue;
            }
            let state = match self.window.invalidate(number) {
                Ok(()) => State::Free(Some(self.clock.now())),
                Err(error) => {
                    self.counters.commit_failures.add(1);
                    tracing::error!(engine = NAME, slot = number, %error, "a removed SA stays");
                    self.distrust(Health::Dead("an SA could not be invalidated"));
                    State::Stuck
                }
            };
            if let Some(sa) = self.slots.vacate(number, state) {
                self.demand.gave(sa.tunnel);
            }
        }
    }

    fn commit(&mut self, slot: u8, words: &Zeroizing<[u32; RECORD]>) -> Result<(), String> {
        let Err(error) = self.window.install(slot, words) else {
            return Ok(());
        };
        self.counters.commit_failures.add(1);
        if self.window.invalidate(slot).is_err() {
            self.slots.vacate(slot, State::Stuck);
            self.distrust(Health::Dead("an SA could not be invalidated"));
        } else {
            self.slots.vacate(slot, State::Free(Some(self.clock.now())));
        }
        Err(error.to_string())
    }
}

/// Numbers and windows cannot be loaded into the engine: only an SA that has carried nothing can begin there.
fn fresh(entry: &SaEntry) -> Result<(), String> {
    let used = match entry.spec.direction {
        Direction::Out => entry.next_seq() > 1,
        Direction::In => entry.live.window.top() > 0,
    };
    if used || entry.live.counters.packets.value() > 0 {
        return Err("it has carried packets, and the engine begins at 1: rekey".into());
    }
    Ok(())
}

fn carried(entry: &SaEntry, assume: &Assumptions) -> Carried {
    let spec: &SaSpec = &entry.spec;
    let v4 = |a: IpAddr| match a {
        IpAddr::V4(a) => a.octets(),
        // Refused before.
        IpAddr::V6(_) => [0; 4],
    };
    Carried {
        id: entry.fixed.id,
        tunnel: entry.fixed.tunnel.0,
        action: match spec.direction {
            Direction::Out => Action::Encrypt,
            Direction::In => Action::Decrypt,
        },
        spi: spec.spi.value(),
        src: v4(spec.src),
        dst: v4(spec.dst),
        ports: spec.encap.map(|e| (e.sport, e.dport)),
        shape: Shape::of(spec, assume),
        counter_mode: spec.suite.is_counter_mode(),
    }
}
