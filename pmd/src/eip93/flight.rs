//! Packets on their way through the engine, in the order of their submission.
//!
//! All `unsafe` of this driver: taking a frame back from the engine.

use std::collections::VecDeque;
use std::time::Instant;

use crate::device::ArenaMap;
use crate::device::ring::FrameRing;
use crate::engine::{EspJob, JobKind, JobStatus};
use crate::frame::Frame;
use sa_store::sa::{OffloadMode, SaId};

/// A job without its frame, and what the driver goes by when its result comes.
struct Flight {
    route: Route,
    sa: SaId,
    seq: u64,
    tag: u64,
    note: u32,
    esp_off: u16,
    esp_end: u16,
    next_header: u8,
    kind: JobKind,
    mode: OffloadMode,
}

/// Packets in the engine, and those that wait behind them.
pub(super) struct Flights {
    map: ArenaMap,
    frames: FrameRing,
    /// Of the frame in the same place.
    list: Box<[Option<Flight>]>,
    /// Packets given to the engine, and of those the ones that came back. They wrap around.
    given: u32,
    landed: u32,
    /// Jobs that need no engine any more and wait for their turn: until so many came back.
    here: VecDeque<(u32, EspJob)>,
    id: u32,
}

impl Flights {
    /// For rings of `ring` descriptors.
    pub(super) fn new(map: ArenaMap, ring: u32) -> Flights {
        let size = ring.next_power_of_two();
        // A power of two: it cannot fail.
        let frames = FrameRing::new(size, map.arena());
        Flights {
            frames: frames.unwrap_or_else(|| unreachable!("a power of two")),
            map,
            list: (0..size).map(|_| None).collect(),
            given: 0,
            landed: 0,
            here: VecDeque::new(),
            id: 0,
        }
    }

    /// Address of the frame's first byte for the engine.
    #[inline]
    pub(super) fn address(&self, frame: &Frame) -> Option<u32> {
        u32::try_from(self.map.iova(frame)?).ok()
    }

    /// An identity that no command had for long.
    pub(super) fn next_id(&mut self) -> u32 {
        self.id = self.id.wrapping_add(1);
        self.id
    }

    /// Packets on their way, and those that wait behind them.
    pub(super) fn len(&self) -> usize {
        self.given.wrapping_sub(self.landed) as usize + self.here.len()
    }

    /// Gives the job's frame to the engine; the job back when there is no place for it.
    pub(super) fn depart(&mut self, job: EspJob, route: Route) -> Result<(), EspJob> {
        // As many places as the ring of frames has.
        let Some(flight) = self.list.get_mut(self.frames.head() as usize) else {
            return Err(job);
        };
        if let Err(frame) = self.frames.push(job.frame) {
            return Err(EspJob { frame, ..job });
        }
        *flight = Some(Flight {
            route,
            sa: job.sa,
            seq: job.seq,
            tag: job.tag,
            note: job.note,
            esp_off: job.esp_off,
            esp_end: job.esp_end,
            next_header: job.next_header,
            kind: job.kind,
            mode: job.mode,
        });
        self.given = self.given.wrapping_add(1);
        Ok(())
    }

    /// Puts a job that is done behind those before it.
    pub(super) fn wait(&mut self, job: EspJob) {
        self.here.push_back((self.given, job));
    }

    /// Takes the jobs that need no engine and have nothing before them.
    #[inline]
    pub(super) fn settle(&mut self, done: &mut Vec<EspJob>) {
        while self.here.front().is_some_and(|(n, _)| *n == self.landed) {
            done.extend(self.here.pop_front().map(|(_, job)| job));
        }
    }

    /// The oldest packet in the engine, which the next result belongs to.
    #[inline]
    pub(super) fn first(&self) -> Option<&Route> {
        if self.given == self.landed {
            return None;
        }
        let flight = self.list.get(self.frames.tail() as usize)?.as_ref()?;
        Some(&flight.route)
    }

    /// Takes the oldest packet back: the engine reported its result.
    #[inline]
    pub(super) fn land(&mut self) -> Option<(&Route, EspJob)> {
        if self.given == self.landed {
            return None;
        }
        let f = self.list.get(self.frames.tail() as usize)?.as_ref()?;
        // SAFETY: the engine reported the descriptor of this frame as done: the caller saw the result with the flight's
        // identity, or proved the engine stopped.
        let frame = unsafe { self.frames.pop() }?;
        self.landed = self.landed.wrapping_add(1);
        let job = EspJob {
            frame,
            sa: f.sa,
            seq: f.seq,
            tag: f.tag,
            note: f.note,
            esp_off: f.esp_off,
            esp_end: f.esp_end,
            next_header: f.next_header,
            kind: f.kind,
            mode: f.mode,
            status: JobStatus::Pending,
        };
        Some((&f.route, job))
    }

    /// At the end, with the engine stopped: all frames go home.
    pub(super) fn give_back(&mut self) {
        while let Some((_, job)) = self.land() {
            job.frame.give_back();
        }
        for (_, job) in self.here.drain(..) {
            job.frame.give_back();
        }
    }
}

/// What the driver goes by when the result comes.
pub(super) struct Route {
    /// Identity of its command.
    pub(super) id: u32,
    pub(super) slot: u32,
    pub(super) deadline: Instant,
    /// The ESP header that was given, or is expected.
    pub(super) header: [u8; 8],
    /// 8 bytes of plaintext that must not be there when sealed, and where in the frame they are; 0 for none.
    pub(super) plain: [u8; 8],
    pub(super) plain_at: u16,
    /// Bytes of the result, or the most that there may be.
    pub(super) length: u16,
    pub(super) packet: bool,
}
