//! A small world: one tunnel, our gateway with the machine, and a peer that keeps to the contract and no more.

use std::collections::HashMap;

use sa_store::runtime::TunnelIdx;
use sa_store::sa::SaId;

use crate::rekey::Timing;
use crate::rekey::machine::Machine;
use crate::rekey::terms::{Published, Reason, Spent, Step, Wanted, World};

pub(super) const T: TunnelIdx = TunnelIdx(0);

pub(super) fn sa(index: u32) -> SaId {
    SaId {
        index,
        generation: 1,
    }
}

/// What the core is told of SAs.
#[derive(Clone, Default)]
pub(super) struct Facts {
    pub(super) spent: HashMap<SaId, Spent>,
    pub(super) last: HashMap<SaId, u64>,
}

impl World for Facts {
    fn spent(&self, sa: SaId) -> Spent {
        self.spent.get(&sa).copied().unwrap_or_default()
    }
    fn last_packet(&self, sa: SaId) -> u64 {
        self.last.get(&sa).copied().unwrap_or(0)
    }
}

/// The files of one tunnel: generations of pairs, in order. Inbound SA of generation g is `2g`, outbound `2g + 1`.
pub(super) fn inbound(g: u32) -> SaId {
    sa(2 * g)
}
pub(super) fn outbound(g: u32) -> SaId {
    sa(2 * g + 1)
}

/// What is installed, as the store would have it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Installed {
    pub(super) sas: Vec<SaId>,
    pub(super) sender: Option<SaId>,
}

/// Applies files with the pairs `named` as the installer does.
pub(super) fn files(m: &mut Machine, state: &mut Installed, named: &[u32], epoch: u64) {
    let wanted: Vec<SaId> = named
        .iter()
        .flat_map(|g| [inbound(*g), outbound(*g)])
        .collect();
    let dropped = |out: bool| {
        let all = state.sas.iter().copied();
        all.filter(|s| !wanted.contains(s) && (s.index % 2 == 1) == out)
            .collect::<Vec<_>>()
    };
    let target = named.last().map(|g| outbound(*g));
    let hold = m.hold(
        T,
        &Wanted {
            dropped_in: dropped(false),
            dropped_out: dropped(true),
            inbound: !named.is_empty(),
            target: target.map(|t| state.sas.contains(&t).then_some(t)),
        },
    );
    state.sas = wanted.iter().chain(&hold.keep).copied().collect();
    state.sas.sort();
    state.sender = hold.sender.or(target);
    let of = |out: u32| {
        let all = wanted.iter().copied();
        all.filter(|s| s.index % 2 == out).collect::<Vec<_>>()
    };
    m.published(
        T,
        &Published {
            inbound: of(0),
            outbound: of(1),
            held: hold.keep,
            sender: state.sender,
            target,
        },
        epoch,
    );
}

/// Our gateway with the machine, and a peer that keeps to the contract: it has its inbound SA of a generation `DELAY`
/// after all our workers have ours, sends on a generation as soon as we have published it, and leaves it `DELAY` and
/// `OVERLAP` after we were ready for the next one, or goes on and is cut off.
#[derive(Clone)]
pub(super) struct Small {
    pub(super) machine: Machine,
    pub(super) state: Installed,
    pub(super) facts: Facts,
    pub(super) now: u64,
    pub(super) epoch: u64,
    pub(super) acknowledged: u64,
    /// Newest pair in the files, and whether the one before is named too.
    pub(super) newest: u32,
    pub(super) both: bool,
    /// Generation on which the peer sends, and since when it has had something newer to send on.
    pub(super) peer_sends: u32,
    /// When all workers had the inbound SA of each generation.
    pub(super) ready: Vec<Option<(u64, u64)>>,
}

pub(super) const DELAY: u64 = 1;
pub(super) const OVERLAP: u64 = 2;
pub(super) const QUIET: u64 = 1;
pub(super) const OVERLAP_MAX: u64 = 4;
pub(super) const GENERATIONS: u32 = 3;

