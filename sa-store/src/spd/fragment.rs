//! Non-initial fragments, see the rules in the documentation of [`super`].

use super::cell::{Addr, Cell, Rank};
use super::space::Space;
use super::verdict::{Action, Verdict};
use crate::flow::FlowKey;

/// Verdict on a fragment for which `found` is the first match in spite of what it hides.
pub(super) fn judge<A: Addr>(narrow: &Space<A>, key: &FlowKey, found: Option<&Cell<A>>) -> Verdict {
    if let Some(cell) = found
        && cell.when.is_opaque()
    {
        return cell.verdict();
    }
    let bound = found.map_or(Rank::LAST, |c| c.rank);
    let mut conflict: Option<&Cell<A>> = None;
    narrow.for_each_hidden(key, bound, |c| {
        let safe = found.is_some_and(|f| allows(f.action, c.action));
        // The first in order is named, so that the answer does not depend on the tables' layout.
        if !safe && conflict.is_none_or(|b| c.rank < b.rank) {
            conflict = Some(c);
        }
    });
    match (conflict, found) {
        (Some(c), _) => Verdict {
            action: Action::FragmentPolicy,
            policy: c.policy,
        },
        (None, Some(f)) => f.verdict(),
        (None, None) => Verdict::DEFAULT,
    }
}

/// Whether treating a packet by `taken` is as good as by `skipped`, the policy that it might belong to.
fn allows(taken: Action, skipped: Action) -> bool {
    match taken {
        Action::Discard => true,
        Action::Protect { .. } => skipped == taken || skipped == Action::Bypass,
        Action::Bypass => skipped == Action::Bypass,
        Action::FragmentPolicy | Action::Local => false,
    }
}
