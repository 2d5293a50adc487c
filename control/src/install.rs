//! From what is wanted to what runs: the difference, the leases that it needs, one publication.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sa_store::cipher::CipherFactory;
use sa_store::file::{Config, Location};
use sa_store::lease::LeaseWriter;
use sa_store::runtime::{Place, SaEntry};
use sa_store::sa::{Direction, OffloadMode, SaId, SaSpec};
use sa_store::snapshot::Snapshot;
use sa_store::spd::Spd;
use sa_store::store::{Draft, Store};

use crate::keeper::{Keeper, Tracked};
use crate::plane::{DataPlane, Installed};

/// How long a reload waits for the disk before it gives up.
const DISK: Duration = Duration::from_secs(10);
/// How long a replaced inbound SA of an unchanged key is waited for.
const RETIRE: Duration = Duration::from_secs(2);

/// Why nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}{what}", .at.as_ref().map(|a| format!("{a}: ")).unwrap_or_default())]
pub struct ApplyError {
    /// Line of the SA file, when it is one line's fault.
    pub at: Option<Location>,
    /// What is wrong.
    pub what: String,
}

/// What a publication changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// SAs that were not there before, or not so.
    pub added: usize,
    /// SAs that are no more, or not so.
    pub removed: usize,
    /// SAs that stay as they are, with their counters.
    pub kept: usize,
    /// Policies now.
    pub policies: usize,
    /// Policies added, removed and changed.
    pub policies_changed: usize,
    /// Number of the snapshot.
    pub epoch: u64,
}

/// An SA of the new configuration that has to be made.
struct Wanted<'c> {
    spec: Arc<SaSpec>,
    at: Option<&'c Location>,
    how: How,
}

/// Where its numbers come from.
enum How {
    /// A record of its own.
    Fresh,
    /// From a running SA with the same key: its next numbers.
    Heir(Arc<SaEntry>),
}

/// Makes `config` the running state, or leaves everything as it is.
///
/// SAs that did not change keep their entry: numbers, windows and counters go on. The last outbound SA of a
/// tunnel, in the order of the files, is the one that sends.
///
/// # Errors
/// The first thing that is wrong; nothing was published then.
pub fn apply(
    config: &Config,
    store: &mut Store,
    keeper: &mut Keeper,
    writer: &LeaseWriter,
    factory: &dyn CipherFactory,
    plane: &dyn DataPlane,
) -> Result<Applied, ApplyError> {
    // A key that was just removed can be claimed again only when its old SA is out of use.
    let deadline = Instant::now() + RETIRE;
    while keeper.is_retiring() && Instant::now() < deadline {
        reap(store, keeper, writer, plane);
        std::thread::sleep(Duration::from_micros(50));
    }
    let plan = Plan::new(config, store);
    let mut claims = Claims::new(writer);
    claims.take(&plan.wanted, keeper)?;

    // An inbound SA whose key stays must stop before its window can be read: nothing may slip in between.
    let heirs: Vec<_> = plan.inbound_heirs().cloned().collect();
    let stopped = stop_and_wait(store, keeper, writer, plane, &heirs)?;

    let mut draft = store.draft();
    let mut engines = Engines::new(plane, store.current());
    let filled = fill(
        &mut draft,
        &plan,
        &claims,
        config,
        store,
        factory,
        &mut engines,
    );
    let tracked = match filled.and_then(|t| Ok((t, set_policies(&mut draft, config, store)?))) {
        Ok((tracked, changed)) => {
            claims.keep();
            engines.keep();
            stopped.for_good();
            (tracked, changed)
        }
        Err(e) => {
            store.discard(draft);
            return Err(e);
        }
    };
    let (tracked, policies_changed) = tracked;
    let epoch = store.current().epoch + 1;
    store.publish(draft);
    for entry in &plan.removed {
        keeper.retire(entry.fixed.id);
    }
    for t in tracked {
        keeper.track(t);
    }
    Ok(Applied {
        added: plan.wanted.len(),
        removed: plan.removed.len(),
        kept: plan.kept,
        policies: config.policies.len(),
        policies_changed,
        epoch,
    })
}

/// Lets go of what no worker uses any more: keys are wiped, leases end.
pub fn reap(store: &mut Store, keeper: &mut Keeper, writer: &LeaseWriter, plane: &dyn DataPlane) {
    let gone = store.reap();
    for sa in &gone {
        plane.remove(*sa);
    }
    if let Err(e) = keeper.gone(&gone, writer) {
        tracing::error!(error = %e, "exact sequence numbers of removed SAs could not be written; their leases stand");
    }
}

