//! Sticky events of SAs, and what else an operator should know: counted, logged, kept for the API.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sa_store::file::MIRROR_PREFIX;
use sa_store::runtime::{SaEntry, event};
use sa_store::sa::{Direction, SaId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Events kept for the API. A follower that falls behind further is told how many it missed.
const KEPT: usize = 4096;
/// How long a state that has no end of its own is held after it was last seen.
const FADES: Duration = Duration::from_secs(30);
/// Kinds of SA events, in the order of their bits.
const KINDS: u32 = 11;
/// Counted, but neither logged nor kept.
const ROUTINE: u32 = event::FIRST_USE;
/// May pass and come again; the others hold for the rest of the SA's life.
const AGAIN: u32 = event::LEASE_OUT | event::REPLAY_BURST;
/// An IKE daemon is told of these.
const LIMITS: u32 = event::SOFT_PACKETS
    | event::SOFT_BYTES
    | event::SEQUENCE_LOW
    | event::ENGINE_LOST
    | event::HARD
    | event::SEQUENCE_END;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Number, from 1, without gaps: a reader sees what it missed.
    pub number: u64,
    /// Seconds since 1970.
    pub time: u64,
    /// Kind: `soft_packets`, `hard`, `reload`, …
    pub kind: String,
    /// SA that it is about.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sa: Option<String>,
    /// Its tunnel.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tunnel: Option<String>,
    /// In words.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub text: Option<String>,
    /// Whether it is a state: `on` begins and holds until `off`. Absent for what merely happened.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub state: Option<Edge>,
}

/// Begin or end of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edge {
    /// It holds from now on.
    On,
    /// It holds no longer.
    Off,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct About<'a> {
    sa: Option<&'a str>,
    tunnel: Option<&'a str>,
    other: &'a str,
}

impl<'a> About<'a> {
    /// An SA, and its tunnel.
    pub fn sa(sa: &'a str, tunnel: &'a str) -> Self {
        Self {
            sa: Some(sa).filter(|s| !s.is_empty()),
            tunnel: Some(tunnel),
            other: "",
        }
    }

    /// A tunnel.
    pub fn tunnel(tunnel: &'a str) -> Self {
        Self {
            tunnel: Some(tunnel),
            ..Self::default()
        }
    }

    /// Something else, by name: an engine, a link.
    pub fn other(name: &'a str) -> Self {
        Self {
            other: name,
            ..Self::default()
        }
    }
}

/// What a follower gets at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Number of the last event that this batch covers: what the next one goes on from.
    pub last: u64,
    /// Events that are no longer kept. When there are any, `states` says what holds now.
    #[serde(default)]
    pub missed: u64,
    /// All states that hold, each as the event that began it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub states: Option<Vec<Event>>,
    /// Events in order.
    pub events: Vec<Event>,
}

/// Whose state it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Sa(SaId),
    Named(String),
}

/// A state that holds.
#[derive(Debug)]
struct Held {
    event: Event,
    /// When it was last seen, for states without an end of their own.
    seen: Option<Instant>,
}

/// Recent events, states that hold, and how many of each kind there were.
#[derive(Debug)]
pub struct Events {
    recent: VecDeque<Event>,
    last: u64,
    counts: [u64; KINDS as usize],
    others: BTreeMap<String, u64>,
    /// By slot: generation of the SA and what was reported of it. A limit that was passed is told once.
    reported: Vec<(u32, u32)>,
    states: BTreeMap<(Subject, String), Held>,
    /// SAs whose lease was low at the last look.
    low: BTreeSet<SaId>,
    /// SAs of an IKE daemon's that have met a limit, which the daemon is to be told.
    limits: Vec<SaId>,
    told: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            recent: VecDeque::new(),
            last: 0,
            counts: [0; KINDS as usize],
            others: BTreeMap::new(),
            reported: Vec::new(),
            states: BTreeMap::new(),
            low: BTreeSet::new(),
            limits: Vec::new(),
            told: watch::channel(0).0,
        }
    }
}

