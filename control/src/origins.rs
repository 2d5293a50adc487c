//! The two origins of what runs, SA files and the mirror, and how a change of either becomes the running state.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::file::{Config, MIRROR_PREFIX};
use sa_store::policy::Action;
use sa_store::runtime::SaEntry;
use sa_store::store::Store;
use serde::{Deserialize, Serialize};

use crate::core::{Control, seconds_now};
use crate::install::{
    self, Applied, ApplyError, Kit, LeftOut, Order, Policies, Roster, Rule, Senders,
};
use crate::mirrored::{MirrorOutcome, Mirrored, PartId};
use crate::parts::{Parts, Touched};
use crate::vici::Runs;

/// Tunnels that nobody names any more keep their counters for when they come back, up to this many.
const SPARE_TUNNELS: usize = 1024;

/// Outcome of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Whether the files are what runs now.
    pub ok: bool,
    /// Seconds since 1970.
    pub time: u64,
    /// SAs added or changed.
    pub added: usize,
    /// SAs removed or changed.
    pub removed: usize,
    /// SAs that were left alone.
    pub kept: usize,
    /// Policies now.
    pub policies: usize,
    /// Snapshot that runs.
    pub epoch: u64,
    /// Milliseconds that it took.
    pub millis: u64,
    /// What is wrong, each with file, line and column.
    pub problems: Vec<String>,
}

/// Running SAs by origin.
#[derive(Default)]
pub(crate) struct Rosters {
    pub(crate) files: Roster,
    pub(crate) mirror: Roster,
}