/// The difference between a configuration and what runs.
struct Plan<'c> {
    wanted: Vec<Wanted<'c>>,
    removed: Vec<Arc<SaEntry>>,
    kept: usize,
}

impl<'c> Plan<'c> {
    fn new(config: &'c Config, store: &Store) -> Self {
        let current = store.current();
        let running: Vec<&Arc<SaEntry>> = current.sas.iter().flatten().collect();
        let by_name: HashMap<&str, &Arc<SaEntry>> =
            running.iter().map(|e| (e.spec.name.as_str(), *e)).collect();
        let mut kept_ids: HashSet<SaId> = HashSet::new();
        let mut missing = Vec::new();
        for (i, spec) in config.sas.iter().enumerate() {
            match by_name.get(spec.name.as_str()) {
                Some(e) if same(&e.spec, spec) => drop(kept_ids.insert(e.fixed.id)),
                _ => missing.push((spec, config.origins.sas.get(i))),
            }
        }
        let removed: Vec<Arc<SaEntry>> = running
            .iter()
            .filter(|e| !kept_ids.contains(&e.fixed.id))
            .map(|e| Arc::clone(e))
            .collect();
        let hasher = Hasher::default();
        let mut by_key: HashMap<u64, Vec<&Arc<SaEntry>>> = HashMap::new();
        if !missing.is_empty() {
            for e in &removed {
                by_key.entry(hasher.of(&e.spec)).or_default().push(e);
            }
        }
        let wanted = missing
            .into_iter()
            .map(|(spec, at)| wanted(spec, at, &by_key, &hasher))
            .collect();
        Self {
            wanted,
            kept: kept_ids.len(),
            removed,
        }
    }

    fn inbound_heirs(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.wanted.iter().filter_map(|w| match &w.how {
            How::Heir(e) if e.fixed.direction == Direction::In => Some(e),
            _ => None,
        })
    }
}

/// Whether the running SA is what the file says. The mark "first use" says nothing about an SA that runs.
fn same(running: &SaSpec, wanted: &SaSpec) -> bool {
    if running.first_use == wanted.first_use {
        return running == wanted;
    }
    let mut other = wanted.clone();
    other.first_use = running.first_use;
    *running == other
}

/// Finds equal keys without keeping them. Seeded per use; a collision is settled by comparing.
#[derive(Default)]
struct Hasher(std::collections::hash_map::RandomState);

impl Hasher {
    fn of(&self, spec: &SaSpec) -> u64 {
        use std::hash::BuildHasher;
        self.0
            .hash_one((spec.direction, &*spec.keys.enc, &*spec.keys.auth))
    }
}

fn wanted<'c>(
    spec: &SaSpec,
    at: Option<&'c Location>,
    old: &HashMap<u64, Vec<&Arc<SaEntry>>>,
    hasher: &Hasher,
) -> Wanted<'c> {
    let heir = old.get(&hasher.of(spec)).and_then(|list| {
        list.iter()
            .find(|e| e.spec.direction == spec.direction && e.spec.keys == spec.keys)
    });
    let how = heir.map_or(How::Fresh, |e| How::Heir(Arc::clone(e)));
    Wanted {
        spec: Arc::new(spec.clone()),
        at,
        how,
    }
}

/// Leases of one attempt: given back unless the attempt succeeds.
struct Claims<'w> {
    writer: &'w LeaseWriter,
    taken: Vec<Tracked>,
    done: bool,
}

impl<'w> Claims<'w> {
    fn new(writer: &'w LeaseWriter) -> Self {
        Self {
            writer,
            taken: Vec::new(),
            done: false,
        }
    }

