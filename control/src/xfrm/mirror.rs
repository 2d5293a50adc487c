//! The mirror at work: follows the kernel, keeps the store alike, reports back.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sa_store::local::Locals;
use sa_store::runtime::{SaEntry, event, mapped};
use sa_store::sa::{Direction, SaId};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, MissedTickBehavior};

use super::acquire;
use super::audit::{Auditor, dumps, sort_in};
use super::held::{Held, unix_time};
use super::message::{Change, KernelPolicy, KernelSa, SaKey, change};
use super::picture::{Drawn, Picture};
use super::seize::{self, Past};
use super::settings::Settings;
use super::socket::{Asker, Follower, Heard};
use super::table::Table;
use super::translate::{Seized, possible, sa_label};
use crate::core::{Control, lock};
use crate::reload::ready_for;
use crate::vici::NamesReport;

/// Changes that come within this time are one publication: a daemon installs an SA pair and its policies in about that.
const BATCH: Duration = Duration::from_millis(2);
/// How often limits are looked at, and a share of the SAs is reported.
const TICK: Duration = Duration::from_millis(20);
/// How often each SA's counters are reported, if they changed.
const REPORT: Duration = Duration::from_secs(1);
/// SAs reported per tick.
const SHARE: usize = 64;
/// How often everything is compared with the kernel.
const AUDIT: Duration = Duration::from_secs(10);
/// Datagrams taken in one go.
const DRAIN: usize = 4096;
/// After this much trouble in a row the next try waits.
const RETRY: Duration = Duration::from_secs(1);

/// Numbers that a peer may be behind an inbound window at a restart before new keys are the quicker way.
const BLIND: u64 = 10_000;

/// The SA carries nothing more.
const HARD: u32 = event::HARD | event::SEQUENCE_END;

/// How the mirror is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorReport {
    /// Whether the kernel's SAs are taken at all.
    pub following: bool,
    /// SAs in service.
    pub sas: usize,
    /// Policies in service.
    pub policies: usize,
    /// What stays with the kernel, and why.
    pub left: BTreeMap<String, String>,
    /// Times that everything was read anew.
    pub resyncs: u64,
    /// SAs that the kernel sent with although they were ours.
    pub kernel_sent: u64,
    /// Rekeys asked of the daemon.
    pub rekeys_asked: u64,
    /// Acquires given to the daemon.
    pub acquires: u64,
    /// How the tunnels' names are got; absent when the daemon is not asked for them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub names: Option<NamesReport>,
}

/// The mirror, opened and not yet at work.
pub struct Mirror {
    settings: Settings,
    follower: Option<Follower>,
    asker: Asker,
    table: Table,
    picture: Picture,
    /// The gateway's addresses, by which the picture was drawn.
    locals: Arc<Locals>,
    held: HashMap<SaKey, Held>,
    /// SAs that run.
    running: HashMap<SaId, SaKey>,
    /// SAs whose turn to be reported has not come.
    queue: Vec<SaKey>,
    auditor: Auditor,
    lost: Option<&'static str>,
    state: MirrorReport,
    /// What stays with the kernel is not what others were told.
    left_changed: bool,
}

impl MirrorReport {
    /// All but what stays with the kernel.
    fn numbers(&self) -> Self {
        Self {
            following: self.following,
            sas: self.sas,
            policies: self.policies,
            left: BTreeMap::new(),
            resyncs: self.resyncs,
            kernel_sent: self.kernel_sent,
            rekeys_asked: self.rekeys_asked,
            acquires: self.acquires,
            names: None,
        }
    }
}

impl Mirror {
    /// Opens the way to the kernel.
    ///
    /// # Errors
    /// The kernel has no XFRM, or CAP_NET_ADMIN is lacking.
    pub fn open(settings: Settings) -> io::Result<Self> {
        acquire::try_out()?;
        Ok(Self {
            follower: Some(Follower::open(settings.receive_buffer)?),
            settings,
            asker: Asker::open()?,
            table: Table::default(),
            picture: Picture::default(),
            locals: Arc::default(),
            held: HashMap::new(),
            running: HashMap::new(),
            queue: Vec::new(),
            auditor: Auditor::open()?,
            lost: None,
            state: MirrorReport {
                following: true,
                ..MirrorReport::default()
            },
            left_changed: true,
        })
    }

