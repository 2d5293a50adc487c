//! Engines that are prepared for the SAs of one attempt.

use std::collections::HashMap;
use std::sync::Arc;

use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};
use sa_store::snapshot::Snapshot;
use sa_store::store::Draft;

use crate::plane::{DataPlane, Installed};

/// SAs that engines were prepared for in one attempt: forgotten again unless it succeeds.
pub(super) struct Engines<'p> {
    pub(super) plane: &'p dyn DataPlane,
    prepared: Vec<SaId>,
    running: Arc<Snapshot>,
    /// What runs, by tunnel and direction; made when the first SA asks for an engine.
    earlier: Option<HashMap<(String, Direction), Arc<SaEntry>>>,
}

impl<'p> Engines<'p> {
    pub(super) fn new(plane: &'p dyn DataPlane, running: Arc<Snapshot>) -> Self {
        Self {
            plane,
            prepared: Vec::new(),
            running,
            earlier: None,
        }
    }

    /// Where the SA goes, given the running one of its tunnel and direction, which it succeeds.
    pub(super) fn place(&mut self, spec: &SaSpec) -> Result<Place, String> {
        if spec.offload == OffloadMode::Software {
            return self.plane.place(spec, None);
        }
        let earlier = self.earlier.get_or_insert_with(|| {
            let of = |e: &Arc<SaEntry>| {
                let key = (e.spec.tunnel.clone(), e.fixed.direction);
                (key, Arc::clone(e))
            };
            self.running.sas.iter().flatten().map(of).collect()
        });
        let before = earlier.get(&(spec.tunnel.clone(), spec.direction));
        self.plane.place(spec, before.map(|e| &**e))
    }

    pub(super) fn install(&mut self, draft: &Draft, id: SaId) -> Result<Installed, String> {
        let Some(entry) = draft.snapshot().sa(id) else {
            return Err("it is not in the draft".into());
        };
        let installed = self.plane.install(entry)?;
        if installed == Installed::Engine {
            self.prepared.push(id);
        }
        Ok(installed)
    }

    pub(super) fn keep(mut self) {
        self.prepared.clear();
    }
}

impl Drop for Engines<'_> {
    fn drop(&mut self) {
        for id in self.prepared.drain(..) {
            self.plane.remove(id);
        }
    }
}
