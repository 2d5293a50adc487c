//! The control side of the SA store: drafts, publication, retirement.
//!
//! ```text
//!  draft = store.draft()        shares all parts with the current snapshot
//!  draft.add_sa / remove_sa / …  copies the chunks and shards it touches
//!  store.publish(draft)          one swap; the old snapshot is kept
//!  store.reap()                  drops snapshots that every worker has left; keys of removed SAs are wiped
//!                                with them, and their slots may be used again
//! ```

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::SystemTime;

use crate::chunked::Chunked;
use crate::cipher::{CipherError, CipherFactory};
use crate::fib::{Fib, RouteTo};
use crate::local::Locals;
use crate::quiesce::Quiesce;
use crate::runtime::{Install, Place, SaEntry, Start, TunnelIdx, mapped};
use crate::sa::{Direction, SaId, SaSpec};
use crate::sad::Sad;
use crate::snapshot::{NO_SA, Shared, Snapshot, TunnelSlot};
use crate::spd::Spd;
use arc_swap::ArcSwap;

/// Why an SA was not added.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No provider for the suite.
    #[error("SA \"{name}\": {source}")]
    Cipher {
        /// SA.
        name: String,
        /// Cause.
        #[source]
        source: CipherError,
    },
    /// Another inbound SA has the SPI at this destination.
    #[error("SA \"{name}\": SPI {spi} at {dst} is already in use by SA \"{other}\"")]
    DuplicateSpi {
        /// SA.
        name: String,
        /// SPI.
        spi: crate::sa::Spi,
        /// Destination.
        dst: std::net::IpAddr,
        /// The SA that has it.
        other: String,
    },
    /// All slots are in use.
    #[error("SA \"{name}\": the store is full ({limit} SAs); raise max_sas")]
    Full {
        /// SA.
        name: String,
        /// Slots.
        limit: u32,
    },
}

/// Counters of a tunnel that live on when its SAs are replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Wrong ICV.
    pub icv_failed: u64,
    /// Replays.
    pub replays: u64,
    /// Malformed.
    pub malformed: u64,
    /// Selector mismatches.
    pub selector: u64,
    /// Limits.
    pub limit: u64,
    /// Engine.
    pub engine: u64,
    /// Numbers lost on the way.
    pub lost: u64,
}

impl Totals {
    /// What an SA has counted so far.
    pub fn of(entry: &SaEntry) -> Self {
        let c = &entry.live.counters;
        Self {
            packets: c.packets.value(),
            bytes: c.bytes.value(),
            icv_failed: c.icv_failed.value(),
            replays: c.replays.value(),
            malformed: c.malformed.value(),
            selector: c.selector.value(),
            limit: c.limit.value(),
            engine: c.engine.value(),
            lost: entry.live.window.lost(),
        }
    }

    /// Adds another's counts.
    pub fn add(&mut self, o: &Self) {
        self.packets += o.packets;
        self.bytes += o.bytes;
        self.icv_failed += o.icv_failed;
        self.replays += o.replays;
        self.malformed += o.malformed;
        self.selector += o.selector;
        self.limit += o.limit;
        self.engine += o.engine;
        self.lost += o.lost;
    }
}

/// A tunnel: its name and what its past SAs have counted.
#[derive(Clone, Debug, Default)]
pub struct Tunnel {
    /// Name.
    pub name: String,
    /// Outbound counts of SAs that are gone.
    pub past_out: Totals,
    /// Inbound counts of SAs that are gone.
    pub past_in: Totals,
    /// How often another outbound SA took over: rekeys.
    pub rekeys: u64,
    /// When it was the last time.
    pub last_rekey: Option<SystemTime>,
}

/// The store; control owns it.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    superseded: VecDeque<Arc<Snapshot>>,
    retiring: Vec<(u64, Arc<SaEntry>)>,
    tunnels: Vec<Tunnel>,
    by_name: HashMap<String, TunnelIdx>,
    generations: Vec<u32>,
    free: Vec<u32>,
    max_sas: u32,
    /// By how many per cent soft limits come earlier at most, and the chance that decides.
    jitter: Option<(u8, RandomState)>,
}

/// A state in the making. Dropping it changes nothing, except that tunnels named in it keep their index.
#[derive(Debug)]
pub struct Draft {
    snapshot: Snapshot,
    removed: Vec<Arc<SaEntry>>,
    taken: Vec<u32>,
    /// Tunnels whose sender was set.
    switched: BTreeSet<TunnelIdx>,
}

