//! The pair of rings: command *i* has result *i*, in order.
//!
//! A descriptor is handed over by two ownership fields, in its first and its last word. Giving: the result's slot is cleared,
//! words 1 to 7 are written, a barrier, word 0, a barrier, the doorbell. Taking: both fields must say "host", then a read
//! barrier, then the rest; the two words already read are the ones used.

use super::regs::{CD_COUNT, COUNT, MOST, RD_COUNT};
use crate::device::{DmaMem, Mmio, fence_acquire, fence_release};

/// Bytes of a descriptor.
const LEN: usize = 32;
const HOST_READY: u32 = 1;
const PE_READY: u32 = 2;
const OWNER: u32 = 3;
const HOST_READY_7: u32 = 1 << 22;
const PE_READY_7: u32 = 1 << 23;
const OWNER_7: u32 = 3 << 22;
const LENGTH: u32 = 0xf_ffff;

/// Finish the hash: every packet.
pub(super) const HASH_FINAL: u32 = 1 << 4;
/// Load the random number generator.
pub(super) const PRNG_LOAD: u32 = 1 << 6;

/// What the engine is to do. Addresses are the device's.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Command {
    /// Word 0 without its ownership field.
    pub(super) control: u32,
    pub(super) source: u32,
    pub(super) destination: u32,
    pub(super) sa: u32,
    pub(super) state: u32,
    /// Comes back in the result.
    pub(super) id: u32,
    pub(super) length: u32,
}

/// What the engine did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) status: u32,
    pub(super) id: u32,
    pub(super) length: usize,
}

/// Why a packet was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The ICV is wrong.
    Authentication,
    /// Padding, lengths, or an SPI that is not the SA's.
    Malformed,
    /// A replay; outbound, no number is left.
    Sequence,
    /// The SA record asks for what the engine does not do.
    Record(u32),
    /// The engine cannot go on.
    Fatal(u32),
}

impl Done {
    /// The fault, worst first: several bits may be set at once.
    pub(super) fn fault(self) -> Option<Fault> {
        let bit = |n: u32| self.status >> n & 1 == 1;
        if bit(19) {
            return Some(match self.status >> 20 & 15 {
                code @ (2 | 3) => Fault::Record(code),
                4..=7 => Fault::Malformed,
                code => Fault::Fatal(code),
            });
        }
        if bit(16) {
            return Some(Fault::Authentication);
        }
        if bit(18) {
            return Some(Fault::Sequence);
        }
        bit(17).then_some(Fault::Malformed)
    }

    /// ESP inbound: the next header.
    pub(super) fn next_header(self) -> u8 {
        self.status.to_le_bytes()[1]
    }
}

/// Both rings.
pub(super) struct Rings {
    commands: DmaMem,
    results: DmaMem,
    size: u32,
    /// Where the next command goes, and where the next result is.
    head: u32,
    tail: u32,
    /// Given without a result.
    given: u32,
    /// Written without a doorbell.
    unannounced: u32,
    /// Taken without being released.
    unreleased: u32,
}

impl Rings {
    /// Rings of `size` descriptors in memory that holds as many.
    pub(super) fn new(commands: DmaMem, results: DmaMem, size: u32) -> Rings {
        Rings {
            commands,
            results,
            size,
            head: 0,
            tail: 0,
            given: 0,
            unannounced: 0,
            unreleased: 0,
        }
    }

    pub(super) fn bases(&self) -> (u64, u64) {
        (self.commands.iova(), self.results.iova())
    }

    /// Empties both, to begin at `index`.
    pub(super) fn clear(&mut self, index: u32) {
        self.commands.zero();
        self.results.zero();
        self.head = index % self.size;
        self.tail = self.head;
        self.given = 0;
        self.unannounced = 0;
        self.unreleased = 0;
    }

    /// Commands that can be given now. One place always stays free.
    pub(super) fn room(&self) -> u32 {
        self.size - 1 - (self.given + self.unreleased)
    }

