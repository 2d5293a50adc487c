//! The one list of reasons for which a packet is dropped.
//!
//! Every frame that is not forwarded, punted or consumed ends in exactly one of these. A name, once
//! released, never changes its meaning: dashboards depend on it.

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why a packet was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $variant,)* }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();
            /// Metric label.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }
            /// Position in [`ALL`](Self::ALL).
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

drop_reasons! {
    // Parsing (peer or network at fault).
    /// Ethernet header cut short or ethertype unknown and no exception path.
    L2Malformed => "l2_malformed",
    /// IP header malformed: version, header length, total length, truncated extension header.
    IpMalformed => "ip_malformed",
    /// IPv4 header checksum wrong.
    IpChecksum => "ip_checksum",
    /// TTL or hop limit ran out.
    TtlExpired => "ttl_expired",
    /// IP version or protocol that the gateway does not forward, and no exception path.
    NotForUs => "not_for_us",
    // Inbound ESP.
    /// Shorter than ESP header, IV, trailer and ICV, or length not a multiple of the block.
    EspTooShort => "esp_too_short",
    /// No SA for SPI, destination, protocol (RFC 4301 audit event).
    SaNotFound => "sa_not_found",
    /// UDP encapsulation does not fit the SA: plain ESP for a NAT-T SA or the reverse.
    EncapMismatch => "encap_mismatch",
    /// Sequence number already seen (RFC 4303 section 3.4.3 audit event).
    ReplayDuplicate => "replay_duplicate",
    /// Sequence number left of the window.
    ReplayOld => "replay_old",
    /// Sequence number 0, or past the end of the space without ESN.
    SequenceInvalid => "sequence_invalid",
    /// ICV wrong (audit event).
    IcvMismatch => "icv_mismatch",
    /// Padding not 1, 2, 3, .. or longer than the payload.
    BadPadding => "bad_padding",
    /// Next header is not one that the mode can carry.
    BadNextHeader => "bad_next_header",
    /// Decrypted inner packet malformed.
    InnerMalformed => "inner_malformed",
    /// Inner headers do not match the SA's selectors (RFC 4301 section 5.2 audit event).
    SelectorMismatch => "selector_mismatch",
    /// Outer ECN / inner ECN combination that RFC 6040 says to drop.
    EcnInvalid => "ecn_invalid",
    // SA state.
    /// Hard packet limit reached.
    HardPackets => "hard_packets",
    /// Hard byte limit reached.
    HardBytes => "hard_bytes",
    /// Hard time limit reached.
    HardTime => "hard_time",
    /// Sequence space used up.
    SequenceExhausted => "sequence_exhausted",
    /// The durable lease of sequence numbers ran out and the next block is not on disk yet.
    LeaseExhausted => "lease_exhausted",
    /// Authentic, but above the window's edge that is on disk: accepted now, it could be replayed after a crash.
    /// The edge follows at once.
    WindowEdge => "window_edge",
    /// SA disabled or being removed.
    SaDisabled => "sa_disabled",
    /// Engine lost the packet or answered with an error.
    EngineError => "engine_error",
    /// What the SA's engine does not carry: a fragment in packet mode, a packet of the wrong form or length.
    EngineRefused => "engine_refused",
    /// Engine or crypto queue full.
    EngineBusy => "engine_busy",
    // Policy.
    /// SPD says discard, or no entry matched (default discard).
    PolicyDiscard => "policy_discard",
    /// Clear-text packet that inbound policy says must come protected.
    PolicyMustProtect => "policy_must_protect",
    /// Policy names a tunnel that has no outbound SA now.
    NoOutboundSa => "no_outbound_sa",
    /// Fragment met a policy with port selectors (RFC 4301 section 7).
    FragmentPolicy => "fragment_policy",
    // Forwarding.
    /// No route to the destination.
    NoRoute => "no_route",
    /// Next hop's link address unknown.
    NoNeighbour => "no_neighbour",
    /// Larger than the MTU and may not be fragmented; an ICMP error was sent if allowed.
    TooBig => "too_big",
    /// Head-room or tail-room of the frame does not suffice.
    NoRoom => "no_room",
    // Exception path.
    /// For the kernel, but its class has used up its rate.
    PuntLimit => "punt_limit",
    /// For the kernel, but too many wait already, or the TAP does not take them.
    PuntFull => "punt_full",
    /// ICMP error about an outer packet that no SA sent lately, or with an MTU that cannot be.
    IcmpImplausible => "icmp_implausible",
    // Fragments.
    /// Inbound fragment while reassembly is off.
    FragmentOff => "fragment_off",
    /// Fragment overlaps, is too long, or otherwise invalid (RFC 5722).
    FragmentInvalid => "fragment_invalid",
    /// Reassembly timed out.
    FragmentTimeout => "fragment_timeout",
    /// Reassembly memory full.
    FragmentMemory => "fragment_memory",
    // Resources.
    /// Transmit queue full.
    TxFull => "tx_full",
    /// Ring to the SA's owner full.
    HandoverFull => "handover_full",
    /// No free frame for a copy, fragment or ICMP message.
    PoolExhausted => "pool_exhausted",
    /// The gateway was stopping.
    Shutdown => "shutdown",
}

/// Packets that end inside the gateway for a good reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Consumed {
    /// RFC 3948 NAT keep-alive (one byte 0xff).
    NatKeepalive,
    /// RFC 4303 dummy packet (next header 59).
    Dummy,
    /// Fragment that was merged into a reassembled packet.
    Reassembled,
    /// ICMP error about an outer packet, taken note of.
    PathMtu,
}

impl Consumed {
    /// All, in the order of their numbers.
    pub const ALL: &'static [Consumed] = &[
        Self::NatKeepalive,
        Self::Dummy,
        Self::Reassembled,
        Self::PathMtu,
    ];
    /// Metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NatKeepalive => "nat_keepalive",
            Self::Dummy => "dummy",
            Self::Reassembled => "reassembled",
            Self::PathMtu => "path_mtu",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_numbers_dense() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
        for (i, r) in DropReason::ALL.iter().enumerate() {
            assert_eq!(r.index(), i);
        }
    }
}
