//! `perf`: measures the gateway.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use esplanade_model::KnobArgs;
use gateway::crypto::select::{Choice, Compare, Selection};
use gateway::engine::choice;
use perf::bar::{self, Verdict};
use perf::clock::Rates;
use perf::engines::{self, Kind, Subjects};
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

/// Measures the Esplanade gateway: real workers and look-ups, memory ports, no NIC.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Frames that cycle, per worker.
    #[arg(long, global = true, default_value_t = 1024)]
    frames: usize,
    /// Runs of each measurement; the median counts.
    #[arg(long, global = true, default_value_t = 5)]
    runs: usize,
    /// Milliseconds on the clock per run.
    #[arg(long, global = true, default_value_t = 100)]
    time: u64,
    /// CPU to pin a single worker to; the last one that is allowed when not given.
    #[arg(long, global = true)]
    cpu: Option<usize>,
    /// Write the results as JSON.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the results as SVG.
    #[arg(long, global = true, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Leave out the measurement of the ciphering alone, for profilers.
    #[arg(long, global = true)]
    no_limit: bool,
    /// Do not ask for huge pages, neither for frames nor for the heap.
    #[arg(long, global = true)]
    small_pages: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures every combination of the lists.
    Run(RunArgs),
    /// Where the time of a packet goes. Needs a build with `--features stages`.
    Stages(RunArgs),
    /// Measures the cells of the peers' table and compares.
    Bar {
        /// Crypto providers to measure with, one table each.
        #[arg(long, value_delimiter = ',', default_value = "auto,aws-lc,ring")]
        providers: Vec<Choice>,
    },
    /// Measures one policy against many at the same flows, at rest and while policies change.
    Policies {
        /// How many are many.
        #[arg(long, default_value_t = 100_000)]
        policies: u32,
        /// Flows.
        #[arg(long, default_value_t = 10_000)]
        flows: u32,
    },
    /// Measures what receiving and sending a frame costs on every kind of port that this machine can run.
    Ports,
    /// Measures one SA on several workers beside one.
    Parallel {
        /// Workers.
        #[arg(long, default_value_t = 2)]
        workers: usize,
        /// Suites.
        #[arg(
            long,
            value_delimiter = ',',
            default_value = "aes-128-gcm-16,aes-256-gcm-16,chacha20-poly1305,aes-128-cbc+hmac-sha1-96,aes-256-cbc+hmac-sha2-256-128"
        )]
        suites: Vec<Suite>,
        /// Sizes; the goal is for 1420 bytes.
        #[arg(long, value_delimiter = ',', default_value = "1420")]
        sizes: Vec<Mix>,
        /// Where packets are when a step begins.
        #[arg(long, value_enum, default_value = "memory")]
        packets: Packets,
        /// Crypto provider, or "auto".
        #[arg(long, default_value = "auto")]
        provider: Choice,
    },
    /// Measures look-aside engines beside the CPU: throughput, cycles freed, break-even sizes.
    Engines {
        /// Engines of a gateway's configuration, which must not be in use; models when not given.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Models.
        #[arg(long, value_enum, value_delimiter = ',', default_value = "eip93,soe")]
        models: Vec<Kind>,
        /// Suites, as far as an engine offers them.
        #[arg(
            long,
            value_delimiter = ',',
            default_value = "aes-128-cbc+hmac-sha1-96,aes-256-cbc+hmac-sha2-256-128,aes-128-ctr+hmac-sha2-256-128"
        )]
        suites: Vec<Suite>,
        #[command(flatten)]
        knobs: KnobArgs,
    },
    /// Runs DPDK's ipsec-secgw beside the gateway and compares. Needs root, make, libdpdk-dev and dpdk-doc.
    Peer {
        /// DPDK's example sources.
        #[arg(long, default_value = "/usr/share/dpdk/examples")]
        examples: PathBuf,
        /// Where to build and to keep captures.
        #[arg(long, default_value = "target/peer")]
        work: PathBuf,
        /// Numbers of SAs.
        #[arg(long, value_delimiter = ',', default_value = "1,1000,10000")]
        sas: Vec<u32>,
        /// Sizes.
        #[arg(long, value_delimiter = ',', default_value = "64,512,1420,imix")]
        sizes: Vec<Mix>,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Inner packet sizes, bytes, or "imix".
    #[arg(long, value_delimiter = ',', default_value = "64,512,1420,imix")]
    sizes: Vec<Mix>,
    /// Suites.
    #[arg(long, value_delimiter = ',', default_value = "aes-128-gcm-16")]
    suites: Vec<Suite>,
    /// Directions.
    #[arg(long, value_delimiter = ',', default_value = "out,in")]
    directions: Vec<Way>,
    /// Numbers of SAs.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,10000,100000")]
    sas: Vec<u32>,
    /// Flows; as many as SAs when not given.
    #[arg(long)]
    flows: Option<u32>,
    /// Numbers of policies; raised to the number of SAs, which need one each.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    policies: Vec<u32>,
    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    workers: Vec<usize>,
    /// Which worker gets a packet.
    #[arg(long, value_enum, default_value = "owner")]
    spread: Spread,
    /// Crypto provider, or "auto".
    #[arg(long, default_value = "auto")]
    provider: Choice,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Way {
    Out,
    In,
}

impl From<Way> for Direction {
    fn from(way: Way) -> Self {
        match way {
            Way::Out => Self::Out,
            Way::In => Self::In,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if !cli.common.small_pages {
        machine::with_huge_heap();
    }
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("perf: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether everything that was to be reached was reached.
fn run(cli: &Cli) -> Result<bool> {
    let workers = match &cli.command {
        Command::Run(args) | Command::Stages(args) => {
            args.workers.iter().copied().max().unwrap_or(1)
        }
        // And one alone beside them.
        Command::Parallel { workers, .. } => workers + 1,
        Command::Bar { .. }
        | Command::Policies { .. }
        | Command::Ports
        | Command::Engines { .. }
        | Command::Peer { .. } => 1,
    };
    let others = match cli.command {
        Command::Peer { .. } => perf::peer::MEMORY,
        _ => 0,
    };
    let mut ground = Ground::prepare(&cli.common, workers, others)?;
    report::print_machine(&ground.report.machine, &ground.report.rates);
    let done = match &cli.command {
        Command::Run(args) => ground.run(args),
        Command::Stages(args) => ground.stages(args),
        Command::Bar { providers } => ground.bar(providers),
        Command::Policies { policies, flows } => ground.policies(*policies, *flows),
        Command::Ports => ground.ports(),
        Command::Parallel {
            workers,
            suites,
            sizes,
            packets,
            provider,
        } => ground.parallel(*workers, suites, sizes, *packets, *provider),
        Command::Engines {
            config,
            models,
            suites,
            knobs,
        } => ground.engines(&Subjects {
            config: config.as_deref(),
            kinds: models,
            knobs,
            suites,
        }),
        Command::Peer {
            examples,
            work,
            sas,
            sizes,
        } => ground.peer(examples, work, sas, sizes),
    }?;
    if let Some(path) = &cli.common.json {
        ground.report.write_json(path)?;
    }
    if let Some(path) = &cli.common.plot {
        ground.report.write_plot(path)?;
    }
    Ok(done)
}

/// What all measurements share.
struct Ground {
    arena: Arc<Arena>,
    _huge: Option<HugePages>,
    clock: Clock,
    effort: Effort,
    frames: usize,
    report: Report,
}

impl Ground {
    /// `others`: bytes of huge pages for other programs.
    fn prepare(common: &Common, workers: usize, others: usize) -> Result<Self> {
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

    fn run(&mut self, args: &RunArgs) -> Result<bool> {
        let selection = Selection::new(args.provider, Compare::Measure)?;
        report::print_head();
        for scenario in self.scenarios(args) {
            let outcome = self.bench(&selection).measure(&scenario)?;
            report::print_outcome(&outcome);
            self.report.outcomes.push(outcome);
        }
        Ok(true)
    }

    fn stages(&mut self, args: &RunArgs) -> Result<bool> {
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

    fn bar(&mut self, providers: &[Choice]) -> Result<bool> {
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

    fn policies(&mut self, many: u32, flows: u32) -> Result<bool> {
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

    fn ports(&mut self) -> Result<bool> {
        let costs = ports::measure(&self.clock, &self.report.rates, &self.effort)?;
        ports::print(&costs);
        self.report.ports = costs;
        Ok(true)
    }

    fn parallel(
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

    fn engines(&mut self, subjects: &Subjects<'_>) -> Result<bool> {
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

    fn peer(&mut self, examples: &Path, work: &Path, sas: &[u32], sizes: &[Mix]) -> Result<bool> {
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
