//! The mailbox between a virtual function and the driver of its physical function (82599 datasheet, 7.10.2.9).
//!
//! 16 words of shared memory and one register of flags. The memory belongs to whoever set its "owned" flag; a request and its
//! answer take turns in it. What the other side's driver means by the words is the protocol that Linux's drivers speak.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::regs::{Regs, mac_of};
use crate::device::DeviceError;
use crate::port::MacAddr;

/// 16 words.
const VFMBMEM: usize = 0x0200;
const VFMAILBOX: usize = 0x02fc;

/// A message of ours is in the memory.
const REQUEST: u32 = 1 << 0;
/// We have read the other side's.
const ACKNOWLEDGE: u32 = 1 << 1;
/// The memory is ours.
const OWNED: u32 = 1 << 2;
/// A message of the other side's is in the memory. Reading the register clears this and the next two that follow.
const THEIR_MESSAGE: u32 = 1 << 4;
/// The other side has read ours.
const THEIR_ACKNOWLEDGE: u32 = 1 << 5;
/// The physical function is being reset, or was.
const RESET_UNDER_WAY: u32 = 1 << 6;
const RESET_DONE: u32 = 1 << 7;
/// Flags that are seen once only.
const ONCE: u32 = THEIR_MESSAGE | THEIR_ACKNOWLEDGE | RESET_DONE;

// Messages, in the first word's low half.
const RESET: u32 = 0x01;
const SET_LONGEST: u32 = 0x05;
const NEGOTIATE: u32 = 0x08;
const GET_QUEUES: u32 = 0x09;
const SET_FILTER: u32 = 0x0c;
/// Answers.
const YES: u32 = 1 << 31;
/// The other side hears us.
const CLEAR_TO_SEND: u32 = 1 << 29;

/// Versions of the protocol, best first: 1.2 has [`SET_FILTER`], 1.1 [`GET_QUEUES`].
const VERSIONS: [u32; 3] = [3, 2, 0];
const VERSION_WITH_QUEUES: u32 = 2;
const VERSION_WITH_FILTER: u32 = 3;

const ANSWER_LIMIT: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_micros(50);

/// What the physical function grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) mac: MacAddr,
    pub(super) queues: usize,
}

/// The virtual function's end.
#[derive(Debug)]
pub(super) struct Mailbox {
    regs: Regs,
    /// Flags of [`ONCE`] that were read and not used yet.
    unread: AtomicU32,
    version: AtomicU32,
}

impl Mailbox {
    pub(super) fn new(regs: Regs) -> Mailbox {
        Mailbox {
            regs,
            unread: AtomicU32::new(0),
            version: AtomicU32::new(0),
        }
    }

    /// Flags from before a reset mean nothing after it.
    pub(super) fn forget(&self) {
        self.regs.read(VFMAILBOX);
        self.unread.store(0, Ordering::Relaxed);
    }

    /// After a reset of the function: waits for the other side, says hello, agrees on a version, asks for queues.
    pub(super) fn hello(&self) -> Result<Granted, DeviceError> {
        self.wait(
            RESET_DONE | RESET_UNDER_WAY,
            "the physical function's answer to the reset",
        )?;
        let [answer, low, high, _] = self.ask([RESET, 0, 0, 0])?;
        if answer != RESET | YES {
            return Err(refused("the reset"));
        }
        let mac = mac_of(low, high);
        let mut version = 0;
        for wanted in VERSIONS {
            let [answer, ..] = self.ask([NEGOTIATE, wanted, 0, 0])?;
            if answer == NEGOTIATE | YES {
                version = wanted;
                break;
            }
        }
        self.version.store(version, Ordering::Relaxed);
        let mut queues = 1;
        if version >= VERSION_WITH_QUEUES {
            let [answer, transmit, receive, _] = self.ask([GET_QUEUES, 0, 0, 0])?;
            if answer != GET_QUEUES | YES {
                return Err(refused("the number of queues"));
            }
            queues = usize::try_from(transmit.min(receive)).unwrap_or(0).max(1);
        }
        Ok(Granted { mac, queues })
    }

