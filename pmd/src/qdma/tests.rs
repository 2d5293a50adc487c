//! An instance whose other side the tests play by hand.

use super::descriptor::{CTRL, DONE, DROP};
pub(crate) use super::player::{Player, Registers};
use super::regs::ring;
use super::*;
use crate::arena::ArenaConfig;
use crate::device::RegisterSpace;
use crate::device::model::{ModelBus, ModelDevice};

/// An instance, its other side, and a pool of its arena.
pub(crate) fn rig(plan: QdmaPlan) -> (Qdma, Player, Pool) {
    let bus = ModelBus::new();
    let regs = Registers::new();
    let spaces: [(u32, Arc<dyn RegisterSpace>); 1] = [(0, Arc::clone(&regs) as _)];
    let device: Arc<dyn Device> = Arc::new(ModelDevice::new("eth", &bus, vec![], spaces).unwrap());
    let arena = Arena::new(ArenaConfig {
        frames: 4096,
        ..ArenaConfig::default()
    })
    .unwrap();
    let qdma = Qdma::new(&device, device.region(0).unwrap(), plan, &arena).unwrap();
    (qdma, Player::new(&bus, &regs), Pool::new(&arena, 16))
}

fn frame(pool: &mut Pool, bytes: &[u8]) -> Frame {
    let mut f = pool.get().unwrap();
    assert!(f.set_data(bytes));
    f
}

#[test]
fn an_instance_is_started_as_the_public_driver_does() {
    let (mut q, player, mut pool) = rig(QdmaPlan::shared(0, 2, true));
    player.regs.set(regs::int_enable(2, 1), 0xffff);
    q.start(&mut pool).unwrap();
    let r = &player.regs;
    assert_eq!(r.get(regs::GLOBAL_CFG), 0x7638_0065);
    assert_eq!(r.get(regs::int_enable(2, 1)), 0);
    // Ring 2 waits, and has reports of its own; ring 0 may drop.
    assert_eq!(r.get(0x144), regs::TX_IRQ_QUEUE_1);
    assert_eq!(r.get(0x104), regs::TX_DROP_EN);
    // 1024 descriptors in ring 1, one of which stays empty.
    assert_eq!(r.get(0x224), 32 << 16 | 1024);
    assert_eq!((r.get(0x228), r.get(0x22c), r.get(0x234)), (1023, 0, 1));
    assert_eq!(r.get(0x54), 1 << 16 | 2048);
    assert_eq!(r.get(0x4c), 1 << 16 | 1024);
    assert_eq!(r.get(0x1000), 1 << 30 | 512);
    assert_eq!(r.get(0x10a0) >> 30, 0);
    q.stop(&mut pool).unwrap();
    assert_eq!(r.get(regs::GLOBAL_CFG) & 5, 0);
    drop(q);
    assert_eq!(pool.arena().outstanding(), 0);
}

