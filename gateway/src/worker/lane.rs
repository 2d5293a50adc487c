//! Packets on their way from stage to stage.

use pmd::Frame;

use crate::wire::{self, NattPorts, Parsed};

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
        self.infos.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// Moves the last `packets` before all others. The lane keeps its memory.
    pub(super) fn bring_forward(&mut self, packets: usize) {
        self.frames.rotate_right(packets);
        self.infos.rotate_right(packets);
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

impl Lane<Info> {
    /// Where a port puts what it receives, to be followed by [`describe`](Self::describe).
    #[inline(always)]
    pub(super) fn receive(&mut self) -> &mut Vec<Frame> {
        &mut self.frames
    }

    /// Parses the frames received since and cuts those that `fits` takes to their IP packet. True when it took all;
    /// otherwise [`recall`](Self::recall) is next.
    #[inline(always)]
    pub(super) fn describe(
        &mut self,
        port: u16,
        natt: NattPorts,
        fits: impl Fn(&Parsed) -> bool,
    ) -> bool {
        let new = self.frames.get_mut(self.infos.len()..).unwrap_or_default();
        for frame in new.iter() {
            frame.prefetch();
        }
        let mut all = true;
        self.infos.reserve(new.len());
        for frame in new {
            // Parsed where it stays: a copy of what was just written in pieces costs as much as making it.
            self.infos.push(Info {
                p: Parsed::NOTHING,
                port,
            });
            let Some(info) = self.infos.last_mut() else {
                continue;
            };
            if wire::parse_into(frame.data(), natt, &mut info.p).is_ok() && fits(&info.p) {
                cut(frame, &info.p);
            } else {
                all = false;
            }
        }
        all
    }

    /// Moves what stands behind the first `keep` packets to the end of `frames` and `infos`.
    pub(super) fn recall(&mut self, keep: usize, frames: &mut Vec<Frame>, infos: &mut Vec<Info>) {
        frames.extend(self.frames.drain(keep..));
        infos.extend(self.infos.drain(keep..));
    }
}

/// Cuts a frame to its IP packet, which lies within it.
#[inline(always)]
pub(super) fn cut(frame: &mut Frame, p: &Parsed) {
    frame.trim_front(usize::from(p.l2_len));
    let padding = frame.len().saturating_sub(usize::from(p.l3_len));
    if padding != 0 {
        frame.trim_back(padding);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmd::{Arena, ArenaConfig, Pool};

    #[test]
    fn packets_moved_to_the_front_keep_their_order_and_what_is_known_of_them() {
        let arena = Arena::new(ArenaConfig {
            frames: 16,
            ..ArenaConfig::default()
        })
        .unwrap();
        let mut pool = Pool::new(&arena, 8);
        let mut lane = Lane::with_capacity(5);
        for n in 0_u8..5 {
            let mut frame = pool.get().unwrap();
            assert!(frame.set_data(&[n; 20]));
            lane.push(frame, n);
        }
        let room = lane.infos.capacity();
        lane.bring_forward(2);
        assert_eq!(lane.infos(), [3, 4, 0, 1, 2]);
        for (frame, n) in lane.drain() {
            assert_eq!(frame.data()[0], *n);
            pool.put(frame);
        }
        lane.clear();
        lane.bring_forward(0);
        assert_eq!(lane.infos.capacity(), room);
    }
}