    /// Asks for packets of up to `bytes`, check sequence included.
    pub(super) fn set_longest(&self, bytes: u32) -> Result<(), DeviceError> {
        match self.ask([SET_LONGEST, bytes, 0, 0])?[0] {
            answer if answer == SET_LONGEST | YES => Ok(()),
            _ => Err(refused("packets of this length")),
        }
    }

    /// Asks for frames to others. An old physical function is told nothing when nothing but the usual is wanted.
    pub(super) fn set_filter(
        &self,
        promiscuous: bool,
        all_multicast: bool,
    ) -> Result<(), DeviceError> {
        let mode = match (promiscuous, all_multicast) {
            (true, _) => 3,
            (false, true) => 2,
            (false, false) => 1,
        };
        if self.version.load(Ordering::Relaxed) < VERSION_WITH_FILTER {
            return if promiscuous {
                Err(refused("promiscuous mode"))
            } else {
                Ok(())
            };
        }
        match self.ask([SET_FILTER, mode, 0, 0])?[0] {
            answer if answer == SET_FILTER | YES => Ok(()),
            // All multicast is for trusted functions only; routing needs the groups that the switch passes in any case.
            _ if !promiscuous => {
                tracing::warn!(
                    "the physical function refuses all-multicast: is the function trusted?"
                );
                Ok(())
            }
            _ => Err(refused("promiscuous mode")),
        }
    }

    /// Whether the physical function was reset since the last [`Mailbox::hello`].
    pub(super) fn parent_was_reset(&self) -> bool {
        let flags = self.flags();
        flags != u32::MAX && flags & (RESET_DONE | RESET_UNDER_WAY) != 0
    }

    /// One request and its answer, of which the first words are given.
    fn ask(&self, words: [u32; 4]) -> Result<[u32; 4], DeviceError> {
        // 1. The memory is ours; what it held is out of date.
        self.own()?;
        self.unread
            .fetch_and(!(THEIR_MESSAGE | THEIR_ACKNOWLEDGE), Ordering::Relaxed);
        // 2. The request, and the other side's turn.
        for (n, word) in words.into_iter().enumerate() {
            self.regs.write(VFMBMEM + 4 * n, word);
        }
        self.regs.write(VFMAILBOX, REQUEST);
        self.wait(THEIR_ACKNOWLEDGE, "the physical function to read a message")?;
        // 3. Its answer.
        self.wait(THEIR_MESSAGE, "the physical function's answer")?;
        self.own()?;
        let mut answer = std::array::from_fn(|n| self.regs.read(VFMBMEM + 4 * n));
        self.regs.write(VFMAILBOX, ACKNOWLEDGE);
        answer[0] &= !CLEAR_TO_SEND;
        Ok(answer)
    }

    /// Takes the memory.
    fn own(&self) -> Result<(), DeviceError> {
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            self.regs.write(VFMAILBOX, OWNED);
            let flags = self.flags();
            if flags == u32::MAX {
                return Err(DeviceError::Gone);
            }
            if flags & OWNED != 0 {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(DeviceError::Timeout("the mailbox to be free"));
            }
            std::thread::sleep(STEP);
        }
    }

    /// Waits for one of these flags and uses it up.
    fn wait(&self, wanted: u32, what: &'static str) -> Result<(), DeviceError> {
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            let flags = self.flags();
            if flags == u32::MAX {
                return Err(DeviceError::Gone);
            }
            if flags & wanted != 0 {
                self.unread.fetch_and(!wanted, Ordering::Relaxed);
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(DeviceError::Timeout(what));
            }
            std::thread::sleep(STEP);
        }
    }

    /// The register, with the flags that an earlier read cleared.
    fn flags(&self) -> u32 {
        let now = self.regs.read(VFMAILBOX);
        if now == u32::MAX {
            return now;
        }
        now | self.unread.fetch_or(now & ONCE, Ordering::Relaxed)
    }
}

fn refused(what: &str) -> DeviceError {
    DeviceError::Broken(format!("the physical function refuses {what}"))
}