impl Store {
    /// An empty store for `workers` workers and at most `max_sas` SAs.
    pub fn new(workers: usize, max_sas: u32) -> Self {
        let snapshot = Snapshot {
            epoch: 1,
            sad: Sad::default(),
            sas: Chunked::new(None),
            tunnels: Chunked::new(TunnelSlot { out: NO_SA }),
            dummies: Arc::new(Vec::new()),
            spd_out: Arc::new(Spd::empty(Direction::Out)),
            spd_in: Arc::new(Spd::empty(Direction::In)),
            fib: Arc::new(Fib::default()),
            locals: Arc::new(Locals::default()),
        };
        let shared = Shared {
            current: Arc::new(ArcSwap::from_pointee(snapshot)),
            quiesce: Quiesce::new(workers),
        };
        Self {
            shared: Arc::new(shared),
            superseded: VecDeque::new(),
            retiring: Vec::new(),
            tunnels: Vec::new(),
            by_name: HashMap::new(),
            generations: Vec::new(),
            free: Vec::new(),
            max_sas,
            jitter: None,
        }
    }

    /// From now on hard limits of new SAs have soft ones before them, and soft limits come earlier by chance, at most by so many per cent: SAs that began
    /// together do not expire together.
    pub fn set_jitter(&mut self, percent: u8) {
        self.jitter = Some((percent.min(100), RandomState::new()));
    }

    /// What part of its soft limits an SA is to lose, of 65 536; `None`: limits are taken as they are.
    fn early(&self, id: SaId, now: u64) -> Option<u16> {
        let (percent, chance) = self.jitter.as_ref()?;
        let part = (chance.hash_one((id, now)) >> 48) * u64::from(*percent) / 100;
        u16::try_from(part).ok()
    }

    /// What workers read from.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The current state.
    pub fn current(&self) -> Arc<Snapshot> {
        self.shared.latest()
    }

    /// Starts a change.
    pub fn draft(&self) -> Draft {
        Draft {
            snapshot: Snapshot::clone(&self.shared.current.load()),
            removed: Vec::new(),
            taken: Vec::new(),
            switched: BTreeSet::new(),
        }
    }

    /// Index of a tunnel, given on first mention and kept until it is [forgotten](Self::forget_tunnels).
    pub fn tunnel(&mut self, name: &str) -> TunnelIdx {
        if let Some(idx) = self.by_name.get(name) {
            return *idx;
        }
        let idx = TunnelIdx(u32::try_from(self.tunnels.len()).unwrap_or(u32::MAX));
        self.tunnels.push(Tunnel {
            name: name.to_owned(),
            ..Tunnel::default()
        });
        self.by_name.insert(name.to_owned(), idx);
        idx
    }

    /// Index of a tunnel that was mentioned before.
    pub fn find_tunnel(&self, name: &str) -> Option<TunnelIdx> {
        self.by_name.get(name).copied()
    }

    /// Tunnels that have a name.
    pub fn named_tunnels(&self) -> usize {
        self.by_name.len()
    }

    /// Forgets the tunnels that are not wanted and that no SA and no route names any more: their names and what they have
    /// counted. Their indices are not given to others, as packets, flow caches and reports may still carry them.
    pub fn forget_tunnels(&mut self, wanted: &HashSet<&str>) {
        let current = self.shared.current.load();
        let sas = current.sas.iter().flatten();
        let sas = sas.chain(self.retiring.iter().map(|(_, e)| e));
        let routes = current.fib.routes().iter().filter_map(|r| match r.to {
            RouteTo::Tunnel(t) => Some(t),
            _ => None,
        });
        let used: HashSet<TunnelIdx> = sas.map(|e| e.fixed.tunnel).chain(routes).collect();
        let tunnels = &mut self.tunnels;
        self.by_name.retain(|name, idx| {
            let stays = wanted.contains(name.as_str()) || used.contains(idx);
            if !stays && let Some(t) = tunnels.get_mut(idx.0 as usize) {
                *t = Tunnel::default();
            }
            stays
        });
    }

    /// All tunnels by index; forgotten ones have no name.
    pub fn tunnels(&self) -> &[Tunnel] {
        &self.tunnels
    }