impl Events {
    /// Looks at an SA's sticky bits and reports what is new.
    pub fn collect(&mut self, entry: &SaEntry) {
        let bits = entry.events() & !event::LEASE_LOW;
        if bits == 0 {
            return;
        }
        let id = entry.fixed.id;
        let slot = id.index as usize;
        if self.reported.len() <= slot {
            self.reported.resize(slot + 1, (0, 0));
        }
        let known = &mut self.reported[slot];
        if known.0 != id.generation {
            *known = (id.generation, 0);
        }
        let bits = bits & !known.1;
        if bits == 0 {
            return;
        }
        known.1 |= bits & !AGAIN;
        entry.clear_events(bits & AGAIN);
        if bits & LIMITS != 0 && entry.spec.name.starts_with(MIRROR_PREFIX) {
            self.limits.push(id);
        }
        for i in (0..KINDS).filter(|i| bits >> i & 1 == 1) {
            self.counts[i as usize] += 1;
        }
        for name in event::names(bits & !ROUTINE) {
            let spec = &entry.spec;
            match name {
                "lease_out" if spec.direction == Direction::In => {
                    tracing::warn!(event = name, sa = %spec.name, tunnel = %spec.tunnel, spi = %spec.spi, "packets above the window's edge on disk were refused; the edge follows");
                }
                "hard" | "sequence_end" | "lease_out" => {
                    tracing::warn!(event = name, sa = %spec.name, tunnel = %spec.tunnel, spi = %spec.spi, "SA carries nothing more until it is replaced or its lease grows");
                }
                "engine_lost" => {
                    tracing::warn!(event = name, sa = %spec.name, tunnel = %spec.tunnel, spi = %spec.spi, "SA is stopped: the engine that numbered its packets was lost; it needs a rekey now");
                }
                "replay_burst" => {
                    tracing::warn!(event = name, sa = %spec.name, tunnel = %spec.tunnel, spi = %spec.spi, src = %spec.src, dst = %spec.dst, "many packets in a row are forged or replayed");
                }
                _ => {
                    tracing::info!(event = name, sa = %spec.name, tunnel = %spec.tunnel, spi = %spec.spi, "SA needs a rekey soon")
                }
            }
            self.hold_of(entry, name, matches!(name, "lease_out" | "replay_burst"));
        }
    }

    /// SAs of an IKE daemon's that have met a limit since this was last asked.
    pub(crate) fn take_limits(&mut self) -> Vec<SaId> {
        std::mem::take(&mut self.limits)
    }

    /// Looks at an SA's lease, once in a while: numbers that are wanted and do not come are told.
    pub fn watch_lease(&mut self, entry: &SaEntry) {
        let id = entry.fixed.id;
        if entry.events() & event::LEASE_LOW == 0 {
            return;
        }
        if !self.low.insert(id) {
            self.hold_of(entry, "lease_low", true);
        }
    }

    /// A peer behind a NAT sends from elsewhere than its SA says: a state until it ceases, or the SA follows.
    pub fn moved(&mut self, entry: &SaEntry, from: SocketAddr) {
        let key = (Subject::Sa(entry.fixed.id), "mapping_change".to_owned());
        let text = format!("packets come from {from}");
        match self.states.get_mut(&key) {
            Some(held) if held.event.text.as_ref() == Some(&text) => {
                held.seen = Some(Instant::now());
                return;
            }
            Some(_) => self.end(&key),
            None => {}
        }
        let spec = &entry.spec;
        tracing::info!(sa = %spec.name, tunnel = %spec.tunnel, %from, "the peer's mapping has changed");
        let about = About::sa(&spec.name, &spec.tunnel);
        self.begin(key, about, Some(text), Some(Instant::now()));
    }

    /// Once in a while: forgets states that were not seen again, and SAs whose lease is no longer low.
    pub fn settle(&mut self, now: Instant, is_low: impl Fn(SaId) -> bool) {
        self.low.retain(|id| is_low(*id));
        let faded: Vec<_> = self
            .states
            .iter()
            .filter(|(_, h)| h.seen.is_some_and(|s| now.duration_since(s) >= FADES))
            .map(|(k, _)| k.clone())
            .collect();
        for key in faded {
            self.end(&key);
        }
    }

