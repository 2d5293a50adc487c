//! The worker's side: bursts between the peer's rings and frames of the arena, by copy.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::cell::{Counts, Live, Shared};
use super::memory::PeerMemory;
use super::{Handle, LINK_OVERHEAD};
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{BURST, PortQueue, PortQueueStats};
use crate::virtio::NET_HEADER;
use crate::virtio::ring::{Buffer, MAX_CHAIN, RingError, Taken};

/// Smallest Ethernet frame worth having: its header.
const SHORTEST: usize = 14;

/// One queue pair of a vhost-user port.
pub struct VhostQueue {
    shared: Arc<Shared>,
    /// Ends the session's thread with the last queue.
    _handle: Arc<Handle>,
    pair: usize,
    work: Work,
}

/// What a worker needs to move a burst.
struct Work {
    /// Largest frame, with VLAN tag.
    largest: usize,
    /// Empty frames for what comes next.
    stock: Vec<Frame>,
    /// Chains of the burst, and their buffers one after the other.
    chains: Vec<Chain>,
    buffers: Vec<Buffer>,
    stats: Arc<PortQueueStats>,
}

struct Chain {
    taken: Taken,
    /// One behind its last buffer in the list.
    end: usize,
}

/// What a chain held.
enum Content {
    /// A packet, this long.
    Packet(usize),
    /// Nothing that we take.
    Refused,
    /// An offload that was not agreed on.
    Offload,
}

impl VhostQueue {
    pub(super) fn new(
        shared: Arc<Shared>,
        handle: Arc<Handle>,
        pair: usize,
        mtu: u32,
    ) -> VhostQueue {
        VhostQueue {
            shared,
            _handle: handle,
            pair,
            work: Work {
                largest: mtu as usize + LINK_OVERHEAD,
                stock: Vec::with_capacity(BURST),
                chains: Vec::with_capacity(BURST),
                buffers: Vec::with_capacity(4 * BURST),
                stats: Arc::default(),
            },
        }
    }

    /// The ring to send to: our own, or, while the peer has not enabled that, another pair's, shared with its worker.
    #[inline(always)]
    fn tx_pair(&self) -> Option<usize> {
        let running = |i: &usize| self.shared.pairs.get(*i).is_some_and(|p| p.tx.running());
        if running(&self.pair) {
            return Some(self.pair);
        }
        (0..self.shared.pairs.len()).find(running)
    }
}

impl Work {
    /// Takes up to `max` chains from the ring and frames for them from the pool. An error comes after the chains that were
    /// good.
    #[inline(always)]
    fn collect(&mut self, live: &mut Live, pool: &mut Pool, max: usize) -> Result<(), RingError> {
        self.chains.clear();
        self.buffers.clear();
        while self.chains.len() < max {
            let before = live.ring.position();
            let Some(taken) = live.ring.next(&*live.memory, &mut self.buffers)? else {
                break;
            };
            if self.stock.len() <= self.chains.len()
                && pool.get_bulk(&mut self.stock, max.min(BURST)) == 0
            {
                // The packet waits with the peer.
                live.ring.rewind(before);
                break;
            }
            if let Some(first) = self.buffers.get(self.chains.last().map_or(0, |c| c.end)) {
                live.memory.prefetch(first.addr);
            }
            self.chains.push(Chain {
                taken,
                end: self.buffers.len(),
            });
        }
        Ok(())
    }

