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

/// What is known of a packet while the engine has its bytes.
pub(super) struct Flight {
    pub(super) route: Route,
    job: Meta,
}

/// A job without its frame.
struct Meta {
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

enum Place {
    /// The engine has the frame.
    Engine(Flight),
    /// The job needs no engine any more and waits for its turn.
    Here(EspJob),
}

/// Packets in the engine, and those that wait behind them.
pub(super) struct Flights {
    map: ArenaMap,
    frames: FrameRing,
    order: VecDeque<Place>,
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
            order: VecDeque::with_capacity(ring as usize),
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
        self.order.len()
    }

    /// Gives the job's frame to the engine; the job back when there is no place for it.
    pub(super) fn depart(&mut self, job: EspJob, route: Route) -> Result<(), EspJob> {
        let EspJob {
            frame,
            sa,
            seq,
            tag,
            note,
            esp_off,
            esp_end,
            next_header,
            kind,
            mode,
            status,
        } = job;
        if let Err(frame) = self.frames.push(frame) {
            return Err(EspJob {
                frame,
                sa,
                seq,
                tag,
                note,
                esp_off,
                esp_end,
                next_header,
                kind,
                mode,
                status,
            });
        }
        let job = Meta {
            sa,
            seq,
            tag,
            note,
            esp_off,
            esp_end,
            next_header,
            kind,
            mode,
        };
        self.order.push_back(Place::Engine(Flight { route, job }));
        Ok(())
    }

    /// Puts a job that is done behind those before it.
    pub(super) fn wait(&mut self, job: EspJob) {
        self.order.push_back(Place::Here(job));
    }

    /// Takes the jobs that need no engine and have nothing before them.
    pub(super) fn settle(&mut self, done: &mut Vec<EspJob>) {
        while let Some(Place::Here(_)) = self.order.front() {
            if let Some(Place::Here(job)) = self.order.pop_front() {
                done.push(job);
            }
        }
    }

    /// The oldest packet in the engine, which the next result belongs to.
    pub(super) fn first(&self) -> Option<&Flight> {
        match self.order.front() {
            Some(Place::Engine(flight)) => Some(flight),
            _ => None,
        }
    }

    /// Takes the oldest packet back: the engine reported its result.
    pub(super) fn land(&mut self) -> Option<(Flight, EspJob)> {
        self.first()?;
        let Some(Place::Engine(flight)) = self.order.pop_front() else {
            return None;
        };
        // SAFETY: the engine reported the descriptor of this frame as done: the caller saw the result with the flight's
        // identity, or proved the engine stopped.
        let frame = unsafe { self.frames.pop() }?;
        let m = &flight.job;
        let job = EspJob {
            frame,
            sa: m.sa,
            seq: m.seq,
            tag: m.tag,
            note: m.note,
            esp_off: m.esp_off,
            esp_end: m.esp_end,
            next_header: m.next_header,
            kind: m.kind,
            mode: m.mode,
            status: JobStatus::Pending,
        };
        Some((flight, job))
    }

    /// At the end, with the engine stopped: all frames go home.
    pub(super) fn give_back(&mut self) {
        loop {
            if let Some((_, job)) = self.land() {
                job.frame.give_back();
            } else if let Some(Place::Here(job)) = self.order.pop_front() {
                job.frame.give_back();
            } else {
                return;
            }
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
