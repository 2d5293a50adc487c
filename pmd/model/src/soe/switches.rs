//! What the reference leaves open, as options, each with the reading that the reference proposes.

/// Readings of what is not known.
#[derive(Debug, Clone, clap::Args)]
pub struct Switches {
    /// Receive ring on which results arrive
    #[arg(long, default_value_t = 1)]
    pub result_ring: u8,
    /// Results of either QDMA instance arrive on this one; those of each on its own when absent
    #[arg(long)]
    pub result_instance: Option<u8>,
    /// The upper half of the UDP port register is the destination port
    #[arg(long)]
    pub udp_swapped: bool,
    /// Bits 5 to 7 of the user field make the ICV wrong, as seen on silicon
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub tag_breaks_icv: bool,
    /// First sequence number
    #[arg(long, default_value_t = 1)]
    pub first_number: u32,
    /// The staging window reads back what was written to it, keys too
    #[arg(long)]
    pub staging_readable: bool,
    /// Requests for a slot that does not carry them end with an error; else nothing comes back
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub answer_wrong_slot: bool,
    /// Most bytes of padding beyond the least, in blocks, chosen at random
    #[arg(long, default_value_t = 0)]
    pub extra_padding: u8,
    /// TTL of outer packets
    #[arg(long, default_value_t = 64)]
    pub ttl: u8,
    /// Commits are never done
    #[arg(long)]
    pub no_commit: bool,
    /// Frames of the MACs arrive on this QDMA instance; those of the first on 0, of the others on 1 when absent
    #[arg(long)]
    pub frame_instance: Option<u8>,
    /// Frames sent to a port of the packet switch come back from it
    #[arg(long)]
    pub loopback: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Switches {
            result_ring: 1,
            result_instance: None,
            udp_swapped: false,
            tag_breaks_icv: true,
            first_number: 1,
            staging_readable: false,
            answer_wrong_slot: true,
            extra_padding: 0,
            ttl: 64,
            no_commit: false,
            frame_instance: None,
            loopback: false,
        }
    }
}

impl Switches {
    /// For the operator, at start.
    pub(super) fn print(&self) {
        tracing::info!(
            result_ring = self.result_ring,
            result_instance = self.result_instance,
            udp_swapped = self.udp_swapped,
            tag_breaks_icv = self.tag_breaks_icv,
            first_number = self.first_number,
            staging_readable = self.staging_readable,
            answer_wrong_slot = self.answer_wrong_slot,
            extra_padding = self.extra_padding,
            ttl = self.ttl,
            "assumed, not known"
        );
    }
}
