//! Two ports of one process, joined by rings: what one sends the other receives, without a copy.
//!
//! Queue *i* of one end is joined to queue *i* of the other by two single-producer rings of frame handles. Both ends must be
//! opened with one arena, since the handles cross as they are. A full ring leaves frames with the sender. Frames that the
//! peer can no longer receive, because it is gone, are dropped and counted as `tx_errors`.

use std::mem::ManuallyDrop;
use std::sync::{Arc, OnceLock};

use rtrb::{Consumer, Producer, RingBuffer};

use crate::arena::Arena;
use crate::frame::Frame;
use crate::pool::Pool;
use crate::port::{MacAddr, Port, PortError, PortInfo, PortQueue, PortQueueStats, check_queues};

/// What a pair looks like.
#[derive(Debug, Clone)]
pub struct PairConfig {
    /// Queue pairs of each end.
    pub queues: usize,
    /// Frames that each ring holds.
    pub ring: usize,
    /// Largest IP packet that the ends announce, in bytes.
    pub mtu: u32,
}

impl Default for PairConfig {
    fn default() -> Self {
        PairConfig {
            queues: 1,
            ring: 1024,
            mtu: 1500,
        }
    }
}

/// One end of a pair.
pub struct MemoryPort {
    info: PortInfo,
    rings: Vec<(Producer<Parcel>, Consumer<Parcel>)>,
    arena: Arc<OnceLock<u32>>,
}

/// One queue pair of a [`MemoryPort`].
pub struct MemoryQueue {
    tx: Producer<Parcel>,
    rx: Consumer<Parcel>,
    stats: Arc<PortQueueStats>,
}

/// Makes two joined ports. Their Ethernet addresses are fixed, locally administered and different.
pub fn pair(a: &str, b: &str, config: &PairConfig) -> (MemoryPort, MemoryPort) {
    let arena = Arc::new(OnceLock::new());
    let (mut rings_a, mut rings_b) = (Vec::new(), Vec::new());
    for _ in 0..config.queues.max(1) {
        let (ab, ba) = (
            RingBuffer::new(config.ring.max(1)),
            RingBuffer::new(config.ring.max(1)),
        );
        rings_a.push((ab.0, ba.1));
        rings_b.push((ba.0, ab.1));
    }
    let end = |name: &str, last, rings: Vec<_>| MemoryPort {
        info: PortInfo {
            name: name.into(),
            kind: "memory",
            mac: MacAddr([0x02, 0, 0, 0, 0, last]),
            mtu: config.mtu,
            max_queues: rings.len(),
            mode: "shared frames".into(),
        },
        rings,
        arena: Arc::clone(&arena),
    };
    (end(a, 0xa, rings_a), end(b, 0xb, rings_b))
}

impl MemoryPort {
    /// Sets the Ethernet address that the port announces.
    pub fn with_mac(mut self, mac: MacAddr) -> MemoryPort {
        self.info.mac = mac;
        self
    }

    /// As [`Port::queues`], with the queues' own type.
    ///
    /// # Errors
    /// `Queues` unless `n` is the number that the pair was made with, `ForeignArena` when the peer uses another arena.
    pub fn open(self, n: usize, arena: &Arc<Arena>) -> Result<Vec<MemoryQueue>, PortError> {
        check_queues(&self.info.name, n, self.rings.len())?;
        if n != self.rings.len() {
            // The peer would send to queues that nobody empties.
            return Err(PortError::Queues {
                port: self.info.name,
                asked: n,
                most: self.rings.len(),
            });
        }
        if *self.arena.get_or_init(|| arena.id()) != arena.id() {
            return Err(PortError::ForeignArena {
                port: self.info.name,
            });
        }
        Ok(self
            .rings
            .into_iter()
            .map(|(tx, rx)| MemoryQueue {
                tx,
                rx,
                stats: Arc::default(),
            })
            .collect())
    }
}

impl Port for MemoryPort {
    fn info(&self) -> PortInfo {
        self.info.clone()
    }

    fn queues(
        self: Box<Self>,
        n: usize,
        arena: &Arc<Arena>,
    ) -> Result<Vec<Box<dyn PortQueue>>, PortError> {
        let queues = self.open(n, arena)?;
        Ok(queues
            .into_iter()
            .map(|q| Box::new(q) as Box<dyn PortQueue>)
            .collect())
    }
}

