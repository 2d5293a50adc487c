//! What becomes of look-aside engines, as events.

use crate::events::Events;
use crate::plane::EngineReport;

/// The engines as they were last seen.
#[derive(Debug, Default)]
pub(crate) struct Engines {
    seen: Vec<(String, u64)>,
}

impl Engines {
    /// Notes engines that were taken out of service since the last look, and those that changed their state.
    pub(crate) fn observe(&mut self, reports: &[EngineReport], events: &mut Events) {
        self.seen.resize(reports.len(), ("serving".to_owned(), 0));
        for (seen, e) in self.seen.iter_mut().zip(reports) {
            let fell = e.quarantines > seen.1;
            if fell {
                events.note(
                    "engine_quarantined",
                    format!("engine {} was taken out of service: {}", e.name, e.reason),
                );
            }
            if e.state == "dead" && seen.0 != "dead" {
                events.note(
                    "engine_dead",
                    format!("engine {} stays out of service: {}", e.name, e.reason),
                );
            } else if e.state == "serving" && (fell || seen.0 != "serving") {
                events.note(
                    "engine_back",
                    format!("engine {} is back in service", e.name),
                );
            }
            if fell || seen.0 != e.state {
                *seen = (e.state.clone(), e.quarantines);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fall_and_each_return_is_told_once() {
        let mut events = Events::default();
        let mut engines = Engines::default();
        for (state, quarantines) in [
            ("serving", 0),
            ("recovering", 1),
            ("quarantined", 1),
            ("serving", 1),
            // Down and up between two looks.
            ("serving", 2),
            ("serving", 2),
            ("recovering", 3),
            ("dead", 3),
            ("dead", 3),
        ] {
            let report = EngineReport {
                name: "e".into(),
                state: state.into(),
                reason: "iv".into(),
                quarantines,
                ..EngineReport::default()
            };
            engines.observe(&[report], &mut events);
        }
        let kinds: Vec<_> = events.since(0).map(|e| e.kind.as_str()).collect();
        assert_eq!(
            kinds,
            [
                "engine_quarantined",
                "engine_back",
                "engine_quarantined",
                "engine_back",
                "engine_quarantined",
                "engine_dead"
            ]
        );
    }
}
