//! ESP packets whose SA is not known yet: a peer may use an SA as soon as it is negotiated, before this side's IKE daemon
//! has told of it. They wait a moment, few of them; what anybody can send must not displace much.

use std::collections::VecDeque;

use pmd::Frame;
use sa_store::snapshot::Snapshot;

use super::core::{Shared, dst_of};
use super::lane::{Info, Lane};

/// Packets that wait, per worker.
const ROOM: usize = 128;
/// Of these with one SPI.
const PER_SPI: usize = 64;

/// Packets that wait for their SA.
pub(super) struct Hold {
    waiting: VecDeque<Waiting>,
    /// How long one waits, nanoseconds.
    patience: u64,
    /// Snapshot in which the SAs were last looked for.
    epoch: u64,
}

struct Waiting {
    frame: Frame,
    info: Info,
    deadline: u64,
}

impl Hold {
    pub(super) fn new(patience: u64) -> Self {
        Self {
            waiting: VecDeque::with_capacity(ROOM),
            patience,
            epoch: 0,
        }
    }

    /// Packets that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes a packet in, or gives it back when there is no room for it.
    #[cold]
    pub(super) fn push(&mut self, now: u64, frame: Frame, info: &Info) -> Result<(), Frame> {
        let spi = spi_of(info);
        let of_spi = self.waiting.iter().filter(|w| spi_of(&w.info) == spi);
        if self.waiting.len() >= ROOM || of_spi.count() >= PER_SPI {
            return Err(frame);
        }
        self.waiting.push_back(Waiting {
            frame,
            info: *info,
            deadline: now.saturating_add(self.patience),
        });
        Ok(())
    }

    /// Moves packets whose SA has come to the front of the lane, and those that waited too long to `late`.
    #[cold]
    pub(super) fn release(
        &mut self,
        shared: &Shared,
        snapshot: &Snapshot,
        lane: &mut Lane<Info>,
        late: &mut Vec<(Frame, Info)>,
    ) {
        let look = snapshot.epoch != self.epoch;
        self.epoch = snapshot.epoch;
        let before = lane.len();
        for _ in 0..self.waiting.len() {
            let Some(w) = self.waiting.pop_front() else {
                break;
            };
            let (dst, vrf) = (dst_of(&w.info.p), shared.vrf(w.info.port));
            if look && snapshot.sad.find(spi_of(&w.info), dst, vrf).is_some() {
                lane.push(w.frame, w.info);
            } else if shared.now >= w.deadline {
                late.push((w.frame, w.info));
            } else {
                self.waiting.push_back(w);
            }
        }
        // They came before what the lane had.
        lane.bring_forward(lane.len() - before);
    }

    /// Gives everything back.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Frame> {
        self.waiting.drain(..).map(|w| w.frame)
    }
}

fn spi_of(info: &Info) -> u32 {
    info.p.esp().unwrap_or_default().0
}