    /// Both directions' counts of a tunnel, past and present SAs: (out, in).
    pub fn totals(&self) -> Vec<(Totals, Totals)> {
        let mut sums: Vec<_> = self
            .tunnels
            .iter()
            .map(|t| (t.past_out, t.past_in))
            .collect();
        let current = self.shared.current.load();
        let live = current
            .sas
            .iter()
            .flatten()
            .chain(self.retiring.iter().map(|(_, e)| e));
        for entry in live {
            let Some(sum) = sums.get_mut(entry.fixed.tunnel.0 as usize) else {
                continue;
            };
            match entry.fixed.direction {
                Direction::Out => sum.0.add(&Totals::of(entry)),
                Direction::In => sum.1.add(&Totals::of(entry)),
            }
        }
        sums
    }

    /// Adds an SA that the CPU ciphers to a draft; see [`add_sa_on`](Self::add_sa_on).
    pub fn add_sa(
        &mut self,
        draft: &mut Draft,
        spec: Arc<SaSpec>,
        factory: &dyn CipherFactory,
        start: Start,
        now: u64,
    ) -> Result<SaId, StoreError> {
        self.add_sa_on(draft, spec, factory, start, Place::CPU, now)
    }

    /// Adds an SA to a draft. An outbound SA becomes the tunnel's sender at once; see
    /// [`Draft::set_outbound`] to choose another.
    pub fn add_sa_on(
        &mut self,
        draft: &mut Draft,
        spec: Arc<SaSpec>,
        factory: &dyn CipherFactory,
        start: Start,
        place: Place,
        now: u64,
    ) -> Result<SaId, StoreError> {
        let cipher = factory
            .make(spec.suite, &spec.keys, spec.esn, spec.direction)
            .map_err(|source| StoreError::Cipher {
                name: spec.name.clone(),
                source,
            })?;
        let provider = factory.provider_for(spec.suite).unwrap_or("none");
        if spec.direction == Direction::In
            && let Some(other) =
                draft
                    .snapshot
                    .sad
                    .find(spec.spi.value(), mapped(spec.dst), spec.vrf)
        {
            return Err(StoreError::DuplicateSpi {
                name: spec.name.clone(),
                spi: spec.spi,
                dst: spec.dst,
                other: other.spec.name.clone(),
            });
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.generations.len()).unwrap_or(u32::MAX);
                if index >= self.max_sas {
                    return Err(StoreError::Full {
                        name: spec.name.clone(),
                        limit: self.max_sas,
                    });
                }
                self.generations.push(0);
                index
            }
        };
        draft.taken.push(index);
        let generation = &mut self.generations[index as usize];
        *generation = generation.wrapping_add(1);
        let id = SaId {
            index,
            generation: *generation,
        };
        let tunnel = self.tunnel(&spec.tunnel);
        let workers = u32::try_from(self.shared.workers())
            .unwrap_or(u32::MAX)
            .max(1);
        // Both directions of a tunnel live on one worker.
        let owner = u16::try_from(tunnel.0 % workers).unwrap_or(0);
        // A daemon has limits and chance of its own.
        let ours = !spec.name.starts_with(crate::file::MIRROR_PREFIX);
        let mut entry = SaEntry::new(
            spec,
            Install {
                id,
                tunnel,
                owner,
                cipher,
                provider,
                start,
                place,
                now,
            },
        );
        if ours && let Some(early) = self.early(id, now) {
            entry.hasten(early);
        }
        let entry = Arc::new(entry);
        draft.snapshot.sas.set(index, Some(Arc::clone(&entry)));
        match entry.fixed.direction {
            Direction::In => draft.snapshot.sad.insert(entry),
            Direction::Out => {
                draft.set_outbound(tunnel, id);
                if entry.spec.tfc.dummies() != 0 {
                    Arc::make_mut(&mut draft.snapshot.dummies).push(id);
                }
            }
        }
        Ok(id)
    }

    /// Makes the draft the current state. Workers see it with their next burst.
    pub fn publish(&mut self, draft: Draft) {
        let Draft {
            mut snapshot,
            removed,
            switched,
            ..
        } = draft;
        let old = self.shared.current.load_full();
        snapshot.epoch = old.epoch + 1;
        for idx in switched {
            let (before, after) = (old.tunnels.at(idx.0).out, snapshot.tunnels.at(idx.0).out);
            if let Some(t) = self.tunnels.get_mut(idx.0 as usize)
                && after != NO_SA
                && after != before
                && (before != NO_SA || t.past_out.packets > 0)
            {
                t.rekeys += 1;
                t.last_rekey = Some(SystemTime::now());
            }
        }
        self.retiring
            .extend(removed.into_iter().map(|e| (snapshot.epoch, e)));
        self.shared.current.store(Arc::new(snapshot));
        self.superseded.push_back(old);
    }

    /// Gives up on a draft: its new slots are free again.
    pub fn discard(&mut self, draft: Draft) {
        self.free.extend(&draft.taken);
    }

    /// Drops what no worker uses any more. Returns the SAs whose keys are gone now. Cheap; call it often.
    pub fn reap(&mut self) -> Vec<SaId> {
        let oldest = self.shared.quiesce.oldest_in_use();
        while self.superseded.front().is_some_and(|s| s.epoch < oldest) {
            self.superseded.pop_front();
        }
        let superseded_left = self.superseded.front().map_or(u64::MAX, |s| s.epoch);
        let mut gone = Vec::new();
        let tunnels = &mut self.tunnels;
        let free = &mut self.free;
        self.retiring.retain(|(epoch, entry)| {
            if superseded_left < *epoch {
                return true;
            }
            if let Some(tunnel) = tunnels.get_mut(entry.fixed.tunnel.0 as usize) {
                match entry.fixed.direction {
                    Direction::Out => tunnel.past_out.add(&Totals::of(entry)),
                    Direction::In => tunnel.past_in.add(&Totals::of(entry)),
                }
            }
            free.push(entry.fixed.id.index);
            gone.push(entry.fixed.id);
            false
        });
        gone
    }

    /// Whether every worker had left all earlier states at the last [`reap`](Self::reap).
    pub fn settled(&self) -> bool {
        self.superseded.is_empty()
    }

    /// Every awake worker has this state, or a later one, in its hands and nothing older.
    pub fn acknowledged(&self) -> u64 {
        self.shared.quiesce.oldest_in_use()
    }

    /// SAs removed but not yet out of use.
    pub fn retiring(&self) -> usize {
        self.retiring.len()
    }
}

