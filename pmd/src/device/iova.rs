//! Addresses as a device sees them: which ranges it can use, and which are taken.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::{DeviceError, IovaClass};

const BELOW_4G: u64 = u32::MAX as u64;

/// The allocator of one device's address space.
///
/// [`IovaClass::Any`] is served from above 4 GiB while there is room, to keep the low addresses for those who need them.
/// Address 0 is never given out: many devices take it for "none".
#[derive(Debug, Clone)]
pub struct IovaSpace {
    /// Usable ranges, sorted, disjoint.
    windows: Vec<RangeInclusive<u64>>,
    /// Start → last address of what is taken.
    taken: BTreeMap<u64, u64>,
}

impl IovaSpace {
    /// A space of the given usable ranges, in any order; empty ones and address 0 are left out.
    pub fn new(windows: impl IntoIterator<Item = RangeInclusive<u64>>) -> IovaSpace {
        let mut sorted: Vec<_> = windows
            .into_iter()
            .map(|w| (*w.start()).max(1)..=*w.end())
            .filter(|w| w.start() <= w.end())
            .collect();
        sorted.sort_by_key(|w| *w.start());
        let mut windows: Vec<RangeInclusive<u64>> = Vec::with_capacity(sorted.len());
        for w in sorted {
            match windows.last_mut() {
                Some(last) if *w.start() <= *last.end() => {
                    *last = *last.start()..=(*last.end()).max(*w.end());
                }
                _ => windows.push(w),
            }
        }
        IovaSpace {
            windows,
            taken: BTreeMap::new(),
        }
    }

    /// What every x86 and Arm IOMMU can do, for systems that do not say: 39 bits without the interrupt window of x86.
    pub fn conservative() -> IovaSpace {
        IovaSpace::new([0x1_0000..=0xfedf_ffff, 0x1_0000_0000..=(1 << 39) - 1])
    }

    /// The usable ranges.
    pub fn windows(&self) -> &[RangeInclusive<u64>] {
        &self.windows
    }

    /// Takes `len` bytes at a multiple of `align` (a power of two).
    ///
    /// # Errors
    /// [`DeviceError::NoIova`] when no free range of the class is long enough.
    pub fn allocate(&mut self, len: u64, align: u64, class: IovaClass) -> Result<u64, DeviceError> {
        let none = DeviceError::NoIova { len, class };
        if len == 0 || !align.is_power_of_two() {
            return Err(none);
        }
        let high = BELOW_4G + 1..=u64::MAX;
        let low = 0..=BELOW_4G;
        let found = match class {
            IovaClass::Below4G => self.find(len, align, &low),
            IovaClass::Any => self
                .find(len, align, &high)
                .or_else(|| self.find(len, align, &low)),
        };
        let start = found.ok_or(none)?;
        self.taken.insert(start, start + (len - 1));
        Ok(start)
    }

    /// Gives back what [`IovaSpace::allocate`] returned; false when it did not.
    pub fn release(&mut self, start: u64) -> bool {
        self.taken.remove(&start).is_some()
    }

    /// Whether all of `len` bytes at `start` can be used by the device, taken or not.
    pub fn usable(&self, start: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1).and_then(|n| start.checked_add(n)) else {
            return false;
        };
        self.windows
            .iter()
            .any(|w| w.contains(&start) && w.contains(&last))
    }

    /// First fit inside `within`.
    fn find(&self, len: u64, align: u64, within: &RangeInclusive<u64>) -> Option<u64> {
        for w in &self.windows {
            let end = (*w.end()).min(*within.end());
            let mut at = (*w.start()).max(*within.start());
            loop {
                at = at.checked_next_multiple_of(align)?;
                let Some(last) = at.checked_add(len - 1).filter(|&last| last <= end) else {
                    break;
                };
                // The one that ends last among those that begin before our end.
                match self.taken.range(..=last).next_back() {
                    Some((_, &taken_last)) if taken_last >= at => {
                        let Some(next) = taken_last.checked_add(1) else {
                            break;
                        };
                        at = next;
                    }
                    _ => return Some(at),
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What QEMU's intel-iommu and most PCs report.
    fn pc() -> IovaSpace {
        IovaSpace::new([0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1])
    }

    #[test]
    fn the_interrupt_window_and_address_0_are_never_given() {
        let mut s = pc();
        assert_eq!(s.allocate(4096, 4096, IovaClass::Below4G).unwrap(), 4096);
        assert_eq!(
            s.allocate(0xfedf_0000 - 8192, 4096, IovaClass::Below4G)
                .unwrap(),
            8192
        );
        let next = s.allocate(1 << 20, 4096, IovaClass::Below4G).unwrap();
        assert_eq!(next, 0xfef0_0000);
        assert!(!s.usable(0xfee0_0000, 4) && !s.usable(0xfedf_ffff, 2));
        assert!(s.usable(0xfedf_ffff, 1) && !s.usable(1 << 48, 1) && !s.usable(5, 0));
        assert!(matches!(
            s.allocate(17 << 20, 4096, IovaClass::Below4G),
            Err(DeviceError::NoIova { .. })
        ));
    }

    #[test]
    fn any_goes_above_4_gib_while_there_is_room() {
        let mut s = pc();
        assert_eq!(s.allocate(1, 1 << 21, IovaClass::Any).unwrap(), 1 << 32);
        let mut narrow = IovaSpace::new([0..=0xffff_ffff]);
        assert_eq!(narrow.allocate(1, 64, IovaClass::Any).unwrap(), 64);
        let mut none = IovaSpace::new([]);
        assert!(none.allocate(1, 1, IovaClass::Any).is_err());
        assert!(s.allocate(0, 1, IovaClass::Any).is_err());
        assert!(s.allocate(1, 3, IovaClass::Any).is_err());
        assert!(s.allocate(u64::MAX, 1, IovaClass::Any).is_err());
    }

    #[test]
    fn overlapping_windows_are_one() {
        let s = IovaSpace::new([10..=20, 15..=30, 0..=0, 40..=50]);
        assert_eq!(s.windows(), [10..=30, 40..=50]);
    }

    proptest! {
        #[test]
        fn what_is_given_is_usable_aligned_and_given_once(
            calls in prop::collection::vec((1u64..0x8000_0000, 0u32..22, any::<bool>(), any::<bool>()), 1..60),
        ) {
            let mut s = pc();
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (len, align, low, release) in calls {
                if release && !held.is_empty() {
                    let (start, _) = held.swap_remove(held.len() / 2);
                    prop_assert!(s.release(start));
                    prop_assert!(!s.release(start));
                    continue;
                }
                let class = if low { IovaClass::Below4G } else { IovaClass::Any };
                let Ok(start) = s.allocate(len, 1 << align, class) else { continue };
                prop_assert!(s.usable(start, len) && start != 0 && start % (1 << align) == 0);
                prop_assert!(!low || start + len <= 1 << 32);
                for &(other, n) in &held {
                    prop_assert!(start + len <= other || other + n <= start);
                }
                held.push((start, len));
            }
        }
    }
}
