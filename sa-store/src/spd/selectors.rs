//! The selectors of one SA: what a decrypted packet must be, RFC 4301 section 5.2 step 4.

use super::cell::{Addr, Cell, Match, Rank};
use super::space::Space;
use super::verdict::{Action, PolicyIdx};
use crate::flow::FlowKey;
use crate::policy::Selector;
use crate::sa::{IfId, Vrf};

/// Above this many selectors of a family they are hashed.
const LINEAR: usize = 8;

/// Compiled [`SaSpec::selectors`](crate::sa::SaSpec::selectors). VRF and interface are not looked at: the
/// SA determines them. A non-initial fragment is accepted by selectors for any or opaque ports only.
#[derive(Clone)]
pub struct SelectorSet {
    v4: Set<u32>,
    v6: Set<u128>,
}

#[derive(Clone)]
enum Set<A> {
    Linear(Box<[Match<A>]>),
    Hashed(Space<A>),
}

impl SelectorSet {
    /// Compiles the list. One that no packet can meet (families mixed, range empty) accepts nothing.
    pub fn new(selectors: &[Selector]) -> Self {
        Self {
            v4: Set::new(selectors),
            v6: Set::new(selectors),
        }
    }

    /// Whether there is no selector, so that [`matches`](Self::matches) is always false: the SA then
    /// carries what its tunnel's policies say, see [`Spd::check_inbound`](super::Spd::check_inbound).
    pub fn is_empty(&self) -> bool {
        matches!((&self.v4, &self.v6), (Set::Linear(a), Set::Linear(b)) if a.is_empty() && b.is_empty())
    }

    /// Whether the packet is one that the SA may carry.
    #[inline]
    pub fn matches(&self, key: &FlowKey) -> bool {
        if key.is_v6() {
            self.v6.matches(key)
        } else {
            self.v4.matches(key)
        }
    }
}

impl<A: Addr> Set<A> {
    fn new(selectors: &[Selector]) -> Self {
        let all: Box<[_]> = selectors
            .iter()
            .filter_map(|s| Match::new(s, 0, 0))
            .collect();
        if all.len() <= LINEAR {
            return Self::Linear(all);
        }
        let cells: Vec<_> = (0..)
            .zip(&all)
            .map(|(label, when)| Cell {
                rank: Rank::new(0, label),
                when: *when,
                action: Action::Bypass,
                policy: PolicyIdx::DEFAULT,
            })
            .collect();
        Self::Hashed(Space::new(true).changed(&[], &cells))
    }

    #[inline]
    fn matches(&self, key: &FlowKey) -> bool {
        let key = key.with_vrf(Vrf(0)).with_if_id(IfId(0));
        match self {
            Self::Linear(all) => all.iter().any(|m| m.matches(&key)),
            Self::Hashed(space) => space.find(&key).is_some(),
        }
    }
}
