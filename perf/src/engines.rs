//! The CPU against look-aside engines: throughput, and what the worker's CPU spends on a packet in either place.
//!
//! What is measured is what the gateway measures at start for `engine = "auto"` ([`gateway::engine::choice`]), with more
//! effort. Without a configuration the engines are models behind vfio-user sockets, each on a thread of its own: what a
//! driver does is real then, a doorbell is a message to another thread, and an engine's speed is that of the model.

mod models;
mod plot;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use esplanade_model::KnobArgs;
use gateway::app::OpenEngines;
use gateway::config;
use gateway::engine::choice::{Bench, Effort, Figure, Row, Size, Table};
use pmd::{Arena, ArenaConfig, Pool};
use quanta::Clock;
use sa_store::cipher::CipherFactory;
use sa_store::runtime::Place;
use sa_store::sa::{Direction, OffloadMode};
use sa_store::suite::Suite;
use serde::Serialize;

use crate::clock::Rates;
pub use models::Kind;
pub(crate) use plot::draw;

const COUNT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/engine_instructions");

/// Frames for the packets and for the engines' own rings.
const FRAMES: u32 = 16 << 10;
/// SA indexes from here on are those of the engines' watch.
const PRIVATE: u32 = 1 << 20;
/// Time after which every driver has shown its counters.
const SETTLE: Duration = Duration::from_millis(150);
/// Steps of the search for a break-even size, bytes.
const STEP: usize = 4;

/// What to measure.
pub struct Subjects<'a> {
    /// The engines of this gateway configuration; otherwise models.
    pub config: Option<&'a Path>,
    /// Models.
    pub kinds: &'a [Kind],
    /// What the models are like.
    pub knobs: &'a KnobArgs,
    /// Suites.
    pub suites: &'a [Suite],
}

/// One suite and direction of one engine in one mode, at one size, beside the CPU.
#[derive(Clone, Debug, Serialize)]
pub struct EngineCell {
    /// Engine.
    pub engine: String,
    /// Whether it is a model.
    pub model: bool,
    /// Algorithms.
    pub suite: String,
    /// `out` or `in`.
    pub direction: &'static str,
    /// `crypto` or `packet`.
    pub mode: &'static str,
    /// Inner packet, or mix.
    pub size: &'static str,
    /// Mean inner packet, bytes.
    pub bytes: f64,
    /// Nanoseconds per packet on the CPU.
    pub cpu_ns: f64,
    /// Nanoseconds from packet to packet out of the engine.
    pub engine_ns: f64,
    /// Cycles of the time-stamp counter that the CPU spends on ciphering a packet.
    pub cipher_cycles: f64,
    /// The same on giving it to the engine and taking it back.
    pub drive_cycles: f64,
}

impl EngineCell {
    /// Cycles per packet that the engine frees.
    pub fn freed(&self) -> f64 {
        self.cipher_cycles - self.drive_cycles
    }

    /// Inner bits per nanosecond: on the CPU, through the engine.
    pub fn gbps(&self) -> (f64, f64) {
        let bits = self.bytes * 8.0;
        (bits / self.cpu_ns, bits / self.engine_ns)
    }
}

/// From which size on an engine is the better place.
#[derive(Clone, Debug, Serialize)]
pub struct BreakEven {
    /// Engine.
    pub engine: String,
    /// Whether it is a model.
    pub model: bool,
    /// Algorithms.
    pub suite: String,
    /// `out` or `in`.
    pub direction: &'static str,
    /// `crypto` or `packet`.
    pub mode: &'static str,
    /// Smallest inner packet, bytes, from which on the CPU spends less on it than on ciphering; `None`: at no size up to 1420.
    pub cycles_from: Option<usize>,
    /// Smallest from which on the engine's throughput is higher.
    pub throughput_from: Option<usize>,
}

/// One engine, measured.
#[derive(Clone, Debug, Serialize)]
pub struct Engines {
    /// Cells.
    pub cells: Vec<EngineCell>,
    /// Break-even sizes.
    pub even: Vec<BreakEven>,
    /// Doorbells per packet by engine.
    pub doorbells: Vec<(String, f64)>,
    /// What could not be measured, and why.
    pub unmeasured: Vec<String>,
}

