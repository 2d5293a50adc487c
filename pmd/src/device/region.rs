//! Regions as VFIO and vfio-user describe them: the same structure, the same chain of capabilities.

use std::ops::Range;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use super::{DeviceError, Mmio, RegisterSpace};

/// One region of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) flags: u32,
    pub(crate) size: u64,
    /// Place in the device's file.
    pub(crate) offset: u64,
    /// Parts that can be mapped, when not all can: offset and size, inside the region.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

impl Region {
    /// Whether there is something to read and write.
    pub(crate) fn is_read_write(&self) -> bool {
        let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        self.size > 0 && self.flags & both == both
    }
}

/// Reads `vfio_region_info` with its capabilities; `None` when it contradicts itself.
pub(crate) fn parse_region(b: &[u8]) -> Option<Region> {
    let (flags, cap_offset) = (u32_at(b, 4)?, u32_at(b, 12)?);
    let mut region = Region {
        flags,
        size: u64_at(b, 16)?,
        offset: u64_at(b, 24)?,
        sparse: None,
    };
    region.offset.checked_add(region.size)?;
    if flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
        for (id, body) in capabilities(b, cap_offset)? {
            if u32::from(id) == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
                let n = usize::try_from(u32_at(body, 0)?).ok()?;
                let areas = body.get(8..8 + n.checked_mul(16)?)?;
                let areas = areas
                    .chunks_exact(16)
                    .map(|a| Some((u64_at(a, 0)?, u64_at(a, 8)?)))
                    .collect::<Option<Vec<_>>>()?;
                let inside = |&(offset, size): &(u64, u64)| {
                    offset.checked_add(size).is_some_and(|e| e <= region.size)
                };
                if !areas.iter().all(inside) {
                    return None;
                }
                region.sparse = Some(areas);
            }
        }
    }
    Some(region)
}

/// A region of which parts, or all, are mapped; the rest is reached through `R`.
pub(crate) struct SplitRegion<R> {
    mapped: Vec<(Range<usize>, Mmio)>,
    rest: R,
}

impl<R: RegisterSpace + 'static> SplitRegion<R> {
    /// Maps each of `areas` (offset and size, inside the region) by `map`.
    pub(crate) fn new(
        areas: &[(u64, u64)],
        rest: R,
        mut map: impl FnMut(u64, usize) -> Result<Mmio, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let mut mapped = Vec::new();
        for &(at, size) in areas.iter().filter(|(_, size)| *size > 0) {
            let (Ok(start), Ok(len)) = (usize::try_from(at), usize::try_from(size)) else {
                return Err(DeviceError::Unsupported("a region of this size"));
            };
            mapped.push((start..start + len, map(at, len)?));
        }
        Ok(SplitRegion { mapped, rest })
    }

    /// The registers: the mapping itself, when it is all of the region.
    pub(crate) fn into_mmio(self) -> Mmio {
        match self.mapped.as_slice() {
            [(range, whole)] if *range == (0..self.rest.len()) => whole.clone(),
            _ => Mmio::trapped(Arc::new(self)),
        }
    }

    /// The mapping that holds the access, and its place there.
    fn place(&self, offset: usize, size: usize) -> Option<(&Mmio, usize)> {
        let end = offset.checked_add(size)?;
        self.mapped
            .iter()
            .find(|(range, _)| range.start <= offset && end <= range.end)
            .map(|(range, m)| (m, offset - range.start))
    }
}

impl<R: RegisterSpace + 'static> RegisterSpace for SplitRegion<R> {
    fn read(&self, offset: usize, size: usize) -> u64 {
        match (self.place(offset, size), size) {
            (Some((m, at)), 1) => m.read8(at).into(),
            (Some((m, at)), 2) => m.read16(at).into(),
            (Some((m, at)), 4) => m.read32(at).into(),
            (Some((m, at)), _) => m.read64(at),
            (None, _) => self.rest.read(offset, size),
        }
    }

    fn write(&self, offset: usize, size: usize, value: u64) {
        let [a, b, c, d, ..] = value.to_le_bytes();
        match (self.place(offset, size), size) {
            (Some((m, at)), 1) => m.write8(at, a),
            (Some((m, at)), 2) => m.write16(at, u16::from_le_bytes([a, b])),
            (Some((m, at)), 4) => m.write32(at, u32::from_le_bytes([a, b, c, d])),
            (Some((m, at)), _) => m.write64(at, value),
            (None, _) => self.rest.write(offset, size, value),
        }
    }

    fn len(&self) -> usize {
        self.rest.len()
    }

    fn part(&self, offset: usize, len: usize) -> Option<Mmio> {
        let (m, at) = self.place(offset, len)?;
        m.window(at, len).ok()
    }
}

