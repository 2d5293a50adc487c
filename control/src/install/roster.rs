//! The SAs of an origin that run.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sa_store::lease::{LeaseError, LeaseWriter};
use sa_store::runtime::SaEntry;
use sa_store::sa::{SaId, SaSpec};

use super::ahead::Ahead;
use super::plan::{Plan, same};

/// The running SAs of one origin.
#[derive(Debug, Default)]
pub struct Roster {
    named: HashMap<String, Arc<SaEntry>>,
    /// SAs that the origin does not name any more and that stay for a while.
    held: HashMap<SaId, Arc<SaEntry>>,
    /// Leases of SAs that are to be installed soon.
    pub(super) ahead: Ahead,
}

impl Roster {
    /// Claims the leases of those of these SAs that do not run, so that a change that installs them soon need not wait for the
    /// disk. Whatever that change does not install gives its lease back.
    ///
    /// # Errors
    /// The lease store is gone.
    pub fn claim_ahead<'s>(
        &mut self,
        sas: impl Iterator<Item = &'s SaSpec>,
        writer: &LeaseWriter,
    ) -> Result<(), LeaseError> {
        let new: Vec<&SaSpec> = sas.filter(|s| self.find(s).is_none()).collect();
        self.ahead.claim(new.into_iter(), writer)
    }

    /// The change that was claimed for was made, or never will be: what it did not take is given back.
    ///
    /// # Errors
    /// The lease store is gone.
    pub fn claim_no_more(&mut self, writer: &LeaseWriter) -> Result<(), LeaseError> {
        self.ahead.end(writer)
    }

    /// Whether the disk need not be waited for any more.
    pub fn is_ready(&self) -> bool {
        self.ahead.is_settled()
    }

    /// The running SA of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<SaEntry>> {
        self.named.get(name)
    }

    /// How many SAs the origin names.
    pub(crate) fn len(&self) -> usize {
        self.named.len()
    }

    /// An SA that was held was removed.
    pub fn let_go(&mut self, sa: SaId) {
        self.held.remove(&sa);
    }

    /// The running SA that is exactly this.
    pub(super) fn find(&self, spec: &SaSpec) -> Option<&Arc<SaEntry>> {
        let e = self.named.get(&spec.name)?;
        same(&e.spec, spec).then_some(e)
    }

    pub(super) fn named(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.named.values()
    }

    pub(super) fn held(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.held.values()
    }

    pub(super) fn update(
        &mut self,
        plan: &Plan<'_>,
        keep: &HashSet<SaId>,
        new: impl Iterator<Item = Arc<SaEntry>>,
    ) {
        for e in &plan.dropped {
            let id = e.fixed.id;
            if self
                .named
                .get(&e.spec.name)
                .is_some_and(|n| n.fixed.id == id)
            {
                self.named.remove(&e.spec.name);
            }
            if keep.contains(&id) {
                self.held.insert(id, Arc::clone(e));
            } else {
                self.held.remove(&id);
            }
        }
        if !self.held.is_empty() {
            for e in &plan.kept {
                if self.held.remove(&e.fixed.id).is_some() {
                    self.named.insert(e.spec.name.clone(), Arc::clone(e));
                }
            }
        }
        self.named.extend(new.map(|e| (e.spec.name.clone(), e)));
    }
}
