//! ICMP (RFC 792, 1191) and ICMPv6 (RFC 4443): the common eight bytes and what errors say.

use super::{WireError, be16, be32};

/// Length of the header of an error message, bytes.
pub const HEADER_LEN: usize = 8;

/// ICMPv4 message types.
pub mod v4 {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Code of [`UNREACHABLE`]: fragmentation needed and DF set.
    pub const FRAG_NEEDED: u8 = 4;
    /// Source quench.
    pub const SOURCE_QUENCH: u8 = 4;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;

    /// Whether the type is an error message, RFC 1122 section 3.2.2.
    pub const fn is_error(kind: u8) -> bool {
        matches!(
            kind,
            UNREACHABLE | SOURCE_QUENCH | REDIRECT | TIME_EXCEEDED | PARAMETER_PROBLEM
        )
    }
}

/// ICMPv6 message types.
pub mod v6 {
    /// Packet too big.
    pub const TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Echo request.
    pub const ECHO: u8 = 128;
    /// Router solicitation, the first of neighbour discovery.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Redirect, which RFC 4443 section 2.4 (e.2) treats like an error.
    pub const REDIRECT: u8 = 137;

    /// Whether no error message may answer this type.
    pub const fn is_error(kind: u8) -> bool {
        kind < 128 || kind == REDIRECT
    }
}

/// View of an ICMP or ICMPv6 message.
#[derive(Clone, Copy, Debug)]
pub struct Icmp<'a> {
    header: &'a [u8; HEADER_LEN],
    body: &'a [u8],
}

impl<'a> Icmp<'a> {
    /// Needs the common eight bytes.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (header, body) = bytes.split_first_chunk().ok_or(WireError::Truncated)?;
        Ok(Self { header, body })
    }

    /// Type.
    pub fn kind(&self) -> u8 {
        self.header[0]
    }

    /// Code.
    pub fn code(&self) -> u8 {
        self.header[1]
    }

    /// Checksum field.
    pub fn checksum(&self) -> u16 {
        be16(self.header, 2)
    }

    /// Next-hop MTU of an ICMPv4 "fragmentation needed" (RFC 1191; 0 from old routers).
    pub fn mtu_v4(&self) -> u16 {
        be16(self.header, 6)
    }

    /// MTU of an ICMPv6 "packet too big".
    pub fn mtu_v6(&self) -> u32 {
        be32(self.header, 4)
    }

    /// What follows the eight bytes; in an error the quoted packet.
    pub fn body(&self) -> &'a [u8] {
        self.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtu_fields_are_read_where_each_family_has_them() {
        let icmp = Icmp::new(&[3, 4, 0xab, 0xcd, 0, 0, 0x05, 0x78, 9]).unwrap();
        assert_eq!((icmp.kind(), icmp.code()), (3, 4));
        assert_eq!((icmp.checksum(), icmp.mtu_v4()), (0xabcd, 1400));
        assert_eq!(icmp.mtu_v6(), 1400);
        assert_eq!(icmp.body(), [9]);
        assert!(Icmp::new(&[0; 7]).is_err());
    }
}
