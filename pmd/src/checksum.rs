//! UDP checksums over IPv6 that are left to the port.
//!
//! IPv6 wants the checksum of every UDP packet, encapsulated ESP included (RFC 8200, section 8.1), which costs a pass over
//! the packet. A port whose device does that says so ([`PortQueue::completes_checksums`](crate::PortQueue)). Its frames may then be
//! marked by [`Frame::leave_checksum`], under these conditions, which are all that a driver has to know:
//!
//! ```text
//! 0             14             54        60         62
//! | Ethernet    | IPv6         | UDP     checksum   | …
//! ```
//!
//! - An untagged Ethernet frame with the UDP header directly behind IPv6's fixed header.
//! - The checksum field holds the one's-complement sum of the pseudo-header (addresses, length, protocol), as Linux and virtio
//!   have it; the device sums from the UDP header to the end of the frame and stores the complement.

use crate::frame::Frame;

/// Bytes of the Ethernet header.
pub const ETHERNET_LEN: u16 = 14;
/// Bytes of the IPv6 header.
pub const IPV6_LEN: u16 = 40;
/// Where the sum starts: at the UDP header.
pub const UDP_AT: u16 = ETHERNET_LEN + IPV6_LEN;
/// Distance of the checksum from the UDP header.
pub const FIELD: u16 = 6;
/// Where the checksum lies.
pub const FIELD_AT: u16 = UDP_AT + FIELD;

/// Completes a checksum that was left, where the device cannot: once, however often it is called.
#[cold]
pub fn complete(frame: &mut Frame) {
    if !frame.checksum_left() {
        return;
    }
    frame.checksum_done();
    let Some(udp) = frame.data_mut().get_mut(usize::from(UDP_AT)..) else {
        return;
    };
    // The field is part of what is summed: it is the sum of the pseudo-header.
    let sum = match !sum(udp) {
        0 => u16::MAX,
        sum => sum,
    };
    if let Some(field) = udp.get_mut(usize::from(FIELD)..usize::from(FIELD) + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// One's-complement sum of 16-bit words, RFC 1071.
fn sum(data: &[u8]) -> u16 {
    let (words, rest) = data.as_chunks::<2>();
    let odd = rest.first().map_or(0, |b| u64::from(*b) << 8);
    let mut sum = words
        .iter()
        .fold(odd, |s, w| s + u64::from(u16::from_be_bytes(*w)));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// Frames for tests of drivers.
#[cfg(test)]
pub(crate) mod test {
    use super::*;

    /// An Ethernet frame with `payload` in UDP over IPv6 whose checksum field has the sum of the pseudo-header alone.
    pub(crate) fn partial(payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(8 + payload.len()).unwrap();
        let addresses: Vec<u8> = (1..33).map(|n| n * 7).collect();
        let mut f = vec![
            2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0,
        ];
        f.extend(len.to_be_bytes());
        f.extend([17, 64]);
        f.extend(&addresses);
        f.extend([0x11, 0x94, 0x11, 0x94]);
        f.extend(len.to_be_bytes());
        f.extend(
            sum(&[&addresses[..], &[0, 0], &len.to_be_bytes(), &[0, 0, 0, 17]].concat())
                .to_be_bytes(),
        );
        f.extend(payload);
        f
    }

    /// Whether a receiver takes the checksum: a sum over pseudo-header and packet, a word at a time (RFC 8200, section 8.1).
    pub(crate) fn accepted(frame: &[u8]) -> bool {
        let mut words = frame[22..].to_vec();
        words.extend(&frame[18..20]);
        words.extend([0, 17]);
        if words.len() % 2 == 1 {
            // The length and the protocol stand behind an odd payload.
            words.insert(words.len() - 4, 0);
        }
        let total = words.chunks(2).fold(0u32, |s, w| {
            let s = s + (u32::from(w[0]) << 8 | u32::from(w[1]));
            (s & 0xffff) + (s >> 16)
        });
        frame[60..62] != [0, 0] && total == 0xffff
    }
}

#[cfg(test)]
mod tests {
    use super::test::{accepted, partial};
    use super::*;
    use crate::arena::{Arena, ArenaConfig};
    use crate::pool::Pool;

    #[test]
    fn what_is_completed_is_accepted_for_every_length_and_done_once() {
        let arena = Arena::new(ArenaConfig {
            frames: 16,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 4);
        for len in 0..300usize {
            let payload: Vec<u8> = (0..len).map(|i| (i * 31 + len).to_le_bytes()[0]).collect();
            let bytes = partial(&payload);
            assert!(!accepted(&bytes));
            let mut frame = pool.get().unwrap();
            assert!(frame.set_data(&bytes));
            complete(&mut frame);
            assert_eq!(frame.data(), bytes, "not marked");
            frame.leave_checksum();
            complete(&mut frame);
            assert!(accepted(frame.data()), "{len}");
            let done = frame.data().to_vec();
            complete(&mut frame);
            assert_eq!(frame.data(), done);
            pool.put(frame);
        }
    }

    /// RFC 768: a sum of zero is sent as all ones.
    #[test]
    fn a_sum_of_zero_is_sent_as_ones() {
        let arena = Arena::new(ArenaConfig {
            frames: 16,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 4);
        let mut bytes = partial(&[0, 0]);
        let rest = !sum(&bytes[54..]);
        bytes[62..].copy_from_slice(&rest.to_be_bytes());
        let mut frame = pool.get().unwrap();
        assert!(frame.set_data(&bytes));
        frame.leave_checksum();
        complete(&mut frame);
        assert_eq!(frame.data()[60..62], [0xff, 0xff]);
        pool.put(frame);
        let mut short = pool.get().unwrap();
        assert!(short.set_data(&[0; 40]));
        short.leave_checksum();
        complete(&mut short);
        assert_eq!(short.data(), [0; 40]);
        pool.put(short);
    }
}