/// The chain of capabilities behind an information structure: identity, and everything behind the header. `None` when it
/// leaves the buffer or does not end.
pub(crate) fn capabilities(b: &[u8], first: u32) -> Option<Vec<(u16, &[u8])>> {
    let mut list = Vec::new();
    let mut offset = usize::try_from(first).ok()?;
    while offset != 0 {
        // Each has a header of 8 bytes, so more than this many is a loop.
        if list.len() > b.len() / 8 {
            return None;
        }
        let id = u16::from_ne_bytes(b.get(offset..offset.checked_add(2)?)?.try_into().ok()?);
        let next = u32_at(b, offset.checked_add(4)?)?;
        list.push((id, b.get(offset.checked_add(8)?..)?));
        offset = usize::try_from(next).ok()?;
    }
    Some(list)
}

pub(crate) fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    let bytes = b.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    let bytes = b.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;

    fn words(list: &[u32]) -> Vec<u8> {
        list.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn parts_of_a_region_must_lie_inside_it() {
        let flags = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
        let mut b = words(&[80, flags, 3, 32, 0x8000, 0, 0, 0x300]);
        b.extend(words(&[1 | 1 << 16, 0, 2, 0]));
        for edge in [0u64, 0x1000, 0x2000, 0x6000] {
            b.extend(edge.to_ne_bytes());
        }
        let r = parse_region(&b).unwrap();
        assert_eq!((r.size, r.offset), (0x8000, 0x300 << 32));
        assert_eq!(r.sparse.unwrap(), [(0, 0x1000), (0x2000, 0x6000)]);
        b[72..76].copy_from_slice(&0x6001u32.to_ne_bytes());
        assert_eq!(parse_region(&b), None);
    }

    #[test]
    fn a_region_in_parts_is_reached_by_the_fastest_way() {
        struct Slow;
        impl RegisterSpace for Slow {
            fn read(&self, offset: usize, _: usize) -> u64 {
                0x5100 + offset as u64
            }
            fn write(&self, _: usize, _: usize, _: u64) {}
            fn len(&self) -> usize {
                0x3000
            }
        }
        let parts = [(0, 0x1000), (0x2000, 0x1000)];
        let memory = |_, len| Ok(Mmio::memory(len));
        let m = SplitRegion::new(&parts, Slow, memory).unwrap().into_mmio();
        m.write32(0x10, 7);
        m.write8(0x2001, 8);
        m.write64(0x1000, 9);
        assert_eq!(
            (m.read32(0x10), m.read16(0x2000), m.read64(0x1000)),
            (7, 0x800, 0x6100)
        );
        // Across an edge nothing is mapped.
        assert_eq!(m.window(0xff8, 0x10).unwrap().read64(8), 0x6100);
        let w = m.window(0x2000, 8).unwrap();
        w.write16(2, 0xabcd);
        assert_eq!(
            (m.read16(0x2002), w.read32(8), m.faults()),
            (0xabcd, u32::MAX, 1)
        );
        let whole = [(0, 0x3000)];
        let m = SplitRegion::new(&whole, Slow, memory).unwrap().into_mmio();
        assert_eq!(m.read64(0x1000), 0);
    }

    proptest! {
        #[test]
        fn no_answer_panics(mut b in prop::collection::vec(any::<u8>(), 0..200), flags in 0u32..16, first in 0u32..200) {
            for (at, value) in [(4, flags), (12, first)] {
                if let Some(place) = b.get_mut(at..at + 4) {
                    place.copy_from_slice(&value.to_ne_bytes());
                }
            }
            if let Some(r) = parse_region(&b) {
                for (offset, size) in r.sparse.into_iter().flatten() {
                    prop_assert!(offset + size <= r.size);
                }
            }
        }
    }
}
