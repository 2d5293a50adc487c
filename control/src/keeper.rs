//! Keeps every SA's lease ahead of its use, and gives leases back when SAs are gone.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use sa_store::lease::policy::{Blocks, Renewal, end_of_numbers};
use sa_store::lease::{Lease, LeaseError, LeaseWriter, Release};
use sa_store::runtime::{SaEntry, Start};
use sa_store::sa::{Direction, SaId, SaSpec};

/// SAs looked at in one round beside those that carry traffic.
const COLD: usize = 1024;

/// The lease of one SA.
#[derive(Clone, Debug)]
pub struct Tracked {
    name: String,
    direction: Direction,
    lease: Arc<Lease>,
    renewal: Renewal,
    /// Limit that was asked for.
    asked: u64,
    /// Outbound: first number that this SA may use. Another SA of the same key used those before.
    first: u64,
    heir: bool,
    entry: Option<Arc<SaEntry>>,
    /// Number at the last look.
    seen: u64,
    /// Edge that workers have been given while the higher one is still on disk.
    lowering: Option<u64>,
}

impl Tracked {
    /// A lease that was just claimed for `spec`.
    pub fn new(lease: Arc<Lease>, spec: &SaSpec) -> Self {
        let renewal = Renewal::new(
            Blocks::of(spec.direction, spec.esn),
            end_of_numbers(spec.direction, spec.esn),
            // The first number of a new key, sent or received, is 1.
            lease.resume() <= 1,
        );
        Self {
            name: spec.name.clone(),
            direction: spec.direction,
            first: lease.resume(),
            asked: lease.limit(),
            seen: lease.resume(),
            lease,
            renewal,
            heir: false,
            entry: None,
            lowering: None,
        }
    }

    /// Name of the SA.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lease.
    pub fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// The running SA that uses it.
    pub fn entry(&self) -> Option<&Arc<SaEntry>> {
        self.entry.as_ref()
    }

    /// Whether the lease was another SA's before.
    pub fn is_heir(&self) -> bool {
        self.heir
    }

    /// Where the SA begins. Only once [`is_durable`](Self::is_durable).
    pub fn start(&self) -> Start {
        match self.direction {
            Direction::Out => Start {
                next_seq: self.first,
                lease_end: self.lease.limit(),
                window_top: 0,
            },
            Direction::In => Start {
                next_seq: 1,
                lease_end: self.end(),
                window_top: self.first,
            },
        }
    }

    /// Asks for more numbers if `used` says that they are wanted.
    ///
    /// # Errors
    /// The writer is gone.
    pub fn extend(
        &mut self,
        used: u64,
        now: Duration,
        writer: &LeaseWriter,
    ) -> Result<(), LeaseError> {
        // What was asked for counts as there: one request is under way at a time.
        if let Some(limit) = self.renewal.poll(used, self.asked, now) {
            self.asked = limit;
            writer.advance(&self.lease, limit)?;
        }
        Ok(())
    }

    /// Whether everything asked for is on disk.
    pub fn is_durable(&self) -> bool {
        self.lease.limit() >= self.asked
    }

    /// With the running SA that uses it.
    pub fn attached(mut self, entry: Arc<SaEntry>) -> Self {
        self.entry = Some(entry);
        self
    }

    /// How to give it back when its SA was never installed.
    pub fn unused(self) -> (Arc<Lease>, Release) {
        let at = Release::At(self.lease.resume());
        (self.lease, at)
    }

    /// First number that may not be used or accepted yet.
    fn end(&self) -> u64 {
        match self.direction {
            Direction::Out => self.lease.limit(),
            Direction::In => self.lease.limit().saturating_add(1),
        }
    }

    /// Highest number accepted, or next number to send: what a later life goes on from.
    fn used(entry: &SaEntry) -> u64 {
        match entry.fixed.direction {
            Direction::Out => entry.next_seq(),
            Direction::In => entry.live.window.top(),
        }
    }

