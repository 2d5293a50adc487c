//! The break-even table as bars.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{EngineCell, Engines};

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const BAR: u32 = 20;
const DARK: RGBColor = RGBColor(40, 80, 140);
const LIGHT: RGBColor = RGBColor(200, 120, 60);

/// Two columns, a line per cell: throughput of CPU and engine, cycles freed.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn draw(engines: &Engines, path: &Path) -> anyhow::Result<()> {
    bars(&engines.cells, path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

fn bars(cells: &[EngineCell], path: &Path) -> Drawn {
    let height = 120 + BAR * u32::try_from(cells.len())?;
    let root = SVGBackend::new(path, (1500, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let note = if cells.iter().any(|c| c.model) {
        " (model: software behind a socket, not silicon)"
    } else {
        ""
    };
    let (left, right) = root.split_horizontally(930);
    let labels: Vec<String> = cells.iter().map(label).collect();
    let speed: Vec<Vec<(f64, RGBColor)>> = cells
        .iter()
        .map(|c| {
            let (cpu, engine) = c.gbps();
            vec![(cpu, DARK), (engine, LIGHT)]
        })
        .collect();
    column(
        &left,
        &format!("Throughput: CPU (blue), engine (orange){note}"),
        "Gbit/s of inner packets",
        &labels,
        &speed,
    )?;
    let freed: Vec<Vec<(f64, RGBColor)>> = cells.iter().map(|c| vec![(c.freed(), DARK)]).collect();
    let none = vec![String::new(); cells.len()];
    column(
        &right,
        "CPU cycles per packet that the engine frees",
        "TSC cycles; below 0: it costs more than it frees",
        &none,
        &freed,
    )?;
    root.present()?;
    Ok(())
}

/// Horizontal bars, those of one line side by side.
fn column(
    area: &Drawing<'_>,
    caption: &str,
    unit: &str,
    labels: &[String],
    lines: &[Vec<(f64, RGBColor)>],
) -> Drawn {
    let values = || lines.iter().flatten().map(|(value, _)| *value);
    let most = values().fold(1.0, f64::max) * 1.05;
    let least = values().fold(0.0, f64::min) * 1.05;
    let count = i32::try_from(lines.len())?;
    let room = if labels.iter().all(String::is_empty) {
        10
    } else {
        420
    };
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(room)
        .build_cartesian_2d(least..most, 0.0..f64::from(count))?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc(unit)
        .y_labels(0)
        .draw()?;
    for ((n, line), text) in lines.iter().enumerate().zip(labels) {
        let top = f64::from(count) - n as f64 - 0.1;
        let thick = 0.8 / line.len().max(1) as f64;
        for (i, (value, color)) in line.iter().enumerate() {
            let upper = top - thick * i as f64;
            let bar = [(0.0, upper), (*value, upper - thick)];
            chart.draw_series([Rectangle::new(bar, color.filled())])?;
        }
        if !text.is_empty() {
            let (x, y) = chart.backend_coord(&(least, top - 0.4));
            let (dx, dy) = area.get_base_pixel();
            let style = ("sans-serif", 12).into_font().color(&BLACK);
            area.draw_text(text, &style, (x - dx - 410, y - dy - 6))?;
        }
    }
    Ok(())
}

fn label(c: &EngineCell) -> String {
    format!(
        "{}{} {} {} {} {} B",
        c.engine,
        if c.model { " (model)" } else { "" },
        c.mode,
        c.suite,
        c.direction,
        c.size
    )
}
