//! `demo`: two gateways in one process, joined by memory ports, with traffic that is verified packet by packet.
//!
//! ```text
//!   traffic ── inside ▶ gateway A ◀ outside ═══ ESP ═══ outside ▶ gateway B ◀ inside ── traffic
//!      └────────────────────── each end makes packets and checks the other's ──────────────┘
//! ```
//!
//! Real workers, look-ups, crypto and control threads; keys are random and rekeyed while packets flow. Only so
//! many packets are under way at a time that nothing has to be dropped: what is lost counts as a failure.

mod site;
mod traffic;
mod tunnels;

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use pmd::memory::{self, MemoryQueue, PairConfig};
use pmd::{Arena, ArenaConfig, BURST, Frame, Pool, PortQueue};
use sa_store::drops::DropReason;
use sa_store::ledger::Balance;
use serde_json::json;

use crate::cli::Failure;
use crate::cli::table::{number, print};
use crate::crypto::select::{Choice, Compare, Selection};
use site::{Gateway, OUTER_MTU};
use traffic::{Flows, Wrong};
use tunnels::{KINDS, Site, Tunnels};

/// Packets under way in one direction, at most: fewer than any ring or backlog on the way holds.
const WINDOW: u64 = 192;
/// Between rekeys.
const REKEY: Duration = Duration::from_millis(1500);
/// From one step of a rekey to the next: longer than any packet is under way.
const STEP: Duration = Duration::from_millis(200);
/// After the last packet was made, how long the last one may take to arrive.
const LINGER: Duration = Duration::from_secs(2);

/// Options of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How long traffic flows.
    #[arg(long, default_value_t = 10, value_name = "N")]
    seconds: u64,
    /// Where gateway A serves its metrics; any free port when this one is taken.
    #[arg(long, default_value = "127.0.0.1:9550", value_name = "ADDR")]
    listen: SocketAddr,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// One end of the demo: makes one direction's packets and checks the other's.
struct End {
    queue: MemoryQueue,
    pool: Pool,
    /// What this end sends.
    out: Flows,
    sent: u64,
    /// Frames that the port had no room for.
    pending: Vec<Frame>,
    received: Vec<Frame>,
    verified: u64,
    bytes: u64,
    wrong: Vec<Wrong>,
    wrong_count: u64,
}

impl End {
    fn new(queue: MemoryQueue, arena: &Arc<Arena>, site: Site) -> Self {
        Self {
            queue,
            pool: Pool::new(arena, 256),
            out: Flows::new(site),
            sent: 0,
            pending: Vec::new(),
            received: Vec::new(),
            verified: 0,
            bytes: 0,
            wrong: Vec::new(),
            wrong_count: 0,
        }
    }

    /// Sends a burst if no more than [`WINDOW`] packets are under way then.
    fn send(&mut self, arrived: u64) -> usize {
        let room = WINDOW.saturating_sub(self.sent - arrived);
        let burst = usize::try_from(room)
            .unwrap_or(0)
            .min(BURST)
            .saturating_sub(self.pending.len());
        for _ in 0..burst {
            let Some(mut frame) = self.pool.get() else {
                break;
            };
            if frame.set_data(self.out.make()) {
                self.pending.push(frame);
                self.sent += 1;
            } else {
                self.pool.put(frame);
            }
        }
        self.queue.tx_burst(&mut self.pool, &mut self.pending)
    }

    /// Receives a burst and holds it against what `flows` has sent.
    fn receive(&mut self, flows: &mut Flows) -> usize {
        let n = self
            .queue
            .rx_burst(&mut self.pool, &mut self.received, BURST);
        for frame in self.received.drain(..) {
            match flows.check(frame.data()) {
                Ok(len) => {
                    self.verified += 1;
                    self.bytes += len as u64;
                }
                Err(wrong) => {
                    self.wrong_count += 1;
                    if self.wrong.len() < 8 {
                        self.wrong.push(wrong);
                    }
                }
            }
            self.pool.put(frame);
        }
        n
    }

    fn arrived(&self) -> u64 {
        self.verified + self.wrong_count
    }
}

/// Runs the demo.
pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    crate::cli::log::to_stderr("warn", false);
    let outcome = Demo::start(args).and_then(|mut d| {
        d.flow(args)?;
        d.finish()
    });
    let outcome = outcome.map_err(Failure::failed)?;
    if args.json {
        println!("{:#}", outcome.as_json());
    } else {
        outcome.show();
    }
    outcome.judge()
}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

struct Demo {
    a: Gateway,
    b: Gateway,
    end_a: End,
    end_b: End,
    tunnels: Tunnels,
    rekeys: u64,
    took: Duration,
}

