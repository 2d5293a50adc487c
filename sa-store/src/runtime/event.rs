//! Sticky event bits of an SA. Set by the data path, cleared by control once handled: nothing is lost
//! however late control looks.

/// Soft packet limit reached.
pub const SOFT_PACKETS: u32 = 1;
/// Soft byte limit reached.
pub const SOFT_BYTES: u32 = 1 << 1;
/// Soft time limit reached.
pub const SOFT_TIME: u32 = 1 << 2;
/// A hard limit was reached; the SA carries nothing more.
pub const HARD: u32 = 1 << 3;
/// Seven eighths of the sequence space are used.
pub const SEQUENCE_LOW: u32 = 1 << 4;
/// The sequence space is used up.
pub const SEQUENCE_END: u32 = 1 << 5;
/// Half of the current lease block is used: the next one is wanted. Inbound: the same of the window's edge.
pub const LEASE_LOW: u32 = 1 << 6;
/// A packet was dropped because no lease was left, or because it passed the window's edge on disk.
pub const LEASE_OUT: u32 = 1 << 7;
/// Many packets in a row failed their ICV or were replays.
pub const REPLAY_BURST: u32 = 1 << 8;
/// First packet was carried.
pub const FIRST_USE: u32 = 1 << 9;
/// The engine that numbered the SA's packets has lost count of them: the SA is stopped and wants a successor.
pub const ENGINE_LOST: u32 = 1 << 10;

/// Names of the set bits, for logs and the event stream.
pub fn names(bits: u32) -> impl Iterator<Item = &'static str> {
    const NAMES: [&str; 11] = [
        "soft_packets",
        "soft_bytes",
        "soft_time",
        "hard",
        "sequence_low",
        "sequence_end",
        "lease_low",
        "lease_out",
        "replay_burst",
        "first_use",
        "engine_lost",
    ];
    NAMES
        .into_iter()
        .enumerate()
        .filter(move |(i, _)| bits >> i & 1 == 1)
        .map(|(_, n)| n)
}
