//! What the public record of this engine does not say, and how it is read here: always the safe way. One place, so that a
//! first run on silicon can settle each question by flipping a switch.

/// The readings. The default is safe on all silicon that the record could describe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unknowns {
    /// Sources and destinations may begin at any byte. Drivers align them to 4; off, packets elsewhere are moved.
    pub unaligned_data: bool,
    /// Spacing of descriptors in words, for RING_CONFIG. Old revisions may need 8; later ones have no such field, 0.
    pub ring_offset: u32,
    /// Whether the length of a sealed result of crypto mode counts the ICV. `None`: either is accepted, as the driver goes by
    /// its own lengths.
    pub length_counts_icv: Option<bool>,
    /// AES-CTR in packet mode. The engine's random IVs can repeat, and drivers saw other trouble: off.
    pub counter_mode_in_packet_mode: bool,
    /// At most one packet of a packet-mode SA at a time: whether the engine fetches the next SA record before it has written
    /// the last one back is not known. Off, as public drivers send them back to back and the number of each sealed packet is
    /// checked before it may leave: a number that comes twice stops the engine.
    pub one_number_at_a_time: bool,
    /// The ring pointers may survive a ring reset. Off: they must read 0, as the record infers; on: the driver begins where
    /// they say, if they agree.
    pub pointers_survive: bool,
}
