//! The driver's memory as the device sees it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::log::Log;
use crate::sys::SharedMap;

/// Maps of one driver: as many as it can have arenas and pieces of ring memory.
const MOST_MAPS: usize = 4096;

/// A transfer that no map allows. The device's bus error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("DMA fault at {address:#x}")]
pub struct DmaFault {
    /// First address that is not reachable.
    pub address: u64,
}

struct Mapped {
    memory: SharedMap,
    readable: bool,
    writable: bool,
}

/// Memory that the driver mapped, by the device's addresses, and the interrupts that it connected. A transfer outside of it
/// is refused and logged.
pub struct Bus {
    maps: BTreeMap<u64, Mapped>,
    vectors: Vec<Option<File>>,
    log: Arc<Log>,
}

impl Bus {
    pub(crate) fn new(interrupts: u32, log: Arc<Log>) -> Bus {
        Bus {
            maps: BTreeMap::new(),
            vectors: (0..interrupts).map(|_| None).collect(),
            log,
        }
    }

    /// Reads memory.
    ///
    /// # Errors
    /// [`DmaFault`] when not all of it is mapped for reading.
    pub fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < out.len() {
            let at = address.wrapping_add(done as u64);
            let left = out.len() - done;
            let (map, offset, n) = self
                .find(at, left)
                .filter(|(m, ..)| m.readable)
                .ok_or(at)
                .or_else(|at| self.fault(at, "read"))?;
            if !map.memory.read(offset, &mut out[done..done + n]) {
                return Err(DmaFault { address: at });
            }
            done += n;
        }
        fence(Ordering::Acquire);
        Ok(())
    }

    /// Writes memory, before all writes that follow.
    ///
    /// # Errors
    /// [`DmaFault`] when not all of it is mapped for writing; what lies before the fault may be written.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let left = bytes.len() - done;
            let (map, offset, n) = self
                .find(at, left)
                .filter(|(m, ..)| m.writable)
                .ok_or(at)
                .or_else(|at| self.fault(at, "write"))?;
            if !map.memory.write(offset, &bytes[done..done + n]) {
                return Err(DmaFault { address: at });
            }
            done += n;
        }
        fence(Ordering::Release);
        Ok(())
    }

    /// Reads a little-endian word at a multiple of 4 in one access, before all reads that follow.
    ///
    /// # Errors
    /// As [`Bus::read`].
    pub fn read32(&mut self, address: u64) -> Result<u32, DmaFault> {
        let found = self.find(address, 4).filter(|(m, ..)| m.readable);
        let value = found.and_then(|(m, offset, _)| m.memory.read32(offset));
        fence(Ordering::Acquire);
        value.map_or_else(|| self.fault(address, "read"), Ok)
    }

    /// Writes a little-endian word at a multiple of 4 in one access, behind all writes so far.
    ///
    /// # Errors
    /// As [`Bus::write`].
    pub fn write32(&mut self, address: u64, value: u32) -> Result<(), DmaFault> {
        fence(Ordering::Release);
        let found = self.find(address, 4).filter(|(m, ..)| m.writable);
        let done = found.and_then(|(m, offset, _)| m.memory.write32(offset, value));
        done.map_or_else(|| self.fault(address, "write"), Ok)
    }

    /// Raises an interrupt; false when the driver has not connected it.
    pub fn interrupt(&mut self, vector: usize) -> bool {
        let file = self.vectors.get(vector).and_then(Option::as_ref);
        file.is_some_and(|mut f| f.write_all(&1u64.to_ne_bytes()).is_ok())
    }

    /// Writes to the log that the driver broke a rule.
    pub fn broke(&self, rule: &'static str, detail: impl Into<String>) {
        self.log.broke(rule, detail);
    }

    /// Bytes that the device can reach.
    pub fn mapped_bytes(&self) -> u64 {
        self.maps.values().map(|m| m.memory.len() as u64).sum()
    }

    pub(crate) fn map(
        &mut self,
        address: u64,
        memory: SharedMap,
        readable: bool,
        writable: bool,
    ) -> io::Result<()> {
        let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let Some(last) = address.checked_add(memory.len() as u64 - 1) else {
            return refuse("a map beyond the address space");
        };
        if self.maps.len() >= MOST_MAPS {
            return refuse("too many maps");
        }
        let before = self.maps.range(..=last).next_back();
        if before.is_some_and(|(start, m)| start + (m.memory.len() as u64 - 1) >= address) {
            return refuse("a map over another one");
        }
        self.maps.insert(
            address,
            Mapped {
                memory,
                readable,
                writable,
            },
        );
        Ok(())
    }

    /// Ends the map that is exactly this.
    pub(crate) fn unmap(&mut self, address: u64, len: u64) -> bool {
        let fits = self
            .maps
            .get(&address)
            .is_some_and(|m| m.memory.len() as u64 == len);
        fits && self.maps.remove(&address).is_some()
    }

    /// Connects an interrupt, or disconnects it.
    pub(crate) fn connect(&mut self, vector: usize, file: Option<File>) -> bool {
        match self.vectors.get_mut(vector) {
            Some(place) => {
                *place = file;
                true
            }
            None => false,
        }
    }

    pub(crate) fn disconnect_all(&mut self) {
        self.vectors.fill_with(|| None);
    }

    /// The map that holds `address`, the place in it, and how many of `len` bytes it holds.
    fn find(&self, address: u64, len: usize) -> Option<(&Mapped, usize, usize)> {
        let (start, map) = self.maps.range(..=address).next_back()?;
        let offset = usize::try_from(address - start).ok()?;
        let held = map.memory.len().checked_sub(offset).filter(|&n| n > 0)?;
        Some((map, offset, held.min(len)))
    }

    #[cold]
    fn fault<T>(&self, address: u64, what: &str) -> Result<T, DmaFault> {
        self.broke(
            "an address that is mapped for the access",
            format!("{what} at {address:#x}"),
        );
        Err(DmaFault { address })
    }
}