    /// Works until it is dropped.
    pub(crate) async fn run(mut self, control: Arc<Mutex<Control>>) {
        let Some(follower) = self.follower.take() else {
            return;
        };
        // `Follower` owns its descriptor and always names the same one, which is what the successor asks for.
        #[allow(
            deprecated,
            reason = "the successor is unsafe to call, and this crate forbids unsafe code"
        )]
        let opened = AsyncFd::new(follower);
        let mut follower = match opened {
            Ok(f) => f,
            Err(e) => {
                tracing::error!(error = %e, "the kernel's SAs are not followed");
                return;
            }
        };
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut next_report, mut next_audit) = (Instant::now(), Instant::now() + AUDIT);
        // Those that are there already.
        self.lost = Some("start");
        loop {
            let mut heard = Vec::new();
            tokio::select! {
                biased;
                ready = follower.readable_mut() => if let Ok(mut ready) = ready {
                    drain(&mut heard, |h| match ready.try_io(|f| f.get_mut().take(h)) {
                        Ok(done) => done,
                        Err(_) => Err(io::ErrorKind::WouldBlock.into()),
                    });
                    tokio::time::sleep(BATCH + Duration::from_millis(self.settings.delay_ms)).await;
                    drain(&mut heard, |h| follower.get_mut().take(h));
                },
                _ = tick.tick() => {}
            }
            self.take_in(heard);
            if let Some(why) = self.lost.take() {
                // What was told until now is in the dump.
                drain(&mut Vec::new(), |h| follower.get_mut().take(h));
                self.auditor.give_up();
                if let Err(e) = self.resync(why, &control) {
                    tracing::error!(error = %e, "the kernel's SAs could not be read; trying again");
                    self.lost = Some(why);
                    tokio::time::sleep(RETRY).await;
                }
            }
            self.apply(&control).await;
            let now = Instant::now();
            if now >= next_audit && !self.held.is_empty() && self.lost.is_none() {
                next_audit = now + AUDIT;
                self.auditor.begin();
            }
            if self.read_on() {
                // What is told of the last page's SAs is on its way.
                let mut heard = Vec::new();
                drain(&mut heard, |h| follower.get_mut().take(h));
                self.take_in(heard);
                self.audit(&control);
            }
            self.trigger_acquires(&control);
            self.limits(&control);
            if now >= next_report && self.queue.is_empty() {
                next_report = now + REPORT;
                self.queue = self.held.keys().copied().collect();
            }
            self.report_some(&control);
            self.publish(&control);
        }
    }

    /// Lets others see how it is doing. What stays with the kernel is a long list at some sites.
    fn publish(&mut self, control: &Arc<Mutex<Control>>) {
        let mut guard = lock(control);
        let seen = &mut guard.mirror_state;
        if std::mem::take(&mut self.left_changed) {
            seen.left.clone_from(&self.state.left);
        }
        let left = std::mem::take(&mut seen.left);
        *seen = MirrorReport {
            left,
            ..self.state.numbers()
        };
    }

    /// Takes news in.
    fn take_in(&mut self, heard: Vec<Heard>) {
        for h in heard {
            match h {
                Heard::Message(m) => {
                    if let Some(c) = change(*m) {
                        self.auditor.heard(&c);
                        self.table.apply(c);
                    }
                }
                Heard::Lost(why) => self.lost = Some(why),
            }
        }
    }

    fn resync(&mut self, why: &'static str, control: &Arc<Mutex<Control>>) -> io::Result<()> {
        let (sas, policies) = self.read_all()?;
        self.table.replace(sas, policies);
        if why != "start" {
            self.state.resyncs += 1;
            tracing::warn!(why, "the kernel's SAs and policies were read anew");
            lock(control).events.note("xfrm_resync", why);
        }
        Ok(())
    }

    fn read_all(&mut self) -> io::Result<(Vec<KernelSa>, Vec<KernelPolicy>)> {
        let mut all = (Vec::new(), Vec::new());
        for what in dumps() {
            for m in self.asker.dump(what)? {
                sort_in(m, &mut all.0, &mut all.1);
            }
        }
        Ok(all)
    }

    /// Makes the store what the kernel is.
    async fn apply(&mut self, control: &Arc<Mutex<Control>>) {
        let touched = self.table.take_touched();
        let locals = Arc::clone(&lock(control).store.current().locals);
        let moved = !Arc::ptr_eq(&locals, &self.locals) && locals != self.locals;
        if touched.is_empty() && !self.picture.is_stale() && !moved {
            return;
        }
        self.locals = Arc::clone(&locals);
        let vrf = self.settings.vrf;
        let is_local = move |a: IpAddr| locals.contains(vrf, mapped(a));
        for key in &touched.ended {
            // One that comes back is looked at anew.
            self.forget(key);
        }
        if moved {
            let all = self.table.sas().map(|s| s.key).collect();
            self.seize_new(all, &is_local, control);
            self.picture.regroup_all(&self.table, &is_local);
        }
        self.seize_new(touched.sas.iter().copied().collect(), &is_local, control);
        self.picture.regroup(&touched, &self.table, &is_local);
        let held = &self.held;
        let seized = |key: &SaKey| held.get(key).map(|h| h.seized.clone());
        let drawn = self
            .picture
            .draw(&self.table, &self.settings, &is_local, &seized);
        ready_for(control, &drawn.parts).await;
        self.put_into_service(drawn, control);
    }

    fn put_into_service(&mut self, drawn: Drawn, control: &Arc<Mutex<Control>>) {
        let Drawn {
            parts,
            keys,
            left_before,
            mut left,
        } = drawn;
        let mut guard = lock(control);
        let outcome = guard.mirror_parts(parts);
        let mut refused = Vec::new();
        for (name, why) in outcome.left_out {
            let Some(key) = keys.get(&name) else { continue };
            left.push((sa_label(key), why.clone()));
            refused.push((*key, why));
        }
        let mut blind = Vec::new();
        for (name, key) in &keys {
            let Some(h) = self.held.get_mut(key) else {
                continue;
            };
            let entry = guard.mirrored_sa(name).map(|e| &**e);
            if let Some(old) = h.id {
                self.running.remove(&old);
            }
            h.runs_as(entry);
            let Some(entry) = entry else { continue };
            self.running.insert(entry.fixed.id, *key);
            let sa = self.table.sa(key);
            if h.direction == Direction::In && sa.is_some_and(|sa| is_blind(entry, sa)) {
                blind.push(*key);
            }
        }
        (self.state.sas, self.state.policies) = guard.mirrored_counts();
        drop(guard);
        for key in blind {
            self.ask_for_successor(&key);
        }
        for (key, why) in refused {
            if let Some(h) = self.held.get_mut(&key) {
                h.seized = Seized::Not(why);
                self.picture.reconsider(&key);
            }
            self.ask_for_successor(&key);
        }
        self.left_changed |= !left_before.is_empty() || !left.is_empty();
        let before: BTreeMap<String, String> = left_before
            .into_iter()
            .filter_map(|what| self.state.left.remove_entry(&what))
            .collect();
        for (what, why) in left {
            if before.get(&what) != Some(&why) {
                tracing::info!(what, why, "left to the kernel");
            }
            self.state.left.insert(what, why);
        }
    }

    fn forget(&mut self, key: &SaKey) {
        if let Some(id) = self.held.remove(key).and_then(|h| h.id) {
            self.running.remove(&id);
        }
    }

    /// Decides about those of these SAs that were not looked at before, and marks in the kernel what is taken.
    fn seize_new(
        &mut self,
        keys: Vec<SaKey>,
        is_local: &dyn Fn(IpAddr) -> bool,
        control: &Arc<Mutex<Control>>,
    ) {
        let mut new = Vec::new();
        for key in keys {
            let Some(sa) = self.table.sa(&key) else {
                continue;
            };
            if self.held.get(&key).is_some_and(|h| h.is_about(sa)) {
                continue;
            }
            if let Ok((direction, _)) = possible(sa, is_local)
                && self.settings.takes_sa(sa)
            {
                new.push((sa.clone(), direction));
            }
            self.forget(&key);
        }
        for (sa, direction) in new {
            let seized = match self.seize(&sa, direction) {
                Ok(v) => v,
                // Gone meanwhile, most likely; its end will be told.
                Err(e) => Seized::Not(format!("the kernel did not let it be taken: {e}")),
            };
            if let Seized::Not(why) = &seized {
                let text = format!("{}: {why}", sa_label(&sa.key));
                lock(control).events.note("xfrm_not_taken", text);
            }
            let refused = matches!(seized, Seized::Not(_));
            self.held.insert(sa.key, Held::new(&sa, direction, seized));
            if refused {
                self.ask_for_successor(&sa.key);
            }
        }
    }

    fn seize(&mut self, sa: &KernelSa, direction: Direction) -> io::Result<Seized> {
        let before = seize::past(sa, direction);
        if before == Past::Used {
            return Ok(Seized::Not(format!(
                "the kernel has sent {} packets with it; it stays there until the daemon makes a new one",
                sa.carried.packets.max(sa.sent)
            )));
        }
        self.asker
            .tell(seize::mark_taken(sa, direction, unix_time()), true)?;
        if direction == Direction::Out && before == Past::Fresh {
            // Between the news and the mark the kernel may have sent.
            let answer = self.asker.get(seize::read(&sa.key))?;
            let Some(Change::Sa(after)) = answer.and_then(change) else {
                return Ok(Seized::Not(
                    "the kernel does not say what became of it".into(),
                ));
            };
            if after.carried.packets != 0 || after.sent != seize::last_number(sa) {
                return Ok(Seized::Not(
                    "the kernel has sent with it before it could be taken; the daemon is asked for a new one".into(),
                ));
            }
        }
        Ok(Seized::Ours {
            first_use: before == Past::Fresh,
        })
    }

    /// Raises the SA's soft limit in the kernel, once.
    fn ask_for_successor(&mut self, key: &SaKey) {
        let Some(h) = self.held.get_mut(key).filter(|h| !h.asked) else {
            return;
        };
        h.asked = true;
        self.state.rekeys_asked += 1;
        self.tell_expiry(key, false);
    }

    fn tell_expiry(&mut self, key: &SaKey, hard: bool) {
        let Some(sa) = self.table.sa(key) else { return };
        if let Err(e) = self.asker.tell(seize::expire(sa, hard), false) {
            tracing::warn!(sa = sa_label(key), error = %e, hard, "the kernel did not take the expiry");
        }
    }

    /// Soft and hard limits that workers have met.
    fn limits(&mut self, control: &Arc<Mutex<Control>>) {
        let (met, snapshot) = {
            let mut guard = lock(control);
            (guard.events.take_limits(), guard.store.current())
        };
        for id in met {
            let (Some(entry), Some(key)) = (snapshot.sa(id), self.running.get(&id).copied()) else {
                continue;
            };
            let Some(h) = self.held.get_mut(&key) else {
                continue;
            };
            if entry.events() & HARD != 0 {
                if !std::mem::replace(&mut h.ended, true) {
                    self.tell_expiry(&key, true);
                }
            } else {
                self.ask_for_successor(&key);
            }
        }
    }

    /// Gives the kernel some SAs' counters, for the daemon to read.
    fn report_some(&mut self, control: &Arc<Mutex<Control>>) {
        if self.queue.is_empty() {
            return;
        }
        let snapshot = lock(control).store.current();
        let from = self.queue.len().saturating_sub(SHARE);
        for key in self.queue.split_off(from) {
            let (Some(h), Some(sa)) = (self.held.get_mut(&key), self.table.sa(&key)) else {
                continue;
            };
            let Some(entry) = h.id.and_then(|id| snapshot.sa(id)) else {
                continue;
            };
            let carried = h.carried(entry, sa.carried.add_time);
            if carried == h.reported {
                continue;
            }
            let received = entry.live.window.top();
            let message = seize::report(sa, h.direction, received, Some(carried));
            match self.asker.tell(message, true) {
                Ok(()) => h.reported = carried,
                Err(e) => tracing::debug!(sa = sa_label(&key), error = %e, "counters not reported"),
            }
        }
    }

    /// Reads a page of the kernel's tables if that is under way; whether it was the last.
    fn read_on(&mut self) -> bool {
        self.auditor.step().unwrap_or_else(|e| {
            tracing::debug!(error = %e, "an audit failed");
            self.lost = Some("an audit failed");
            false
        })
    }

    /// Compares what was read with what is known: news that were missed, and packets that the kernel must not have sent.
    fn audit(&mut self, control: &Arc<Mutex<Control>>) {
        let Some(found) = self.auditor.take() else {
            return;
        };
        for sa in &found.sas {
            let Some(h) = self.held.get_mut(&sa.key) else {
                continue;
            };
            let ours = matches!(h.seized, Seized::Ours { .. });
            if !ours || !h.is_about(sa) || h.direction != Direction::Out || h.id.is_none() {
                continue;
            }
            if found.is_older_than_news(&sa.key)
                || sa.carried.packets <= h.reported.packets && sa.sent == seize::last_number(sa)
            {
                continue;
            }
            let why = "the kernel has sent with it although it was ours; it is stopped and the daemon is asked for a new one";
            tracing::error!(sa = sa_label(&sa.key), "{why}");
            h.seized = Seized::Not(why.into());
            self.picture.reconsider(&sa.key);
            self.state.kernel_sent += 1;
            let key = sa.key;
            lock(control)
                .events
                .note("kernel_sent", format!("{}: {why}", sa_label(&key)));
            self.ask_for_successor(&key);
        }
        self.table
            .replace_but(found.sas, found.policies, &found.meanwhile);
    }

    /// Lets the kernel, and so the daemon, know of packets that wait for an SA.
    fn trigger_acquires(&mut self, control: &Arc<Mutex<Control>>) {
        let wanted = lock(control).take_acquires();
        for flow in wanted {
            match acquire::provoke(&flow) {
                Ok(()) => self.state.acquires += 1,
                Err(e) => tracing::debug!(?flow, error = %e, "no acquire could be provoked"),
            }
        }
    }
}

/// Whether an inbound SA of before a crash refuses what its peer sends for long: its window begins at the edge on disk, which is
/// ahead of what was received.
fn is_blind(entry: &SaEntry, sa: &KernelSa) -> bool {
    entry.live.counters.packets.value() == 0
        && entry.live.window.top() > sa.received.saturating_add(BLIND)
}

fn drain(heard: &mut Vec<Heard>, mut take: impl FnMut(&mut Vec<Heard>) -> io::Result<()>) {
    for _ in 0..DRAIN {
        match take(heard) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
