//! How a model is slower, or worse, than it should be.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The knobs on a command line.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct KnobArgs {
    /// Time from submission to completion, microseconds
    #[arg(long, default_value_t = 0)]
    pub latency: u32,
    /// Most bytes a second, in megabytes; 0 for no limit
    #[arg(long, default_value_t = 0)]
    pub throughput: u32,
    /// Completions lost, in parts per million
    #[arg(long, default_value_t = 0)]
    pub lose: u32,
    /// Completions given twice, in parts per million
    #[arg(long, default_value_t = 0)]
    pub duplicate: u32,
    /// Completions late by `--late`, in parts per million
    #[arg(long, default_value_t = 0)]
    pub delay: u32,
    /// How late, microseconds
    #[arg(long, default_value_t = 10_000)]
    pub late: u32,
    /// Results with a wrong bit, in parts per million
    #[arg(long, default_value_t = 0)]
    pub corrupt: u32,
    /// Completions that change places, in parts per million
    #[arg(long, default_value_t = 0)]
    pub reorder: u32,
    /// Results with an error that did not happen, in parts per million
    #[arg(long, default_value_t = 0)]
    pub spurious: u32,
    /// Descriptors of results with a wrong bit, in parts per million
    #[arg(long, default_value_t = 0)]
    pub garble: u32,
    /// Descriptors of results that become visible in pieces, in parts per million
    #[arg(long, default_value_t = 0)]
    pub tear: u32,
    /// Jobs after which the engine stands still until it is reset; 0 for never
    #[arg(long, default_value_t = 0)]
    pub hang: u64,
    /// Start of the random numbers that decide, so that a run can be repeated
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// The knobs of a model, which can be turned while it runs.
#[derive(Debug, Default)]
pub struct Knobs {
    /// Time from submission to completion, microseconds.
    pub latency: AtomicU32,
    /// Most bytes a second, in megabytes; 0 for no limit.
    pub throughput: AtomicU32,
    /// Completions lost, in parts per million, as all that follow.
    pub lose: AtomicU32,
    /// Completions given twice.
    pub duplicate: AtomicU32,
    /// Completions that come late.
    pub delay: AtomicU32,
    /// How late, microseconds.
    pub late: AtomicU32,
    /// Results with a wrong bit.
    pub corrupt: AtomicU32,
    /// Completions that change places with the next.
    pub reorder: AtomicU32,
    /// Results with an error that did not happen.
    pub spurious: AtomicU32,
    /// Descriptors of results with a wrong bit.
    pub garble: AtomicU32,
    /// Descriptors of results that become visible in pieces.
    pub tear: AtomicU32,
    /// Jobs after which the engine stands still until it is reset; 0 for never.
    pub hang: AtomicU64,
    /// State of the random numbers.
    random: AtomicU64,
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mischief {
    /// Its completion is never seen.
    pub lose: bool,
    /// Its completion is seen twice.
    pub duplicate: bool,
    /// A bit of its result is wrong.
    pub corrupt: bool,
    /// Its completion changes places with the next.
    pub reorder: bool,
    /// Its status tells of an error that did not happen.
    pub spurious: bool,
    /// A bit of its result descriptor is wrong.
    pub garble: bool,
    /// Its result descriptor becomes visible in pieces.
    pub tear: bool,
    /// Its completion comes so much later.
    pub delay: Duration,
}

impl Knobs {
    /// As the command line says.
    pub fn new(args: &KnobArgs) -> Arc<Knobs> {
        Arc::new(Knobs {
            latency: args.latency.into(),
            throughput: args.throughput.into(),
            lose: args.lose.into(),
            duplicate: args.duplicate.into(),
            delay: args.delay.into(),
            late: args.late.into(),
            corrupt: args.corrupt.into(),
            reorder: args.reorder.into(),
            spurious: args.spurious.into(),
            garble: args.garble.into(),
            tear: args.tear.into(),
            hang: args.hang.into(),
            random: args.seed.into(),
        })
    }

    /// Draws what happens to the next job.
    pub fn draw(&self) -> Mischief {
        let hit = |knob: &AtomicU32| {
            let rate = knob.load(Relaxed);
            rate != 0 && self.random() % 1_000_000 < u64::from(rate)
        };
        let late = Duration::from_micros(u64::from(self.late.load(Relaxed)));
        Mischief {
            lose: hit(&self.lose),
            duplicate: hit(&self.duplicate),
            corrupt: hit(&self.corrupt),
            reorder: hit(&self.reorder),
            spurious: hit(&self.spurious),
            garble: hit(&self.garble),
            tear: hit(&self.tear),
            delay: if hit(&self.delay) {
                late
            } else {
                Duration::ZERO
            },
        }
    }

    /// Whether the engine stands still after `jobs` jobs.
    pub fn hangs(&self, jobs: u64) -> bool {
        let after = self.hang.load(Relaxed);
        after != 0 && jobs >= after
    }

    /// When a job of `bytes` bytes that begins now is done, when the engine was busy until `busy_until`; the second is what
    /// the engine is busy until then.
    pub fn schedule(&self, now: Instant, busy_until: Instant, bytes: usize) -> (Instant, Instant) {
        let rate = u64::from(self.throughput.load(Relaxed));
        let time = match rate {
            0 => Duration::ZERO,
            // Bytes per microsecond are megabytes a second.
            _ => Duration::from_nanos((bytes as u64).saturating_mul(1000) / rate),
        };
        let busy = busy_until.max(now) + time;
        let latency = Duration::from_micros(u64::from(self.latency.load(Relaxed)));
        (busy + latency, busy)
    }

    /// A random number (splitmix64), of no use for secrets.
    pub fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
