//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use esplanade_model::KnobArgs;
use gateway::crypto::select::Choice;
use perf::engines::Kind;
use perf::parallel::Packets;
use perf::scenario::Spread;
use perf::soak::SoakArgs;
use perf::traffic::Mix;
use sa_store::sa::Direction;
use sa_store::suite::Suite;

/// Measures the Esplanade gateway: real workers and look-ups, memory ports, no NIC.
#[derive(Debug, Parser)]
#[command(version)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Debug, Args)]
pub(super) struct Common {
    /// Frames that cycle, per worker.
    #[arg(long, global = true, default_value_t = 1024)]
    pub(super) frames: usize,
    /// Runs of each measurement; the median counts.
    #[arg(long, global = true, default_value_t = 5)]
    pub(super) runs: usize,
    /// Milliseconds on the clock per run.
    #[arg(long, global = true, default_value_t = 100)]
    pub(super) time: u64,
    /// CPU to pin a single worker to; the last one that is allowed when not given.
    #[arg(long, global = true)]
    pub(super) cpu: Option<usize>,
    /// Write the results as JSON.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw the results as SVG.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
    /// Leave out the measurement of the ciphering alone, for profilers.
    #[arg(long, global = true)]
    pub(super) no_limit: bool,
    /// Do not ask for huge pages, neither for frames nor for the heap.
    #[arg(long, global = true)]
    pub(super) small_pages: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
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
        /// Count the instructions of driver and watch per packet too, with callgrind against models. Needs valgrind.
        #[arg(long)]
        instructions: bool,
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
    /// Runs two gateways for hours while everything around them changes, breaks and attacks; needs root. The exit code
    /// says whether they held.
    Soak(SoakArgs),
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Inner packet sizes, bytes, or "imix".
    #[arg(long, value_delimiter = ',', default_value = "64,512,1420,imix")]
    pub(super) sizes: Vec<Mix>,
    /// Suites.
    #[arg(long, value_delimiter = ',', default_value = "aes-128-gcm-16")]
    pub(super) suites: Vec<Suite>,
    /// Directions.
    #[arg(long, value_delimiter = ',', default_value = "out,in")]
    pub(super) directions: Vec<Way>,
    /// Numbers of SAs.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,10000,100000")]
    pub(super) sas: Vec<u32>,
    /// Flows; as many as SAs when not given.
    #[arg(long)]
    pub(super) flows: Option<u32>,
    /// Numbers of policies; raised to the number of SAs, which need one each.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub(super) policies: Vec<u32>,
    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub(super) workers: Vec<usize>,
    /// Which worker gets a packet.
    #[arg(long, value_enum, default_value = "owner")]
    pub(super) spread: Spread,
    /// Crypto provider, or "auto".
    #[arg(long, default_value = "auto")]
    pub(super) provider: Choice,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Way {
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
