//! The mailbox of a modelled virtual function, with a physical function's driver behind it that speaks up to version 1.2.

use super::model::Parts;

const VFCTRL: usize = 0x000;
const VFLINKS: usize = 0x010;
const MEMORY: usize = 0x200;
const MEMORY_END: usize = 0x240;
const MAILBOX: usize = 0x2fc;
const OWNED: u32 = 1 << 2;
const YES: u32 = 1 << 31;
const NO: u32 = 1 << 30;
const CLEAR_TO_SEND: u32 = 1 << 29;
/// `api` once the virtual function was reset; higher when a version was agreed on.
const GREETED: u32 = 1;

pub(super) fn read(parts: Parts<'_>, offset: usize, value: u32) -> u32 {
    match offset {
        VFLINKS if !parts.link_down => 1 << 30 | 3 << 28,
        MAILBOX => {
            let flags = std::mem::take(parts.mailbox);
            flags | value & OWNED
        }
        _ => value,
    }
}

/// True when the write was the mailbox's.
pub(super) fn write(parts: Parts<'_>, offset: usize, value: u32) -> bool {
    match offset {
        VFCTRL if value & 1 << 26 != 0 => {
            *parts.resets += 1;
            if !parts.deaf {
                parts.regs.clear();
                *parts.api = 0;
                *parts.mailbox = 1 << 7;
            }
        }
        MEMORY..MEMORY_END => {
            if parts.regs.get(&MAILBOX).copied().unwrap_or(0) & OWNED == 0 {
                parts
                    .violations
                    .push("mailbox memory written without owning it".into());
            }
            parts.regs.insert(offset, value);
        }
        MAILBOX if value & OWNED != 0 => {
            parts.regs.insert(MAILBOX, OWNED);
        }
        MAILBOX => {
            parts.regs.insert(MAILBOX, 0);
            if value & 1 != 0 && !parts.deaf {
                answer(parts);
            }
        }
        _ => return false,
    }
    true
}

fn answer(parts: Parts<'_>) {
    let word = |n: usize| parts.regs.get(&(MEMORY + 4 * n)).copied().unwrap_or(0);
    let (message, argument) = (word(0), word(1));
    let greeted = *parts.api >= GREETED;
    let version = parts.api.saturating_sub(GREETED);
    let (result, words) = match message {
        0x01 => {
            *parts.api = GREETED;
            (YES, [0x0300_5452, 0x0000_0201, 0])
        }
        0x08 if greeted && argument <= 3 => {
            *parts.api = GREETED + argument;
            (YES, [argument, 0, 0])
        }
        0x09 if greeted && version >= 2 => (YES, [2, 2, 0]),
        0x05 if greeted && (64..=9728).contains(&argument) => (YES, [0; 3]),
        0x0c if greeted && version >= 3 && argument <= 3 => (YES, [0; 3]),
        _ => (NO, [0; 3]),
    };
    let hears = if greeted || message == 1 {
        CLEAR_TO_SEND
    } else {
        0
    };
    parts.regs.insert(MEMORY, message | result | hears);
    for (n, word) in words.into_iter().enumerate() {
        parts.regs.insert(MEMORY + 4 + 4 * n, word);
    }
    // Read and answered.
    *parts.mailbox |= 1 << 4 | 1 << 5;
}