    /// An SA is gone, and with it whatever was its state.
    pub fn forget(&mut self, sa: SaId) {
        let from = (Subject::Sa(sa), String::new());
        let its: Vec<_> = self
            .states
            .range(from..)
            .take_while(|((s, _), _)| *s == Subject::Sa(sa))
            .map(|(k, _)| k.clone())
            .collect();
        for key in its {
            self.end(&key);
        }
        self.low.remove(&sa);
    }

    /// Adds something that is not an SA's.
    pub fn note(&mut self, kind: &str, text: impl Into<String>) {
        self.tell(kind, About::default(), text.into());
    }

    /// Adds something that happened.
    pub fn tell(&mut self, kind: &str, about: About<'_>, text: String) {
        self.push(kind, about, Some(text), None);
    }

    /// A state begins. One that holds already is not told again.
    pub fn hold(&mut self, kind: &str, about: About<'_>, text: String) {
        let subject = about.tunnel.unwrap_or(about.other).to_owned();
        let key = (Subject::Named(subject), kind.to_owned());
        if self.states.contains_key(&key) {
            return;
        }
        self.begin(key, about, Some(text), None);
    }

    /// The state of a tunnel, or of something else by that name, is over.
    pub fn release(&mut self, kind: &str, subject: &str) {
        self.end(&(Subject::Named(subject.to_owned()), kind.to_owned()));
    }

