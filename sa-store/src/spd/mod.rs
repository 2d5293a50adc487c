//! Security policy database of one direction, RFC 4301 section 4.4.1: compiled, immutable, shared by all
//! workers through the snapshot.
//!
//! Policies are looked at in the order of priority, then of the file; the first that matches decides and
//! the end of the list discards. The cost of a look-up depends on how many *shapes* of selectors there
//! are (prefix lengths, whether protocol and ports are given), not on how many policies. An update makes
//! a new table that shares all unchanged parts with the one before, and moves the generation of those
//! regions of destinations alone that changed policies reach, so that cached verdicts elsewhere stay good.
//!
//! # Non-initial fragments (RFC 4301 section 7)
//!
//! They show no ports, so a policy with ports, or with ICMP types, never matches one. What they fall to
//! instead decides whether that is safe:
//!
//! * a policy for `Ports::Opaque` is the operator's word on fragments: it applies;
//! * a policy for `Ports::Any` applies if every earlier policy that could have matched, had the ports
//!   been visible, would have treated the packet the same, or merely bypassed what is now protected or
//!   discarded;
//! * otherwise (something earlier might have protected it in another tunnel, or discarded it, or it
//!   would have to be bypassed because its ports cannot be checked) it is dropped as
//!   [`Action::FragmentPolicy`].
//!
//! An IPv6 fragment that hides its protocol too is treated the same with regard to policies that name one.

mod cell;
mod compile;
mod cover;
mod fragment;
mod items;
mod labels;
#[cfg(test)]
mod reference;
mod regions;
mod selectors;
mod space;
mod update;
mod verdict;

pub use compile::SpdError;
pub use selectors::SelectorSet;
pub use update::{Changes, Edit};
pub use verdict::{Action, InboundVerdict, PolicyIdx, TunnelIdx, Verdict};

use crate::flow::FlowKey;
use crate::policy::Policy;
use crate::sa::Direction;
pub(crate) use cell::fold;
use items::Items;
use regions::Regions;
use space::Space;

/// Compiled policies of one direction.
#[derive(Clone)]
pub struct Spd {
    direction: Direction,
    v4: Family<u32>,
    v6: Family<u128>,
    regions: Regions,
    items: Items,
    ids: update::Ids,
}

/// Selectors of one address family.
#[derive(Clone)]
struct Family<A> {
    main: Space<A>,
    /// Those that a fragment may fail for what it hides, by addresses alone.
    narrow: Space<A>,
}

impl Spd {
    /// No policy at all: everything is discarded.
    pub fn empty(direction: Direction) -> Self {
        Self {
            direction,
            v4: Family::new(),
            v6: Family::new(),
            regions: Regions::new(),
            items: Items::new(),
            ids: update::Ids::default(),
        }
    }

    /// Compiles the policies of `direction`, in file order; others are ignored. `tunnel` gives the number
    /// of a tunnel by its name.
    ///
    /// # Errors
    /// See [`SpdError`].
    pub fn build(
        direction: Direction,
        policies: &[Policy],
        tunnel: impl Fn(&str) -> Option<TunnelIdx>,
    ) -> Result<Self, SpdError> {
        Ok(Self::empty(direction).updated(policies, tunnel)?.0)
    }

    /// What policy says of the packet.
    #[inline]
    pub fn lookup(&self, key: &FlowKey) -> Verdict {
        if key.is_v6() {
            self.v6.lookup(key)
        } else {
            self.v4.lookup(key)
        }
    }

    /// Look-up of a burst: `out[i]` is the verdict of `keys[i]`. Stops at the shorter of the two.
    pub fn lookup_batch(&self, keys: &[FlowKey], out: &mut [Verdict]) {
        for (k, v) in keys.iter().zip(out) {
            *v = self.lookup(k);
        }
    }

    /// Judges an inbound packet, RFC 4301 section 5.2: clear text (`via` is `None`) must be allowed to
    /// come so; what a tunnel's SA decrypted must match a policy that names this tunnel.
    #[inline]
    pub fn check_inbound(&self, key: &FlowKey, via: Option<TunnelIdx>) -> InboundVerdict {
        self.lookup(key).inbound(via)
    }

    /// A cached verdict holds as long as this is what it was at the look-up. Values are never reused
    /// within the process, not even by a table that was built from nothing.
    #[inline]
    pub fn generation(&self, key: &FlowKey) -> u32 {
        self.regions.generation(key)
    }

    /// Direction that the table is for.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Number of policies, the default discard not counted.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is nothing but the default discard.
    pub fn is_empty(&self) -> bool {
        self.items.len() == 0
    }

    /// Policies in the order of look-up (priority, then file) with their numbers.
    pub fn policies(&self) -> impl Iterator<Item = (PolicyIdx, &Policy)> {
        self.items.iter().map(|i| (i.id, &i.policy))
    }

    /// Policy of a number; takes time in proportion to the number of policies.
    pub fn policy(&self, idx: PolicyIdx) -> Option<&Policy> {
        self.policies().find(|(i, _)| *i == idx).map(|(_, p)| p)
    }

    /// One more than the largest [`PolicyIdx`] given so far: the length of an array of hit counters.
    pub fn policy_slots(&self) -> usize {
        self.ids.slots()
    }

    /// Size of the compiled form, for `policy list` and metrics.
    pub fn shape(&self) -> SpdShape {
        SpdShape {
            tables: self.v4.main.tables() + self.v6.main.tables(),
            cells: self.v4.main.cells() + self.v6.main.cells(),
        }
    }
}

impl std::fmt::Debug for Spd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spd")
            .field("direction", &self.direction)
            .field("policies", &self.len())
            .finish_non_exhaustive()
    }
}

/// Size of a compiled table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpdShape {
    /// Hash tables, of both families; a look-up probes at most those of one.
    pub tables: usize,
    /// Compiled selectors: one per policy, selector and block of addresses.
    pub cells: usize,
}

impl<A: cell::Addr> Family<A> {
    const fn new() -> Self {
        Self {
            main: Space::new(true),
            narrow: Space::new(false),
        }
    }

    #[inline]
    fn lookup(&self, key: &FlowKey) -> Verdict {
        let found = self.main.find(key);
        if key.is_opaque() {
            return fragment::judge(&self.narrow, key, found);
        }
        found.map_or(Verdict::DEFAULT, cell::Cell::verdict)
    }
}

#[cfg(test)]
mod tests;