impl PortQueue for MemoryQueue {
    #[inline]
    fn rx_burst(&mut self, _pool: &mut Pool, out: &mut Vec<Frame>, max: usize) -> usize {
        let n = self.rx.slots().min(max);
        if n == 0 {
            return 0;
        }
        let Ok(chunk) = self.rx.read_chunk(n) else {
            return 0;
        };
        let mut bytes = 0;
        out.extend(chunk.into_iter().map(|parcel| {
            let frame = parcel.open();
            bytes += frame.len();
            frame
        }));
        self.stats.note_rx(n, bytes);
        n
    }

    #[inline]
    fn tx_burst(&mut self, pool: &mut Pool, frames: &mut Vec<Frame>) -> usize {
        if self.tx.is_abandoned() {
            let n = frames.len();
            self.stats.tx_errors.add(n as u64);
            pool.put_bulk(frames);
            return n;
        }
        let n = self.tx.slots().min(frames.len());
        if n == 0 {
            return 0;
        }
        let Ok(chunk) = self.tx.write_chunk_uninit(n) else {
            return 0;
        };
        let mut bytes = 0;
        let sent = chunk.fill_from_iter(frames.drain(..n).map(|frame| {
            bytes += frame.len();
            Parcel::new(frame)
        }));
        self.stats.note_tx(sent, bytes);
        sent
    }

    fn stats(&self) -> &Arc<PortQueueStats> {
        &self.stats
    }

    fn drain(&mut self, pool: &mut Pool) {
        while let Ok(parcel) = self.rx.pop() {
            pool.put(parcel.open());
        }
    }
}

/// A frame in a ring. Unlike a bare frame it may be dropped: the ring of an ended pair brings its frames home.
struct Parcel(ManuallyDrop<Frame>);

impl Parcel {
    #[inline(always)]
    fn new(frame: Frame) -> Parcel {
        Parcel(ManuallyDrop::new(frame))
    }

