//! What all measurements share, and each command's measurements on it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::engine::choice;
use perf::bar::{self, Verdict};
use perf::clock::Rates;
use perf::engines::{self, Subjects};
use perf::machine::{self, HugePages, Machine};
use perf::measure::{Bench, Effort};
use perf::parallel::{self, Packets};
use perf::peer::{Comparison, Peer, best_driver};
use perf::policies::{self, PolicyCost};
use perf::ports;
use perf::report::{self, Report};
use perf::rig;
use perf::scenario::{Scenario, Spread};
use perf::stages;
use perf::traffic::Mix;
use pmd::Arena;
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::sa::Direction;
use sa_store::suite::Suite;

use crate::cli::{Common, RunArgs};

/// What all measurements share.
pub(super) struct Ground {
    arena: Arc<Arena>,
    _huge: Option<HugePages>,
    clock: Clock,
    effort: Effort,
    frames: usize,
    pub(super) report: Report,
}

impl Ground {
    /// `others`: bytes of huge pages for other programs.
    pub(super) fn prepare(common: &Common, workers: usize, others: usize) -> Result<Self> {
        let mut machine = Machine::detect();
        machine.pinned = machine::pin(common.cpu);
        let huge = (!common.small_pages)
            .then(|| HugePages::reserve(rig::arena_bytes(workers, common.frames) + others));
        let huge = match huge {
            Some(Err(error)) => {
                eprintln!("no huge pages reserved for frames: {error}");
                None
            }
            Some(Ok(pages)) => Some(pages),
            None => None,
        };
        let arena = rig::arena_for(workers, common.frames)?;
        machine.frame_page = arena.page_size();
        let clock = Clock::new();
        let rates = Rates::measure(&clock);
        Ok(Self {
            arena,
            _huge: huge,
            clock,
            effort: Effort {
                runs: common.runs.max(1),
                time: Duration::from_millis(common.time),
                limit: !common.no_limit,
            },
            frames: common.frames,
            report: Report {
                machine,
                rates,
                outcomes: Vec::new(),
                ports: Vec::new(),
                stages: Vec::new(),
                policies: Vec::new(),
                engines: None,
                ratios: Vec::new(),
                comparisons: Vec::new(),
            },
        })
    }

    fn bench<'a>(&'a self, selection: &'a Selection) -> Bench<'a> {
        Bench {
            factory: selection,
            arena: &self.arena,
            clock: &self.clock,
            rates: self.report.rates,
            effort: self.effort,
        }
    }

    pub(super) fn run(&mut self, args: &RunArgs) -> Result<bool> {
        let selection = Selection::new(args.provider, Compare::Measure)?;
        report::print_head();
        for scenario in self.scenarios(args) {
            let outcome = self.bench(&selection).measure(&scenario)?;
            report::print_outcome(&outcome);
            self.report.outcomes.push(outcome);
        }
        Ok(true)
    }

    pub(super) fn stages(&mut self, args: &RunArgs) -> Result<bool> {
        let selection = Selection::new(args.provider, Compare::Measure)?;
        for scenario in self.scenarios(args) {
            let account = stages::measure(&self.bench(&selection), &scenario)?;
            stages::print(&account, self.report.rates.tsc_ghz);
            self.report.stages.push(account);
        }
        Ok(true)
    }

    fn scenarios(&self, args: &RunArgs) -> Vec<Scenario> {
        let mut list = Vec::new();
        for &suite in &args.suites {
            for &sas in &args.sas {
                for &policies in &args.policies {
                    for &workers in &args.workers {
                        for mix in &args.sizes {
                            for &way in &args.directions {
                                list.push(Scenario {
                                    suite,
                                    direction: way.into(),
                                    sas,
                                    flows: args.flows.unwrap_or(sas).max(sas),
                                    policies: policies.max(sas),
                                    workers,
                                    spread: args.spread,
                                    mix: mix.clone(),
                                    frames: self.frames,
                                });
                            }
                        }
                    }
                }
            }
        }
        list
    }

    pub(super) fn bar(&mut self, providers: &[Choice]) -> Result<bool> {
        let suite: Suite = "aes-128-gcm-16".parse()?;
        let mut best_behind = None;
        for &choice in providers {
            let selection = Selection::new(choice, Compare::Measure)?;
            println!(
                "\ncrypto {choice}: {}",
                selection
                    .table()
                    .iter()
                    .find(|r| r.suite == suite)
                    .map_or("none", |r| r.provider.name())
            );
            report::print_head();
            let mut verdicts = Vec::new();
            for scenario in cells(suite, self.frames) {
                let outcome = self.bench(&selection).measure(&scenario)?;
                report::print_outcome(&outcome);
                verdicts.extend(Verdict::of(&outcome));
                self.report.outcomes.push(outcome);
            }
            println!();
            let behind = bar::print(&verdicts);
            // The first table is the one that counts; the others are stated.
            best_behind.get_or_insert(behind);
        }
        println!(
            "{} frames cycle; working set of the largest cell {} KiB of frames besides SAs and keys; replay window on inbound",
            self.frames,
            self.report
                .outcomes
                .iter()
                .map(|o| o.working_set)
                .max()
                .unwrap_or(0)
                / 1024
        );
        Ok(best_behind == Some(0))
    }