impl Draft {
    /// The state as it would be published.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Removes an SA; it retires once the draft is published and all workers have moved on.
    pub fn remove_sa(&mut self, id: SaId) -> bool {
        let Some(entry) = self.snapshot.sa(id).cloned() else {
            return false;
        };
        self.snapshot.sad.remove(&entry);
        self.snapshot.sas.set(id.index, None);
        let tunnel = entry.fixed.tunnel;
        if self.snapshot.tunnels.at(tunnel.0).out == id.index {
            self.snapshot
                .tunnels
                .set(tunnel.0, TunnelSlot { out: NO_SA });
        }
        if entry.spec.tfc.dummies() != 0 {
            Arc::make_mut(&mut self.snapshot.dummies).retain(|d| *d != id);
        }
        self.removed.push(entry);
        true
    }

    /// Makes an outbound SA the sender of its tunnel.
    pub fn set_outbound(&mut self, tunnel: TunnelIdx, id: SaId) {
        self.set_sender(tunnel, Some(id));
    }

    /// Makes an outbound SA the sender of its tunnel, or leaves the tunnel without one.
    pub fn set_sender(&mut self, tunnel: TunnelIdx, id: Option<SaId>) {
        let before = self.snapshot.outbound(tunnel);
        if let (Some(before), Some(entry)) = (before, id.and_then(|id| self.snapshot.sa(id))) {
            entry.inherit_path_mtu(before);
        }
        let out = id.map_or(NO_SA, |id| id.index);
        if self.snapshot.tunnels.at(tunnel.0).out != out {
            self.snapshot.tunnels.set(tunnel.0, TunnelSlot { out });
            self.switched.insert(tunnel);
        }
    }

    /// Replaces the policies.
    pub fn set_spd(&mut self, out: Arc<Spd>, inbound: Arc<Spd>) {
        self.snapshot.spd_out = out;
        self.snapshot.spd_in = inbound;
    }

    /// Replaces the routes.
    pub fn set_fib(&mut self, fib: Arc<Fib>) {
        self.snapshot.fib = fib;
    }

    /// Replaces the gateway's own addresses.
    pub fn set_locals(&mut self, locals: Arc<Locals>) {
        self.snapshot.locals = locals;
    }
}

#[cfg(test)]
mod tests;