    /// Events after number `after`, oldest first.
    pub fn since(&self, after: u64) -> impl Iterator<Item = &Event> {
        let first = self.recent.front().map_or(0, |e| e.number);
        let skip = usize::try_from((after + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        self.recent.iter().skip(skip)
    }

    /// What a follower gets that has seen everything up to `after`: at most `most` events, and the present states when
    /// it missed some. `None`: from now on, with the present states.
    pub fn batch(&self, after: Option<u64>, most: usize) -> Batch {
        // A number of an earlier run says nothing.
        let Some(after) = after.filter(|a| *a <= self.last) else {
            return Batch {
                last: self.last,
                states: Some(self.states().cloned().collect()),
                ..Batch::default()
            };
        };
        let first = self.recent.front().map_or(self.last + 1, |e| e.number);
        let missed = first.saturating_sub(after + 1);
        if missed > 0 {
            // Going on with what is left would contradict the states: they are the newest there is.
            return Batch {
                last: self.last,
                missed: self.last - after,
                states: Some(self.states().cloned().collect()),
                events: Vec::new(),
            };
        }
        let events: Vec<Event> = self.since(after).take(most).cloned().collect();
        Batch {
            last: events.last().map_or(after, |e| e.number),
            events,
            ..Batch::default()
        }
    }

    /// States that hold, each as the event that began it.
    pub fn states(&self) -> impl Iterator<Item = &Event> {
        self.states.values().map(|h| &h.event)
    }

    /// Changes whenever there is a new event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    /// SA events so far, by kind.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        event::names(u32::MAX >> (32 - KINDS)).zip(self.counts)
    }

    /// Everything that was told so far, by kind.
    pub fn totals(&self) -> impl Iterator<Item = (&str, u64)> {
        self.others.iter().map(|(k, n)| (k.as_str(), *n))
    }

    /// States that hold, by kind.
    pub fn holding(&self) -> BTreeMap<&str, u64> {
        let mut by_kind = BTreeMap::new();
        for (_, kind) in self.states.keys() {
            *by_kind.entry(kind.as_str()).or_default() += 1;
        }
        by_kind
    }

    fn hold_of(&mut self, entry: &SaEntry, kind: &str, fades: bool) {
        let key = (Subject::Sa(entry.fixed.id), kind.to_owned());
        let seen = fades.then(Instant::now);
        if let Some(held) = self.states.get_mut(&key) {
            held.seen = seen;
            return;
        }
        let about = About::sa(&entry.spec.name, &entry.spec.tunnel);
        self.begin(key, about, None, seen);
    }

    fn begin(
        &mut self,
        key: (Subject, String),
        about: About<'_>,
        text: Option<String>,
        seen: Option<Instant>,
    ) {
        let event = self.push(&key.1, about, text, Some(Edge::On));
        self.states.insert(key, Held { event, seen });
    }

    fn end(&mut self, key: &(Subject, String)) {
        let Some(held) = self.states.remove(key) else {
            return;
        };
        let about = About {
            sa: held.event.sa.as_deref(),
            tunnel: held.event.tunnel.as_deref(),
            other: "",
        };
        self.push(&key.1, about, held.event.text.clone(), Some(Edge::Off));
    }

    fn push(
        &mut self,
        kind: &str,
        about: About<'_>,
        text: Option<String>,
        state: Option<Edge>,
    ) -> Event {
        self.last += 1;
        if state != Some(Edge::Off) {
            match self.others.get_mut(kind) {
                Some(n) => *n += 1,
                None => drop(self.others.insert(kind.to_owned(), 1)),
            }
        }
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let event = Event {
            number: self.last,
            time: time.as_secs(),
            kind: kind.to_owned(),
            sa: about.sa.map(str::to_owned),
            tunnel: about.tunnel.map(str::to_owned),
            text,
            state,
        };
        self.recent.push_back(event.clone());
        self.told.send_replace(self.last);
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(batch: &Batch) -> Vec<&str> {
        batch.events.iter().map(|e| e.kind.as_str()).collect()
    }

    #[test]
    fn a_follower_that_fell_behind_is_told_how_many_it_missed_and_what_holds() {
        let mut e = Events::default();
        e.hold("rekey_overdue", About::tunnel("berlin"), "late".into());
        e.hold("rekey_overdue", About::tunnel("bonn"), "late".into());
        let seen = e.batch(Some(0), 100);
        assert_eq!(
            (seen.last, seen.missed, seen.states.is_none()),
            (2, 0, true)
        );
        e.release("rekey_overdue", "bonn");
        for i in 0..KEPT {
            e.note("reload", format!("{i}"));
        }
        let batch = e.batch(Some(seen.last), 100);
        let all = KEPT as u64 + 3;
        assert_eq!((batch.missed, batch.last), (all - 2, all));
        let states = batch.states.unwrap();
        assert_eq!(states.len(), 1);
        assert_eq!(states[0].tunnel.as_deref(), Some("berlin"));
        assert!(batch.events.is_empty());
        // It goes on from there.
        e.note("reload", "again");
        let next = e.batch(Some(batch.last), 100);
        assert_eq!((kinds(&next), next.missed), (vec!["reload"], 0));
    }

    #[test]
    fn a_state_is_told_once_when_it_begins_and_once_when_it_ends() {
        let mut e = Events::default();
        for _ in 0..3 {
            e.hold("rekey_wanted", About::sa("a", "t"), "bytes".into());
        }
        e.release("rekey_wanted", "t");
        e.release("rekey_wanted", "t");
        e.release("rekey_wanted", "other");
        let batch = e.batch(Some(0), 100);
        let edges: Vec<_> = batch.events.iter().map(|e| e.state).collect();
        assert_eq!(edges, [Some(Edge::On), Some(Edge::Off)]);
        assert_eq!(e.states().count(), 0);
        assert_eq!(e.totals().collect::<Vec<_>>(), [("rekey_wanted", 1)]);
    }

    #[test]
    fn a_long_story_comes_in_parts_without_gaps() {
        let mut e = Events::default();
        for i in 0..1000 {
            e.note("reload", format!("{i}"));
        }
        let (mut at, mut n) = (0, 0);
        loop {
            let batch = e.batch(Some(at), 64);
            if batch.events.is_empty() {
                break;
            }
            assert_eq!(batch.events[0].number, at + 1);
            n += batch.events.len();
            at = batch.last;
        }
        assert_eq!((at, n), (1000, 1000));
        // Somebody new gets what holds, and a number of an earlier run counts as none.
        for after in [None, Some(5000)] {
            let batch = e.batch(after, 64);
            assert_eq!((batch.last, batch.states), (1000, Some(Vec::new())));
        }
    }
}
