//! What the driver did that the engine's reference forbids.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Entries kept; later ones are counted only.
const KEPT: usize = 1000;

/// A rule of the reference that the driver broke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The rule.
    pub rule: &'static str,
    /// Where.
    pub detail: String,
}

/// The list of broken rules, shared with whoever judges the driver.
#[derive(Debug, Default)]
pub struct Log(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    kept: Vec<Broken>,
    count: u64,
}

impl Log {
    /// Adds an entry, and tells it to the operator.
    pub fn broke(&self, rule: &'static str, detail: impl Into<String>) {
        let detail = detail.into();
        let mut entries = self.lock();
        entries.count += 1;
        if entries.kept.len() < KEPT {
            tracing::warn!(rule, detail, "the driver broke a rule");
            entries.kept.push(Broken { rule, detail });
        }
    }

    /// How often a rule was broken.
    pub fn count(&self) -> u64 {
        self.lock().count
    }

    /// Takes the entries, which empties the list.
    pub fn take(&self) -> Vec<Broken> {
        std::mem::take(&mut *self.lock()).kept
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
