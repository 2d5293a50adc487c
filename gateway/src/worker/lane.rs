//! Packets on their way from stage to stage.

use pmd::Frame;

use crate::wire::Parsed;

/// What is known of a packet beside its frame, whose data starts at the IP header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Info {
    pub(super) p: Parsed,
    /// Port on which it came.
    pub(super) port: u16,
}

/// Packets that wait for a stage, in order. Frames and what is known of them lie apart: a stage moves the handles and
/// reads the rest where it lies, for moving large values costs more than looking at them.
#[derive(Debug)]
pub(super) struct Lane<T> {
    frames: Vec<Frame>,
    infos: Vec<T>,
}

impl<T> Lane<T> {
    pub(super) fn with_capacity(packets: usize) -> Self {
        Self {
            frames: Vec::with_capacity(packets),
            infos: Vec::with_capacity(packets),
        }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, frame: Frame, info: T) {
        self.frames.push(frame);
        self.infos.push(info);
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// What is known of the packets.
    #[inline(always)]
    pub(super) fn infos(&self) -> &[T] {
        &self.infos
    }

    /// Takes the frames out one by one, each with what is known of it. To be followed by [`clear`](Self::clear).
    #[inline(always)]
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (Frame, &T)> {
        self.frames.drain(..).zip(&self.infos)
    }

    /// Forgets what was known of the packets taken out.
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        debug_assert!(self.frames.is_empty());
        self.infos.clear();
    }

    /// Takes the lane out of a stage's state, to be put back after it was emptied.
    #[inline(always)]
    pub(super) fn take(&mut self) -> Self {
        Self {
            frames: std::mem::take(&mut self.frames),
            infos: std::mem::take(&mut self.infos),
        }
    }
}
