//! Splits a range of addresses or ports into few aligned blocks of one size.
//!
//! Tables are hashed by block. The blocks need only cover the range: whoever finds a selector through
//! one compares the exact range afterwards. Sizes come in steps so that there are few tables to probe;
//! a prefix between two steps becomes up to four blocks of the next longer length, or one of the next
//! shorter.

/// Most blocks for one range.
const MAX_BLOCKS: u128 = 4;

/// Blocks `first..=last`, each of `len` leading bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cover {
    pub(super) len: u8,
    pub(super) first: u128,
    pub(super) last: u128,
}

/// Longest multiple of `step` for which at most four blocks cover the range. `block(len)` gives the
/// numbers of the blocks that hold the range's first and last value.
pub(super) fn cover(bits: u8, step: u8, block: impl Fn(u8) -> (u128, u128)) -> Cover {
    let mut len = bits;
    loop {
        let (first, last) = block(len);
        if len == 0 || last - first < MAX_BLOCKS {
            return Cover { len, first, last };
        }
        len = len.saturating_sub(step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spd::cell::Addr;

    fn v4(first: u32, last: u32) -> Cover {
        cover(32, 4, |len| (first.block(len), last.block(len)))
    }

    #[test]
    fn prefixes_on_a_step_are_one_block_and_others_at_most_four() {
        assert_eq!(
            v4(0x0a00_0000, 0x0aff_ffff),
            Cover {
                len: 8,
                first: 0x0a,
                last: 0x0a
            }
        );
        assert_eq!(
            v4(0, u32::MAX),
            Cover {
                len: 0,
                first: 0,
                last: 0
            }
        );
        assert_eq!(
            v4(7, 7),
            Cover {
                len: 32,
                first: 7,
                last: 7
            }
        );
        assert_eq!(
            v4(0x0a00_0400, 0x0a00_07ff),
            Cover {
                len: 24,
                first: 0x0a_0004,
                last: 0x0a_0007
            }
        );
        assert_eq!(
            v4(0x0a00_0800, 0x0a00_0fff),
            Cover {
                len: 20,
                first: 0x0_a000,
                last: 0x0_a000
            }
        );
    }

    #[test]
    fn a_range_across_the_middle_is_covered() {
        assert_eq!(
            v4(0x7fff_ffff, 0x8000_0000),
            Cover {
                len: 32,
                first: 0x7fff_ffff,
                last: 0x8000_0000
            }
        );
        let c = v4(1, u32::MAX - 1);
        assert_eq!(
            c,
            Cover {
                len: 0,
                first: 0,
                last: 0
            }
        );
    }
}