    /// Claims and extends, so that every number the SAs will start with is on disk. One sync for all.
    fn take(&mut self, wanted: &[Wanted<'_>], keeper: &Keeper) -> Result<(), ApplyError> {
        let fresh: Vec<&Wanted<'_>> = wanted
            .iter()
            .filter(|w| matches!(w.how, How::Fresh))
            .collect();
        let specs = fresh.iter().map(|w| SaSpec::clone(&w.spec)).collect();
        let mut first_error = None;
        for (w, answer) in fresh.iter().zip(self.writer.claim(specs)) {
            match answer {
                Ok(lease) => self.taken.push(Tracked::new(lease, &w.spec)),
                Err(e) if first_error.is_none() => {
                    first_error = Some(ApplyError {
                        at: w.at.cloned(),
                        what: e.to_string(),
                    });
                }
                Err(_) => {}
            }
        }
        if let Some(e) = first_error {
            return Err(e);
        }
        for t in &mut self.taken {
            t.extend(t.lease().resume(), Duration::ZERO, self.writer)
                .map_err(|e| ApplyError {
                    at: None,
                    what: e.to_string(),
                })?;
        }
        // Heirs go on where the lease of the running SA ends: the numbers before it stay with that one.
        for w in wanted {
            if let How::Heir(e) = &w.how
                && let Some(mut t) = keeper.heir_of(e.fixed.id, &w.spec)
            {
                let used = t.lease().limit();
                t.extend(used, Duration::ZERO, self.writer)
                    .map_err(|e| ApplyError {
                        at: None,
                        what: e.to_string(),
                    })?;
                self.taken.push(t);
            }
        }
        let deadline = Instant::now() + DISK;
        for t in &self.taken {
            while !t.is_durable() {
                if t.lease().has_failed() || Instant::now() > deadline {
                    return Err(ApplyError {
                        at: None,
                        what: "the lease store does not answer: see its log line".into(),
                    });
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    fn keep(mut self) {
        self.done = true;
    }
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // A block that an heir was given is lost, not reused: the running SA keeps its own.
        let unused = self
            .taken
            .drain(..)
            .filter(|t| !t.is_heir())
            .map(|t| t.unused())
            .collect();
        if let Err(e) = self.writer.release_many(unused) {
            tracing::error!(error = %e, "leases of a refused configuration could not be given back");
        }
    }
}

/// Stops inbound SAs and waits until no worker is still at work with them. Returns those stopped.
fn stop_and_wait(
    store: &mut Store,
    keeper: &mut Keeper,
    writer: &LeaseWriter,
    plane: &dyn DataPlane,
    heirs: &[Arc<SaEntry>],
) -> Result<Stopped, ApplyError> {
    let stopped = Stopped(heirs.iter().filter(|e| !e.disabled()).cloned().collect());
    if stopped.0.is_empty() {
        return Ok(stopped);
    }
    for e in &stopped.0 {
        e.set_disabled(true);
    }
    // A worker that acknowledges this publication has finished every burst that began before the mark. What an
    // engine or another worker's CPU still has of these SAs is refused when it comes back, as they are disabled.
    let barrier = store.draft();
    store.publish(barrier);
    let deadline = Instant::now() + RETIRE;
    loop {
        reap(store, keeper, writer, plane);
        if store.settled() {
            return Ok(stopped);
        }
        if Instant::now() > deadline {
            return Err(ApplyError {
                at: None,
                what: "a worker does not let go of the SAs to be replaced".into(),
            });
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// SAs that were stopped for a change; they resume if it fails.
struct Stopped(Vec<Arc<SaEntry>>);

impl Stopped {
    /// The change was made: they are never used again.
    fn for_good(mut self) {
        self.0.clear();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for e in &self.0 {
            e.set_disabled(false);
        }
    }
}

/// Puts the wanted SAs into the draft. Returns their leases.
fn fill(
    draft: &mut Draft,
    plan: &Plan<'_>,
    claims: &Claims<'_>,
    config: &Config,
    store: &mut Store,
    factory: &dyn CipherFactory,
    engines: &mut Engines<'_>,
) -> Result<Vec<Tracked>, ApplyError> {
    let now = engines.plane.now();
    for old in &plan.removed {
        draft.remove_sa(old.fixed.id);
    }
    // A policy may name a tunnel that has no SA yet.
    for t in &config.tunnels {
        store.tunnel(&t.name);
    }
    let leases: HashMap<&str, &Tracked> = claims.taken.iter().map(|t| (t.name(), t)).collect();
    let mut tracked = Vec::with_capacity(plan.wanted.len());
    for w in &plan.wanted {
        let refuse = |what: String| ApplyError {
            at: w.at.cloned(),
            what,
        };
        let Some(lease) = leases.get(w.spec.name.as_str()) else {
            return Err(refuse("there is no lease for its key".into()));
        };
        let mut start = lease.start();
        if let How::Heir(old) = &w.how {
            start.window_top = old.live.window.top();
        }
        let mut add = |draft: &mut Draft, place| {
            store
                .add_sa_on(draft, Arc::clone(&w.spec), factory, start, place, now)
                .map_err(|e| refuse(e.to_string()))
        };
        let place = engines.place(&w.spec).map_err(refuse)?;
        let mut id = add(draft, place)?;
        if place.engine != 0 {
            match engines.install(draft, id) {
                Ok(Installed::Engine) => {}
                Ok(Installed::Stopped(why)) => {
                    tracing::warn!(sa = %w.spec.name, why, "stopped: its tunnel needs a new SA");
                }
                Ok(Installed::Cpu(why)) => {
                    tracing::warn!(sa = %w.spec.name, why, "the CPU ciphers until the next rekey");
                    draft.remove_sa(id);
                    id = add(draft, Place::CPU)?;
                }
                Err(why) if w.spec.engine.is_some() => return Err(refuse(why)),
                // "auto" leaves the choice to us.
                Err(why) => {
                    tracing::info!(sa = %w.spec.name, why, "the CPU ciphers");
                    draft.remove_sa(id);
                    id = add(draft, Place::CPU)?;
                }
            }
        }
        if let Some(entry) = draft.snapshot().sa(id) {
            tracked.push(Tracked::clone(lease).attached(Arc::clone(entry)));
        }
    }
    choose_senders(draft, config, store);
    Ok(tracked)
}

/// SAs that engines were prepared for in one attempt: forgotten again unless it succeeds.
struct Engines<'p> {
    plane: &'p dyn DataPlane,
    prepared: Vec<SaId>,
    running: Arc<Snapshot>,
    /// What runs, by tunnel and direction; made when the first SA asks for an engine.
    earlier: Option<HashMap<(String, Direction), Arc<SaEntry>>>,
}

impl<'p> Engines<'p> {
    fn new(plane: &'p dyn DataPlane, running: Arc<Snapshot>) -> Self {
        Self {
            plane,
            prepared: Vec::new(),
            running,
            earlier: None,
        }
    }

    /// Where the SA goes, given the running one of its tunnel and direction, which it succeeds.
    fn place(&mut self, spec: &SaSpec) -> Result<Place, String> {
        if spec.offload == OffloadMode::Software {
            return self.plane.place(spec, None);
        }
        let earlier = self.earlier.get_or_insert_with(|| {
            let of = |e: &Arc<SaEntry>| {
                let key = (e.spec.tunnel.clone(), e.fixed.direction);
                (key, Arc::clone(e))
            };
            self.running.sas.iter().flatten().map(of).collect()
        });
        let before = earlier.get(&(spec.tunnel.clone(), spec.direction));
        self.plane.place(spec, before.map(|e| &**e))
    }

    fn install(&mut self, draft: &Draft, id: SaId) -> Result<Installed, String> {
        let Some(entry) = draft.snapshot().sa(id) else {
            return Err("it is not in the draft".into());
        };
        let installed = self.plane.install(entry)?;
        if installed == Installed::Engine {
            self.prepared.push(id);
        }
        Ok(installed)
    }

    fn keep(mut self) {
        self.prepared.clear();
    }
}

impl Drop for Engines<'_> {
    fn drop(&mut self) {
        for id in self.prepared.drain(..) {
            self.plane.remove(id);
        }
    }
}

/// The last outbound SA of a tunnel in the files sends.
fn choose_senders(draft: &mut Draft, config: &Config, store: &mut Store) {
    let outbound = draft
        .snapshot()
        .sas
        .iter()
        .flatten()
        .filter(|e| e.fixed.direction == Direction::Out);
    let ids: HashMap<String, SaId> = outbound
        .map(|e| (e.spec.name.clone(), e.fixed.id))
        .collect();
    let mut senders: HashMap<&str, SaId> = HashMap::new();
    for spec in config.sas.iter().filter(|s| s.direction == Direction::Out) {
        if let Some(id) = ids.get(&spec.name) {
            senders.insert(&spec.tunnel, *id);
        }
    }
    for (tunnel, id) in senders {
        let idx = store.tunnel(tunnel);
        if draft.snapshot().tunnels.at(idx.0).out != id.index {
            draft.set_outbound(idx, id);
        }
    }
}

/// Compiles both directions' policies into the draft. Returns how many changed.
fn set_policies(draft: &mut Draft, config: &Config, store: &Store) -> Result<usize, ApplyError> {
    let tunnel = |name: &str| store.find_tunnel(name);
    let compile = |old: &Spd| {
        let (spd, c) = old
            .updated(&config.policies, tunnel)
            .map_err(|e| ApplyError {
                at: None,
                what: e.to_string(),
            })?;
        Ok((Arc::new(spd), c.added.len() + c.removed.len() + c.changed))
    };
    let (out, changed_out) = compile(&draft.snapshot().spd_out)?;
    let (inbound, changed_in) = compile(&draft.snapshot().spd_in)?;
    draft.set_spd(out, inbound);
    Ok(changed_out + changed_in)
}
