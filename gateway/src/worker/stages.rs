//! Time spent in each stage of the rounds, for the measuring build alone: without the feature `stages` a mark is
//! nothing, and the clock has no size.

/// A stretch of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Taking bursts from ports and from other workers.
    Receive,
    /// Parsing, lanes.
    Parse,
    /// Inbound: finding SAs, cheap refusals, jobs.
    LookUp,
    /// The engine, either direction.
    Crypto,
    /// Inbound: window, structure, limits.
    Judge,
    /// Inbound policies: flow cache, on a miss the SPD.
    Policy,
    /// Inbound: verdicts applied, packets passed on.
    Accept,
    /// Routes of clear packets, their link headers.
    Forward,
    /// Outbound: policies (flow cache, on a miss the SPD), SAs, routes, numbers, encapsulation, jobs.
    Encap,
    /// Outbound: checksums, link headers.
    Finish,
    /// Giving bursts to ports and to other workers.
    Transmit,
    /// The snapshot, clocks, counters between two rounds.
    Rest,
}

impl Stage {
    /// All stages in the order of a round.
    pub const ALL: [Self; 12] = [
        Self::Receive,
        Self::Parse,
        Self::LookUp,
        Self::Crypto,
        Self::Judge,
        Self::Policy,
        Self::Accept,
        Self::Forward,
        Self::Encap,
        Self::Finish,
        Self::Transmit,
        Self::Rest,
    ];
}

/// Ticks of the time-stamp counter by stage, see [`Stage::ALL`].
pub type StageTicks = [u64; Stage::ALL.len()];

/// The measuring build's clock.
#[cfg(feature = "stages")]
#[derive(Debug)]
pub(super) struct StageClock {
    clock: quanta::Clock,
    last: u64,
    ticks: StageTicks,
}

#[cfg(feature = "stages")]
impl StageClock {
    pub(super) fn new(clock: &quanta::Clock) -> Self {
        Self {
            clock: clock.clone(),
            last: clock.raw(),
            ticks: StageTicks::default(),
        }
    }

    /// What was done since the last mark was `stage`.
    #[inline(always)]
    pub(super) fn mark(&mut self, stage: Stage) {
        let now = self.clock.raw();
        self.ticks[stage as usize] += now.wrapping_sub(self.last);
        self.last = now;
    }

    /// The time since the last mark is nobody's.
    #[inline(always)]
    pub(super) fn skip(&mut self) {
        self.last = self.clock.raw();
    }

    pub(super) fn ticks(&self) -> StageTicks {
        self.ticks
    }
}

/// The product's: nothing.
#[cfg(not(feature = "stages"))]
#[derive(Debug)]
pub(super) struct StageClock;

#[cfg(not(feature = "stages"))]
impl StageClock {
    pub(super) fn new(_: &quanta::Clock) -> Self {
        Self
    }

    #[inline(always)]
    pub(super) fn mark(&mut self, _: Stage) {}

    #[inline(always)]
    pub(super) fn skip(&mut self) {}
}