impl Demo {
    fn start(args: &DemoArgs) -> Result<Self, Boxed> {
        let arena = Arena::new(ArenaConfig {
            frames: 8192,
            name: "demo".into(),
            ..ArenaConfig::default()
        })?;
        let crypto = Arc::new(Selection::new(Choice::Auto, Compare::Measure)?);
        let tunnels = Tunnels::new()?;
        let inner = PairConfig {
            mtu: 1500,
            ..PairConfig::default()
        };
        let outer = PairConfig {
            mtu: OUTER_MTU,
            ..PairConfig::default()
        };
        let (end_a, inside_a) = memory::pair("traffic-a", "inside", &inner);
        let (end_b, inside_b) = memory::pair("traffic-b", "inside", &inner);
        let (outside_a, outside_b) = memory::pair("outside-a", "outside-b", &outer);
        let gateway = |site, inside, outside, metrics| {
            let config = tunnels.config(site, true);
            Gateway::start(
                site,
                &arena,
                inside,
                outside,
                Arc::clone(&crypto),
                config,
                metrics,
            )
        };
        // Another program, or another demo, may have the port.
        let listen = match std::net::TcpListener::bind(args.listen) {
            Ok(_) => args.listen,
            Err(_) => SocketAddr::new(args.listen.ip(), 0),
        };
        let a = gateway(Site::A, inside_a, outside_a, Some(listen))?;
        let b = gateway(Site::B, inside_b, outside_b, None)?;
        let end = |port: memory::MemoryPort, site| -> Result<End, Boxed> {
            let queue = port.open(1, &arena)?.pop().ok_or("the port has no queue")?;
            Ok(End::new(queue, &arena, site))
        };
        let (end_a, end_b) = (end(end_a, Site::A)?, end(end_b, Site::B)?);
        if let (false, Some(addr)) = (args.json, a.running.metrics_addr()) {
            println!(
                "two gateways, {} tunnels; metrics of the first: http://{addr}/metrics",
                KINDS.len()
            );
        }
        Ok(Self {
            a,
            b,
            end_a,
            end_b,
            tunnels,
            rekeys: 0,
            took: Duration::ZERO,
        })
    }

    /// Traffic in both directions with rekeys in between.
    fn flow(&mut self, args: &DemoArgs) -> Result<(), Boxed> {
        let began = Instant::now();
        let length = Duration::from_secs(args.seconds.max(1));
        let mut step = 0;
        let mut next_step = began + REKEY;
        let mut shown = began;
        let mut before = (0, 0);
        while began.elapsed() < length {
            for _ in 0..64 {
                self.round(true);
            }
            let now = Instant::now();
            if now >= next_step && now + 3 * STEP < began + length {
                step = self.rekey(step)?;
                next_step = now + if step == 0 { REKEY } else { STEP };
            }
            if now.duration_since(shown) >= Duration::from_secs(1) {
                self.progress(args, now.duration_since(shown), before);
                before = (self.packets(), self.bytes());
                shown = now;
            }
        }
        self.took = began.elapsed();
        let deadline = Instant::now() + LINGER;
        while self.under_way() > 0 && Instant::now() < deadline {
            self.round(false);
        }
        if std::io::stderr().is_terminal() && !args.json {
            eprintln!();
        }
        Ok(())
    }

    fn round(&mut self, send: bool) {
        let mut moved = 0;
        if send || !self.end_a.pending.is_empty() {
            let arrived = if send { self.end_b.arrived() } else { 0 };
            moved += self.end_a.send(arrived);
        }
        if send || !self.end_b.pending.is_empty() {
            let arrived = if send { self.end_a.arrived() } else { 0 };
            moved += self.end_b.send(arrived);
        }
        moved += self.end_b.receive(&mut self.end_a.out);
        moved += self.end_a.receive(&mut self.end_b.out);
        if moved == 0 {
            // Everything is under way: the gateways need the CPU more.
            std::thread::yield_now();
        }
    }

    /// One step of make-before-break: both accept the new keys; both send on them; both forget the old ones.
    fn rekey(&mut self, step: u8) -> Result<u8, Boxed> {
        match step {
            0 => self.tunnels.add()?,
            1 => {}
            _ => self.tunnels.retire(),
        }
        for (site, gateway) in [(Site::A, &self.a), (Site::B, &self.b)] {
            gateway.apply(self.tunnels.config(site, step > 0))?;
        }
        self.rekeys += u64::from(step == 1) * 2 * KINDS.len() as u64;
        Ok((step + 1) % 3)
    }

    fn packets(&self) -> u64 {
        self.end_a.verified + self.end_b.verified
    }

    fn bytes(&self) -> u64 {
        self.end_a.bytes + self.end_b.bytes
    }

    fn under_way(&self) -> u64 {
        (self.end_a.sent + self.end_b.sent)
            .saturating_sub(self.end_a.arrived() + self.end_b.arrived())
    }

