//! Gives the core its facts, and carries its steps out.

use sa_store::runtime::{Gauge, SaEntry, TunnelIdx, event};
use sa_store::sa::{Direction, SaId};
use sa_store::snapshot::Snapshot;
use sa_store::store::Store;

use super::Config;
use super::hook::{Call, Outcome};
use super::machine::Machine;
use super::terms::{Reason, Spent, Step, View, World};
use crate::events::{About, Events};
use crate::install::Roster;
use crate::keeper::Keeper;

/// Sticky events after which a tunnel is looked at.
pub(crate) const WANTS: u32 = event::SOFT_PACKETS
    | event::SOFT_BYTES
    | event::SOFT_TIME
    | event::HARD
    | event::SEQUENCE_LOW
    | event::SEQUENCE_END
    | event::LEASE_OUT
    | event::ENGINE_LOST;

/// SAs as they are in a snapshot.
struct Now<'s> {
    snapshot: &'s Snapshot,
    now: u64,
}

impl World for Now<'_> {
    fn spent(&self, sa: SaId) -> Spent {
        // One that is not there cannot send.
        let gone = Spent {
            dead: true,
            ..Spent::default()
        };
        self.snapshot.sa(sa).map_or(gone, |e| spent(e, self.now))
    }

    fn last_packet(&self, sa: SaId) -> u64 {
        self.snapshot.sa(sa).map_or(0, |e| e.live.last_used.value())
    }
}

/// How an SA stands to its limits.
pub(crate) fn spent(e: &SaEntry, now: u64) -> Spent {
    let gauges = e.gauges(now);
    let bits = e.events();
    let measures = [
        (gauges.packets, Reason::Packets),
        (gauges.bytes, Reason::Bytes),
        (gauges.time, Reason::Time),
        (gauges.sequence, Reason::Sequence),
    ];
    let mut spent = Spent::default();
    for (gauge, reason) in measures {
        if gauge.used >= gauge.soft {
            spent.reason.get_or_insert(reason);
            spent.permille = spent.permille.max(permille(&gauge));
        }
    }
    let outbound = e.fixed.direction == Direction::Out;
    if outbound && e.next_seq() >= e.lease_end() {
        spent.reason.get_or_insert(Reason::Lease);
        spent.permille = 1000;
    }
    if bits & event::ENGINE_LOST != 0 {
        spent.reason = Some(Reason::Engine);
    }
    let over = event::HARD | event::SEQUENCE_END | event::ENGINE_LOST;
    if bits & over != 0 || e.disabled() || now >= gauges.time.hard {
        spent.reason.get_or_insert(Reason::Hard);
        spent.dead = true;
        spent.permille = 1000;
    }
    spent
}

fn permille(g: &Gauge) -> u64 {
    if g.hard == u64::MAX {
        return 0;
    }
    let (way, gone) = (g.hard.saturating_sub(g.soft), g.used.saturating_sub(g.soft));
    let part = u128::from(gone) * 1000 / u128::from(way.max(1));
    u64::try_from(part).unwrap_or(1000).min(1000)
}

/// The rekeys of all tunnels of the files.
pub(crate) struct Rekeys {
    pub(crate) config: Config,
    pub(crate) machine: Machine,
    calls: Vec<Call>,
    /// Attempts so far: that ended well, failed, were killed, could not be started.
    pub(crate) attempts: [u64; 4],
}

/// Names of [`Rekeys::attempts`].
pub(crate) const OUTCOMES: [&str; 4] = ["done", "failed", "killed", "not_started"];

/// What steps change.
pub(crate) struct Hands<'h> {
    pub(crate) store: &'h mut Store,
    pub(crate) keeper: &'h mut Keeper,
    pub(crate) roster: &'h mut Roster,
    pub(crate) events: &'h mut Events,
}

