//! The draft of a publication: SAs with their leases and places, who sends, policies.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sa_store::file::MIRROR_PREFIX;
use sa_store::policy::Policy;
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, SaId};
use sa_store::spd::{Changes, Edit, Spd, SpdError};
use sa_store::store::Draft;

use super::claims::Claims;
use super::engines::Engines;
use super::hold::Holding;
use super::plan::{How, Plan, Wanted};
use super::{ApplyError, Kit, LeftOut, Order, Roster, Rule, Senders};
use crate::keeper::Tracked;
use crate::plane::Installed;

/// A draft in the making.
pub(super) struct Change<'a, 'k> {
    pub(super) draft: &'a mut Draft,
    pub(super) kit: &'a mut Kit<'k>,
    pub(super) order: &'a Order<'a>,
    pub(super) holding: &'a Holding,
    pub(super) left_out: &'a mut Vec<LeftOut>,
}

impl Change<'_, '_> {
    /// Puts the wanted SAs into the draft. Returns their leases. None of them sends yet.
    pub(super) fn fill(
        &mut self,
        plan: &Plan<'_>,
        claims: &Claims<'_>,
        engines: &mut Engines<'_>,
    ) -> Result<Vec<Tracked>, ApplyError> {
        for old in plan.leaving(&self.holding.keep) {
            self.draft.remove_sa(old.fixed.id);
        }
        let leases = claims.by_name();
        let mut tracked = Vec::with_capacity(plan.wanted.len());
        for w in &plan.wanted {
            // Left out when its lease was claimed.
            let Some(lease) = leases.get(w.spec.name.as_str()) else {
                if self.order.rule == Rule::Whole {
                    w.refused(
                        "there is no lease for its key".into(),
                        Rule::Whole,
                        self.left_out,
                    )?;
                }
                continue;
            };
            match self.add(w, lease, engines) {
                Ok(id) => {
                    if let Some(entry) = self.draft.snapshot().sa(id) {
                        tracked.push(Tracked::clone(lease).attached(Arc::clone(entry)));
                    }
                }
                Err(what) => w.refused(what, self.order.rule, self.left_out)?,
            }
        }
        Ok(tracked)
    }

    fn add(
        &mut self,
        w: &Wanted<'_>,
        lease: &Tracked,
        engines: &mut Engines<'_>,
    ) -> Result<SaId, String> {
        let mut start = lease.start();
        if let How::Heir(old) = &w.how {
            start.window_top = old.live.window.top();
        }
        let now = engines.plane.now();
        let place = engines.place(&w.spec)?;
        let mut add = |draft: &mut Draft, place| {
            let spec = Arc::clone(&w.spec);
            let before = self.kit.store.tunnel(&spec.tunnel);
            let sender = draft.snapshot().outbound(before).map(|e| e.fixed.id);
            let id = self
                .kit
                .store
                .add_sa_on(draft, spec, self.kit.factory, start, place, now)
                .map_err(|e| e.to_string())?;
            // Who sends is decided when all are there.
            draft.set_sender(before, sender);
            Ok::<_, String>(id)
        };
        let id = add(self.draft, place)?;
        if place.engine == 0 {
            return Ok(id);
        }
        match engines.install(self.draft, id) {
            Ok(Installed::Engine) => return Ok(id),
            Ok(Installed::Stopped(why)) => {
                tracing::warn!(sa = %w.spec.name, why, "stopped: its tunnel needs a new SA");
                return Ok(id);
            }
            Ok(Installed::Cpu(why)) => {
                tracing::warn!(sa = %w.spec.name, why, "the CPU ciphers until the next rekey");
            }
            Err(why) if w.spec.engine.is_some() => {
                self.draft.remove_sa(id);
                return Err(why);
            }
            // "auto" leaves the choice to us.
            Err(why) => tracing::info!(sa = %w.spec.name, why, "the CPU ciphers"),
        }
        self.draft.remove_sa(id);
        add(self.draft, Place::CPU)
    }

