//! `perf`: measures the gateway.

#![forbid(unsafe_code)]

mod cli;
mod ground;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use perf::engines::{self, Subjects};
use perf::machine;
use perf::report;
use perf::soak;

use cli::{Cli, Command};
use ground::Ground;

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
    if let Command::Soak(args) = &cli.command {
        match soak::run(args)? {}
    }
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
        | Command::Soak(_)
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
            instructions,
            knobs,
        } => {
            let subjects = Subjects {
                config: config.as_deref(),
                kinds: models,
                knobs,
                suites,
            };
            ground.engines(&subjects).and_then(|reached| {
                if *instructions {
                    engines::count_instructions(suites)?;
                }
                Ok(reached)
            })
        }
        Command::Peer {
            examples,
            work,
            sas,
            sizes,
        } => ground.peer(examples, work, sas, sizes),
        // Has its own program.
        Command::Soak(args) => match soak::run(args)? {},
    }?;
    if let Some(path) = &cli.common.json {
        ground.report.write_json(path)?;
    }
    if let Some(path) = &cli.common.plot {
        ground.report.write_plot(path)?;
    }
    Ok(done)
}
