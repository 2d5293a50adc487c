//! Where the time of a packet goes: ticks of the time-stamp counter in each stage of the workers' rounds.

use anyhow::{Context, Result};
use gateway::worker::Stage;
use serde::Serialize;

use crate::measure::Bench;
use crate::rig::Rig;
use crate::scenario::Scenario;

/// One scenario's account.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// `out` or `in`.
    pub direction: &'static str,
    /// Packet size or mix.
    pub size: String,
    /// SAs.
    pub sas: u32,
    /// Nanoseconds per packet by stage, in the order of a round; stages that took nothing are left out.
    pub stages: Vec<(String, f64)>,
    /// Their sum.
    pub total: f64,
}

/// Measures a scenario's stages: means over all steps.
///
/// # Errors
/// The build has no time stamps; or see [`Rig::step`].
pub fn measure(bench: &Bench<'_>, scenario: &Scenario) -> Result<Account> {
    let mut rig = Rig::new(scenario, bench.factory, bench.arena)?;
    for _ in 0..rig.warm_up_steps() {
        rig.step(|_| ())?;
    }
    let hint = "stages need the measuring build: cargo run --release -p perf --features stages";
    let before = rig.stage_ticks().context(hint)?;
    let series = bench.run(&mut rig, |_| ())?;
    let after = rig.stage_ticks().context(hint)?;
    let warm_up = rig.warm_up_steps();
    let packets = ((series.steps() + warm_up) * scenario.frames * scenario.workers) as f64;
    let ns = |ticks: u64| ticks as f64 / bench.rates.tsc_ghz / packets;
    let stages: Vec<_> = Stage::ALL
        .iter()
        .zip(before.iter().zip(&after))
        .map(|(stage, (before, after))| (format!("{stage:?}").to_lowercase(), ns(after - before)))
        .filter(|(_, ns)| *ns > 0.05)
        .collect();
    let outcome = bench.outcome(scenario, &series, 0.0);
    Ok(Account {
        direction: outcome.direction,
        size: outcome.size,
        sas: outcome.sas,
        total: stages.iter().map(|(_, ns)| ns).sum(),
        stages,
    })
}

/// One account, a line per stage.
pub fn print(account: &Account, tsc_ghz: f64) {
    println!(
        "\n{} {} B, {} SAs: {:.1} ns per packet",
        account.direction, account.size, account.sas, account.total
    );
    for (stage, ns) in &account.stages {
        println!(
            "  {stage:<10} {ns:>7.1} ns {:>7.0} TSC cycles {:>5.1} %",
            ns * tsc_ghz,
            100.0 * ns / account.total
        );
    }
}
