//! All look-aside engines, from control's side: which one an SA goes to, and its installation there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use control::plane::Installed;
use sa_store::runtime::{Place, SaEntry, event};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};

use super::choice::{Choice, Traffic};
use super::desk::Desk;
use super::fit;
use crate::worker::Waker;

/// The engines by number, from 1.
pub struct Park {
    desks: Vec<Arc<Desk>>,
    wakers: Arc<[Waker]>,
    choice: Choice,
    /// Engines that have the SA.
    installed: Mutex<HashMap<SaId, u8>>,
}

impl Default for Park {
    fn default() -> Self {
        Self::new(Vec::new(), Arc::from([]), Choice::default())
    }
}

impl Park {
    /// The engines behind `desks`, whose workers `wakers` wake. `choice` decides for SAs that leave it to the gateway.
    pub fn new(desks: Vec<Arc<Desk>>, wakers: Arc<[Waker]>, choice: Choice) -> Self {
        Self {
            desks,
            wakers,
            choice,
            installed: Mutex::default(),
        }
    }

    /// The engines.
    pub fn desks(&self) -> &[Arc<Desk>] {
        &self.desks
    }

    /// Where the SA, which takes the place of `before`, is to be ciphered. `saturated`: workers have no time left.
    ///
    /// # Errors
    /// The engine that it names cannot carry it, or there is none.
    pub fn place(
        &self,
        spec: &SaSpec,
        before: Option<&SaEntry>,
        saturated: bool,
    ) -> Result<Place, String> {
        if spec.offload == OffloadMode::Software {
            return Ok(Place::CPU);
        }
        if self.desks.is_empty() {
            return Err(format!(
                "\"offload\" asks for an engine, and the gateway's configuration has no [[engine]]: add one, or remove \"offload\" from SA \"{}\"",
                spec.name
            ));
        }
        let (mut fit, mut reasons) = (Vec::new(), Vec::new());
        for (number, desk) in (1u8..).zip(&self.desks) {
            if spec.engine.as_ref().is_some_and(|name| name != desk.name()) {
                continue;
            }
            let can = desk.capabilities();
            let full = self.used(number) >= can.slots;
            let why = fit::refusal(can, spec).or_else(|| full.then(|| "it is full".into()));
            match why {
                None => fit.push(Place {
                    engine: number,
                    mode: spec.offload,
                    outer_headers: spec.offload == OffloadMode::Packet && can.outer_headers,
                }),
                Some(why) => reasons.push(format!("engine \"{}\": {why}", desk.name())),
            }
        }
        match &spec.engine {
            Some(_) if !fit.is_empty() => Ok(fit[0]),
            Some(name) if reasons.is_empty() => {
                let known: Vec<_> = self.desks.iter().map(|d| d.name()).collect();
                Err(format!(
                    "there is no engine \"{name}\"; the engines are {}",
                    known.join(", ")
                ))
            }
            Some(_) => Err(reasons.join("; ")),
            None => Ok(self.choose(spec, &fit, before, saturated)),
        }
    }

    fn choose(
        &self,
        spec: &SaSpec,
        fit: &[Place],
        before: Option<&SaEntry>,
        saturated: bool,
    ) -> Place {
        let mean = |e: &SaEntry| {
            let c = &e.live.counters;
            let (packets, bytes) = (c.packets.value(), c.bytes.value());
            #[allow(clippy::cast_precision_loss, reason = "a mean")]
            (packets != 0).then(|| bytes as f64 / packets as f64)
        };
        let traffic = Traffic {
            mean: before.and_then(mean),
            saturated,
            before: before.map(|e| e.fixed.place),
        };
        let place = self.choice.place(spec, fit, &traffic);
        let engine = self.desk(place.engine).map_or("CPU", |d| d.name());
        tracing::info!(sa = %spec.name, engine, "chosen");
        place
    }

    /// Prepares the SA's engine.
    ///
    /// # Errors
    /// The engine refuses, or its worker does not answer.
    pub fn install(&self, sa: &Arc<SaEntry>) -> Result<Installed, String> {
        let number = sa.fixed.place.engine;
        let Some(desk) = self.desk(number) else {
            return Err(format!("there is no engine number {number}"));
        };
        if sa.fixed.place.mode == OffloadMode::Packet && !desk.capabilities().renumbers {
            let why = format!(
                "it has carried packets, and engine \"{}\" begins at 1",
                desk.name()
            );
            match sa.fixed.direction {
                Direction::Out if sa.next_seq() > 1 => {
                    sa.set_disabled(true);
                    sa.raise(event::ENGINE_LOST);
                    return Ok(Installed::Stopped(why));
                }
                Direction::In if sa.live.window.top() > 0 => return Ok(Installed::Cpu(why)),
                _ => {}
            }
        }
        desk.install(sa, || self.wake(desk))
            .map_err(|e| e.to_string())?;
        self.installed().insert(sa.fixed.id, number);
        Ok(Installed::Engine)
    }

    /// Lets the SA's engine forget it.
    pub fn remove(&self, sa: SaId) {
        let number = self.installed().remove(&sa);
        if let Some(desk) = number.and_then(|n| self.desk(n)) {
            desk.remove(sa, || self.wake(desk));
        }
    }

    fn desk(&self, number: u8) -> Option<&Arc<Desk>> {
        self.desks.get(usize::from(number).checked_sub(1)?)
    }

    fn used(&self, number: u8) -> usize {
        self.installed().values().filter(|n| **n == number).count()
    }

    fn installed(&self) -> std::sync::MutexGuard<'_, HashMap<SaId, u8>> {
        self.installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, desk: &Desk) {
        if let Some(waker) = self.wakers.get(desk.worker()) {
            waker.wake();
        }
    }
}
