//! What the core is told, and what it says.

use sa_store::runtime::TunnelIdx;
use sa_store::sa::SaId;

/// Why an SA wants a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Soft limit of packets.
    Packets,
    /// Soft limit of bytes.
    Bytes,
    /// Soft limit of time.
    Time,
    /// Its numbers come to an end.
    Sequence,
    /// No further numbers are on disk.
    Lease,
    /// The engine that numbered its packets lost count.
    Engine,
    /// A hard limit was reached: it carries nothing any more.
    Hard,
}

impl Reason {
    /// Name for hooks, events and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::Bytes => "bytes",
            Self::Time => "time",
            Self::Sequence => "sequence",
            Self::Lease => "lease",
            Self::Engine => "engine",
            Self::Hard => "hard",
        }
    }
}

/// How an SA stands to its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// It wants a successor.
    pub reason: Option<Reason>,
    /// How much of the way from the soft to the hard limit is gone, thousandths.
    pub permille: u64,
    /// It carries nothing any more.
    pub dead: bool,
}

/// What the core asks about SAs.
pub trait World {
    /// Limits.
    fn spent(&self, sa: SaId) -> Spent;
    /// When its last packet was carried, nanoseconds of the gateway clock; 0 for never.
    fn last_packet(&self, sa: SaId) -> u64;
}

/// What is to be done. Switches and removals of one call belong into one publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The tunnel sends on `to` from now on.
    Switch {
        /// Tunnel.
        tunnel: TunnelIdx,
        /// SA that sent.
        from: Option<SaId>,
        /// SA to send.
        to: SaId,
    },
    /// These SAs have no use any more.
    Remove {
        /// Tunnel.
        tunnel: TunnelIdx,
        /// SA.
        sa: SaId,
        /// The peer still sends on it, but its time is up.
        cut: bool,
    },
    /// An SA wants a successor: told once.
    Expired {
        /// Tunnel.
        tunnel: TunnelIdx,
        /// SA.
        sa: SaId,
        /// Why.
        reason: Reason,
    },
    /// A successor is to be fetched now. [`Machine::answered`] is to be called when the attempt is over.
    Ask {
        /// Tunnel.
        tunnel: TunnelIdx,
        /// SA.
        sa: SaId,
        /// Why.
        reason: Reason,
        /// From 1.
        attempt: u32,
    },
    /// No successor has come, and the hard limit is near: told once.
    Overdue {
        /// Tunnel.
        tunnel: TunnelIdx,
        /// SA.
        sa: SaId,
        /// Why.
        reason: Reason,
    },
    /// A successor has come: neither expired nor overdue any more.
    Renewed {
        /// Tunnel.
        tunnel: TunnelIdx,
    },
}

/// What the files want of one tunnel, by the SAs that run.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Running inbound SAs that are not named any more.
    pub dropped_in: Vec<SaId>,
    /// Running outbound SAs that are not named any more.
    pub dropped_out: Vec<SaId>,
    /// Some inbound SA is named.
    pub inbound: bool,
    /// The outbound SA that is to send: `None` for none, `Some(None)` for one that is not installed yet.
    pub target: Option<Option<SaId>>,
}

/// What stays for a while.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// SAs that are not named any more and stay.
    pub keep: Vec<SaId>,
    /// The SA that goes on sending; `None`: the wanted one sends at once.
    pub sender: Option<SaId>,
}

/// What was published for one tunnel.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Inbound SAs that the files name.
    pub inbound: Vec<SaId>,
    /// Outbound SAs that the files name.
    pub outbound: Vec<SaId>,
    /// SAs that stay although they are not named.
    pub held: Vec<SaId>,
    /// The SA that sends.
    pub sender: Option<SaId>,
    /// The SA that is to send.
    pub target: Option<SaId>,
}

/// Names of the states of [`View`].
pub const STATES: [&str; 7] = [
    "steady", "expired", "overdue", "workers", "peer", "switched", "overlap",
];

/// A tunnel's rekey, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// One of [`STATES`].
    pub state: &'static str,
    /// Why a successor is wanted.
    pub reason: Option<Reason>,
    /// Attempts to fetch one.
    pub attempts: u32,
}

impl View {
    /// Nothing is under way.
    pub const STEADY: Self = Self {
        state: "steady",
        reason: None,
        attempts: 0,
    };
}
