//! The block over registers that the tests play by hand.

use super::*;
use crate::arena::ArenaConfig;
use crate::device::RegisterSpace;
use crate::device::model::{ModelBus, ModelDevice};
use crate::pool::Pool;
use crate::port::{MacAddr, Port};
use crate::qdma::tests::{Player, Registers};

struct Rig {
    block: Block,
    player: Player,
    fe: Arc<Registers>,
    arena: Arc<Arena>,
}

/// A device, the player of its rings, its packet switch.
fn device() -> (Arc<dyn Device>, Player, Arc<Registers>) {
    let bus = ModelBus::new();
    let (fe, regs) = (Registers::new(), Registers::new());
    fe.set(PSE_FC_CFG, u32::MAX);
    let spaces: [(u32, Arc<dyn RegisterSpace>); 2] =
        [(0, Arc::clone(&fe) as _), (1, Arc::clone(&regs) as _)];
    let device = Arc::new(ModelDevice::new("eth", &bus, vec![], spaces).unwrap());
    (device, Player::new(&bus, &regs), fe)
}

fn rig() -> Rig {
    let (device, player, fe) = device();
    let arena = Arena::new(ArenaConfig {
        frames: 4096,
        ..ArenaConfig::default()
    })
    .unwrap();
    let block = Block::new(&device, None, vec![QdmaPlan::shared(0, 2, true)], &arena).unwrap();
    Rig {
        block,
        player,
        fe,
        arena,
    }
}

fn options(name: &str, gdm: u8) -> PortOptions {
    PortOptions {
        name: name.into(),
        instance: 0,
        gdm: Gdm::new(gdm).unwrap(),
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
    }
}

#[test]
fn frames_pass_both_ways_and_each_port_gets_its_own() {
    let mut rig = rig();
    let arena = Arc::clone(&rig.arena);
    let mut pool = Pool::new(&arena, 16);
    let open = |o| Box::new(rig.block.port(o)).queues(1, &arena);
    let mut lan = open(options("lan", 1)).unwrap().remove(0);
    let mut wan = open(options("wan", 2)).unwrap().remove(0);
    assert!(open(options("lan2", 1)).is_err());
    rig.block.start().unwrap();

    let from = |source: u32| [0, source << 21, 0];
    for source in [0x10, 0x14, 2, 7] {
        assert!(
            rig.player
                .give(0, &[u8::try_from(source).unwrap(); 64], from(source), 0)
        );
    }
    let mut frames = Vec::new();
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 2);
    assert_eq!(frames[1].data(), [0x14; 64]);
    assert_eq!(wan.rx_burst(&mut pool, &mut frames, 64), 1);
    assert_eq!(rig.block.hub().lock().strays(), 1);

    // A result of an engine that nobody has is no frame of a port.
    let mut result = [0; 80];
    result[..14].copy_from_slice(&crate::qdma::hub::dummy_header(false));
    assert!(rig.player.give(1, &result, [3, 2 << 21, 0], 0));
    assert_eq!(wan.rx_burst(&mut pool, &mut frames, 64), 0);
    assert_eq!(rig.block.hub().lock().strays(), 2);

    frames[0].trim_back(30);
    assert_eq!(lan.tx_burst(&mut pool, &mut frames), 3);
    let given = rig.player.take(0).unwrap();
    assert_eq!((given.bytes.len(), given.bytes[59]), (60, 0));
    assert_eq!(given.msg[1], 0x7f10_07ff);
    rig.player.done(0, given.slot, true);
    lan.flush(&mut pool);
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 0);
    assert_eq!(
        (
            lan.stats().tx_packets.value(),
            lan.stats().tx_errors.value()
        ),
        (3, 1)
    );

    let control = rig.block.control.clone();
    control.request_reset();
    rig.player.restart();
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 0);
    assert!(rig.player.give(0, &[9; 64], from(0x11), 0));
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 1);
    control.quiesce();
    assert_eq!(rig.player.regs.get(GLOBAL_CFG) & DMA_ENABLES, 0);
    pool.put_bulk(&mut frames);
    lan.drain(&mut pool);
    drop((lan, wan, rig.block));
    assert_eq!(arena.outstanding(), 0);
}

#[test]
fn without_an_engine_port_7_is_left_alone() {
    let rig = rig();
    assert!(rig.block.engine(SoeConfig::default()).is_err());
    assert_eq!(rig.fe.get(PSE_FC_CFG), u32::MAX);
    let foreign = Arena::new(ArenaConfig {
        frames: 64,
        ..ArenaConfig::default()
    })
    .unwrap();
    let port = Box::new(rig.block.port(options("lan", 1)));
    assert!(matches!(
        port.queues(1, &foreign),
        Err(crate::port::PortError::ForeignArena { .. })
    ));
    let mut long = options("lan", 1);
    long.mtu = 9000;
    let port = Box::new(rig.block.port(long));
    assert!(port.queues(1, &rig.arena).is_err());
}

#[test]
fn a_port_goes_on_when_its_block_is_opened_anew_and_waits_for_nobody() {
    let rig = rig();
    let arena = Arc::clone(&rig.arena);
    let mut pool = Pool::new(&arena, 16);
    let port = Box::new(rig.block.port(options("lan", 1)));
    let mut lan = port.queues(1, &arena).unwrap().remove(0);
    rig.block.start().unwrap();
    let from = [0, 0x10 << 21, 0];
    let mut frames = Vec::new();

    // Somebody resets the rings: the worker's turn ends at once, and its frames stay with it.
    frames.extend(pool.get());
    assert!(frames[0].set_data(&[7; 64]));
    let held = rig.block.hub().lock();
    assert_eq!(lan.tx_burst(&mut pool, &mut frames), 0);
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 0);
    lan.flush(&mut pool);
    drop(held);
    assert_eq!(frames.len(), 1);

    let (again, mut player, _) = device();
    rig.block.reopen(&again, None).unwrap();
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 0);
    rig.block.start().unwrap();
    assert!(player.give(0, &[1; 64], from, 0));
    assert_eq!(lan.tx_burst(&mut pool, &mut frames), 1);
    assert_eq!(player.take(0).unwrap().bytes, [7; 64]);
    assert_eq!(lan.rx_burst(&mut pool, &mut frames, 64), 1);
    pool.put_bulk(&mut frames);
    let control = rig.block.control.clone();
    control.quiesce();
    assert_eq!(player.regs.get(GLOBAL_CFG) & DMA_ENABLES, 0);
    lan.drain(&mut pool);
    drop((lan, rig.block));
    assert_eq!(arena.outstanding(), 0);
}