/// Measures the engines and the CPU.
///
/// # Errors
/// No engine can be opened, or a model does not start.
pub fn measure(
    subjects: &Subjects<'_>,
    factory: &Arc<dyn CipherFactory>,
    clock: &Clock,
    rates: &Rates,
    effort: Effort,
) -> Result<Engines> {
    let arena = Arena::new(ArenaConfig {
        frames: FRAMES,
        name: "engines".into(),
        ..ArenaConfig::default()
    })
    .context("frames")?;
    let (configs, models) = match subjects.config {
        Some(path) => {
            let config = config::load(path).map_err(|e| anyhow::anyhow!("{e}"))?;
            (config.engines, Vec::new())
        }
        None => models::start(subjects.kinds, subjects.knobs)?,
    };
    if configs.is_empty() {
        bail!("there is no engine to measure");
    }
    let mut pool = Pool::new(&arena, 512);
    let mut bench = Bench {
        pool: &mut pool,
        clock,
        factory: &**factory,
        effort,
    };
    let mut engines = Engines {
        cells: Vec::new(),
        even: Vec::new(),
        doorbells: Vec::new(),
        unmeasured: Vec::new(),
    };
    let (on_cpu, failed) = bench.cpu(subjects.suites);
    let on_cpu: Table = on_cpu.into_iter().collect();
    let failed = failed.iter().map(|why| format!("CPU: {why}"));
    engines.unmeasured.extend(failed);
    let mut open = OpenEngines::default();
    for config in &configs {
        open.open(config, &arena, factory, PRIVATE)
            .with_context(|| format!("engine \"{}\"", config.name))?;
    }
    for (number, desk) in (1_u8..).zip(&open.desks) {
        let wanted = |suite| subjects.suites.contains(&suite);
        let count = || {
            desk.stats()
                .map(|s| (s.submitted.value(), s.doorbells.value()))
                .unwrap_or_default()
        };
        let before = count();
        let (rows, failed) = desk
            .while_here(|engine| {
                let measured = bench.engine_in(engine, number, wanted);
                // Some drivers show their counters now and then only.
                std::thread::sleep(SETTLE);
                engine.poll(&mut Vec::new());
                measured
            })
            .context("nobody else has the engine")?;
        let after = count();
        if after.0 > before.0 {
            let per_packet = (after.1 - before.1) as f64 / (after.0 - before.0) as f64;
            engines.doorbells.push((desk.name().to_owned(), per_packet));
        }
        let failed = failed.iter().map(|why| format!("{}: {why}", desk.name()));
        engines.unmeasured.extend(failed);
        let subject = Subject {
            engine: desk.name(),
            model: !models.is_empty(),
            rates,
        };
        for row in &rows {
            if let Some(cpu) = on_cpu.row(row.suite(), row.direction(), Place::CPU) {
                engines.cells.extend(subject.cells(row, cpu));
                engines.even.push(subject.break_even(row, cpu));
            }
        }
    }
    // Drivers before their devices.
    drop(open);
    drop(models);
    Ok(engines)
}

struct Subject<'a> {
    engine: &'a str,
    model: bool,
    rates: &'a Rates,
}

impl Subject<'_> {
    fn cells(&self, row: &Row, cpu: &Row) -> Vec<EngineCell> {
        let both = |size| Some((size, row.cell(size)?, cpu.cell(size)?));
        let sizes = Size::ALL.into_iter().filter_map(both);
        sizes
            .map(|(size, engine, cpu)| {
                let packets = size.packets();
                let sum: f64 = packets.iter().map(|len| f64::from(*len)).sum();
                EngineCell {
                    engine: self.engine.to_owned(),
                    model: self.model,
                    suite: row.suite().to_string(),
                    direction: direction(row),
                    mode: mode(row),
                    size: size.name(),
                    bytes: sum / packets.len() as f64,
                    cpu_ns: cpu.ns,
                    engine_ns: engine.ns,
                    cipher_cycles: cpu.cpu_ns * self.rates.tsc_ghz,
                    drive_cycles: engine.cpu_ns * self.rates.tsc_ghz,
                }
            })
            .collect()
    }

    fn break_even(&self, row: &Row, cpu: &Row) -> BreakEven {
        BreakEven {
            engine: self.engine.to_owned(),
            model: self.model,
            suite: row.suite().to_string(),
            direction: direction(row),
            mode: mode(row),
            cycles_from: even(row, cpu, |f| f.cpu_ns),
            throughput_from: even(row, cpu, |f| f.ns),
        }
    }
}

/// The smallest size from which on, up to the largest, `row` costs less than `cpu`.
fn even(row: &Row, cpu: &Row, cost: impl Fn(Figure) -> f64) -> Option<usize> {
    let is_less = |size: usize| {
        let mean = Some(size as f64);
        match (row.at(mean), cpu.at(mean)) {
            (Some(row), Some(cpu)) => cost(row) < cost(cpu),
            _ => false,
        }
    };
    let sizes = (64..=1420).rev().step_by(STEP);
    sizes.take_while(|size| is_less(*size)).last()
}

fn direction(row: &Row) -> &'static str {
    match row.direction() {
        Direction::Out => "out",
        Direction::In => "in",
    }
}

fn mode(row: &Row) -> &'static str {
    match row.place().mode {
        OffloadMode::Packet => "packet",
        OffloadMode::Crypto | OffloadMode::Software => "crypto",
    }
}

