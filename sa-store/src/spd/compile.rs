//! From a policy of the file to cells of the tables.

use std::sync::Arc;

use super::cell::{Addr, Cell, Match, Rank};
use super::verdict::{Action, PolicyIdx, TunnelIdx};
use super::{Family, Spd};
use crate::policy::{self, Policy, Ports, Selector};

/// Why policies cannot be compiled; each is the operator's (or IKE daemon's) to correct.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdError {
    /// Names must be unique within a direction: counters and updates go by them.
    #[error("policy {policy}: the name is used twice")]
    DuplicateName {
        /// The policy.
        policy: String,
    },
    /// The policy to be removed does not exist.
    #[error("there is no policy {policy}")]
    NoSuchPolicy {
        /// The policy.
        policy: String,
    },
    /// The tunnel that the policy names does not exist.
    #[error("policy {policy}: there is no tunnel {tunnel}")]
    UnknownTunnel {
        /// The policy.
        policy: String,
        /// The tunnel.
        tunnel: String,
    },
    /// Source and destination of a selector must be of one address family.
    #[error("policy {policy}: selector {index} mixes IPv4 and IPv6")]
    MixedFamilies {
        /// The policy.
        policy: String,
        /// Which selector, from 0.
        index: usize,
    },
    /// A range of ports, types or codes must not end before it starts.
    #[error("policy {policy}: selector {index} has an empty range of ports, types or codes")]
    EmptyRange {
        /// The policy.
        policy: String,
        /// Which selector, from 0.
        index: usize,
    },
}

impl SpdError {
    /// The policy at fault.
    pub fn policy(&self) -> &str {
        match self {
            Self::DuplicateName { policy }
            | Self::NoSuchPolicy { policy }
            | Self::UnknownTunnel { policy, .. }
            | Self::MixedFamilies { policy, .. }
            | Self::EmptyRange { policy, .. } => policy,
        }
    }
}

/// A policy with all that look-up and updates need.
pub(super) struct Item {
    pub(super) id: PolicyIdx,
    pub(super) rank: Rank,
    pub(super) action: Action,
    pub(super) policy: Policy,
}

/// Cells to take out of and to put into the tables.
#[derive(Default)]
pub(super) struct Delta {
    v4: Half<u32>,
    v6: Half<u128>,
}

struct Half<A> {
    out: Vec<Cell<A>>,
    new: Vec<Cell<A>>,
}

impl<A> Default for Half<A> {
    fn default() -> Self {
        Self {
            out: Vec::new(),
            new: Vec::new(),
        }
    }
}

/// The compiled action of a policy.
pub(super) fn resolve(
    p: &Policy,
    tunnel: &impl Fn(&str) -> Option<TunnelIdx>,
) -> Result<Action, SpdError> {
    Ok(match &p.action {
        policy::Action::Bypass => Action::Bypass,
        policy::Action::Discard => Action::Discard,
        policy::Action::Protect { tunnel: name } => Action::Protect {
            tunnel: tunnel(name).ok_or_else(|| SpdError::UnknownTunnel {
                policy: p.name.clone(),
                tunnel: name.clone(),
            })?,
        },
    })
}

/// Checks what the types of [`Selector`] leave open.
pub(super) fn validate(p: &Policy) -> Result<(), SpdError> {
    for (index, s) in p.selectors.iter().enumerate() {
        if s.src.first().is_ipv4() != s.dst.first().is_ipv4() {
            return Err(SpdError::MixedFamilies {
                policy: p.name.clone(),
                index,
            });
        }
        if has_empty_range(s) {
            return Err(SpdError::EmptyRange {
                policy: p.name.clone(),
                index,
            });
        }
    }
    Ok(())
}

fn has_empty_range(s: &Selector) -> bool {
    match &s.ports {
        Ports::Any | Ports::Opaque => false,
        Ports::Range { src, dst } => src.is_empty() || dst.is_empty(),
        Ports::Icmp { kind, code } => kind.is_empty() || code.is_empty(),
    }
}

impl Delta {
    pub(super) fn remove(&mut self, item: &Item) {
        cells(item, &mut self.v4.out);
        cells(item, &mut self.v6.out);
    }

    pub(super) fn add(&mut self, item: &Arc<Item>) {
        cells(item, &mut self.v4.new);
        cells(item, &mut self.v6.new);
    }

    pub(super) fn apply(&self, spd: &mut Spd) {
        self.v4.apply(&mut spd.v4);
        self.v6.apply(&mut spd.v6);
    }
}

impl<A: Addr> Half<A> {
    fn apply(&self, family: &mut Family<A>) {
        if self.out.is_empty() && self.new.is_empty() {
            return;
        }
        family.main = family.main.changed(&self.out, &self.new);
        let narrow = |cells: &[Cell<A>]| -> Vec<Cell<A>> {
            cells
                .iter()
                .filter(|c| c.when.is_narrow())
                .copied()
                .collect()
        };
        family.narrow = family
            .narrow
            .changed(&narrow(&self.out), &narrow(&self.new));
    }
}

fn cells<A: Addr>(item: &Item, to: &mut Vec<Cell<A>>) {
    let (vrf, if_id) = (item.policy.vrf.0, item.policy.if_id.0);
    to.extend(item.policy.selectors.iter().filter_map(|s| {
        let when = Match::new(s, vrf, if_id)?;
        Some(Cell {
            rank: item.rank.of_selector(when.is_opaque()),
            when,
            action: item.action,
            policy: item.id,
        })
    }));
}