    /// Passes on what became durable, asks for more. True when the SA carried something since the last look.
    fn look(&mut self, now: Duration, writer: &LeaseWriter) -> Result<bool, LeaseError> {
        let Some(entry) = self.entry.clone() else {
            return Ok(false);
        };
        if self.lowering.is_some() {
            return Ok(true);
        }
        let used = entry.reached();
        let end = self.end();
        if entry.lease_end() < end {
            entry.extend_lease(end, self.renewal.renew_at(self.lease.limit()));
        }
        self.extend(used, now, writer)?;
        let moved = used != self.seen;
        self.seen = used;
        Ok(moved || !self.is_durable())
    }
}

impl Tracked {
    /// Binds the workers to a lower edge, if the SA has turned out slow.
    fn lower(&mut self, now: Duration) -> bool {
        let Some(entry) = &self.entry else {
            return false;
        };
        let guarded = self.direction == Direction::In && self.entry_is_guarded();
        if !guarded || self.lowering.is_some() || !self.is_durable() || self.lease.has_failed() {
            return false;
        }
        let Some(limit) = self.renewal.lower(entry.reached(), self.asked, now) else {
            return false;
        };
        entry.extend_lease(limit.saturating_add(1), self.renewal.renew_at(limit));
        self.lowering = Some(limit);
        true
    }

    /// No worker uses the higher edge any more: the lower one may go to disk, unless something came in between.
    fn lowered(&mut self, writer: &LeaseWriter) -> Result<(), LeaseError> {
        let (Some(limit), Some(entry)) = (self.lowering.take(), &self.entry) else {
            return Ok(());
        };
        if Self::used(entry) > limit {
            return Ok(());
        }
        self.asked = limit;
        writer.lower(&self.lease, limit)
    }

    fn entry_is_guarded(&self) -> bool {
        self.entry
            .as_ref()
            .is_some_and(|e| e.live.window.size() != 0)
    }
}

/// How many SAs use a lease, and the highest number that any of those which are gone has used.
#[derive(Debug, Default)]
struct Shared {
    users: usize,
    used: u64,
}

/// All leases in use.
#[derive(Debug, Default)]
pub struct Keeper {
    active: HashMap<SaId, Tracked>,
    retired: HashMap<SaId, Tracked>,
    shared: HashMap<LeasePtr, Shared>,
    /// Round-robin over all.
    order: VecDeque<SaId>,
    hot: Vec<SaId>,
}

/// Tells leases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct LeasePtr(usize);

impl LeasePtr {
    fn of(lease: &Arc<Lease>) -> Self {
        Self(Arc::as_ptr(lease).addr())
    }
}

impl Keeper {
    /// Begins to keep the lease of a running SA.
    pub fn track(&mut self, t: Tracked) {
        let Some(id) = t.entry.as_ref().map(|e| e.fixed.id) else {
            return;
        };
        self.shared.entry(LeasePtr::of(&t.lease)).or_default().users += 1;
        self.order.push_back(id);
        self.hot.push(id);
        self.active.insert(id, t);
    }

    /// The lease of a running SA for another SA with the same key: disjoint numbers from now on, because the
    /// running SA gets no more than it has.
    pub fn heir_of(&self, id: SaId, spec: &SaSpec) -> Option<Tracked> {
        let old = self.active.get(&id)?;
        let mut heir = Tracked::new(Arc::clone(&old.lease), spec);
        heir.heir = true;
        heir.asked = old.asked;
        heir.first = old.asked;
        Some(heir)
    }

    /// The SA was removed; its lease ends when no worker uses it any more.
    pub fn retire(&mut self, id: SaId) {
        if let Some(t) = self.active.remove(&id) {
            self.retired.insert(id, t);
        }
    }

    /// Whether some removed SA is still in use.
    pub fn is_retiring(&self) -> bool {
        !self.retired.is_empty()
    }

    /// The removed SAs that are still in use.
    pub fn retiring(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.retired.values().filter_map(Tracked::entry)
    }

    /// These SAs are out of use. Leases that nobody uses any more end at their exact numbers; nobody waits for the disk.
    ///
    /// # Errors
    /// The store has ended: the committed limits stand, nothing is reused.
    pub fn gone(&mut self, ids: &[SaId], writer: &LeaseWriter) -> Result<(), LeaseError> {
        let ended = ids.iter().filter_map(|id| self.end(*id)).collect();
        writer.give_back(ended)
    }