    pub(super) fn policies(&mut self, many: u32, flows: u32) -> Result<bool> {
        let selection = Selection::new(Choice::Auto, Compare::Measure)?;
        println!("{flows} flows, 1 SA, 64 B; ns per packet, share of the speed with one policy");
        let mut reached = true;
        for direction in [Direction::Out, Direction::In] {
            let scenario = |policies| -> Result<Scenario> {
                Ok(Scenario {
                    suite: "aes-128-gcm-16".parse()?,
                    direction,
                    sas: 1,
                    flows,
                    policies,
                    workers: 1,
                    spread: Spread::Owner,
                    mix: "64".parse()?,
                    frames: self.frames,
                })
            };
            let bench = self.bench(&selection);
            let one = policies::at_rest(&bench, &scenario(1)?)?;
            let rest = policies::at_rest(&bench, &scenario(many)?)?;
            let changing = policies::while_changing(&bench, &scenario(many)?)?;
            println!("{direction:?}: 1 policy {:.1}", one.ns);
            for (what, cost) in [("at rest", rest), ("while they change", changing)] {
                let line = PolicyCost::new(direction, many, flows, one, cost);
                reached &= line.share >= 0.9;
                println!(
                    "{direction:?}: {many} policies {what} {:.1}, {:.2} ({} updates published, each made in {:.0} us)",
                    cost.ns, line.share, cost.updates, cost.update_us
                );
                self.report.policies.push(line);
            }
        }
        Ok(reached)
    }

    pub(super) fn ports(&mut self) -> Result<bool> {
        let costs = ports::measure(&self.clock, &self.report.rates, &self.effort)?;
        ports::print(&costs);
        self.report.ports = costs;
        Ok(true)
    }

    pub(super) fn parallel(
        &mut self,
        workers: usize,
        suites: &[Suite],
        sizes: &[Mix],
        packets: Packets,
        provider: Choice,
    ) -> Result<bool> {
        let selection = Selection::new(provider, Compare::Measure)?;
        let mut reached = true;
        parallel::print_head();
        for &suite in suites {
            for mix in sizes {
                for direction in [Direction::Out, Direction::In] {
                    let scenario = Scenario {
                        suite,
                        direction,
                        sas: 1,
                        flows: 1,
                        policies: 1,
                        workers,
                        spread: Spread::Help,
                        mix: mix.clone(),
                        frames: self.frames,
                    };
                    let ratio = parallel::measure(&self.bench(&selection), &scenario, packets)?;
                    parallel::print(&ratio);
                    let counts = workers >= 2 && ratio.size == "1420";
                    reached &= !counts || ratio.ratio() >= parallel::WANTED;
                    self.report.ratios.push(ratio);
                }
            }
        }
        println!(
            "one SA; 0 packets lost, reordered or taken for replays, else the run would have ended"
        );
        Ok(reached)
    }

    pub(super) fn engines(&mut self, subjects: &Subjects<'_>) -> Result<bool> {
        let selection: Arc<dyn CipherFactory> =
            Arc::new(Selection::new(Choice::Auto, Compare::Measure)?);
        let effort = choice::Effort {
            packets: 256,
            runs: self.effort.runs,
            patience: Duration::from_secs(10),
        };
        let rates = self.report.rates;
        let engines = engines::measure(subjects, &selection, &self.clock, &rates, effort)?;
        engines::print(&engines);
        self.report.engines = Some(engines);
        Ok(true)
    }

    pub(super) fn peer(
        &mut self,
        examples: &Path,
        work: &Path,
        sas: &[u32],
        sizes: &[Mix],
    ) -> Result<bool> {
        let selection = Selection::new(Choice::Auto, Compare::Measure)?;
        let cpu = self.report.machine.pinned.unwrap_or(0);
        let peer = Peer::build(examples, work, cpu)?;
        println!("millions of packets per second (of CPU time, where it was shared)");
        Comparison::print_head();
        let mut ahead = true;
        for &sas in sas {
            for direction in [Direction::Out, Direction::In] {
                let scenario = |mix: &Mix| -> Result<Scenario> {
                    Ok(Scenario {
                        suite: "aes-128-gcm-16".parse()?,
                        direction,
                        sas,
                        flows: sas,
                        policies: sas,
                        workers: 1,
                        spread: Spread::Owner,
                        mix: mix.clone(),
                        frames: self.frames,
                    })
                };
                let mut driver = None;
                for mix in sizes {
                    let scenario = scenario(mix)?;
                    let bench = self.bench(&selection);
                    let driver = match driver {
                        Some(driver) => driver,
                        None => *driver.insert(best_driver(&bench, &scenario, &peer)?),
                    };
                    let line = Comparison::measure(&bench, &scenario, &peer, driver)?;
                    line.print();
                    ahead &= line.ratio > 1.0;
                    self.report.comparisons.push(line);
                }
            }
        }
        Ok(ahead)
    }
}

/// The cells of the peers' table.
fn cells(suite: Suite, frames: usize) -> Vec<Scenario> {
    let mut list = Vec::new();
    for (sas, _) in bar::PEERS {
        for size in bar::SIZES {
            for direction in [Direction::Out, Direction::In] {
                list.push(Scenario {
                    suite,
                    direction,
                    sas,
                    flows: sas,
                    policies: sas,
                    workers: 1,
                    spread: Spread::Owner,
                    mix: size.parse().expect("sizes of the table are valid"),
                    frames,
                });
            }
        }
    }
    list
}
