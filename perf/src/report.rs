//! Tables for people, JSON and plots for everything else.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde::Serialize;

use crate::clock::Rates;
use crate::engines::{self, Engines};
use crate::machine::Machine;
use crate::measure::Outcome;
use crate::parallel::Ratio;
use crate::peer::Comparison;
use crate::policies::PolicyCost;
use crate::ports::PortCost;
use crate::stages::Account;

/// Everything of one invocation.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// What a nanosecond is in cycles.
    pub rates: Rates,
    /// Lines.
    pub outcomes: Vec<Outcome>,
    /// Costs of ports.
    pub ports: Vec<PortCost>,
    /// Time by stage.
    pub stages: Vec<Account>,
    /// One policy against many.
    pub policies: Vec<PolicyCost>,
    /// Look-aside engines beside the CPU.
    pub engines: Option<Engines>,
    /// One SA on several workers.
    pub ratios: Vec<Ratio>,
    /// Lines beside the peer's.
    pub comparisons: Vec<Comparison>,
}

impl Report {
    /// Writes the report as JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").with_context(|| path.display().to_string())
    }

    /// Draws packets per second and share of the limit as an SVG, or engines beside the CPU.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_plot(&self, path: &Path) -> Result<()> {
        if let Some(engines) = &self.engines {
            return engines::draw(engines, path);
        }
        draw(&self.outcomes, path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
    }
}

/// Says what the figures depend on.
pub fn print_machine(machine: &Machine, rates: &Rates) {
    println!("CPU      {}, kernel {}", machine.cpu, machine.kernel);
    println!(
        "clocks   TSC {:.2} GHz, core about {:.2} GHz (estimated)",
        rates.tsc_ghz, rates.core_ghz
    );
    println!(
        "pages    frames {}, heap {}",
        match machine.frame_page {
            n if n >= 1 << 30 => "1 GiB".to_owned(),
            n if n >= 1 << 20 => format!("{} MiB", n >> 20),
            n => format!("{} KiB (transparent huge pages asked for)", n >> 10),
        },
        if machine.heap_huge {
            "2 MiB (transparent)"
        } else {
            "4 KiB"
        }
    );
    match machine.pinned {
        Some(cpu) => println!("pinned   to CPU {cpu} of {}", machine.cpus),
        None => println!("pinned   no"),
    }
}

/// Heads the table of [`print_outcome`].
pub fn print_head() {
    println!(
        "{:<28} {:<9} {:<3} {:>5} {:>7} {:>8} {:>7} {:>8} {:>7} {:>7} {:>7} {:>7} {:>6} {:>12}",
        "suite",
        "provider",
        "dir",
        "size",
        "SAs",
        "policies",
        "workers",
        "ns/pkt",
        "Mpps",
        "Gbit/s",
        "TSC cyc",
        "~cyc",
        "limit",
        "runs ns"
    );
}

/// One line.
pub fn print_outcome(o: &Outcome) {
    println!(
        "{:<28} {:<9} {:<3} {:>5} {:>7} {:>8} {:>7} {:>8.1} {:>7.2} {:>7.1} {:>7.0} {:>7.0} {:>5.0}% {:>12}",
        o.suite,
        o.provider,
        o.direction,
        o.size,
        o.sas,
        o.policies,
        o.workers,
        o.ns,
        o.mpps,
        o.gbps,
        o.tsc_cycles,
        o.core_cycles,
        o.limit_share * 100.0,
        format!("{:.1}..{:.1}", o.range.0, o.range.1)
    );
}

/// Bars, one per line of the report: the gateway's rate before that of its ciphering alone.
fn draw(outcomes: &[Outcome], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const BAR: u32 = 22;
    let count = i32::try_from(outcomes.len())?;
    let height = 120 + BAR * u32::try_from(outcomes.len())?;
    let root = SVGBackend::new(path, (1100, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = outcomes
        .iter()
        .map(|o| 1e3 / o.limit_ns.max(0.1))
        .fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Packets per second: the gateway (dark), its ciphering alone (light)",
            ("sans-serif", 18),
        )
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(380)
        .build_cartesian_2d(0.0..most * 1.05, (0..count).into_segmented())?;
    let label = |at: &SegmentValue<i32>| match at {
        SegmentValue::CenterOf(n) | SegmentValue::Exact(n) => usize::try_from(*n)
            .ok()
            .and_then(|n| outcomes.get(n))
            .map_or_else(String::new, |o| {
                format!(
                    "{} {} {} B, {} SAs, {} policies, {} workers",
                    o.suite, o.direction, o.size, o.sas, o.policies, o.workers
                )
            }),
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("million packets per second")
        .y_labels(outcomes.len() + 1)
        .y_label_formatter(&label)
        .draw()?;
    for (n, o) in (0..).zip(outcomes) {
        let bar = |rate: f64, color: RGBColor, margin| {
            let mut bar = Rectangle::new(
                [
                    (0.0, SegmentValue::Exact(n)),
                    (rate, SegmentValue::Exact(n + 1)),
                ],
                color.filled(),
            );
            bar.set_margin(margin, margin, 0, 0);
            bar
        };
        let limit = 1e3 / o.limit_ns.max(0.1) * o.workers as f64;
        chart.draw_series([
            bar(limit, RGBColor(190, 205, 225), 3),
            bar(o.mpps, RGBColor(40, 80, 140), 6),
        ])?;
    }
    root.present()?;
    Ok(())
}
