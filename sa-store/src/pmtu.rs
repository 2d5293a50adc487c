//! Path MTUs from ICMP errors about our outer packets, RFC 4301 section 8.
//!
//! Anybody can send such an error, so it is believed only as far as it proves that its sender saw a packet of ours: it must
//! quote addresses, SPI and sequence number of one that an SA sent lately. It can only lower the MTU, not below what
//! every link must carry, and is forgotten after ten minutes.

use crate::runtime::{SaEntry, mapped};
use crate::sa::{Direction, Vrf};
use crate::snapshot::Snapshot;

/// Packets back from the newest that a quoted one may be: a second at a million packets a second.
const RECENT: u64 = 1 << 20;
/// Least MTU believed of IPv4 and IPv6 paths, bytes.
const LEAST: [u16; 2] = [576, 1280];

/// "Fragmentation needed" or "packet too big", with what it quotes of an ESP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// VRF in which it came.
    pub vrf: Vrf,
    /// Source of the quoted packet, IPv4 as IPv4-mapped.
    pub src: u128,
    /// Destination of the quoted packet, likewise.
    pub dst: u128,
    /// Quoted SPI.
    pub spi: u32,
    /// Low half of the quoted sequence number.
    pub seq: u32,
    /// Ports of the quoted packet, when its ESP is in UDP.
    pub udp: Option<(u16, u16)>,
    /// What the sender of the error can pass on, bytes; 0 from routers older than RFC 1191.
    pub mtu: u16,
}

impl TooBig {
    /// Lowers the path MTU of the SA that sent the quoted packet. False when there is none, or its numbers or the MTU
    /// cannot be.
    pub fn learn(&self, snapshot: &Snapshot, now: u64) -> bool {
        let v6 = self.dst >> 32 != 0xffff;
        let least = LEAST[usize::from(v6)];
        // RFC 8201 section 4: no IPv6 link carries less, so the message is wrong.
        if v6 && self.mtu < least {
            return false;
        }
        let mut sas = snapshot.sas.iter().flatten();
        match sas.find(|e| self.is_of(e)) {
            Some(entry) if entry.sent_lately(self.seq, RECENT) => {
                entry.lower_path_mtu(self.mtu.max(least), now);
                true
            }
            _ => false,
        }
    }

    fn is_of(&self, entry: &SaEntry) -> bool {
        let fixed = &entry.fixed;
        fixed.spi == self.spi
            && fixed.direction == Direction::Out
            && fixed.dst == self.dst
            && fixed.vrf == self.vrf
            && mapped(entry.spec.src) == self.src
            && fixed.encap.map(|e| (e.sport, e.dport)) == self.udp
    }
}
