//! Sticky events of SAs, and what else an operator should know: counted, logged, kept for the API.

use std::collections::VecDeque;

use sa_store::runtime::{SaEntry, event};
use sa_store::sa::Direction;
use serde::{Deserialize, Serialize};

/// Events kept for the API.
const KEPT: usize = 1024;
/// Kinds of SA events, in the order of their bits.
const KINDS: u32 = 11;
/// Counted, but neither logged nor kept.
const ROUTINE: u32 = event::FIRST_USE;
/// May pass and come again; the others hold for the rest of the SA's life.
const AGAIN: u32 = event::LEASE_OUT | event::REPLAY_BURST;

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
}

/// Recent events, and how many of each kind there were.
#[derive(Debug, Default)]
pub struct Events {
    recent: VecDeque<Event>,
    last: u64,
    counts: [u64; KINDS as usize],
    /// By slot: generation of the SA and what was reported of it. A limit that was passed is told once.
    reported: Vec<(u32, u32)>,
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
            self.push(name, Some((&spec.name, &spec.tunnel)), None);
        }
    }

    /// Adds something that is not an SA's.
    pub fn note(&mut self, kind: &str, text: impl Into<String>) {
        self.push(kind, None, Some(text.into()));
    }

    /// Events after number `after`, oldest first.
    pub fn since(&self, after: u64) -> impl Iterator<Item = &Event> {
        self.recent.iter().filter(move |e| e.number > after)
    }

    /// SA events so far, by kind.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        event::names(u32::MAX >> (32 - KINDS)).zip(self.counts)
    }

    fn push(&mut self, kind: &str, sa: Option<(&str, &str)>, text: Option<String>) {
        self.last += 1;
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        self.recent.push_back(Event {
            number: self.last,
            time: time.as_secs(),
            kind: kind.to_owned(),
            sa: sa.map(|s| s.0.to_owned()),
            tunnel: sa.map(|s| s.1.to_owned()),
            text,
        });
    }
}
