//! A pair of gateways under everything at once, for hours: the bed is `perf/beds/soak`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

const BED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/beds/soak/main.py");

/// `perf soak`
#[derive(Debug, Args)]
pub struct SoakArgs {
    /// How long.
    #[arg(long, default_value_t = 120.0)]
    minutes: f64,
    /// Of all that is chosen by chance; printed, so that a run can be repeated.
    #[arg(long)]
    seed: Option<u64>,
    /// Good packets per second in each direction.
    #[arg(long, default_value_t = 400)]
    rate: u32,
    /// Gateway to run; the one beside this program when not given.
    #[arg(long, value_name = "FILE")]
    gateway: Option<PathBuf>,
    /// Leave configurations and logs in this new directory.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Becomes the bed, so that signals and the exit code are its own.
///
/// # Errors
/// The gateway is not built, or Python cannot be started.
pub fn run(args: &SoakArgs) -> Result<std::convert::Infallible> {
    let beside = std::env::current_exe()?.with_file_name("esplanade");
    let gateway = args.gateway.as_deref().unwrap_or(&beside);
    if !gateway.is_file() {
        bail!("{}: build the gateway first", gateway.display());
    }
    if !Path::new(BED).is_file() {
        bail!("{BED}: the bed is found in the source tree only");
    }
    let mut bed = Command::new("python3");
    bed.args([BED, "--minutes", &args.minutes.to_string()]);
    bed.args(["--rate", &args.rate.to_string()]);
    bed.arg("--gateway").arg(gateway);
    if let Some(seed) = args.seed {
        bed.args(["--seed", &seed.to_string()]);
    }
    if let Some(keep) = &args.keep {
        bed.arg("--keep").arg(keep);
    }
    Err(bed.exec()).context("python3")
}