    #[inline(always)]
    fn receive(
        &mut self,
        live: &mut Live,
        counts: &Counts,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> (usize, Option<RingError>) {
        let mut error = self.collect(live, pool, max).err();
        if self.chains.is_empty() {
            return (0, error);
        }
        let (mut count, mut bytes, mut refused, mut offloads) = (0, 0, 0, 0);
        let mut start = 0;
        for chain in &self.chains {
            let buffers = self.buffers.get(start..chain.end).unwrap_or_default();
            start = chain.end;
            // `collect` took a frame for each chain.
            let Some(mut frame) = self.stock.pop() else {
                break;
            };
            match read_chain(&live.memory, buffers, &mut frame, self.largest) {
                Ok(Content::Packet(len)) => {
                    count += 1;
                    bytes += len;
                    out.push(frame);
                }
                other => {
                    frame.reset_default();
                    self.stock.push(frame);
                    match other {
                        Err(e) => {
                            error = Some(e);
                            break;
                        }
                        Ok(Content::Offload) => offloads += 1,
                        Ok(_) => {}
                    }
                    refused += 1;
                }
            }
            live.ring.put_used(chain.taken, 0);
        }
        live.ring.publish();
        if refused > 0 {
            self.stats.rx_errors.add(refused);
            counts.offload_refused.fetch_add(offloads, Relaxed);
        }
        self.stats.note_rx(count, bytes);
        (count, error)
    }

    /// Sends from the front of `frames`; how many are done with, sent or refused.
    #[inline(always)]
    fn transmit(&mut self, live: &mut Live, frames: &[Frame]) -> (usize, Option<RingError>) {
        let (mut done, mut sent, mut bytes, mut refused) = (0, 0, 0, 0);
        let mut error = None;
        for frame in frames {
            let before = live.ring.position();
            let needed = frame.len() + NET_HEADER;
            self.chains.clear();
            self.buffers.clear();
            let room = match self.take_room(live, needed) {
                Ok(room) => room,
                Err(e) => {
                    error = Some(e);
                    break;
                }
            };
            if room < needed {
                live.ring.rewind(before);
                if live.mergeable || self.chains.is_empty() {
                    break;
                }
                // The peer's buffers are too small for this packet and always will be.
                done += 1;
                refused += 1;
                continue;
            }
            if let Err(e) = write_packet(&live.memory, &self.buffers, self.chains.len(), frame) {
                error = Some(e);
                break;
            }
            let (mut left, mut start) = (needed, 0);
            for chain in &self.chains {
                let buffers = self.buffers.get(start..chain.end).unwrap_or_default();
                start = chain.end;
                let room: usize = buffers.iter().map(|b| b.len as usize).sum();
                let written = room.min(left);
                left -= written;
                live.ring
                    .put_used(chain.taken, u32::try_from(written).unwrap_or(0));
            }
            done += 1;
            sent += 1;
            bytes += frame.len();
        }
        if sent > 0 {
            live.ring.publish();
            self.stats.note_tx(sent, bytes);
        }
        if refused > 0 {
            self.stats.tx_errors.add(refused);
        }
        (done, error)
    }

    /// Takes chains for `needed` bytes, or as many as there are, and returns their room.
    #[inline(always)]
    fn take_room(&mut self, live: &mut Live, needed: usize) -> Result<usize, RingError> {
        let mut room = 0;
        while room < needed {
            let start = self.buffers.len();
            let Some(taken) = live.ring.next(&*live.memory, &mut self.buffers)? else {
                break;
            };
            for buffer in self.buffers.get(start..).unwrap_or_default() {
                if !buffer.writable {
                    return Err(RingError::Direction);
                }
                room += buffer.len as usize;
            }
            self.chains.push(Chain {
                taken,
                end: self.buffers.len(),
            });
            if !live.mergeable || self.chains.len() >= MAX_CHAIN {
                break;
            }
        }
        Ok(room)
    }
}

impl PortQueue for VhostQueue {
    #[inline]
    fn rx_burst(&mut self, pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let VhostQueue {
            shared, work, pair, ..
        } = self;
        let Some(cell) = shared.pairs.get(*pair).map(|p| &p.rx) else {
            return 0;
        };
        if !cell.running() {
            return 0;
        }
        let Some(mut place) = cell.try_lock() else {
            return 0;
        };
        let Some(live) = place.as_mut() else {
            return 0;
        };
        let (n, error) = work.receive(live, &shared.counts, pool, out, max);
        if n > 0 && live.armed {
            live.armed = false;
            live.ring.disarm();
        }
        if live.ring.wants_call() {
            shared.call(cell);
        }
        if let Some(error) = error {
            work.stats.rx_errors.add(1);
            shared.fail(cell, &mut place, error);
        } else if live.memory.lost() {
            shared.memory_lost(cell, &mut place);
        }
        n
    }

