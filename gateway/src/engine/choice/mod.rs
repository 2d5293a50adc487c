//! `engine = "auto"`: where an SA is ciphered, decided when it is installed by what was measured at start.
//!
//! ```text
//!   measure: CPU, each engine ─▶ table (suite, direction, place) x size ─▶ choose, once per SA, again with its rekey
//! ```
//!
//! Deciding per packet would reorder, so an SA stays where it was put. What was not measured, or answered wrongly while it
//! was, is never chosen; an engine that fails its known answers has no rows at all.

mod measure;
mod table;

use std::fmt;
use std::str::FromStr;

use sa_store::runtime::Place;
use sa_store::sa::SaSpec;

pub use measure::{Bench, Effort, Unmeasured};
pub use table::{Figure, Row, Size, Table};

/// A place keeps an SA, and the CPU is preferred to an engine, when it reaches this share of the best.
const ENOUGH: f64 = 0.97;

/// What counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Objective {
    /// Throughput while the workers are saturated, else CPU cycles.
    #[default]
    Auto,
    /// Packets per second.
    Throughput,
    /// Cycles that the worker spends on a packet.
    Cycles,
}

/// Not an objective.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown objective \"{0}\"; one of auto, throughput, cycles")]
pub struct UnknownObjective(String);

impl FromStr for Objective {
    type Err = UnknownObjective;

    fn from_str(s: &str) -> Result<Self, UnknownObjective> {
        match s {
            "auto" => Ok(Self::Auto),
            "throughput" => Ok(Self::Throughput),
            "cycles" => Ok(Self::Cycles),
            other => Err(UnknownObjective(other.to_owned())),
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Throughput => "throughput",
            Self::Cycles => "cycles",
        })
    }
}

impl Objective {
    /// Whether throughput decides.
    fn is_throughput(self, saturated: bool) -> bool {
        match self {
            Self::Auto => saturated,
            Self::Throughput => true,
            Self::Cycles => false,
        }
    }
}

/// What is known of an SA's packets when it is installed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Mean inner packet of its predecessor, bytes; a new SA counts as a mix of sizes.
    pub mean: Option<f64>,
    /// Whether its worker has no time left.
    pub saturated: bool,
    /// Where its predecessor is.
    pub before: Option<Place>,
}

/// The table with the operator's objective.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    objective: Objective,
    table: Table,
}

impl Choice {
    /// Chooses by this table.
    pub fn new(objective: Objective, table: Table) -> Self {
        Self { objective, table }
    }

