//! What a worker tells control beside its counters: small values for a bounded ring. What finds no room is counted,
//! never waited for.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::drops::DropReason;
use crate::runtime::TunnelIdx;
use crate::sa::SaId;

/// A message to control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// An auditable event.
    Audit(AuditEvent),
    /// A number of this inbound SA passed the edge on disk: the keeper of leases is to look at it now.
    Edge(SaId),
    /// Packets wait for this neighbour's link address. Repeated while they do, at most a few times a second.
    Unresolved {
        /// Port on whose link it is.
        port: u16,
        /// Its address, IPv4 as such.
        addr: IpAddr,
    },
    /// An ICMP error says that an outer packet of ours was too big.
    TooBig(crate::pmtu::TooBig),
    /// A packet wanted to go through a tunnel that has no SA.
    Acquire(Flow),
    /// Authentic ESP in UDP comes from another address or port than its SA says. Repeated while it does, once a second.
    Moved {
        /// The inbound SA.
        sa: SaId,
        /// Source of the packet, IPv4 as IPv4-mapped.
        src: u128,
        /// Its UDP port.
        port: u16,
    },
}

/// A packet's way, as an acquire tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Tunnel that it was to take.
    pub tunnel: TunnelIdx,
    /// Source, IPv4 as IPv4-mapped.
    pub src: u128,
    /// Destination, likewise.
    pub dst: u128,
    /// Protocol.
    pub proto: u8,
    /// Source port or ICMP type.
    pub sport: u16,
    /// Destination port or ICMP code.
    pub dport: u16,
}

impl Flow {
    /// Source address.
    pub fn source(&self) -> IpAddr {
        Ipv6Addr::from(self.src).to_canonical()
    }

    /// Destination address.
    pub fn destination(&self) -> IpAddr {
        Ipv6Addr::from(self.dst).to_canonical()
    }
}

/// An event that RFC 4301 and RFC 4303 want in the audit log, with the fields that they list. Date and time are
/// added where it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    /// What happened.
    pub reason: DropReason,
    /// SPI, when the packet has one.
    pub spi: Option<u32>,
    /// Low half of the sequence number.
    pub seq: Option<u32>,
    /// Source, IPv4 as IPv4-mapped.
    pub src: u128,
    /// Destination, likewise.
    pub dst: u128,
    /// Flow label of an IPv6 packet.
    pub flow_label: Option<u32>,
    /// Protocol, and ports (or ICMP type and code) where they are visible; those of the inner packet once decrypted.
    pub proto: u8,
    /// Source port or ICMP type.
    pub sport: u16,
    /// Destination port or ICMP code.
    pub dport: u16,
    /// Events of this worker that were not reported since the last one that was.
    pub unreported: u64,
}

impl AuditEvent {
    /// Whether an end of this kind is auditable: RFC 4301 sections 5.2 and 7, RFC 4303 sections 3.3.3 and 3.4.
    pub const fn is_auditable(reason: DropReason) -> bool {
        matches!(
            reason,
            DropReason::SaNotFound
                | DropReason::EncapMismatch
                | DropReason::ReplayDuplicate
                | DropReason::ReplayOld
                | DropReason::SequenceInvalid
                | DropReason::SequenceExhausted
                | DropReason::IcvMismatch
                | DropReason::SelectorMismatch
                | DropReason::PolicyMustProtect
                | DropReason::FragmentOff
                | DropReason::FragmentPolicy
                | DropReason::BadPadding
                | DropReason::BadNextHeader
        )
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        Ipv6Addr::from(self.src).to_canonical()
    }

    /// Destination address.
    pub fn destination(&self) -> IpAddr {
        Ipv6Addr::from(self.dst).to_canonical()
    }
}

/// The fields for a log line: those that the packet does not have are left out.
impl fmt::Display for AuditEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reason={}", self.reason.name())?;
        if let Some(spi) = self.spi {
            write!(f, " spi=0x{spi:08x}")?;
        }
        if let Some(seq) = self.seq {
            write!(f, " seq={seq}")?;
        }
        write!(f, " src={} dst={}", self.source(), self.destination())?;
        if let Some(label) = self.flow_label {
            write!(f, " flow_label=0x{label:05x}")?;
        }
        write!(f, " proto={}", self.proto)?;
        if (self.sport, self.dport) != (0, 0) {
            write!(f, " sport={} dport={}", self.sport, self.dport)?;
        }
        if self.unreported != 0 {
            write!(f, " unreported={}", self.unreported)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_fields_that_the_rfcs_list_and_no_others() {
        let event = AuditEvent {
            reason: DropReason::IcvMismatch,
            spi: Some(0x1001),
            seq: Some(7),
            src: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
            dst: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2).into(),
            flow_label: Some(0xabc),
            proto: 50,
            sport: 0,
            dport: 0,
            unreported: 0,
        };
        assert_eq!(
            event.to_string(),
            "reason=icv_mismatch spi=0x00001001 seq=7 src=2001:db8::1 dst=2001:db8::2 flow_label=0x00abc proto=50"
        );
        let clear = AuditEvent {
            reason: DropReason::PolicyMustProtect,
            spi: None,
            seq: None,
            src: 0xffff_0a01_0001,
            dst: 0xffff_0a02_0001,
            flow_label: None,
            proto: 17,
            sport: 9,
            dport: 10,
            unreported: 3,
        };
        assert_eq!(
            clear.to_string(),
            "reason=policy_must_protect src=10.1.0.1 dst=10.2.0.1 proto=17 sport=9 dport=10 unreported=3"
        );
    }
}