    #[inline]
    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        let target = self.tx_pair();
        let VhostQueue { shared, work, .. } = self;
        let place = target
            .and_then(|i| shared.pairs.get(i))
            .map(|p| (&p.tx, p.tx.lock()));
        let done = match place {
            Some((cell, mut place)) if place.is_some() => {
                let Some(live) = place.as_mut() else {
                    return 0;
                };
                let (mut n, error) = work.transmit(live, frames);
                if live.ring.wants_call() {
                    shared.call(cell);
                }
                if let Some(error) = error {
                    // The frame at which it happened is gone.
                    n += 1;
                    work.stats.tx_errors.add(1);
                    shared.fail(cell, &mut place, error);
                } else if live.memory.lost() {
                    shared.memory_lost(cell, &mut place);
                }
                n
            }
            // Nobody is there.
            _ => {
                work.stats.tx_errors.add(frames.len() as u64);
                frames.len()
            }
        };
        frames
            .drain(..done.min(frames.len()))
            .for_each(|f| pool.put(f));
        done
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.shared.pairs.get(self.pair).map(|p| p.wake.0.as_fd())
    }

    fn arm(&mut self) {
        let Some(pair) = self.shared.pairs.get(self.pair) else {
            return;
        };
        // What has been kicked so far is looked at in the poll that follows.
        let mut events = [EpollEvent::empty(); 4];
        let _ = pair.wake.wait(&mut events, EpollTimeout::ZERO);
        if let Some(live) = pair.rx.lock().as_mut() {
            live.ring.arm();
            live.armed = true;
        }
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.work.stats
    }

    fn drain(&mut self, pool: &mut Pool) {
        pool.put_bulk(&mut self.work.stock);
    }
}

impl Drop for VhostQueue {
    fn drop(&mut self) {
        self.work.stock.drain(..).for_each(Frame::give_back);
    }
}

/// Copies a packet out of the peer's memory into an empty frame.
#[inline(always)]
fn read_chain(
    memory: &PeerMemory,
    buffers: &[Buffer],
    frame: &mut Frame,
    largest: usize,
) -> Result<Content, RingError> {
    let mut header = [0u8; NET_HEADER];
    let mut header_left = NET_HEADER;
    let mut total = 0usize;
    for buffer in buffers {
        if buffer.writable {
            return Err(RingError::Direction);
        }
        total += buffer.len as usize;
    }
    let fits =
        total >= NET_HEADER + SHORTEST && total - NET_HEADER <= largest.min(frame.tailroom());
    if !fits {
        return Ok(Content::Refused);
    }
    for buffer in buffers {
        let outside = || RingError::Memory {
            addr: buffer.addr,
            len: buffer.len,
        };
        let (mut addr, mut len) = (buffer.addr, buffer.len as usize);
        if header_left > 0 {
            let n = header_left.min(len);
            let at = NET_HEADER - header_left;
            let part = header.get_mut(at..at + n).unwrap_or_default();
            if !memory.read(addr, part) {
                return Err(outside());
            }
            header_left -= n;
            len -= n;
            addr = addr.checked_add(n as u64).ok_or_else(outside)?;
        }
        if len > 0 {
            let Some(part) = frame.append(len) else {
                return Ok(Content::Refused);
            };
            if !memory.read(addr, part) {
                return Err(outside());
            }
        }
    }
    // flags and gso_type: neither checksums nor segmentation were agreed on.
    let [flags, gso, ..] = header;
    if flags != 0 || gso != 0 {
        return Ok(Content::Offload);
    }
    Ok(Content::Packet(frame.len()))
}

/// Copies header and packet into the peer's buffers, which have room for them.
#[inline(always)]
fn write_packet(
    memory: &PeerMemory,
    buffers: &[Buffer],
    chains: usize,
    frame: &Frame,
) -> Result<(), RingError> {
    let mut header = [0u8; NET_HEADER];
    let [low, high] = u16::try_from(chains).unwrap_or(1).to_le_bytes();
    header[10] = low;
    header[11] = high;
    let (mut head, mut data) = (&header[..], frame.data());
    for buffer in buffers {
        let outside = || RingError::Memory {
            addr: buffer.addr,
            len: buffer.len,
        };
        let (mut addr, mut room) = (buffer.addr, buffer.len as usize);
        for part in [&mut head, &mut data] {
            let (now, rest) = part.split_at(room.min(part.len()));
            if !now.is_empty() && !memory.write(addr, now) {
                return Err(outside());
            }
            addr = addr.checked_add(now.len() as u64).ok_or_else(outside)?;
            room -= now.len();
            *part = rest;
        }
    }
    Ok(())
}
