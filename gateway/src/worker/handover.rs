//! Handing packets to the worker that owns their SA: one single-producer ring per pair of workers, written in
//! bulk once a poll round, and a wake-up for a sleeping receiver.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pmd::Frame;
use rtrb::{Consumer, Producer, RingBuffer};
use sa_store::runtime::TunnelIdx;
use sa_store::sleeper::Sleeper;

use crate::wire::Parsed;

/// What the receiver is to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Protect it in this tunnel: policy has been looked up.
    Protect(Parsed, TunnelIdx),
    /// Open it: ESP for an SA of the receiver.
    Open(Parsed),
    /// Send the complete Ethernet frame on this port: the sender has no queue there.
    Send(u16),
}

/// A packet in a ring.
#[derive(Debug)]
pub struct Handed {
    /// The frame, from the IP header on, except for [`Task::Send`].
    pub frame: Frame,
    /// Port on which it came.
    pub port: u16,
    /// What to do.
    pub task: Task,
}

/// Wakes a worker that sleeps in `poll(2)`.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    sleeper: Sleeper,
}

impl Waker {
    /// A waker whose worker is awake.
    ///
    /// # Errors
    /// The system refused an event descriptor.
    pub fn new() -> nix::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self {
            event,
            sleeper: Sleeper::default(),
        })
    }

    /// Sender: after writing to the ring. Costs a system call only when the receiver sleeps.
    pub fn wake(&self) {
        if self.sleeper.needs_waking() {
            // A full event counter means that a wake-up is pending already.
            let _ = self.event.write(1);
        }
    }

    /// Receiver: about to sleep. It must look at its rings once more after this.
    pub fn announce_sleep(&self) {
        self.sleeper.announce_sleep();
    }

    /// Receiver: awake.
    pub fn announce_awake(&self) {
        self.sleeper.announce_awake();
        let _ = self.event.read();
    }

    /// What to poll.
    pub fn fd(&self) -> impl AsFd + '_ {
        &self.event
    }
}

/// One worker's ends of all rings.
#[derive(Debug)]
pub struct Handover {
    to: Vec<Option<Producer<Handed>>>,
    from: Vec<Consumer<Handed>>,
    wakers: Arc<[Waker]>,
    staged: Vec<Vec<Handed>>,
    own: usize,
}

impl Handover {
    /// Rings of `slots` packets between each two of `workers` workers.
    ///
    /// # Errors
    /// The system refused an event descriptor.
    pub fn mesh(workers: usize, slots: usize) -> nix::Result<Vec<Handover>> {
        let wakers: Arc<[Waker]> = (0..workers)
            .map(|_| Waker::new())
            .collect::<nix::Result<_>>()?;
        let mut ends: Vec<Handover> = (0..workers)
            .map(|own| Handover {
                to: (0..workers).map(|_| None).collect(),
                from: Vec::new(),
                wakers: Arc::clone(&wakers),
                staged: (0..workers)
                    .map(|_| Vec::with_capacity(2 * pmd::BURST))
                    .collect(),
                own,
            })
            .collect();
        for from in 0..workers {
            for to in (0..workers).filter(|to| *to != from) {
                let (producer, consumer) = RingBuffer::new(slots);
                ends[from].to[to] = Some(producer);
                ends[to].from.push(consumer);
            }
        }
        Ok(ends)
    }

    /// All workers' wakers, for whoever else must wake them.
    pub fn wakers(&self) -> &Arc<[Waker]> {
        &self.wakers
    }

    /// This worker's waker.
    pub fn waker(&self) -> &Waker {
        &self.wakers[self.own]
    }

    /// Keeps a packet for the next [`flush`](Self::flush).
    #[inline]
    pub fn stage(&mut self, worker: usize, handed: Handed) {
        self.staged[worker].push(handed);
    }

    /// Writes what was staged. What finds no room is given to `refused`. Returns how many were handed over.
    pub fn flush(&mut self, mut refused: impl FnMut(Frame)) -> usize {
        let mut sent = 0;
        for ((staged, ring), waker) in self
            .staged
            .iter_mut()
            .zip(&mut self.to)
            .zip(self.wakers.iter())
        {
            if staged.is_empty() {
                continue;
            }
            let room = ring.as_ref().map_or(0, Producer::slots).min(staged.len());
            for late in staged.drain(room..) {
                refused(late.frame);
            }
            if room == 0 {
                continue;
            }
            if let Some(Ok(chunk)) = ring.as_mut().map(|r| r.write_chunk_uninit(room)) {
                sent += chunk.fill_from_iter(staged.drain(..));
                waker.wake();
            }
        }
        sent
    }

    /// Takes up to `max` packets from each ring.
    pub fn receive(&mut self, max: usize, mut take: impl FnMut(Handed)) -> usize {
        let mut got = 0;
        for ring in &mut self.from {
            let n = ring.slots().min(max);
            if n != 0
                && let Ok(chunk) = ring.read_chunk(n)
            {
                for handed in chunk {
                    take(handed);
                }
                got += n;
            }
        }
        got
    }

    /// Whether a ring holds something for this worker.
    pub fn pending(&self) -> bool {
        self.from.iter().any(|r| !r.is_empty())
    }
}
