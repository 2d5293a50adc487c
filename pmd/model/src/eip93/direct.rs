//! Direct host mode: no rings and no memory, everything goes through the register window.

use super::crypt::Prng;
use super::operation::{self, Outcome};
use super::record::{SA_LEN, STATE_LEN, Sa, State};
use super::registers::{
    Code, HOST_READY, HOST_READY_7, INT_DONE, LENGTH, PE_READY, PE_READY_7, READY, READY_7,
    STATUS_DONE, STATUS_IDLE,
};
use super::switches::Switches;

/// Bytes of each of the two buffers.
const BUFFER: usize = 256;
const INT_INPUT: u32 = 1 << 10;
const INT_OUTPUT: u32 = 1 << 11;

pub(super) struct Direct {
    descriptor: [u32; 8],
    sa: Sa,
    state: State,
    ready: bool,
    started: bool,
    done: bool,
    written: [u8; BUFFER],
    input_at: usize,
    input: Vec<u8>,
    output_at: usize,
    output: Vec<u8>,
    /// Bytes of the output that the host has taken.
    taken: usize,
}

impl Default for Direct {
    fn default() -> Self {
        let mut descriptor = [0; 8];
        descriptor[0] = PE_READY;
        Direct {
            descriptor,
            sa: Sa([0; SA_LEN]),
            state: State([0; STATE_LEN]),
            ready: false,
            started: false,
            done: false,
            written: [0; BUFFER],
            input_at: 0,
            input: Vec::new(),
            output_at: 0,
            output: Vec::new(),
            taken: 0,
        }
    }
}

impl Direct {
    pub(super) fn descriptor(&self, word: usize) -> u32 {
        self.descriptor.get(word).copied().unwrap_or(0)
    }

    pub(super) fn set_descriptor(&mut self, word: usize, value: u32) {
        if let Some(place) = self.descriptor.get_mut(word) {
            *place = value;
        }
    }

    pub(super) fn sa_word(&self, at: usize) -> u32 {
        self.sa.word(at)
    }

    pub(super) fn set_sa(&mut self, at: usize, value: u32) {
        if let Some(place) = self.sa.0.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        // The last word tells that the record is there.
        self.ready |= at == SA_LEN - 4;
    }

    pub(super) fn state_word(&self, at: usize) -> u32 {
        let bytes = self.state.0.get(at..at + 4).and_then(|b| b.first_chunk());
        bytes.map_or(0, |b| u32::from_le_bytes(*b))
    }

    pub(super) fn set_state(&mut self, at: usize, value: u32) {
        if let Some(place) = self.state.0.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }

    pub(super) fn start(&mut self) {
        self.started = true;
        self.done = false;
        self.input.clear();
        self.output.clear();
        self.taken = 0;
    }

    /// A word into the input buffer.
    pub(super) fn write(&mut self, at: usize, value: u32) {
        if let Some(place) = self.written.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// The host says that it has written so many bytes.
    pub(super) fn feed(&mut self, bytes: u32) {
        for _ in 0..(bytes as usize).min(BUFFER) {
            self.input.push(self.written[self.input_at]);
            self.input_at = (self.input_at + 1) % BUFFER;
        }
    }

    /// A word of the output buffer.
    pub(super) fn read(&self, at: usize) -> u32 {
        let word: [u8; 4] = std::array::from_fn(|i| {
            let behind = (at + i + BUFFER - self.output_at) % BUFFER;
            self.output.get(self.taken + behind).copied().unwrap_or(0)
        });
        u32::from_le_bytes(word)
    }

    /// The host has taken so many bytes.
    pub(super) fn release(&mut self, bytes: u32) {
        let n = (bytes as usize).min(self.output.len() - self.taken);
        self.taken += n;
        self.output_at = (self.output_at + n) % BUFFER;
    }

    pub(super) fn output_count(&self) -> u32 {
        let left = (self.output.len() - self.taken).min(BUFFER);
        u32::try_from(left).unwrap_or(0)
    }

    pub(super) fn pointers(&self) -> u32 {
        let at = |n: usize| u32::try_from(n).unwrap_or(0);
        at(self.input_at) | at(self.output_at) << 16
    }

    pub(super) fn status(&self) -> u32 {
        if self.done {
            STATUS_IDLE | STATUS_DONE
        } else {
            STATUS_IDLE
        }
    }

    pub(super) fn interrupts(&self) -> u32 {
        let mut bits = 0;
        if self.started {
            bits |= INT_INPUT;
        }
        if self.output_count() != 0 {
            bits |= INT_OUTPUT;
        }
        if self.done {
            bits |= INT_DONE;
        }
        bits
    }

    /// Does the operation once all of its input is there. The rule that was broken, if one was.
    pub(super) fn work(
        &mut self,
        switches: &Switches,
        prng: &mut Prng,
    ) -> Option<(&'static str, String)> {
        let length = (self.descriptor[7] & LENGTH) as usize;
        let needed = operation::input_len(&self.sa, length);
        if !self.started || !self.ready || self.input.len() < needed {
            return None;
        }
        let [control, .., word7] = self.descriptor;
        let outcome = if control & READY == HOST_READY && word7 & READY_7 == HOST_READY_7 {
            // The state record is always there.
            operation::run(
                switches,
                control,
                length,
                &self.input[..needed],
                &mut self.sa,
                Some(&mut self.state),
                prng,
            )
        } else {
            Outcome {
                errors: Code::Ownership.bits(),
                ..Outcome::default()
            }
        };
        self.started = false;
        self.ready = false;
        self.done = true;
        self.descriptor[0] = outcome.errors | PE_READY | u32::from(outcome.next_header) << 8;
        let len = u32::try_from(outcome.output.len()).unwrap_or(0);
        self.descriptor[7] = PE_READY_7 | len & LENGTH;
        self.output = outcome.output;
        self.taken = 0;
        outcome.broke
    }
}
