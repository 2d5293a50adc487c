//! What nobody outside Airoha knows about the engine, and how this driver reads it: the safe way, one switch each.
//!
//! A first run on silicon settles these one by one; `deploy/en7581.md` says how. Nothing else in the driver depends on an
//! unknown.

/// The switches. [`Assumptions::default`] is the safe reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assumptions {
    /// AES-GCM may be used. The engine makes the IV, how is not known, and one IV used twice under a key breaks GCM for good.
    /// Off until silicon was seen to count.
    pub gcm: bool,
    /// The UDP source port is the upper half of its register. The two public drivers differ; equal ports look the same.
    pub udp_source_port_high: bool,
    /// Only SAs whose UDP ports are equal are taken, so that the switch above cannot matter.
    pub udp_ports_equal: bool,
    /// Requests of one SA in the engine at once, 1 to 7. More lost more results on silicon.
    pub in_flight: u8,
    /// SA slots used, at most 32. The registers have room for 64, which nobody has tried.
    pub slots: u8,
    /// Transmit ring for requests.
    pub ring: u8,
    /// That ring waits instead of dropping when the packet switch is full.
    pub lossless: bool,
    /// One doorbell may announce several requests. The public drivers write one for each.
    pub batch: bool,
    /// The key registers of the staging window are overwritten after each commit: whether they can be read is not known.
    pub scrub_staging: bool,
    /// Number of the first packet of an SA.
    pub first_number: u32,
    /// An inner "copy DF" policy is left to the engine; off, only SAs with a clear outer DF are taken.
    pub copies_df: bool,
    /// Outbound padding is the least that the cipher's block allows: a packet of another length is not the one asked for.
    pub pads_least: bool,
    /// Inbound packets come back as they were sealed, but for congestion marks: their first bytes, deciphered beforehand, tell
    /// which of the packets under way a result is. Off, a result that comes twice may be delivered twice.
    pub knows_by_content: bool,
    /// The outer TTL that the engine writes; SAs that want another are refused.
    pub ttl: u8,
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            gcm: false,
            udp_source_port_high: true,
            udp_ports_equal: true,
            in_flight: 4,
            slots: 32,
            ring: 2,
            lossless: true,
            batch: true,
            scrub_staging: true,
            first_number: 1,
            copies_df: true,
            pads_least: true,
            knows_by_content: true,
            ttl: 64,
        }
    }
}

impl Assumptions {
    /// Name and value of each, for the log at start.
    pub fn table(&self) -> [(&'static str, String); 14] {
        [
            ("gcm", self.gcm.to_string()),
            (
                "udp_source_port_high",
                self.udp_source_port_high.to_string(),
            ),
            ("udp_ports_equal", self.udp_ports_equal.to_string()),
            ("in_flight", self.in_flight.to_string()),
            ("slots", self.slots.to_string()),
            ("ring", self.ring.to_string()),
            ("lossless", self.lossless.to_string()),
            ("batch", self.batch.to_string()),
            ("scrub_staging", self.scrub_staging.to_string()),
            ("first_number", self.first_number.to_string()),
            ("copies_df", self.copies_df.to_string()),
            ("pads_least", self.pads_least.to_string()),
            ("knows_by_content", self.knows_by_content.to_string()),
            ("ttl", self.ttl.to_string()),
        ]
    }

    /// Within what the rest of the driver can do.
    pub(super) fn bounded(mut self) -> Self {
        self.in_flight = self.in_flight.clamp(1, 7);
        self.slots = self.slots.clamp(1, 32);
        self.ring &= 31;
        self
    }
}