/// The tables.
pub fn print(engines: &Engines) {
    if engines.cells.iter().any(|c| c.model) {
        println!(
            "\nMODELS, not silicon: throughput and break-even are those of software behind a socket, where every access to a register is\na message to another thread"
        );
    }
    println!(
        "\n{:<10} {:<7} {:<30} {:<3} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "engine",
        "mode",
        "suite",
        "dir",
        "size",
        "CPU Gb/s",
        "eng Gb/s",
        "cipher",
        "drive",
        "freed",
        "better"
    );
    for c in &engines.cells {
        let (cpu, engine) = c.gbps();
        let better = match (engine > cpu, c.freed() > 0.0) {
            (true, true) => "both",
            (true, false) => "speed",
            (false, true) => "cycles",
            (false, false) => "CPU",
        };
        println!(
            "{:<10} {:<7} {:<30} {:<3} {:>5} {:>9.2} {:>9.2} {:>9.0} {:>9.0} {:>9.0} {:>9}",
            name(&c.engine, c.model),
            c.mode,
            c.suite,
            c.direction,
            c.size,
            cpu,
            engine,
            c.cipher_cycles,
            c.drive_cycles,
            c.freed(),
            better
        );
    }
    println!(
        "\nbreak-even, bytes of the inner packet: the engine is the better place from here to 1420"
    );
    println!(
        "{:<10} {:<7} {:<30} {:<3} {:>12} {:>12}",
        "engine", "mode", "suite", "dir", "fewer cycles", "more speed"
    );
    let from = |size: Option<usize>| size.map_or_else(|| "never".to_owned(), |s| s.to_string());
    for e in &engines.even {
        println!(
            "{:<10} {:<7} {:<30} {:<3} {:>12} {:>12}",
            name(&e.engine, e.model),
            e.mode,
            e.suite,
            e.direction,
            from(e.cycles_from),
            from(e.throughput_from)
        );
    }
    for (engine, doorbells) in &engines.doorbells {
        println!("{engine}: {doorbells:.3} doorbells per packet");
    }
    for why in &engines.unmeasured {
        println!("not measured: {why}");
    }
}

/// Counts and prints the instructions that driver and watch take per packet, by callgrind and models in processes of their own.
///
/// # Errors
/// No valgrind, no source tree, or the count failed.
pub fn count_instructions(suites: &[Suite]) -> Result<()> {
    println!("\ninstructions per packet, without the model's work and the socket's:");
    for suite in suites {
        println!("{suite}");
        let status = Command::new(COUNT).arg(suite.to_string()).status();
        if !status.with_context(|| COUNT)?.success() {
            bail!("{COUNT} failed");
        }
    }
    Ok(())
}

fn name(engine: &str, model: bool) -> String {
    if model {
        format!("{engine}*")
    } else {
        engine.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway::crypto::{Fixed, rustcrypto::RustCrypto};
    fn row(place: Place, figures: [(f64, f64); 4]) -> Row {
        let suite = "aes-128-cbc+hmac-sha1-96".parse().unwrap();
        let mut row = Row::new(suite, Direction::Out, place);
        for (size, (ns, cpu_ns)) in Size::ALL.into_iter().zip(figures) {
            row.set(size, Figure { ns, cpu_ns });
        }
        row
    }

    #[test]
    fn break_even_is_where_the_lines_cross_for_good() {
        let cpu = row(Place::CPU, [100.0, 548.0, 1456.0, 400.0].map(|n| (n, n)));
        let engine = row(Place::CPU, [(300.0, 200.0); 4]);
        // One nanosecond a byte: 200 ns at 164 B, 300 ns at 264 B.
        assert_eq!(even(&engine, &cpu, |f| f.cpu_ns), Some(168));
        assert_eq!(even(&engine, &cpu, |f| f.ns), Some(268));
        let never = row(Place::CPU, [(9e9, 9e9); 4]);
        assert_eq!(even(&never, &cpu, |f| f.ns), None);
        let always = row(Place::CPU, [(1.0, 1.0); 4]);
        assert_eq!(even(&always, &cpu, |f| f.ns), Some(64));
    }

    #[test]
    fn both_models_are_measured_beside_the_cpu_and_nothing_of_them_is_left() {
        let suites: Vec<Suite> = vec!["aes-128-cbc+hmac-sha1-96".parse().unwrap()];
        let subjects = Subjects {
            config: None,
            kinds: &[Kind::Eip93, Kind::Soe],
            knobs: &KnobArgs::default(),
            suites: &suites,
        };
        let effort = Effort {
            packets: 16,
            runs: 1,
            patience: Duration::from_secs(5),
        };
        let rates = Rates {
            tsc_ghz: 1.0,
            core_ghz: 1.0,
        };
        let clock = Clock::new();
        let ciphers: Arc<dyn CipherFactory> = Arc::new(Fixed(RustCrypto));
        let engines = measure(&subjects, &ciphers, &clock, &rates, effort).unwrap();
        assert_eq!(engines.unmeasured, Vec::<String>::new());
        // EIP-93 in both modes, SOE in packet mode; two directions, four sizes.
        assert_eq!(engines.even.len(), 6);
        assert_eq!(engines.cells.len(), 24);
        assert!(
            engines
                .cells
                .iter()
                .all(|c| c.model && c.drive_cycles > 0.0)
        );
        assert_eq!(engines.doorbells.len(), 2, "{:?}", engines.doorbells);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plot.svg");
        draw(&engines, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.contains("model") && svg.contains("1420"));
    }
}
