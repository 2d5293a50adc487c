//! ARP for IPv4 over Ethernet, RFC 826.

use std::net::Ipv4Addr;

use super::ethernet::Mac;
use super::{WireError, be16};

/// Length of an ARP packet for IPv4 over Ethernet, bytes.
pub const LEN: usize = 28;

/// Operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArpOp {
    /// Who has `target_ip`?
    Request,
    /// `sender_ip` is at `sender_mac`.
    Reply,
}

/// An ARP request or reply for IPv4 over Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArpRepr {
    /// Operation.
    pub op: ArpOp,
    /// Sender's link address.
    pub sender_mac: Mac,
    /// Sender's IPv4 address.
    pub sender_ip: Ipv4Addr,
    /// Target's link address; zero in a request.
    pub target_mac: Mac,
    /// Target's IPv4 address.
    pub target_ip: Ipv4Addr,
}

impl ArpRepr {
    /// Reads an ARP packet; `None` for other hardware, protocols, operations, or when cut short.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, WireError> {
        let b = payload.first_chunk::<LEN>().ok_or(WireError::Truncated)?;
        if b[..6] != [0, 1, 8, 0, 6, 4] {
            return Ok(None);
        }
        let op = match be16(b, 6) {
            1 => ArpOp::Request,
            2 => ArpOp::Reply,
            _ => return Ok(None),
        };
        Ok(Some(Self {
            op,
            sender_mac: [b[8], b[9], b[10], b[11], b[12], b[13]],
            sender_ip: Ipv4Addr::new(b[14], b[15], b[16], b[17]),
            target_mac: [b[18], b[19], b[20], b[21], b[22], b[23]],
            target_ip: Ipv4Addr::new(b[24], b[25], b[26], b[27]),
        }))
    }

    /// Writes the packet.
    pub fn emit(&self, out: &mut [u8; LEN]) {
        out[..6].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
        let op: u16 = match self.op {
            ArpOp::Request => 1,
            ArpOp::Reply => 2,
        };
        out[6..8].copy_from_slice(&op.to_be_bytes());
        out[8..14].copy_from_slice(&self.sender_mac);
        out[14..18].copy_from_slice(&self.sender_ip.octets());
        out[18..24].copy_from_slice(&self.target_mac);
        out[24..28].copy_from_slice(&self.target_ip.octets());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_read_back_as_written() {
        for op in [ArpOp::Request, ArpOp::Reply] {
            let repr = ArpRepr {
                op,
                sender_mac: [1, 2, 3, 4, 5, 6],
                sender_ip: Ipv4Addr::new(192, 0, 2, 1),
                target_mac: [6, 5, 4, 3, 2, 1],
                target_ip: Ipv4Addr::new(192, 0, 2, 2),
            };
            let mut b = [0; LEN];
            repr.emit(&mut b);
            assert_eq!(ArpRepr::parse(&b), Ok(Some(repr)));
            b[7] = 3;
            assert_eq!(ArpRepr::parse(&b), Ok(None));
            assert_eq!(ArpRepr::parse(&b[..27]), Err(WireError::Truncated));
        }
    }
}
