//! From what is wanted to what runs: the difference, the leases that it needs, one publication.
//!
//! There are two origins, the SA files and the IKE mirror. Each has its roster of running SAs and changes nothing of
//! the other's; only policies stand in one list.

mod ahead;
mod change;
mod claims;
mod engines;
mod hold;
mod plan;
mod roster;
mod stop;

use std::collections::HashSet;

use sa_store::cipher::CipherFactory;
use sa_store::file::Location;
use sa_store::lease::LeaseWriter;
use sa_store::policy::Policy;
use sa_store::sa::{SaId, SaSpec};
use sa_store::spd::Edit;
use sa_store::store::Store;

use self::change::Change;
use self::claims::Claims;
use self::engines::Engines;
use self::hold::Holding;
use self::plan::Plan;
pub use self::roster::Roster;
use self::stop::{stop_and_wait, wait_for_keys};
use crate::keeper::Keeper;
use crate::parts::Parts;
use crate::plane::DataPlane;
use crate::rekey::machine::Machine;

/// An SA or policy that was left out, and why.
pub type LeftOut = (String, String);

/// Why nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}{what}", .at.as_ref().map(|a| format!("{a}: ")).unwrap_or_default())]
pub struct ApplyError {
    /// Line of the SA file, when it is one line's fault.
    pub at: Option<Location>,
    /// What is wrong.
    pub what: String,
}

impl ApplyError {
    fn plain(what: impl Into<String>) -> Self {
        Self {
            at: None,
            what: what.into(),
        }
    }
}

/// What a publication changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// SAs that were not there before, or not so.
    pub added: usize,
    /// SAs that are no more, or not so.
    pub removed: usize,
    /// SAs that stay as they are, with their counters.
    pub kept: usize,
    /// Policies that the origin has now.
    pub policies: usize,
    /// Policies added, removed and changed.
    pub policies_changed: usize,
    /// Number of the snapshot.
    pub epoch: u64,
}

/// What a fault in one SA or policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Nothing is changed: files are right as a whole or not taken.
    Whole,
    /// That one is left out: an IKE daemon's other tunnels do not wait for it.
    EachAlone,
}

/// Who sends for a tunnel.
#[derive(Clone, Debug)]
pub enum Senders<'c> {
    /// The last outbound SA of the tunnel, in the order of the configuration.
    Last,
    /// Tunnels with their SAs. A tunnel that is not named goes on with the SA that sends now, if that stays.
    Named(Vec<(&'c str, &'c str)>),
}

/// What is to be done to the policies.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    out: Vec<Edit>,
    inbound: Vec<Edit>,
}

impl Edits {
    /// Those of a direction.
    pub(crate) fn of(&mut self, out: bool) -> &mut Vec<Edit> {
        if out {
            &mut self.out
        } else {
            &mut self.inbound
        }
    }
}

/// Policies of both origins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policies<'c> {
    pub(crate) files: &'c [Policy],
    pub(crate) mirror: &'c Parts,
}

impl<'c> Policies<'c> {
    /// In the order that breaks ties of priority.
    pub(crate) fn list(self) -> Vec<&'c Policy> {
        let mirrored = self.mirror.policies();
        self.files.iter().chain(mirrored).collect()
    }
}

/// What one origin wants.
pub struct Order<'c> {
    /// Names of its tunnels, of those whose SAs are in question.
    pub tunnels: Vec<&'c str>,
    /// Its SAs that are in question.
    pub sas: Vec<&'c SaSpec>,
    /// Where each SA was written, if it was.
    pub origins: &'c [Location],
    /// Names of SAs that go if they are not wanted; `None`: all that run.
    pub had: Option<&'c HashSet<String>>,
    /// Who sends.
    pub senders: Senders<'c>,
    /// What to do to the policies; `None`: they become what `policies` lists.
    pub edits: Option<&'c Edits>,
    /// Policies of both origins in the order that breaks ties of priority.
    pub(crate) policies: Policies<'c>,
    /// How many of them the origin has.
    pub policy_count: usize,
    /// What a fault does.
    pub rule: Rule,
}

/// What a change works with.
pub struct Kit<'k> {
    /// SA store.
    pub store: &'k mut Store,
    /// Keeper of leases.
    pub keeper: &'k mut Keeper,
    /// Lease writer.
    pub writer: &'k LeaseWriter,
    /// Makes ciphers.
    pub factory: &'k dyn CipherFactory,
    /// Data path.
    pub plane: &'k dyn DataPlane,
    /// Decides what stays for a while; `None`: nothing does.
    pub machine: Option<&'k mut Machine>,
    /// SAs that went out of use meanwhile.
    pub gone: Vec<SaId>,
}