pub(super) fn timing() -> Timing {
    Timing {
        switch_delay: DELAY,
        overlap: OVERLAP,
        quiet: QUIET,
        overlap_max: OVERLAP_MAX,
        overdue_permille: 500,
        attempts_at_once: 1,
        retry: 2,
        retry_max: 4,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happens {
    /// Time goes on by one, and control looks.
    Tick,
    /// The worker acknowledges the present publication.
    Acknowledge,
    /// Files name a successor, and the one before or not.
    Successor { both: bool },
    /// Files that named two name one.
    Forget,
    /// The SA that sends, or the one that waits to send, reaches its soft limit.
    Soft { waits: bool },
    /// Or its end.
    Hard { waits: bool },
    /// The peer switches to a newer SA.
    PeerSwitches { to: u32 },
    /// A packet of the peer arrives.
    Packet,
}

impl Small {
    pub(super) fn new() -> Self {
        let mut s = Self {
            machine: Machine::new(timing()),
            state: Installed::default(),
            facts: Facts::default(),
            now: 10,
            epoch: 1,
            acknowledged: 1,
            newest: 0,
            both: false,
            peer_sends: 0,
            ready: vec![Some((1, 0))],
        };
        files(&mut s.machine, &mut s.state, &[0], 1);
        s
    }

    /// By contract: as soon as we have published our inbound SA, and as long as the peer has nothing newer, or has had
    /// its time with that.
    pub(super) fn may_send_on(&self, g: u32) -> bool {
        let next = self.ready.get(g as usize + 1).copied().flatten();
        next.is_none_or(|(_, at)| at == 0 || self.now < at + DELAY + OVERLAP)
    }

    /// The SA that sends, or the one that waits to.
    pub(super) fn limited(&self, waits: bool) -> Option<SaId> {
        let newest = Some(outbound(self.newest));
        if waits {
            newest.filter(|_| self.state.sender != newest)
        } else {
            self.state.sender
        }
    }

    pub(super) fn possible(&self) -> Vec<Happens> {
        let mut all = vec![Happens::Tick];
        if self.acknowledged < self.epoch {
            all.push(Happens::Acknowledge);
        }
        if self.newest + 1 < GENERATIONS {
            all.push(Happens::Successor { both: false });
            all.push(Happens::Successor { both: true });
        }
        if self.both {
            all.push(Happens::Forget);
        }
        for waits in [false, true] {
            let Some(spent) = self.limited(waits).map(|s| self.facts.spent(s)) else {
                continue;
            };
            if spent.reason.is_none() {
                all.push(Happens::Soft { waits });
            } else if !spent.dead {
                all.push(Happens::Hard { waits });
            }
        }
        for to in self.peer_sends + 1..=self.newest {
            if self.may_send_on(to) {
                all.push(Happens::PeerSwitches { to });
            }
        }
        if self.facts.last_packet(inbound(self.peer_sends)) < self.now {
            all.push(Happens::Packet);
        }
        all
    }

    pub(super) fn happen(&mut self, what: Happens) {
        match what {
            Happens::Tick => {
                self.now += 1;
                self.look();
            }
            Happens::Acknowledge => {
                self.acknowledged = self.epoch;
                for r in self.ready.iter_mut().flatten() {
                    if r.1 == 0 && self.acknowledged >= r.0 {
                        r.1 = self.now;
                    }
                }
            }
            Happens::Successor { both } => {
                self.newest += 1;
                self.both = both;
                self.epoch += 1;
                self.ready.push(Some((self.epoch, 0)));
                self.files();
            }
            Happens::Forget => {
                self.both = false;
                self.epoch += 1;
                self.files();
            }
            Happens::Soft { waits } | Happens::Hard { waits } => {
                let dead = matches!(what, Happens::Hard { .. });
                if let Some(s) = self.limited(waits) {
                    let spent = Spent {
                        reason: Some(Reason::Packets),
                        permille: if dead { 1000 } else { 0 },
                        dead,
                    };
                    self.facts.spent.insert(s, spent);
                    self.machine.attend(T);
                }
            }
            Happens::PeerSwitches { to } => self.peer_sends = to,
            Happens::Packet => {
                let on = inbound(self.peer_sends);
                assert!(
                    self.state.sas.contains(&on),
                    "the peer sends on {on:?}, which is not installed: {:?}",
                    self.state
                );
                self.facts.last.insert(on, self.now);
            }
        }
        self.check();
    }

    pub(super) fn files(&mut self) {
        let named: Vec<u32> = if self.both {
            vec![self.newest - 1, self.newest]
        } else {
            vec![self.newest]
        };
        files(&mut self.machine, &mut self.state, &named, self.epoch);
    }

    pub(super) fn look(&mut self) {
        let next = self.epoch + 1;
        let before = self.state.sender;
        let old_dead = before.is_some_and(|s| self.facts.spent(s).dead);
        let steps = self
            .machine
            .step(self.now, self.acknowledged, next, &self.facts);
        let mut published = false;
        for step in steps {
            match step {
                Step::Switch { from, to, .. } => {
                    published = true;
                    assert_eq!(from, before, "one sender at a time");
                    assert!(self.state.sas.contains(&to), "{to:?} is not installed");
                    let g = (to.index / 2) as usize;
                    let (epoch, at) = self.ready[g].unwrap();
                    assert!(
                        self.acknowledged >= epoch,
                        "before every worker has its pair"
                    );
                    assert!(
                        old_dead || self.now >= at + DELAY,
                        "before the peer had its time: at {at}, now {}",
                        self.now
                    );
                    assert!(
                        old_dead || !self.facts.spent(to).dead,
                        "from an SA that carries packets to one that does not"
                    );
                    self.state.sender = Some(to);
                }
                Step::Remove { sa, cut, .. } => {
                    published = true;
                    assert_ne!(Some(sa), self.state.sender, "the sender was removed");
                    assert!(self.state.sas.contains(&sa), "{sa:?} removed twice");
                    if sa.index % 2 == 0 {
                        let idle = self.now - self.facts.last_packet(sa);
                        assert!(cut || idle >= QUIET, "removed while in use");
                        // The peer may send on the newest SA that it must have, or on an older one for as long as the
                        // contract gives it; a peer that goes on for longer is cut off.
                        if sa == inbound(self.peer_sends) {
                            assert!(!self.may_send_on(self.peer_sends), "removed too early");
                            // From here on the peer has nothing to send on but the newest.
                            self.peer_sends = self.newest;
                        }
                    }
                    self.state.sas.retain(|s| *s != sa);
                }
                Step::Ask { sa, .. } => {
                    let sends = self.state.sender == Some(outbound(self.newest));
                    assert!(
                        sends || self.facts.spent(sa).dead,
                        "{sa:?} waits for its time to send: a successor would put that off"
                    );
                    self.machine.answered(T, self.now);
                }
                _ => {}
            }
        }
        if published {
            self.epoch = next;
        }
    }

    /// What holds at every moment.
    pub(super) fn check(&self) {
        let sender = self.state.sender.expect("something sends");
        assert!(self.state.sas.contains(&sender), "the sender is installed");
        assert!(
            self.state.sas.contains(&inbound(self.peer_sends)),
            "the peer may send on {:?}: {:?}",
            inbound(self.peer_sends),
            self.state
        );
        for g in 0..=self.newest {
            assert!(
                g < self.peer_sends || !self.may_send_on(g) || self.state.sas.contains(&inbound(g)),
                "the peer may yet send on generation {g}: {:?}",
                self.state
            );
        }
    }

    /// The state without what does not decide: clocks as distances, capped.
    pub(super) fn fingerprint(&self) -> String {
        // Beyond these nothing depends on how long ago it was.
        let age = |t: u64| self.now.saturating_sub(t).min(DELAY + OVERLAP);
        let lasts: Vec<u64> = (0..GENERATIONS)
            .map(|g| age(self.facts.last_packet(inbound(g))).min(QUIET))
            .collect();
        let spent: Vec<Spent> = (0..GENERATIONS)
            .map(|g| self.facts.spent(outbound(g)))
            .collect();
        let ready: Vec<_> = self
            .ready
            .iter()
            .flatten()
            .map(|r| (r.1 != 0, age(r.1), self.acknowledged >= r.0))
            .collect();
        format!(
            "{:?}{:?}{:?}{lasts:?}{spent:?}{ready:?}{}{}{}",
            self.machine
                .fingerprint(T, self.now, self.acknowledged, OVERLAP_MAX),
            self.state,
            self.acknowledged >= self.epoch,
            self.newest,
            self.both,
            self.peer_sends
        )
    }
}