impl Rekeys {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            machine: Machine::new(config.timing()),
            config,
            calls: Vec::new(),
            attempts: [0; 4],
        }
    }

    /// Looks at an SA's sticky events.
    pub(crate) fn attend(&mut self, entry: &SaEntry) {
        if entry.events() & WANTS != 0 {
            self.machine.attend(entry.fixed.tunnel);
        }
    }

    /// Carries out what is due at `now`. All of it is one publication, which cannot fail.
    pub(crate) fn step(&mut self, now: u64, hands: &mut Hands<'_>) {
        if self.machine.active() == 0 {
            return;
        }
        let snapshot = hands.store.current();
        let world = Now {
            snapshot: &snapshot,
            now,
        };
        let acknowledged = hands.store.acknowledged();
        let steps = self
            .machine
            .step(now, acknowledged, snapshot.epoch + 1, &world);
        let changes = steps
            .iter()
            .any(|s| matches!(s, Step::Switch { .. } | Step::Remove { .. }));
        let mut draft = changes.then(|| hands.store.draft());
        for step in &steps {
            match step {
                Step::Switch { tunnel, to, .. } => {
                    if let Some(d) = &mut draft {
                        d.set_sender(*tunnel, Some(*to));
                    }
                }
                Step::Remove { sa, .. } => {
                    if let Some(d) = &mut draft {
                        d.remove_sa(*sa);
                    }
                    hands.roster.let_go(*sa);
                }
                _ => {}
            }
        }
        if let Some(draft) = draft {
            hands.store.publish(draft);
        }
        for step in steps {
            if let Step::Remove { sa, .. } = &step {
                hands.keeper.retire(*sa);
            }
            self.tell(&step, &snapshot, hands);
        }
    }

    /// Attempts that are to be started now.
    pub(crate) fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    /// An attempt is over.
    pub(crate) fn answered(
        &mut self,
        call: &Call,
        outcome: &Outcome,
        now: u64,
        events: &mut Events,
    ) {
        self.machine.answered(call.index, now);
        let about = About::sa(&call.sa, &call.tunnel);
        let (i, text) = match outcome {
            Outcome::Done => (0, None),
            Outcome::Failed(how) => (1, Some(format!("the hook failed: {how}"))),
            Outcome::Killed => (
                2,
                Some(format!(
                    "the hook was killed: it ran for more than {} s",
                    self.config.hook_timeout.as_secs_f64()
                )),
            ),
            Outcome::NotStarted(why) => (3, Some(format!("the hook cannot be started: {why}"))),
        };
        if let Some(n) = self.attempts.get_mut(i) {
            *n += 1;
        }
        if let Some(text) = text {
            tracing::warn!(tunnel = %call.tunnel, attempt = call.attempt, "rekey: {text}");
            events.tell("rekey_hook_failed", about, text);
        }
    }

    fn tell(&mut self, step: &Step, snapshot: &Snapshot, hands: &mut Hands<'_>) {
        let entry = |sa: SaId| snapshot.sa(sa);
        let name = |sa: SaId| entry(sa).map_or("", |e| e.spec.name.as_str());
        let of = |t: TunnelIdx| {
            let found = hands.store.tunnels().get(t.0 as usize);
            found.map_or_else(String::new, |t| t.name.clone())
        };
        let events = &mut *hands.events;
        match *step {
            Step::Switch { tunnel, from, to } => {
                let tunnel = of(tunnel);
                let before = from.map_or("", name);
                tracing::info!(%tunnel, from = before, to = name(to), "rekey: the successor sends");
                events.tell(
                    "rekey_switched",
                    About::sa(name(to), &tunnel),
                    format!("in place of {before}"),
                );
            }
            Step::Remove { tunnel, sa, cut } => {
                let tunnel = of(tunnel);
                let (kind, text) = if cut {
                    tracing::warn!(%tunnel, sa = name(sa), "rekey: the peer still sends on the old SA, whose time is up");
                    ("rekey_cut", "removed while the peer still sent on it")
                } else {
                    tracing::info!(%tunnel, sa = name(sa), "rekey: the old SA is removed");
                    ("rekey_removed", "out of use")
                };
                events.tell(kind, About::sa(name(sa), &tunnel), text.to_owned());
            }
            Step::Expired { tunnel, sa, reason } => {
                let text = format!("a successor is wanted: {}", reason.name());
                events.hold("rekey_wanted", About::sa(name(sa), &of(tunnel)), text);
            }
            Step::Overdue { tunnel, sa, reason } => {
                let tunnel = of(tunnel);
                tracing::error!(%tunnel, sa = name(sa), reason = reason.name(), "rekey: no successor has come, and the hard limit is near");
                let text = format!("no successor has come: {}", reason.name());
                events.hold("rekey_overdue", About::sa(name(sa), &tunnel), text);
            }
            Step::Renewed { tunnel } => {
                let tunnel = of(tunnel);
                events.release("rekey_wanted", &tunnel);
                events.release("rekey_overdue", &tunnel);
            }
            Step::Ask {
                tunnel,
                sa,
                reason,
                attempt,
            } => {
                let Some(e) = entry(sa) else {
                    self.machine.answered(tunnel, 0);
                    return;
                };
                tracing::info!(tunnel = %e.spec.tunnel, sa = %e.spec.name, reason = reason.name(), attempt, "rekey: the hook is to fetch a successor");
                self.calls.push(Call {
                    tunnel: e.spec.tunnel.clone(),
                    index: tunnel,
                    sa: e.spec.name.clone(),
                    direction: match e.fixed.direction {
                        Direction::In => "in",
                        Direction::Out => "out",
                    },
                    spi: e.spec.spi.to_string(),
                    reason,
                    attempt,
                });
            }
        }
    }

    /// A tunnel's rekey.
    pub(crate) fn view(&self, tunnel: TunnelIdx) -> View {
        self.machine.view(tunnel)
    }
}