    fn end(&mut self, id: SaId) -> Option<(Arc<Lease>, Release)> {
        let t = self.retired.remove(&id)?;
        let ptr = LeasePtr::of(&t.lease);
        let shared = self.shared.get_mut(&ptr)?;
        shared.users -= 1;
        shared.used = shared
            .used
            .max(t.entry.as_ref().map_or(0, |e| Tracked::used(e)));
        if shared.users > 0 {
            return None;
        }
        let used = self.shared.remove(&ptr)?.used;
        Some((t.lease, Release::At(used)))
    }

    /// Looks at the SAs that carry traffic, and at some of the others.
    ///
    /// # Errors
    /// The writer is gone: no SA gets more numbers.
    pub fn round(&mut self, now: Duration, writer: &LeaseWriter) -> Result<(), LeaseError> {
        let mut hot = std::mem::take(&mut self.hot);
        for _ in 0..COLD.min(self.order.len()) {
            let Some(id) = self.order.pop_front() else {
                break;
            };
            if self.active.contains_key(&id) {
                self.order.push_back(id);
                hot.push(id);
            }
        }
        hot.sort_unstable();
        hot.dedup();
        for id in hot {
            if let Some(t) = self.active.get_mut(&id)
                && t.look(now, writer)?
            {
                self.hot.push(id);
            }
        }
        Ok(())
    }

    /// This SA is to be looked at in the next round.
    pub fn attend(&mut self, id: SaId) {
        self.hot.push(id);
    }

    /// Gives back room of inbound SAs that turned out slow. True when workers were given lower edges: once every
    /// worker has begun a new burst, [`lowered`](Self::lowered) is to be called.
    pub fn lower(&mut self, now: Duration) -> bool {
        let mut any = false;
        for t in self.active.values_mut() {
            // A lease that an SA inherited is also in the hands of the one before.
            let alone = self
                .shared
                .get(&LeasePtr::of(&t.lease))
                .is_some_and(|s| s.users == 1);
            any |= alone && t.lower(now);
        }
        any
    }

    /// Every worker keeps to the lower edges: they go to disk.
    ///
    /// # Errors
    /// The writer is gone; the edges on disk are the higher ones.
    pub fn lowered(&mut self, writer: &LeaseWriter) -> Result<(), LeaseError> {
        for (id, t) in &mut self.active {
            if t.lowering.is_some() {
                t.lowered(writer)?;
                self.hot.push(*id);
            }
        }
        Ok(())
    }

    /// Some worker may still use the higher edges: they stay.
    pub fn not_lowered(&mut self) {
        for (id, t) in &mut self.active {
            if t.lowering.take().is_some() {
                self.hot.push(*id);
            }
        }
    }

    /// SAs that carried something at the last look.
    pub fn hot(&self) -> impl Iterator<Item = &Arc<SaEntry>> {
        self.hot
            .iter()
            .filter_map(|id| self.active.get(id)?.entry.as_ref())
    }

    /// Ends all leases. `stopped`: the workers have let go of everything, so the exact numbers are known.
    ///
    /// # Errors
    /// The store did not take it: the committed limits stand, nothing is reused.
    pub fn finish(&mut self, stopped: bool, writer: &LeaseWriter) -> Result<(), LeaseError> {
        self.retired.extend(self.active.drain());
        let ids: Vec<SaId> = self.retired.keys().copied().collect();
        let mut ended: Vec<_> = ids.iter().filter_map(|id| self.end(*id)).collect();
        if !stopped {
            for (_, how) in &mut ended {
                *how = Release::Unknown;
            }
        }
        writer.release_many(ended)
    }

    /// Whether some lease that was asked for is not on disk yet.
    pub fn is_waiting(&self) -> bool {
        self.hot
            .iter()
            .filter_map(|id| self.active.get(id))
            .any(|t| !t.is_durable() && !t.lease.has_failed())
    }

    /// How many leases are kept.
    pub fn len(&self) -> usize {
        self.active.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    /// Leases whose store failed.
    pub fn failed(&self) -> usize {
        self.active
            .values()
            .filter(|t| t.lease.has_failed())
            .count()
    }
}