#[test]
fn registers_that_do_not_answer_are_no_instance() {
    let bus = ModelBus::new();
    let device: Arc<dyn Device> = Arc::new(ModelDevice::new("none", &bus, vec![], []).unwrap());
    let arena = Arena::new(ArenaConfig {
        frames: 4096,
        ..ArenaConfig::default()
    })
    .unwrap();
    let new = |regs, plan| Qdma::new(&device, regs, plan, &arena);
    assert!(new(Mmio::memory(16), QdmaPlan::shared(0, 2, true)).is_err());
    let mut twice = QdmaPlan::shared(0, 2, true);
    twice.rx.push((1, 64));
    assert!(matches!(
        new(Mmio::memory(WINDOW), twice),
        Err(QdmaError::Ring(1))
    ));
    let mut odd = QdmaPlan::shared(0, 2, true);
    odd.rx[0].1 = 100;
    assert!(matches!(
        new(Mmio::memory(WINDOW), odd),
        Err(QdmaError::RingSize(100))
    ));
    // Start bit that never clears.
    let mut q = new(Mmio::memory(WINDOW), QdmaPlan::shared(1, 2, true)).unwrap();
    let mut pool = Pool::new(&arena, 16);
    assert!(q.start(&mut pool).is_err());
    q.stop(&mut pool).unwrap();
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn frames_go_round_a_transmit_ring_and_are_reported_once() {
    let (mut q, mut player, mut pool) = rig(QdmaPlan::shared(0, 2, true));
    q.start(&mut pool).unwrap();
    let mut reported = Vec::new();
    let mut reports = 0;
    for n in 0..3000u64 {
        let f = frame(&mut pool, &n.to_le_bytes());
        q.send(0, f, TxMsg::frame(PsePort::GDM1), n).unwrap();
        q.kick();
        let given = player.take(0).unwrap();
        assert_eq!(given.bytes, n.to_le_bytes());
        assert_eq!(given.msg, [0, 0x7f10_07ff, 0xffff]);
        player.done(0, given.slot, n % 100 == 7);
        // The report queue, which the driver must empty before it is full.
        let status = player.regs.get(0x5c);
        let (head, held) = (status & 0xfff, status >> 16);
        assert!(held < 2048);
        let base = u64::from(player.regs.get(0x50));
        player.put(base + u64::from((head + held) % 2048) * 4, given.slot);
        player.regs.set(0x5c, (held + 1) << 16 | head);
        reports += 1;
        q.reap(&mut pool, &mut |s| reported.push((s.cookie, s.dropped)));
    }
    assert_eq!(reports, 3000);
    let expected: Vec<_> = (0..3000).map(|n| (n, n % 100 == 7)).collect();
    assert_eq!(reported, expected);
    assert_eq!(q.counters().tx_dropped.value(), 30);
    assert_eq!(q.counters().bad_reports.value(), 0);
    q.stop(&mut pool).unwrap();
    assert_eq!(pool.arena().outstanding(), 0);
}

#[test]
fn a_full_ring_gives_frames_back_and_one_doorbell_serves_many() {
    let (mut q, mut player, mut pool) = rig(QdmaPlan::shared(0, 2, true));
    q.start(&mut pool).unwrap();
    let mut sent = 0;
    let rest = loop {
        let f = frame(&mut pool, &[0; 60]);
        match q.send(2, f, TxMsg::hop(0, 8), sent) {
            Ok(()) => sent += 1,
            Err(f) => break f,
        }
    };
    pool.put(rest);
    assert_eq!((sent, q.room(2), q.room(0)), (1023, 0, 1023));
    assert!(player.take(2).is_none());
    q.kick();
    q.kick();
    assert_eq!(q.counters().doorbells.value(), 1);
    // Out of order: the second is done, but the first holds the ring.
    let (first, second) = (player.take(2).unwrap(), player.take(2).unwrap());
    player.done(2, second.slot, false);
    let mut cookies = Vec::new();
    q.reap(&mut pool, &mut |s| cookies.push(s.cookie));
    assert!(cookies.is_empty());
    player.done(2, first.slot, false);
    q.reap(&mut pool, &mut |s| cookies.push(s.cookie));
    assert_eq!((cookies, q.room(2)), (vec![0, 1], 2));
    let f = frame(&mut pool, &[0; 60]);
    let f = q.send(9, f, TxMsg::hop(0, 8), 0).unwrap_err();
    pool.put(f);
    q.stop(&mut pool).unwrap();
    assert_eq!(pool.arena().outstanding(), 0);
}

#[test]
fn what_does_not_fit_a_buffer_is_reported_once_and_without_content() {
    let (mut q, mut player, mut pool) = rig(QdmaPlan::shared(0, 2, true));
    q.start(&mut pool).unwrap();
    let msg = [3, 0, 7 << 24];
    assert!(player.give(1, &[1; 100], msg, 0));
    assert!(player.give(1, &[2; 5000], msg, 0));
    assert!(player.give(1, &[3; 60], msg, DROP));
    assert!(player.give(10, &[4; 64], msg, 0));
    assert!(player.give_words(1, DONE, msg));
    assert!(player.give_words(1, DONE | 0xffff, msg));
    let mut seen = Vec::new();
    q.poll(&mut pool, 64, &mut |pool, r| {
        assert_eq!((r.msg.hop_flags(), r.msg.user_field()), (3, 7));
        seen.push((r.ring, r.frame.len(), r.fault));
        pool.put(r.frame);
    });
    let lost = |fault| (1, 0, Some(fault));
    assert_eq!(
        seen,
        [
            (1, 100, None),
            lost(RxFault::TooLong),
            lost(RxFault::Overflow),
            lost(RxFault::Length),
            lost(RxFault::Length),
            (10, 64, None),
        ]
    );
    // All rings are full again.
    assert_eq!(player.regs.get(regs::rx_ring(10) + ring::CPU), 63);
    q.stop(&mut pool).unwrap();
    assert_eq!(pool.arena().outstanding(), 0);
}

#[test]
fn a_device_that_does_not_stop_keeps_its_frames() {
    let (mut q, player, mut pool) = rig(QdmaPlan::shared(0, 2, true));
    q.start(&mut pool).unwrap();
    struct Busy(Arc<Registers>);
    impl RegisterSpace for Busy {
        fn read(&self, at: usize, size: usize) -> u64 {
            let busy = u64::from(at == regs::GLOBAL_CFG) * u64::from(regs::TX_DMA_BUSY);
            self.0.read(at, size) | busy
        }
        fn write(&self, at: usize, size: usize, value: u64) {
            self.0.write(at, size, value);
        }
        fn len(&self) -> usize {
            WINDOW
        }
    }
    let idle = std::mem::replace(
        &mut q.regs,
        Mmio::trapped(Arc::new(Busy(Arc::clone(&player.regs)))),
    );
    let held = pool.arena().outstanding();
    assert!(q.stop(&mut pool).is_err());
    assert_eq!(pool.arena().outstanding(), held);
    q.regs = idle;
    q.stop(&mut pool).unwrap();
    assert_eq!(pool.arena().outstanding(), 0);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]
    /// Whatever a device writes into its rings, report queues and registers, every frame is somewhere.
    #[test]
    fn no_device_can_make_a_frame_appear_twice(
        steps in proptest::collection::vec(
            (0u8..7, 0u8..32, proptest::prelude::any::<u32>(), proptest::prelude::any::<u32>()),
            1..120,
        ),
    ) {
        let mut plan = QdmaPlan::shared(0, 2, true);
        plan.rx = vec![(0, 16), (1, 64)];
        let (mut q, mut player, mut pool) = rig(plan);
        q.start(&mut pool).unwrap();
        for (kind, n, a, b) in steps {
            let ring = n & 3;
            match kind {
                0 => {
                    let f = frame(&mut pool, &[0; 60]);
                    if let Err(f) = q.send(ring, f, TxMsg::hop(n, 8), u64::from(b)) {
                        pool.put(f);
                    }
                    q.kick();
                }
                1 if player.regs.get(regs::rx_ring(ring)) != 0 => {
                    player.give_words(ring, a, [b, a, b]);
                }
                2 if player.regs.get(regs::tx_ring(ring)) != 0 => {
                    let at = player.tx_descriptor(ring, b % 1024) + CTRL as u64;
                    player.put(at, a);
                }
                3 => {
                    let base = u64::from(player.regs.get(0x50));
                    player.put(base + u64::from(b % 2048) * 4, a);
                    player.regs.set(0x5c, a);
                }
                4 => player.regs.set(regs::INT_STATUS[usize::from(n % 5)], a),
                5 => {
                    let _ = q.events();
                    for r in &mut q.reports {
                        r.drain(&Mmio::memory(WINDOW), &mut q.tx, &mut pool, &q.counters, &mut |_| {});
                    }
                }
                _ => {
                    q.reap(&mut pool, &mut |_| {});
                    q.poll(&mut pool, 64, &mut |pool, r| pool.put(r.frame));
                }
            }
        }
        player.regs.set(0x5c, 0);
        q.stop(&mut pool).unwrap();
        proptest::prop_assert_eq!(pool.arena().outstanding(), 0);
    }
}
