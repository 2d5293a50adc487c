//! One tunnel's rekey.

use sa_store::runtime::TunnelIdx;
use sa_store::sa::SaId;

use super::Timing;
use super::terms::{Reason, Spent, Step, World};

/// Where a tunnel is in its rekey.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is under way.
    #[default]
    Steady,
    /// Until every worker has the publication with the successor.
    Workers {
        /// The publication.
        epoch: u64,
    },
    /// Until the peer has had its time.
    Peer {
        /// Gateway clock.
        until: u64,
    },
    /// Until no worker has the old sender in its hands.
    Switched {
        /// The publication of the switch.
        epoch: u64,
        /// What the peer still has of its time then; the overlap begins after it.
        grace: u64,
    },
}

/// An SA that is installed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) sa: SaId,
    /// Named by the files.
    pub(super) wanted: bool,
    /// Since when it is superseded; inbound only.
    pub(super) since: Option<u64>,
}

/// The wish for a successor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) sa: SaId,
    pub(super) reason: Reason,
    pub(super) overdue: bool,
    pub(super) attempts: u32,
    pub(super) next: u64,
}

impl Wish {
    /// One more attempt.
    pub(super) fn ask(&mut self, tunnel: TunnelIdx, steps: &mut Vec<Step>) {
        self.attempts = self.attempts.saturating_add(1);
        steps.push(Step::Ask {
            tunnel,
            sa: self.sa,
            reason: self.reason,
            attempt: self.attempts,
        });
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Tunnel {
    pub(super) inbound: Vec<Held>,
    pub(super) outbound: Vec<Held>,
    pub(super) sender: Option<SaId>,
    pub(super) target: Option<SaId>,
    pub(super) phase: Phase,
    pub(super) wish: Option<Wish>,
}

/// The facts of one step.
pub(super) struct Moment<'m> {
    pub(super) timing: &'m Timing,
    pub(super) now: u64,
    pub(super) acknowledged: u64,
    pub(super) epoch: u64,
    pub(super) world: &'m dyn World,
}

/// Brings the list in line with what is installed. Whether a new SA came in.
pub(super) fn renew(list: &mut Vec<Held>, wanted: &[SaId], held: &[SaId], inbound: bool) -> bool {
    list.retain_mut(|h| {
        h.wanted = wanted.contains(&h.sa);
        if h.wanted {
            h.since = None;
        }
        h.wanted || held.contains(&h.sa)
    });
    let before = list.len();
    for sa in wanted {
        if !list.iter().any(|h| h.sa == *sa) {
            list.push(Held {
                sa: *sa,
                wanted: true,
                since: None,
            });
        }
    }
    inbound && list.len() > before
}

impl Tunnel {
    /// On to the switch.
    pub(super) fn advance(&mut self, tunnel: TunnelIdx, at: &Moment<'_>, steps: &mut Vec<Step>) {
        if let Phase::Workers { epoch } = self.phase
            && at.acknowledged >= epoch
        {
            self.phase = Phase::Peer {
                until: at.now.saturating_add(at.timing.switch_delay),
            };
        }
        if let Phase::Peer { until } = self.phase
            && let Some(to) = self.target
        {
            // With a sender that carries nothing there is nothing to lose by an early switch; to a successor that came
            // to its end while it waited there is all to lose.
            let dead = |sa| at.world.spent(sa).dead;
            if self.sender.is_none_or(dead) || (at.now >= until && !dead(to)) {
                steps.push(Step::Switch {
                    tunnel,
                    from: self.sender,
                    to,
                });
                self.sender = Some(to);
                self.phase = Phase::Switched {
                    epoch: at.epoch,
                    grace: until.saturating_sub(at.now),
                };
                return;
            }
        }
        if let Phase::Switched { epoch, grace } = self.phase
            && at.acknowledged >= epoch
        {
            self.phase = Phase::Steady;
            let sender = self.sender;
            self.outbound.retain(|o| {
                let old = !o.wanted && Some(o.sa) != sender;
                if old {
                    steps.push(Step::Remove {
                        tunnel,
                        sa: o.sa,
                        cut: false,
                    });
                }
                !old
            });
            for i in self.inbound.iter_mut().filter(|i| !i.wanted) {
                i.since.get_or_insert(at.now.saturating_add(grace));
            }
        }
    }