/// Whose SAs are to change.
enum Origin<'c> {
    Files(&'c Config),
    /// Some parts.
    Mirror(&'c Touched),
}

impl Control {
    /// Reads the SA files and makes them the running state; on any error what runs stays. Waits for files and disk.
    pub fn reload(&mut self) -> &Reload {
        let began = Instant::now();
        match crate::desired::load(&self.sa_files) {
            Ok(config) => self.apply_since(config, began),
            Err(p) => self.refused(p.iter().map(ToString::to_string).collect(), began),
        }
    }

    /// Makes a configuration the running state, as [`reload`](Self::reload) does with that of the files.
    pub fn apply(&mut self, config: Config) -> &Reload {
        self.apply_since(config, Instant::now())
    }

    pub(crate) fn apply_since(&mut self, config: Config, began: Instant) -> &Reload {
        let short = crate::desired::too_short(&config, &self.rekeys.config);
        if !short.is_empty() {
            return self.refused(short, began);
        }
        let done = self.with_parts(|c, parts| {
            let done = c.install(&Origin::Files(&config), parts);
            done.map(|(applied, left_out)| {
                parts.leave_out(left_out);
                applied
            })
        });
        match done {
            Ok(applied) => {
                self.config = config;
                // Something of the mirror may have been in the way of the old files alone.
                if self.parts.is_troubled() {
                    let again = self.parts.again();
                    self.mirror_now(again);
                }
                self.accepted(&applied, began)
            }
            Err(e) => self.refused(vec![e.to_string()], began),
        }
    }

    /// Makes what an IKE daemon wants the running state, beside what the files say, in the place of all that was mirrored
    /// before. Nothing in it can disturb the files' SAs, and what cannot be installed is left out alone.
    pub fn mirror(&mut self, mirrored: Mirrored) -> MirrorOutcome {
        const WHOLE: PartId = PartId(0);
        let gone = self.parts.ids().filter(|id| *id != WHOLE);
        let gone = gone.map(|id| (id, Mirrored::default()));
        let changes = gone.chain([(WHOLE, mirrored)]).collect();
        self.mirror_parts(changes)
    }

    /// The same for some parts of the mirror; the others stay as they are, and are not looked at. An empty part is the end
    /// of that part.
    pub fn mirror_parts(&mut self, changes: Vec<(PartId, Mirrored)>) -> MirrorOutcome {
        let touched = self.parts.replace(changes);
        let (applied, left_out) = self.mirror_now(touched);
        MirrorOutcome { applied, left_out }
    }

    fn mirror_now(&mut self, mut touched: Touched) -> (Applied, Vec<LeftOut>) {
        let told: HashSet<LeftOut> = self.parts.left_out().cloned().collect();
        let applied =
            self.with_parts(
                |c, parts| match c.install(&Origin::Mirror(&touched), parts) {
                    Ok((applied, left_out)) => {
                        parts.done(&mut touched, left_out);
                        applied
                    }
                    Err(e) => {
                        let sas = parts.of(&touched.ids).flat_map(|m| &m.config.sas);
                        let out = sas.filter(|s| c.rosters.mirror.get(&s.name).is_none());
                        let out = out.map(|s| (s.name.clone(), e.to_string())).collect();
                        parts.failed(&mut touched, out);
                        Applied::default()
                    }
                },
            );
        for (name, why) in self.parts.left_out().filter(|l| !told.contains(*l)) {
            tracing::warn!(name, why, "left out of the mirror");
            self.events
                .note("mirror_left_out", format!("{name}: {why}"));
        }
        let ids: BTreeSet<PartId> = touched.ids;
        (applied, self.parts.left_out_of(&ids))
    }

    /// The mirror's SA of that name, if it is installed.
    pub(crate) fn mirrored_sa(&self, name: &str) -> Option<&Arc<SaEntry>> {
        self.rosters.mirror.get(name)
    }

    /// What identifies each SA of the mirror that runs.
    pub(crate) fn mirrored_runs(&self) -> Vec<Runs> {
        let snapshot = self.store.current();
        let mirrored = snapshot.sas.iter().flatten();
        let mirrored = mirrored.filter(|e| e.spec.name.starts_with(MIRROR_PREFIX));
        let runs = mirrored.map(|e| Runs {
            tunnel: e.fixed.tunnel,
            dst: e.spec.dst,
            spi: e.spec.spi.value(),
            sends: snapshot.tunnels.at(e.fixed.tunnel.0).out == e.fixed.id.index,
        });
        runs.collect()
    }

    /// How many SAs and policies of the mirror run.
    pub(crate) fn mirrored_counts(&self) -> (usize, usize) {
        (self.rosters.mirror.len(), self.parts.policy_count())
    }

    fn with_parts<T>(&mut self, what: impl FnOnce(&mut Self, &mut Parts) -> T) -> T {
        let mut parts = std::mem::take(&mut self.parts);
        let done = what(self, &mut parts);
        self.parts = parts;
        done
    }

    fn install(
        &mut self,
        origin: &Origin<'_>,
        parts: &Parts,
    ) -> Result<(Applied, Vec<LeftOut>), ApplyError> {
        let plane = Arc::clone(&self.plane);
        let files = match origin {
            Origin::Files(config) => *config,
            Origin::Mirror(_) => &self.config,
        };
        let policies = Policies {
            files: &files.policies,
            mirror: parts,
        };
        let order = match origin {
            Origin::Files(config) => Order {
                tunnels: config.tunnels.iter().map(|t| t.name.as_str()).collect(),
                sas: config.sas.iter().collect(),
                origins: &config.origins.sas,
                had: None,
                senders: Senders::Last,
                edits: None,
                policies,
                policy_count: config.policies.len(),
                rule: Rule::Whole,
            },
            Origin::Mirror(touched) => {
                let some = parts.of(&touched.ids);
                let configs = some.clone().map(|m| &m.config);
                let tunnels = configs.clone().flat_map(|c| &c.tunnels);
                let senders = some.flat_map(|m| &m.senders);
                Order {
                    tunnels: tunnels.map(|t| t.name.as_str()).collect(),
                    sas: configs.flat_map(|c| &c.sas).collect(),
                    origins: &[],
                    had: Some(&touched.had),
                    senders: Senders::Named(
                        senders.map(|(t, s)| (t.as_str(), s.as_str())).collect(),
                    ),
                    edits: touched.edits.as_ref(),
                    policies,
                    policy_count: parts.policy_count(),
                    rule: Rule::EachAlone,
                }
            }
        };
        let is_files = matches!(origin, Origin::Files(_));
        let mut kit = Kit {
            store: &mut self.store,
            keeper: &mut self.keeper,
            writer: &self.leases,
            factory: &*self.ciphers,
            plane: &*plane,
            // A daemon decides for itself.
            machine: is_files.then_some(&mut self.rekeys.machine),
            gone: Vec::new(),
        };
        let roster = if is_files {
            &mut self.rosters.files
        } else {
            &mut self.rosters.mirror
        };
        let done = install::apply(&mut kit, roster, &order);
        for sa in std::mem::take(&mut kit.gone) {
            self.events.forget(sa);
        }
        let done = done?;
        if done.0.policies_changed > 0 {
            plane.published(&policies.list());
        }
        // With workers that sleep and no delays the change is complete at once.
        self.rekey();
        let files = match origin {
            Origin::Files(config) => *config,
            Origin::Mirror(_) => &self.config,
        };
        forget_tunnels(&mut self.store, files, parts);
        Ok(done)
    }

    fn accepted(&mut self, a: &Applied, began: Instant) -> &Reload {
        let millis = millis(began.elapsed());
        tracing::info!(
            added = a.added,
            removed = a.removed,
            kept = a.kept,
            policies = a.policies,
            epoch = a.epoch,
            millis,
            "configuration loaded"
        );
        self.events.note(
            "reload",
            format!(
                "{} SAs added, {} removed, {} kept, {} policies",
                a.added, a.removed, a.kept, a.policies
            ),
        );
        self.reloads[1] += 1;
        self.loaded = true;
        self.last_reload.insert(Reload {
            ok: true,
            time: seconds_now(),
            added: a.added,
            removed: a.removed,
            kept: a.kept,
            policies: a.policies,
            epoch: a.epoch,
            millis,
            problems: Vec::new(),
        })
    }

    pub(crate) fn refused(&mut self, problems: Vec<String>, began: Instant) -> &Reload {
        for p in &problems {
            tracing::error!("{p}");
        }
        tracing::error!(
            problems = problems.len(),
            "configuration refused; what ran before runs on"
        );
        self.events.note(
            "reload_refused",
            problems.first().cloned().unwrap_or_default(),
        );
        self.reloads[0] += 1;
        self.last_reload.insert(Reload {
            time: seconds_now(),
            epoch: self.store.current().epoch,
            millis: millis(began.elapsed()),
            problems,
            ..Reload::default()
        })
    }
}

/// Forgets tunnels of neither origin, once there are many: an IKE daemon's peers that move leave names behind.
fn forget_tunnels(store: &mut Store, files: &Config, parts: &Parts) {
    let configs = || parts.all().map(|m| &m.config).chain([files]);
    // No more than that can be spared.
    if store.named_tunnels() <= SPARE_TUNNELS {
        return;
    }
    let names = configs().map(|c| c.tunnels.len()).sum::<usize>();
    if store.named_tunnels() <= names + SPARE_TUNNELS {
        return;
    }
    let tunnels = configs().flat_map(|c| &c.tunnels);
    let policies = configs().flat_map(|c| &c.policies);
    let protected = policies.filter_map(|p| match &p.action {
        Action::Protect { tunnel } => Some(tunnel.as_str()),
        _ => None,
    });
    store.forget_tunnels(&tunnels.map(|t| t.name.as_str()).chain(protected).collect());
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
