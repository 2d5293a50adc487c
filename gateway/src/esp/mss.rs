//! TCP MSS clamping, so that segments fit the tunnel even where ICMP is filtered.

use crate::wire::tcp::{CHECKSUM_AT, HEADER_LEN, SYN, Tcp};
use crate::wire::{Family, Frag, Parsed, checksum, proto};

/// The MSS that lets a segment without options fit inner packets of `inner_mtu` bytes (RFC 6691).
pub const fn mss_for(inner_mtu: u16, family: Family) -> u16 {
    let headers = match family {
        Family::V4 => 40,
        Family::V6 => 60,
    };
    inner_mtu.saturating_sub(headers)
}

/// Lowers the MSS option of a SYN or SYN-ACK to `max`, with incremental checksum. True when it changed
/// something. `packet` starts at the IP header that `p` describes. A segment without the option is left
/// alone: its default (536 or 1220 bytes) is what every path carries.
#[inline]
pub fn clamp(packet: &mut [u8], p: &Parsed, max: u16) -> bool {
    p.proto == proto::TCP && p.frag != Frag::Later && clamp_tcp(packet, p, max)
}

fn clamp_tcp(packet: &mut [u8], p: &Parsed, max: u16) -> bool {
    let Some(tcp) = packet.get_mut(usize::from(p.upper_off)..) else {
        return false;
    };
    if tcp.len() < HEADER_LEN || tcp.get(13).is_none_or(|flags| flags & SYN == 0) {
        return false;
    }
    let Some((at, mss)) = Tcp::new(tcp).ok().and_then(|t| t.mss()) else {
        return false;
    };
    if mss <= max {
        return false;
    }
    // The checksum sums even-aligned words: at an odd offset the value's bytes trade places.
    let (old, new) = if at % 2 == 0 {
        (mss, max)
    } else {
        (mss.swap_bytes(), max.swap_bytes())
    };
    let Some(Ok(field)) = tcp
        .get(CHECKSUM_AT..CHECKSUM_AT + 2)
        .map(<[u8; 2]>::try_from)
    else {
        return false;
    };
    let c = checksum::update16(u16::from_be_bytes(field), old, new);
    let Some(value) = tcp.get_mut(at..at + 2) else {
        return false;
    };
    value.copy_from_slice(&max.to_be_bytes());
    if let Some(field) = tcp.get_mut(CHECKSUM_AT..CHECKSUM_AT + 2) {
        field.copy_from_slice(&c.to_be_bytes());
    }
    true
}

/// Feeds arbitrary bytes to the clamp, for the fuzzer.
#[doc(hidden)]
pub fn fuzz_mss(data: &[u8]) {
    let Some(([hi, lo], packet)) = data.split_first_chunk::<2>() else {
        return;
    };
    let packet = &*crate::wire::fuzz::with_checksum(packet);
    if let Ok(p) = crate::wire::parse_ip(packet, crate::wire::NattPorts::default()) {
        let mut changed = packet.to_vec();
        let max = u16::from_be_bytes([*hi, *lo]);
        if clamp(&mut changed, &p, max) {
            assert!(
                !clamp(&mut changed, &p, max),
                "once clamped, nothing is left to do"
            );
        } else {
            assert_eq!(changed, packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ip, parsed, transport_checksum};
    use super::*;

    fn syn(family: Family, flags: u8, options: &[u8]) -> Vec<u8> {
        let mut tcp = vec![0u8; HEADER_LEN];
        tcp[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
        tcp.extend_from_slice(options);
        tcp[12] = (tcp.len() / 4).to_le_bytes()[0] << 4;
        tcp[13] = flags;
        let mut packet = Ip::new(family).packet(proto::TCP, &tcp);
        let at = packet.len() - tcp.len();
        let c = transport_checksum(&packet, at, proto::TCP);
        packet[at + 16..at + 18].copy_from_slice(&c.to_be_bytes());
        packet
    }

    fn checksum_right(packet: &[u8]) -> bool {
        let at = usize::from(parsed(packet).upper_off);
        transport_checksum(packet, at, proto::TCP) == 0
    }

    #[test]
    fn a_large_mss_is_lowered_at_even_and_odd_offsets_in_both_families() {
        for family in [Family::V4, Family::V6] {
            for options in [[2, 4, 5, 0xb4, 1, 1, 1, 0], [1, 2, 4, 5, 0xb4, 1, 1, 0]] {
                for flags in [SYN, SYN | 0x10] {
                    let mut b = syn(family, flags, &options);
                    let p = parsed(&b);
                    assert!(checksum_right(&b));
                    assert!(clamp(&mut b, &p, 1360));
                    assert!(checksum_right(&b));
                    let tcp = Tcp::new(&b[usize::from(p.upper_off)..]).unwrap();
                    assert_eq!(tcp.mss().unwrap().1, 1360);
                }
            }
        }
    }

    #[test]
    fn small_values_other_segments_and_missing_options_are_left_alone() {
        for mut b in [
            syn(Family::V4, SYN, &[2, 4, 5, 0x50]),
            syn(Family::V4, 0x10, &[2, 4, 5, 0xb4]),
            syn(Family::V4, SYN, &[1, 1, 1, 0]),
            Ip::new(Family::V4).udp(40),
        ] {
            let before = b.clone();
            let p = parsed(&b);
            assert!(!clamp(&mut b, &p, 0x550));
            assert_eq!(b, before);
        }
    }

    #[test]
    fn the_mss_leaves_room_for_the_fixed_headers() {
        assert_eq!(mss_for(1446, Family::V4), 1406);
        assert_eq!(mss_for(1446, Family::V6), 1386);
        assert_eq!(mss_for(20, Family::V6), 0);
    }
}
