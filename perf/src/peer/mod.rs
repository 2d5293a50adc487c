//! Side by side with DPDK's ipsec-secgw on the same machine: a looped capture in, a null port out.
//!
//! The peer is a process of its own that shares its CPU with whatever else runs, so its rate is packets per second
//! of CPU time that it got: it polls, so it uses all that it gets. It stays loaded and is stopped while the gateway
//! is measured, so that runs of both can take turns. Inbound it gets a capture of packets that our own gateway
//! sealed, and no replay window, for a looped capture is a replay.

mod capture;
mod secgw;

use std::time::Duration;

use anyhow::Result;
use sa_store::sa::Direction;
use serde::Serialize;

use crate::clock::median;
use crate::measure::{Bench, Outcome, Series};
use crate::rig::Rig;
use crate::scenario::Scenario;

pub use secgw::{Driver, MEMORY, Peer, Session};

/// Both gateways' figures for one scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Our own, as everywhere else.
    pub ours: Outcome,
    /// Crypto driver of the peer.
    pub driver: Driver,
    /// Packets per microsecond of CPU time that the peer sent: median of the runs.
    pub theirs_mpps: f64,
    /// Its slowest and its fastest run.
    pub theirs_range: (f64, f64),
    /// Our rate over the peer's.
    pub ratio: f64,
    /// Seconds from the peer's start to its first packet sent.
    pub start_up: f64,
}

impl Comparison {
    /// Runs both in turn, as often as `bench` asks for.
    ///
    /// # Errors
    /// Either does not run; says what it said.
    pub fn measure(
        bench: &Bench<'_>,
        scenario: &Scenario,
        peer: &Peer,
        driver: Driver,
    ) -> Result<Self> {
        let mut session = peer.start(bench, scenario, driver)?;
        let mut rig = Rig::new(scenario, bench.factory, bench.arena)?;
        let (mut series, mut theirs) = (Series::default(), Vec::new());
        for _ in 0..bench.effort.runs {
            series.join(bench.with_runs(1).run(&mut rig, |_| ())?);
            theirs.push(session.rate(Duration::from_secs(1))?);
        }
        drop(rig);
        let theirs_mpps = median(&mut theirs);
        let ours = bench.outcome(scenario, &series, 0.0);
        Ok(Self {
            driver,
            theirs_mpps,
            theirs_range: (theirs[0], theirs[theirs.len() - 1]),
            ratio: ours.mpps / theirs_mpps,
            start_up: session.start_up.as_secs_f64(),
            ours,
        })
    }

    /// Heads the lines of [`print`](Self::print).
    pub fn print_head() {
        println!(
            "{:<3} {:>7} {:>6} {:>10} {:>12} {:>7}  {:<11} {:>16} {:>9}",
            "dir",
            "SAs",
            "size",
            "esplanade",
            "ipsec-secgw",
            "ratio",
            "its driver",
            "its runs",
            "its start"
        );
    }

    /// One line, millions of packets per second.
    pub fn print(&self) {
        println!(
            "{:<3} {:>7} {:>6} {:>10.2} {:>12.2} {:>6.2}x  {:<11} {:>16} {:>7.1} s",
            self.ours.direction,
            self.ours.sas,
            self.ours.size,
            self.ours.mpps,
            self.theirs_mpps,
            self.ratio,
            self.driver.name(),
            format!("{:.2}..{:.2}", self.theirs_range.0, self.theirs_range.1),
            self.start_up
        );
    }
}

/// The faster of the peer's two ipsec-mb drivers for a scenario.
///
/// # Errors
/// See [`Peer::start`].
pub fn best_driver(bench: &Bench<'_>, scenario: &Scenario, peer: &Peer) -> Result<Driver> {
    let mut best = (0.0, Driver::Gcm);
    for driver in [Driver::Gcm, Driver::Mb] {
        let rate = peer
            .start(bench, scenario, driver)?
            .rate(Duration::from_secs(1))?;
        if rate > best.0 {
            best = (rate, driver);
        }
    }
    Ok(best.1)
}

/// Where the peer's packets come in and leave: (unprotected port mask, direction word).
fn way(direction: Direction) -> (&'static str, &'static str) {
    match direction {
        Direction::Out => ("0x2", "out"),
        Direction::In => ("0x1", "in"),
    }
}
