//! The bar: the fastest peers' figures, cell by cell.

use serde::Serialize;

use crate::measure::Outcome;

/// Numbers of SAs and the peers' figures: 64 B in Mpps, 512 B, 1420 B and IMIX in Gbit/s, each out and in.
///
/// Best of DPDK 26.07 ipsec-secgw and VPP 26.06 (native and ipsec-mb engines) on one core of a Zen 4 class virtual
/// machine: AES-128-GCM, IPv4 tunnel, 2 MiB pages, memory to memory, inner bytes counted, anti-replay off.
pub const PEERS: [(u32, [(f64, f64); 4]); 3] = [
    (1, [(15.0, 13.8), (40.8, 36.1), (62.4, 57.5), (30.9, 26.3)]),
    (
        1_000,
        [(12.2, 9.6), (24.8, 20.6), (45.0, 40.4), (19.2, 15.7)],
    ),
    (
        10_000,
        [(8.7, 7.5), (23.6, 20.2), (43.5, 38.8), (17.6, 16.1)],
    ),
];

/// Sizes in the order of [`PEERS`].
pub const SIZES: [&str; 4] = ["64", "512", "1420", "imix"];

/// Our figure in a cell against the peers'.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// SAs.
    pub sas: u32,
    /// Size.
    pub size: &'static str,
    /// Direction.
    pub direction: &'static str,
    /// Ours: Mpps at 64 B, else Gbit/s.
    pub ours: f64,
    /// Theirs.
    pub theirs: f64,
}

impl Verdict {
    /// Compares an outcome with its cell; `None` when the table has no such cell.
    pub fn of(outcome: &Outcome) -> Option<Self> {
        let (sas, row) = PEERS.iter().find(|(sas, _)| *sas == outcome.sas)?;
        let column = SIZES.iter().position(|s| *s == outcome.size)?;
        let (out, inbound) = row[column];
        Some(Self {
            sas: *sas,
            size: SIZES[column],
            direction: outcome.direction,
            ours: if column == 0 {
                outcome.mpps
            } else {
                outcome.gbps
            },
            theirs: if outcome.direction == "out" {
                out
            } else {
                inbound
            },
        })
    }

    /// Whether we are ahead.
    pub fn ahead(&self) -> bool {
        self.ours > self.theirs
    }
}

/// Prints the table: ours, theirs, ratio. Returns how many cells are not ahead.
pub fn print(verdicts: &[Verdict]) -> usize {
    println!(
        "{:>7} {:>6} {:>4} {:>8} {:>8} {:>7}  verdict",
        "SAs", "size", "dir", "ours", "peers", "ratio"
    );
    for v in verdicts {
        println!(
            "{:>7} {:>6} {:>4} {:>8.1} {:>8.1} {:>6.2}x  {}",
            v.sas,
            v.size,
            v.direction,
            v.ours,
            v.theirs,
            v.ours / v.theirs,
            if v.ahead() { "ahead" } else { "BEHIND" }
        );
    }
    let behind = verdicts.iter().filter(|v| !v.ahead()).count();
    println!(
        "{} of {} cells ahead (64 in Mpps, others in Gbit/s of inner bytes)",
        verdicts.len() - behind,
        verdicts.len()
    );
    behind
}
