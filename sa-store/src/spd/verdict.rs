//! What a look-up answers.

use crate::drops::DropReason;

/// Position of a tunnel in the snapshot's tunnel table; a name keeps its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TunnelIdx(pub u32);

/// Stable number of a policy: it keeps it over reloads as long as a policy of that name exists, so that
/// hit counters can be arrays. Small and dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyIdx(pub u32);

impl PolicyIdx {
    /// No policy matched: the default discard at the end of every SPD.
    pub const DEFAULT: Self = Self(0);

    /// As an array index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Carry in this tunnel.
    Protect {
        /// The tunnel.
        tunnel: TunnelIdx,
    },
    /// Forward in the clear.
    Bypass,
    /// Drop: a policy says so, or none matched.
    Discard,
    /// Drop: a non-initial fragment that an earlier policy could have treated differently, had its ports
    /// been visible (RFC 4301 section 7).
    FragmentPolicy,
    /// For the gateway itself: it does not cross the boundary, so no policy is asked. Never an answer of the SPD; the
    /// data path notes it for a flow.
    Local,
}

/// Answer of [`Spd::lookup`](super::Spd::lookup).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub action: Action,
    /// Which policy says so; for [`Action::FragmentPolicy`] the one that could have matched.
    pub policy: PolicyIdx,
}

impl Default for Verdict {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Verdict {
    /// No policy matched.
    pub const DEFAULT: Self = Self {
        action: Action::Discard,
        policy: PolicyIdx::DEFAULT,
    };

    /// Judges an inbound packet whose look-up in the inbound SPD gave this verdict, RFC 4301 section 5.2.
    /// `via` is the tunnel whose SA decrypted it, `None` for clear text.
    pub fn inbound(self, via: Option<TunnelIdx>) -> InboundVerdict {
        let policy = self.policy;
        let drop = |reason| InboundVerdict::Drop { reason, policy };
        match (self.action, via) {
            (Action::Bypass, None) => InboundVerdict::Accept { policy },
            (Action::Protect { tunnel }, Some(t)) if t == tunnel => {
                InboundVerdict::Accept { policy }
            }
            (Action::Protect { .. }, None) => drop(DropReason::PolicyMustProtect),
            (Action::FragmentPolicy, _) => drop(DropReason::FragmentPolicy),
            (Action::Discard | Action::Local, None) => drop(DropReason::PolicyDiscard),
            // An explicit discard is the operator's word; no policy at all means that the peer sent
            // through this SA what it was not negotiated for.
            (Action::Discard, Some(_)) if policy != PolicyIdx::DEFAULT => {
                drop(DropReason::PolicyDiscard)
            }
            (
                Action::Protect { .. } | Action::Bypass | Action::Discard | Action::Local,
                Some(_),
            ) => drop(DropReason::SelectorMismatch),
        }
    }
}

/// Answer of [`Spd::check_inbound`](super::Spd::check_inbound).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InboundVerdict {
    /// Policy allows it to go on.
    Accept {
        /// The policy that matched.
        policy: PolicyIdx,
    },
    /// Drop.
    Drop {
        /// Why.
        reason: DropReason,
        /// The policy that matched.
        policy: PolicyIdx,
    },
}