    /// What was measured.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The best place for an SA among the CPU and `fit`, which are the engines that can carry it and serve now. Without
    /// figures to compare it is the CPU.
    pub fn place(&self, spec: &SaSpec, fit: &[Place], traffic: &Traffic) -> Place {
        let throughput = self.objective.is_throughput(traffic.saturated);
        let cost = |place: Place| -> Option<f64> {
            let figure = self
                .table
                .row(spec.suite, spec.direction, place)?
                .at(traffic.mean)?;
            Some(if throughput { figure.ns } else { figure.cpu_ns })
        };
        let Some(on_cpu) = cost(Place::CPU) else {
            return Place::CPU;
        };
        let (mut best, mut least) = (Place::CPU, on_cpu);
        for place in fit {
            if let Some(cost) = cost(*place)
                && cost < least
            {
                (best, least) = (*place, cost);
            }
        }
        let is_enough = |cost: f64| least >= cost * ENOUGH;
        let before = traffic
            .before
            .filter(|p| *p == Place::CPU || fit.contains(p));
        if let Some(before) = before
            && cost(before).is_some_and(is_enough)
        {
            return before;
        }
        if is_enough(on_cpu) { Place::CPU } else { best }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sa_store::sa::{Direction, Mode, OffloadMode};
    use sa_store::suite::Suite;

    use crate::esp::fuzz::spec;
    use crate::wire::Family;

    fn engine(number: u8) -> Place {
        Place {
            engine: number,
            mode: OffloadMode::Crypto,
            outer_headers: false,
        }
    }

    fn sa() -> SaSpec {
        let suite: Suite = "aes-128-cbc+hmac-sha1-96".parse().unwrap();
        spec(suite, Mode::Tunnel, Family::V4, false)
    }

    fn row(place: Place, figures: [(f64, f64); 4]) -> Row {
        let spec = sa();
        let mut row = Row::new(spec.suite, spec.direction, place);
        for (size, (ns, cpu_ns)) in Size::ALL.into_iter().zip(figures) {
            row.set(size, Figure { ns, cpu_ns });
        }
        row
    }

    /// The CPU is ahead with small packets; the engine is slower throughout and spares the CPU at large ones.
    fn usual() -> Table {
        let cpu = [300.0, 600.0, 1300.0, 500.0];
        let out = [
            (2000.0, 400.0),
            (2200.0, 400.0),
            (2500.0, 400.0),
            (2100.0, 400.0),
        ];
        [row(Place::CPU, cpu.map(|ns| (ns, ns))), row(engine(1), out)]
            .into_iter()
            .collect()
    }

    fn at(mean: f64) -> Traffic {
        Traffic {
            mean: Some(mean),
            ..Traffic::default()
        }
    }

    #[test]
    fn cycles_decide_until_the_worker_is_saturated() {
        let choice = Choice::new(Objective::Auto, usual());
        let fit = [engine(1)];
        assert_eq!(choice.place(&sa(), &fit, &at(64.0)), Place::CPU);
        assert_eq!(choice.place(&sa(), &fit, &at(1420.0)), engine(1));
        let full = Traffic {
            saturated: true,
            ..at(1420.0)
        };
        assert_eq!(choice.place(&sa(), &fit, &full), Place::CPU);
        let choice = Choice::new(Objective::Cycles, usual());
        assert_eq!(choice.place(&sa(), &fit, &full), engine(1));
        let choice = Choice::new(Objective::Throughput, usual());
        assert_eq!(choice.place(&sa(), &fit, &at(1420.0)), Place::CPU);
    }

    #[test]
    fn between_two_sizes_the_line_between_their_figures_counts() {
        let choice = Choice::new(Objective::Cycles, usual());
        // 300 ns at 64 B and 600 ns at 512 B: 400 ns, the engine's cost, at 213 B.
        assert_eq!(choice.place(&sa(), &[engine(1)], &at(200.0)), Place::CPU);
        assert_eq!(choice.place(&sa(), &[engine(1)], &at(260.0)), engine(1));
        // A new SA counts as the mix.
        let new = Traffic::default();
        assert_eq!(choice.place(&sa(), &[engine(1)], &new), engine(1));
    }

    #[test]
    fn what_has_no_figures_or_does_not_fit_is_not_chosen() {
        let choice = Choice::new(Objective::Cycles, usual());
        assert_eq!(choice.place(&sa(), &[], &at(1420.0)), Place::CPU);
        assert_eq!(choice.place(&sa(), &[engine(2)], &at(1420.0)), Place::CPU);
        let mut inbound = sa();
        inbound.direction = Direction::In;
        assert_eq!(
            choice.place(&inbound, &[engine(1)], &at(1420.0)),
            Place::CPU
        );
        let gone = Traffic {
            before: Some(engine(1)),
            ..at(1420.0)
        };
        assert_eq!(choice.place(&sa(), &[], &gone), Place::CPU);
        // A figure that cannot be is none.
        let strange = [
            (0.0, 0.0),
            (f64::NAN, 1.0),
            (-1.0, -1.0),
            (f64::INFINITY, 1.0),
        ];
        let table: Table = usual()
            .rows()
            .iter()
            .filter(|r| r.place() == Place::CPU)
            .cloned()
            .chain([row(engine(3), strange)])
            .collect();
        let choice = Choice::new(Objective::Cycles, table);
        for mean in [64.0, 512.0, 1420.0] {
            assert_eq!(choice.place(&sa(), &[engine(3)], &at(mean)), Place::CPU);
        }
    }

    #[test]
    fn a_place_keeps_an_sa_that_gains_next_to_nothing_elsewhere() {
        let near: Table = [
            row(Place::CPU, [(1000.0, 1000.0); 4]),
            row(engine(1), [(980.0, 980.0); 4]),
            row(engine(2), [(900.0, 900.0); 4]),
        ]
        .into_iter()
        .collect();
        let choice = Choice::new(Objective::Cycles, near);
        let before = |place| Traffic {
            before: Some(place),
            ..at(512.0)
        };
        let place = |fit: &[Place], traffic| choice.place(&sa(), fit, &traffic);
        assert_eq!(place(&[engine(1)], at(512.0)), Place::CPU);
        assert_eq!(place(&[engine(1)], before(engine(1))), engine(1));
        assert_eq!(place(&[engine(1)], before(Place::CPU)), Place::CPU);
        assert_eq!(place(&[engine(1), engine(2)], before(engine(1))), engine(2));
    }

    #[test]
    fn objectives_are_read_as_they_are_written() {
        for objective in [Objective::Auto, Objective::Throughput, Objective::Cycles] {
            assert_eq!(objective.to_string().parse(), Ok(objective));
        }
        assert!("speed".parse::<Objective>().is_err());
    }

    proptest! {
        /// Whatever the table, wherever the SA was: at least 97 % of the better in each cell, and between them.
        #[test]
        fn at_least_97_percent_of_the_best_in_each_cell(
            figures in prop::collection::vec(prop::array::uniform4((1.0..1e5_f64, 1.0..1e5_f64)), 1..5),
            close in any::<bool>(),
            before in 0_u8..5,
            saturated in any::<bool>(),
            mean in prop::option::of(40.0..1500.0_f64),
        ) {
            let number = |n: usize| if n == 0 { Place::CPU } else { engine(u8::try_from(n).unwrap()) };
            let rows: Vec<Row> = figures
                .iter()
                .enumerate()
                .map(|(n, f)| {
                    // Near one another, where the margin is at work.
                    let f = f.map(|(a, b)| if close { (1e4 + a / 50.0, 1e4 + b / 50.0) } else { (a, b) });
                    row(number(n), f)
                })
                .collect();
            let fit: Vec<Place> = (1..rows.len()).map(number).collect();
            let choice = Choice::new(Objective::Auto, rows.iter().cloned().collect());
            let sizes = Size::ALL.into_iter().map(Size::mean).chain([None, mean]);
            for mean in sizes {
                let traffic = Traffic { mean, saturated, before: Some(number(usize::from(before))) };
                let place = choice.place(&sa(), &fit, &traffic);
                let rate = |row: &Row| {
                    let figure = row.at(mean).unwrap();
                    1.0 / if saturated { figure.ns } else { figure.cpu_ns }
                };
                let best = rows.iter().map(rate).fold(0.0, f64::max);
                let chosen = rows.iter().find(|r| r.place() == place).map(rate).unwrap();
                prop_assert!(chosen >= 0.97 * best * (1.0 - 1e-12), "{chosen} of {best} at {mean:?}");
            }
        }
    }
}
