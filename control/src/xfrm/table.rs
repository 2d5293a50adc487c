//! The kernel's SAs and policies as far as they are known, by what identifies them.

use std::collections::{HashMap, HashSet};

use super::audit::Meanwhile;
use super::message::{Change, KernelPolicy, KernelSa, PolicyKey, SaKey, Way};

/// What the kernel holds.
#[derive(Debug, Default)]
pub(super) struct Table {
    sas: HashMap<SaKey, Numbered<KernelSa>>,
    policies: HashMap<PolicyKey, Numbered<KernelPolicy>>,
    next: u64,
    touched: Touched,
}

/// What has changed.
#[derive(Clone, Debug, Default)]
pub(super) struct Touched {
    pub(super) sas: HashSet<SaKey>,
    pub(super) policies: HashSet<PolicyKey>,
    /// SAs that ended; some of them may have come again.
    pub(super) ended: HashSet<SaKey>,
}

/// With the order in which they came: of two SAs for one policy the kernel sends on the later one, of two policies of
/// one priority the earlier one decides.
#[derive(Debug)]
struct Numbered<T> {
    order: u64,
    what: T,
}

impl Touched {
    pub(super) fn is_empty(&self) -> bool {
        self.sas.is_empty() && self.policies.is_empty() && self.ended.is_empty()
    }

    fn end_of(&mut self, key: SaKey) {
        self.sas.insert(key);
        self.ended.insert(key);
    }
}

impl Table {
    /// Takes news in.
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Sa(sa) => self.put_sa(*sa),
            Change::SaGone(key) => {
                if self.sas.remove(&key).is_some() {
                    self.touched.end_of(key);
                }
            }
            Change::SaExpired { dst, spi } => {
                self.end_sas(|k| (k.dst, k.spi) == (dst, spi));
            }
            Change::SasFlushed => self.end_sas(|_| true),
            Change::Policy(policy) => self.put_policy(*policy),
            Change::PolicyGone(key) => {
                if self.policies.remove(&key).is_some() {
                    self.touched.policies.insert(key);
                }
            }
            Change::PoliciesFlushed => {
                let gone = std::mem::take(&mut self.policies);
                self.touched.policies.extend(gone.into_keys());
            }
        }
    }

    /// What changed since this was last asked.
    pub(super) fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// Takes a dump for the whole truth. What was known keeps its order; the rest comes by age, then as dumped.
    pub(super) fn replace(&mut self, sas: Vec<KernelSa>, policies: Vec<KernelPolicy>) {
        self.replace_but(sas, policies, &Meanwhile::default());
    }

    /// The same for a dump that took its time: what was told of `meanwhile` is newer than the dump.
    pub(super) fn replace_but(
        &mut self,
        mut sas: Vec<KernelSa>,
        policies: Vec<KernelPolicy>,
        meanwhile: &Meanwhile,
    ) {
        sas.retain(|s| !meanwhile.of_sa(&s.key));
        sas.sort_by_key(|s| s.carried.add_time);
        let listed: HashSet<_> = sas.iter().map(|s| s.key).collect();
        self.end_sas(|k| !listed.contains(k) && !meanwhile.of_sa(k));
        for sa in sas {
            self.put_sa(sa);
        }
        let listed: HashSet<_> = policies.iter().map(|p| p.key.clone()).collect();
        let gone = |k: &PolicyKey| !listed.contains(k) && !meanwhile.of_policy(k);
        let gone: Vec<_> = self.policies.keys().filter(|k| gone(k)).cloned().collect();
        for key in gone {
            self.apply(Change::PolicyGone(key));
        }
        for policy in policies {
            if !meanwhile.of_policy(&policy.key) {
                self.put_policy(policy);
            }
        }
    }

    fn put_sa(&mut self, sa: KernelSa) {
        let old = self.sas.get(&sa.key);
        if old.is_none_or(|o| !o.what.means_the_same(&sa)) {
            self.touched.sas.insert(sa.key);
        }
        let order = match old {
            Some(old) => old.order,
            None => self.number(),
        };
        self.sas.insert(sa.key, Numbered { order, what: sa });
    }

    fn put_policy(&mut self, policy: KernelPolicy) {
        let old = self.policies.get(&policy.key);
        if old.is_some_and(|o| o.what == policy) {
            return;
        }
        self.touched.policies.insert(policy.key.clone());
        // The kernel puts one whose priority changes behind all others of that priority.
        let stays = old.filter(|o| o.what.priority == policy.priority);
        let order = match stays {
            Some(old) => old.order,
            None => self.number(),
        };
        let what = policy;
        self.policies
            .insert(what.key.clone(), Numbered { order, what });
    }

    fn end_sas(&mut self, which: impl Fn(&SaKey) -> bool) {
        let touched = &mut self.touched;
        self.sas.retain(|k, _| {
            let ends = which(k);
            if ends {
                touched.end_of(*k);
            }
            !ends
        });
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// All SAs.
    pub(super) fn sas(&self) -> impl Iterator<Item = &KernelSa> {
        self.sas.values().map(|n| &n.what)
    }

    /// All policies.
    pub(super) fn policies(&self) -> impl Iterator<Item = &KernelPolicy> {
        self.policies.values().map(|n| &n.what)
    }

    pub(super) fn sa(&self, key: &SaKey) -> Option<&KernelSa> {
        self.sas.get(key).map(|n| &n.what)
    }

    pub(super) fn policy(&self, key: &PolicyKey) -> Option<&KernelPolicy> {
        self.policies.get(key).map(|n| &n.what)
    }

    /// Those of these SAs that exist, the latest last.
    pub(super) fn in_order<'s>(
        &'s self,
        keys: impl Iterator<Item = &'s SaKey>,
    ) -> Vec<&'s KernelSa> {
        let mut list: Vec<_> = keys.filter_map(|k| self.sas.get(k)).collect();
        list.sort_by_key(|n| n.order);
        list.into_iter().map(|n| &n.what).collect()
    }

    /// Those of these policies that exist, in the order in which the kernel looks at them, with their number among those
    /// of one priority. A policy for forwarded packets is left out when there is one for received packets: a gateway here
    /// has one inbound SPD.
    pub(super) fn policies_in_order<'s>(
        &'s self,
        keys: impl Iterator<Item = &'s PolicyKey>,
    ) -> Vec<(u64, &'s KernelPolicy)> {
        let has_twin = |p: &KernelPolicy| {
            p.key.way == Way::Forward && self.policies.contains_key(&p.key.of_way(Way::In))
        };
        let mut list: Vec<_> = keys
            .filter_map(|k| self.policies.get(k))
            .filter(|n| !has_twin(&n.what))
            .collect();
        list.sort_by_key(|n| (n.what.priority, n.order));
        list.into_iter().map(|n| (n.order, &n.what)).collect()
    }
}

impl PolicyKey {
    /// The same traffic's, for packets on another way.
    pub(super) fn of_way(&self, way: Way) -> Self {
        Self {
            way,
            ..self.clone()
        }
    }
}

impl KernelSa {
    /// Equal but for what the kernel counts.
    fn means_the_same(&self, other: &KernelSa) -> bool {
        let mut other = other.clone();
        (other.sent, other.received, other.carried) = (self.sent, self.received, self.carried);
        *self == other
    }
}