    /// Decides on which SA each tunnel of the order sends.
    pub(super) fn choose_senders(&mut self, roster: &Roster, plan: &Plan<'_>, new: &[Tracked]) {
        let new: HashMap<&str, SaId> = new
            .iter()
            .filter_map(|t| Some((t.name(), t.entry()?)))
            .filter(|(_, e)| e.fixed.direction == Direction::Out)
            .map(|(n, e)| (n, e.fixed.id))
            .collect();
        let running: HashSet<SaId> = plan.kept.iter().map(|e| e.fixed.id).collect();
        let find = |name: &str| {
            new.get(name).copied().or_else(|| {
                let e = roster.get(name)?;
                let ours = e.fixed.direction == Direction::Out && running.contains(&e.fixed.id);
                ours.then_some(e.fixed.id)
            })
        };
        let mut senders: HashMap<&str, SaId> = HashMap::new();
        match &self.order.senders {
            Senders::Last => {
                let all = self.order.sas.iter();
                for spec in all.filter(|s| s.direction == Direction::Out) {
                    if let Some(id) = find(&spec.name) {
                        senders.insert(&spec.tunnel, id);
                    }
                }
            }
            Senders::Named(named) => {
                for (tunnel, sa) in named {
                    if let Some(id) = find(sa) {
                        senders.insert(tunnel, id);
                    }
                }
            }
        }
        for (tunnel, id) in senders {
            let idx = self.kit.store.tunnel(tunnel);
            let id = self.holding.senders.get(&idx).copied().unwrap_or(id);
            let fits = |e: &&Arc<SaEntry>| e.fixed.tunnel == idx;
            let is_its = self.draft.snapshot().sa(id).filter(fits).is_some();
            if is_its && self.draft.snapshot().tunnels.at(idx.0).out != id.index {
                self.draft.set_sender(idx, Some(id));
            }
        }
    }

    /// Both directions' policies for the draft. Returns how many changed. A fault of the mirror leaves that policy out.
    pub(super) fn set_policies(&mut self) -> Result<usize, ApplyError> {
        let snapshot = self.draft.snapshot();
        let (old_out, old_in) = (Arc::clone(&snapshot.spd_out), Arc::clone(&snapshot.spd_in));
        let edited = self.order.edits.and_then(|edits| {
            let out = self.edited(&old_out, &edits.out)?;
            Some((out, self.edited(&old_in, &edits.inbound)?))
        });
        let ((out, changed_out), (inbound, changed_in)) = match edited {
            Some(done) => done,
            None => {
                let all = self.order.policies.list();
                (self.compile(&old_out, &all)?, self.compile(&old_in, &all)?)
            }
        };
        self.draft.set_spd(out, inbound);
        Ok(changed_out + changed_in)
    }

    /// `None` when an edit is not possible: then whole lists tell which policy is at fault.
    fn edited(&self, old: &Arc<Spd>, edits: &[Edit]) -> Option<(Arc<Spd>, usize)> {
        if edits.is_empty() {
            return Some((Arc::clone(old), 0));
        }
        let tunnel = |name: &str| self.kit.store.find_tunnel(name);
        let (spd, changes) = old.edited(edits, tunnel).ok()?;
        Some((Arc::new(spd), count(&changes)))
    }

    fn compile(
        &mut self,
        old: &Arc<Spd>,
        all: &[&Policy],
    ) -> Result<(Arc<Spd>, usize), ApplyError> {
        let mut without: HashSet<String> = HashSet::new();
        loop {
            let policies = all.iter().copied();
            let policies = policies.filter(|p| !without.contains(&p.name));
            let tunnel = |name: &str| self.kit.store.find_tunnel(name);
            match old.updated(policies, tunnel) {
                Ok((spd, changes)) => return Ok((Arc::new(spd), count(&changes))),
                Err(e) if is_mirrored(&e) && without.insert(e.policy().to_owned()) => {
                    self.left_out.push((e.policy().to_owned(), e.to_string()));
                }
                Err(e) => return Err(ApplyError::plain(e.to_string())),
            }
        }
    }
}

fn count(c: &Changes) -> usize {
    c.added.len() + c.removed.len() + c.changed
}

fn is_mirrored(e: &SpdError) -> bool {
    e.policy().starts_with(MIRROR_PREFIX)
}