    #[inline(always)]
    fn open(self) -> Frame {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped nor used again, so the frame is taken exactly once.
        unsafe { ManuallyDrop::take(&mut this.0) }
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        // SAFETY: the parcel is being dropped and was not opened: the frame is taken exactly once.
        unsafe { ManuallyDrop::take(&mut self.0) }.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::ArenaConfig;
    use crate::port::BURST;
    use proptest::prelude::*;

    fn arena(frames: u32) -> Arc<Arena> {
        Arena::new(ArenaConfig {
            frames,
            stride: 256,
            headroom: 128,
            ..ArenaConfig::default()
        })
        .unwrap()
    }

    fn ends(arena: &Arc<Arena>, ring: usize) -> (MemoryQueue, MemoryQueue) {
        let (a, b) = pair(
            "a",
            "b",
            &PairConfig {
                ring,
                ..PairConfig::default()
            },
        );
        (
            a.open(1, arena).unwrap().remove(0),
            b.open(1, arena).unwrap().remove(0),
        )
    }

    #[test]
    fn frames_cross_in_order_without_a_copy_and_the_rest_stays() {
        let arena = arena(64);
        let mut pool = Pool::new(&arena, 16);
        let (mut a, mut b) = ends(&arena, 8);
        let mut frames = Vec::new();
        pool.get_bulk(&mut frames, 10);
        for (i, f) in (0u8..).zip(&mut frames) {
            assert!(f.set_data(&[i; 60]));
        }
        let sent: Vec<u32> = frames.iter().map(Frame::index).collect();
        assert_eq!(a.tx_burst(&mut pool, &mut frames), 8);
        assert_eq!(
            frames.iter().map(|f| f.data()[0]).collect::<Vec<_>>(),
            [8, 9]
        );
        let mut got = Vec::new();
        assert_eq!(b.rx_burst(&mut pool, &mut got, 5), 5);
        assert_eq!(b.rx_burst(&mut pool, &mut got, BURST), 3);
        assert_eq!(b.rx_burst(&mut pool, &mut got, BURST), 0);
        assert_eq!(got.iter().map(Frame::index).collect::<Vec<_>>(), sent[..8]);
        assert!((0u8..).zip(&got).all(|(i, f)| f.data() == [i; 60]));
        assert_eq!(a.stats().tx_packets.value(), 8);
        assert_eq!(b.stats().rx_bytes.value(), 480);
        pool.put_bulk(&mut got);
        pool.put_bulk(&mut frames);
        assert_eq!(arena.outstanding(), 0);
    }

    #[test]
    fn frames_in_the_rings_of_a_dropped_pair_come_home() {
        let arena = arena(16);
        let mut pool = Pool::new(&arena, 4);
        let (mut a, b) = ends(&arena, 8);
        let mut frames = vec![pool.get().unwrap(), pool.get().unwrap()];
        a.tx_burst(&mut pool, &mut frames);
        drop(b);
        frames.push(pool.get().unwrap());
        assert_eq!(a.tx_burst(&mut pool, &mut frames), 1);
        assert_eq!(a.stats().tx_errors.value(), 1);
        drop(a);
        assert_eq!(arena.outstanding(), 0);
    }

    #[test]
    fn ends_with_different_arenas_or_queues_are_refused() {
        let (a, b) = pair("a", "b", &PairConfig::default());
        a.open(1, &arena(1)).unwrap();
        assert!(matches!(
            b.open(1, &arena(1)),
            Err(PortError::ForeignArena { .. })
        ));
        let config = PairConfig {
            queues: 2,
            ..PairConfig::default()
        };
        for n in [0, 1, 3] {
            let (a, _b) = pair("a", "b", &config);
            assert!(matches!(
                a.open(n, &arena(1)),
                Err(PortError::Queues { .. })
            ));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_frame_is_lost_doubled_or_reordered(
            ring in 1usize..20,
            steps in prop::collection::vec((any::<bool>(), 0usize..12), 1..60),
        ) {
            let arena = arena(64);
            let mut pool = Pool::new(&arena, 8);
            let (mut a, mut b) = ends(&arena, ring);
            let (mut waiting, mut got) = (Vec::new(), Vec::new());
            let (mut next, mut expected) = (0u32, 0u32);
            for (send, n) in steps {
                if send {
                    for _ in 0..n {
                        let Some(mut f) = pool.get() else { break };
                        prop_assert!(f.set_data(&next.to_le_bytes()));
                        next += 1;
                        waiting.push(f);
                    }
                    a.tx_burst(&mut pool, &mut waiting);
                } else {
                    b.rx_burst(&mut pool, &mut got, n);
                    for f in got.drain(..) {
                        prop_assert_eq!(f.data(), expected.to_le_bytes());
                        expected += 1;
                        pool.put(f);
                    }
                }
            }
            pool.put_bulk(&mut waiting);
            b.drain(&mut pool);
            prop_assert_eq!(arena.outstanding(), 0);
        }
    }

    #[test]
    fn two_threads_exchange_every_frame_in_order() {
        let total: u32 = 200_000;
        let arena = arena(512);
        let (mut a, mut b) = ends(&arena, 64);
        let mut pool = Pool::new(&arena, 32);
        let receiver = std::thread::spawn({
            let mut pool = Pool::new(&arena, 32);
            move || {
                let mut got = Vec::new();
                let mut expected = 0u32;
                while expected < total {
                    b.rx_burst(&mut pool, &mut got, BURST);
                    for f in got.drain(..) {
                        assert_eq!(f.data(), expected.to_le_bytes());
                        expected += 1;
                        pool.put(f);
                    }
                    std::hint::spin_loop();
                }
                b
            }
        });
        let mut frames = Vec::new();
        let mut next = 0u32;
        while next < total || !frames.is_empty() {
            while frames.len() < BURST && next < total {
                let Some(mut f) = pool.get() else { break };
                assert!(f.set_data(&next.to_le_bytes()));
                frames.push(f);
                next += 1;
            }
            if a.tx_burst(&mut pool, &mut frames) == 0 {
                std::thread::yield_now();
            }
        }
        receiver.join().unwrap();
        drop(pool);
        assert_eq!(arena.depot_level(), 512);
    }
}