    /// Inbound SAs whose overlap is over.
    pub(super) fn remove_old(&mut self, tunnel: TunnelIdx, at: &Moment<'_>, steps: &mut Vec<Step>) {
        let timing = at.timing;
        self.inbound.retain(|i| {
            let Some(since) = i.since else { return true };
            let age = at.now.saturating_sub(since);
            if age < timing.overlap {
                return true;
            }
            let idle = at.now.saturating_sub(at.world.last_packet(i.sa));
            let quiet = idle >= timing.quiet || at.world.spent(i.sa).dead;
            let cut = !quiet && age >= timing.overlap_max;
            if quiet || cut {
                steps.push(Step::Remove {
                    tunnel,
                    sa: i.sa,
                    cut,
                });
            }
            !(quiet || cut)
        });
    }

    /// SAs whose successor is wanted: the one to send, and the inbound one with most of its life left when all of
    /// them are spent. Those that wait for their time to send are not, unless they have come to their end: their own
    /// successors would wait as long again, and with limits shorter than the wait nothing would ever switch.
    fn spent(&self, world: &dyn World) -> [Option<(SaId, Reason, Spent)>; 2] {
        let waits = matches!(self.phase, Phase::Workers { .. } | Phase::Peer { .. });
        let of = |sa: SaId| {
            let s = world.spent(sa);
            let reason = s.reason.filter(|_| !waits || s.dead);
            reason.map(|r| (sa, r, s))
        };
        let mut inbound: Option<(SaId, Reason, Spent)> = None;
        for i in self.inbound.iter().filter(|i| i.wanted) {
            let Some(s) = of(i.sa) else {
                inbound = None;
                break;
            };
            if inbound.is_none_or(|b| s.2.permille < b.2.permille) {
                inbound = Some(s);
            }
        }
        [self.target.and_then(of), inbound]
    }

    /// Begins, keeps or ends the wish for a successor.
    pub(super) fn renew_wish(&mut self, tunnel: TunnelIdx, at: &Moment<'_>, steps: &mut Vec<Step>) {
        let spent = self.spent(at.world);
        let mut needs = spent.iter().flatten();
        if let Some(old) = self.wish
            && !needs.clone().any(|n| n.0 == old.sa)
        {
            self.wish = None;
            steps.push(Step::Renewed { tunnel });
        }
        let Some((sa, reason, _)) = needs.next() else {
            return;
        };
        let wish = self.wish.get_or_insert_with(|| {
            steps.push(Step::Expired {
                tunnel,
                sa: *sa,
                reason: *reason,
            });
            Wish {
                sa: *sa,
                reason: *reason,
                overdue: false,
                attempts: 0,
                next: at.now,
            }
        });
        let late =
            |s: &(SaId, Reason, Spent)| s.2.dead || s.2.permille >= at.timing.overdue_permille;
        if !wish.overdue && spent.iter().flatten().any(late) {
            wish.overdue = true;
            steps.push(Step::Overdue {
                tunnel,
                sa: wish.sa,
                reason: wish.reason,
            });
        }
    }

    /// It has no SA, and nothing is wished for it.
    pub(super) fn is_gone(&self) -> bool {
        self.inbound.is_empty() && self.outbound.is_empty() && self.wish.is_none()
    }

    /// Nothing is to be done until something happens.
    pub(super) fn rests(&self) -> bool {
        let overlaps = self.inbound.iter().any(|i| !i.wanted);
        self.phase == Phase::Steady && self.wish.is_none() && !overlaps
    }
}