/// Makes what an origin wants the running state, or leaves everything as it is. With [`Rule::EachAlone`] what is
/// wrong is left out and told, and the rest is done.
///
/// SAs that did not change keep their entry: numbers, windows and counters go on.
///
/// # Errors
/// The first thing that is wrong; nothing was published then.
pub fn apply(
    kit: &mut Kit<'_>,
    roster: &mut Roster,
    order: &Order<'_>,
) -> Result<(Applied, Vec<LeftOut>), ApplyError> {
    let plan = Plan::new(order, roster);
    let done = match attempt(kit, roster, order, plan) {
        Err(e) if order.rule == Rule::EachAlone => {
            // What is new cannot be had now; what is gone is to go all the same.
            let mut plan = Plan::new(order, roster);
            let refused = plan.only_drop();
            attempt(kit, roster, order, plan).map(|(applied, mut left_out)| {
                left_out.extend(refused.iter().map(|w| (w.spec.name.clone(), e.to_string())));
                (applied, left_out)
            })
        }
        done => done,
    };
    if let Err(e) = roster.claim_no_more(kit.writer) {
        tracing::error!(error = %e, "leases of SAs that were not installed could not be given back");
    }
    done
}

fn attempt(
    kit: &mut Kit<'_>,
    roster: &mut Roster,
    order: &Order<'_>,
    plan: Plan<'_>,
) -> Result<(Applied, Vec<LeftOut>), ApplyError> {
    wait_for_keys(kit, &plan.wanted);
    let mut left_out = Vec::new();
    let mut claims = Claims::new(kit.writer);
    let ahead = &mut roster.ahead;
    claims.take(&plan.wanted, ahead, kit.keeper, order.rule, &mut left_out)?;

    // An inbound SA whose key stays must stop before its window can be read: nothing may slip in between.
    let heirs: Vec<_> = plan.inbound_heirs().cloned().collect();
    let stopped = stop_and_wait(kit, &heirs)?;

    // In the order of the configuration, which decides the workers that own them, as at any other start. A policy may name
    // a tunnel that has no SA yet.
    for name in &order.tunnels {
        kit.store.tunnel(name);
    }
    let holding = match &kit.machine {
        Some(machine) => Holding::new(machine, &plan, order, kit.store),
        None => Holding::default(),
    };
    let mut draft = kit.store.draft();
    let mut engines = Engines::new(kit.plane, kit.store.current());
    let mut change = Change {
        draft: &mut draft,
        kit,
        order,
        holding: &holding,
        left_out: &mut left_out,
    };
    let filled = change
        .fill(&plan, &claims, &mut engines)
        .and_then(|tracked| {
            change.choose_senders(roster, &plan, &tracked);
            Ok((tracked, change.set_policies()?))
        });
    let (tracked, policies_changed) = match filled {
        Ok(done) => {
            claims.keep(&done.0);
            engines.keep();
            stopped.for_good();
            done
        }
        Err(e) => {
            kit.store.discard(draft);
            return Err(e);
        }
    };
    let epoch = kit.store.current().epoch + 1;
    kit.store.publish(draft);
    for entry in plan.leaving(&holding.keep) {
        kit.keeper.retire(entry.fixed.id);
    }
    let added = tracked.len();
    let new = tracked.iter().filter_map(|t| t.entry().cloned());
    roster.update(&plan, &holding.keep, new);
    for t in tracked {
        kit.keeper.track(t);
    }
    if let Some(machine) = &mut kit.machine {
        hold::publish(machine, order, roster, kit.store, epoch);
    }
    let applied = Applied {
        added,
        removed: plan.newly_dropped,
        kept: plan.kept.len(),
        policies: order.policy_count,
        policies_changed,
        epoch,
    };
    Ok((applied, left_out))
}

/// Lets go of what no worker uses any more: keys are wiped, leases end. Returns the SAs that are gone.
pub fn reap(
    store: &mut Store,
    keeper: &mut Keeper,
    writer: &LeaseWriter,
    plane: &dyn DataPlane,
) -> Vec<SaId> {
    let gone = store.reap();
    for sa in &gone {
        plane.remove(*sa);
    }
    if let Err(e) = keeper.gone(&gone, writer) {
        tracing::error!(error = %e, "exact sequence numbers of removed SAs could not be written; their leases stand");
    }
    gone
}

impl Kit<'_> {
    fn reap(&mut self) {
        let gone = reap(self.store, self.keeper, self.writer, self.plane);
        self.gone.extend(gone);
    }
}