    /// Commands given without a result.
    pub(super) fn given(&self) -> u32 {
        self.given
    }

    /// The index that the next command gets.
    pub(super) fn next(&self) -> u32 {
        self.head
    }

    fn after(&self, index: u32) -> u32 {
        if index + 1 == self.size { 0 } else { index + 1 }
    }

    /// Gives a command, which [`Rings::announce`] tells the engine of. False when there is no room.
    pub(super) fn give(&mut self, c: &Command) -> bool {
        if self.room() == 0 {
            return false;
        }
        let at = self.head as usize * LEN;
        let result = self.results.block::<LEN>(at);
        let command = self.commands.block::<LEN>(at);
        let (Some(result), Some(command)) = (result, command) else {
            return false;
        };
        result.write32::<0>(0);
        result.write32::<28>(0);
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        command.write32::<4>(c.source);
        command.write64::<8>(pair(c.destination, c.sa));
        command.write64::<16>(pair(c.state, 0));
        let last = c.length & LENGTH | HOST_READY_7;
        command.write64::<24>(pair(c.id, last));
        command.store_release32::<0>(c.control & !OWNER | HOST_READY);
        self.head = self.after(self.head);
        self.given += 1;
        self.unannounced += 1;
        true
    }

    /// Rings the doorbell for all commands written since the last time; returns how often.
    pub(super) fn announce(&mut self, regs: &Mmio) -> u64 {
        let mut rung = 0;
        if self.unannounced != 0 {
            fence_release();
        }
        while self.unannounced != 0 {
            let n = self.unannounced.min(MOST);
            regs.write32(CD_COUNT, n);
            self.unannounced -= n;
            rung += 1;
        }
        rung
    }

    /// Takes the next result if it is there.
    pub(super) fn take(&mut self) -> Option<Done> {
        if self.given == 0 {
            return None;
        }
        let result = self.results.block::<LEN>(self.tail as usize * LEN)?;
        let first = result.read32::<0>();
        let last = result.read32::<28>();
        // Seen in pieces: later, or never, which the deadline ends.
        if first & OWNER != PE_READY || last & OWNER_7 != PE_READY_7 {
            return None;
        }
        fence_acquire();
        let id = result.read32::<24>();
        // Its slot is cleared when it is given again.
        self.tail = self.after(self.tail);
        self.given -= 1;
        self.unreleased += 1;
        Some(Done {
            status: first,
            id,
            length: (last & LENGTH) as usize,
        })
    }

    /// Tells the engine of results taken: once a quarter of the ring is, or when nothing else is to come. Never more than the
    /// engine counts, whose counter may come later than the result.
    pub(super) fn release(&mut self, regs: &Mmio) {
        let worth = self.unreleased >= (self.size / 4).max(1) || self.given == 0;
        if self.unreleased == 0 || !worth {
            return;
        }
        let counted = regs.read32(RD_COUNT) & COUNT;
        let mut left = self.unreleased.min(counted);
        while left != 0 {
            let n = left.min(MOST);
            regs.write32(RD_COUNT, n);
            left -= n;
            self.unreleased -= n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_several_faults_counts() {
        let of = |status| {
            Done {
                status,
                id: 0,
                length: 0,
            }
            .fault()
        };
        assert_eq!(of(2), None);
        assert_eq!(of(1 << 16), Some(Fault::Authentication));
        assert_eq!(of(7 << 16), Some(Fault::Authentication));
        assert_eq!(of(6 << 16), Some(Fault::Sequence));
        assert_eq!(of(1 << 17), Some(Fault::Malformed));
        assert_eq!(of(0xf << 16), Some(Fault::Fatal(0)));
        for (code, want) in [
            (1, Fault::Fatal(1)),
            (2, Fault::Record(2)),
            (4, Fault::Malformed),
            (7, Fault::Malformed),
            (8, Fault::Fatal(8)),
            (15, Fault::Fatal(15)),
        ] {
            assert_eq!(of(1 << 19 | code << 20), Some(want));
        }
    }
}
