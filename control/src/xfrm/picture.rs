//! What was made of the kernel's SAs and policies, group by group, so that news cost no more than what they touch.
//!
//! A group is what has one name here: the tunnels of one request id, interface id and peer. What cannot be told to belong to a
//! tunnel is a group of its own. A group becomes a part of the mirror, and is made anew as a whole when one of its members changes.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

use super::message::{PolicyKey, SaKey, Way};
use super::settings::Settings;
use super::table::{Table, Touched};
use super::translate::{Group, Seized, Translated, translate};
use crate::mirrored::{Mirrored, PartId};

/// Groups and their members.
#[derive(Debug, Default)]
pub(super) struct Picture {
    groups: HashMap<Group, Members>,
    of_sa: HashMap<SaKey, Group>,
    of_policy: HashMap<PolicyKey, Group>,
    stale: HashSet<Group>,
    next: u64,
}

#[derive(Debug)]
struct Members {
    id: PartId,
    sas: HashSet<SaKey>,
    policies: HashSet<PolicyKey>,
    /// What of them stays with the kernel, by label.
    left: Vec<String>,
}

/// What is new.
#[derive(Debug, Default)]
pub(super) struct Drawn {
    pub(super) parts: Vec<(PartId, Mirrored)>,
    /// SAs of these parts, by our name of them.
    pub(super) keys: HashMap<String, SaKey>,
    /// Labels of what stayed with the kernel before.
    pub(super) left_before: Vec<String>,
    /// What stays with the kernel, and why.
    pub(super) left: Vec<(String, String)>,
}

impl Picture {
    /// Whether something is to be drawn.
    pub(super) fn is_stale(&self) -> bool {
        !self.stale.is_empty()
    }

    /// Something else was found out about an SA.
    pub(super) fn reconsider(&mut self, key: &SaKey) {
        self.stale.extend(self.of_sa.get(key).cloned());
    }

    /// Takes in what changed.
    pub(super) fn regroup(
        &mut self,
        touched: &Touched,
        table: &Table,
        is_local: &dyn Fn(IpAddr) -> bool,
    ) {
        for key in &touched.sas {
            let now = table.sa(key).map(|sa| Group::of_sa(sa, is_local));
            self.move_sa(*key, now);
        }
        for key in &touched.policies {
            let now = table.policy(key).map(Group::of_policy);
            self.move_policy(key, now);
            if key.way == Way::In {
                let twin = self.of_policy.get(&key.of_way(Way::Forward));
                self.stale.extend(twin.cloned());
            }
        }
    }

    /// The gateway's addresses are others: everything may belong elsewhere.
    pub(super) fn regroup_all(&mut self, table: &Table, is_local: &dyn Fn(IpAddr) -> bool) {
        let all = Touched {
            sas: table.sas().map(|s| s.key).collect(),
            policies: table.policies().map(|p| p.key.clone()).collect(),
            ended: HashSet::new(),
        };
        self.regroup(&all, table, is_local);
    }

    /// Makes what is stale anew.
    pub(super) fn draw(
        &mut self,
        table: &Table,
        settings: &Settings,
        is_local: &dyn Fn(IpAddr) -> bool,
        seized: &dyn Fn(&SaKey) -> Option<Seized>,
    ) -> Drawn {
        let mut drawn = Drawn::default();
        for group in self.stale.drain() {
            let Some(members) = self.groups.get_mut(&group) else {
                continue;
            };
            drawn.left_before.append(&mut members.left);
            if members.sas.is_empty() && members.policies.is_empty() {
                drawn.parts.push((members.id, Mirrored::default()));
                self.groups.remove(&group);
                continue;
            }
            let sas = table.in_order(members.sas.iter());
            let policies = table.policies_in_order(members.policies.iter());
            let Translated { part, keys, left } =
                translate(&sas, &policies, settings, is_local, seized);
            members.left = left.iter().map(|(label, _)| label.clone()).collect();
            drawn.parts.push((members.id, part));
            drawn.keys.extend(keys);
            drawn.left.extend(left);
        }
        drawn
    }

    fn move_sa(&mut self, key: SaKey, to: Option<Group>) {
        let (from, to) = moved(&mut self.of_sa, key, to);
        if let Some(from) = from {
            if let Some(members) = self.groups.get_mut(&from) {
                members.sas.remove(&key);
            }
            self.stale.insert(from);
        }
        if let Some(to) = to {
            self.members(&to).sas.insert(key);
            self.stale.insert(to);
        }
    }

    fn move_policy(&mut self, key: &PolicyKey, to: Option<Group>) {
        let (from, to) = moved(&mut self.of_policy, key.clone(), to);
        if let Some(from) = from {
            if let Some(members) = self.groups.get_mut(&from) {
                members.policies.remove(key);
            }
            self.stale.insert(from);
        }
        if let Some(to) = to {
            self.members(&to).policies.insert(key.clone());
            self.stale.insert(to);
        }
    }

    fn members(&mut self, group: &Group) -> &mut Members {
        let next = &mut self.next;
        self.groups.entry(group.clone()).or_insert_with(|| {
            *next += 1;
            Members {
                id: PartId(*next),
                sas: HashSet::new(),
                policies: HashSet::new(),
                left: Vec::new(),
            }
        })
    }
}

/// Notes the group of a member. Returns the one that it was in, and the new one.
fn moved<K: Eq + Hash>(
    all: &mut HashMap<K, Group>,
    key: K,
    to: Option<Group>,
) -> (Option<Group>, Option<Group>) {
    let from = match &to {
        Some(to) => all.insert(key, to.clone()),
        None => all.remove(&key),
    };
    (from, to)
}
