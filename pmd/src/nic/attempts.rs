//! How often something failed in a row, and when that is worth a line in the log: a NIC that was pulled out is tried again and
//! again.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Failures in a row.
#[derive(Debug, Default)]
pub(crate) struct Attempts(AtomicU32);

impl Attempts {
    /// One more; its number when it is the first, second, fourth, eighth, …
    pub(crate) fn failed(&self) -> Option<u32> {
        let n = self.0.fetch_add(1, Relaxed).saturating_add(1);
        n.is_power_of_two().then_some(n)
    }

    /// It worked.
    pub(crate) fn worked(&self) {
        self.0.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_failures_are_ten_lines_and_the_next_row_begins_anew() {
        let attempts = Attempts::default();
        assert_eq!((0..1000).filter_map(|_| attempts.failed()).count(), 10);
        attempts.worked();
        assert_eq!(attempts.failed(), Some(1));
    }
}
