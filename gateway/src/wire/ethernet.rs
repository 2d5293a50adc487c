//! Ethernet II with at most one 802.1Q tag.

use super::{WireError, be16};

/// IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// ARP.
pub const TYPE_ARP: u16 = 0x0806;
/// 802.1Q tag.
pub const TYPE_VLAN: u16 = 0x8100;
/// IPv6.
pub const TYPE_IPV6: u16 = 0x86dd;
/// Header length without tag, bytes.
pub const HEADER_LEN: usize = 14;
/// Length of one 802.1Q tag, bytes.
pub const VLAN_LEN: usize = 4;

/// Link-layer address.
pub type Mac = [u8; 6];

/// View of an Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub struct Ethernet<'a> {
    header: &'a [u8; HEADER_LEN],
    vlan: u16,
    ethertype: u16,
    payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// Splits the header, and one 802.1Q tag if there is one, from `frame`.
    pub fn new(frame: &'a [u8]) -> Result<Self, WireError> {
        let (header, payload) = frame
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(WireError::Truncated)?;
        let ethertype = be16(header, 12);
        if ethertype != TYPE_VLAN {
            return Ok(Self {
                header,
                vlan: 0,
                ethertype,
                payload,
            });
        }
        let (tag, payload) = payload
            .split_first_chunk::<VLAN_LEN>()
            .ok_or(WireError::Truncated)?;
        Ok(Self {
            header,
            vlan: be16(tag, 0) & 0x0fff,
            ethertype: be16(tag, 2),
            payload,
        })
    }

    /// Destination address.
    pub fn dst(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = *self.header;
        [a, b, c, d, e, f]
    }

    /// Source address.
    pub fn src(&self) -> Mac {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = *self.header;
        [a, b, c, d, e, f]
    }

    /// 802.1Q VLAN id; 0 is untagged or priority-tagged.
    pub fn vlan(&self) -> u16 {
        self.vlan
    }

    /// Ethertype behind the tag.
    pub fn ethertype(&self) -> u16 {
        self.ethertype
    }

    /// Everything behind the header, including padding.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

/// What an Ethernet header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetRepr {
    /// Destination address.
    pub dst: Mac,
    /// Source address.
    pub src: Mac,
    /// VLAN id, 1 to 4094; 0 sends untagged.
    pub vlan: u16,
    /// Ethertype of the payload.
    pub ethertype: u16,
}

impl EthernetRepr {
    /// Bytes that [`emit`](Self::emit) writes: 14 or 18.
    pub const fn header_len(&self) -> usize {
        if self.vlan == 0 {
            HEADER_LEN
        } else {
            HEADER_LEN + VLAN_LEN
        }
    }

    /// Writes the header to the start of `out`; false, with nothing written, when it does not fit.
    pub fn emit(&self, out: &mut [u8]) -> bool {
        if self.vlan == 0 {
            let Some(h) = out.first_chunk_mut::<HEADER_LEN>() else {
                return false;
            };
            h[..6].copy_from_slice(&self.dst);
            h[6..12].copy_from_slice(&self.src);
            h[12..].copy_from_slice(&self.ethertype.to_be_bytes());
        } else {
            let Some(h) = out.first_chunk_mut::<{ HEADER_LEN + VLAN_LEN }>() else {
                return false;
            };
            h[..6].copy_from_slice(&self.dst);
            h[6..12].copy_from_slice(&self.src);
            h[12..14].copy_from_slice(&TYPE_VLAN.to_be_bytes());
            h[14..16].copy_from_slice(&(self.vlan & 0x0fff).to_be_bytes());
            h[16..].copy_from_slice(&self.ethertype.to_be_bytes());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tagged_and_untagged_headers_read_back_as_written() {
        for vlan in [0, 1, 4094] {
            let repr = EthernetRepr {
                dst: [1, 2, 3, 4, 5, 6],
                src: [7, 8, 9, 10, 11, 12],
                vlan,
                ethertype: TYPE_IPV6,
            };
            let mut buf = [0xaa; 20];
            assert!(repr.emit(&mut buf));
            let eth = Ethernet::new(&buf).unwrap();
            assert_eq!((eth.dst(), eth.src()), (repr.dst, repr.src));
            assert_eq!((eth.vlan(), eth.ethertype()), (vlan, TYPE_IPV6));
            assert_eq!(eth.payload().len(), 20 - repr.header_len());
        }
    }

    #[test]
    fn a_frame_that_ends_inside_the_tag_is_refused() {
        let mut buf = [0u8; 17];
        buf[12..14].copy_from_slice(&TYPE_VLAN.to_be_bytes());
        assert!(matches!(Ethernet::new(&buf), Err(WireError::Truncated)));
        assert!(matches!(
            Ethernet::new(&buf[..13]),
            Err(WireError::Truncated)
        ));
    }
}