    #[allow(clippy::cast_precision_loss, reason = "rates for people")]
    fn progress(&self, args: &DemoArgs, elapsed: Duration, before: (u64, u64)) {
        if args.json {
            return;
        }
        let seconds = elapsed.as_secs_f64();
        let mpps = (self.packets() - before.0) as f64 / seconds / 1e6;
        let gbits = (self.bytes() - before.1) as f64 * 8.0 / seconds / 1e9;
        let wrong = self.end_a.wrong_count + self.end_b.wrong_count;
        let line = format!(
            "{} verified, {wrong} wrong, {mpps:.3} Mpps, {gbits:.3} Gbit/s, {} rekeys",
            number(self.packets()),
            self.rekeys
        );
        let mut err = std::io::stderr();
        // Progress that cannot be shown is no reason to stop.
        let _ = if err.is_terminal() {
            write!(err, "\r{line}   ")
        } else {
            writeln!(err, "{line}")
        };
    }

    fn finish(self) -> Result<Outcome, Boxed> {
        let Self {
            a,
            b,
            end_a,
            end_b,
            rekeys,
            took,
            ..
        } = self;
        let mut drops = Vec::new();
        let counters: Vec<_> = a.counters.iter().chain(&b.counters).cloned().collect();
        let balances = [a.stop()?, b.stop()?];
        for reason in DropReason::ALL {
            let n: u64 = counters
                .iter()
                .map(|c| c.dropped[reason.index()].value())
                .sum();
            if n > 0 {
                drops.push((reason.name(), n));
            }
        }
        Ok(Outcome {
            took,
            sent: end_a.sent + end_b.sent,
            verified: end_a.verified + end_b.verified,
            bytes: end_a.bytes + end_b.bytes,
            wrong: end_a.wrong_count + end_b.wrong_count,
            examples: end_a
                .wrong
                .iter()
                .chain(&end_b.wrong)
                .map(|w| format!("{w:?}").to_lowercase())
                .collect(),
            rekeys,
            drops,
            balances,
        })
    }
}

/// What came of it.
struct Outcome {
    took: Duration,
    sent: u64,
    verified: u64,
    bytes: u64,
    wrong: u64,
    examples: Vec<String>,
    rekeys: u64,
    drops: Vec<(&'static str, u64)>,
    balances: [Balance; 2],
}

impl Outcome {
    fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.verified + self.wrong)
    }

    #[allow(clippy::cast_precision_loss, reason = "rates for people")]
    fn rates(&self) -> (f64, f64) {
        let seconds = self.took.as_secs_f64();
        (
            self.verified as f64 / seconds / 1e6,
            self.bytes as f64 * 8.0 / seconds / 1e9,
        )
    }

    fn show(&self) {
        let (mpps, gbits) = self.rates();
        let drops: u64 = self.drops.iter().map(|d| d.1).sum();
        let balance = if self.balances.iter().all(Balance::holds) {
            "balances"
        } else {
            "DOES NOT BALANCE"
        };
        let mut rows = vec![
            vec!["time".into(), format!("{:.1} s", self.took.as_secs_f64())],
            vec!["packets sent".into(), number(self.sent)],
            vec!["verified end to end".into(), number(self.verified)],
            vec!["wrong".into(), number(self.wrong)],
            vec!["lost".into(), number(self.lost())],
            vec![
                "rate, both directions".into(),
                format!("{mpps:.3} Mpps, {gbits:.3} Gbit/s of inner packets"),
            ],
            vec!["rekeys".into(), number(self.rekeys)],
            vec!["account of all frames".into(), balance.into()],
            vec!["dropped by the gateways".into(), number(drops)],
        ];
        rows.extend(
            self.drops
                .iter()
                .map(|(reason, n)| vec![format!("  {reason}"), number(*n)]),
        );
        println!();
        print(&["", ""], &rows);
    }

    fn as_json(&self) -> serde_json::Value {
        let (mpps, gbits) = self.rates();
        json!({
            "seconds": self.took.as_secs_f64(),
            "sent": self.sent,
            "verified": self.verified,
            "wrong": self.wrong,
            "wrong_examples": self.examples,
            "lost": self.lost(),
            "mpps": mpps,
            "gbit_per_second": gbits,
            "rekeys": self.rekeys,
            "drops": self.drops.iter().map(|(r, n)| ((*r).to_owned(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "balanced": self.balances.iter().all(Balance::holds),
        })
    }

    fn judge(&self) -> Result<(), Failure> {
        if self.wrong > 0 {
            return Err(Failure::disproved(format!(
                "{} packets were wrong: {}",
                self.wrong,
                self.examples.join(", ")
            )));
        }
        if self.lost() > 0 {
            return Err(Failure::disproved(format!(
                "{} packets were lost",
                self.lost()
            )));
        }
        if !self.balances.iter().all(Balance::holds) {
            return Err(Failure::disproved(
                "a gateway's account of its frames does not balance",
            ));
        }
        if self.verified == 0 {
            return Err(Failure::disproved("no packet arrived"));
        }
        Ok(())
    }
}
