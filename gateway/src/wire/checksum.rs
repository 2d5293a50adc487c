//! Internet checksum: RFC 1071 sums, RFC 1624 incremental update.
//!
//! Sums are one's-complement 16-bit values in host order, as if the data were read as big-endian words; a
//! checksum field is the complement of such a sum.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Folds a wide sum of 16-bit words to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let s = (sum & 0xffff_ffff) + (sum >> 32);
    let s = (s & 0xffff) + (s >> 16);
    let s = (s & 0xffff) + (s >> 16);
    let s = (s & 0xffff) + (s >> 16);
    (s & 0xffff) as u16
}

/// One's-complement sum of `data`; an odd last byte counts as the high half of a word.
pub fn sum(data: &[u8]) -> u16 {
    // RFC 1071 section 2 (B): the sum may be taken in any byte order and swapped once at the end.
    let mut acc = 0u64;
    let mut words = data.chunks_exact(4);
    for w in &mut words {
        if let Ok(w) = <[u8; 4]>::try_from(w) {
            acc += u64::from(u32::from_ne_bytes(w));
        }
    }
    let mut last = [0u8; 4];
    for (d, s) in last.iter_mut().zip(words.remainder()) {
        *d = *s;
    }
    acc += u64::from(u32::from_ne_bytes(last));
    u16::from_be(fold(acc))
}

/// Sum of a 20-byte header, without a loop: 0xffff when its checksum field is right.
#[inline(always)]
pub fn sum20(h: &[u8; 20]) -> u16 {
    let w = |i: usize| u64::from(u32::from_ne_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]));
    u16::from_be(fold(w(0) + w(4) + w(8) + w(12) + w(16)))
}

/// One's-complement addition.
#[inline(always)]
pub const fn add(a: u16, b: u16) -> u16 {
    let (s, carry) = a.overflowing_add(b);
    s + carry as u16
}

/// The checksum field over `data` (with the field itself zero or absent) and a pseudo-header sum.
pub fn checksum(pseudo: u16, data: &[u8]) -> u16 {
    !add(pseudo, sum(data))
}

/// RFC 1624 equation 3: the checksum field after a 16-bit word changed from `old` to `new`.
#[inline(always)]
pub const fn update16(field: u16, old: u16, new: u16) -> u16 {
    !add(add(!field, !old), new)
}

/// RFC 1624 for a change described by the one's-complement sums of the old and new bytes.
#[inline(always)]
pub const fn update_sums(field: u16, old: u16, new: u16) -> u16 {
    update16(field, old, new)
}

/// Pseudo-header sum of RFC 793 and RFC 768.
pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, len: u16) -> u16 {
    let s = add(sum(&src.octets()), sum(&dst.octets()));
    add(add(s, u16::from(proto)), len)
}

/// Pseudo-header sum of RFC 8200 section 8.1.
pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, proto: u8, len: u32) -> u16 {
    let s = add(sum(&src.octets()), sum(&dst.octets()));
    add(add(s, u16::from(proto)), fold(u64::from(len)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slow_sum(data: &[u8]) -> u16 {
        let mut s = 0u32;
        for c in data.chunks(2) {
            s += u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0));
            s = (s & 0xffff) + (s >> 16);
        }
        u16::try_from(s).unwrap()
    }

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
    }

    #[test]
    fn the_example_of_rfc_1624_section_4_gives_zero_not_minus_zero() {
        // HC = 0xdd2f, m = 0x5555, m' = 0x3285.
        assert_eq!(update16(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    proptest! {
        #[test]
        fn sum_equals_the_word_at_a_time_sum(data in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(sum(&data), slow_sum(&data));
        }

        #[test]
        fn incremental_update_equals_recomputation(mut data in proptest::collection::vec(any::<u8>(), 20),
                                                   at in 0usize..9, new in any::<u16>()) {
            // A sum over all zeros is the one value with two representations; headers never have it.
            data[0] |= 0x45;
            let before = checksum(0, &data);
            let old = u16::from_be_bytes([data[2 * at], data[2 * at + 1]]);
            if at > 0 {
                data[2 * at..2 * at + 2].copy_from_slice(&new.to_be_bytes());
                prop_assert_eq!(update16(before, old, new), checksum(0, &data));
            }
        }
    }
}
